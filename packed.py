"""Linear layers whose weights are repacked for recognition on a CPU: in the order of its products, or in int8.

Relies on torch.ops.mkldnn and torch.ops.onednn, as frozen and quantised models of torch.compile do. Needs torch.
"""
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


# ---- layers ----

class PackedLinear(nn.Module):
    """An nn.Linear with its weights in the order in which oneDNN's matrix products read them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Weights(nn.Module):
    """What a file holds of an nn.Linear in int8: weight (out,in) in levels from -127 to 127, and of each output channel
    rows (3,out): its scale, its output for an input of ones, its bias. New: room for those of a linear of this size."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("rows", torch.empty(3, linear.out_features))


ROWS = 64  # of a matrix that are quantised at a time


def quantise(linear: nn.Linear) -> Int8Weights:
    """The weights of an nn.Linear, each output channel in 127 steps from 0 to its largest."""
    found = Int8Weights(linear)
    scales, sums, bias = found.rows
    for first in range(0, linear.out_features, ROWS):
        rows = linear.weight.detach()[first:first + ROWS].float()
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127
        scales[first:first + ROWS] = scale
        levels = (rows / scale[:, None]).round_()
        sums[first:first + ROWS] = levels.sum(1) * scale
        found.weight[first:first + ROWS] = levels  # as int8
    bias.copy_(torch.zeros_like(bias) if linear.bias is None else linear.bias.detach())
    return found


class Int8Linear(nn.Module):
    """An nn.Linear in int8 arithmetic, equal to about 1%: float32 in, float32 out.
    Each output channel of the weights has its own scale, and so has each row of the input, which therefore does not
    depend on its batch. Inputs take 7 bits: processors without VNNI add two products in 16 bits, which 8 overflow."""

    def __init__(self, given: nn.Linear | Int8Weights):
        super().__init__()
        weights = quantise(given) if isinstance(given, nn.Linear) else given
        self.in_features = weights.weight.shape[1]
        for name, row in zip(("scale", "sums", "bias"), weights.rows):
            self.register_buffer(name, row.clone())  # a view would hold the file
        self.zero = torch.zeros_like(self.scale, dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(weights.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        low = x.amin(-1, keepdim=True).clamp_(max=0)
        step = x.amax(-1, keepdim=True).clamp_(min=0).sub_(low).clamp_(min=1e-12).div_(127)
        shift = (low / step).sub_(0.5)  # to() cuts off what is behind the point
        levels = (x / step).sub_(shift).to(torch.int8).view(torch.uint8)  # x = low + step * levels
        y = torch.ops.onednn.qlinear_pointwise(levels, 1.0, 0, self.weight, self.scale, self.zero, None, 1.0, 0,
                                               torch.float32, "none", [], "")
        return torch.addcmul(self.bias, y, step, out=y).addcmul_(low, self.sums)


# ---- memory ----

def release(tensors: Sequence[Tensor]) -> None:
    """Let go of the memory of tensors in mapped files, which is read again where they are used again, and of freed
    memory. Other tensors stay as they are, and so do all where there is no /proc (macOS)."""
    if not os.path.exists("/proc/self/maps"):
        return
    files = []  # first and last address of each that is mapped
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, _, _, _, inode = line.split()[:5]
            if inode != "0":
                files.append([int(address, 16) for address in addresses.split("-")])
    for x in tensors:
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of it only
        last = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(start <= first and last <= stop for start, stop in files):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
    trim()


def trim() -> None:
    """Let go of freed memory, of which glibc keeps what lies between blocks in use. Linux only."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


# ---- a model ----

KEPT = ("first", "subsampling", "predictor", "timing", "ctc")  # parts never in int8: they read features or place tokens
LARGE = 2**18  # weights of a matrix from which repacking pays; int8 takes 5 to 15 times as long with 2**12 of them
READ = 2**25  # bytes of matrices that have been repacked and are still held


def lay_out(model: nn.Module, linear: Callable[[nn.Module], nn.Module]) -> int:
    """Replace every nn.Linear, or its Int8Weights, of LARGE or more weights by linear(it), in place, for evaluation
    only; in int8, outside KEPT only -> how many were replaced. One by one: no two layouts of the whole are held."""
    names = []
    for name, child in model.named_modules():
        kept = linear is not PackedLinear and set(KEPT) & set(name.split("."))
        if isinstance(child, (nn.Linear, Int8Weights)) and child.weight.numel() >= LARGE and not kept:
            names.append(name)
    read = []
    for name in names:
        child = model.get_submodule(name)
        model.set_submodule(name, linear(child))
        read.append(child.weight.detach())
        if sum(x.nbytes for x in read) > READ:
            release(read)
            read.clear()
    release(read)
    return len(names)
