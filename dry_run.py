"""What a run of train.py will be, before it begins: sizes by module, shapes, memory and time, from a few steps.

Reading order: what cannot work, shapes, a traced step, the report. Needs torch, numpy, audio.py, data.py, manifests.py,
step.py and tokenizer.py. A run is that of train.py: config, tokenizer, model, average, optimizer, train_set, dev_set.
"""
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from timeit import timeit

import numpy as np
import torch
from torch import Tensor, nn

import data
from audio import open_recording
from manifests import find_manifests, scan_rows
from step import train_step
from tokenizer import Tokenizer


# ---- what cannot work ----

LEAST_STEPS, LEAST_DEV = 600, 10  # of a run from new weights, in which WER falls from 450 steps on; utterances
LEAST_STEPS_ON = 100  # of a run that goes on from a model's weights
LOOKED_AT = 500  # training utterances, spread over all; of 20 the file is opened


def schedule_warnings(training, steps: int) -> Iterator[str]:
    """Lines on a run of so many steps; the values that they name fit as well when only some of them are taken."""
    least = LEAST_STEPS_ON if training.init_from else LEAST_STEPS
    if steps < least:
        epochs = math.ceil(least * training.num_epochs / max(1, steps))
        yield (f"training.num_epochs: wanted a run of {least} steps or more, got {steps}; "
               f"try --training.num_epochs={epochs}")
    if training.warmup_steps > steps / 5:
        yield (f"training.warmup_steps: wanted at most a fifth of the run's {steps} steps, got "
               f"{training.warmup_steps}; try --training.warmup_steps={steps // 10}")
    averaged = 1 / (1 - training.average_decay) if training.average_decay else 0
    if averaged > steps / 5:
        decay = math.floor(1000 * (1 - 10 / max(10, steps))) / 1000
        yield (f"training.average_decay: wanted an average over at most a fifth of the run's {steps} steps, got "
               f"{training.average_decay}, over {averaged:.0f}; try --training.average_decay={decay}")


def dev_warnings(config, num_train: int, num_dev: int) -> Iterator[str]:
    if num_dev >= LEAST_DEV:
        return
    hint = f"try --data.toy.num_dev={LEAST_DEV}"
    if config.data.kind == "manifest":
        share = math.ceil(100 * LEAST_DEV / (num_train + num_dev)) / 100
        hint = f"record {2 * LEAST_DEV} or more"
        if share <= 0.5:
            hint = f"make the manifests again, with corpora.py folder --dev-share {share}"
    yield f"data.dev: wanted {LEAST_DEV} utterances or more to choose an epoch by, got {num_dev}; {hint}"


def symbol_warnings(config, tokenizer, split: str) -> Iterator[str]:
    """A line if texts of a split have symbols that the vocabulary has not: their share, and the most frequent ones."""
    missing, texts, keys = Counter(), [], []
    count = 0
    with data.naming(f"data.{split}"):
        rows = itertools.chain.from_iterable(map(scan_rows, find_manifests(getattr(config.data, split))))
        for _, row in rows:
            unknown = tokenizer.unknown_units(row.text)
            missing.update(unknown)
            count += len(tokenizer.encode(row.text))
            if unknown:
                texts.append(row.text)
                keys.append(row.key)
    if not texts:
        return
    hint = f"try --data.train={config.data.train} with {keys[0]} in it, and others that have them"
    if config.training.init_from:
        hint = f"the vocabulary is that of training.init_from={config.training.init_from}"
    elif tokenizer.unit == "word":
        letters = Tokenizer.build(data.training_texts(config.data), "char")
        if not any(letters.unknown_units(text) for text in texts):
            hint = "try --data.unit=char"
    names = " ".join(f"{name!r} ({times})" for name, times in missing.most_common(5))
    share = missing.total() / max(1, count)
    yield (f"data.{split}: wanted symbols that the vocabulary has, got {missing.total()} unknown ones of {count} "
           f"({share:.1%}), the most frequent {names}, in {len(texts)} texts; {hint}")


def length_warnings(config, lengths: np.ndarray, counts: np.ndarray) -> Iterator[str]:
    """A line if more than a tenth of recordings, of lengths (n,) frames, have less than a frame for each of their
    counts (n,) tokens behind the encoder's subsampling: they would be skipped."""
    def crowded(subsampling: int) -> float:
        return float(np.mean(counts > lengths // subsampling))

    encoder = config.model.encoder
    if not len(lengths) or crowded(encoder.subsampling) <= 0.1:
        return
    hint = "do the texts belong to these recordings?"
    for subsampling in (1, 2):
        is_free = encoder.kind in ("transformer", "conformer") and not config.training.init_from
        if is_free and subsampling < encoder.subsampling and crowded(subsampling) <= 0.1:
            hint = f"try --model.encoder.subsampling={subsampling}"
    yield (f"model.encoder.subsampling: wanted a frame for each token, got fewer, with {encoder.subsampling}, in "
           f"{crowded(encoder.subsampling):.0%} of recordings; {hint}")


def rate_warnings(wanted: int, rates: Sequence[int]) -> Iterator[str]:
    """A line if most recordings have a lower rate (Hz), or a far higher one: below 16 kHz speech loses consonants."""
    usual = Counter(rates).most_common(1)[0][0] if rates else wanted
    if sum(rate < wanted for rate in rates) > len(rates) / 2:
        yield (f"data.sample_rate: wanted no more Hz than most recordings have, got {wanted} for {usual}; "
               f"try --data.sample_rate={usual}")
    if wanted < 16000 and sum(rate >= 16000 for rate in rates) > len(rates) / 2:
        yield (f"data.sample_rate: wanted 16000 Hz, as most recordings have {usual}, got {wanted}; "
               "try --data.sample_rate=16000 --data.num_mels=80")


def rates_of(dataset: data.ManifestDataset, indices: Iterable[int]) -> list[int]:
    """The sampling rates, Hz, of the recordings that can be read."""
    rates = []
    for index in indices:
        try:
            with open_recording(data.part_of(dataset.rows[index])) as (_, header):
                rates.append(header.rate_hz)
        except (OSError, ValueError):  # it will be skipped, with the reason
            pass
    return rates


def surroundings_warnings(surroundings: data.Surroundings, rate_hz: int) -> Iterator[str]:
    """A line each if recordings for augmentation cannot be read: utterances that draw one would be skipped."""
    rng = data.generator(0, 0, 0)
    for field, manifest in zip(("noise", "reverb"), surroundings):
        if manifest is None:
            continue
        chosen = range(0, len(manifest), math.ceil(len(manifest) / LOOKED_AT))
        reasons = []
        for index in chosen:
            try:
                if field == "noise":
                    data.read_noise(manifest[index], 1.0, rate_hz, rng)
                else:
                    data.read_response(manifest[index], rate_hz)
            except data.Unusable as reason:
                reasons.append(str(reason))
        if reasons:
            yield (f"data.augment.{field}: wanted recordings that can be read, got {len(reasons)} of {len(chosen)} "
                   f"that cannot: {'; '.join(reasons[:3])}; leave them out, or utterances that draw one are skipped")


def warnings(run, steps: int) -> Iterator[str]:
    """What cannot work in a run of so many steps: a line each, with the option and a value that would do."""
    config, dataset = run.config, run.train_set
    if config.training.overfit:
        return
    yield from schedule_warnings(config.training, steps)
    yield from dev_warnings(config, len(dataset), len(run.dev_set))
    if config.data.kind == "toy":
        return
    yield from surroundings_warnings(dataset.surroundings, config.data.sample_rate)
    for split in ("train", "dev", "test"):
        is_built_of_it = split == "train" and not config.training.init_from
        if getattr(config.data, split) and not is_built_of_it:
            yield from symbol_warnings(config, run.tokenizer, split)
    chosen = range(0, len(dataset), math.ceil(len(dataset) / LOOKED_AT))
    counts = np.array([len(run.tokenizer.encode(dataset.rows[index].text)) for index in chosen])
    lengths = dataset.lengths()[chosen]
    yield from length_warnings(config, lengths[lengths > 0], counts[lengths > 0])
    if not config.training.init_from:
        yield from rate_warnings(config.data.sample_rate, rates_of(dataset, chosen[::math.ceil(len(chosen) / 20)]))


# ---- shapes ----

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
    shapes = {}
    kept = {x.untyped_storage().data_ptr(): 0 for x in run.model.state_dict().values()}  # weights: 0 bytes
    parts = {name: part for name, part in run.model.named_modules() if name.count(".") < 2 and num_parameters(part)}

    def note(name: str, _: nn.Module, given: tuple, out: object) -> None:
        shapes[name] = f"  {shape_of(given)} -> {shape_of(out)}"

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    hooks = [part.register_forward_hook(functools.partial(note, name)) for name, part in parts.items() if name]
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
    for line in warnings(run, steps):
        yield f"warning: {line}"
