"""The rows of manifests, Kaldi folders and the inputs of a command line: which recordings, and what is said in them.

Reading order: a row and its line, Kaldi folders, several manifests as one, inputs. Needs numpy; imports nothing of
ours, so it can be copied alone. Bad input is a ValueError that names the place.
"""
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
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

    An end of -1 is the recording's (duration None). Raises ValueError for another line.
    """
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
        raise ValueError(f"{command} |: wanted exit code 0, got {done.returncode}: {said[:300]}")
    return done.stdout


def scan_kaldi(folder: str | os.PathLike, allow_pipes: bool = False) -> Iterator[Row]:
    """Rows of wav.scp and, where they are, of `segments` and `text`. Of a key that only `text` or `segments` has, audio
    is "". Raises ValueError as read_scp."""
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

    A pattern that matches nothing stays, for whoever opens it to report. Raises ValueError for an empty name.
    """
    text = os.fspath(source)
    names = [text] if os.path.exists(text) else [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"{text!r}: wanted manifests, patterns or Kaldi folders between commas, got an empty name")
    paths = []
    for name in names:
        matching = [] if os.path.exists(name) else sorted(glob.glob(name))
        paths += matching or [name]
    return paths


class Manifest:
    """The rows of JSON-lines manifests and Kaldi folders, in order: manifest[i] is row i.

    source: as in find_manifests. Each line is parsed once at the start, which raises ValueError at the first bad one.
    Only `index` stays in memory, one array that worker processes share: where each row starts, and its seconds (NaN =
    not given). manifest[i] reads its row from the file again; ValueError if there is none any more. The rows of a
    Kaldi folder, which lie in two files, stay in memory, as JSON: Rows would take five times as much.
    """

    ENTRY = [("manifest", np.int32), ("start", np.int64), ("seconds", np.float64)]

    def __init__(self, source: str | os.PathLike):
        self.paths = find_manifests(source)
        self.folders: dict[str, list[bytes]] = {path: [] for path in self.paths if os.path.isdir(path)}
        self.index = np.fromiter(self._entries(), self.ENTRY)

    def _entries(self) -> Iterator[tuple[int, int, float | None]]:
        for number, path in enumerate(self.paths):
            for start, row in scan_rows(path):
                if path in self.folders:
                    self.folders[path].append(json.dumps(row).encode())
                yield number, start, row.duration

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Row:
        number, start, _ = self.index[index].item()
        path = self.paths[number]
        if path in self.folders:
            return Row(*json.loads(self.folders[path][start]))
        place = f"{path}, byte {start} (has the file changed?)"
        with open(path, "rb") as file:
            file.seek(start)
            return parse_row(read_line(file.readline(), place), os.path.dirname(path), place)


RECORDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")      # that a folder is searched for


def read_inputs(name: str | os.PathLike, allow_pipes: bool = False) -> list[Row]:
    """Rows of one input of a command line: a manifest (.jsonl, .json), a Kaldi folder (with wav.scp), another folder
    (every recording in it, at any depth, by path), or a recording (anything else). Raises ValueError for an empty
    folder or name."""
    path = Path(name)
    if not os.fspath(name):     # Path("") is here
        raise ValueError("wanted recordings, folders or manifests, got an empty name")
    if path.suffix in (".jsonl", ".json") or (path / "wav.scp").exists():
        return [row for _, row in scan_rows(path, allow_pipes)]
    found = [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in RECORDINGS and not p.is_dir())
    if not found:
        raise ValueError(f"{path}: wanted wav.scp or recordings ({' '.join(RECORDINGS)}) in this folder, got none")
    return [Row(printable(str(p)), str(p), "", None) for p in found]


def read_stdin(stdin: BinaryIO, copy: Path, allow_pipes: bool = False) -> list[Row]:
    """Rows of standard input, a recording, or lines that are each an input or a manifest's line. Written to `copy`."""
    with open(copy, "wb") as file:
        shutil.copyfileobj(stdin, file)
    with open(copy, "rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError("standard input: wanted a recording or lines, got nothing")
    if b"\0" in head:       # every recording has zero bytes, no text has
        return [Row("stdin", str(copy), "", None)]
    rows = []
    for place, _, line in scan_lines(copy, "-"):
        if line.startswith("{"):
            rows.append(parse_row(line, "", place))
        else:
            rows += read_inputs(line, allow_pipes)
    return rows
