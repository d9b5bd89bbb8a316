"""Train a model: python train.py CONFIG [--section.key=value ...], or go on with python train.py --resume RUN.

Reading order: decisions (pure functions: learning rate, best, stop), one optimizer step, one evaluation, files of a run
(checkpoints, metrics, curves), the system that is trained, the loop, main.
Needs torch, config.py, tokenizer.py, data.py, attention.py and model.py.

A run is a folder runs/<YYYYmmdd_HHMMSS>_<name>/ with config.yaml, train.log, metrics.json, results.csv, curves.svg and
checkpoints/{best,latest}.pt; runs/latest points at the newest. Every file is replaced whole but train.log, which grows.
All randomness comes from (training.seed, epoch, index) or from torch's generators, whose states are in the checkpoint,
so on a CPU a resumed run repeats the uninterrupted one bit for bit.
Source of the recipe: AdamW (Loshchilov & Hutter 2019), warm-up and cosine decay.
"""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import config as configs
import data
from attention import SVG_STYLE
from model import build, load_published, load_weights, read_checkpoint
from tokenizer import (BLANK, EOS, SOS, Counts, PieceTokenizer, Tokenizer, char_errors, count_errors, token_accuracy,
                       word_errors)

# ---- decisions ----


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


def score(row: dict) -> tuple[float, float]:
    """What `best` means: token accuracy on dev, ties broken by sequence accuracy."""
    return row["token_accuracy"], row["sequence_accuracy"]


def best_row(history: Sequence[dict]) -> dict:
    """The epoch with the best score; of equals the latest, which has learned for longer."""
    return max(reversed(history), key=score)


def stop_reason(history: Sequence[dict], options) -> str:
    """Why the run should end after these epochs, "" if it should not."""
    if not history:
        return ""
    token, sequence = score(history[-1])
    wanted = options.target_token_accuracy, options.target_sequence_accuracy
    if any(wanted) and token >= wanted[0] and sequence >= wanted[1]:
        return f"target reached: token accuracy {token:.4f}, sequence accuracy {sequence:.4f}"
    best = max(range(len(history)), key=lambda i: score(history[i]) + (-i,))  # of equals the first: no improvement
    if options.patience and len(history) - 1 - best >= options.patience:
        return f"no improvement in {options.patience} epochs"
    return f"{options.num_epochs} epochs done" if len(history) >= options.num_epochs else ""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay on matrices only: biases, norms and other vectors are left alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Exponential moving average of the weights over 1 / (1 - decay) steps; while young, over half of its steps."""
    return lambda averaged, current, n: averaged.lerp(current, 1 - min(decay, (int(n) + 1) / (int(n) + 10)))


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device: wanted cuda, but torch finds no GPU; use device: auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 where asked for, or by `auto` on a GPU that has it; a context that does nothing otherwise."""
    bf16 = precision == "bfloat16" or precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


# ---- one optimizer step ----


class Step(NamedTuple):
    sums: dict[str, float]  # loss components, summed over tokens
    tokens: int
    grad_norm: float
    finite: bool  # False: the step was skipped


EMPTY_STEP = Step({}, 0, 0.0, True)  # of a batch whose utterances were all skipped


def to_device(batch: data.Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = batch.feats, batch.feat_lens, batch.tokens, batch.token_lens
    return tuple(x.to(device, non_blocking=True) for x in tensors)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: data.Batch, rate: float, options) -> Step:
    """One forward, backward and update at this learning rate; a loss or gradient that is not finite updates nothing."""
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]
    with autocast(options.precision, device):
        sums, tokens = model(*to_device(batch, device))
    optimizer.zero_grad(set_to_none=True)
    (sums["loss"] / tokens.clamp(min=1)).backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    finite = bool(torch.isfinite(sums["loss"]) & torch.isfinite(grad_norm))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    else:  # a BatchNorm has taken the batch into its statistics already
        for buffer, old in zip(model.buffers(), buffers):
            buffer.copy_(old)
    return Step({name: value.item() for name, value in sums.items()}, int(tokens), grad_norm.item(), finite)


# ---- one evaluation ----


def evaluate(model: nn.Module, batches, decode: Callable[[list[int]], str]) -> dict:
    """Free-running greedy decoding against the references: every figure by alignment, none with the true length.

    Raises ValueError if no utterance is left to evaluate on.
    """
    token_counts = char_counts = word_counts = Counts()
    right = same_length = total = 0
    device = next(model.parameters()).device
    model.eval()
    for batch in batches:
        if not batch.keys:
            continue
        feats, feat_lens, _, _ = to_device(batch, device)
        found = model.greedy(feats, feat_lens)
        for i, text in enumerate(batch.texts):
            ref = batch.tokens[i, :batch.token_lens[i]].tolist()
            hyp = [id for id in found.tokens[i, :found.lens[i]].tolist() if id not in (BLANK, SOS, EOS)]
            token_counts += count_errors(ref, hyp)
            char_counts += char_errors(text, decode(hyp))
            word_counts += word_errors(text, decode(hyp))
            right, same_length, total = right + (ref == hyp), same_length + (len(ref) == len(hyp)), total + 1
    model.train()
    if not total:
        raise ValueError("data.dev: wanted utterances to evaluate on, got none: was every one skipped?")
    return {"token_accuracy": token_accuracy(token_counts), "sequence_accuracy": right / max(1, total),
            "length_accuracy": same_length / max(1, total), "cer": char_counts.rate, "wer": word_counts.rate}


# ---- files of a run ----


def save_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data.write_atomic(path, buffer.getvalue())


def table(history: Sequence[dict]) -> str:
    """results.csv: a row per epoch, a column per figure."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in history for name in row))  # an epoch without a finite step has fewer
    writer = csv.DictWriter(out, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return out.getvalue()


def write_reports(run: Path, history: Sequence[dict]) -> None:
    known = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value  # NaN is no JSON
    rows = [{name: known(value) for name, value in row.items()} for row in history]
    data.write_atomic(run / "metrics.json", json.dumps(rows, indent=1) + "\n")
    data.write_atomic(run / "results.csv", table(history))
    data.write_atomic(run / "curves.svg", curves_svg(history))


def new_run(root: Path, name: str) -> Path:
    """Make runs/<YYYYmmdd_HHMMSS>_<name> (with a number behind it if that exists) and point runs/latest at it."""
    stem, count = f"{time.strftime('%Y%m%d_%H%M%S')}_{name}", 1
    while True:
        run = root / (stem if count == 1 else f"{stem}_{count}")
        try:
            (run / "checkpoints").mkdir(parents=True)
            break
        except FileExistsError:
            count += 1
    link = root / f".latest_{run.name}"
    link.symlink_to(run.name)
    os.replace(link, root / "latest")
    return run


def say(run: Path, line: str) -> None:
    """Print a line, over the progress line on a terminal, and append it to train.log."""
    print(("\r\x1b[K" if sys.stdout.isatty() else "") + line, flush=True)
    with open(run / "train.log", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def show_progress(line: str) -> None:
    """Redraw the progress line on a terminal; elsewhere print it plainly."""
    print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)


# ---- curves.svg ----

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d")


def panel_svg(title: str, series: dict[str, list[float]], top: int, log_scale: bool) -> str:
    """One diagram of 720 x 260 pixels from y = top on: a line per series over the epochs, its name and last value."""
    left, width, height = 60, 460, 200
    values = [v for line in series.values() for v in line if math.isfinite(v) and (v > 0 or not log_scale)] or [1.0]
    scale = math.log10 if log_scale else float
    low, high = (scale(min(values)), scale(max(values))) if log_scale else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    epochs = max(2, max(map(len, series.values())))
    x = lambda i: left + width * i / (epochs - 1)
    y = lambda v: top + 30 + height * (1 - (scale(v) - low) / (high - low))
    parts = [f'<text x="{left}" y="{top + 16}" class="title">{title}</text>']
    for k in range(5):
        v = low + (high - low) * k / 4
        level = top + 30 + height * (1 - k / 4)
        parts.append(f'<path class="grid" d="M{left} {level:.1f}h{width}"/><text x="{left - 6}" y="{level + 4:.1f}" '
                     f'text-anchor="end">{10 ** v if log_scale else v:.2g}</text>')
    for i in sorted({0, (epochs - 1) // 2, epochs - 1}):
        parts.append(f'<text x="{x(i):.1f}" y="{top + 46 + height}" text-anchor="middle">{i + 1}</text>')
    for n, (name, line) in enumerate(series.items()):
        points = [f"{x(i):.1f} {y(v):.1f}" for i, v in enumerate(line) if math.isfinite(v) and (v > 0 or not log_scale)]
        pen = f'stroke="{COLOURS[n % len(COLOURS)]}" stroke-width="2"'
        dot = "h0.1" if len(points) == 1 else ""  # one epoch: a dot
        parts.append(f'<path {pen} stroke-linecap="round" d="M{"L".join(points) or "0 0"}{dot}"/>'
                     f'<path {pen} d="M{left + width + 14} {top + 38 + 20 * n}h16"/>'
                     f'<text x="{left + width + 36}" y="{top + 42 + 20 * n}">{name} {line[-1]:.4g}</text>')
    return "".join(parts)


def curves_svg(history: Sequence[dict]) -> str:
    """The loss components (logarithmic) and the accuracies (0 to 1) over the epochs, as an SVG document."""
    names = list(dict.fromkeys(n for row in history for n in row))
    losses, rates = [n for n in names if n.startswith("loss")], [n for n in names if n.endswith("accuracy")]
    pick = lambda keys: {key: [row.get(key, math.nan) for row in history] for key in keys}
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 540" width="720" height="540"><style>{SVG_STYLE}'
            f'</style>{panel_svg("training loss by epoch", pick(losses), 0, True)}'
            f'{panel_svg("accuracy on dev by epoch", pick(rates), 270, False)}</svg>\n')


# ---- the system that is trained ----

RESUME_KEYS = ("trained", "averaged", "optimizer", "progress", "history", "random")
STATS_UTTERANCES = 2000  # the normalisation is measured on so many utterances at most, spread over the training set


class System(NamedTuple):
    config: configs.Config
    tokenizer: Tokenizer | PieceTokenizer
    stats: Tensor  # (2,F) mean and reciprocal deviation of the training set's features
    model: nn.Module
    average: AveragedModel | None  # moving average of the weights, evaluated and kept as `best` in their place
    optimizer: torch.optim.Optimizer
    train_set: torch.utils.data.Dataset
    dev_set: torch.utils.data.Dataset


class Progress(NamedTuple):
    """Where a run stands: enough, with model, optimizer and random states, to go on as if it had not stopped."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the epoch under way
    step: int = 0  # batches done in all, skipped ones too
    bad_steps: int = 0  # skipped in a row
    totals: dict[str, float] = {}  # of the epoch under way


def measure_stats(dataset) -> Tensor:
    """Mean and reciprocal deviation (2,F) of up to STATS_UTTERANCES utterances of a dataset without augmentation."""
    items = (dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // STATS_UTTERANCES)))
    return data.compute_stats(item.feats for item in items if isinstance(item, data.Utterance))


def with_model(config: configs.Config, other: configs.Config) -> configs.Config:
    """config with the model and the front end of another one; its data, augmentation and training stay."""
    front = {name: getattr(other.data, name) for name in ("sample_rate", "num_mels", "lfr_m", "lfr_n")}
    return replace(config, model=other.model, data=replace(config.data, **front))


class Origin(NamedTuple):
    """What a run starts from."""

    config: configs.Config
    tokenizer: Tokenizer | PieceTokenizer
    stats: Tensor
    model: nn.Module


def origin(config: configs.Config) -> Origin:
    """Fresh weights for the config's data, or the model that training.init_from names, a FunASR directory or a
    checkpoint, whose model section and front end then stand in the config."""
    options, training = config.data, config.training
    place = training.init_from
    if configs.is_published(place):
        files = configs.published_files(place)
        config = with_model(config, configs.load_published(files["config"]))
        tokenizer = PieceTokenizer.load(files["tokens"], files.get("seg_dict"))
        stats = data.read_cmvn(files["stats"], data.feature_dim(config.data))
        model = load_published(config.model, stats.shape[1], len(tokenizer), files["model"])
    elif place:
        state = read_checkpoint(place)
        config = with_model(config, configs.from_dict(state["config"], place))
        tokenizer, stats = Tokenizer.from_state(state["tokenizer"], place), state["stats"]
        model = build(config.model, stats.shape[1], len(tokenizer))
        load_weights(model, state["model"], place)
    else:
        tokenizer = Tokenizer.build(data.training_texts(options), options.unit)
        stats = measure_stats(data.open_dataset(options, "train", tokenizer.encode, training.seed, None,
                                                config.model.encoder.subsampling))
        model = build(config.model, stats.shape[1], len(tokenizer))
    return Origin(config, tokenizer, stats, model)


def make_system(config: configs.Config, state: dict | None = None, place: str = "") -> System:
    """Data, tokenizer, normalisation, model and optimizer: fresh ones, or those of a checkpoint's state (at place)."""
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    torch.manual_seed(config.training.seed)
    if state is None:
        config, tokenizer, stats, model = origin(config)
    else:
        tokenizer, stats = Tokenizer.from_state(state["tokenizer"]), state["stats"]
        model = build(config.model, stats.shape[1], len(tokenizer))
    options, training, factor = config.data, config.training, config.model.encoder.subsampling
    train_set = data.open_dataset(options, "train", tokenizer.encode, training.seed, stats, factor, augment=True)
    dev_set = data.open_dataset(options, "dev", tokenizer.encode, training.seed, stats, factor)
    model.to(pick_device(training.device))
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), betas=(0.9, 0.98))
    average = None
    if training.average_decay:
        average = AveragedModel(model, avg_fn=moving_average(training.average_decay))
    if state is not None:
        load_weights(model, state["trained"], place)
        if average is not None:
            average.module.load_state_dict(state["model"])
            average.n_averaged.fill_(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return System(config, tokenizer, stats, model, average, optimizer, train_set, dev_set)


def checkpoint_state(system: System, progress: Progress, history: list[dict]) -> dict:
    """Everything that decoding and resuming need, as tensors and plain containers (it loads with weights_only=True).

    `model` holds the weights to decode with (the average where there is one), `trained` those that training needs.
    """
    trained = system.model.state_dict()
    model = system.average.module.state_dict() if system.average is not None else trained
    return {"config": configs.to_dict(system.config), "tokenizer": system.tokenizer.state(), "stats": system.stats,
            "model": model, "trained": trained, "averaged": int(system.average.n_averaged) if system.average else 0,
            "optimizer": system.optimizer.state_dict(),
            "progress": progress._asdict(), "history": history,
            "random": {"cpu": torch.get_rng_state(),
                       "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}}


# ---- the loop ----


def add(totals: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return {name: totals.get(name, 0.0) + more.get(name, 0.0) for name in {**totals, **more}}


def step_totals(step: Step, batch: data.Batch, seconds: float) -> dict[str, float]:
    """What one step adds to the epoch's totals. A skipped step adds no loss, or one bad batch would hide the rest."""
    B, T = batch.feats.shape[:2]
    common = {"seconds": seconds, "frames": int(batch.feat_lens.sum()), "padded_frames": B * T,
              "utterances": B, "skipped_utterances": len(batch.skipped), "skipped_steps": int(not step.finite)}
    learned = {**step.sums, "tokens": step.tokens, "grad_norm": step.grad_norm, "steps": 1}
    return {**common, **learned} if step.finite else common


def epoch_row(progress: Progress, totals: dict[str, float], rate: float, dev: dict, seconds: float) -> dict:
    """One line of metrics.json: sums divided here and nowhere else."""
    names = [name for name in ("ce", "quantity", "timing", "ctc") if name in totals]
    tokens = max(1.0, totals.get("tokens", 0.0))
    return {"epoch": progress.epoch + 1, "step": progress.step, "learning_rate": rate,
            "loss": totals.get("loss", math.nan) / tokens, **{f"loss_{name}": totals[name] / tokens for name in names},
            "grad_norm": totals.get("grad_norm", math.nan) / max(1.0, totals.get("steps", 0.0)), **dev,
            "frames_per_second": totals["frames"] / max(1e-9, totals["seconds"]),
            "padding": 1 - totals["frames"] / max(1.0, totals["padded_frames"]),
            "utterances": int(totals["utterances"]), "skipped_utterances": int(totals["skipped_utterances"]),
            "skipped_steps": int(totals["skipped_steps"]), "seconds": seconds}


def epoch_batches(system: System, epoch: int) -> list[list[int]]:
    training = system.config.training
    return data.make_batches(system.train_set.epoch_lengths(epoch), training.batch_size, training.batch_frames,
                             training.seed, epoch)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class TrainingDiverged(RuntimeError):
    """Several non-finite steps in a row; the message names the batch."""


def named(run: Path, batches: Iterable[data.Batch]) -> Iterator[data.Batch]:
    """The same batches; every recording that they had to skip is named in the log."""
    for batch in batches:
        for skip in batch.skipped:
            say(run, f"skipped {skip.key}: {skip.reason}")
        yield batch


def train_epoch(run: Path, system: System, progress: Progress, history: list[dict], total_steps: int) -> Progress:
    """The rest of the epoch under way, from progress.batch on, with checkpoints every training.checkpoint_steps."""
    training = system.config.training
    batches = epoch_batches(system, progress.epoch)
    shown, first, began, started = time.monotonic(), progress.batch, time.monotonic(), time.monotonic()
    loader = data.loader(system.train_set, batches, progress.epoch, system.config.data.num_workers, progress.batch)
    for batch in named(run, loader):
        rate = learning_rate(progress.step, total_steps, training)
        step = train_step(system.model, system.optimizer, batch, rate, training) if batch.keys else EMPTY_STEP
        if system.average is not None and step.finite:
            system.average.update_parameters(system.model)
        now = time.monotonic()
        bad = 0 if step.finite else progress.bad_steps + 1
        progress = Progress(progress.epoch, progress.batch + 1, progress.step + 1, bad,
                            add(progress.totals, step_totals(step, batch, now - started)))
        started = now
        if bad:
            say(run, f"step {progress.step}: loss or gradient not finite, skipped; batch: {' '.join(batch.keys)}")
        if bad >= training.max_bad_steps:
            raise TrainingDiverged(f"{bad} non-finite steps in a row, the last one on {' '.join(batch.keys)}")
        if training.checkpoint_steps and progress.step % training.checkpoint_steps == 0:
            save_checkpoint(run / "checkpoints/latest.pt", checkpoint_state(system, progress, history))
        if now - shown > (0.2 if sys.stdout.isatty() else 15.0):
            shown, speed = now, (progress.batch - first) / (now - began)
            show_progress(f"epoch {progress.epoch + 1}/{training.num_epochs}  step {progress.batch}/{len(batches)}  "
                          f"loss {step.sums.get('loss', 0.0) / max(1, step.tokens):.3f}  "
                          f"{progress.totals['frames'] / progress.totals['seconds']:.0f} frames/s  "
                          f"left {clock(max(0, total_steps - progress.step) / speed)}")
    return progress


def report(row: dict, num_epochs: int) -> str:
    """The line that train.log gets for an epoch."""
    losses = "  ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in row if name.startswith("loss"))
    accuracies = "  ".join(f"{name} {row[f'{name}_accuracy']:.4f}" for name in ("token", "sequence", "length"))
    return (f"epoch {row['epoch']}/{num_epochs}  {losses}  lr {row['learning_rate']:.2g}  "
            f"grad {row['grad_norm']:.2f} | {accuracies}  cer {row['cer']:.4f}  wer {row['wer']:.4f} | "
            f"{row['frames_per_second']:.0f} frames/s  padding {row['padding']:.1%}  "
            f"skipped {row['skipped_utterances']}  {clock(row['seconds'])}")


def fit(run: Path, system: System, progress: Progress, history: list[dict]) -> list[dict]:
    """Train until stop_reason speaks; after each epoch evaluate, write the reports and the checkpoints -> all rows."""
    training = system.config.training
    total_steps = training.num_epochs * len(epoch_batches(system, 0))
    if not total_steps:
        raise ValueError("data.train: wanted utterances to learn from, got none")
    dev = data.make_batches(system.dev_set.lengths, training.batch_size, training.batch_frames, shuffle=False)
    while not (reason := stop_reason(history, training)):
        started = time.monotonic()
        progress = train_epoch(run, system, progress, history, total_steps)
        model = system.model if system.average is None else system.average.module
        figures = evaluate(model, named(run, data.loader(system.dev_set, dev)), system.tokenizer.decode)
        rate = learning_rate(progress.step - 1, total_steps, training)
        spent = time.monotonic() - started + (history[-1]["seconds"] if history else 0.0)
        history = history + [epoch_row(progress, progress.totals, rate, figures, spent)]
        progress = Progress(progress.epoch + 1, 0, progress.step, progress.bad_steps, {})
        state = checkpoint_state(system, progress, history)
        if best_row(history) is history[-1]:
            save_checkpoint(run / "checkpoints/best.pt", state)
        write_reports(run, history)
        save_checkpoint(run / "checkpoints/latest.pt", state)  # last: a run killed before it repeats this epoch
        if len(history) == 1:
            say(run, f"{training.num_epochs} epochs will take about {clock(spent * training.num_epochs)}")
        say(run, report(history[-1], training.num_epochs))
    say(run, reason)
    return history


# ---- main ----


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Train a model.", epilog="--section.key=value overrides the config, "
                                     "for example --training.batch_size=8 --model.encoder.dropout=0")
    parser.add_argument("config", nargs="?", help="a YAML file of configs/")
    parser.add_argument("--resume", metavar="RUN", help="a run folder, or runs/latest: go on with its last checkpoint")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)")
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [a for a in rest if not (a.startswith("--") and "." in a and "=" in a)]:
        parser.error(f"wanted --section.key=value, got {' '.join(unknown)}")
    if (arguments.config is None) == (arguments.resume is None):
        parser.error("wanted either a config or --resume RUN")
    if arguments.resume and rest:
        parser.error(f"--resume goes on with the run's own config, got {' '.join(rest)}")
    return arguments, rest


def start(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Path, System, Progress, list[dict]]:
    """A fresh run, or the one to resume: its folder, system, progress and history."""
    if arguments.resume:
        run = Path(arguments.resume).resolve()
        path = run / "checkpoints/latest.pt"
        state = read_checkpoint(path)
        if missing := [key for key in RESUME_KEYS if key not in state]:
            raise ValueError(f"{path}: wanted a checkpoint to resume, got one without {', '.join(missing)}")
        system = make_system(configs.from_dict(state["config"], str(path)), state, str(path))
        return run, system, Progress(**state["progress"]), state["history"]
    config = configs.load(arguments.config, overrides)
    system = make_system(config)
    run = new_run(Path(arguments.runs), Path(arguments.config).stem)
    data.write_atomic(run / "config.yaml", configs.dump(system.config))
    save_checkpoint(run / "checkpoints/latest.pt", checkpoint_state(system, Progress(), []))  # to resume from, at once
    return run, system, Progress(), []


def main(argv: Sequence[str]) -> int:
    arguments, overrides = parse_arguments(argv)
    try:
        run, system, progress, history = start(arguments, overrides)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    size = sum(p.numel() for p in system.model.parameters())
    say(run, f"{run}: {system.config.model.name}, {size / 1e6:.2f} M parameters, {len(system.train_set)} utterances, "
             f"{len(system.tokenizer)} symbols, on {next(system.model.parameters()).device}")
    try:
        history = fit(run, system, progress, history)
    except TrainingDiverged as error:
        say(run, f"stopped: {error}; {run / 'checkpoints/latest.pt'} is the last good state")
        return 1
    except (ValueError, OSError) as error:  # input that shows only now: too long for its positions, a full disk
        print(f"train.py: {error}; {run / 'checkpoints/latest.pt'} is the last good state", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(run, f"\ninterrupted; go on with: python train.py --resume {run}")
        return 130
    best = best_row(history)
    say(run, f"best epoch {best['epoch']}: token accuracy {best['token_accuracy']:.4f}, sequence accuracy "
             f"{best['sequence_accuracy']:.4f}, wer {best['wer']:.4f}\n"
             f"decode with: python decode.py --ckpt {run / 'checkpoints/best.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
