"""Public corpora and folders of recordings to manifests: python corpora.py COMMAND SOURCE OUT

    python corpora.py folder my_recordings runs/data/mine       name.wav beside name.txt, at any depth
    python corpora.py --help                                    the public corpora that it knows

A manifest is JSON lines with audio, text, speaker, key and duration, one file for each split.
Needs numpy, torch, files.py, audio.py, commandline.py, data.py and manifests.py with what these need.
"""
import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from audio import Part, audio_seconds, load_wav, resample, save_wav
from commandline import Parser, path_text
from data import generator
from files import replacing, write_atomic
from manifests import LeftOut, RECORDINGS, find_recordings, left_out_lines, read_table, run_pipe, scan_kaldi, scan_lines


# ---- corpora ----

DIGITS = "zero one two three four five six seven eight nine".split()
SPLITS = ("train", "dev", "test", "unseen_speaker")     # parts of one set of recordings, by seed and options


def manifest_row(out: Path, audio: Path, text: str, speaker: str = "") -> dict:
    """A line of a manifest in `out`. A recording that cannot be read gets no duration; the dataset will skip it."""
    seconds = audio_seconds(audio)
    path = os.path.relpath(audio.parent.resolve() / audio.name, out.resolve())      # `..` of a link is in its target
    row = {"audio": path, "text": " ".join(text.split()), "speaker": speaker, "key": audio.stem}
    if seconds is not None:
        row["duration"] = round(seconds, 4)
    return row


def show_length(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def write_manifests(rows: Iterable[tuple[str, dict] | LeftOut], out: Path) -> None:
    """(split, row) pairs -> out/<split>.jsonl, each written whole or not at all. What is left out, as without text, is
    counted and named. A manifest of one of SPLITS that has no rows now, left by another run, stays, with a warning."""
    splits: dict[str, list[dict]] = {}
    left_out: list[LeftOut] = []
    for item in rows:
        if isinstance(item, LeftOut):
            left_out.append(item)
        elif item[1]["text"]:
            splits.setdefault(item[0], []).append(item[1])
        else:
            left_out.append(LeftOut(item[1]["audio"], "without text"))
    told = left_out_lines(left_out)
    if not splits:
        raise ValueError("; ".join([f"{out}: wanted recordings to list, got none: is it the right folder and layout?",
                                    *told]))
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = out / f"{split}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(path, lines.encode(errors="backslashreplace"))     # a file name that is not UTF-8: \udcff
        print(f"{path}: {len(rows)} utterances, {show_length(sum(row.get('duration', 0.0) for row in rows))}")
        unread = [row["audio"] for row in rows if "duration" not in row]
        if unread:
            print(f"{path}: {len(unread)} of them cannot be read and will be skipped: {', '.join(unread[:3])}")
    for line in told:
        print(line)
    for split in SPLITS:
        path = out / f"{split}.jsonl"
        if split not in splits and path.exists():
            print(f"corpora.py: {path}: not of this run, whose manifests may list the same recordings", file=sys.stderr)


def join_digits(recordings: list[np.ndarray], rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """Recordings (n,) each -> one utterance (N,): edges faded over 5 ms, gaps of 60 to 250 ms, gains of deviation 2 dB
    each and -9 to 3 dB overall, and low-pass noise of -65 to -45 dBFS."""
    fade = rate_hz // 200
    ramp = np.sin(0.5 * np.pi * (np.arange(fade) + 0.5) / fade) ** 2
    first, *gaps = [np.zeros(int(rate_hz * gap_sec)) for gap_sec in rng.uniform(0.06, 0.25, len(recordings) + 1)]
    pieces = [first]
    for recording, gap in zip(recordings, gaps):
        envelope = np.concatenate([ramp, np.ones(max(0, len(recording) - 2 * fade)), ramp[::-1]])[:len(recording)]
        pieces += [recording * envelope * 10 ** (rng.normal(0, 2) / 20), gap]
    x = np.concatenate(pieces) * 10 ** (rng.uniform(-9, 3) / 20)
    colour = rng.uniform(0, 0.9) ** np.arange(24)
    hiss = np.convolve(rng.standard_normal(len(x) + 23), colour / np.linalg.norm(colour), "valid")
    return x + hiss * 10 ** (rng.uniform(-65, -45) / 20)


def pool_digits(folder: Path, hold_out: str) -> dict[str, dict[str, list[Path]]]:
    """The recordings <digit>_<speaker>_<index>.wav of a folder -> {split: {speaker: paths}}, every one of SPLITS."""
    pools: dict[str, dict[str, list[Path]]] = {split: {} for split in SPLITS}
    for path in sorted(folder.glob("[0-9]_*_*.wav")):
        name = re.fullmatch(r"\d_(.+)_(\d+)", path.stem)
        if not name:
            raise ValueError(f"{path}: wanted <digit>_<speaker>_<index>.wav")
        speaker = name[1]
        index = int(name[2])
        if speaker == hold_out:
            split = "unseen_speaker"
        elif index < 5:
            split = "test"
        else:
            split = "dev" if index < 10 else "train"
        pools[split].setdefault(speaker, []).append(path)
    if hold_out and not pools["unseen_speaker"]:
        raise ValueError(f"{folder}: wanted <digit>_{hold_out}_<index>.wav for --hold-out-speaker, got none")
    return pools


def compose(speakers: dict[str, list[Path]], audio: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Write three to seven digits of one speaker to `audio` -> text, speaker."""
    speaker = str(rng.choice(sorted(speakers)))
    pool = speakers[speaker]
    picks = [pool[i] for i in rng.integers(len(pool), size=rng.integers(3, 8))]
    loaded = [load_wav(path) for path in picks]
    rate_hz = loaded[0][1]
    recordings = [resample(samples, own_hz, rate_hz).numpy() for samples, own_hz in loaded]
    with replacing(audio) as path:
        save_wav(path, join_digits(recordings, rate_hz, rng), rate_hz)
    return " ".join(DIGITS[int(path.name[0])] for path in picks), speaker


def prepare_fsdd(options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Connected digits, composed of recordings <digit>_<speaker>_<index>.wav -> rows.
    Indices 0-4 are the corpus's test recordings, 5-9 make dev, the rest train; a held-out speaker is unseen_speaker."""
    if min(options.utterances) < 0:
        raise ValueError(f"--utterances: wanted 0 or more each, got {options.utterances}")
    folder = options.source / "recordings"
    pools = pool_digits(folder if folder.is_dir() else options.source, options.hold_out_speaker)
    for number, split in enumerate(SPLITS):
        target = options.out / "wav" / split
        target.mkdir(parents=True, exist_ok=True)
        if not pools[split]:
            continue
        (options.out / f"{split}.jsonl").unlink(missing_ok=True)        # of another run, whose recordings are replaced
        for i in range(options.utterances[number]):
            audio = target / f"{split}_{i:04d}.wav"
            text, speaker = compose(pools[split], audio, generator(options.seed, number, i))
            yield split, manifest_row(options.out, audio, text, speaker)


def prepare_librispeech(options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """<split>/<speaker>/<chapter>/*.trans.txt, lines `key TEXT`, beside <key>.flac."""
    for table in sorted(options.source.glob("*/*/*/*.trans.txt")):
        split, speaker = table.relative_to(options.source).parts[:2]
        for key, (text, _) in read_table(table).items():
            yield split, manifest_row(options.out, table.parent / f"{key}.flac", text, speaker)


def prepare_aishell(options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """wav/<split>/<speaker>/<key>.wav and transcript/aishell_transcript_v0.8.txt, without its spaces."""
    texts = read_table(options.source / "transcript" / "aishell_transcript_v0.8.txt")
    for audio in sorted(options.source.glob("wav/*/*/*.wav")):
        text = texts.get(audio.stem, ("",))[0]
        yield audio.parts[-3], manifest_row(options.out, audio, "".join(text.split()), audio.parts[-2])


def find_text(audio: Path) -> str | LeftOut:
    """The text beside a recording, its lines joined."""
    tables = [table for table in map(audio.with_suffix, (".txt", ".TXT")) if table.is_file()]
    if not tables:
        return LeftOut(str(audio), "no text beside it")
    if not tables[0].samefile(tables[-1]):      # one file of both names: capitals do not count on that disk
        return LeftOut(str(audio), "two texts beside it, .txt and .TXT")
    try:
        text = " ".join(line for *_, line in scan_lines(tables[0]))
    except ValueError:
        return LeftOut(str(tables[0]), "not UTF-8")
    return text or LeftOut(str(audio), "an empty text beside it")


def find_pairs(folder: Path) -> tuple[list[tuple[Path, str]], list[LeftOut]]:
    """(recording, text) of each recording in a folder that has a text beside it, and what is left out. Of recordings
    of one name, such as a.wav and a.mp3, the first in RECORDINGS is taken: two splits must not share one."""
    recordings, left_out = find_recordings(folder)
    chosen: dict[str, Path] = {}
    for audio in sorted(recordings, key=lambda path: RECORDINGS.index(path.suffix.lower())):
        stem = str(audio.with_suffix(""))
        if stem in chosen:
            left_out.append(LeftOut(str(audio), "of the name of another recording"))
        chosen.setdefault(stem, audio)
    pairs = []
    for audio in sorted(chosen.values()):
        text = find_text(audio)
        if isinstance(text, LeftOut):
            left_out.append(text)
        else:
            pairs.append((audio, text))
    return pairs, left_out


def prepare_folder(options: argparse.Namespace) -> Iterator[tuple[str, dict] | LeftOut]:
    """name.wav, or in another format, beside name.txt, at any depth, split at random into train, dev and test."""
    dev = options.dev_share
    test = options.test_share
    if not (min(dev, test) >= 0 and dev + test <= 1):       # `not`: refuses NaN too
        raise ValueError(f"--dev-share, --test-share: wanted 0 or more, together at most 1, got {dev} and {test}")
    pairs, left_out = find_pairs(options.source)
    yield from left_out
    num_dev = round(dev * len(pairs))
    num_test = round(test * len(pairs))
    for split, share, count in (("dev", dev, num_dev), ("test", test, num_test)):
        if share and not count:
            print(f"no {split}.jsonl: --{split}-share {share} of {len(pairs)} recordings is less than one")
    splits = ["dev"] * num_dev + ["test"] * num_test + ["train"] * len(pairs)
    order = generator(options.seed, 0, 0).permutation(len(pairs))
    for split, index in zip(splits, order):
        audio, text = pairs[index]
        yield split, manifest_row(options.out, audio, text)


def prepare_kaldi(options: argparse.Namespace) -> Iterator[tuple[str, dict] | LeftOut]:
    """A Kaldi folder with text, named after its split. What its pipes write, once each, goes into OUT/wav/<split>."""
    split = options.source.resolve().name
    folder = options.out / "wav" / split
    written: dict[str, Path] = {}
    for row in scan_kaldi(options.source, options.allow_pipes):
        if not row.audio:
            yield LeftOut(row.key, "no line in wav.scp")
            continue
        audio = Path(row.audio)
        if row.folder is not None:
            if row.audio not in written:
                folder.mkdir(parents=True, exist_ok=True)
                written[row.audio] = folder / f"{len(written):06}.wav"
                write_atomic(written[row.audio], run_pipe(row.audio, row.folder))
            audio = written[row.audio]
        line = manifest_row(options.out, audio, row.text) | {"key": row.key}
        if row.offset is not None:
            line["offset"] = row.offset
            line["duration"] = audio_seconds(Part(audio, row.offset, row.duration)) or row.duration
        yield split, line


def given_path(text: str) -> Path:
    return Path(path_text(text))


def build_parser() -> Parser:
    parser = Parser(
        prog="corpora.py", usage="python corpora.py COMMAND SOURCE OUT [options]      (COMMAND --help lists them)",
        description="Turn public corpora and folders of recordings into manifests (JSON lines with audio, text, "
        "speaker, key, duration), one for each split.")
    commands = parser.add_subparsers(prog="python corpora.py", metavar="COMMAND", required=True)

    def add(name: str, about: str, prepare: Callable) -> Parser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(prepare=prepare)
        command.add_argument("source", type=given_path, help="the corpus's folder")
        command.add_argument("out", type=given_path, help="folder for the manifests, made if need be")
        return command

    fsdd = add("fsdd", "free-spoken-digit-dataset: compose connected digits, its test recordings kept apart",
               prepare_fsdd)
    fsdd.add_argument("--hold-out-speaker", default="", metavar="NAME", help="keep out whole, as unseen_speaker")
    fsdd.add_argument("--utterances", type=int, nargs=4, default=[3000, 200, 300, 300],
                      metavar=("TRAIN", "DEV", "TEST", "UNSEEN"), help="how many of each (default 3000 200 300 300)")
    add("librispeech", "LibriSpeech folders <split>/<speaker>/<chapter> with .trans.txt and .flac", prepare_librispeech)
    add("aishell", "AISHELL-1: data_aishell with transcript/ and unpacked wav/<split>/<speaker>", prepare_aishell)
    folder = add("folder", "any folder of recordings, name.wav beside name.txt, at any depth", prepare_folder)
    folder.add_argument("--dev-share", type=float, default=0.1, help="share of recordings for dev (default 0.1)")
    folder.add_argument("--test-share", type=float, default=0.0, help="share of recordings for test (default 0)")
    kaldi = add("kaldi", "a Kaldi folder (wav.scp, text, perhaps segments), named after its split", prepare_kaldi)
    kaldi.add_argument("--allow-pipes", action="store_true", help="run the commands of wav.scp, such as `sox ... |`")
    for command in (fsdd, folder):
        command.add_argument("--seed", type=int, default=0, help="of everything random; the same seed, the same files")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    try:
        if "seed" in args and args.seed < 0:
            raise ValueError(f"--seed: wanted 0 or more, got {args.seed}")
        if not args.source.is_dir():
            raise ValueError(f"{args.source}: wanted the corpus's folder, got none of that name")
        write_manifests(args.prepare(args), args.out)
        return 0
    except KeyboardInterrupt:
        print(f"corpora.py: stopped before {args.out} had all its manifests", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"corpora.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
