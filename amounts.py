"""How much data a model needs: a corpus cut to ever fewer utterances (python bench.py amounts).

Needs train.py and what it needs.
"""
import argparse
import contextlib
import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import data
import train
from checkpoint import System, load_parts
from commandline import Parser
from files import write_atomic
from manifests import scan_rows

UTTERANCES = 30000  # that a run sees, within 20 to 200 epochs: many passes over few recordings, few over many


def epochs_for(size: int, share: float = 1.0) -> int:
    """Epochs of a run from scratch on so many utterances, or a share of them, which is enough to fine-tune."""
    return max(1, round(share * max(20, min(200, UTTERANCES // size))))


def word_error_rate(system: System, manifest: Path) -> float:
    config = system.config
    dataset = data.ManifestDataset(manifest, config.data, system.tokenizer.encode, stats=system.stats,
                                   frames_per_token=config.model.encoder.subsampling)
    training = config.training
    batches = data.make_batches(dataset.lengths(), training.batch_size, training.batch_frames, shuffle=False)
    sums = train.evaluate(system.model, data.loader(dataset, batches), system.tokenizer.decode)
    return train.dev_figures(sums)["wer"]


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def measure(size: int, arguments: argparse.Namespace, tests: Sequence[Path], runs: Path,
            overrides: Sequence[str]) -> str:
    """Train on the first `size` utterances of folder/train.jsonl, choose the epoch on folder/dev.jsonl -> a line of the
    table: utterances, epochs, seconds, WER on dev and on each test manifest."""
    manifest = runs / f"train_{size}.jsonl"
    folder = arguments.folder
    rows = [row for _, row in itertools.islice(scan_rows(folder / "train.jsonl"), size)]
    if len(rows) < size:
        raise ValueError(f"{folder / 'train.jsonl'}: wanted {size} utterances, got {len(rows)}")
    lines = []
    for row in rows:
        given = {name: value for name, value in row._asdict().items() if value is not None}
        lines.append(json.dumps({**given, "audio": os.path.abspath(row.audio)}, ensure_ascii=False) + "\n")
    write_atomic(manifest, "".join(lines))
    started = time.monotonic()
    options = [f"--data.train={manifest}", f"--data.dev={folder / 'dev.jsonl'}", "--data.test="]
    epochs = epochs_for(size, arguments.epochs_share)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        code = train.main([arguments.config, *options, f"--training.num_epochs={epochs}", *overrides,
                           "--runs", str(runs / str(size))])
    if code:
        raise ValueError(f"training on {size} utterances ended with exit code {code}: {log.getvalue()[-300:]}")
    spent = time.monotonic() - started
    best = runs / str(size) / "latest/checkpoints/best.pt"
    history = json.loads((best.parents[1] / "metrics.json").read_text())
    system = load_parts(best)
    rates = [train.best_row(history)["wer"], *(word_error_rate(system, path) for path in tests)]
    return table_line([str(size), str(len(history)), f"{spent:.0f}", *(f"{rate:.2%}" for rate in rates)])


def measure_amounts(argv: Sequence[str]) -> None:
    """Print the table for `bench.py amounts`. Every manifest of the folder but train and dev is a test."""
    parser = Parser(prog="bench.py amounts", description="How much data a model needs.")
    parser.add_argument("folder", type=Path, help="with train.jsonl, dev.jsonl, test.jsonl and other tests")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 250, 1000, 3000], help="utterances to train on")
    parser.add_argument("--config", default="configs/small.yaml", help="default configs/small.yaml; overrides may "
                        "follow, such as --training.init_from=CHECKPOINT")
    parser.add_argument("--epochs-share", type=float, default=1.0, help="share of the epochs that a run from scratch "
                        "has, for fine-tuning (default 1)")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder (default: nowhere)")
    arguments, overrides = parser.parse_known_args(argv)
    tests = sorted(path for path in arguments.folder.glob("*.jsonl") if path.stem not in ("train", "dev"))
    columns = ["utterances", "epochs", "seconds", "WER on dev", *(path.stem for path in tests)]
    print(table_line(columns), table_line(["---"] * len(columns)), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        runs.mkdir(parents=True, exist_ok=True)
        for size in arguments.sizes:
            print(measure(size, arguments, tests, runs.resolve(), overrides), flush=True)
