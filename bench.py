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

Behind the first word come the arguments of train.py, decode.py and serve.py.
"""
import argparse
import contextlib
import http.client
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from timeit import timeit

from commandline import Parser, refuse, spin_briefly

if __name__ == "__main__":
    spin_briefly()  # before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config as configs
import data
import rules
import serve
from amounts import measure_amounts
from audio import frontend, normalise
from baselines import Search
from bench_long import large_config, large_system, measure_cuts, measure_parts, noise, time_turns
from bench_peers import measure_peers, peer_python, spread
from bench_stream import measure_streams, running
from checkpoint import System, export_directory, load_system, runs_on
from decode import decode_batch, drawable, greedy_system, open_inputs, plan_batches, read_result, with_search
from decode_options import parse_arguments
from dry_run import num_parameters, rehearse
from files import write_atomic
from packed import PackedLinear
from report import Outcome, Score, score
from serve import load_warm
from tokenizer import Counts
from train import Progress, Run, epoch_batches, fit, inputs, make_run, new_run, save
from transcribe import recognise_batch

HERE = Path(__file__).resolve().parent


def import_sec() -> float:
    """Seconds that a process takes to import torch."""
    return min(timeit(lambda: subprocess.run([sys.executable, "-c", "import torch"]), number=1) for _ in range(2))


def figure_row(figure: str, measured: str, asked: str) -> str:
    return f"{figure:<64}{measured:>14}{asked:>12}"


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


def speeds(run: Run, num_batches: int = 20, rounds: int = 8) -> tuple[float, float]:
    """Steps a second of ours and of the plain loop: in turns at each batch, each at its best of all rounds."""
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

    calls = {}
    for i, batch in enumerate(batches):
        calls["ours", i] = partial(rehearse, run, [batch], 1e-4)
        calls["plain", i] = partial(plain_step, batch)
    spent_ms = {"ours": 0.0, "plain": 0.0}
    for (name, _), ms in time_turns(rounds, calls).items():
        spent_ms[name] += min(ms)
    return 1000 * len(batches) / spent_ms["ours"], 1000 * len(batches) / spent_ms["plain"]


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
    yield figure_row("figure", "measured", "asked")
    run = make_run(config)
    ours, plain = speeds(run)
    yield figure_row(f"steps a second, ours {ours:.1f}, plain with as many parameters {plain:.1f}",
                     f"{ours / plain:.2f} x", ">= 1.0 x")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runs:
        run = run._replace(folder=new_run(Path(runs), "benchmark"), stop=threading.Event())
        with contextlib.redirect_stdout(io.StringIO()):
            history = fit(run, Progress()).history
        epoch_sec = history[-1]["seconds"] - history[-2]["seconds"]
        save_sec = timeit(lambda: save(run, Progress(1, history=history[:1])), number=1)
        yield figure_row(f"data wait, second epoch, data.num_workers={config.data.num_workers}",
                         f"{history[-1]['data_wait']:.1%}", "< 5%")
        yield figure_row(f"checkpoints, {save_sec:.2f} s of an epoch of {epoch_sec:.1f} s",
                         f"{save_sec / epoch_sec:.1%}", "< 2%")
        torch_sec = import_sec()
        first_sec = first_step_sec(config, Path(runs) / "first")
        yield figure_row(f"first step after {first_sec:.1f} s, of which import torch {torch_sec:.1f} s",
                         f"{first_sec - torch_sec:.1f} s", "< 3 s")


# ---- recognition: a large model ----

MEASURE = """
import re, sys, time, torch
def in_mb(field):
    return int(re.search(field + ": *\\t *([0-9]+)", open("/proc/self/status").read())[1]) * 1.024e-3
folder, threads, dtype, layout, *hotwords = sys.argv[1:]
torch.set_num_threads(int(threads))
torch_mb = in_mb("VmRSS")
started = time.perf_counter()
from audio import frontend
from checkpoint import load_system
from decode import transcribe
system = load_system(folder, "cpu", dtype, layout == "laid out")
loaded = time.perf_counter()
if hotwords:
    system = system._replace(hotwords=tuple(hotwords))
samples = torch.randn(160000, generator=torch.Generator().manual_seed(0)) / 50
transcribe(system, [frontend(samples, 16000, system.config.data, system.stats)])
done = time.perf_counter()
print(f"{dtype:10}{layout:10}{loaded - started:8.2f}{done - loaded:10.2f}{in_mb('VmRSS') - torch_mb:10.0f}"
      f"{in_mb('VmHWM'):8.0f}", flush=True)
"""
LAYOUTS = (("float32", "mapped"), ("float32", "laid out"), ("bfloat16", "mapped"), ("int8", "laid out"))
LOADS = ((1, 10), (8, 10), (1, 60))  # utterances in a batch, seconds of each
TIMINGS = 9  # of what is short, of which the benchmark prints the median and the range


def layouts_here(*layouts: tuple[str, str]) -> list[tuple[str, str]]:
    """Those (precision, layout of the weights) that this processor runs."""
    return [layout for layout in layouts if runs_on(layout[0], torch.device("cpu"))]


@contextlib.contextmanager
def large_folder(config: configs.Config) -> Iterator[str]:
    """A directory with a model of this config and random weights, whose size is printed."""
    system = large_system(config)
    with tempfile.TemporaryDirectory() as folder:
        export_directory(system, Path(folder))
        print(f"{num_parameters(system.model) / 1e6:.0f} M parameters, {torch.get_num_threads()} threads\n", flush=True)
        yield folder


def measure_fresh(folder: str, layouts: Sequence[tuple[str, str]], words: Sequence[str] = ()) -> None:
    """Print MEASURE's line of each layout, with these hotwords, from a process of its own."""
    print(f"Fresh processes, {len(words)} hotwords, beyond import torch: seconds to load and then to the text of 10 s "
          "of audio; MB held beyond torch, and at most with it\n"
          "precision weights    to load   to text        MB    peak", flush=True)
    for layout in layouts:
        command = [sys.executable, "-c", MEASURE, folder, str(torch.get_num_threads()), *layout, *words]
        if subprocess.run(command, cwd=HERE).returncode:
            raise ValueError(f"the process that measures {' '.join(layout)} has failed")


def measure_loading(python: str) -> None:
    """Print what a model of configs/paraformer_large.yaml with random weights takes: to load, each in a fresh process,
    and to recognise, beside the matrix products that it cannot do without, and beside others (bench_peers)."""
    layouts = layouts_here(*LAYOUTS)
    with large_folder(large_config()) as folder:
        measure_fresh(folder, layouts)
        systems = {}
        for dtype, weights in layouts:
            systems[dtype, weights] = load_system(folder, "cpu", dtype, weights == "laid out")
        print("\nMilliseconds, median (least to most), and shares of real time and of the limit, the products alone\n"
              "batch  audio  precision  weights   front end  model                      text  real time    limit")
        for B, seconds in LOADS:
            time_load(systems, B, seconds)
        measure_peers(folder, torch.get_num_threads(), layouts, python)


def products(model: nn.Module, frames: int, tokens: int) -> tuple[Callable[[], object], float]:
    """A call that does all matrix products of the model's linear layers, for so many frames and tokens; its GFLOP."""
    work = []  # (layer, its input)
    inputs = {}  # of each shape, one for all layers: one for each would take 20 GB
    gflop = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, PackedLinear)) and name.startswith(("encoder", "decoder")):
            of_frames = name.startswith("encoder") or name.endswith("key_value")
            rows = frames if of_frames else tokens
            shape = rows, layer.in_features
            if shape not in inputs:
                inputs[shape] = torch.randn(1, *shape)
            work.append((layer, inputs[shape]))
            gflop += 2e-9 * rows * layer.in_features * layer.out_features

    def run() -> None:
        for layer, x in work:  # no output is kept: 140 MB of fresh memory would be measured as well
            layer(x)
    return run, gflop


@torch.inference_mode()
def time_load(systems: dict[tuple[str, str], System], B: int, seconds: int) -> None:
    """Print the time of each system for B utterances, and what share of it the fastest products alone take."""
    system = systems["float32", "mapped"]
    audio = [noise(16000 * seconds, b) for b in range(B)]

    def front() -> list[Tensor]:
        return [frontend(x, 16000, system.config.data, system.stats) for x in audio]

    feats = front()
    found = decode_batch(system, feats)

    def texts() -> None:
        for i in range(B):
            read_result(system, found, i)

    calls = {"front end": front, "text": texts}
    for weights in ("mapped", "laid out"):
        model = systems["float32", weights].model
        calls[f"products {weights}"], gflop = products(model, B * len(feats[0]), found.tokens.numel())
    for layout, other in systems.items():
        calls[layout] = partial(decode_batch, other, feats)
    turns = time_turns(TIMINGS, calls)
    ms = {name: statistics.median(times) for name, times in turns.items()}
    limit = min(ms["products mapped"], ms["products laid out"])
    print(f"{B:5}{seconds:5} s  products of {gflop:.0f} GFLOP: {1000 * gflop / ms['products mapped']:.0f} GFLOP/s "
          f"mapped, {1000 * gflop / ms['products laid out']:.0f} laid out; limit {limit:.0f} ms")
    for layout in systems:
        percent = (ms[layout] + ms["front end"] + ms["text"]) / (10 * B * seconds)  # of real time
        print(f"{B:5}{seconds:5} s  {layout[0]:9}  {layout[1]:8}{ms['front end']:11.1f}{spread(turns[layout])}"
              f"{ms['text']:6.1f}{percent:10.2f}%{100 * limit / ms[layout]:8.0f}%", flush=True)


# ---- recognition: what hotwords cost ----

LISTS = (0, 10, 100)  # hotwords in a list


def measure_hotwords(arguments: Sequence[str]) -> None:
    """Print what hotwords cost a SeacoParaformer of FunASR's size with random weights, for one recording of 10 s."""
    if arguments:
        raise ValueError(f"hotwords: wanted no arguments, got {' '.join(arguments)}")
    config = large_config()
    second = replace(config.model.decoder, num_layers=6, kernel_size=21, ffn_dim=1024)
    section = replace(config.model, name="seaco", predictor=replace(config.model.predictor, upsampling=3),
                      hotwords=configs.HotwordConfig(decoder=second))
    words = [chr(0x4e00 + i) + chr(0x5e00 + i) for i in range(max(LISTS))]
    lists = [tuple(words[:count]) for count in LISTS]
    layouts = layouts_here(("float32", "mapped"), ("int8", "laid out"))
    with large_folder(replace(config, model=section)) as folder:
        for words in lists:
            measure_fresh(folder, layouts, words)
        print("\nMilliseconds of the model, median (least to most), with a list that is kept, and of encoding one\n"
              "hotwords precision    model                  encoding")
        for dtype, weights in layouts:
            time_lists(load_system(folder, "cpu", dtype, weights == "laid out"), lists)


@torch.inference_mode()
def time_lists(system: System, lists: Sequence[tuple[str, ...]]) -> None:
    feats = [frontend(noise(160000), 16000, system.config.data, system.stats)]
    calls = {}
    for words in lists:
        listening = system._replace(hotwords=words or None)
        calls["model", words] = partial(decode_batch, listening, feats)
        calls["list", words] = partial(system.encode_list.__wrapped__, words)
    ms = time_turns(TIMINGS, calls)
    for words in lists:
        print(f"{len(words):8} {system.precision:9}{spread(ms['model', words])}"
              f"{statistics.median(ms['list', words]):10.1f}", flush=True)


# ---- recognition: checkpoints compared ----

BEAM = 10  # of the models that have a search, unless another is asked for
RUNS = 3  # of each batch, of which the median is its time


@dataclass
class Side:
    """A checkpoint with a search, and what it has done so far."""

    name: str
    system: System
    sec: float = 0.0
    scores: list[Score] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)  # `boundary_shifts` of each utterance


def boundary_shifts(system: System, item: data.Utterance, edges: Tensor) -> Tensor:
    """Distances in encoder frames of the inner token boundaries that a model fired, of `edges` (n+1,), from the true
    ones: (n-1,); (0,) if those are unknown, the number of tokens is wrong, or the model does not fire."""
    true = item.boundaries
    if system.config.model.name != "paraformer" or true is None or len(true) != len(edges):
        return torch.zeros(0)
    return (edges - true)[1:-1].abs() / system.config.model.encoder.subsampling


def compare_batch(sides: Sequence[Side], items: Sequence[data.Utterance]) -> None:
    """Add what each side makes of a batch, and the median of its seconds in RUNS turns."""
    calls = {}
    for side in sides:
        system = side.system
        feats = [normalise(item.feats, system.stats.cpu()) for item in items]
        calls[side.name] = partial(decode_batch, system, feats)
        found = decode_batch(system, feats)
        for i, item in enumerate(items):
            outcome = Outcome(i, item.key, item.seconds, item.text, read_result(system, found, i))
            side.scores.append(score(outcome, system.tokenizer.encode))
            side.shifts.append(boundary_shifts(system, item, found.boundaries[i]))
    ms = time_turns(RUNS, calls)
    for side in sides:
        side.sec += statistics.median(ms[side.name]) / 1000


def side_row(side: Side, first_sec: float) -> str:
    words = sum((s.words for s in side.scores), Counts())
    chars = sum((s.chars for s in side.scores), Counts())
    tokens = sum((s.tokens for s in side.scores), Counts())
    length = (tokens.ref + tokens.ins - tokens.del_) / len(side.scores)
    shift = torch.cat(side.shifts)
    shown = f"{shift.median():.2f}" if len(shift) else "-"
    return (f"{len(side.scores) / side.sec:12.1f} {side.sec / first_sec:6.2f} {100 * words.rate:6.2f}% "
            f"{100 * chars.rate:6.2f}% {length:7.2f} {shown:>10}  {side.name}")


def compare(arguments: argparse.Namespace) -> None:
    """Print a table of the checkpoints (.pt) among the inputs, greedily and, where there is a search, as the arguments
    ask, else with BEAM, on the other inputs or the first one's own test data. Timed is what makes Hypotheses of
    normalised features."""
    paths = [path for path in arguments.inputs if path.endswith(".pt")]
    others = [path for path in arguments.inputs if path not in paths]
    sides: list[Side] = []
    for path in paths or [arguments.ckpt]:
        system = greedy_system(arguments, path)
        sides.append(Side(f"{path}, greedy", system))
        if hasattr(system.model, "search"):
            search = Search(BEAM) if arguments.search == Search() else arguments.search
            sides.append(Side(f"{path}, beam {search.width}", with_search(system, search)))
    first = sides[0].system
    unchanged = torch.tensor([[0.0], [1.0]]).expand(first.stats.shape)  # each normalises with its own statistics
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_inputs(first._replace(stats=unchanged), others, Path(scratch))
        lengths = dataset.lengths()[:arguments.limit or None]
        for batches in plan_batches(range(len(lengths)), lengths, first):
            for batch in batches:
                items = [drawable(dataset, i) for i in batch]
                items = [item for item in items if item and item.text.strip()]
                if items:
                    compare_batch(sides, items)
    scores = sides[0].scores
    if not scores:
        raise ValueError("wanted utterances with frames and a text, got none")
    print(f"{len(scores)} utterances of {statistics.fmean(s.tokens.ref for s in scores):.2f} tokens, batches of "
          f"{arguments.batch_size}, {first.stats.device}, {torch.get_num_threads()} threads; boundaries: median error "
          "of the firing in encoder frames\nutterances/s   time     WER     CER  tokens boundaries  checkpoint, search")
    for side in sides:
        print(side_row(side, sides[0].sec))


# ---- serving ----

def ask_all(port: int, path: str, bodies: Sequence[bytes | None], pause_sec: float = 0.0) -> list[tuple[float, dict]]:
    """POST bodies, None: GET, over one kept connection, one after another -> ms until the whole answer is there, and
    what it says, of each. Raises ValueError unless its status is 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    found = []
    for body in bodies:
        started = time.perf_counter()
        connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        ms = 1000 * (time.perf_counter() - started)
        if response.status != 200:
            raise ValueError(f"wanted 200, got {response.status} {answer[:200]!r}")
        found.append((ms, json.loads(answer)))
        time.sleep(pause_sec)
    connection.close()
    return found


def ask_at_once(port: int, bodies: Sequence[bytes], clients: int, found: list[tuple[float, dict]]) -> None:
    """Send bodies from so many clients; what `ask_all` says of each is added to `found`."""
    shares = [bodies[i::clients] for i in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        for replies in pool.map(partial(ask_all, port, "/transcribe"), shares):
            found += replies


def make_bodies(mean: np.ndarray) -> dict[str, list[bytes]]:
    """160 requests of mixed lengths and 160 of equal ones: features as JSON around the statistics' mean (F,)."""
    rng = np.random.default_rng(0)

    def body(frames: int) -> bytes:
        feats = mean + rng.standard_normal((frames, len(mean)))
        return json.dumps({"features": feats.round(4).tolist()}).encode()

    return {"mixed": [body(n) for n in rng.integers(10, 261, 160)], "equal": [body(100) for _ in range(160)]}


ROUNDS = 5  # of all requests, of which figures are medians


def time_requests(port: int, bodies: dict[str, list[bytes]], full_batch: Callable[[], object]) -> tuple[dict, dict]:
    """By kind of bodies and number of clients, in turns with "full batch": milliseconds, as `time_turns`, and what
    `ask_all` says of each request that is timed."""
    calls = {"full batch": full_batch}
    replies = {}
    for kind, clients in itertools.product(bodies, (1, 16)):
        replies[kind, clients] = []
        calls[kind, clients] = partial(ask_at_once, port, bodies[kind], clients, replies[kind, clients])
    ms = time_turns(ROUNDS, calls)
    for (kind, _), found in replies.items():
        del found[:len(bodies[kind])]  # of the turn that warms up
    return ms, replies


def serving_figures(options: argparse.Namespace) -> Iterator[str]:
    """The figures that a server of this checkpoint reaches, client and server on this machine, as training_figures."""
    system = load_warm(options).whole
    bodies = make_bodies(system.stats[0].cpu().numpy())
    largest = [torch.randn(260, system.stats.shape[1]) for _ in range(options.max_batch_size)]
    with running(options) as (port, ready_sec):
        ms, replies = time_requests(port, bodies, partial(recognise_batch, system, largest))
        with ThreadPoolExecutor(1) as pool:
            health = pool.submit(ask_all, port, "/health", [None] * 200, 0.02)
            while not health.done():
                ask_at_once(port, bodies["mixed"], 16, [])
    yield figure_row("figure", "measured", "asked")
    yield figure_row("start to ready beyond import torch", f"{ready_sec - import_sec():.2f} s", "<= 1 s")
    overhead = statistics.median(took - answer["timing"]["infer_ms"] for took, answer in replies["equal", 1])
    yield figure_row("overhead of a request, median (100 frames, JSON)", f"{overhead:.2f} ms", "<= 5 ms")
    for kind, asked in (("mixed", ">= 1.3 x"), ("equal", ">= 2.0 x")):
        one, many = (1000 * len(bodies[kind]) / statistics.median(ms[kind, clients]) for clients in (1, 16))
        yield figure_row(f"16 clients, {kind} lengths, {many:.1f} /s, one {one:.1f} /s", f"{many / one:.2f} x", asked)
    p99 = np.quantile([took for took, _ in replies["mixed", 16]], 0.99, method="higher")
    yield figure_row(f"p99 at 16 clients, mixed lengths, {p99:.1f} ms, against a full batch",
                     f"{p99 / statistics.median(ms['full batch']):.2f} x", "<= 3 x")
    slowest = max(took for took, _ in health.result())
    yield figure_row("/health meanwhile, most of 200", f"{slowest:.1f} ms", "<= 50 ms")


# ---- the command ----

def measure_decode(argv: Sequence[str]) -> None:
    python, rest = peer_python(argv)
    arguments = parse_arguments(rest)
    idle = ["output", "report", "plot", "export"]
    if not arguments.inputs:
        idle += ["ckpt", "device", "dtype", "limit", "min_segment_sec", "max_segment_sec", "batch_size",
                 "batch_seconds", *Search._fields]
    elif any(path.endswith(".pt") for path in arguments.inputs):
        idle += ["ckpt"]
    refuse(arguments, parse_arguments([]), idle, "wanted none, as it has no effect on what is measured")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.inputs:
        measure_loading(python)
    elif len(rest) < len(argv):
        raise ValueError("--peer-python: wanted no INPUT beside it, as others run no checkpoint")
    else:
        compare(arguments)


def measure_train(argv: Sequence[str]) -> None:
    if not argv:
        raise ValueError("wanted a config behind train, got nothing")
    for line in training_figures(rules.load(argv[0], argv[1:])):
        print(line, flush=True)


def measure_serve(argv: Sequence[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--checkpoint", *argv]
    for line in serving_figures(serve.parse_arguments(argv)):
        print(line, flush=True)


MEASURES = {"train": measure_train, "decode": measure_decode, "serve": measure_serve, "hotwords": measure_hotwords,
            "parts": measure_parts, "cuts": measure_cuts, "amounts": measure_amounts, "stream": measure_streams}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench.py", description="How fast this machine trains, recognises, serves.")
    parser.add_argument("what", choices=list(MEASURES), help="what to measure")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of train.py, decode.py or serve.py")
    arguments = parser.parse_args(argv)
    try:
        MEASURES[arguments.what](arguments.arguments)
        return 0
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
