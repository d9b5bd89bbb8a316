"""Tensors into a module: strictly by name, and without drawing random weights first. Needs torch: copy it alone."""
from collections.abc import Callable

from torch import Tensor, cat, nn
from torch.overrides import TorchFunctionMode

def same_name(name: str) -> list[str]:
    return [name]


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str,
                 names: Callable[[str], list[str]] = same_name, adopt: bool = False) -> None:
    """Put all weights into the model. Raises one ValueError that names every missing, unused and misshapen tensor.

    names(our name): the file's names of the tensors that, concatenated along dim 0, make ours. adopt: the tensors
    themselves replace the model's own and are not copied.
    """
    own = model.state_dict()
    wanted = {}
    for name, x in own.items():
        parts = names(name)
        part = x if len(parts) == 1 else x.chunk(len(parts))[0]
        wanted.update(dict.fromkeys(parts, part))
    wrong = [f"missing {name}" for name in wanted if name not in weights]
    wrong += [f"unused {name}" for name in weights if name not in wanted]
    for name, x in weights.items():
        if name in wanted and x.shape != wanted[name].shape:
            wrong.append(f"{name} {tuple(x.shape)}, wanted {tuple(wanted[name].shape)}")
        elif name in wanted and x.is_floating_point() != wanted[name].is_floating_point():
            wrong.append(f"{name} {x.dtype}, wanted {wanted[name].dtype}")
    if wrong:
        raise ValueError(f"{place}: weights do not fit the model of its config: {'; '.join(wrong)}")
    found = {}
    for name, x in own.items():
        parts = [weights[part] for part in names(name)]
        whole = parts[0] if len(parts) == 1 else cat(parts)
        found[name] = whole.to(x.dtype)
    model.load_state_dict(found, assign=adopt)


class WithoutInit(TorchFunctionMode):
    """Within it, new modules leave their weights uninitialised and draw no random numbers."""

    INITIALISERS = ("uniform_", "normal_", "fill_", "zero_", "kaiming_uniform_", "xavier_uniform_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
