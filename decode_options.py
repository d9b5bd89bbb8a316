"""What decode.py may be told: its options, their bounds, and which do not go together."""
import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from baselines import Search
from checkpoint import PRECISIONS, SEGMENT_SEC
from commandline import Parser, path_text, refuse
from report import FORMS
from vad import SCHEDULES

DEFAULT_CHECKPOINT = "runs/latest/checkpoints/best.pt"
LEAST = {"limit": 0, "batch_size": 1, "threads": 0, "plot_layer": 0, "batch_seconds": 1e-3}
IDLE_BESIDE_STREAM = ("export", "hotwords", "vad", "allow_pipes", "output", "format", "resume", "report", "plot",
                      "explain", "limit")
IDLE_BESIDE_EXPORT = ("hotwords", "vad", "punctuate", "allow_pipes", "output", "report", "plot", "explain", "chunk",
                      "look_back", "limit", "batch_size", "batch_seconds", "min_segment_sec", "max_segment_sec",
                      *Search._fields)


def two_numbers(text: str) -> tuple[int, int]:
    """Of --chunk and --look-back."""
    try:
        first, second = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted two whole numbers and a comma, as 10,5, got {text!r}") from None
    return first, second


def add_parts(add: Callable) -> None:
    """The options that serve.py has too."""
    add("--vad", metavar="DIR", type=path_text,
        help="cut where a VAD model finds speech: a directory as FunASR publishes fsmn-vad")
    add("--vad-schedule", choices=SCHEDULES, help="silence that ends a segment: as in the model's config (default), or "
        "falling from 2 s to 0.1 s as a segment grows, as FunASR's")
    add("--punctuate", metavar="DIR", type=path_text, help="write sentences: a directory as FunASR publishes ct-punc")
    add("--chunk", type=two_numbers, metavar="NEW,AHEAD", help="of a streaming model: frames that are decided at a "
        "time, and frames that it hears beyond them (default: as it was trained; FunASR's: 10,5, of 60 ms)")
    add("--look-back", type=two_numbers, metavar="ENCODER,DECODER", help="of a streaming model: how many chunks before "
        "it a chunk sees; --look-back=-1,0: all, none (default: likewise; FunASR's: 4,1)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", "--precision", default="float32", choices=list(PRECISIONS),
        help="of matrix products; int8: weights in a quarter of the memory, on a CPU (default float32)")


def add_options(add: Callable) -> None:
    add("inputs", nargs="*", metavar="INPUT", help="recordings, folders (Kaldi's, or all recordings in them), "
        "manifests (.jsonl), or - for standard input: a recording, or lines, each an INPUT or a line of a manifest")
    add("--ckpt", "--checkpoint", default=DEFAULT_CHECKPOINT,
        help=f"a checkpoint, or a model directory of FunASR (default: {DEFAULT_CHECKPOINT})")
    add("--export", metavar="PATH", type=path_text, help="write the model alone and recognise nothing without INPUT: "
        "FILE.pt as a checkpoint, else a directory, FunASR's if it knows the model; with --dtype int8 in a quarter of "
        "the size, to run in int8 only")
    add("--hotwords", metavar="FILE|TEXT", help="phrases to listen for, in a model that can be told them: a file "
        "(UTF-8) with one a line, # before a remark, or words with spaces between them")
    add("--allow-pipes", action="store_true", help="run the commands that a Kaldi folder's wav.scp has in place of "
        "paths (`sox ... |`), in that folder")
    add("--output", metavar="PATH", type=path_text, help="write into a folder, a file for each utterance when it "
        "is done (ctm: results.ctm), where PATH ends in .jsonl, a line for each, or, of one input, a file as talk.srt")
    add("--format", choices=list(FORMS), help="of what is in --output (default: what that ends in, else json)")
    add("--resume", action="store_true", help="go on with an --output that a run has begun: what it has is not decoded "
        "again")
    add("--report", metavar="DIR", type=path_text, help="write the errors of the inputs that have a reference: "
        "summary.txt, alignments.txt and report.html")
    add("--plot", metavar="DIR", type=path_text, help="write pictures of each utterance (with --limit, of so many)")
    add("--explain", action="store_true", help="draw each utterance's way through the model, NAME.explain.svg, in the "
        "folder of --plot or here")
    add("--stream", action="store_true", help="with a streaming model: print the text of recordings, or of - (a WAV "
        "from a pipe), as it grows")
    add("--pcm", type=int, metavar="RATE", help="- of --stream is bare 16-bit little-endian mono samples at RATE Hz")


def add_numbers(add: Callable) -> None:
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


def check_together(parser: Parser, arguments: argparse.Namespace) -> None:
    """What options ask of each other; ends the program where they do not go together."""
    if not 0.2 <= 2 * arguments.min_segment_sec <= arguments.max_segment_sec < math.inf:
        parser.error("--min-segment-sec must be at least 0.1 and at most half of --max-segment-sec, got "
                     f"{arguments.min_segment_sec:g} and {arguments.max_segment_sec:g}")
    if arguments.format and not arguments.output:
        parser.error("--format needs --output")
    if arguments.format not in (None, "json") and Path(arguments.output).suffix == ".jsonl":
        parser.error("--output FILE.jsonl is for --format json")
    if arguments.vad_schedule and not arguments.vad:
        parser.error("--vad-schedule needs --vad")
    if arguments.vad and (arguments.min_segment_sec, arguments.max_segment_sec) != SEGMENT_SEC:
        parser.error("--min-segment-sec and --max-segment-sec are for cutting without --vad")
    if arguments.resume and not arguments.output:
        parser.error("--resume needs --output")
    if arguments.plot_layer and not arguments.plot:
        parser.error("--plot-layer needs --plot")
    if arguments.pcm is not None and not (arguments.stream and arguments.inputs == ["-"] and arguments.pcm >= 1000):
        parser.error("--pcm needs --stream - and a rate of 1000 Hz or more")
    if arguments.stream and not arguments.inputs:
        parser.error("--stream needs a recording or -")
    for name in ("report", "plot"):     # written when all is recognised, which may be hours later
        place = Path(getattr(arguments, name) or ".")
        if place.exists() and not place.is_dir():
            parser.error(f"--{name}: wanted a folder, got the file {place}")
    usual = parser.parse_args([])
    try:
        if arguments.stream:
            refuse(arguments, usual, IDLE_BESIDE_STREAM, "leave it out, as --stream prints texts alone")
        if arguments.export and not arguments.inputs:
            refuse(arguments, usual, IDLE_BESIDE_EXPORT, "leave it out, as --export recognises nothing without INPUT")
    except ValueError as error:
        parser.error(str(error))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Recognise speech.", epilog="Without INPUT: the checkpoint's own toy data, or the test "
                    "(else dev) manifest of its config.")
    add_options(parser.add_argument)
    add_parts(parser.add_argument)
    add_numbers(parser.add_argument)
    arguments = parser.parse_args(argv)
    arguments.search = Search(*(getattr(arguments, field) for field in Search._fields))
    for name, least in LEAST.items():
        given = getattr(arguments, name)
        if not least <= given < 1e9:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, below 1e9, got {given}")
    check_together(parser, arguments)
    return arguments
