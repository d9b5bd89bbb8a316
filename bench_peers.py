"""Ours beside onnxruntime and FunASR on one directory of FunASR's: the last table of `python bench.py decode`.

Each runs in a process of its own, features in, ids out, in turns. The peers are no dependency: they are imported by the
interpreter that --peer-python names, and FunASR's own export makes the files that onnxruntime runs. Needs numpy.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
CASES = ((1, 2, 8), (1, 5, 4), (1, 10, 3), (1, 60, 1), (8, 10, 1))  # utterances, seconds of each, calls in a turn
TURNS = 8  # of each, without those that were disturbed
TRIES = 3  # as many turns at most, disturbed ones included
DISTURBED = 0.05  # of all cores' time was used by other processes

INSTALLED = """
import importlib.util
print(*(name for name in ("funasr", "onnx", "onnxruntime") if importlib.util.find_spec(name)))
"""
EXPORT = """
import functools, sys, torch
torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
from funasr import AutoModel
AutoModel(model=sys.argv[1], device="cpu", disable_update=True).export(type="onnx", quantize=True)
"""
OURS = """
import torch
from checkpoint import load_system
from decode import decode_batch
torch.set_num_threads(int(sys.argv[2]))
system = load_system(sys.argv[1], "cpu", sys.argv[3], sys.argv[4] == "laid out")

def recognise(feats):
    return int(decode_batch(system, [torch.from_numpy(x) for x in feats]).lens.sum())
"""
ONNXRUNTIME = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
name = "model_quant.onnx" if sys.argv[3] == "int8" else "model.onnx"
session = onnxruntime.InferenceSession(f"{sys.argv[1]}/{name}", options, providers=["CPUExecutionProvider"])

def recognise(feats):
    lens = np.full(len(feats), feats.shape[1], np.int32)
    logits, counts = session.run(None, {"speech": feats, "speech_lengths": lens})
    logits.argmax(-1)
    return int(counts.sum())
"""
FUNASR = """
import torch
from funasr import AutoModel
torch.set_num_threads(int(sys.argv[2]))
model = AutoModel(model=sys.argv[1], device="cpu", disable_update=True, ncpu=int(sys.argv[2])).model.eval()

@torch.inference_mode()
def recognise(feats):
    lens = torch.full((len(feats),), feats.shape[1])
    hidden, lens = model.encode(torch.from_numpy(feats), lens)
    embeds, counts = model.calc_predictor(hidden, lens)[:2]
    counts = counts.round().long()
    model.cal_decoder_with_predictor(hidden, lens, embeds, counts)[0].argmax(-1)
    return int(counts.sum())
"""
START = """
import json, re, resource, sys, time
import numpy as np
started = time.perf_counter()
"""
ANSWER = """
def answer(**figures):
    peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
    print(json.dumps({**figures, "peak_mb": int(peak) * 1.024e-3}), flush=True)

answer(sec=time.perf_counter() - started)
for line in sys.stdin:
    path, calls = line.rstrip("\\n").split("\\t")
    feats = np.load(path)
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    started = time.perf_counter()
    for _ in range(int(calls)):
        tokens = recognise(feats)
    ms = 1000 * (time.perf_counter() - started) / int(calls)
    answer(ms=ms, cpu_sec=sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before, tokens=tokens)
"""


class Contestant(NamedTuple):
    name: str
    precision: str  # float32 or int8; the ratio is to onnxruntime in the same
    layout: str
    script: str


PEERS = [Contestant("onnxruntime", "float32", "", ONNXRUNTIME), Contestant("onnxruntime", "int8", "", ONNXRUNTIME),
         Contestant("FunASR", "float32", "", FUNASR)]


class Worker(NamedTuple):
    one: Contestant
    process: subprocess.Popen
    load_sec: float


def ask(process: subprocess.Popen, *request: object) -> dict:
    """Send a request, if any -> the next answer, whatever else the process prints. Raises ValueError if it ends."""
    if request:
        process.stdin.write("\t".join(map(str, request)) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith('{"'):
            return json.loads(line)
    raise ValueError(f"{process.args[0]}: a process that was to be measured has ended; its message is above")


@contextlib.contextmanager
def working(one: Contestant, python: str, folder: str, threads: int) -> Iterator[Worker]:
    """One that has loaded the model, in a process of its own; a peer has libgomp's own spin count."""
    command = [python, "-c", START + one.script + ANSWER, folder, str(threads), one.precision, one.layout]
    env = {name: value for name, value in os.environ.items() if one.name == "ours" or name != "GOMP_SPINCOUNT"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
                               cwd=HERE if one.name == "ours" else folder)  # funasr is a file of ours, too
    try:
        yield Worker(one, process, ask(process)["sec"])
    finally:
        process.kill()
        process.communicate()


def busy_sec() -> float:
    """Seconds that all cores have worked since the machine started, stolen time included; 0 without /proc/stat."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def is_disturbed(busy: float, own_cpu: float, wall: float) -> bool:
    """Whether other processes used more than DISTURBED of all cores while one took own_cpu of the busy seconds."""
    return busy - own_cpu > DISTURBED * wall * os.cpu_count()


def take_turns(workers: Sequence[Worker], path: Path, calls: int) -> tuple[list[list[dict]], int]:
    """TURNS answers of each worker, in turns after one that is not counted -> those, how many were discarded. Where the
    machine is not quiet within TRIES * TURNS turns, fewer."""
    for worker in workers:
        ask(worker.process, path, 1)
    kept: list[list[dict]] = [[] for _ in workers]
    discarded = 0
    for _ in range(TRIES * TURNS):
        for worker, answers in zip(workers, kept):
            if len(answers) == TURNS:
                continue
            before, started = busy_sec(), time.perf_counter()
            found = ask(worker.process, path, calls)
            if is_disturbed(busy_sec() - before, found["cpu_sec"], time.perf_counter() - started):
                discarded += 1
            else:
                answers.append(found)
    return kept, discarded


def spread(ms: Sequence[float]) -> str:
    """Median, least and most."""
    extent = f"({min(ms):.0f} to {max(ms):.0f})"
    return f"{statistics.median(ms):8.0f} {extent:18}"


def measure_case(workers: Sequence[Worker], folder: str, B: int, seconds: int, calls: int) -> None:
    """Print a line for each: ms of a call, as a ratio to onnxruntime's in the same precision, tokens, memory, load."""
    feats = np.random.default_rng(0).standard_normal((B, seconds * 1000 // 60, 560), np.float32)
    path = Path(folder) / "feats.npy"
    np.save(path, feats)
    kept, discarded = take_turns(workers, path, calls)
    base_ms = {}
    for worker, answers in zip(workers, kept):
        if worker.one.name == "onnxruntime" and answers:
            base_ms[worker.one.precision] = statistics.median(answer["ms"] for answer in answers)
    print(f"{B} of {seconds} s; {discarded} turns beside other work discarded")
    for (one, _, load_sec), answers in zip(workers, kept):
        name = " ".join([one.name, one.precision, one.layout])
        if not answers:
            print(f"{name:28}  the machine was never quiet")
            continue
        ms = [answer["ms"] for answer in answers]
        ratio = f"{statistics.median(ms) / base_ms[one.precision]:.2f}" if one.precision in base_ms else "-"
        print(f"{name:28}{spread(ms)}{ratio:>6}{answers[-1]['tokens']:8}{answers[-1]['peak_mb']:9.0f}{load_sec:8.1f}",
              flush=True)


def peer_python(argv: Sequence[str]) -> tuple[str, list[str]]:
    """What --peer-python names, this interpreter without it, and the other arguments."""
    parser = argparse.ArgumentParser(prog="bench.py decode", add_help=False, allow_abbrev=False)
    parser.add_argument("--peer-python", default=sys.executable)
    found, rest = parser.parse_known_args(argv)
    return found.peer_python, rest


def measure_peers(folder: str, threads: int, layouts: Sequence[tuple[str, str]], python: str) -> None:
    """Print the table for a directory of FunASR's, ours in these precisions and layouts; python: the interpreter that
    has the peers. Raises ValueError for one that cannot be run, or an export that fails."""
    try:
        found = subprocess.run([python, "-c", INSTALLED], cwd=folder, capture_output=True, text=True,
                               check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"--peer-python: wanted a Python interpreter, got {python} ({error})") from None
    peers = PEERS if len(found) == 3 else [one for one in PEERS if one.name == "FunASR" and "funasr" in found]
    missing = [name for name in ("funasr", "onnx", "onnxruntime") if name not in found]
    if missing:
        print(f"\n{python} has no {', '.join(missing)} (--peer-python names another): measured are ours"
              f"{' and FunASR' if peers else ''}")
    if "onnxruntime" in (one.name for one in peers):
        with open(Path(folder) / "export.log", "w") as log:
            if subprocess.run([python, "-c", EXPORT, folder], cwd=folder, stdout=log, stderr=log).returncode:
                lines = Path(log.name).read_text().strip().splitlines()
                raise ValueError(f"FunASR's export to ONNX failed: {lines[-1] if lines else 'no message'}")
    contestants = [*(Contestant("ours", *layout, OURS) for layout in layouts), *peers]
    print(f"\nBeside others, {threads} threads: milliseconds from features to ids, median of {TURNS} turns (least to "
          "most);\nratio: to onnxruntime in the same precision; MB at most; seconds to load, imports included\n"
          f"{'':28}{'ms':>8} {'':18}{'ratio':>6}{'tokens':>8}{'MB':>9}{'load':>8}")
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(working(one, sys.executable if one.name == "ours" else python, folder, threads))
                   for one in contestants]
        for case in CASES:
            measure_case(workers, folder, *case)
