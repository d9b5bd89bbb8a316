"""Recognise speech: python decode.py [--ckpt CHECKPOINT] [INPUT ...].

    python decode.py                                the last run's checkpoint, on its toy data or its test manifest
    python decode.py a.wav folder dev.jsonl         recordings, folders, manifests, whose texts are the references
    python decode.py --output out.jsonl dev.jsonl   into a file; README has more commands, decode_options.py all options

Results go to standard output and to --output, everything else to standard error. Exit code 0, 1 if an input could not
be recognised, 2 for bad arguments, 130 after Ctrl-C, 143 after SIGTERM.
Reading order: recognition, long recordings, many inputs (serving needs no more); then pictures and the command.
"""
import argparse
import datetime
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from commandline import refuse, spin_briefly

if __name__ == "__main__":
    spin_briefly()  # before torch is loaded

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import audio
import data
from audio import frame_sec, frontend
from baselines import Candidate, Search, check_search
from checkpoint import (PRECISIONS, System, check_not_streaming, export, export_int8, lay_out_products, load_system)
from decode_options import DEFAULT_CHECKPOINT, parse_arguments
from funasr import firing_spans
from hotwords import read_hotwords, unknown_warning, why_no_hotwords
from listen import asked_chunk, hear_stream, show_streams, stream_result
from manifests import Row, find_again, is_stream, left_out_lines, read_inputs
from model import Hypotheses
from outputs import (end_output, file_names, prepare_output, print_results, report_figures, show_progress, what_is_done,
                     write_file, write_outcomes)
from pauses import Segment, cut_at_pauses
from pictures import explain
from punctuation import load_punctuation
from ranks import join_processes, own_rank, sum_over_ranks
from report import (Alternative, Outcome, Result, Token, Word, is_ideograph, log_confidence, text_of, utterance_svgs,
                    words_of)
from sentences import with_sentences
from survival import end_as_ctrl_c, exit_code, interrupted_later, keep_streams
from tokenizer import spoken_places
from vad import cut_speech, load_vad

POOL_SEC = 300.0  # of a long recording are cut before decoding, so that batches can hold segments of similar length


def say(line: str) -> None:
    """On standard error, by one of all processes."""
    if own_rank() == 0:
        print(line, file=sys.stderr)


# ---- recognition ----

def token_times(system: System, found: Hypotheses, i: int, spoken: Sequence[int]) -> list[tuple[float, float]]:
    """Seconds at which the tokens at the places `spoken` of utterance i begin and end."""
    options = system.config.model
    hop_sec = frame_sec(system.config.data)
    if not found.fine_alpha:
        edges = (found.boundaries[i] * hop_sec).tolist()
        return [(round(edges[u], 3), round(edges[u + 1], 3)) for u in spoken]
    weights = found.fine_alpha[i].float()
    weights = (weights * (found.lens[i] / weights.sum().clamp(min=1e-9))).numpy()
    rate = hop_sec * options.encoder.subsampling / options.predictor.upsampling  # seconds of a weight

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
    moved = []
    for x in found:
        moved.append(x.cpu() if isinstance(x, Tensor) else [part.cpu() for part in x])
    return Hypotheses(*moved)


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
    check_not_streaming(system.config, "decode.py")
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
    """Normalised features (T,F) of some utterances, as `audio.frontend` makes them -> a Result each, in one batch."""
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
    """Segments at the model's rate -> (start in seconds, Result with times from there) of each, in order. Memory does
    not grow with their number. Raises ValueError if features are not finite."""
    options = system.config.data
    stats = system.stats.cpu()
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


def is_spaced(system: System, before: str, after: str) -> bool:
    """Whether a space stands between the texts on either side of a cut."""
    if system.tokenizer.unit == "char" and " " not in system.tokenizer.symbols:
        return False
    return words_apart(system) or not (is_ideograph(before[-1:]) or is_ideograph(after[:1]))


def shifted(items: Sequence[Token] | Sequence[Word], seconds: float) -> list:
    """Tokens or words, so many seconds later."""
    return [x._replace(start=round(x.start + seconds, 3), end=round(x.end + seconds, 3)) for x in items]


def join_results(system: System, parts: Iterable[tuple[float, Result]]) -> Result:
    """The Results of a recording's segments, each with its start in seconds -> the recording's, in its own times. If
    the space is a token of the characters' vocabulary, a cut between two words gets one."""
    tokens: list[Token] = []
    words: list[Word] = []
    log_sum = count = 0
    for start, result in parts:
        new_tokens = shifted(result.tokens, start)
        new_words = shifted(result.words, start)
        if words and new_words:
            spaced = is_spaced(system, words[-1].text, new_words[0].text)
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


def cut_recording(system: System, source: audio.Source) -> Iterator[Segment]:
    """A recording of any length where system.vad hears speech; without one, what is longer than system.segment_sec[1]
    is cut at pauses. Raises as audio.load_wav."""
    rate_hz = system.config.data.sample_rate
    if system.vad:
        return cut_speech(system.vad, source, rate_hz)
    return cut_at_pauses(audio.stream(source, rate_hz), rate_hz, *system.segment_sec)


def transcribe_recording(system: System, source: audio.Source) -> Result:
    """A recording of any length -> its Result; there is no n-best of what `cut_recording` cuts. A streaming model hears
    it chunk by chunk. Memory does not grow with its length, but for the Result. Raises ValueError (place, wanted, got)
    or OSError."""
    if system.chunk is not None:
        tokens: list[Token] = []
        for heard in hear_stream(system, audio.stream(source, system.config.data.sample_rate)):
            tokens += heard.tokens
        return stream_result(system, tokens)
    return join_results(system, transcribe_segments(system, cut_recording(system, source)))


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
        return list(itertools.chain(*(recognise_inputs(system, dataset, [i]) for i in indices)))
    outcomes = []
    for i, item in zip(indices, items):
        if isinstance(item, data.Skip):
            outcomes.append(Outcome(i, item.key, reason=item.reason))
        else:
            outcomes.append(outcome_of(system, dataset, i, item, next(results)))
    return outcomes


def whole_sec(system: System) -> float:
    """Recordings up to this length are read whole; a VAD cuts all of them, a streaming model hears them in chunks."""
    return 0.0 if system.vad or system.chunk else system.segment_sec[1]


def outcome_of(system: System, dataset: Dataset, index: int, item: data.Utterance, result: Result) -> Outcome:
    """The Outcome of an item and its result. A recording too long to be read whole has no features: it is cut here."""
    if item.seconds > whole_sec(system) and not len(item.feats):
        try:
            result = transcribe_recording(system, data.part_of(dataset.rows[index]))
        except (RuntimeError, ValueError, OSError) as error:
            return Outcome(index, item.key, reason=f"unreadable: {error}")
    result = with_sentences(system.punctuation, clip_times(system, result, item.seconds))
    return Outcome(index, item.key, item.seconds, item.text.strip(), result)


WINDOW = 1024  # inputs that are sorted by length together; their results go out before the next are begun


def plan_batches(todo: Sequence[int], lengths: np.ndarray, system: System) -> Iterator[list[list[int]]]:
    """The batches of each window of the inputs `todo`, as lists of their places; lengths: frames of all inputs."""
    for first in range(0, len(todo), WINDOW):
        window = np.array(todo[first:first + WINDOW])
        batches = data.make_batches(lengths[window], *batch_limits(system), shuffle=False)
        yield [window[batch].tolist() for batch in batches]


def recognise_all(system: System, dataset: Dataset, windows: Iterator[list[list[int]]], shard: tuple[int, int],
                  finish: Callable[[list[Outcome]], None]) -> Iterator[Outcome]:
    """Outcomes in the order of the inputs, a window of `plan_batches` at a time; `finish` gets each batch's at once.
    shard = (rank, processes): each process does its share of every window, and rank 0 yields the outcomes of all. After
    Ctrl-C the outcomes that are done are yielded first, then KeyboardInterrupt is raised."""
    rank, processes = shard
    for batches in windows:
        outcomes: list[Outcome] = []
        try:
            for batch in batches[rank::processes]:
                done = recognise_inputs(system, dataset, batch)
                with interrupted_later():
                    outcomes += done
                    finish(done)
            if processes > 1:
                found = sum_over_ranks({"all": outcomes})["all"]
                outcomes = found if rank == 0 else []
        except KeyboardInterrupt:
            if rank == 0:
                yield from sorted(outcomes)
            raise
        with interrupted_later():
            yield from sorted(outcomes)


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
        device = system.stats.device
        feats = item.feats[None].to(device)
        lens = torch.tensor([len(item.feats)], device=device)
        encoder_layers = system.model.encoder(feats, lens, need_weights=True)[2]
        model = listening_model(system, [system.hotwords])
        cross_layers = model.cross_attention(*model.encode(feats, lens), found.tokens.to(device), found.lens.to(device))
    title = f"{item.key}: {result.text}"
    return utterance_svgs(title, item, found, tokens, system.config, encoder_layers, cross_layers, layer or 0)


def draw_all(arguments: argparse.Namespace, system: System, dataset: Dataset, named: Sequence[tuple[int, str]]) -> None:
    """Of each utterance (its place, name): for --plot, name.alignment.svg, name.encoder.svg and, of a decoder with
    layers, name.cross.svg; for --explain, name.explain.svg. One that was cut into segments or has no frames has none;
    their number goes to standard error."""
    folder = Path(arguments.plot or ".")
    model = listening_model(system, [system.hotwords])
    without = 0
    for index, name in named:
        item = drawable(dataset, index)
        if item is None:
            without += 1
            continue
        svgs = draw(system, item, arguments.plot_layer) if arguments.plot else {}
        if arguments.explain:
            svgs["explain"] = explain(model, system.config, system.tokenizer.symbols, item, system.stats.device)
        for kind, svg in svgs.items():
            write_file(folder / f"{name}.{kind}.svg", svg)
    if without:
        option = "--plot" if arguments.plot else "--explain"
        say(f"decode.py: {option}: no picture of {without} that --max-segment-sec cut or that have no frames")


# ---- main ----

def with_search(system: System, search: Search) -> System:
    """The system with this search. Raises as `check_search`."""
    check_search(search, system.model, system.config.model.name)
    return system._replace(search=search)


IDLE_IN_STREAMS = ("batch_size", "batch_seconds", "min_segment_sec", "max_segment_sec", "plot", "explain", "vad")


def with_chunk(arguments: argparse.Namespace, system: System) -> System:
    """The system with the chunk that the arguments ask for. Raises ValueError for what has no effect on it."""
    usual = parse_arguments([])
    if system.chunk is not None:
        refuse(arguments, usual, IDLE_IN_STREAMS, "of no use to a streaming model, which hears a recording chunk by "
               "chunk; leave it out")
        return system._replace(chunk=asked_chunk(arguments, system.chunk))
    refuse(arguments, usual, ("stream", "chunk", "look_back"), "wanted a streaming model, such as "
           f"paraformer-zh-streaming, got a {system.config.model.name}: leave it out, or take that model")
    return system


def greedy_system(arguments: argparse.Namespace, path: str) -> System:
    """The system at path, as the arguments ask for it but for the search."""
    system = load_system(path, arguments.device, arguments.dtype)
    return system._replace(batch_size=arguments.batch_size, batch_seconds=arguments.batch_seconds,
                           segment_sec=(arguments.min_segment_sec, arguments.max_segment_sec))


def with_parts(arguments: argparse.Namespace, system: System) -> System:
    """The system with the models of --vad and --punctuate."""
    if arguments.vad:
        system = system._replace(vad=load_vad(arguments.vad, arguments.vad_schedule or "config"))
    if arguments.punctuate:
        system = system._replace(punctuation=load_punctuation(arguments.punctuate))
    return system


def with_hotwords(system: System, given: str) -> System:
    """The system that listens for the phrases of a file, or for the words of a text, in every utterance; on standard
    error, what is left out and what the vocabulary cannot spell. Raises ValueError."""
    if system.encode_list is None:
        raise ValueError(f"--hotwords: {why_no_hotwords(system.model)}")
    phrases, weighted = read_hotwords(given)
    warning = unknown_warning(phrases, system.tokenizer)
    if weighted:
        say(f"{given}: the numbers at the ends of the lines are taken for weights and ignored")
    if warning:
        say(f"warning: --hotwords: {warning}")
    return system._replace(hotwords=tuple(phrases))


def open_inputs(system: System, inputs: Sequence[str], scratch: Path, allow_pipes: bool = False,
                checkpoint: str = DEFAULT_CHECKPOINT) -> Dataset:
    """A dataset of the inputs, or of the checkpoint's own toy data or test manifest where there are none. scratch: a
    folder for copies of standard input and pipes; allow_pipes: run those of a wav.scp; checkpoint: the path of the
    system's, from where its own manifests are found."""
    options = system.config.data
    stats = system.stats.cpu()
    if options.kind == "toy" and not inputs:
        if system.vad:
            raise ValueError("--vad: wanted recordings, got the toy task, which is made of features")
        return data.open_dataset(options, "test", system.tokenizer.encode, system.config.training.seed, stats)

    def dataset(source: str | list[Row]) -> Dataset:
        return data.ManifestDataset(source, options, system.tokenizer.encode, stats=stats, for_training=False,
                                    whole_sec=whole_sec(system))

    if inputs:
        rows, left_out = read_inputs(inputs, scratch, allow_pipes)
        for line in left_out_lines(left_out):
            say(f"decode.py: {line}")
        return dataset(rows)
    field = "test" if options.test else "dev"
    source = getattr(options, field)
    if not source:
        raise ValueError("wanted INPUT: the checkpoint names no test or dev manifest")
    with data.naming(f"the checkpoint's data.{field}"):
        return dataset(find_again(source, checkpoint))


LAID_OUT_SEC = 300.0  # of audio, from which weights laid out save more than the second that it takes


def run(arguments: argparse.Namespace, system: System, dataset: Dataset, shard: tuple[int, int]) -> int:
    """Recognise everything, print in the order of the inputs, report -> exit code."""
    started = time.perf_counter()
    rank, processes = shard
    encode = system.tokenizer.encode
    lengths = dataset.lengths()[:arguments.limit or None]
    output = prepare_output(arguments, dataset, len(lengths), rank)
    done, scores = what_is_done(output, encode) if arguments.resume else (set(), [])
    todo = [i for i in range(len(lengths)) if i not in done]
    if lengths[todo].sum() * frame_sec(system.config.data) >= LAID_OUT_SEC:
        lay_out_products(system)
    finished = 0

    def finish(outcomes: list[Outcome]) -> None:
        nonlocal finished
        write_outcomes(output, outcomes)
        finished += processes * len(outcomes)  # as if the others had done as many
        if rank == 0:
            show_progress(min(finished, len(todo)), len(todo))

    outcomes = recognise_all(system, dataset, plan_batches(todo, lengths, system), shard, finish)
    alone = not (arguments.output or arguments.report or arguments.plot or arguments.explain)
    tally = print_results(outcomes, not arguments.inputs, alone, encode)
    tally.scores[:] = sorted([*scores, *tally.scores])  # as a run that was not stopped has them
    end_output(output, tally.interrupt is not None, processes)
    if rank == 0:
        spent = time.perf_counter() - started
        if arguments.plot or arguments.explain:
            names = file_names(dataset.keys[:len(lengths)])
            draw_all(arguments, system, dataset, [(i, names[i]) for i, _ in tally.heard])
        report_figures(arguments.report, tally, spent, lambda index: alignment_picture(system, dataset, index))
    if tally.interrupt:
        return exit_code(tally.interrupt)
    return 1 if tally.failed else 0


def load_and_run(arguments: argparse.Namespace) -> int:
    """Load, export if that is asked for, recognise -> exit code."""
    shard = join_processes(timeout=datetime.timedelta(days=1))  # one may have much more to do than another
    rank, processes = shard
    streams = [name for name in arguments.inputs if arguments.stream or is_stream(name)]
    if processes > 1 and streams:
        raise ValueError(f"{streams[0]}: {processes} processes cannot share standard input or a pipe")
    exports = arguments.export and not (arguments.resume and Path(arguments.export).exists())  # else it is done
    writes_int8 = exports and arguments.dtype == "int8"  # from the file: no system holds all in float32
    if writes_int8 and rank == 0:
        say(f"decode.py: wrote {export_int8(arguments.ckpt, arguments.export)}")
    if writes_int8 and not arguments.inputs:
        return 0
    system = with_search(greedy_system(arguments, arguments.ckpt), arguments.search)
    system = with_chunk(arguments, system)
    if arguments.inputs and system.config.data.kind == "toy":
        say(f"warning: {arguments.ckpt} was trained on toy features, which are no speech: its texts mean nothing")
    if exports and not writes_int8 and rank == 0:
        say(f"decode.py: wrote {export(system, arguments.export)}")
    if arguments.export and not arguments.inputs:
        return 0
    system = with_parts(arguments, system)
    if arguments.hotwords is not None:
        system = with_hotwords(system, arguments.hotwords)
    if arguments.stream:
        show_streams(system, arguments.inputs, arguments.pcm)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_inputs(system, arguments.inputs, Path(scratch), arguments.allow_pipes, arguments.ckpt)
        return run(arguments, system, dataset, shard)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    end_as_ctrl_c()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        return load_and_run(arguments)
    except (ValueError, OSError) as error:
        print(f"decode.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    keep_streams()
    sys.exit(main(sys.argv[1:]))
