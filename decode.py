"""Recognise speech: python decode.py [--ckpt CHECKPOINT] [INPUT ...].

    python decode.py                                the last run's checkpoint, on its toy data or its test manifest: ten
                                                    results and the figures, in a file or a pipe all of them
    python decode.py a.wav b.wav folder             recordings, and all recordings in a folder
    python decode.py --output out.jsonl dev.jsonl   a manifest or a Kaldi folder; its texts are the references
    python decode.py --format srt --output DIR -    standard input, a recording or a list; txt, json, vtt, tsv, ctm too
    torchrun --nproc_per_node=4 decode.py dev.jsonl shared by four processes, with the results of one
    python decode.py --plot pictures a.wav          also SVGs of each utterance: firing, encoder and cross-attention
    python decode.py --ckpt DIR a.wav               with a model directory as FunASR publishes it
    python decode.py --ckpt DIR --hotwords FILE a.wav    and phrases to listen for, one a line of the file
    python decode.py --ckpt CTC.pt --nbest 5 a.wav  search, which a Paraformer does not need (class Search)
    python decode.py --export DIR                   the model alone, as such a directory where FunASR knows the model

Results go to standard output and to --output, everything else to standard error. Exit code 0, 1 if an input could not
be recognised, 2 for bad arguments, 130 after Ctrl-C, which keeps what is done.
Reading order: recognition, long recordings, many inputs (serving needs no more); then pictures and the command.
Needs torch, numpy, audio.py, data.py, checkpoint.py, report.py and what these need.
"""
import argparse
import contextlib
import datetime
import itertools
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Set before torch is loaded: idle threads then spin for 10 us and sleep. By default they spin for so long that a
# busy neighbour delays every operator.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import audio
import data
from audio import Segment, frame_sec, frontend, segments
from baselines import Candidate, Search, check_search
from checkpoint import PRECISIONS, SEGMENT_SEC, System, export, load_system
from funasr import firing_spans
from hotwords import read_hotwords, unknown_warning, why_no_hotwords
from manifests import is_stream, left_out_lines, read_inputs
from model import Hypotheses
from pictures import write_explained
from ranks import join_processes
from ranks import own_rank
from report import (Alternative, FORMS, Outcome, Result, Score, Token, Word, file_names, is_ideograph, log_confidence,
                    report_lines, score, text_of, utterance_svgs, words_of, write_report)
from tokenizer import spoken_places

DEFAULT_CHECKPOINT = "runs/latest/checkpoints/best.pt"
POOL_SEC = 300.0  # of a long recording are cut before decoding, so that batches can hold segments of similar length


# ---- recognition ----

def token_times(system: System, found: Hypotheses, i: int, spoken: Sequence[int]) -> list[tuple[float, float]]:
    """Seconds at which the tokens at the places `spoken` of utterance i begin and end."""
    options = system.config.model
    frame_sec = audio.frame_sec(system.config.data)
    if not found.fine_alpha:
        edges = (found.boundaries[i] * frame_sec).tolist()
        return [(round(edges[u], 3), round(edges[u + 1], 3)) for u in spoken]
    weights = found.fine_alpha[i].float()
    weights = (weights * (found.lens[i] / weights.sum().clamp(min=1e-9))).numpy()
    rate = frame_sec * options.encoder.subsampling / options.predictor.upsampling  # seconds of a weight

    def whole_ms(place: float) -> float:  # cut as in FunASR, but not below 0
        return max(0, int(place * rate * 1000)) / 1000

    return [(whole_ms(a), whole_ms(b)) for a, b in firing_spans(weights, len(spoken))]


def words_apart(system: System) -> bool:
    """Whether a space stands between all words: with a timing head, FunASR writes ideographs apart too."""
    unit = system.tokenizer.unit
    return unit == "word" or unit == "piece" and system.config.model.predictor.upsampling > 0


def read_result(system: System, found: Hypotheses, i: int, candidates: Sequence[Candidate] = ()) -> Result:
    """Utterance i of a decoded batch in words and seconds, with alternatives where they are asked for."""
    ids = found.tokens[i, :found.lens[i]].tolist()
    spoken = spoken_places(ids)
    times = token_times(system, found, i, spoken)
    log_probs = found.log_probs[i, spoken].double()
    from_hotwords = found.hotword[i].tolist() if found.hotword else [False] * len(ids)
    tokens = [Token(system.tokenizer.symbols[ids[u]], ids[u], round(p, 4), start, end, from_hotwords[u])
              for u, p, (start, end) in zip(spoken, log_probs.exp().tolist(), times)]
    words = words_of(tokens, system.tokenizer, words_apart(system))
    confidence = round(log_probs.mean().exp().item(), 4) if spoken else 0.0
    nbest = read_alternatives(system, candidates) if system.search.nbest > 1 else ()
    return Result(text_of(tokens, words, system.tokenizer.unit), confidence, tokens, words, nbest)


def read_alternatives(system: System, candidates: Sequence[Candidate]) -> tuple[Alternative, ...]:
    """The search.nbest best candidates of an utterance that differ in text, which is spelled as that of a Result."""
    kept: dict[str, Alternative] = {}
    for ids, log_prob, score in candidates:
        said = [Token(system.tokenizer.symbols[ids[u]], ids[u], 1.0, 0.0, 0.0) for u in spoken_places(ids)]
        words = words_of(said, system.tokenizer, words_apart(system))
        text = text_of(said, words, system.tokenizer.unit)
        confidence = math.exp(log_prob / len(ids)) if ids else 0.0
        kept.setdefault(text, Alternative(text, round(score, 4), round(confidence, 4)))
    return tuple(kept.values())[:system.search.nbest]


def on_cpu(found: Hypotheses) -> Hypotheses:
    return Hypotheses(*(x.cpu() if isinstance(x, Tensor) else [part.cpu() for part in x] for x in found))


Hotwords = Sequence[tuple[str, ...] | None]  # what to listen for in each utterance of a batch; None: no list


def listening_model(system: System, hotwords: Hotwords) -> nn.Module:
    """The model, told the hotwords of a batch. Raises ValueError if it cannot be told any."""
    if all(phrases is None for phrases in hotwords):
        return system.model
    if system.encode_list is None:
        raise ValueError(f"hotwords: {why_no_hotwords(system.model)}")
    return system.model.with_hotwords([phrases if phrases is None else system.encode_list(phrases)
                                       for phrases in hotwords])


@torch.inference_mode()
def search_batch(system: System, feats: Sequence[Tensor],
                 hotwords: Hotwords | None = None) -> tuple[Hypotheses, list[list[Candidate]]]:
    """Normalised features (T,F) each, and the hotwords of each, by default system.hotwords for all -> on the CPU,
    Hypotheses, and the candidates of each; greedy search has none."""
    model = listening_model(system, hotwords or [system.hotwords] * len(feats))
    device = system.stats.device
    dtype = PRECISIONS[system.precision]
    lens = torch.tensor([len(x) for x in feats], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(list(feats), batch_first=True).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if system.search == Search():
            return on_cpu(model.greedy(padded, lens)), [[] for _ in feats]
        hidden, hidden_lens = model.encode(padded, lens)
    candidates = model.search(hidden, hidden_lens, system.search)  # without autocast, as in greedy behind the encoder
    best = [found[0].tokens for found in candidates]
    return on_cpu(model.decode(hidden, hidden_lens, lens, best)), candidates


def decode_batch(system: System, feats: Sequence[Tensor], hotwords: Hotwords | None = None) -> Hypotheses:
    """Normalised features (T,F) each, not all of T = 0, and hotwords as in search_batch -> Hypotheses, on the CPU;
    where T = 0 there are no tokens."""
    return search_batch(system, feats, hotwords)[0]


def clip_times(system: System, result: Result, seconds: float) -> Result:
    """The result with no time beyond the recording's end, which the last stacked frame may pass. Times of a timing head
    stay, as in FunASR."""
    if system.config.model.predictor.upsampling:
        return result

    def cut(items: Sequence[Token] | Sequence[Word]) -> list:
        return [x._replace(start=min(x.start, seconds), end=min(x.end, seconds)) for x in items]

    return result._replace(tokens=cut(result.tokens), words=cut(result.words))


def transcribe(system: System, feats: Sequence[Tensor]) -> list[Result]:
    """Normalised features (T,F) of some utterances, as `data.frontend` makes them -> a Result each, in one batch."""
    spoken = [i for i, x in enumerate(feats) if len(x)]
    results = [Result("", 0.0, [], [])] * len(feats)
    if spoken:
        found, candidates = search_batch(system, [feats[i] for i in spoken])
        for row, i in enumerate(spoken):
            results[i] = read_result(system, found, row, candidates[row])
    return results


# ---- long recordings ----

def batch_limits(system: System) -> tuple[int, int]:
    """Utterances and padded frames in a batch at most."""
    return system.batch_size, max(1, int(system.batch_seconds / frame_sec(system.config.data)))


def transcribe_segments(system: System, pieces: Iterable[Segment]) -> Iterator[tuple[float, Result]]:
    """Segments at the model's rate -> (start in seconds, Result with times from there) of each, in order.

    Memory does not grow with their number. Raises ValueError if features are not finite.
    """
    options, stats = system.config.data, system.stats.cpu()
    for _, group in itertools.groupby(pieces, lambda piece: piece.start_sec // POOL_SEC):
        pool = list(group)
        feats = [frontend(piece.samples, options.sample_rate, options, stats) for piece in pool]
        if not all(x.isfinite().all() for x in feats):
            raise ValueError("features not finite: are the samples of a float WAV far beyond 1?")
        results: dict[int, Result] = {}
        for indices in data.make_batches([len(x) for x in feats], *batch_limits(system), shuffle=False):
            results.update(zip(indices, transcribe(system, [feats[i] for i in indices])))
        for i, piece in enumerate(pool):
            yield piece.start_sec, clip_times(system, results[i], len(piece.samples) / options.sample_rate)


def is_spaced(system: System, before: Word, after: Word) -> bool:
    """Whether a space stands between the words on either side of a cut."""
    if system.tokenizer.unit == "char" and " " not in system.tokenizer.symbols:
        return False
    return words_apart(system) or not (is_ideograph(before.text[-1:]) or is_ideograph(after.text[:1]))


def shifted(items: Sequence[Token] | Sequence[Word], seconds: float) -> list:
    """Tokens or words, so many seconds later."""
    return [x._replace(start=round(x.start + seconds, 3), end=round(x.end + seconds, 3)) for x in items]


def join_results(system: System, parts: Iterable[tuple[float, Result]]) -> Result:
    """The Results of a recording's segments, each with its start in seconds -> the recording's, in its own times.

    If the space is a token of the characters' vocabulary, a cut between two words gets one.
    """
    tokens: list[Token] = []
    words: list[Word] = []
    log_sum = count = 0
    for start, result in parts:
        new_tokens = shifted(result.tokens, start)
        new_words = shifted(result.words, start)
        if words and new_words:
            spaced = is_spaced(system, words[-1], new_words[0])
            new_words[0] = new_words[0]._replace(spaced=spaced)
            if system.tokenizer.unit == "char" and spaced and " " not in (tokens[-1].token, new_tokens[0].token):
                space = system.tokenizer.symbols.index(" ")
                tokens.append(Token(" ", space, 1.0, tokens[-1].end, new_tokens[0].start))
        tokens += new_tokens
        words += new_words
        log_sum += len(new_tokens) * log_confidence(result)
        count += len(new_tokens)
    confidence = round(math.exp(log_sum / count), 4) if count else 0.0
    return Result(text_of(tokens, words, system.tokenizer.unit), confidence, tokens, words)


def transcribe_recording(system: System, source: audio.Source) -> Result:
    """A recording of any length -> its Result; what is longer than system.segment_sec[1] is cut at pauses by
    `audio.segments`, and there is no n-best of it.

    Memory does not grow with its length, but for the Result. Raises ValueError (place, wanted, got) or OSError.
    """
    pieces = segments(source, system.config.data, *system.segment_sec)
    return join_results(system, transcribe_segments(system, pieces))


# ---- many inputs ----

def recognise_inputs(system: System, dataset: Dataset, indices: Sequence[int]) -> list[Outcome]:
    """The inputs at `indices`, in one batch; if the model fails on that, each alone, so that only the bad one fails."""
    items = [dataset[i] for i in indices]
    usable = [item for item in items if isinstance(item, data.Utterance)]
    try:
        results = iter(transcribe(system, [item.feats for item in usable]))
    except (RuntimeError, ValueError) as error:
        if len(indices) == 1:
            return [Outcome(indices[0], items[0].key, reason=f"the model failed: {error}")]
        outcomes = []
        for i in indices:
            outcomes += recognise_inputs(system, dataset, [i])
        return outcomes
    outcomes = []
    for i, item in zip(indices, items):
        if isinstance(item, data.Skip):
            outcomes.append(Outcome(i, item.key, reason=item.reason))
        else:
            outcomes.append(outcome_of(system, dataset, i, item, next(results)))
    return outcomes


def outcome_of(system: System, dataset: Dataset, index: int, item: data.Utterance, result: Result) -> Outcome:
    """The Outcome of an item and its result. A recording too long to be read whole has no features: it is cut here."""
    if item.seconds > system.segment_sec[1] and not len(item.feats):
        try:
            result = transcribe_recording(system, data.part_of(dataset.rows[index]))
        except (RuntimeError, ValueError, OSError) as error:
            return Outcome(index, item.key, reason=f"unreadable: {error}")
    return Outcome(index, item.key, item.seconds, item.text.strip(), clip_times(system, result, item.seconds))


WINDOW = 1024  # inputs that are sorted by length together; their results go out before the next are begun


def plan_batches(lengths: np.ndarray, batch_size: int, batch_frames: int) -> Iterator[list[list[int]]]:
    """The batches of each window of inputs of `lengths` frames, as lists of their places."""
    for first in range(0, len(lengths), WINDOW):
        batches = data.make_batches(lengths[first:first + WINDOW], batch_size, batch_frames, shuffle=False)
        yield [[first + i for i in batch] for batch in batches]


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C (KeyboardInterrupt) is held back until the block ends; a second one comes at once."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:
        yield
        return
    pressed = False

    def remember(*about) -> None:
        nonlocal pressed
        if pressed:
            usual(*about)
        pressed = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt


def recognise_all(system: System, dataset: Dataset, windows: Iterator[list[list[int]]], shard: tuple[int, int],
                  finish: Callable[[list[Outcome]], None]) -> Iterator[Outcome]:
    """Outcomes in the order of the inputs, a window of `plan_batches` at a time; `finish` gets each batch's at once.

    shard = (rank, processes): each process does its share of every window, and rank 0 yields the outcomes of all.
    After Ctrl-C the outcomes that are done are yielded first, then KeyboardInterrupt is raised.
    """
    rank, processes = shard
    for batches in windows:
        outcomes: list[Outcome] = []
        try:
            for batch in batches[rank::processes]:
                done = recognise_inputs(system, dataset, batch)
                outcomes += done
                finish(done)
            if processes > 1:
                outcomes = gather(outcomes, shard)
        except KeyboardInterrupt:
            if rank == 0:
                yield from sorted(outcomes)
            raise
        with interrupted_later():
            yield from sorted(outcomes)


def gather(outcomes: list[Outcome], shard: tuple[int, int]) -> list[Outcome]:
    """Those of all processes in rank 0, none in the others."""
    rank, processes = shard
    parts = [None] * processes if rank == 0 else None
    torch.distributed.gather_object(outcomes, parts)
    return list(itertools.chain(*parts)) if rank == 0 else []


# ---- pictures ----

def drawable(dataset: Dataset, index: int) -> data.Utterance | None:
    """The utterance, if it has frames: a recording that is decoded in segments comes without."""
    item = dataset[index]
    return item if isinstance(item, data.Utterance) and len(item.feats) else None


def alignment_picture(system: System, dataset: Dataset, index: int) -> str:
    """The alignment of an utterance as SVG, "" where it is not drawable."""
    item = drawable(dataset, index)
    return draw(system, item)["alignment"] if item else ""


@torch.inference_mode()
def draw(system: System, item: data.Utterance, layer: int | None = None) -> dict[str, str]:
    """The `utterance_svgs` of an utterance that has frames, decoded alone; with a layer, also of its attention."""
    found = decode_batch(system, [item.feats])
    result = read_result(system, found, 0)
    tokens = [(token.token, token.start, token.end) for token in result.tokens]
    encoder_layers = cross_layers = ()
    if layer is not None:
        model, device = system.model, system.stats.device
        feats = item.feats[None].to(device)
        lens = torch.tensor([len(item.feats)], device=device)
        encoder_layers = model.encoder(feats, lens, need_weights=True)[2]
        model = listening_model(system, [system.hotwords])
        cross_layers = model.cross_attention(*model.encode(feats, lens), found.tokens.to(device), found.lens.to(device))
    title = f"{item.key}: {result.text}"
    return utterance_svgs(title, item, found, tokens, system.config, encoder_layers, cross_layers, layer or 0)


def write_pictures(folder: Path, system: System, dataset: Dataset, named: Sequence[tuple[int, str]],
                   layer: int) -> None:
    """name.alignment.svg, name.encoder.svg and, of a decoder with layers, name.cross.svg of each utterance (its place,
    name). One that was cut into segments or has no frames has none; their number goes to standard error."""
    without = 0
    for index, name in named:
        item = drawable(dataset, index)
        if item is None:
            without += 1
            continue
        for kind, svg in draw(system, item, layer).items():
            data.write_atomic(folder / f"{name}.{kind}.svg", svg)
    if without:
        print(f"decode.py: --plot: no picture of {without} that --max-segment-sec cut or that have no frames",
              file=sys.stderr)


# ---- main ----

def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recognise speech.", epilog="Without INPUT: the checkpoint's own toy "
                                     "data, or the test (else dev) manifest of its config.")
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="recordings, folders (Kaldi's, or all recordings in them), "
        "manifests (.jsonl), or - for standard input: a recording, or lines, each an INPUT or a line of a manifest")
    add("--ckpt", "--checkpoint", default=DEFAULT_CHECKPOINT,
        help=f"a checkpoint, or a model directory of FunASR (default: {DEFAULT_CHECKPOINT})")
    add("--export", metavar="PATH", help="write the model alone and recognise nothing without INPUT: FILE.pt as a "
        "checkpoint, any other path as a directory, FunASR's if it knows the model")
    add("--hotwords", metavar="FILE|TEXT", help="phrases to listen for, in a model that can be told them: a file "
        "(UTF-8) with one a line, # before a remark, or words with spaces between them")
    add("--allow-pipes", action="store_true", help="run the commands that a Kaldi folder's wav.scp has in place of "
        "paths (`sox ... |`), in that folder")
    add("--output", metavar="PATH", help="write into a folder, a file for each utterance when it is done (ctm: "
        "results.ctm for all), or, where PATH ends in .jsonl, a line of JSON for each")
    add("--format", choices=list(FORMS), help="of the files in --output (default json)")
    add("--report", metavar="DIR", help="write the error report of the inputs that have a reference: summary.txt, "
        "alignments.txt and report.html")
    add("--plot", metavar="DIR", help="write pictures of each utterance (with --limit, of so many)")
    add("--explain", action="store_true", help="draw each utterance's way through the model, NAME.explain.svg, in the "
        "folder of --plot or here")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", "--precision", default="float32", choices=list(PRECISIONS),
        help="of matrix products; int8: weights in a quarter of the memory, on a CPU (default float32)")

    def number(name: str, default: float, meaning: str) -> None:
        add(name, type=type(default), default=default, help=f"{meaning} (default {default:g})")

    number("--limit", 0, "only the first so many utterances; 0: all")
    number("--threads", 0, "of torch; 0: its own choice")
    number("--plot-layer", 0, "attention layer of the pictures, 1: first; 0, and where there are fewer: last")
    number("--batch-size", 16, "utterances, or segments of a long recording, in a batch")
    number("--batch-seconds", 300.0, "audio in a batch, padding included; one that is longer goes alone")
    number("--min-segment-sec", SEGMENT_SEC[0], "shortest segment of a long recording")
    number("--max-segment-sec", SEGMENT_SEC[1], "longest one; a longer recording is cut at its pauses")
    number("--beam", Search().beam, "hypotheses that a transformer or a CTC model keeps at a time; 1: greedy")
    number("--nbest", Search().nbest, "alternatives of each utterance that they give")
    number("--length-penalty", Search().length_penalty, "of a transformer's beam: 0 favours short texts")
    number("--coverage-penalty", Search().coverage_penalty, "of a transformer's beam: for frames little attended")
    arguments = parser.parse_args(argv)
    arguments.search = Search(*(getattr(arguments, field) for field in Search._fields))
    for name, least in (("limit", 0), ("batch_size", 1), ("threads", 0), ("plot_layer", 0), ("batch_seconds", 1e-3)):
        if not least <= getattr(arguments, name) < 1e9:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, below 1e9, got "
                         f"{getattr(arguments, name)}")
    check_together(parser, arguments)
    return arguments


def check_together(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What options ask of each other; ends the program where they do not go together."""
    if not 0.2 <= 2 * arguments.min_segment_sec <= arguments.max_segment_sec < math.inf:
        parser.error("--min-segment-sec must be at least 0.1 and at most half of --max-segment-sec, got "
                     f"{arguments.min_segment_sec:g} and {arguments.max_segment_sec:g}")
    if arguments.format and not arguments.output:
        parser.error("--format needs --output")
    if arguments.format not in (None, "json") and Path(arguments.output).suffix == ".jsonl":
        parser.error("--output FILE.jsonl is for --format json")
    if arguments.plot_layer and not arguments.plot:
        parser.error("--plot-layer needs --plot")
    if arguments.export and arguments.dtype == "int8":
        parser.error("--export writes the weights as they are; leave out --dtype")
    if arguments.export and not arguments.inputs:
        for name in ("hotwords", "output", "report", "plot", "batch_size", "batch_seconds", "limit", "min_segment_sec",
                     "max_segment_sec", *Search._fields):
            if getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--export recognises nothing without INPUT; leave out --{name.replace('_', '-')}")


def with_search(system: System, search: Search) -> System:
    """The system with this search. Raises as `check_search`."""
    check_search(search, system.model, system.config.model.name)
    return system._replace(search=search)


def greedy_system(arguments: argparse.Namespace, path: str) -> System:
    """The system at path, as the arguments ask for it but for the search."""
    system = load_system(path, arguments.device, arguments.dtype)
    return system._replace(batch_size=arguments.batch_size, batch_seconds=arguments.batch_seconds,
                           segment_sec=(arguments.min_segment_sec, arguments.max_segment_sec))


def with_hotwords(system: System, given: str) -> System:
    """The system that listens for the phrases of a file, or for the words of a text, in every utterance; on standard
    error, what is left out and what the vocabulary cannot spell. Raises ValueError."""
    if system.encode_list is None:
        raise ValueError(f"--hotwords: {why_no_hotwords(system.model)}")
    phrases, weighted = read_hotwords(given)
    warning = unknown_warning(phrases, system.tokenizer)
    if weighted and own_rank() == 0:
        print(f"{given}: the numbers at the ends of the lines are taken for weights and ignored", file=sys.stderr)
    if warning and own_rank() == 0:
        print(f"warning: --hotwords: {warning}", file=sys.stderr)
    return system._replace(hotwords=tuple(phrases))


def open_inputs(system: System, inputs: Sequence[str], scratch: Path, allow_pipes: bool = False) -> Dataset:
    """A dataset of the inputs, or of the checkpoint's own toy data or test manifest where there are none.

    scratch: a folder for copies of standard input and pipes; allow_pipes: run those of a wav.scp.
    """
    options, stats = system.config.data, system.stats.cpu()
    if options.kind == "toy" and not inputs:
        return data.open_dataset(options, "test", system.tokenizer.encode, system.config.training.seed, stats)
    if not (inputs or options.test or options.dev):
        raise ValueError("wanted INPUT: the checkpoint names no test or dev manifest")
    rows, left_out = read_inputs(inputs, scratch, allow_pipes)
    if own_rank() == 0:
        for line in left_out_lines(left_out):
            print(f"decode.py: {line}", file=sys.stderr)
    return data.ManifestDataset(rows if inputs else options.test or options.dev, options, system.tokenizer.encode,
                                stats=stats, for_training=False, whole_sec=system.segment_sec[1])


class Output(NamedTuple):
    """Where results go: standard output and, at most one of the two, a folder or a file."""

    form: str  # a key of FORMS
    folder: Path | None  # a file for each utterance
    merged: Path | None  # one file for all, which rank 0 writes
    brief: bool  # of its own data a terminal gets the first SHOWN, with references


def prepare_output(arguments: argparse.Namespace, rank: int) -> Output:
    """Make the folders. Raises ValueError for a file that must not be replaced."""
    form = arguments.format or "json"
    folder = Path(arguments.output) if arguments.output else None
    merged = None
    if form == "ctm":
        merged = folder / "results.ctm"
    elif folder and folder.suffix == ".jsonl":
        merged = folder
    if merged:
        folder = None
        if merged.is_dir():
            raise ValueError(f"--output: wanted a file to write or replace, got the folder {merged}")
        if merged.exists() and any(merged.samefile(path) for path in arguments.inputs if os.path.exists(path)):
            raise ValueError(f"--output: wanted another file than the inputs, got {merged}")
        merged.parent.mkdir(parents=True, exist_ok=True)
    for place in (folder, arguments.plot, arguments.report):
        if place:
            Path(place).mkdir(parents=True, exist_ok=True)
    brief = not arguments.inputs and sys.stdout is not None and sys.stdout.isatty()
    return Output(form, folder, merged if rank == 0 else None, brief)


ERASE = "\r\x1b[K"  # a terminal's line
SHOWN = 10  # results that a terminal gets where no INPUT is named


class ProgressBar:
    """On a terminal, the inputs done and the time spent on a second of audio, as if the other processes had done as
    many as rank 0."""

    def __init__(self, total: int, shard: tuple[int, int]):
        self.total = total
        self.shard = shard
        self.started = time.perf_counter()
        self.done = 0
        self.seconds = 0.0  # of audio

    def add(self, outcomes: Sequence[Outcome]) -> None:
        rank, processes = self.shard
        self.done = min(self.total, self.done + processes * len(outcomes))
        self.seconds += processes * sum(outcome.seconds for outcome in outcomes)
        if rank == 0 and sys.stderr.isatty():
            factor = (time.perf_counter() - self.started) / max(self.seconds, 1e-9)
            print(f"{ERASE}[{'#' * (30 * self.done // self.total):30}] {self.done}/{self.total}  "
                  f"real-time factor {factor:.4f}", end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        if sys.stderr.isatty():
            print(ERASE, end="", file=sys.stderr)


class Tally(NamedTuple):
    """What became of all inputs."""

    heard: list[tuple[int, float]]  # (place, seconds) of each that was recognised
    failed: int
    scores: list[Score]  # of those that have a reference
    interrupted: bool  # by Ctrl-C


def write_results(outcomes: Iterator[Outcome], output: Output, encode: Callable[[str], list[int]],
                  bar: ProgressBar) -> Tally:
    """Print each outcome, write it into the file for all, compare it with its reference."""
    heard: list[tuple[int, float]] = []
    scores: list[Score] = []
    failed = 0
    interrupted = False
    merged = data.replacing(output.merged) if output.merged else contextlib.nullcontext(os.devnull)
    with merged as path, open(path, "w", encoding="utf-8", newline="\n") as file:
        try:
            for outcome in outcomes:
                bar.erase()
                if outcome.result is None:
                    failed += 1
                    print(f"decode.py: {outcome.key}: {' '.join(outcome.reason.split())}", file=sys.stderr)
                    continue
                if not output.brief:
                    print(f"{outcome.key}\t{outcome.result.text}")
                elif len(heard) < SHOWN:
                    print(f"{outcome.key}\n  reference   {outcome.reference}\n  recognised  {outcome.result.text}")
                heard.append((outcome.index, outcome.seconds))
                if output.merged:
                    file.write(FORMS[output.form](outcome))
                if outcome.reference:
                    scores.append(score(outcome, encode))
        except KeyboardInterrupt:
            interrupted = True
    if output.brief and len(heard) > SHOWN:
        print(f"and {len(heard) - SHOWN} more, which a file or a pipe gets: python decode.py > results.tsv")
    return Tally(heard, failed, scores, interrupted)


def run(arguments: argparse.Namespace, system: System, dataset: Dataset, shard: tuple[int, int]) -> int:
    """Recognise everything, print in the order of the inputs, report -> exit code."""
    started = time.perf_counter()
    output = prepare_output(arguments, shard[0])
    lengths = dataset.lengths()[:arguments.limit or None]
    names = file_names(dataset.keys[:len(lengths)]) if output.folder or arguments.plot or arguments.explain else []
    bar = ProgressBar(len(lengths), shard)

    def finish(outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if output.folder and outcome.result:
                file = output.folder / f"{names[outcome.index]}.{output.form}"
                data.write_atomic(file, FORMS[output.form](outcome))
        bar.add(outcomes)

    windows = plan_batches(lengths, *batch_limits(system))
    outcomes = recognise_all(system, dataset, windows, shard, finish)
    tally = write_results(outcomes, output, system.tokenizer.encode, bar)
    if shard[0] == 0:
        spent = time.perf_counter() - started
        if arguments.plot:
            named = [(i, names[i]) for i, _ in tally.heard]
            write_pictures(Path(arguments.plot), system, dataset, named, arguments.plot_layer)
        if arguments.explain:
            model = listening_model(system, [system.hotwords])
            items = ((names[i], drawable(dataset, i)) for i, _ in tally.heard)
            write_explained(Path(arguments.plot or "."), model, system, (named for named in items if named[1]))
        report_figures(arguments.report, system, dataset, tally, spent)
    if tally.interrupted:
        return 130
    return 1 if tally.failed else 0


def report_figures(folder: str | None, system: System, dataset: Dataset, tally: Tally, spent: float) -> None:
    """Print the error rates, if there are references, and the speed; write the report into a folder."""
    lines = report_lines(tally.scores) if tally.scores else []
    if folder:
        write_report(Path(folder), tally.scores, lines, lambda index: alignment_picture(system, dataset, index))
    seconds = sum(seconds for _, seconds in tally.heard)
    print(*lines, f"{len(tally.heard)} utterances, {seconds:.1f} s of audio in {spent:.2f} s, real-time factor "
          f"{spent / max(seconds, 1e-9):.4f}; {tally.failed} could not be recognised", sep="\n", file=sys.stderr)


def load_and_run(arguments: argparse.Namespace) -> int:
    """Load, export if that is asked for, recognise -> exit code."""
    shard = join_processes(timeout=datetime.timedelta(days=1))  # one may have much more to do than another
    rank, processes = shard
    streams = [name for name in arguments.inputs if is_stream(name)]
    if processes > 1 and streams:
        raise ValueError(f"{streams[0]}: {processes} processes cannot share standard input or a pipe")
    system = with_search(greedy_system(arguments, arguments.ckpt), arguments.search)
    if arguments.export:
        if rank == 0:
            print(f"decode.py: wrote {export(system, arguments.export)}", file=sys.stderr)
        if not arguments.inputs:
            return 0
    if arguments.hotwords is not None:
        system = with_hotwords(system, arguments.hotwords)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_inputs(system, arguments.inputs, Path(scratch), arguments.allow_pipes)
        return run(arguments, system, dataset, shard)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        return load_and_run(arguments)
    except (ValueError, OSError) as error:
        print(f"decode.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
