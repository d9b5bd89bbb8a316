"""One optimizer step: a batch to a gradient, in parts and over several processes, and AdamW's update from it.

All randomness comes from training.seed, the step's number and the utterances' keys, so a step can be repeated.
Reading order: learning rate and moving average, optimizer, a batch and its parts, the step.
Needs torch, numpy, data.py (and what it needs), model.py and ranks.py.
"""
import contextlib
import functools
import math
import zlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import data
from model import Paraformer
from ranks import average_statistics, keep_statistics, num_ranks, own_rank, sum_by_name, sum_tensor


# ---- learning rate, moving average ----

def learning_rate(step: int, total_steps: int, options) -> float:
    """Rate of optimizer step 0, 1, ...: linear warm-up that ends at learning_rate in step warmup_steps - 1, then
    `cosine` down to final_lr_ratio at total_steps, `inverse_sqrt`, or `constant`."""
    peak, warmup = options.learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    if options.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    low = options.final_lr_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def in_steps(options, total_steps: int):
    """options with warmup_share and average_share, where given, as the warmup_steps and average_decay of such a run."""
    if options.warmup_share:
        options = replace(options, warmup_steps=round(options.warmup_share * total_steps), warmup_share=0.0)
    if options.average_share:
        averaged = max(1.0, options.average_share * total_steps)
        options = replace(options, average_decay=1 - 1 / averaged, average_share=0.0)
    return options


def newest_share(step: int, decay: float) -> float:
    """Share of the newest weights in their moving average after step 0, 1, ...: from 1 down to 1 - decay, an average
    over 1 / (1 - decay) steps. Source: as TensorFlow's ExponentialMovingAverage with num_updates, but for step 0."""
    return 1 - min(decay, (step + 1) / (step + 10)) if step else 1.0


# ---- optimizer ----

def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, not on biases, norms and other vectors. Source: Loshchilov & Hutter 2019."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def load_optimizer(optimizer: torch.optim.AdamW, state: dict) -> None:
    """Take over the optimizer state of a checkpoint; those of older versions have moments only, in the same order."""
    moments = {}
    for index, values in state["state"].items():
        moments[index] = {name: value.clone() for name, value in values.items()}  # older: one tensor of steps for all
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def num_updates(optimizer: torch.optim.AdamW) -> Tensor:
    """() float32: steps that the optimizer took; those that were skipped do not count."""
    return max((state["step"] for state in optimizer.state.values()), default=torch.zeros(()))


# ---- a batch and its parts ----

def inputs(batch: data.Batch, model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a model takes of a batch, on its device and with the precision of its weights."""
    weight = next(model.parameters())
    lens, tokens, token_lens = (x.to(weight.device) for x in (batch.feat_lens, batch.tokens, batch.token_lens))
    return batch.feats.to(weight), lens, tokens, token_lens


def split(batch: data.Batch, parts: int) -> list[data.Batch]:
    """Deal the utterances of a batch out to `parts` batches, or one each where they are fewer, cut to their lengths."""
    dealt = []
    for k in range(min(parts, len(batch.keys))):
        longest, most = int(batch.feat_lens[k::parts].max()), int(batch.token_lens[k::parts].max())
        dealt.append(data.Batch(
            batch.keys[k::parts], batch.feats[k::parts, :longest], batch.feat_lens[k::parts],
            batch.tokens[k::parts, :most], batch.token_lens[k::parts], batch.texts[k::parts], batch.skipped))
    return dealt


def sampler_order(model: nn.Module, batch: data.Batch, seed: int, number: int) -> list[Tensor]:
    """What the glancing sampler of a Paraformer draws in step `number`: [(B,U) float32 in 0..1], U with the end
    token, [] for other models. An utterance's draw depends on (seed, number, key) alone, not on its batch."""
    if not isinstance(model, Paraformer):
        return []
    order = torch.zeros(len(batch.keys), batch.tokens.shape[1] + model.options.end_token)
    for row, key, n in zip(order, batch.keys, (batch.token_lens + model.options.end_token).tolist()):
        row[:n] = torch.from_numpy(data.generator(seed, number, zlib.crc32(key.encode())).random(n))
    return [order]


def recompute_blocks(model: nn.Module) -> None:
    """Encoder blocks keep no activations; the backward pass computes them again. A later copy would call these."""
    for block in model.encoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ---- the step ----

class Step(NamedTuple):
    sums: dict[str, float]  # loss components, summed over tokens; {} if skipped: NaN would spoil the epoch's sums
    tokens: int
    grad_norm: float
    finite: bool  # False: the step was skipped


def add_gradients(model: nn.Module, batch: data.Batch, options, number: int) -> dict[str, float]:
    """Add the gradient of the summed loss of a batch, in options.accumulate parts, to p.grad -> sums of losses and
    tokens. With several ranks (`share_model`), p.grad becomes the mean over them in the last part's backward pass."""
    device = next(model.parameters()).device
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    in_bf16 = options.precision == "bfloat16" or options.precision == "auto" and capable
    is_shared = isinstance(model, DistributedDataParallel)
    own = model.module.model if is_shared else model
    parts = split(batch, options.accumulate)
    if is_shared and not parts:
        losses, _ = model()
        losses["loss"].backward()
    sums = {}
    for k, part in enumerate(parts):
        order = [x.to(device) for x in sampler_order(own, part, options.seed, number)]
        is_last = k == len(parts) - 1
        with model.no_sync() if is_shared and not is_last else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                losses, tokens = model(*inputs(part, own), *order)
            undo = keep_statistics(own)
            losses["loss"].backward()
        undo()  # with recompute_blocks, the backward pass updates them a second time
        found = {name: x.detach() for name, x in losses.items()}
        sums = sum_by_name(sums, {**found, "tokens": tokens})
    return {name: x.item() for name, x in sums.items()}


def train_step(model: nn.Module, optimizer: torch.optim.AdamW, batch: data.Batch, rate: float, options,
               number: int = 0) -> Step:
    """One forward, backward and update at this learning rate, with the random draws of step `number`.
    batch is this rank's share and may be empty; the gradient is the sum over all ranks, divided by all their tokens.
    Nothing is updated if, in any rank, loss or gradient is not finite."""
    undo = keep_statistics(model)  # of BatchNorm layers, which a step that is skipped must not have moved
    torch.manual_seed(int(data.generator(options.seed, number, own_rank()).integers(2 ** 63)))  # dropout
    model.zero_grad()
    sums = add_gradients(model, batch, options, number)
    own_tokens = sums.pop("tokens", 0.0)
    counted = own_tokens if math.isfinite(sums.get("loss", 0.0)) else math.nan  # which spreads to all ranks
    counts = torch.tensor([counted, len(batch.keys)], dtype=torch.float64, device=next(model.parameters()).device)
    tokens, utterances = sum_tensor(counts).tolist()
    average_statistics(model)
    if not utterances:  # all of them were skipped
        return Step({}, 0, 0.0, True)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # the mean over ranks of sums over tokens, times ranks / tokens, is the mean over all tokens
    grad_norm = nn.utils.get_total_norm(gradients).item() * num_ranks() / max(1.0, tokens)
    if not math.isfinite(tokens) or not math.isfinite(grad_norm):
        undo()
        return Step({}, 0, 0.0, False)
    clip = min(1.0, options.max_grad_norm / (grad_norm + 1e-6))
    torch._foreach_mul_(gradients, clip * num_ranks() / max(1.0, tokens))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return Step(sums, int(own_tokens), grad_norm, True)


@torch.no_grad()
def dev_losses(model: nn.Module, batch: data.Batch) -> dict[str, float]:
    """The loss sums that training has, as dev_loss..., and dev_counted, what to divide them by. The model is in eval
    mode; torch's generator stays as it is, and every call has the same draws."""
    order = [x.to(next(model.parameters()).device) for x in sampler_order(model, batch, 0, 0)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses, counted = model(*inputs(batch, model), *order)
    named = {name if name == "loss" else f"loss_{name}": value for name, value in losses.items()}
    return {f"dev_{name}": value.item() for name, value in {**named, "counted": counted}.items()}
