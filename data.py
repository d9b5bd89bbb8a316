"""From utterances (recordings or synthetic speech) to padded batches of features and token ids.

Each section uses only what stands above it: utterances -> toy data -> recordings -> batches.
Needs torch, numpy, audio.py, augment.py, manifests.py and survival.py. Functions take `options`, any object with the
attributes of the config's data section, and datasets take `encode`, any function from text to ids. Bad input is a
ValueError that names the place; a bad recording in a manifest is a `Skip`.

Dims: N samples, T frames, F feature bins (num_mels * lfr_m), U tokens, B utterances.
"""
import contextlib
import functools
import itertools
import math
import os
import resource
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from augment import add_noise, generator, mix, reverberate, spec_augment
from audio import (FRAME_SEC, Part, SHIFT_SEC, audio_seconds, choose_channel, frontend, normalise, num_frames,
                   open_recording, read_samples, resample)
from manifests import Manifest, Row, find_manifests, printable, run_pipe, scan_rows
from survival import leave_signals_to_parent


# ---- utterances ----

class Utterance(NamedTuple):
    key: str
    feats: Tensor                   # (T,F) float32
    tokens: Tensor                  # (U,) int64
    text: str
    boundaries: Tensor | None       # (U+1,) float32: the true token boundaries in frames, where they are known
    seconds: float                  # of the recording, before augmentation


class Skip(NamedTuple):
    key: str
    reason: str


class Unusable(Exception):
    """Why a recording is skipped."""


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """A ValueError inside the block is raised again with the place before it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def address(item: int | tuple[int, int], size: int) -> tuple[int, int]:
    """The item of dataset[index] or dataset[epoch, index] -> (epoch, index). Raises IndexError, which ends a `for`."""
    epoch, index = item if isinstance(item, tuple) else (0, item)
    if not 0 <= index < size:
        raise IndexError(f"index {index} of a dataset of {size}")
    return epoch, index


# ---- toy data ----

TOY_STEPS = 64          # positions at which a symbol's trajectory is tabulated
TOY_DIP = 2.0           # natural log: how much weaker a symbol is at its ends than in its middle


def random_trajectory(num_mels: int, rng: np.random.Generator) -> np.ndarray:
    """Three formants that glide in place and strength under an envelope: (TOY_STEPS, num_mels) float32."""
    places = rng.uniform([0.05, 0.3, 0.6], [0.4, 0.7, 0.95], (2, 3))    # of the formants at the start and at the end
    strengths = rng.uniform(1.5, 4.0, (2, 3))
    glide = np.linspace(0, 1, TOY_STEPS)[:, None]                       # (TOY_STEPS, 1)
    place = (1 - glide) * places[0] + glide * places[1]                 # (TOY_STEPS, 3)
    strength = (1 - glide) * strengths[0] + glide * strengths[1]
    distance = np.linspace(0, 1, num_mels) - place[..., None]           # (TOY_STEPS, 3, num_mels)
    bumps = strength[..., None] * np.exp(-0.5 * (distance / 0.05) ** 2)
    return (bumps.sum(1) - TOY_DIP * (2 * glide - 1) ** 2).astype(np.float32)


@functools.lru_cache(maxsize=4)
def toy_inventory(num_symbols: int, num_mels: int) -> np.ndarray:
    """Spectral trajectories (num_symbols, TOY_STEPS, num_mels) float32, the same for every seed.
    Symbols 2k and 2k+1 are time reversals of each other: the same frames in another order, so single frames cannot
    tell them apart. Each pair is, of 32 random ones, the farthest from those before it and from its own reversal."""
    rng = np.random.default_rng(2206)
    chosen: list[np.ndarray] = []
    while len(chosen) < num_symbols:
        farthest = -math.inf
        for _ in range(32):
            drawn = random_trajectory(num_mels, rng)
            nearest = min(np.square(drawn - other).mean() for other in [drawn[::-1], *chosen])
            if nearest > farthest:
                best = drawn
                farthest = nearest
        chosen += [best, best[::-1]]
    return np.stack(chosen[:num_symbols])


def toy_letter(symbol: int) -> str:
    """a..z, then CJK ideographs: letters without case, so that text normalisation keeps them apart."""
    return chr(ord("a") + symbol) if symbol < 26 else chr(0x4E00 + symbol - 26)


def toy_features(symbols: np.ndarray, durations: np.ndarray, options, rng: np.random.Generator) -> np.ndarray:
    """symbols (U,), durations (U,) frames -> (T, num_mels) float32, natural-log energies above a floor around 0."""
    if symbols.ndim != 1 or symbols.shape != durations.shape or len(symbols) == 0:
        raise ValueError(f"symbols and durations must be (U,), U >= 1, got {symbols.shape} and {durations.shape}")
    toy = options.toy
    inventory = toy_inventory(toy.num_symbols, options.num_mels)
    ends = durations.cumsum()
    starts = ends - durations
    t = np.arange(ends[-1]) + 0.5                               # (T,) middles of the frames
    here = np.repeat(np.arange(len(symbols)), durations)        # (T,) position in the text
    late = t > (starts[here] + ends[here]) / 2                  # the nearer neighbour is the next symbol
    there = np.clip(here + np.where(late, 1, -1), 0, len(symbols) - 1)
    distance = np.where(late, ends[here] - t, t - starts[here])     # to the boundary with that neighbour
    share = np.clip(0.5 + distance / max(toy.blend_frames, 1e-6), 0, 1).astype(np.float32)[:, None]

    def trajectory(at: np.ndarray) -> np.ndarray:
        position = np.clip((t - starts[at]) / durations[at], 0, 1)
        return inventory[symbols[at], np.rint(position * (TOY_STEPS - 1)).astype(np.int64)]     # (T, num_mels)

    tilt = rng.normal(0, toy.gain_std) + rng.normal(0, toy.tilt_std) * np.linspace(-0.5, 0.5, options.num_mels)
    noise = np.float32(toy.noise) * rng.standard_normal((len(t), options.num_mels), np.float32)
    return share * trajectory(here) + (1 - share) * trajectory(there) + tilt.astype(np.float32) + noise


@dataclass(eq=False)
class ToySeq2SeqDataset(Dataset):
    """Synthetic speech-like features: index -> Utterance, a pure function of (seed, index).
    A text of random symbols, each a trajectory of `toy_inventory` stretched to its duration (in every text of two or
    more, one lasts min_frames and one at least three times that), neighbours cross-faded over blend_frames around the
    true boundaries; loudness and spectral tilt drawn per utterance, white noise on top."""

    num_utterances: int
    options: Any                            # reads num_mels, toy and augment
    encode: Callable[[str], list[int]]
    seed: int = 0
    augment: bool = False                   # adds SpecAugment, which in dataset[epoch, index] depends on the epoch too
    stats: Tensor | None = None             # (2,F), to normalise by

    def __len__(self) -> int:
        return self.num_utterances

    @property
    def keys(self) -> list[str]:
        return [f"toy_{self.seed}_{index}" for index in range(len(self))]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([self._plan(index)[1].sum() for index in range(len(self))], np.int64)

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Frames of every utterance, without making them; the same in every epoch."""
        return self._lengths

    def _plan(self, index: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """-> symbols (U,), durations (U,) in frames, and the generator that goes on to draw the rest."""
        toy = self.options.toy
        rng = generator(self.seed, 0, index)
        U = rng.integers(toy.min_symbols, toy.max_symbols + 1)
        symbols = rng.integers(toy.num_symbols, size=U)
        durations = np.rint(np.exp(rng.uniform(*np.log([toy.min_frames, toy.max_frames]), U))).astype(np.int64)
        if U > 1:
            short, long = rng.choice(U, 2, replace=False)
            durations[short] = toy.min_frames
            durations[long] = rng.integers(3 * toy.min_frames, toy.max_frames + 1)
        return symbols, durations, rng

    def __getitem__(self, item: int | tuple[int, int]) -> Utterance:
        epoch, index = address(item, len(self))
        symbols, durations, rng = self._plan(index)
        feats = torch.from_numpy(toy_features(symbols, durations, self.options, rng))
        feats = feats if self.stats is None else normalise(feats, self.stats)
        if self.augment:
            feats = spec_augment(feats, self.options, generator(self.seed, epoch, index))
        text = "".join(map(toy_letter, symbols))
        boundaries = torch.tensor([0, *durations.cumsum()], dtype=torch.float32)
        return Utterance(f"toy_{self.seed}_{index}", feats, torch.tensor(self.encode(text), dtype=torch.int64), text,
                         boundaries, len(feats) * SHIFT_SEC)


# ---- recordings ----

def part_of(row: Row) -> Part:
    """What a row asks to be read; of a pipe, what it writes now. Raises as run_pipe."""
    recording = row.audio if row.folder is None else run_pipe(row.audio, row.folder)
    return Part(recording, row.offset, row.duration)


@contextlib.contextmanager
def unusable(path: str) -> Iterator[None]:
    """What goes wrong with the recording inside the block is raised as Unusable."""
    try:
        yield
    except FileNotFoundError:
        raise Unusable(f"missing: {path}") from None
    except (OSError, ValueError) as error:
        raise Unusable(f"unreadable: {error}") from None


class Surroundings(NamedTuple):
    """Recordings for augmentation; None = none."""
    noises: Manifest | None = None
    rooms: Manifest | None = None       # impulse responses


RESPONSE_SEC = 10       # the longest impulse response: beyond, it is something else


def open_surroundings(augment) -> Surroundings:
    """What options.augment names. Raises ValueError that names the field."""
    manifests = []
    for field in ("noise", "reverb"):
        path = getattr(augment, field)
        with naming(f"data.augment.{field}"):
            manifests.append(Manifest(path) if path else None)
            if path and not len(manifests[-1]):
                raise ValueError(f"wanted recordings, got none in {path}")
    return Surroundings(*manifests)


def read_noise(row: Row, seconds: float, rate_hz: int, rng: np.random.Generator) -> Tensor:
    """At most so many seconds of a recording, from a random place on -> (N,) at rate_hz. Raises Unusable."""
    with unusable(row.audio), open_recording(part_of(row)) as (file, header):
        if not header.num_samples:
            raise ValueError("wanted samples, got none")
        count = min(header.num_samples, math.ceil(seconds * header.rate_hz))
        start = int(rng.integers(header.num_samples - count + 1))
        return resample(read_samples(file, header, start, start + count), header.rate_hz, rate_hz)


def read_response(row: Row, rate_hz: int) -> Tensor:
    """The impulse response of a room -> (N,) at rate_hz. Raises Unusable."""
    with unusable(row.audio), open_recording(part_of(row)) as (file, header):
        seconds = header.num_samples / header.rate_hz
        if seconds > RESPONSE_SEC:
            raise ValueError(f"wanted an impulse response of at most {RESPONSE_SEC} s, got {seconds:.3f}")
        response = resample(read_samples(file, header), header.rate_hz, rate_hz)
        if not response.any():
            raise ValueError("wanted an impulse response, got silence")
        return response


@dataclass(eq=False)
class ManifestDataset(Dataset):
    """Recordings of a manifest: [epoch, index] (or index, epoch 0) -> Utterance, or Skip that says why not.
    Skipped: no text, no audio, missing, unreadable, empty, shorter than min_sec or one window, longer than max_sec,
    more tokens than T // frames_per_token. With for_training=False only a recording that cannot be read is skipped; no
    text is needed, and one shorter than a window, or longer than whole_sec (which is not read), has T == 0."""

    source: InitVar[str | os.PathLike | list[Row]]      # manifests as in find_manifests, or rows
    options: Any
    encode: Callable[[str], list[int]]
    seed: int = 0
    augment: bool = False           # speed, room, noise, SpecAugment: pure functions of (seed, epoch, index and key)
    surroundings: Surroundings = Surroundings()         # to draw noises and rooms from
    stats: Tensor | None = None     # (2,F), to normalise by
    frames_per_token: int = 1       # feature frames that a token needs: the encoder's subsampling
    for_training: bool = True
    whole_sec: float = math.inf

    def __post_init__(self, source: str | os.PathLike | list[Row]):
        self.rows = source if isinstance(source, list) else Manifest(source)
        if self.for_training:
            self.whole_sec = self.options.max_sec

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> list[str]:
        return [row.key for row in self.rows]

    @functools.cached_property
    def durations(self) -> np.ndarray:
        """Seconds of every part: as the manifest says, else by the header, file by file; 0 if that has none."""
        given = [row.duration for row in self.rows] if isinstance(self.rows, list) else self.rows.index["seconds"]
        seconds = np.array(given, np.float64)       # None becomes NaN
        for index in np.flatnonzero(np.isnan(seconds)):
            with contextlib.suppress(ValueError):       # of a pipe that fails, which reading it will name
                seconds[index] = audio_seconds(part_of(self.rows[index]))
        return np.nan_to_num(seconds)

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Frames of every utterance, estimated from `durations`; with `augment`, at the speeds of that epoch."""
        if not self.augment:
            return num_frames(self.durations, self.options)
        speeds = np.fromiter((self._speed(epoch, index)[0] for index in range(len(self))), np.float64)
        return num_frames(self.durations / speeds, self.options)

    def _speed(self, epoch: int, index: int) -> tuple[float, np.random.Generator]:
        """The speed at which it is played, and the generator that goes on to draw the rest."""
        rng = generator(self.seed, epoch, index)
        speeds = self.options.augment.speeds
        return float(speeds[rng.integers(len(speeds))]) if self.augment else 1.0, rng

    def __getitem__(self, item: int | tuple[int, int]) -> Utterance | Skip:
        epoch, index = address(item, len(self))
        row = self.rows[index]
        try:
            samples, rate_hz, seconds = self._read(row)
            feats = self._features(samples, rate_hz, epoch, index, row.key)
            tokens = self._tokens(row.text, len(feats))
        except Unusable as reason:
            return Skip(row.key, printable(str(reason)))
        return Utterance(row.key, feats, tokens, row.text, None, seconds)

    def _read(self, row: Row) -> tuple[Tensor, int, float]:
        """-> samples (N,), their rate in Hz, and the recording's seconds. Raises Unusable."""
        if self.for_training and not row.text.strip():
            raise Unusable("no text")
        if not row.audio:
            raise Unusable("no audio: wav.scp has no line for it")
        samples = torch.zeros(0)
        with unusable(row.audio), open_recording(part_of(row)) as (file, header):
            seconds = header.num_samples / header.rate_hz
            if seconds <= self.whole_sec:
                samples = read_samples(file, choose_channel(file, header, row.audio))
        shortest = max(self.options.min_sec, FRAME_SEC)
        longest = self.options.max_sec
        if self.for_training and not shortest <= seconds <= longest:
            found = "too short" if seconds < shortest else "too long"
            raise Unusable(f"{found if seconds else 'empty'}: {seconds:.3f} s, wanted {shortest} to {longest}")
        return samples, header.rate_hz, seconds

    def _features(self, samples: Tensor, rate_hz: int, epoch: int, index: int, key: str) -> Tensor:
        """samples (N,) -> features (T,F), augmented if the dataset is. Raises Unusable if they are not finite."""
        options = self.options
        speed, rng = self._speed(epoch, index)
        if self.augment and (options.augment.snr_db or self.surroundings.rooms):
            samples = resample(samples, rate_hz, options.sample_rate)
            rate_hz = options.sample_rate
            samples = self._surround(samples, generator(self.seed, epoch, zlib.crc32(key.encode())), rng)
        feats = frontend(samples, round(rate_hz * speed), options, self.stats)      # a higher rate plays faster
        if not feats.isfinite().all():
            raise Unusable("features not finite: are the samples of a float WAV far beyond 1?")
        return spec_augment(feats, options, rng) if self.augment else feats

    def _surround(self, samples: Tensor, drawn: np.random.Generator, rng: np.random.Generator) -> Tensor:
        """samples (N,) -> in a room and with noise, both recorded and of `drawn`; or with synthetic noise of rng."""
        rate_hz = self.options.sample_rate
        augment = self.options.augment
        noises, rooms = self.surroundings
        if rooms and drawn.random() < augment.reverb_share:
            room = rooms[int(drawn.integers(len(rooms)))]
            samples = reverberate(samples, read_response(room, rate_hz))
        if noises:
            row = noises[int(drawn.integers(len(noises)))]
            noise = read_noise(row, len(samples) / rate_hz, rate_hz, drawn)
            return mix(samples, noise, drawn.uniform(*augment.snr_db))
        return add_noise(samples, augment.snr_db, rng) if augment.snr_db else samples

    def _tokens(self, text: str, num_frames: int) -> Tensor:
        """-> (U,) int64. Raises Unusable if the frames cannot hold them."""
        tokens = torch.tensor(self.encode(text), dtype=torch.int64)
        room = num_frames // self.frames_per_token
        if self.for_training and len(tokens) > room:
            raise Unusable(f"text too long: {len(tokens)} tokens, {num_frames} frames hold at most {room}")
        return tokens


def training_texts(options) -> Iterator[str]:
    """The texts that a tokenizer is built from: those of the training manifests, or every letter of the toy task."""
    if options.kind == "toy":
        yield from map(toy_letter, range(options.toy.num_symbols))
        return
    with naming("data.train"):
        for path in find_manifests(options.train):
            yield from (row.text for _, row in scan_rows(path))


def open_dataset(options, split: str, encode: Callable[[str], list[int]], seed: int = 0, stats: Tensor | None = None,
                 frames_per_token: int = 1, augment: bool = False) -> Dataset:
    """The dataset of a split (train, dev, test), of options.kind. Toy data differ between all splits and seeds.
    options.train, dev, test: as in find_manifests; dev or test "" is the training manifest. Errors name the field."""
    if options.kind == "toy":
        size = options.toy.num_train if split == "train" else options.toy.num_dev
        split_seed = 3 * seed + ("train", "dev", "test").index(split)
        return ToySeq2SeqDataset(size, options, encode, split_seed, augment, stats)
    field = split if getattr(options, split) else "train"
    surroundings = open_surroundings(options.augment) if augment else Surroundings()
    with naming(f"data.{field}"):
        return ManifestDataset(getattr(options, field), options, encode, seed, augment, surroundings, stats,
                               frames_per_token)


def check_usable(dataset: Dataset, place: str) -> None:
    """Raises ValueError, with the first three reasons, if every item is skipped; looks up to the first that is not."""
    reasons = []
    for item in dataset:
        if isinstance(item, Utterance):
            return
        if len(reasons) < 3:
            reasons.append(f"{item.key}: {item.reason}")
    raise ValueError(f"{place}: wanted recordings to use, got none: skipped {len(dataset)} of {len(dataset)}; "
                     f"{'; '.join(reasons)}")


# ---- batches ----

LENGTH_JITTER = 0.05        # relative: sorting by jittered lengths makes other batches in every epoch


class Batch(NamedTuple):
    keys: list[str]
    feats: Tensor                       # (B,T,F) float32, padded with 0 after normalisation
    feat_lens: Tensor                   # (B,) int64
    tokens: Tensor                      # (B,U) int64, padded with 0
    token_lens: Tensor                  # (B,) int64
    texts: list[str]
    skipped: list[Skip]                 # not among the B


def make_batches(lengths: np.ndarray, batch_size: int, batch_frames: int, seed: int = 0, epoch: int = 0,
                 shuffle: bool = True) -> list[list[int]]:
    """lengths (n,) frames -> batches of indices, each index once, of similar lengths; decided by (seed, epoch).
    At most batch_size utterances and batch_frames padded frames in each; one longer than that is a batch of its own.
    With shuffle the lengths are jittered before sorting and the batches shuffled. Without, they are in order of length,
    and at most a tenth of a batch is padding."""
    if batch_size < 1 or batch_frames < 1:
        raise ValueError(f"batch_size and batch_frames must be 1 or more, got {batch_size} and {batch_frames}")
    lengths = np.asarray(lengths, np.int64)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (number of utterances,), got {lengths.shape}")
    rng = np.random.default_rng((seed, epoch))
    if shuffle:
        order = np.argsort(lengths * rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(lengths)), kind="stable")
    else:
        order = np.argsort(lengths, kind="stable")
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = total = 0             # frames of the batch
    for index in order.tolist():
        length = int(lengths[index])
        padded = (len(batch) + 1) * max(longest, length)
        full = len(batch) == batch_size or padded > batch_frames
        wasteful = not shuffle and total + length < 0.9 * padded
        if batch and (full or wasteful):
            batches.append(batch)
            batch = []
            longest = total = 0
        batch.append(index)
        longest = max(longest, length)
        total += length
    if batch:
        batches.append(batch)
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches


def collate(items: list[Utterance | Skip]) -> Batch:
    """Utterances -> one padded Batch; Skips go to `skipped`. Skips alone give a batch with B == 0.
    Raises ValueError unless the features are (T,F) of one F, and the tokens (U,)."""
    kept = [item for item in items if isinstance(item, Utterance)]
    skipped = [item for item in items if isinstance(item, Skip)]
    shapes = [(tuple(u.feats.shape), tuple(u.tokens.shape)) for u in kept]
    for feats_shape, tokens_shape in shapes:
        if len(feats_shape) != 2 or feats_shape[1:] != shapes[0][0][1:] or len(tokens_shape) != 1:
            raise ValueError(f"feats must be (T,F) of one width and tokens (U,), got {shapes}")
    feats = torch.zeros(0, 0, 0)
    tokens = torch.zeros(0, 0, dtype=torch.int64)
    if kept:
        feats = pad_sequence([u.feats for u in kept], batch_first=True)
        tokens = pad_sequence([u.tokens for u in kept], batch_first=True)
    feat_lens = torch.tensor([len(u.feats) for u in kept], dtype=torch.int64)
    token_lens = torch.tensor([len(u.tokens) for u in kept], dtype=torch.int64)
    return Batch([u.key for u in kept], feats, feat_lens, tokens, token_lens, [u.text for u in kept], skipped)


FILES_OF_A_LOADER = 12      # that a process has open for two batches, a tensor being one, and its queues
OTHER_FILES = 64


def begin_worker(epoch: int, worker: int) -> None:
    leave_signals_to_parent(worker)
    if epoch:       # a recording's warning has been said in epoch 0
        warnings.simplefilter("ignore")


def loader(dataset: Dataset, batches: list[list[int]], epoch: int = 0, num_workers: int = 0,
           start: int = 0) -> Iterable[Batch]:
    """The batches from number `start` on, once, in order, the same for every num_workers; each worker loads two batches
    ahead. With a generator of its own, so that torch's global one stays untouched. Raises ValueError where loader
    processes would find no file free to open and the run would wait for them for ever."""
    wanted = OTHER_FILES + FILES_OF_A_LOADER * num_workers
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_workers and 0 <= most < wanted:  # -1: without a limit
        raise ValueError(f"data.num_workers: wanted {wanted} open files or more for {num_workers} processes, got {most}"
                         f" (ulimit -n); try ulimit -n {wanted}, or data.num_workers=0")

    def addresses() -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.islice(batches, start, None):
            yield [(epoch, index) for index in batch]

    return DataLoader(dataset, batch_sampler=addresses(), num_workers=num_workers, collate_fn=collate,
                      generator=torch.Generator(), worker_init_fn=functools.partial(begin_worker, epoch))
