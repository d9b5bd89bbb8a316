"""Files that are written whole or not at all; what torch.save wrote, read again, and put into a module.

Needs torch; imports nothing of ours, so it can be copied alone.
"""
import contextlib
import errno
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


# ---- files ----

@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: yields a temporary path to write; it replaces `path` if the block ends without an error.
    An OSError names the path."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: str | bytes | memoryview) -> None:
    """Replace the file whole: a reader, or a crash, meets the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save(path: Path, state: dict) -> None:
    """torch.save. Raises OSError for a full disk, which torch hides behind a RuntimeError."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def save_atomic(path: str | os.PathLike, state: dict) -> None:
    """`save`, replacing the file whole."""
    with replacing(path) as temporary:
        save(temporary, state)


def read_file(path: str | os.PathLike, wanted: str, mapped: bool = False) -> object:
    """What torch.save wrote, on the CPU, loaded with weights_only; mapped: tensors stay in the file until used.
    Raises ValueError with what was wanted if it is missing or torch cannot load it, OSError if the disk fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: wanted {wanted}, got no such file") from None
    except Exception as error:  # whatever unpickling or the zip reader raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek in a file that is cut off
            raise  # the disk fails, not the file: a resumed run must not fall back to an older checkpoint
        raise ValueError(f"{path}: wanted {wanted}, got what torch cannot load ({type(error).__name__})") from None


# ---- weights ----

MOST_NAMED = 10  # tensors in an error


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str,
                 names: Callable[[str], list[str]] = lambda name: [name], adopt: bool = False) -> None:
    """Put all weights into the model. Raises one ValueError that names what is missing, unused or misshapen.
    names(our name): the file's names of the tensors that, concatenated along dim 0, make ours. adopt: the tensors
    themselves replace the model's own and are not copied."""
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
        more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise ValueError(f"{place}: weights do not fit the model of its config: {'; '.join(wrong[:MOST_NAMED])}{more}")
    found = {}
    for name, x in own.items():
        parts = [weights[part] for part in names(name)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
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
