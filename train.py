"""Train a model: python train.py CONFIG [--section.key=value ...], or go on with python train.py --resume RUN.

Reading order: decisions (a pure function: when to stop), one evaluation, a run and its files (metrics, curves), what is
trained and its checkpoints, the loop, starting and going on, main. A step is in step.py, a dry run in dry_run.py.

    python train.py CONFIG --dry-run        sizes, shapes, and estimates of memory and time; leaves nothing behind
    python train.py CONFIG --overfit 4      learn four utterances by heart: the first thing to try on new data

    torchrun --nproc_per_node=2 train.py CONFIG     the same run in two processes (gloo on CPUs, nccl on GPUs)

A run is a folder runs/<YYYYmmdd_HHMMSS>_<name>/ with config.yaml, train.log, metrics.json, results.csv, curves.svg and
checkpoints/{best,latest,previous}.pt; runs/latest points at the newest. Every file is replaced whole but train.log,
which grows, and which --resume cuts back to where its checkpoint stands. `lock` names the process that works on it.
All randomness comes from training.seed and the number of the step, epoch or utterance, so there is no generator's state
to keep, and on a CPU a resumed run repeats the uninterrupted one bit for bit.
training.batch_size and batch_frames are those of one optimizer step, whatever works on it: its utterances are dealt
out to the processes, and by each to training.accumulate parts. So the number of either changes nothing but rounding,
dropout and BatchNorm, and a run may be resumed with another number of processes.
"""
import argparse
import contextlib
import copy
import errno
import itertools
import json
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from commandline import Parser, spin_briefly

if __name__ == "__main__":
    spin_briefly()  # before torch is loaded

import numpy as np
import torch
from torch import Tensor, distributed, nn

import config as configs
import data
import rules
from checkpoint import (CHECKPOINT_FORMAT, System, adopted, last_checkpoint, load_state, pick_device, save_run,
                        start_from)
from compare import accuracies, best_row, compare
from dry_run import clock, describe, num_parameters, warnings
from files import load_weights, write_atomic
from manifests import find_again
from pictures import write_pictures
from pieces import PieceTokenizer
from plot import column_names, curves_svg
from ranks import is_first_process, join_processes, num_ranks, own_rank, share_model, sum_by_name, sum_over_ranks
from step import (Step, dev_losses, in_steps, inputs, learning_rate, load_optimizer, make_optimizer, newest_share,
                  num_updates, recompute_blocks, train_step)
from survival import ERASE, catch_signals, keep_streams, lock
from tokenizer import Tokenizer, char_errors, count_errors, spoken_places, token_accuracy, word_errors


# ---- decisions ----

def stop_reason(history: Sequence[dict], options) -> str:
    """Why the run should end after these epochs, "" if it should not."""
    if not history:
        return ""
    token, sequence = accuracies(history[-1])
    has_target = options.target_token_accuracy > 0 or options.target_sequence_accuracy > 0
    if has_target and token >= options.target_token_accuracy and sequence >= options.target_sequence_accuracy:
        return f"target reached: token accuracy {token:.4f}, sequence accuracy {sequence:.4f}"
    best = max(range(len(history)), key=lambda i: accuracies(history[i]))  # the first of equals: a tie is no gain
    if options.patience and len(history) - 1 - best >= options.patience:
        return f"no improvement in {options.patience} epochs"
    if len(history) >= options.num_epochs:
        return f"{options.num_epochs} epochs done"
    return ""


# ---- one evaluation ----

def evaluate(model: nn.Module, batches: Iterable[data.Batch], decode: Callable[[list[int]], str]) -> dict:
    """Greedy decoding, which sees no references, aligned with them, and the losses -> sums for `dev_figures`."""
    sums = {"total": 0}
    model.eval()  # train_epoch sets it back
    for batch in batches:
        sums = sum_by_name(sums, {"skipped": len(batch.skipped)})
        if not batch.keys:
            continue
        found = model.greedy(*inputs(batch, model)[:2])
        sums = sum_by_name(sums, dev_losses(model, batch))
        for i, text in enumerate(batch.texts):
            ref = batch.tokens[i, :batch.token_lens[i]].tolist()
            ids = found.tokens[i, :found.lens[i]].tolist()
            hyp = [ids[u] for u in spoken_places(ids)]
            sums = sum_by_name(sums, {"tokens": count_errors(ref, hyp), "chars": char_errors(text, decode(hyp)),
                              "words": word_errors(text, decode(hyp)), "right": ref == hyp,
                              "same_length": len(ref) == len(hyp), "total": 1})
    return sums


def dev_figures(sums: dict) -> dict[str, float]:
    """The figures of an evaluation. Raises ValueError if no utterance was left to evaluate on."""
    if not sums["total"]:
        raise ValueError("data.dev: wanted utterances to evaluate on, got none: was every one skipped?")
    losses = {name: sums[name] / max(1, sums["dev_counted"]) for name in sums if name.startswith("dev_loss")}
    finite = {name: value for name, value in losses.items() if math.isfinite(value)}  # JSON has no others
    return {**finite, "token_accuracy": token_accuracy(sums["tokens"]),
            "sequence_accuracy": sums["right"] / sums["total"], "length_accuracy": sums["same_length"] / sums["total"],
            "cer": sums["chars"].rate, "wer": sums["words"].rate, "dev_utterances": sums["total"],
            "dev_skipped": sums["skipped"]}


# ---- a run and its files ----

def write_reports(run: Path, history: Sequence[dict]) -> None:
    """metrics.json, results.csv with a row per epoch and a column per figure, and curves.svg."""
    names = column_names(history)
    table = [names, *([str(row.get(name, "")) for name in names] for row in history)]
    write_atomic(run / "metrics.json", json.dumps(history, indent=1) + "\n")
    write_atomic(run / "results.csv", "".join(",".join(cells) + "\n" for cells in table))
    write_atomic(run / "curves.svg", curves_svg(history))


def new_run(root: Path, name: str) -> Path:
    """Make root/<YYYYmmdd_HHMMSS>_<name>, numbered if that exists. ValueError for a folder where a link is to be."""
    latest, stem = root / "latest", f"{time.strftime('%Y%m%d_%H%M%S')}_{name}"
    if latest.is_dir() and not latest.is_symlink():
        raise ValueError(f"{latest}: wanted a link to the newest run, got a folder; move it away")
    for folder in itertools.chain([stem], (f"{stem}_{count}" for count in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (root / folder / "checkpoints").mkdir(parents=True)
            return root / folder


def point_latest(folder: Path) -> None:
    """Make runs/latest a link to this run. Call it when that has a checkpoint, so that runs/latest can be resumed."""
    link = folder.with_name(f".latest_{folder.name}")
    link.symlink_to(folder.name)
    os.replace(link, folder.with_name("latest"))


class Run(NamedTuple):
    config: configs.Config
    tokenizer: Tokenizer | PieceTokenizer
    stats: Tensor  # (2,F) mean and reciprocal deviation of the training set's features
    model: nn.Module
    average: nn.Module  # what is evaluated: the moving average of the weights, or the model where none is kept
    shared: nn.Module  # what a step calls: the model, or what `share_model` makes of it
    optimizer: torch.optim.AdamW
    train_set: torch.utils.data.Dataset
    dev_set: torch.utils.data.Dataset
    folder: Path = Path()  # a dry run has none
    stop: threading.Event | None = None  # set by SIGTERM and Ctrl-C: finish the step, write a checkpoint, end
    lock: BinaryIO | None = None  # while it is open, no other process works on the folder


def show(line: str, end: str = "\n") -> None:
    """Print a line in place of the progress line. That has end="", which counts on a terminal only."""
    print(ERASE + line if sys.stdout.isatty() else line, end=end if sys.stdout.isatty() else "\n", flush=True)


def say(run: Run, line: str, own: bool = False) -> None:
    """Rank 0 prints a line and appends it to train.log. own: it is about this rank's data, so others print it too."""
    if own_rank() == 0:
        show(line)
        with open(run.folder / "train.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    elif own:
        show(f"rank {own_rank()}: {line}")


# ---- what is trained, and its checkpoints ----

class Progress(NamedTuple):
    """Where a run stands: enough, with model and optimizer, to go on as if it had not stopped."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the epoch under way
    step: int = 0  # batches done in all, skipped ones too
    bad_steps: int = 0  # skipped in a row
    totals: dict[str, float] = {}  # of the epoch under way
    history: Sequence[dict] = ()  # an `epoch_row` of each epoch


OVERFIT_EPOCHS, OVERFIT_TIMES = 100, 10  # passes of --overfit over its utterances: epochs, and passes in each


def overfitting(config: configs.Config, count: int) -> configs.Config:
    """config, changed to learn `count` utterances by heart: a constant rate, no averaging, until all are right."""
    training = replace(config.training, overfit=count, num_epochs=OVERFIT_EPOCHS, schedule="constant", patience=0,
                       target_token_accuracy=1.0, target_sequence_accuracy=1.0, average_decay=0.0,
                       warmup_share=0.0, average_share=0.0,
                       warmup_steps=min(config.training.warmup_steps, 2 * OVERFIT_TIMES))
    return replace(config, training=training)


def open_split(system: System, split: str, augment: bool) -> torch.utils.data.Dataset:
    """The dataset of a split. Raises ValueError if it is empty."""
    config = system.config
    dataset = data.open_dataset(config.data, split, system.tokenizer.encode, config.training.seed, system.stats,
                                config.model.encoder.subsampling, augment)
    if not len(dataset):
        raise ValueError(f"data.{split}: wanted utterances, got none in {getattr(config.data, split)}")
    data.check_usable(dataset, f"data.{split}")
    return dataset


def make_run(config: configs.Config, state: dict | None = None, place: str = "") -> Run:
    """A run without a folder: fresh, or of a checkpoint's state (at place). Raises ValueError if data do not fit."""
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    torch.manual_seed(config.training.seed)
    system = start_from(config) if state is None else load_state(state, place)
    config, tokenizer, stats, model = system[:4]
    training = config.training
    if state is not None:  # for the datasets alone: checkpoints keep the names that were given
        given = config.data.augment
        augment = replace(given, noise=find_again(given.noise, place), reverb=find_again(given.reverb, place))
        found = {split: find_again(getattr(config.data, split), place) for split in ("train", "dev")}
        system = system._replace(config=replace(config, data=replace(config.data, **found, augment=augment)))
    train_set = open_split(system, "train", augment=not training.overfit)
    dev_set = train_set if training.overfit else open_split(system, "dev", augment=False)
    if state is not None and state["utterances"] != len(train_set):
        raise ValueError(f"data.train: wanted the {state['utterances']} utterances that the run began with, got "
                         f"{len(train_set)}; to learn from others start a new run with training.init_from={place}")
    model.to(pick_device(training.device, "training.device"),
             torch.float64 if training.precision == "float64" else torch.float32)
    optimizer = make_optimizer(model, training.weight_decay)
    average = copy.deepcopy(model) if training.average_decay or training.average_share else model
    if state is not None:
        load_weights(model, state["trained"], place)
        load_optimizer(optimizer, state["optimizer"])
    if training.recompute_blocks:
        recompute_blocks(model)
    run = Run(config, tokenizer, stats, model, average, share_model(model), optimizer, train_set, dev_set)
    if training.warmup_share or training.average_share:
        run = run._replace(config=replace(config, training=in_steps(training, num_steps(run))))
    return run


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint (`save_run`). All ranks call it, rank 0 writes."""
    totals = sum_over_ranks(progress.totals)
    if own_rank():
        return
    history = progress.history
    reached = progress._replace(totals=totals)._asdict()
    del reached["history"]  # stands beside it, for whoever reads results and does not resume
    state = {"format": CHECKPOINT_FORMAT, "config": asdict(run.config), "tokenizer": run.tokenizer.state(),
             "stats": run.stats, "model": run.average.state_dict(), "history": history,
             "trained": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "progress": reached,
             "utterances": len(run.train_set), "log_bytes": (run.folder / "train.log").stat().st_size}
    epoch_ends = bool(history) and not progress.batch
    save_run(run.folder, state, is_best=epoch_ends and best_row(history) is history[-1])


# ---- the loop ----

class Diverged(RuntimeError):
    """training.max_bad_steps in a row were skipped."""


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: of tensors on the GPU, or of this process (ru_maxrss: bytes on macOS, else KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def step_totals(step: Step, batch: data.Batch, seconds: float, wait: float) -> dict[str, float]:
    """What one step of this rank adds to the epoch's totals; what is the same in all ranks is added by the first."""
    B, T = batch.feats.shape[:2]
    own = {"frames": int(batch.feat_lens.sum()), "padded_frames": B * T, "utterances": B, "tokens": step.tokens,
           "skipped_utterances": len(batch.skipped)}
    losses = {name if name == "loss" else f"loss_{name}": value for name, value in step.sums.items()}
    common = {"seconds": seconds, "wait": wait, "steps": int(step.finite), "skipped_steps": int(not step.finite),
              "grad_norm": step.grad_norm}
    return own | losses | ({} if own_rank() else common)


def epoch_row(progress: Progress, totals: dict[str, float], rate: float, dev: dict, seconds: float,
              memory_mb: float) -> dict:
    """One entry of metrics.json: sums of training are divided here, those of dev in dev_figures. seconds: the run's."""
    losses = {name: totals[name] / max(1.0, totals["tokens"]) for name in totals if name.startswith("loss")}
    return {"epoch": progress.epoch + 1, "step": progress.step, "learning_rate": rate, **losses,
            "grad_norm": totals["grad_norm"] / max(1, totals["steps"]), **dev,
            "frames_per_second": totals["frames"] / max(1e-9, totals["seconds"]),
            "padding": 1 - totals["frames"] / max(1.0, totals["padded_frames"]),
            "utterances": int(totals["utterances"]), "skipped_utterances": int(totals["skipped_utterances"]),
            "skipped_steps": int(totals["skipped_steps"]), "data_wait": totals["wait"] / max(1e-9, totals["seconds"]),
            "peak_memory_mb": memory_mb, "seconds": seconds}


def epoch_batches(run: Run, epoch: int) -> list[list[int]]:
    """This rank's share of every batch; the same number of batches in all ranks, so a share may be empty."""
    training = run.config.training
    lengths = run.train_set.lengths(epoch)[:training.overfit or None]
    batches = data.make_batches(np.tile(lengths, OVERFIT_TIMES if training.overfit else 1), training.batch_size,
                                training.batch_frames, training.seed, epoch)
    return [[index % len(lengths) for index in batch[own_rank()::num_ranks()]] for batch in batches]  # % undoes np.tile


def num_steps(run: Run) -> int:
    return run.config.training.num_epochs * len(epoch_batches(run, 0))


def dev_batches(run: Run) -> Iterable[data.Batch]:
    training = run.config.training
    lengths = run.dev_set.lengths()[:training.overfit or None]
    batches = data.make_batches(lengths, training.batch_size, training.batch_frames, shuffle=False)
    return data.loader(run.dev_set, batches[own_rank()::num_ranks()])


def log_skips(run: Run, batches: Iterable[data.Batch]) -> Iterator[data.Batch]:
    """The same batches; every recording that they skip is logged with the reason."""
    for batch in batches:
        for skip in batch.skipped:
            say(run, f"skipped {skip.key}: {skip.reason}", own=True)
        yield batch


def take_step(run: Run, batch: data.Batch, number: int, total_steps: int) -> Step:
    """Step `number` of the run, counted from 0, and the moving average behind it; what went wrong is logged."""
    training = run.config.training
    rate = learning_rate(number, total_steps, training)
    step = train_step(run.shared, run.optimizer, batch, rate, training, number)
    if run.average is not run.model and step.finite:
        share = newest_share(num_updates(run.optimizer) - 1, training.average_decay)
        for own, new in zip(run.average.state_dict().values(), run.model.state_dict().values()):
            own.lerp_(new, share) if new.is_floating_point() else own.copy_(new)
    if not step.finite:
        say(run, f"step {number + 1}: loss or gradient not finite, skipped; batch: {' '.join(batch.keys)}", own=True)
    return step


def progress_line(progress: Progress, step: Step, num_batches: int, total_steps: int, num_epochs: int) -> str:
    """What a terminal shows behind a step."""
    totals = progress.totals
    loss = step.sums.get("loss", 0.0) / max(1, step.tokens)
    left = max(0, total_steps - progress.step) * totals["seconds"] / progress.batch
    return (f"epoch {progress.epoch + 1}/{num_epochs}  step {progress.batch}/{num_batches}  loss {loss:.3f}  "
            f"{totals['frames'] / totals['seconds']:.0f} frames/s  left {clock(left)}")


def train_epoch(run: Run, progress: Progress, total_steps: int) -> Progress:
    """Train from progress.batch to the end of the epoch and write the checkpoints that fall due -> the new progress.
    If run.stop is set in any rank, it is set in all, and the epoch ends after that step."""
    training = run.config.training
    batches = epoch_batches(run, progress.epoch)
    run.model.train()
    shown = started = time.monotonic()
    due = data.loader(run.train_set, batches, progress.epoch, run.config.data.num_workers, progress.batch)
    for batch in log_skips(run, due):
        wait = time.monotonic() - started
        step = take_step(run, batch, progress.step, total_steps)
        now = time.monotonic()
        totals = sum_by_name(progress.totals, step_totals(step, batch, now - started, wait))
        bad_steps = 0 if step.finite else progress.bad_steps + 1
        progress = progress._replace(batch=progress.batch + 1, step=progress.step + 1, bad_steps=bad_steps,
                                     totals=totals)
        if bad_steps >= training.max_bad_steps:
            raise Diverged(f"{bad_steps} non-finite or skipped steps in a row, the last one on {' '.join(batch.keys)}")
        if sum_over_ranks({"stop": run.stop.is_set()})["stop"]:  # one rank may have the signal before another
            run.stop.set()
            break
        if training.checkpoint_steps and progress.step % training.checkpoint_steps == 0:
            save(run, progress)
        started = time.monotonic()
        if own_rank() == 0 and now - shown > (0.2 if sys.stdout.isatty() else 15.0):  # seconds; fewer lines in a file
            show(progress_line(progress, step, len(batches), total_steps, training.num_epochs), end="")
            shown = now
    return progress


def epoch_line(row: dict, num_epochs: int) -> str:
    """The line that train.log gets for an epoch."""
    losses = "  ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in row if name.startswith("loss"))
    accuracies = "  ".join(f"{name} {row[f'{name}_accuracy']:.4f}" for name in ("token", "sequence", "length"))
    return (f"epoch {row['epoch']}/{num_epochs}  {losses}  lr {row['learning_rate']:.2g}  "
            f"grad {row['grad_norm']:.2f} | {accuracies}  cer {row['cer']:.4f}  wer {row['wer']:.4f} | "
            f"{row['frames_per_second']:.0f} frames/s  wait {row['data_wait']:.1%}  padding {row['padding']:.1%}  "
            f"skipped {row['skipped_utterances']}  {clock(row['seconds'])}")


def validate(run: Run) -> dict | None:
    """The figures of the dev set; None when run.stop is set meanwhile in any rank."""
    batches = itertools.takewhile(lambda batch: not run.stop.is_set(), dev_batches(run))
    sums = evaluate(run.average, log_skips(run, batches), run.tokenizer.decode)
    sums = sum_over_ranks({**sums, "stop": run.stop.is_set()})
    return None if sums["stop"] else dev_figures(sums)


def fit(run: Run, progress: Progress) -> Progress:
    """Train until a stop_reason or run.stop; after each epoch evaluate, report, save -> the progress, as saved."""
    training = run.config.training
    total_steps = num_steps(run)
    while not (reason := stop_reason(progress.history, training)):
        started = time.monotonic() - progress.totals.get("seconds", 0.0)  # before a stop within this epoch
        history = progress.history
        progress = train_epoch(run, progress, total_steps)
        dev = validate(run)
        if dev is None:
            save(run, progress)
            return progress
        rate = learning_rate(progress.step - 1, total_steps, training)
        spent = time.monotonic() - started + (history[-1]["seconds"] if history else 0.0)
        history = [*history, epoch_row(progress, sum_over_ranks(progress.totals), rate, dev, spent,
                                       peak_memory_mb(next(run.model.parameters()).device))]
        progress = Progress(progress.epoch + 1, 0, progress.step, progress.bad_steps, {}, history)
        if len(history) == 1:
            say(run, f"{training.num_epochs} epochs will take about {clock(spent * training.num_epochs)}")
        say(run, epoch_line(history[-1], training.num_epochs))  # before the checkpoint, which knows how long the log is
        if own_rank() == 0:
            write_reports(run.folder, history)
            if training.picture_epochs and progress.epoch % training.picture_epochs == 0:
                try:
                    write_pictures(run, progress.epoch)
                except Exception as error:  # they decorate: whatever they raise, the run goes on
                    say(run, f"no pictures of epoch {progress.epoch}: {error}")
        save(run, progress)
    say(run, reason)
    return progress


# ---- starting and going on ----

def join(training) -> None:
    """Join the process group if torchrun started this process. Raises ValueError for a GPU that is not there."""
    device = pick_device(training.device, "training.device")
    join_processes("nccl" if device.type == "cuda" else "gloo")


def headline(run: Run) -> str:
    origin = f" of {run.config.training.init_from}" if run.config.training.init_from else ""
    count = min(len(run.train_set), run.config.training.overfit or len(run.train_set))
    return (f"{run.folder}: {run.config.model.name}{origin}, {num_parameters(run.model) / 1e6:.2f} M parameters, "
            f"{count} utterances, {len(run.tokenizer)} symbols, on {next(run.model.parameters()).device}")


def begin(config: configs.Config, arguments: argparse.Namespace, stop: threading.Event) -> tuple[Run, Progress]:
    """A fresh run, whose folder has a first checkpoint, so that it can be resumed at once."""
    join(config.training)
    run = make_run(config)
    doubts = [] if own_rank() else list(warnings(run, num_steps(run)))  # first, as a test set may not be there
    made = {} if own_rank() else {"folder": str(new_run(Path(arguments.runs or "runs"), Path(arguments.config).stem))}
    run = run._replace(folder=Path(sum_over_ranks(made)["folder"]), stop=stop)  # rank 0 tells the others its name
    say(run, headline(run))
    if own_rank() == 0:
        run = run._replace(lock=lock(run.folder / "lock", f"{run.folder}: wanted a folder"))
        write_atomic(run.folder / "config.yaml", configs.dump(run.config))
        for line in doubts:
            say(run, f"warning: {line}")
    save(run, Progress())
    if own_rank() == 0:
        point_latest(run.folder)
    return run, Progress()


def resume(folder: Path, overrides: Sequence[str], stop: threading.Event) -> tuple[Run, Progress]:
    """A run that stopped, its files as of its last checkpoint, with overrides. ValueError if a process works on it."""
    held = None
    if is_first_process() and (folder / "checkpoints").is_dir():
        held = lock(folder / "lock", f"{folder}: wanted a folder")
    path, state, config = last_checkpoint(folder, overrides)
    join(config.training)  # all ranks wait here: the files below may be moved once all have read them
    run = make_run(config, state, str(path))._replace(folder=folder, stop=stop, lock=held)
    progress = Progress(**state["progress"], history=state["history"])
    if own_rank():
        return run, progress._replace(totals={})  # rank 0 has the sums of all ranks
    if path.name == "previous.pt":
        os.replace(path, path.with_name("latest.pt"))
    for left in [*folder.rglob("*.tmp"), folder / "checkpoints/next.pt"]:
        left.unlink(missing_ok=True)
    with open(folder / "train.log", "ab") as log:
        log.truncate(min(log.tell(), state["log_bytes"]))
    if progress.history:
        write_reports(folder, progress.history)
    if overrides:
        write_atomic(folder / "config.yaml", configs.dump(config))
        say(run, f"going on with {' '.join(overrides)}")
    print(headline(run), flush=True)
    if not stop_reason(progress.history, config.training):
        print(f"going on in epoch {progress.epoch + 1} after step {progress.step}", flush=True)
    return run, progress


# ---- main ----

def is_lost_rank(error: Exception) -> bool:
    return isinstance(error, distributed.DistError) or bool(re.search("gloo|NCCL", str(error)))


def explain(error: Exception) -> str:
    """What a user can do something about, in a line; "" for an error that is none of these."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or re.search("not enough memory|can't allocate", text):
        return "out of memory: wanted a smaller training.batch_frames, or a larger training.accumulate"
    if "DataLoader worker (pid" in text:
        sent = "Terminated" in text  # as timeout and systemd do; what the system kills for memory is "Killed"
        cause = "sent to all processes of the run? send it to the first alone;" if sent else "too little memory?"
        return f"{text.splitlines()[0]}; {cause} data.num_workers=0 loads without it"
    if is_lost_rank(error):
        return f"another process of the run has ended: {text.splitlines()[0]}"
    if isinstance(error, (ValueError, OSError, Diverged)):
        return text.splitlines()[-1] if "Traceback" in text else text  # of a loader process
    return ""


def resume_hint(run: Run) -> str:
    return f"go on with: python train.py --resume {run.folder}"


def finish(run: Run, progress: Progress) -> int:
    """What fit came to, and what to do with it -> the exit code."""
    if not stop_reason(progress.history, run.config.training):
        if own_rank() == 0:
            print(f"\ninterrupted; {resume_hint(run)}", flush=True)
        return 0
    best, overfit = best_row(progress.history), run.config.training.overfit
    say(run, f"best epoch {best['epoch']}: token accuracy {best['token_accuracy']:.4f}, sequence accuracy "
             f"{best['sequence_accuracy']:.4f}, wer {best['wer']:.4f}\n"
             f"decode with: python decode.py --ckpt {run.folder / 'checkpoints/best.pt'}")
    failed = bool(overfit) and accuracies(best) < (1.0, 1.0)
    if failed:
        say(run, f"failed to learn {overfit} utterances by heart: look at their texts and features, then at the rate")
    return int(failed)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        description="Train a model.", epilog="An override is, for example, --training.batch_size=8",
        usage="train.py CONFIG [--section.key=value ...] [--overfit N] [--runs DIR | --dry-run]\n"
        "       train.py --resume RUN [--training.num_epochs=30 ...]\n       train.py --compare RUN ...")
    parser.add_argument("config", nargs="?", help="a YAML file like those of configs/")
    parser.add_argument("--resume", metavar="RUN", help="a run folder, or runs/latest: go on with its last "
                        "checkpoint; with options of training and data that leave the model as it is")
    parser.add_argument("--compare", metavar="RUN", nargs="+", help="print what differs in runs and came of it")
    parser.add_argument("--runs", metavar="DIR", help="where run folders are made (default: runs)")
    parser.add_argument("--overfit", type=int, metavar="N", help="learn the first N utterances by heart")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, shapes and estimates, and stop")
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [a for a in rest if not (a.startswith("--") and "." in a and "=" in a)]:
        parser.error(f"wanted --section.key=value, got {' '.join(unknown)}")
    if arguments.overfit is not None and arguments.overfit < 1:
        parser.error(f"--overfit wants 1 or more, got {arguments.overfit}")
    is_fresh = arguments.config or arguments.overfit or arguments.runs or arguments.dry_run
    alone = arguments.resume or arguments.compare
    if not (arguments.config or alone) or alone and is_fresh or arguments.compare and (rest or arguments.resume):
        parser.error("wanted a config with its options, --resume RUN with some, or --compare RUN ..., got "
                     f"{' '.join(argv) or 'nothing'}")
    if arguments.dry_run and arguments.runs:
        parser.error("--dry-run makes no run folder; leave out --runs")
    return arguments, rest


def main(argv: Sequence[str]) -> int:
    arguments, overrides = parse_arguments(argv)
    run = None
    try:
        if arguments.compare:
            print("\n".join(compare(arguments.compare)))
            return 0
        if arguments.resume:
            run, progress = resume(Path(arguments.resume).resolve(), overrides, catch_signals())
        else:
            config = adopted(rules.load(arguments.config, overrides), overrides)
            config = overfitting(config, arguments.overfit) if arguments.overfit else config
            if arguments.dry_run:
                run = make_run(config)
                for line in describe(run, epoch_batches(run, 0)):
                    print(line, flush=True)
                return 0
            run, progress = begin(config, arguments, catch_signals())
        code = finish(run, fit(run, progress))
        run = None  # else it holds the group last, and waits, with Python's lock, for a thread that waits for the lock
        if num_ranks() > 1:
            distributed.destroy_process_group()
        return code
    except (ValueError, OSError, RuntimeError) as error:  # fit raises them too: too long a recording, a full disk
        line = explain(error)
        if not line:
            raise
        if run is not None:
            space = "free some space, then " if getattr(error, "errno", None) == errno.ENOSPC else ""
            line += f"; the last checkpoint is good: {space}{resume_hint(run)}"
        print(f"train.py: {line}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) or is_lost_rank(error) else 2


if __name__ == "__main__":
    keep_streams()
    sys.exit(main(sys.argv[1:]))
