"""What it costs to cut and to punctuate long recordings: `python bench.py parts` and `python bench.py cuts`; and what
the benches share: calls timed in turns, random models of the published sizes.
"""
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rules
from audio import feature_dim, frontend, save_wav, stream
from checkpoint import System, build
from config import Config, EncoderConfig
from decode import cut_recording, greedy_system, join_results, transcribe, transcribe_segments, with_parts
from decode_options import parse_arguments
from manifests import Row, read_inputs
from pieces import PieceTokenizer
from punctuation import Punctuation, PunctuationModel, punctuate
from tokenizer import word_errors
from vad import FrontEnd, Fsmn, Network, Options, Vad, segments_of


# ---- what the benches share ----

def time_turns(turns: int, calls: dict[object, Callable[[], object]]) -> dict[object, list[float]]:
    """Milliseconds that each of the named calls took in each turn, after a turn that is not counted."""
    ms: dict[object, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn > 0:
                ms[name].append(1000 * (time.perf_counter() - started))
    return ms


def noise(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) / 50


def large_config() -> Config:
    return rules.load(str(Path(__file__).resolve().parent / "configs/paraformer_large.yaml"))


def large_system(config: Config) -> System:
    """One with random weights and 8404 symbols, for features of configs/paraformer_large.yaml."""
    symbols = ("<blank>", "<s>", "</s>", *(chr(0x4e00 + i) for i in range(8400)), "<unk>")
    torch.manual_seed(0)
    model = build(config.model, feature_dim(config.data), len(symbols))
    stats = torch.tensor([[0.0], [0.25]]).repeat(1, feature_dim(config.data))  # as of log energies of deviation 4
    return System(config, PieceTokenizer(symbols, {symbol: [symbol] for symbol in symbols[3:-1]}), stats, model)


# ---- an hour of speech, a long text ----

def best_of(turns: int, call: Callable[[], object]) -> tuple[float, float]:
    """Least seconds of the clock, mean seconds of a processor."""
    started = time.process_time()
    ms = time_turns(turns, {"call": call})["call"]
    return min(ms) / 1000, (time.process_time() - started) / (turns + 1)


def measure_parts(arguments: Sequence[str], seconds: int = 3600, characters: int = 10000, turns: int = 2) -> None:
    """Print what models of the published sizes cost, with random weights, on 2 threads; the busy time of both threads
    says what a machine costs that does other things too."""
    if arguments:
        raise ValueError(f"parts: wanted no more arguments, got {' '.join(arguments)}")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    stats = torch.stack([torch.zeros(400), torch.ones(400) / 10])
    listener = Vad(FrontEnd(), Options(), Fsmn(Network()).eval(), stats)
    minute = torch.randn(60 * 16000) / 10
    clock, busy = best_of(turns, lambda: list(segments_of(listener, itertools.repeat(minute, seconds // 60))))
    print(f"VAD: {seconds} s of audio in {clock:.2f} s, {100 * clock / seconds:.3f}% of real time; "
          f"busy for {busy:.2f} s", flush=True)
    shape = EncoderConfig("sanm", num_layers=4, hidden_dim=256, num_heads=8, ffn_dim=1024, kernel_size=11)
    marks = ("<unk>", "_", "，", "。", "？", "、")
    alphabet = [chr(0x4E00 + i) for i in range(3000)]
    ids = {token: i for i, token in enumerate(["<unk>", *alphabet])}
    writer = Punctuation(PunctuationModel(272727, len(marks), shape).eval(), ids, marks, 3)
    text = "".join(np.random.default_rng(0).choice(alphabet, characters))
    clock, busy = best_of(turns, lambda: punctuate(writer, text))
    print(f"punctuation: {characters} characters in {clock:.2f} s; busy for {busy:.2f} s")


# ---- cutting a long recording ----

NOISES_DB = (-60, -45, -30)
OFFSET = 0.1  # of full scale
PAUSE_SEC = 0.5, 1.5  # between joined utterances
EDGE_SEC = 0.05  # at the edges of an utterance, where a cut hurts nobody


def measure_cuts(argv: Sequence[str]) -> None:
    """Print how many cuts fall into utterances that are joined, and the word error rates of each alone and of all."""
    arguments = parse_arguments(argv)
    if not arguments.inputs:
        raise ValueError("cuts: wanted a manifest behind the options, got nothing")
    system = with_parts(arguments, greedy_system(arguments, arguments.ckpt))
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for row in read_inputs(arguments.inputs, Path(scratch))[0] if row.text][:arguments.limit or 100]
        path = Path(scratch) / "joined.wav"
        print(f"silent pauses: {cut_joined(system, rows, path)}", flush=True)
        for noise_db in NOISES_DB:
            print(f"noise at {noise_db} dBFS: {cut_joined(system, rows, path, noise_db)}", flush=True)
        print(f"an offset of {OFFSET}: {cut_joined(system, rows, path, offset=OFFSET)}", flush=True)


def cut_joined(system: System, rows: Sequence[Row], path: Path, noise_db: float | None = None,
               offset: float = 0.0) -> str:
    """The figures of one condition; path: of the joined recording."""
    rate_hz = system.config.data.sample_rate
    rng = np.random.default_rng(0)
    joined: list[Tensor] = []
    spans: list[tuple[float, float]] = []  # seconds of each utterance in the joined recording
    alone = count = size = 0
    for row in rows:
        said = torch.cat(list(stream(row.audio, rate_hz)))
        rest = torch.zeros(int(rng.uniform(*PAUSE_SEC) * rate_hz))
        both = torch.cat([said, rest]) + offset
        if noise_db is not None:
            both += torch.from_numpy(rng.standard_normal(len(both)).astype(np.float32)) * 10 ** (noise_db / 20)
        joined.append(both)
        spans.append((size / rate_hz + EDGE_SEC, (size + len(said)) / rate_hz - EDGE_SEC))
        size += len(both)
        feats = frontend(both[:len(said)], rate_hz, system.config.data, system.stats.cpu())
        alone += word_errors(row.text, transcribe(system, [feats])[0].text).errors
        count += len(row.text.split())
    save_wav(path, torch.cat(joined).clamp(-1, 1), rate_hz)
    starts = [piece.start_sec for piece in cut_recording(system, str(path))][1:]
    inside = 0
    for begin, end in spans:
        inside += len([start for start in starts if begin < start < end])
    result = join_results(system, transcribe_segments(system, cut_recording(system, str(path))))
    together = word_errors(" ".join(row.text for row in rows), result.text).errors
    return (f"{len(starts)} cuts, {inside} inside one of {len(rows)} utterances; WER alone "
            f"{100 * alone / count:.2f}%, joined {100 * together / count:.2f}% of {count} words")
