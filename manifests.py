"""The rows of manifests, Kaldi folders and the inputs of a command line: which recordings, and what is said in them.

Reading order: a row and its line, Kaldi folders, several manifests as one, folders of recordings, inputs. Needs numpy;
imports nothing of ours, so it can be copied alone. Bad input is a ValueError that names the place.
"""
import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

class Row(NamedTuple):
    key: str
    audio: str                      # path, "" = none given; with `folder` the command of a pipe
    text: str
    duration: float | None          # seconds that are read
    offset: float | None = None     # seconds from where on; None: from the start
    folder: str | None = None       # where the command is run


AUDIO_NAMES = ("audio", "audio_filepath", "source")     # ours, NeMo's, FunASR's
TEXT_NAMES = ("text", "target")


def printable(text: str) -> str:
    """Lone surrogates, from a file name that is not UTF-8 or \\ud800 in JSON, become U+FFFD: UTF-8 cannot hold them."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def read_line(raw: bytes, place: str) -> str:
    """A line without byte order mark and surrounding spaces. Raises ValueError (place, wanted, got) if not UTF-8."""
    try:
        return raw.decode().removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{place}: wanted UTF-8, got {raw[:40]!r}") from None


def scan_lines(path: str | os.PathLike, name: str = "") -> Iterator[tuple[str, int, str]]:
    """Lines that are not blank, as (place, byte where it starts, line); place is path:line, or name:line if given.
    Raises ValueError if path is no file or a line is not UTF-8."""
    if not os.path.isfile(path):
        found = "none of that name"
        if os.path.exists(path):
            found = "a folder" if os.path.isdir(path) else "a pipe or device, which is not read twice; make it a file"
        raise ValueError(f"{path}: wanted a text file, got {found}")
    start = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{name or path}:{number}"
            if line := read_line(raw, place):
                yield place, start, line
            start += len(raw)


def read_seconds(fields: dict, name: str, place: str) -> float | None:
    """fields[name], None where there is none. Raises ValueError: place, wanted, got."""
    seconds = fields.get(name)
    if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < 1e9):
        raise ValueError(f"{place}: wanted seconds as {name}, from 0 to below 1e9, got {seconds!r:.60}")
    return seconds


def parse_row(line: str, folder: str, place: str) -> Row:
    """One JSON line of a manifest; paths are relative to `folder`. Raises ValueError: place, wanted, got."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: wanted a JSON object, got {line[:60]!r} ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: wanted a JSON object, got {line[:60]!r}")
    audio = next((fields[name] for name in AUDIO_NAMES if name in fields), None)
    text = next((fields[name] for name in TEXT_NAMES if name in fields), "")
    duration = read_seconds(fields, "duration", place)
    offset = read_seconds(fields, "offset", place)
    if not isinstance(audio, str) or not audio:
        raise ValueError(f"{place}: wanted a path under {' or '.join(AUDIO_NAMES)}, got {audio!r} in {line[:60]}")
    if not isinstance(text, str):
        raise ValueError(f"{place}: wanted a string under {' or '.join(TEXT_NAMES)}, got {text!r}")
    key = fields.get("key")
    if key is None:
        key = os.path.splitext(os.path.basename(audio))[0]      # os.path: Path is 8 x slower
    return Row(printable(str(key)), os.path.join(folder, audio), printable(text), duration, offset)


def read_table(path: str | os.PathLike) -> dict[str, tuple[str, str]]:
    """A Kaldi table, lines `key value` -> {key: (value, file:line)}. Raises ValueError if a key stands twice."""
    table: dict[str, tuple[str, str]] = {}
    for place, _, line in scan_lines(path):
        key, *value = line.split(None, 1)
        if key in table:
            raise ValueError(f"{place}: wanted every key once, got {key!r} again, first at {table[key][1]}")
        table[key] = ("".join(value), place)
    return table


def read_segments(path: str | os.PathLike) -> dict[str, tuple[str, float, float | None]]:
    """Kaldi's `segments`, lines `key recording start end` in seconds -> {key: (recording, offset, duration)}.
    An end of -1 is the recording's (duration None). Raises ValueError for another line."""
    segments: dict[str, tuple[str, float, float | None]] = {}
    for key, (value, place) in read_table(path).items():
        try:
            recording, *times = value.split()
            start, end = map(float, times)
        except ValueError:
            raise ValueError(f"{place}: wanted KEY RECORDING START END, got {key} {value}") from None
        if not (0 <= start < 1e9 and (end == -1 or start < end < 1e9)):
            raise ValueError(f"{place}: wanted 0 <= START < END in seconds, or END -1, got {start:g} and {end:g}")
        segments[key] = (recording, start, None if end == -1 else end - start)
    return segments


def read_scp(folder: str | os.PathLike, allow_pipes: bool) -> dict[str, tuple[str, str | None]]:
    """wav.scp, lines `key path` or `key command |`, paths relative to the folder -> {key: (path, None)}, of a pipe
    {key: (command, folder)}. Raises ValueError for a pipe that is not allowed."""
    audio: dict[str, tuple[str, str | None]] = {}
    for key, (path, place) in read_table(f"{folder}/wav.scp").items():
        command = path.removesuffix("|").strip()
        if not command:
            raise ValueError(f"{place}: wanted a path, got {path or 'nothing'!r}")
        if path == command:
            audio[key] = (os.path.join(folder, path), None)
        elif allow_pipes:
            audio[key] = (command, os.fspath(folder))
        else:
            raise ValueError(f"{place}: wanted a path, got the pipe {path!r}; with --allow-pipes decode.py runs it and "
                             "`corpora.py kaldi` writes what comes out into files, to train on")
    return audio


SHELL_SIGNS = frozenset("|&;<>()$`*?[]{}~#!\\\n")


def run_pipe(command: str, folder: str) -> bytes:
    """What a command writes when it is run in `folder`; a shell reads it only if it has signs that mean something to
    one, or begins by setting a variable. Raises ValueError if it cannot be run or ends with another code than 0."""
    try:
        words = shlex.split(command)
        if SHELL_SIGNS.intersection(command) or "=" in words[0]:
            words = ["sh", "-c", command]
        done = subprocess.run(words, cwd=folder or None, stdin=subprocess.DEVNULL, capture_output=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{command} |: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{command} |: wanted exit code 0, got {done.returncode}: {textwrap.shorten(said, 300)}")
    return done.stdout


def scan_kaldi(folder: str | os.PathLike, allow_pipes: bool = False) -> Iterator[Row]:
    """Rows of wav.scp and, if there, `segments` and `text`; audio of other keys is "". Raises as read_scp."""
    if not os.path.exists(f"{folder}/wav.scp"):
        raise ValueError(f"{folder}: wanted a manifest, or a Kaldi folder with wav.scp, got a folder without")
    audio = read_scp(folder, allow_pipes)
    texts = read_table(f"{folder}/text") if os.path.exists(f"{folder}/text") else {}
    if os.path.exists(f"{folder}/segments"):
        parts = read_segments(f"{folder}/segments")
    else:
        parts = {key: (key, None, None) for key in audio}
    for key, (recording, offset, duration) in parts.items():
        path, place = audio.get(recording, ("", None))
        text, _ = texts.get(key, ("", ""))
        yield Row(key, path, text, duration, offset, place)
    for key, (text, _) in texts.items():
        if key not in parts:
            yield Row(key, "", text, None)


def scan_rows(path: str | os.PathLike, allow_pipes: bool = False) -> Iterator[tuple[int, Row]]:
    """(start, row): the byte where a row's line of a JSON-lines manifest starts, or its number in a Kaldi folder."""
    if os.path.isdir(path):
        return enumerate(scan_kaldi(path, allow_pipes))
    folder = os.path.dirname(path)
    return ((start, parse_row(line, folder, place)) for place, start, line in scan_lines(path))


def find_manifests(source: str | os.PathLike) -> list[str]:
    """The manifests and Kaldi folders that `source` names: a path, a shell pattern, or several separated by commas.
    A pattern that matches nothing stays, for whoever opens it to report. Raises ValueError for an empty name."""
    text = os.fspath(source)
    names = [text] if os.path.exists(text) else [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"{text!r}: wanted manifests, patterns or Kaldi folders between commas, got an empty name")
    paths = []
    for name in names:
        matching = [] if os.path.exists(name) else sorted(glob.glob(name))
        paths += matching or [name]
    return paths


def find_again(source: str, checkpoint: str | os.PathLike) -> str:
    """The source of find_manifests, as a run named it whose checkpoint this is, from another working directory too.
    Its relative names are looked for in the folder that holds `runs`, then above that, then here; else it stays."""
    if not source:
        return source
    for folder in Path(os.path.abspath(checkpoint)).parents[3:]:        # of runs/<run>/checkpoints/<name>.pt
        moved = ",".join(os.path.join(folder, name.strip()) for name in source.split(","))
        if all(os.path.exists(path) for path in find_manifests(moved)):
            return source if os.path.samefile(folder, os.curdir) else moved
    return source


def checksum(row: Row) -> int:
    return zlib.crc32(repr(row).encode())


class Manifest:
    """The rows of JSON-lines manifests and Kaldi folders, in order: manifest[i] is row i.
    source: as in find_manifests. Each line is parsed once at the start, which raises ValueError at the first bad one.
    Only `index` stays in memory, one array that worker processes share: where each row starts, its seconds (NaN = not
    given) and a checksum. manifest[i] reads its row from the file again; ValueError if that has changed. The rows of a
    Kaldi folder, which lie in two files, stay in memory, as JSON: Rows would take five times as much."""

    ENTRY = [("manifest", np.int32), ("start", np.int64), ("seconds", np.float64), ("checksum", np.uint32)]

    def __init__(self, source: str | os.PathLike):
        self.paths = find_manifests(source)
        self.folders: dict[str, list[bytes]] = {path: [] for path in self.paths if os.path.isdir(path)}
        self.index = np.fromiter(self._entries(), self.ENTRY)

    def _entries(self) -> Iterator[tuple[int, int, float | None, int]]:
        for number, path in enumerate(self.paths):
            for start, row in scan_rows(path):
                if path in self.folders:
                    self.folders[path].append(json.dumps(row).encode())
                yield number, start, row.duration, checksum(row)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Row:
        number, start, _, total = self.index[index].item()
        path = self.paths[number]
        if path in self.folders:
            return Row(*json.loads(self.folders[path][start]))
        place = f"{path}, byte {start} (has the file changed?)"
        with open(path, "rb") as file:
            file.seek(start)
            row = parse_row(read_line(file.readline(), place), os.path.dirname(path), place)
        if checksum(row) != total:
            raise ValueError(f"{place}: wanted the row of the start, got {row.key}, {row.text[:60]!r}")
        return row


# ---- folders of recordings ----

RECORDINGS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr", ".aif",
              ".aiff", ".caf", ".3gp", ".mov", ".mkv")      # that a folder is searched for, in capitals or not


class LeftOut(NamedTuple):
    path: str
    reason: str


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason: how many, and the first three by name."""
    places: dict[str, list[str]] = {}
    for path, reason in left_out:
        places.setdefault(reason, []).append(printable(path))
    lines = []
    for reason, paths in places.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        lines.append(f"left out {len(paths)}, {reason}: {', '.join(paths[:3])}{more}")
    return lines


def why_no_recording(path: str) -> str:
    """Why a file of a folder is left out, "" if it is not."""
    if os.path.basename(path).startswith("."):      # .DS_Store, and ._a.wav, which macOS leaves beside a.wav
        return "hidden"
    if not path.lower().endswith(RECORDINGS):
        return "no recording by its name"
    if not os.path.isfile(path):
        return "a pipe or device" if os.path.exists(path) else "a link to nothing"
    return ""


def find_recordings(folder: str | os.PathLike) -> tuple[list[Path], list[LeftOut]]:
    """The recordings in a folder, at any depth, by path; and what else is in it, but for texts beside recordings.
    Links are followed; a folder that is met again, as in a loop of them, is read once. What is hidden is left out."""
    found: list[Path] = []
    left_out: list[LeftOut] = []
    met = set()

    def refuse(error: OSError) -> None:
        left_out.append(LeftOut(error.filename, "a folder that cannot be read"))

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(place) in met:
            folders.clear()
            left_out.append(LeftOut(place, "a link to a folder that is read already"))
            continue
        met.add(os.path.realpath(place))
        left_out += [LeftOut(os.path.join(place, name), "hidden") for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(os.path.join(place, name) for name in names):
            if reason := why_no_recording(path):
                left_out.append(LeftOut(path, reason))
            else:
                found.append(Path(path))
    stems = {os.path.splitext(path)[0] for path in found}
    left_out = [item for item in left_out
                if not (item.path.lower().endswith(".txt") and os.path.splitext(item.path)[0] in stems)]
    return sorted(found), left_out


# ---- inputs of a command line ----

def read_inputs(names: Sequence[str | os.PathLike], scratch: Path,
                allow_pipes: bool = False) -> tuple[list[Row], list[LeftOut]]:
    """What the names of a command line name, in order, and what is left out of folders: - or a pipe, as `<(...)` gives
    it (`read_stream`), manifests (.jsonl, .json), Kaldi folders (with wav.scp), other folders (every recording in
    them), recordings (anything else).
    scratch: for copies of pipes; allow_pipes: run those of a wav.scp. ValueError for what is empty, or a device."""
    found: list[Row | LeftOut] = []
    for name in names:
        found += read_input(os.fspath(name), scratch, allow_pipes)
    rows = [item for item in found if isinstance(item, Row)]
    return rows, [item for item in found if isinstance(item, LeftOut)]


def is_stream(name: str) -> bool:
    """Whether it can be read once only: standard input, or a pipe."""
    return name == "-" or Path(name).is_fifo()


def recording_row(path: str | Path) -> Row:
    return Row(printable(str(path)), str(path), "", None)


def read_input(name: str, scratch: Path, allow_pipes: bool) -> Iterator[Row | LeftOut]:
    path = Path(name)
    if not name:        # Path("") is here
        raise ValueError("wanted recordings, folders or manifests, got an empty name")
    if name == "-" and sys.stdin is None:
        raise ValueError("-: wanted a recording or lines, got a standard input that is closed")
    if is_stream(name):
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(path, "rb") as stream:
            yield from read_stream(stream, scratch, allow_pipes, name)
    elif path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: wanted a recording, a folder or a manifest, got a device (- is standard input)")
    elif path.suffix in (".jsonl", ".json") or (path / "wav.scp").exists():
        for _, row in scan_rows(path, allow_pipes):
            yield row
    elif path.is_dir():
        found, left_out = find_recordings(path)
        if not found:
            wanted = f"{path}: wanted wav.scp or recordings ({' '.join(RECORDINGS)}) in this folder, got none"
            raise ValueError("; ".join([wanted, *left_out_lines(left_out)]))
        yield from map(recording_row, found)
        yield from left_out
    else:
        yield recording_row(path)


def read_stream(stream: BinaryIO, scratch: Path, allow_pipes: bool, name: str) -> Iterator[Row | LeftOut]:
    """What comes out of standard input or a pipe: a recording, or lines that are each an input or a manifest's line.
    It is copied into the folder `scratch`, as a recording is read more than once."""
    copy = scratch / f"stream{len(os.listdir(scratch))}"
    with open(copy, "wb") as file:
        shutil.copyfileobj(stream, file)
    with open(copy, "rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f"{name}: wanted a recording or lines, got nothing")
    if b"\0" in head:       # every recording has zero bytes, no text has
        yield Row("stdin" if name == "-" else name, str(copy), "", None)
        return
    for place, _, line in scan_lines(copy, name):
        if line.startswith("{"):
            yield parse_row(line, "", place)
        else:
            yield from read_input(line, scratch, allow_pipes)
