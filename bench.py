"""How fast training, recognition and serving are on this machine.

    python bench.py train CONFIG          the loop against a plain one, and what loading and checkpoints cost
    python bench.py decode [--peer-python PYTHON]     how configs/paraformer_large.yaml loads and runs, beside its peers
    python bench.py decode a.pt b.pt      a table of their speed and errors, greedily and by beam
    python bench.py serve [CHECKPOINT]    overhead, throughput and latency of a server
    python bench.py hotwords              what lists of 0, 10 and 100 cost a SeacoParaformer, with random weights
    python bench.py parts                 an hour through a VAD, 10,000 characters through a punctuation model
    python bench.py stream [DIR [INPUT ...]]   a chunk, streams in real time, latency; DIR: 50 sockets that speak INPUT
    python bench.py amounts FOLDER        how much data a model needs: a corpus cut to ever fewer utterances
    python bench.py cuts --ckpt CHECKPOINT test.jsonl   what cutting costs: 100 utterances joined, with noise; --vad DIR

Behind the first word come the arguments of train.py, decode.py and serve.py. Needs all that these need.
"""
import argparse
import contextlib
import http.client
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from timeit import repeat, timeit

# Set before torch is loaded: idle threads then spin for 10 us and sleep, as in decode.py.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config as configs
import data
import decode
import serve
from amounts import measure_amounts
from audio import feature_dim, frontend, normalise
from baselines import Search
from bench_long import measure_cuts, measure_parts
from bench_peers import measure_peers, peer_python
from bench_stream import measure_streams
from checkpoint import System, build, export_directory, load_system, runs_on
from decode import (batch_limits, decode_batch, drawable, greedy_system, open_inputs, plan_batches, read_result,
                    with_search)
from dry_run import num_parameters, rehearse
from files import write_atomic
from model import Hypotheses
from packed import PackedLinear
from pieces import PieceTokenizer
from report import Outcome, Score, score
from serve import load_warm
from tokenizer import Counts
from train import Progress, Run, epoch_batches, fit, inputs, make_run, new_run, save
from transcribe import recognise_batch

HERE = Path(__file__).resolve().parent


def import_sec() -> float:
    """Seconds that a process takes to import torch."""
    return min(repeat(lambda: subprocess.run([sys.executable, "-c", "import torch"]), number=1, repeat=2))


# ---- training ----

def layer_options(part: configs.EncoderConfig | configs.DecoderConfig) -> dict:
    return {"d_model": part.hidden_dim, "nhead": part.num_heads, "dim_feedforward": part.ffn_dim or 4 * part.hidden_dim,
            "dropout": part.dropout, "batch_first": True, "norm_first": True}


class PlainModel(nn.Module):
    """torch.nn.Transformer layers as they come, as wide as the run's model, with about as many parameters. Its decoder
    runs twice, as a Paraformer's; it has no convolution, CIF or CTC, and subsamples by dropping frames."""

    def __init__(self, run: Run):
        super().__init__()
        encoder = run.config.model.encoder
        decoder = run.config.model.decoder
        self.subsampling = encoder.subsampling
        self.input = nn.Linear(run.stats.shape[1], encoder.hidden_dim)
        self.embedding = nn.Embedding(len(run.tokenizer), decoder.hidden_dim)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer_options(decoder)),
                                             max(1, decoder.num_layers))
        self.output = nn.Linear(decoder.hidden_dim, len(run.tokenizer))
        layer = nn.TransformerEncoderLayer(**layer_options(encoder))
        count = max(1, round((num_parameters(run.model) - num_parameters(self)) / num_parameters(layer)))
        self.encoder = nn.TransformerEncoder(layer, count, enable_nested_tensor=False)

    def forward(self, feats: Tensor, feat_lens: Tensor, tokens: Tensor) -> Tensor:
        x = self.input(feats[:, ::self.subsampling])
        lens = (feat_lens - 1) // self.subsampling + 1
        pads = torch.arange(x.shape[1]) >= lens[:, None]  # (B,L), True = padding, as torch.nn wants it
        x = self.encoder(x, src_key_padding_mask=pads)
        with torch.no_grad():
            guess = self.logits(tokens, x, pads).argmax(-1)  # (B,U,V) -> (B,U)
        return F.cross_entropy(self.logits(guess, x, pads).transpose(1, 2), tokens, ignore_index=0)  # 0 pads

    def logits(self, tokens: Tensor, x: Tensor, pads: Tensor) -> Tensor:
        return self.output(self.decoder(self.embedding(tokens), x, memory_key_padding_mask=pads))


def speeds(run: Run, num_batches: int = 20, rounds: int = 8) -> np.ndarray:
    """Steps a second of ours and of the plain loop, (2,): in turns at each batch, each at its best of all rounds."""
    batches = list(data.loader(run.train_set, epoch_batches(run, 0)[:num_batches]))
    plain = PlainModel(run)
    optimizer = torch.optim.AdamW(plain.parameters())

    def plain_step(batch: data.Batch) -> None:  # of the loop that everybody writes first
        loss = plain(*inputs(batch, plain)[:3])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        loss.item()

    seconds = np.zeros((rounds, len(batches), 2))
    for turn in range(rounds):
        for i, batch in enumerate(batches):
            seconds[turn, i, 0] = timeit(lambda: rehearse(run, [batch], 1e-4), number=1)
            seconds[turn, i, 1] = timeit(lambda: plain_step(batch), number=1)
    return len(batches) / seconds.min(0).sum(0)


def first_step_sec(config: configs.Config, folder: Path) -> float:
    """Seconds from the command to the checkpoint after the first step. Raises ValueError if the run ends before it."""
    folder.mkdir()
    stepwise = replace(config, training=replace(config.training, checkpoint_steps=1))
    write_atomic(folder / "config.yaml", configs.dump(stepwise))
    command = [sys.executable, str(HERE / "train.py"), str(folder / "config.yaml"), "--runs", str(folder)]
    started = time.perf_counter()
    done = False
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not done and process.poll() is None:
            time.sleep(0.005)
            done = any(folder.glob("2*/checkpoints/previous.pt"))
        spent = time.perf_counter() - started
        process.terminate()  # it finishes its step: a killed one leaves its loader process to complain
    if not done:
        raise ValueError("the run that was to take one step ended before it; its message is above")
    return spent


def training_figures(config: configs.Config) -> Iterator[str]:
    """The figures of a config on this machine's CPU, as lines of a table: what, measured, asked for."""
    config = replace(config, training=replace(config.training, device="cpu", num_epochs=2))
    form = "{:<64}{:>14}{:>12}".format
    yield form("figure", "measured", "asked")
    run = make_run(config)
    ours, plain = speeds(run)
    yield form(f"steps a second, ours {ours:.1f}, plain with as many parameters {plain:.1f}", f"{ours / plain:.2f} x",
               ">= 1.0 x")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runs:
        run = run._replace(folder=new_run(Path(runs), "benchmark"), stop=threading.Event())
        with contextlib.redirect_stdout(io.StringIO()):
            history = fit(run, Progress()).history
        epoch_sec = history[-1]["seconds"] - history[-2]["seconds"]
        save_sec = timeit(lambda: save(run, Progress(1, history=history[:1])), number=1)
        yield form(f"data wait, second epoch, data.num_workers={config.data.num_workers}",
                   f"{history[-1]['data_wait']:.1%}", "< 5%")
        yield form(f"checkpoints, {save_sec:.2f} s of an epoch of {epoch_sec:.1f} s", f"{save_sec / epoch_sec:.1%}",
                   "< 2%")
        torch_sec = import_sec()
        first_sec = first_step_sec(config, Path(runs) / "first")
        yield form(f"first step after {first_sec:.1f} s, of which import torch {torch_sec:.1f} s",
                   f"{first_sec - torch_sec:.1f} s", "< 3 s")


# ---- recognition: a large model ----

FRESH = ("Fresh processes, beyond import torch: seconds to load and then to the text of 10 s of audio; MB held beyond "
         "torch, and at most with it\n")
MEASURE = """
import re, sys, time, torch
def in_mb(field):
    return int(re.search(field + ": *\\t *([0-9]+)", open("/proc/self/status").read())[1]) * 1.024e-3
folder, dtype, layout, threads, hotwords = sys.argv[1:]
torch.set_num_threads(int(threads))
torch_mb = in_mb("VmRSS")
started = time.perf_counter()
from audio import frontend
from checkpoint import load_system
from decode import transcribe
system = load_system(folder, "cpu", dtype, layout == "laid out")
loaded = time.perf_counter()
if hotwords:
    system = system._replace(hotwords=tuple(hotwords.split()))
samples = torch.randn(160000, generator=torch.Generator().manual_seed(0)) / 50
transcribe(system, [frontend(samples, 16000, system.config.data, system.stats)])
done = time.perf_counter()
print(f"{dtype:9}{layout:11}{loaded - started:8.2f}{done - loaded:10.2f}{in_mb('VmRSS') - torch_mb:10.0f}"
      f"{in_mb('VmHWM'):8.0f}")
"""
LAYOUTS = (("float32", "mapped"), ("float32", "laid out"), ("bfloat16", "mapped"), ("int8", "laid out"))
LOADS = ((1, 10), (8, 10), (1, 60))  # utterances in a batch, seconds of each
TIMINGS = 9  # of what is short, of which the benchmark prints the median and the range


def large_system(config: configs.Config) -> System:
    """One with random weights and 8404 symbols, for features of configs/paraformer_large.yaml."""
    symbols = ("<blank>", "<s>", "</s>", *(chr(0x4e00 + i) for i in range(8400)), "<unk>")
    torch.manual_seed(0)
    model = build(config.model, feature_dim(config.data), len(symbols))
    stats = torch.tensor([[0.0], [0.25]]).repeat(1, feature_dim(config.data))  # as of log energies of deviation 4
    pieces = {symbol: [symbol] for symbol in symbols[3:-1]}
    return System(config, PieceTokenizer(symbols, pieces), stats, model)


def measure_fresh(folder: str, dtype: str, layout: str, hotwords: Sequence[str] = ()) -> None:
    """Print MEASURE's line, from a process of its own."""
    command = [sys.executable, "-c", MEASURE, folder, dtype, layout, str(torch.get_num_threads()), " ".join(hotwords)]
    if subprocess.run(command, cwd=HERE).returncode:
        raise ValueError(f"the process that measures {dtype} {layout} has failed")


def loading_figures(python: str) -> None:
    """Print what a model of configs/paraformer_large.yaml with random weights takes: to load, each in a fresh process,
    and to recognise, beside the matrix products that it cannot do without, and beside others (bench_peers)."""
    system = large_system(configs.load(str(HERE / "configs/paraformer_large.yaml")))
    with tempfile.TemporaryDirectory() as folder:
        export_directory(system, Path(folder))
        print(f"{sum(x.nbytes for x in system.model.parameters()) / 1e6:.0f} MB of weights in float32, "
              f"{torch.get_num_threads()} threads\n\n{FRESH}"
              "precision  weights   to load   to text        MB    peak", flush=True)
        layouts = [layout for layout in LAYOUTS if runs_on(layout[0], torch.device("cpu"))]
        for layout in layouts:
            measure_fresh(folder, *layout)
        time_loads({layout: load_system(folder, "cpu", layout[0], layout[1] == "laid out") for layout in layouts})
        measure_peers(folder, torch.get_num_threads(), layouts, python)


def time_turns(turns: int, *calls: Callable[[], object]) -> np.ndarray:
    """Seconds that each of the calls took in each turn, (calls, turns), after a turn that is not counted."""
    times = np.zeros((len(calls), turns + 1))
    for turn in range(turns + 1):
        for i, call in enumerate(calls):
            times[i, turn] = timeit(call, number=1)
    return times[:, 1:]


def products(model: nn.Module, frames: int, tokens: int) -> tuple[Callable[[], object], float]:
    """A call that does all matrix products of the model's linear layers, for so many frames and tokens; its GFLOP."""
    work = []  # (layer, its input)
    gflop = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, PackedLinear)) and name.startswith(("encoder", "decoder")):
            of_frames = name.startswith("encoder") or name.endswith("key_value")
            rows = frames if of_frames else tokens
            work.append((layer, torch.randn(1, rows, layer.in_features)))
            gflop += 2e-9 * rows * layer.in_features * layer.out_features

    def run() -> None:
        for layer, x in work:  # no output is kept: 140 MB of fresh memory would be measured as well
            layer(x)
    return run, gflop


@torch.inference_mode()
def time_load(systems: dict[tuple[str, str], System], B: int, seconds: int) -> None:
    """Print the time of each system for B utterances, and what share of it the fastest products alone take."""
    system = systems["float32", "mapped"]
    audio = [torch.randn(16000 * seconds, generator=torch.Generator().manual_seed(b)) / 50 for b in range(B)]

    def front() -> list[Tensor]:
        return [frontend(x, 16000, system.config.data, system.stats) for x in audio]

    feats = front()
    found = decode_batch(system, feats)
    sizes = B * len(feats[0]), found.tokens.numel()
    plain, gflop = products(system.model, *sizes)
    laid_out, _ = products(systems["float32", "laid out"].model, *sizes)
    calls = [front, lambda: [read_result(system, found, i) for i in range(B)], plain, laid_out]
    calls += [partial(decode_batch, one, feats) for one in systems.values()]
    ms = 1000 * time_turns(TIMINGS, *calls)
    front_ms, text_ms, plain_ms, laid_out_ms, *model_ms = np.median(ms, 1)
    limit = min(plain_ms, laid_out_ms)
    print(f"{B:5}{seconds:5} s  products of {gflop:.0f} GFLOP: {1000 * gflop / plain_ms:.0f} GFLOP/s mapped, "
          f"{1000 * gflop / laid_out_ms:.0f} laid out; limit {limit:.0f} ms")
    for (dtype, layout), middle, turns in zip(systems, model_ms, ms[4:]):
        extent = f"({turns.min():.0f} to {turns.max():.0f})"
        share = (middle + front_ms + text_ms) / (10 * B * seconds)
        print(f"{B:5}{seconds:5} s  {dtype:9}  {layout:8}{front_ms:11.1f}{middle:8.0f} {extent:18}"
              f"{text_ms:6.1f}{share:10.2f}%{100 * limit / middle:8.0f}%", flush=True)


def time_loads(systems: dict[tuple[str, str], System]) -> None:
    print("\nMilliseconds, median (least to most), and as shares of real time and of the limit, the products alone\n"
          "batch  audio  precision  weights   front end  model                      text  real time    limit")
    for B, seconds in LOADS:
        time_load(systems, B, seconds)


# ---- recognition: checkpoints compared ----

BEAM = 10  # of the models that have a search, unless another is asked for
RUNS = 3  # of each batch, of which the median is its time


def both_searches(arguments: argparse.Namespace, path: str) -> dict[str, System]:
    """The system of a checkpoint, greedy and, where it has a search, as the arguments ask, else with BEAM; by names."""
    system = greedy_system(arguments, path)
    found = {f"{path}, greedy": system}
    if hasattr(system.model, "search"):
        search = Search(BEAM) if arguments.search == Search() else arguments.search
        found[f"{path}, beam {search.width}"] = with_search(system, search)
    return found


def boundary_shifts(system: System, item: data.Utterance, edges: Tensor) -> Tensor:
    """Distances in encoder frames of the inner token boundaries that a model fired, of `edges` (n+1,), from the true
    ones: (n-1,); (0,) if those are unknown, the number of tokens is wrong, or the model does not fire."""
    true = item.boundaries
    if system.config.model.name != "paraformer" or true is None or len(true) != len(edges):
        return torch.zeros(0)
    return (edges - true)[1:-1].abs() / system.config.model.encoder.subsampling


def decode_in_turns(systems: Sequence[System], items: Sequence[data.Utterance]) -> tuple[list[Hypotheses], np.ndarray]:
    """What each system makes of a batch, and the median of its seconds in RUNS turns."""
    seconds = np.zeros((RUNS, len(systems)))
    for turn in range(RUNS):
        found = []
        for s, system in enumerate(systems):
            feats = [normalise(item.feats, system.stats.cpu()) for item in items]
            started = time.perf_counter()
            found.append(decode_batch(system, feats))
            seconds[turn, s] = time.perf_counter() - started
    return found, np.median(seconds, 0)


def figures_row(name: str, sec: float, first_sec: float, scores: Sequence[Score], shifts: Sequence[Tensor]) -> str:
    words = sum((s.words for s in scores), Counts())
    chars = sum((s.chars for s in scores), Counts())
    tokens = sum((s.tokens for s in scores), Counts())
    length = (tokens.ref + tokens.ins - tokens.del_) / len(scores)
    shift = torch.cat(list(shifts))
    shown = f"{shift.median():.2f}" if len(shift) else "-"
    return (f"{len(scores) / sec:12.1f} {sec / first_sec:6.2f} {100 * words.rate:6.2f}% {100 * chars.rate:6.2f}% "
            f"{length:7.2f} {shown:>10}  {name}")


def compare(arguments: argparse.Namespace) -> None:
    """Print a table of the checkpoints (.pt) among the inputs, on the other inputs or the first one's own test data.
    Timed is what makes Hypotheses of normalised features."""
    paths = [path for path in arguments.inputs if path.endswith(".pt")]
    named: dict[str, System] = {}
    for path in paths or [arguments.ckpt]:
        named |= both_searches(arguments, path)
    systems = list(named.values())
    first = systems[0]
    unchanged = torch.tensor([[0.0], [1.0]]).expand(first.stats.shape)  # each normalises with its own statistics
    spent = np.zeros(len(systems))
    scores: list[list[Score]] = [[] for _ in systems]
    shifts: list[list[Tensor]] = [[] for _ in systems]
    with tempfile.TemporaryDirectory() as scratch:
        others = [path for path in arguments.inputs if path not in paths]
        dataset = open_inputs(first._replace(stats=unchanged), others, Path(scratch))
        lengths = dataset.lengths()[:arguments.limit or None]
        for batch in itertools.chain.from_iterable(plan_batches(lengths, *batch_limits(first))):
            items = [item for i in batch if (item := drawable(dataset, i)) and item.text.strip()]
            if not items:
                continue
            found, seconds = decode_in_turns(systems, items)
            spent += seconds
            for s, system in enumerate(systems):
                for i, item in enumerate(items):
                    outcome = Outcome(i, item.key, item.seconds, item.text, read_result(system, found[s], i))
                    scores[s].append(score(outcome, system.tokenizer.encode))
                    shifts[s].append(boundary_shifts(system, item, found[s].boundaries[i]))
    if not scores[0]:
        raise ValueError("wanted utterances with frames and a text, got none")
    print(f"{len(scores[0])} utterances of {statistics.fmean(s.tokens.ref for s in scores[0]):.2f} tokens, batches of "
          f"{arguments.batch_size}, {first.stats.device}, {torch.get_num_threads()} threads; boundaries: median error "
          "of the firing in encoder frames\nutterances/s   time     WER     CER  tokens boundaries  checkpoint, search")
    for s, name in enumerate(named):
        print(figures_row(name, spent[s], spent[0], scores[s], shifts[s]))


# ---- serving ----

@contextlib.contextmanager
def running(options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """A server in a process of its own -> its port, and the seconds from its start until it listened."""
    started = time.perf_counter()
    names = ("checkpoint", "device", "threads", "dtype", "max_batch_size", "max_wait_ms", "max_batch_frames")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, str(HERE / "serve.py"), "--port=0", *given]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "ASR_API_KEY": ""})
    try:
        output = ""
        while not (match := re.search(r"http://[^:]+:(\d+)", output)):
            line = process.stderr.readline()
            if not line:
                raise ValueError(f"the server did not start: {output.strip()}")
            output += line
        ready = time.perf_counter() - started
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(match[1]), ready
    finally:
        process.terminate()
        process.wait()


def post_all(port: int, bodies: Sequence[bytes]) -> list[tuple[float, dict]]:
    """Send bodies over one kept connection, one after another -> (ms, the answer's timing) of each."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    found = []
    for body in bodies:
        started = time.perf_counter()
        connection.request("POST", "/transcribe", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        answer = reply.read()
        ms = 1e3 * (time.perf_counter() - started)
        if reply.status != 200:
            raise ValueError(f"wanted 200, got {reply.status} {answer[:200]!r}")
        found.append((ms, json.loads(answer)["timing"]))
    connection.close()
    return found


def time_clients(port: int, bodies: Sequence[bytes], clients: int) -> tuple[float, list[tuple[float, dict]]]:
    """Send bodies from so many clients at once -> seconds in all, and (ms, the answer's timing) of each body."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        shares = [bodies[i::clients] for i in range(clients)]
        found = list(itertools.chain.from_iterable(pool.map(partial(post_all, port), shares)))
    return time.perf_counter() - started, found


ASK_HEALTH = """
import http.client, sys, time
connection, times = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), []
for _ in range(200):
    started = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    times.append(1e3 * (time.perf_counter() - started))
    time.sleep(0.02)
print(*times)
"""
ROUNDS_SEC = 15     # no round of a benchmark starts later; a large model's first takes longer and is its only one


def make_bodies(mean: np.ndarray) -> dict[str, list[bytes]]:
    """160 requests of mixed lengths and 160 of equal ones: features as JSON around the statistics' mean (F,)."""
    rng = np.random.default_rng(0)

    def body(frames: int) -> bytes:
        feats = mean + rng.standard_normal((frames, len(mean)))
        return json.dumps({"features": feats.round(4).tolist()}).encode()

    return {"mixed": [body(n) for n in rng.integers(10, 261, 160)], "equal": [body(100) for _ in range(160)]}


def health_ms(port: int, bodies: Sequence[bytes]) -> list[float]:
    """How long /health takes to answer while 16 clients send the bodies, sorted; [nan] if the asking process failed."""
    asker = subprocess.Popen([sys.executable, "-c", ASK_HEALTH, str(port)], stdout=subprocess.PIPE, text=True)
    while asker.poll() is None:
        time_clients(port, bodies, 16)
    return sorted(map(float, asker.stdout.read().split())) or [math.nan]


def serving_figures(options: argparse.Namespace) -> None:
    """Print the figures that a server of this checkpoint reaches, client and server on this machine."""
    system = load_warm(options).whole
    bodies = make_bodies(system.stats[0].cpu().numpy())
    largest = [torch.randn(260, system.stats.shape[1]) for _ in range(options.max_batch_size)]
    torch_sec = import_sec()
    rounds: dict[tuple[str, int], list] = {key: [] for key in itertools.product(bodies, (1, 16))}
    full_ms: list[float] = []
    with running(options) as (port, ready_sec):
        time_clients(port, bodies["mixed"][:32], 4)
        until = time.monotonic() + ROUNDS_SEC
        while not full_ms or time.monotonic() < until:      # kinds in turn, as the machine's speed drifts
            full_ms.append(1e3 * timeit(lambda: recognise_batch(system, largest), number=1))
            for (kind, clients), found in rounds.items():
                found.append(time_clients(port, bodies[kind], clients))
        health = health_ms(port, bodies["mixed"])
    alone = itertools.chain.from_iterable(found for _, found in rounds["equal", 1])
    overhead = statistics.median(ms - timing["infer_ms"] for ms, timing in alone)
    crowd = itertools.chain.from_iterable(found for _, found in rounds["mixed", 16])
    p99 = np.quantile([ms for ms, _ in crowd], 0.99, method="higher")
    print(f"start to ready beyond import torch     {ready_sec - torch_sec:8.2f} s     (asked for: at most 1)")
    print(f"overhead of a request, median          {overhead:8.2f} ms    (at most 5; 100 frames, JSON)")
    for kind, asked in (("mixed", 1.3), ("equal", 2.0)):
        one = 160 / statistics.median(seconds for seconds, _ in rounds[kind, 1])
        many = 160 / statistics.median(seconds for seconds, _ in rounds[kind, 16])
        print(f"throughput, {kind} lengths, 16 clients  {many:8.1f} /s    {many / one:.2f} x one client (at least "
              f"{asked}; medians of {len(full_ms)} rounds)")
    print(f"p99 at 16 clients, mixed lengths       {p99:8.1f} ms    {p99 / statistics.median(full_ms):.2f} x a full "
          "batch (at most 3)")
    print(f"/health meanwhile, most                {health[-1]:8.1f} ms    {statistics.median(health):.1f} ms in the "
          f"median (at most 50; {len(health)} asked)")


# ---- the arguments of each ----

def check_decode(arguments: argparse.Namespace) -> None:
    """Raises ValueError for arguments of decode.py that have no effect on what is measured."""
    idle = ["output", "report", "plot", "export"]
    if not arguments.inputs:
        idle += ["ckpt", "device", "dtype", "limit", "min_segment_sec", "max_segment_sec",
                 "batch_size", "batch_seconds", *Search._fields]
    elif any(path.endswith(".pt") for path in arguments.inputs):
        idle += ["ckpt"]
    usual = decode.parse_arguments([])
    for name in idle:
        if getattr(arguments, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')}: wanted none, as it has no effect on what is measured")


def measure_decode(argv: Sequence[str]) -> None:
    python, rest = peer_python(argv)
    arguments = decode.parse_arguments(rest)
    check_decode(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.inputs:
        loading_figures(python)
    elif len(rest) < len(argv):
        raise ValueError("--peer-python: wanted no INPUT beside it, as others run no checkpoint")
    else:
        compare(arguments)


def measure_train(argv: Sequence[str]) -> None:
    if not argv:
        raise ValueError("wanted a config behind train, got nothing")
    for line in training_figures(configs.load(argv[0], argv[1:])):
        print(line, flush=True)


def measure_serve(argv: Sequence[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--checkpoint", *argv]
    serving_figures(serve.parse_arguments(argv))


# ---- hotwords ----

LISTS = (0, 10, 100)  # hotwords in a list


def measure_hotwords(arguments: Sequence[str]) -> None:
    """Print what hotwords cost a SeacoParaformer of FunASR's size with random weights, for one recording of 10 s."""
    if arguments:
        raise ValueError(f"hotwords: wanted no arguments, got {' '.join(arguments)}")
    config = configs.load(str(HERE / "configs/paraformer_large.yaml"))
    second = replace(config.model.decoder, num_layers=6, kernel_size=21, ffn_dim=1024)
    section = replace(config.model, name="seaco", predictor=replace(config.model.predictor, upsampling=3),
                      hotwords=configs.HotwordConfig(decoder=second))
    system = large_system(replace(config, model=section))
    words = [chr(0x4e00 + i) + chr(0x5e00 + i) for i in range(max(LISTS))]
    layouts = [layout for layout in (("float32", "mapped"), ("int8", "laid out"))
               if runs_on(layout[0], torch.device("cpu"))]
    with tempfile.TemporaryDirectory() as folder:
        export_directory(system, Path(folder))
        print(f"{sum(x.numel() for x in system.model.parameters()) / 1e6:.0f} M parameters, "
              f"{torch.get_num_threads()} threads\n\n{FRESH}"
              "hotwords precision  weights   to load   to text        MB    peak", flush=True)
        for layout in layouts:
            for count in LISTS:
                print(f"{count:8} ", end="", flush=True)
                measure_fresh(folder, *layout, words[:count])
        print("\nMilliseconds of the model, median (least to most), with a list that is kept, and of encoding one\n"
              "hotwords precision    model                  encoding")
        for dtype, layout in layouts:
            time_lists(load_system(folder, "cpu", dtype, layout == "laid out"), dtype, words)


@torch.inference_mode()
def time_lists(system: System, dtype: str, words: Sequence[str]) -> None:
    samples = torch.randn(160000, generator=torch.Generator().manual_seed(0)) / 50
    feats = [frontend(samples, 16000, system.config.data, system.stats)]
    calls = []
    for count in LISTS:
        phrases = tuple(words[:count])
        listening = system._replace(hotwords=phrases if count else None)
        calls.append(partial(decode_batch, listening, feats))
        calls.append(partial(system.encode_list.__wrapped__, phrases))
    ms = 1000 * time_turns(TIMINGS, *calls)
    for i, count in enumerate(LISTS):
        model_ms, list_ms = ms[2 * i], ms[2 * i + 1]
        extent = f"({model_ms.min():.0f} to {model_ms.max():.0f})"
        print(f"{count:8} {dtype:9}{np.median(model_ms):8.0f} {extent:18}{np.median(list_ms):10.1f}", flush=True)


# ---- main ----

MEASURES = {"train": measure_train, "decode": measure_decode, "serve": measure_serve, "hotwords": measure_hotwords,
            "parts": measure_parts, "cuts": measure_cuts, "amounts": measure_amounts,
            "stream": partial(measure_streams, large_system, running)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description="How fast this machine trains, recognises, serves.")
    parser.add_argument("what", choices=list(MEASURES), help="what to measure")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="a config and its overrides, or those of decode.py "
                        "(none: a large model; checkpoints: compare them) or serve.py")
    arguments = parser.parse_args(argv)
    try:
        MEASURES[arguments.what](arguments.arguments)
        return 0
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
