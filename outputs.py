"""Where decode.py's results go: a file for each utterance, or one for all, which can be gone on with.

One file for all, x.jsonl, grows beside it, in x.jsonl.part: a line of JSON for each result as soon as it is there, so
whatever ends the program, kill -9 too, loses none that is done. At the end, and after Ctrl-C or SIGTERM, the lines go
into x.jsonl in the order of the inputs. Each process of torchrun has a part of its own (x.jsonl.part1). Meanwhile
x.jsonl.lock keeps others away, and each line of a part has what decides a result, so that no other model goes on.
Reading order: names, the plan, what made the results, a growing file, a run from beginning to end, the console.
"""
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from files import replacing, write_atomic
from manifests import RECORDINGS
from ranks import sum_over_ranks
from report import (FORMS, Outcome, Result, Score, Token, Word, ctm, json_row, report_lines, score, to_line,
                    write_report, written_text)
from survival import ERASE, interrupted_later, lock, release


# ---- names ----

LONGEST = 180  # bytes of a name; of the 255 that file systems take, number, suffix and .tmp need the rest


def safe_name(text: str) -> str:
    """A name for a file: what is no letter, digit or one of ._- and space becomes _; a long one is cut in the middle,
    as "part 1" and "part 2" stand at the end."""
    name = "".join(c if c.isalnum() or c in "._- " else "_" for c in text).strip()
    if not name.strip("."):
        return "_"
    raw = name.encode()
    if len(raw) <= LONGEST:
        return name
    half = (LONGEST - 3) // 2
    return raw[:half].decode(errors="ignore") + "..." + raw[-half:].decode(errors="ignore")


def file_names(keys: Sequence[str]) -> list[str]:
    """A path without suffix for each key: its folders but for those that all share, and its name; no two alike, in
    capitals or not."""
    paths = []
    for key in keys:
        path = PurePosixPath(key.replace(os.sep, "/"))
        last = path.stem if path.suffix.lower() in RECORDINGS else path.name
        paths.append([*(part for part in path.parts[:-1] if part != "/"), last])
    shared = len(os.path.commonprefix([path[:-1] for path in paths]))
    names = []
    numbers = {}  # the last one given to each name, as thousands of files may be called audio.wav
    for path in paths:
        name = wanted = "/".join(safe_name(part) for part in path[shared:])
        while name.lower() in numbers:
            numbers[wanted.lower()] += 1
            name = f"{wanted}-{numbers[wanted.lower()]}"
        numbers[name.lower()] = 1
        names.append(name)
    return names


def write_file(path: Path, content: str) -> None:
    """Write a file whole, and make the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


# ---- the plan ----

class Output(NamedTuple):
    """At most one of `files` and `merged` is there."""

    form: str  # a key of FORMS
    inputs: Sequence[tuple[str, int]] = ()  # the key of each, and how many before it have that key
    files: Sequence[Path] = ()  # of each input
    merged: Path | None = None  # one file for all
    rank: int = 0
    made: dict[str, str] = {}  # what decides the results of `merged`, by option
    lock: BinaryIO | None = None  # of rank 0: while it is open, no other process writes here
    part: BinaryIO | None = None  # where this process writes what it has of `merged`


def numbered(keys: Iterable[str]) -> list[tuple[str, int]]:
    """Each key with how many times it stood before, as several inputs may have the same."""
    counts: Counter[str] = Counter()
    pairs = []
    for key in keys:
        pairs.append((key, counts[key]))
        counts[key] += 1
    return pairs


def plan_output(path: str, form: str | None, keys: Sequence[str], rank: int) -> Output:
    """Where the results of the inputs with these keys go: where path ends in .jsonl or in the form, and is no folder,
    one file; else a folder. Raises ValueError where path and form contradict each other, or several results would go
    into a file for one."""
    place = Path(path)
    suffix = place.suffix[1:]
    form = form or (suffix if suffix in FORMS else "json")
    is_file = place.suffix == f".{form}" and not place.is_dir()
    if not (is_file or suffix == "jsonl" or place.is_dir()) and (suffix in FORMS or place.exists()):
        raise ValueError(f"--output: wanted a folder or a file that ends in .{form}, got {path}")
    output = Output(form, numbered(keys), rank=rank)
    if place.suffix == ".jsonl" or form == "ctm" and is_file:
        return output._replace(merged=place)
    if form == "ctm":
        return output._replace(merged=place / "results.ctm")
    if not is_file:
        return output._replace(files=[place / f"{name}.{form}" for name in file_names(keys)])
    if len(keys) != 1:
        raise ValueError(f"--output: wanted a folder for the {form} files of {len(keys)} inputs, got the file {path}")
    return output._replace(files=[place])


def check_replaced(output: Output, inputs: Sequence[str], recordings: Iterable[str]) -> None:
    """Raises ValueError for an output that would replace an input, or what lies beside a recording under its name: the
    text that a person has written, for all that is known. recordings: the path of each input, where there are."""
    if output.merged and output.merged.is_dir():
        raise ValueError(f"--output: wanted a file to write or replace, got the folder {output.merged}")
    if output.merged and output.merged.exists():
        for path in inputs:
            if os.path.exists(path) and output.merged.samefile(path):
                raise ValueError(f"--output: wanted another file than the inputs, got {output.merged}")
    for file, recording in zip(output.files, recordings):
        beside = Path(recording).with_suffix(file.suffix) if recording else None
        if beside and file.exists() and beside.exists() and file.samefile(beside):
            raise ValueError(f"--output: {file} lies beside the recording of its name and may be its text; wanted "
                             "another folder, or --resume, which keeps the files that are there")


def lock_output(path: str, output: Output) -> BinaryIO | None:
    """Keep other processes away from a file, or from a folder of results. Raises ValueError if one is there."""
    place = output.merged or Path(path)
    if output.merged or output.files == [place]:
        place.parent.mkdir(parents=True, exist_ok=True)
        return lock(place.with_name(f"{place.name}.lock"), f"{place}: wanted a file")
    place.mkdir(parents=True, exist_ok=True)
    return lock(place / ".lock", f"{place}: wanted a folder")


# ---- what results were made with ----

MODELS = ("ckpt", "vad", "punctuate", "hotwords")  # options that name files
DECIDING = ("dtype", "vad_schedule", "min_segment_sec", "max_segment_sec", "chunk", "look_back")


def digest(path: str) -> str:
    """Of a file, or of the files in a directory."""
    files = [path]
    if os.path.isdir(path):
        files = sorted(entry.path for entry in os.scandir(path) if entry.is_file())
    total = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {total.hexdigest()[:12]}"


def made_with(options) -> dict[str, str]:
    """Those of decode.py's options that decide a result, with the digests of the files that they name."""
    made = {name: str(getattr(options, name)) for name in (*DECIDING, *options.search._fields)}
    for name in MODELS:
        value = getattr(options, name)
        if value:
            made[name] = digest(value) if os.path.exists(value) else value
    return made


# ---- a file for all, while it grows ----

ONLY_IN_PARTS = ("made", "number", "spoken")  # of the fields of a line


def parts_of(merged: Path) -> list[Path]:
    return sorted(merged.parent.glob(f"{glob.escape(merged.name)}.part*"))


def own_part(output: Output) -> Path:
    return output.merged.with_name(f"{output.merged.name}.part{output.rank or ''}")


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte where it starts, line) of a part; one that breaks off, as the last may, is none."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


def open_part(path: Path) -> BinaryIO:
    """A part, to go on with behind its last whole line."""
    file = open(path, "ab")
    file.truncate(sum(len(line) for _, line in whole_lines(path)))
    return file


def part_line(output: Output, outcome: Outcome) -> bytes:
    """The line of JSON of a result; in a part it has what it was made with, the number of its key, where that is not 0,
    and the text without punctuation, where some was asked for."""
    row = json_row(outcome) | {"made": output.made}
    number = output.inputs[outcome.index][1]
    if number:
        row["number"] = number
    if outcome.result.sentences is not None:
        row["spoken"] = outcome.result.text
    return to_line(row).encode()


def read_outcome(line: bytes, place: str) -> tuple[Outcome, dict]:
    """What `json_row` made of an outcome, but for its index, n-best and the spacing of words; and the row itself.
    Raises ValueError if the line is none of its rows."""
    try:
        row = json.loads(line)
        tokens = [Token(**token) for token in row["tokens"]]
        words = [Word(word["word"], word["start"], word["end"], word["confidence"]) for word in row["words"]]
        result = Result(row.get("spoken", row["text"]), row["confidence"], tokens, words)
        is_scored = "sentences" not in row or "spoken" in row  # else nobody knows the text without its marks
        reference = row.get("reference", "") if is_scored else ""
        return Outcome(-1, row["key"], row["duration"], reference, result), row
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place}: wanted a result that decode.py wrote, to go on from, got {line[:60]!r} ({error})"
                         ) from None


def read_parts(output: Output) -> Iterator[tuple[Path, int, Outcome, dict]]:
    """Of every line of all parts: the part, the byte where it starts, its outcome, with the place of its input, -1
    where that is not among the inputs, and its row."""
    places = {pair: index for index, pair in enumerate(output.inputs)}
    for part in parts_of(output.merged):
        for start, line in whole_lines(part):
            outcome, row = read_outcome(line, f"{part}, byte {start}")
            yield part, start, outcome._replace(index=places.get((outcome.key, row.get("number", 0)), -1)), row


def merge_parts(output: Output, keep: bool) -> None:
    """Write `merged` from all parts, in the order of the inputs. keep: the run has not come to its end, so the parts
    stay, to go on from."""
    lines = sorted((outcome.index, part, start) for part, start, outcome, _ in read_parts(output))
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(output.merged))
        target = stack.enter_context(open(temporary, "wb"))
        files = {part: stack.enter_context(open(part, "rb")) for part in parts_of(output.merged)}
        for _, part, start in lines:
            files[part].seek(start)
            outcome, row = read_outcome(files[part].readline(), str(part))
            for name in ONLY_IN_PARTS:
                row.pop(name, None)
            target.write((ctm(outcome) if output.form == "ctm" else to_line(row)).encode())
    if not keep:
        for part in files:
            part.unlink()


# ---- from the beginning to the end ----

def begin_merged(output: Output, going_on: bool) -> None:
    """Rank 0 looks at what an earlier run left. Raises ValueError for results that would be lost."""
    parts = parts_of(output.merged)
    if parts and not going_on:
        raise ValueError(f"{parts[0]}: results of a run that has not come to its end; to go on with it, add --resume, "
                         "to start over, remove the file")
    if going_on and not parts and output.merged.exists() and output.form == "json":
        twice = [key for key, number in output.inputs if number]
        if twice:
            raise ValueError(f"--resume: wanted a key of its own for each input, to find what {output.merged} lacks, "
                             f"got {twice[0]!r} twice")
        with replacing(own_part(output)) as path:  # it is whole or not there
            shutil.copyfile(output.merged, path)


def prepare_output(options, dataset, count: int, rank: int) -> Output:
    """Where the results of a dataset's first `count` inputs go; options are those of decode.py. Raises ValueError, in
    every process, for a file that must not be replaced, or where another process writes."""
    if not options.output:
        return Output("json")
    output = plan_output(options.output, options.format, dataset.keys[:count], rank)
    recordings = (row.audio for row in getattr(dataset, "rows", ()))  # toy data have none
    check_replaced(output, options.inputs, () if options.resume else recordings)
    if output.merged:
        output = output._replace(made=made_with(options))
    refused = {}
    if rank == 0:
        try:
            output = output._replace(lock=lock_output(options.output, output))
            if output.merged:
                begin_merged(output, options.resume)
        except ValueError as error:
            release(output.lock)
            refused = {"why": str(error)}
    refused = sum_over_ranks(refused)  # the others wait for rank 0
    if refused:
        raise ValueError(refused["why"])
    return output._replace(part=open_part(own_part(output))) if output.merged else output


def earlier_outcomes(output: Output) -> Iterator[Outcome]:
    """What an earlier run left, with the place of its input, -1 where that is not among the inputs; forms but json and
    ctm give an Outcome without result. Raises ValueError for what was made with other options than these."""
    made = output.made
    for part, _, outcome, row in read_parts(output) if output.merged else ():
        found = row.get("made", made)  # lines of a finished file have none
        for name in sorted(found.keys() | made.keys()):
            if found.get(name) != made.get(name):
                raise ValueError(f"--{name.replace('_', '-')}: wanted {found.get(name)}, as for the results in {part}, "
                                 f"got {made.get(name)}; to start over, remove that file")
        yield outcome
    for index, file in enumerate(output.files):
        if file.exists():
            outcome = Outcome(index, output.inputs[index][0])
            if output.form == "json":
                outcome, _ = read_outcome(file.read_bytes(), str(file))
            yield outcome._replace(index=index)


def what_is_done(output: Output, encode: Callable[[str], list[int]]) -> tuple[set[int], list[Score]]:
    """The inputs that an earlier run recognised, and the scores of those whose results can be read back."""
    done: set[int] = set()
    scores: list[Score] = []
    for outcome in earlier_outcomes(output):
        if outcome.index >= 0:
            done.add(outcome.index)
            if outcome.reference:
                scores.append(score(outcome, encode))
    sum_over_ranks({})  # all have read it: now it may grow
    print(f"going on: {len(done)} of {len(output.inputs)} are done", file=sys.stderr)
    return done, scores


def write_outcomes(output: Output, outcomes: Sequence[Outcome]) -> None:
    """What one batch has come to, at once. Raises OSError that names the file."""
    done = [outcome for outcome in outcomes if outcome.result]
    if output.part:
        try:
            output.part.write(b"".join(part_line(output, outcome) for outcome in done))
            output.part.flush()
        except OSError as error:  # a full disk
            error.filename = output.part.name
            raise
    if output.files:
        for outcome in done:
            write_file(output.files[outcome.index], FORMS[output.form](outcome))


def end_output(output: Output, interrupted: bool, processes: int) -> None:
    """Rank 0 writes `merged`; not where one of several processes was interrupted, as parts of others may still grow.
    Raises ValueError for a part that somebody has removed or changed."""
    if output.part:
        removed = not os.fstat(output.part.fileno()).st_nlink
        output.part.close()
        if removed:
            raise ValueError(f"{output.part.name}: removed while it was written, and what was decoded with it")
    if output.merged and output.rank == 0 and (processes == 1 or not interrupted):
        with interrupted_later():
            merge_parts(output, keep=interrupted)
    release(output.lock)
    if interrupted and output.rank == 0 and (output.merged or output.files):
        print("interrupted; the same command with --resume goes on", file=sys.stderr)


# ---- on the console ----

def show_progress(done: int, total: int) -> None:
    """How many inputs are done, on a terminal, in a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"{ERASE}{done}/{total}", end="", file=sys.stderr, flush=True)


SHOWN = 10  # results that a terminal gets where no INPUT is named


class Tally(NamedTuple):
    """What became of all inputs."""

    heard: list[tuple[int, float]]  # (place, seconds) of each that was recognised
    failed: int
    scores: list[Score]  # of those that have a reference
    interrupt: KeyboardInterrupt | None  # Ctrl-C, or what ended the run like it


def print_results(outcomes: Iterator[Outcome], own: bool, alone: bool, encode: Callable[[str], list[int]]) -> Tally:
    """Print each outcome, compare it with its reference. own: of the checkpoint's own data a terminal gets SHOWN, with
    references; alone: nothing but standard output gets them, so OSError is raised when that is gone."""
    heard: list[tuple[int, float]] = []
    scores: list[Score] = []
    failed = 0
    interrupt = None
    brief = own and sys.stdout is not None and sys.stdout.isatty()
    try:
        for outcome in outcomes:
            if sys.stderr.isatty():  # the progress
                print(ERASE, end="", file=sys.stderr)
            key = re.sub(r"\s", " ", outcome.key)  # a line stays a line
            if outcome.result is None:
                failed += 1
                why = outcome.reason.replace(f": {outcome.key}", "")  # of a recording without another key
                print(f"decode.py: {key}: {' '.join(why.split())}", file=sys.stderr)
                continue
            if not brief:
                print(f"{key}\t{written_text(outcome.result)}", flush=True)
            elif len(heard) < SHOWN:
                print(f"{key}\n  reference   {outcome.reference}\n  recognised  {written_text(outcome.result)}")
            gone = getattr(sys.stdout, "error", "")  # of a SafeStream
            if alone and gone:
                raise OSError(f"standard output: {gone}; --output keeps results in a file")
            if not outcome.seconds:
                print(f"decode.py: {key}: no samples, so its text is empty", file=sys.stderr)
            heard.append((outcome.index, outcome.seconds))
            if outcome.reference:
                scores.append(score(outcome, encode))
    except KeyboardInterrupt as error:
        interrupt = error
    if brief and len(heard) > SHOWN:
        print(f"and {len(heard) - SHOWN} more, which a file or a pipe gets: python decode.py > results.tsv")
    return Tally(heard, failed, scores, interrupt)


def report_figures(folder: str | None, tally: Tally, spent: float, picture: Callable[[int], str]) -> None:
    """Print the error rates, if there are references, and the speed; write the report, with the picture of each input,
    into a folder."""
    lines = report_lines(tally.scores) if tally.scores else []
    if folder and not tally.scores:
        print(f"warning: --report {folder}: no input has a reference, as those of a manifest have, so none is written",
              file=sys.stderr)
    elif folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_report(Path(folder), tally.scores, lines, picture)
    seconds = sum(seconds for _, seconds in tally.heard)
    factor = f", real-time factor {spent / seconds:.4f}" if seconds else ""
    without = sum(not own for _, own in tally.heard)
    empty = f", {without} without samples" if without else ""
    print(*lines, f"{len(tally.heard)} utterances{empty}, {seconds:.1f} s of audio in {spent:.2f} s{factor}; "
          f"{tally.failed} could not be recognised", sep="\n", file=sys.stderr)
