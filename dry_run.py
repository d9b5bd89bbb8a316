"""What a run of train.py will be, before it begins: sizes by module, shapes, memory and time, from a few steps.

Reading order: shapes, a traced step, the report. Needs torch, data.py and step.py. A run is
that of train.py: with config, model, average, optimizer and train_set.
"""
from collections.abc import Iterable, Iterator, Sequence
from timeit import timeit

import torch
from torch import Tensor, nn

import data
from step import train_step


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def rehearse(run, batches: Iterable[data.Batch], rate: float) -> None:
    """Training steps outside a run: nothing is logged, averaged or counted."""
    for batch in batches:
        train_step(run.model, run.optimizer, batch, rate, run.config.training)


def shape_of(value: object) -> str:
    """The shapes of the tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape)).replace(" ", "")
    if not isinstance(value, (tuple, list)):
        return ""
    shapes = [shape_of(x) for x in value]
    return " ".join(shape for shape in shapes if shape)


def traced_step(run, batch: data.Batch) -> tuple[list[str], float]:
    """One step -> a line for every module and part: its parameters, their share, the shapes that went in and came out;
    and the MB kept for the backward pass. Uses hooks, so that the shapes are those of a real step."""
    shapes, hooks = {}, []
    kept = {x.untyped_storage().data_ptr(): 0 for x in run.model.state_dict().values()}  # weights: 0 bytes
    parts = {name: part for name, part in run.model.named_modules() if name.count(".") < 2 and num_parameters(part)}

    def watch(name: str, part: nn.Module) -> None:
        def note(_: nn.Module, given: tuple, out: object) -> None:
            shapes[name] = f"  {shape_of(given)} -> {shape_of(out)}"
        hooks.append(part.register_forward_hook(note))

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    for name, part in parts.items():
        if name:  # not the whole model
            watch(name, part)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rehearse(run, [batch], 0.0)
    for hook in hooks:
        hook.remove()
    total, lines = num_parameters(run.model), []
    for name, part in parts.items():
        count, label = num_parameters(part), "  " * name.count(".") + (name or "model")
        lines.append(f"{label:<32}{count:>14,}{count / total:>8.1%}{shapes.get(name, '')}")
    return lines, sum(kept.values()) / 1e6


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def describe(run, batches: Sequence[list[int]]) -> Iterator[str]:
    """What a run will be, whose first epoch has these batches: sizes by module, shapes, memory and time."""
    like = next(run.model.parameters())
    lengths = run.train_set.lengths(0)
    by_size = sorted(batches, key=lambda batch: len(batch) * int(lengths[batch].max()))
    chosen = [by_size[len(by_size) * k // 6] for k in (1, 3, 5)] + by_size[-1:]  # middles of thirds, largest
    *typical, largest = data.loader(run.train_set, chosen)
    lines, activations = traced_step(run, largest)
    yield f"the largest batch of the first epoch: feats {shape_of(largest.feats)}, tokens {shape_of(largest.tokens)}\n"
    yield from lines
    copies, what = (4, "") if run.average is run.model else (5, " and the average")
    yield (f"\nmemory: {copies * num_parameters(run.model) * like.element_size() / 1e6:.0f} MB for weights, "
           f"gradients and two moments{what}, {activations:.0f} MB of activations for that batch")
    step_sec = timeit(lambda: rehearse(run, typical, 0.0), number=1) / len(typical)
    steps = len(by_size) * run.config.training.num_epochs
    yield (f"time: {step_sec * 1e3:.0f} ms a step, {len(by_size)} steps an epoch, {steps} in all: about "
           f"{clock(step_sec * steps)} of steps, evaluation not counted; on {like.device}")
