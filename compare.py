"""Runs of train.py beside each other: a table of what differs and what came of it, and a picture of their curves.

Needs config.py, files.py, plot.py and tokenizer.py.
"""
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from config import read_yaml, show_value
from files import write_atomic
from plot import COLOURS, Curve, column, three_panels
from tokenizer import parse_file

FIGURES = ("token_accuracy", "wer", "cer", "dev_loss")  # of the table, from a run's best epoch


class Past(NamedTuple):
    folder: Path
    options: dict[str, str]  # dotted names, values as config.yaml writes them
    history: list[dict]  # a row an epoch, one or more


def flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of everything in nested sections."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, show_value(value)


def read_run(folder: Path) -> Past | None:
    """None for what is no run, or one without a whole epoch. Raises ValueError for a run's file that is damaged."""
    if not (folder / "metrics.json").is_file() or not (folder / "config.yaml").is_file():
        return None
    history = parse_file(folder / "metrics.json", "the epochs of a run", json.loads)
    options = read_yaml(folder / "config.yaml", "the config of a run")
    return Past(folder, dict(flatten(options)), history) if history else None


def accuracies(row: dict) -> tuple[float, float]:
    """What `best` means: token accuracy on dev, ties broken by sequence accuracy."""
    return row["token_accuracy"], row["sequence_accuracy"]


def best_row(history: Sequence[dict]) -> dict:
    """The epoch with the best accuracies; of equals the latest, which has learned for longer."""
    return max(reversed(history), key=accuracies)


def differing(runs: Sequence[Past]) -> list[str]:
    """The options that do not have one value in all runs; older runs lack some, which are not compared."""
    first = runs[0].options
    return [name for name in first if any(run.options.get(name, first[name]) != first[name] for run in runs)]


def table(runs: Sequence[Past]) -> Iterator[str]:
    """A head, and a line for each run: the best epoch's figures, seconds, and the options that differ."""
    wide = max(len(run.folder.name) for run in runs)
    yield f"{'run':<{wide}}  best epoch" + "".join(f"{name:>16}" for name in (*FIGURES, "seconds")) + "  what differs"
    for run in runs:
        best = best_row(run.history)
        figures = [f"{best[name]:.4f}" if name in best else "-" for name in FIGURES]
        figures.append(f"{run.history[-1]['seconds']:.0f}")
        options = " ".join(f"{name}={run.options.get(name, '-')}" for name in differing(runs))
        yield (f"{run.folder.name:<{wide}}{best['epoch']:>5} of {len(run.history):<4}"
               + "".join(f"{figure:>16}" for figure in figures) + f"  {options}".rstrip())


def picture(runs: Sequence[Past]) -> str:
    """An SVG document: losses, WER and learning rates of all runs, a colour each."""
    losses, errors, rates = [], [], []
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        losses.append(Curve(run.folder.name, column(run.history, "loss"), colour))
        losses.append(Curve("", column(run.history, "dev_loss"), colour, dashed=True))
        errors.append(Curve(run.folder.name, column(run.history, "wer"), colour))
        rates.append(Curve("", column(run.history, "learning_rate"), colour))
    panels = {"loss: in training, and dashed on dev": losses, "WER on dev": errors, "learning rate": rates}
    return three_panels(f"{len(runs)} runs by epoch", panels, max(len(run.history) for run in runs))


def compare(folders: Iterable[str | os.PathLike]) -> Iterator[str]:
    """The lines of the table, and compare.svg beside the first run. Links to a run (runs/latest) are that run.
    Raises ValueError if no folder is a run with an epoch done."""
    runs, left_out = {}, []
    for folder in folders:
        run = read_run(Path(folder).resolve())
        if run is None:
            left_out.append(os.fspath(folder))
        else:
            runs[run.folder] = run
    if not runs:
        raise ValueError(f"wanted folders of runs with an epoch done, got {' '.join(left_out)}")
    yield from table(list(runs.values()))
    path = next(iter(runs)).parent / "compare.svg"
    write_atomic(path, picture(list(runs.values())))
    if left_out:
        yield f"left out, no run with an epoch done: {' '.join(left_out)}"
    yield f"curves: {path}"
