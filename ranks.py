"""Several processes that work on one thing, started by torchrun: who is who, sums over all, one gradient from all.

Without torchrun there is one rank, and every function here does nothing or gives back what it was given.
Reading order: joining, sums, gradients, statistics of BatchNorm. Needs torch.
"""
import datetime
import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


# ---- joining ----

def join_processes(backend: str = "gloo", timeout: datetime.timedelta | None = None) -> tuple[int, int]:
    """(rank, processes) as torchrun sets them, each with a GPU of its own where there are; (0, 1) without torchrun."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        distributed.init_process_group(backend, timeout=timeout)
    return rank, processes


def is_first_process() -> bool:
    """Whether this process has rank 0 or will have it: also true before it has joined."""
    return int(os.environ.get("RANK", 0)) == 0


def own_rank() -> int:
    """The number of this process among those of the run; number 0 writes."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def num_ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


# ---- sums ----

def sum_by_name(totals: dict, more: dict) -> dict:
    """The sums of both by name, of lists the items of both; a name that only one has counts as 0 in the other."""
    return {**totals, **more, **{name: totals[name] + more[name] for name in totals.keys() & more.keys()}}


def sum_over_ranks(sums: dict) -> dict:
    """The sums of all ranks together."""
    if num_ranks() == 1:
        return sums
    parts = [None] * num_ranks()
    distributed.all_gather_object(parts, sums)
    return functools.reduce(sum_by_name, parts)


def sum_tensor(x: Tensor) -> Tensor:
    """The sum of x over all ranks."""
    if num_ranks() > 1:
        distributed.all_reduce(x)
    return x


# ---- gradients ----

class Share(nn.Module):
    """A model whose gradients DistributedDataParallel exchanges. Without a batch the loss is 0 and has a gradient, of
    0, for one parameter: a rank without utterances takes part in the exchange and counts for nothing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.never_used = nn.Parameter(torch.zeros(()))  # DDP warns at each start if it finds no parameter unused

    def forward(self, *batch: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        if batch:
            return self.model(*batch)
        return {"loss": 0 * next(self.model.parameters()).sum()}, None


def share_model(model: nn.Module) -> nn.Module:
    """What a step of several ranks calls in place of the model, whose weights it has: p.grad is their mean."""
    if num_ranks() == 1:
        return model
    # strides over a dimension of size 1, as in the weights of a depthwise convolution, mean nothing
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    shared = DistributedDataParallel(Share(model), find_unused_parameters=True)
    # statistics of BatchNorm are not those of rank 0: see average_statistics; torch 2.11 and 2.13 both know this name
    shared.broadcast_buffers = False
    return shared


# ---- statistics of BatchNorm ----

def average_statistics(model: nn.Module) -> None:
    """The running statistics of BatchNorms become their mean over all ranks."""
    if num_ranks() > 1:
        for buffer in batch_statistics(model):
            buffer.copy_(sum_tensor(buffer.double()) / num_ranks())


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass changes: those of BatchNorm layers."""
    kind = nn.modules.batchnorm._NormBase
    return [buffer for module in model.modules() if isinstance(module, kind) for buffer in module.buffers(False)]


def keep_statistics(model: nn.Module) -> Callable[[], None]:
    """-> a function that sets the running statistics of BatchNorms back to what they are now."""
    statistics = [(buffer, buffer.clone()) for buffer in batch_statistics(model)]

    def undo() -> None:
        for buffer, before in statistics:
            buffer.copy_(before)
    return undo
