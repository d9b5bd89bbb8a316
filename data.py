"""From recordings (or synthetic speech) to padded batches of features and token ids.

The sections follow the signal, and each uses only what stands above it, so the file can be cut after any of them:
files, wav -> resampling -> segments -> features -> augmentation -> utterances -> toy data -> manifests -> batches
-> corpora.

`frontend` is the only way from samples to features, for training, decoding and serving. Needs torch and numpy, nothing
of ours: functions take `options`, any object with the attributes of the config's data section (sample_rate, num_mels,
lfr_m, ...), and datasets take `encode`, any function from text to ids. Bad input is a ValueError that names the place;
a bad recording in a manifest is a `Skip`.

    python data.py --help                the sub-commands that turn public corpora into manifests

Dims: N samples, T frames, F feature bins (num_mels * lfr_m), U tokens, B utterances. Samples are float32 in [-1,1),
energies natural logs. Sources: Kaldi's compute-fbank-feats (numbers), Smith's bandlimited interpolation (resampling),
SpecAugment (Park et al. 2019).
"""
import argparse
import contextlib
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


# ---- files ----

@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: yields a temporary path to write; it replaces `path` if the block ends without an error."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: str | bytes | memoryview) -> None:
    """Replace the file whole: a reader, or a crash, meets the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_atomic(path: str | os.PathLike, state: dict) -> None:
    """torch.save, replacing the file whole. Raises OSError for a full disk, which torch hides behind a RuntimeError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error


# ---- wav ----

class WavHeader(NamedTuple):
    code: int           # format tag: 1 = integers, 3 = floats
    bits: int           # of one sample of one channel
    channels: int
    rate_hz: int
    start: int          # byte where the samples begin
    num_samples: int    # of one channel


MAX_CHUNKS = 10000      # of a WAV file before its samples: a file of empty chunks must not keep a server busy
SAMPLE_TYPES = {    # (code, bits) -> numpy type, value of silence, full scale; 24 bits become the upper ones of 32
    (1, 8): ("u1", 128, 2.0 ** 7), (1, 16): ("<i2", 0, 2.0 ** 15), (1, 24): ("<i4", 0, 2.0 ** 31),
    (1, 32): ("<i4", 0, 2.0 ** 31), (3, 32): ("<f4", 0, 1.0), (3, 64): ("<f8", 0, 1.0)}


def parse_fmt(fmt: bytes) -> tuple[int, int, int, int]:
    """The 'fmt ' chunk -> code, bits, channels, rate_hz."""
    if len(fmt) < 16:
        raise ValueError(f"wanted a 'fmt ' chunk of 16 bytes or more before 'data', got {len(fmt)}")
    code, channels, rate_hz, _, _, bits = struct.unpack("<HHIIHH", fmt[:16])
    if code == 0xFFFE and len(fmt) >= 26:       # WAVE_FORMAT_EXTENSIBLE: the real code opens the sub-format
        code = int.from_bytes(fmt[24:26], "little")
    if channels < 1 or not 1000 <= rate_hz <= 1_000_000:
        raise ValueError(f"wanted one channel or more at 1000 to 1000000 Hz, got {channels} at {rate_hz} Hz")
    return code, bits, channels, rate_hz


def read_header(file: BinaryIO) -> WavHeader | None:
    """Walk the RIFF chunks of a seekable file; None if it is no WAV of SAMPLE_TYPES, ValueError if it is a broken one.

    Our own walk, because `wave` (Python 3.11) refuses float and WAVE_FORMAT_EXTENSIBLE, which recorders write for 24
    and 32 bits. Streaming writers leave a data size of 0, of 2^32-1 or past the end; it means "until the end".
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    head, fmt = file.read(12), b""
    if end == 0:
        raise ValueError("wanted a recording, got an empty file")
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    for _ in range(MAX_CHUNKS):
        if len(head := file.read(8)) < 8:
            break
        size, start = int.from_bytes(head[4:], "little"), file.tell()
        if head[:4] == b"fmt ":
            fmt = file.read(min(size, 40))
        elif head[:4] == b"data":
            code, bits, channels, rate_hz = parse_fmt(fmt)
            if (code, bits) not in SAMPLE_TYPES:
                return None
            num_samples = min(size or end, end - start) // (channels * bits // 8)
            return WavHeader(code, bits, channels, rate_hz, start, num_samples)
        file.seek(start + size + size % 2)      # chunks are padded to an even size
    raise ValueError(f"wanted a 'data' chunk among the first {MAX_CHUNKS}, got none")


def read_samples(file: BinaryIO, header: WavHeader, start: int = 0, stop: int | None = None) -> Tensor:
    """Samples start..stop-1, or all -> (N,) float32, channels averaged. ValueError if one is not finite."""
    size = header.channels * header.bits // 8
    stop = header.num_samples if stop is None else stop
    file.seek(header.start + start * size)
    x = np.frombuffer(file.read((stop - start) * size), np.uint8)
    if header.bits == 24:
        x = np.pad(x.reshape(-1, 3), ((0, 0), (1, 0)))
    kind, zero, full_scale = SAMPLE_TYPES[header.code, header.bits]
    x = (x.view(kind).astype(np.float64) - zero) / full_scale
    with np.errstate(over="ignore"):            # a float64 beyond float32 becomes infinite
        x = x.reshape(-1, header.channels).mean(1).astype(np.float32)
    if not np.isfinite(x).all():
        bad = int(np.argmin(np.isfinite(x)))
        raise ValueError(f"wanted finite samples, got {x[bad]} at sample {start + bad}")
    return torch.from_numpy(x)


def ffmpeg_to_wav(source: str | bytes) -> BinaryIO:
    """A recording, a path or a file's bytes, in any format that ffmpeg knows -> an unnamed temporary float WAV.

    A playlist cannot make ffmpeg open other files or URLs. Raises ValueError if ffmpeg is missing or fails.
    """
    if shutil.which("ffmpeg") is None:
        raise ValueError("wanted WAV (PCM 8/16/24/32 bit, float 32/64), got another format: that needs ffmpeg, "
                         "which is not installed")
    protocol, url = ("pipe", "pipe:0") if isinstance(source, bytes) else ("file", f"file:{source}")
    command = ["ffmpeg", "-v", "error", "-protocol_whitelist", protocol, "-i", url, "-vn", "-c:a", "pcm_f32le",
               "-f", "wav", "pipe:1"]
    converted = tempfile.TemporaryFile()
    done = subprocess.run(command, input=source if isinstance(source, bytes) else b"", stdout=converted,
                          stderr=subprocess.PIPE)
    if done.returncode:
        converted.close()
        raise ValueError(f"wanted a recording, ffmpeg says: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return converted


@contextlib.contextmanager
def open_recording(source: str | os.PathLike | bytes) -> Iterator[tuple[BinaryIO, WavHeader]]:
    """The WAV of a recording, from a path or a file's bytes, and its header.

    WAV with PCM 8/16/24/32 bits or float 32/64 is read here, every other format through ffmpeg where it is installed.
    A ValueError, also one that the block of the `with` raises, is prefixed with the path.
    """
    in_memory = isinstance(source, bytes)
    place = "<bytes>" if in_memory else str(source)
    try:
        with io.BytesIO(source) if in_memory else open(source, "rb") as file:
            if header := read_header(file):
                yield file, header
                return
        with ffmpeg_to_wav(source if in_memory else os.fspath(source)) as file:
            yield file, read_header(file)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def load_wav(source: str | os.PathLike | bytes) -> tuple[Tensor, int]:
    """A recording, from a path or a file's bytes -> samples (N,) float32 in [-1,1), channels averaged, and rate in Hz.

    Float samples are taken as they are, also beyond 1. Raises ValueError (place, wanted, got) or OSError.
    """
    with open_recording(source) as (file, header):
        return read_samples(file, header), header.rate_hz


def audio_seconds(path: str | os.PathLike) -> float | None:
    """Duration of a recording: of WAV and FLAC by their headers, of others by decoding; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(26)
        word = int.from_bytes(head[18:26], "big")       # FLAC STREAMINFO: 20 bits rate, 3 channels, 5 depth, 36 samples
        rate_hz, num_samples = word >> 44, word % 2**36
        if head[:4] == b"fLaC" and rate_hz and num_samples:
            return num_samples / rate_hz
        with open_recording(path) as (_, header):
            return header.num_samples / header.rate_hz
    except (OSError, ValueError):
        return None


def save_wav(path: str | os.PathLike, samples: Tensor | np.ndarray, rate_hz: int) -> None:
    """Write samples (N,) in [-1,1) as 16-bit mono WAV; values outside are clipped."""
    x = np.asarray(samples, np.float64)
    if x.ndim != 1:
        raise ValueError(f"samples must be (N,), got {x.shape}")
    with wave.open(os.fspath(path), "wb") as file:
        file.setparams((1, 2, rate_hz, 0, "NONE", ""))
        file.writeframes(np.clip(np.rint(x * 32768), -32768, 32767).astype("<i2").tobytes())


# ---- resampling ----

ZERO_CROSSINGS = 48     # of the sinc, on either side
ROLL_OFF = 0.945        # of the lower Nyquist frequency: middle of the transition from 0.89 (flat) to 1.0 (-80 dB)
KAISER_BETA = 7.857     # 0.1102 * (80 dB - 8.7), Kaiser's formula for the window's side lobes
PHASES = 64             # outputs of a period that are computed in one matrix product


@functools.lru_cache(maxsize=64)
def sinc_block(up: int, down: int, first: int, count: int) -> tuple[int, Tensor]:
    """Weights of outputs first..first+count-1 of a period, in which `down` inputs become `up` outputs.

    -> offset and weights (span, count) float32: out[p*up + first + c] = sum_i in[p*down + offset + i] * weights[i, c].
    """
    band = ROLL_OFF * min(1.0, up / down)               # cut-off, as a fraction of the input's Nyquist frequency
    half = ZERO_CROSSINGS / band                        # half the kernel's width, in input samples
    centres = (first + np.arange(count)) * (down / up)
    offset, stop = math.ceil(centres[0] - half), math.floor(centres[-1] + half) + 1
    t = np.arange(offset, stop)[:, None] - centres      # (span, count)
    window = np.i0(KAISER_BETA * np.sqrt(np.clip(1 - (t / half) ** 2, 0, None))) * (np.abs(t) <= half)
    weights = np.sinc(band * t) * window
    return offset, torch.from_numpy((weights / weights.sum(0)).astype(np.float32))      # a constant keeps its value


def check_samples(samples: Tensor) -> None:
    if samples.dim() != 1 or not samples.is_floating_point():
        raise ValueError(f"samples must be (N,) float, got {tuple(samples.shape)} {samples.dtype}")


def reach(up: int, down: int) -> int:
    """The most input samples that one output depends on, on either side."""
    return math.ceil(ZERO_CROSSINGS / ROLL_OFF * max(1.0, down / up)) + 1


def resample(samples: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """samples (N,) at rate_in Hz -> (ceil(N * rate_out / rate_in),) at rate_out Hz, by a Kaiser-windowed sinc.

    Zeros are assumed beyond the edges. Any two integer rates, in bounded memory: PHASES outputs of each period are one
    matrix product of at most 2^18 gathered samples with their block of weights. Raises ValueError for rates below 1.
    """
    check_samples(samples)
    if min(rate_in, rate_out) < 1:
        raise ValueError(f"rates must be positive Hz, got {rate_in} and {rate_out}")
    if rate_in == rate_out or len(samples) == 0:
        return samples
    up, down = Fraction(rate_out, rate_in).as_integer_ratio()
    num_out = -(-len(samples) * up // down)
    periods = -(-num_out // up)
    margin = reach(up, down)
    padded = torch.nn.functional.pad(samples.float(), (margin, margin + periods * down - len(samples)))
    out = padded.new_empty(periods, up)
    for first in range(0, min(up, num_out), PHASES):
        offset, weights = sinc_block(up, down, first, min(PHASES, up - first))
        frames = padded[margin + offset:].unfold(0, len(weights), down)[:periods]       # (periods, span), a view
        step = max(1, 2**18 // len(weights))
        for start in range(0, periods, step):
            out[start:start + step, first:first + PHASES] = frames[start:start + step] @ weights.to(samples.device)
    return out.view(-1)[:num_out]


CHUNK_SEC = 10          # of a recording are read and resampled at a time


def stream(source: str | os.PathLike | bytes, rate_hz: int) -> Iterator[Tensor]:
    """The samples that load_wav and resample make of a recording, in pieces, in constant memory. Raises as load_wav."""
    with open_recording(source) as (file, header):
        up, down = Fraction(rate_hz, header.rate_hz).as_integer_ratio()
        around = -(-reach(up, down) // down) * down         # whole periods of `down` inputs, as is `step`
        step = CHUNK_SEC * header.rate_hz
        for start in range(0, header.num_samples, step):
            first, stop = max(0, start - around), min(header.num_samples, start + step + around)
            piece = resample(read_samples(file, header, first, stop), header.rate_hz, rate_hz)
            skipped = (start - first) // down * up
            yield piece[skipped:skipped + step // down * up]


# ---- segments ----

LEVEL_SEC = 0.010       # from one level to the next
PAUSE_SEC = 0.4         # a pause of this length ends a segment, a shorter one only where there is none
FLOOR_PERCENT = 10      # the floor, i.e. the level of the background, is this percentile of the levels
QUIET_SHARE = 0.25      # quiet is what lies below this share of the way from the floor to the loudest level


class Segment(NamedTuple):
    start_sec: float                # from the start of the recording
    samples: Tensor                 # (n,) float32 at the model's rate


def levels(samples: Tensor, size: int) -> np.ndarray:
    """samples (N,) -> the power of each block of `size` samples, (ceil(N / size),) float32 in dBFS, at least -90."""
    padded = torch.nn.functional.pad(samples, (0, -len(samples) % size))
    return 10 * padded.view(-1, size).square().mean(1).clamp(1e-9, 1e9).log10().numpy()


def find_cut(level: np.ndarray, least: int, most: int) -> int:
    """How many levels a segment takes: level (n,) in dB, one per LEVEL_SEC -> n, or least..min(most, n - least).

    It ends in the middle of the first pause of PAUSE_SEC or more. Without one it takes all n if they are at most
    `most`; else it ends in the middle of the longest pause, or, without any, at the lowest level. A pause is a run of
    quiet levels after a sound (and before one, if n <= most: the recording ends here). Levels are smoothed over 50 ms.
    Quiet is relative to the floor and to the loudest level, so that the gain does not matter.
    """
    n, smooth = len(level), np.convolve(np.pad(level, 2, mode="edge"), np.full(5, 0.2), "valid")
    floor = np.percentile(smooth, FLOOR_PERCENT)
    quiet = smooth <= floor + QUIET_SHARE * (smooth.max() - floor)
    loud = np.flatnonzero(~quiet)
    quiet[:loud[0] if len(loud) else 0] = False
    quiet[loud[-1] if len(loud) and n <= most else n:] = False
    stop = max(least, min(most, n - least)) + 1
    edges = least + np.flatnonzero(np.diff(np.pad(quiet[least:stop], 1).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    long = np.flatnonzero(ends - starts >= PAUSE_SEC / LEVEL_SEC)
    if not len(long) and n <= most:
        return n
    if not len(starts):
        return least + int(smooth[least:stop].argmin())
    best = long[0] if len(long) else (ends - starts).argmax()
    return int(starts[best] + ends[best]) // 2


def cut_at_pauses(chunks: Iterable[Tensor], rate_hz: int, min_sec: float, max_sec: float) -> Iterator[Segment]:
    """Samples in pieces (n,) at rate_hz -> segments of min_sec to max_sec that hold every sample once, in order.

    A recording of at most max_sec is one segment; the last segment may fall short of min_sec by LEVEL_SEC. Looks ahead
    by max_sec + min_sec. Raises ValueError unless 0 < 2 * min_sec <= max_sec.
    """
    if not 0 < 2 * min_sec <= max_sec:
        raise ValueError(f"wanted segments of 0 < min_sec <= max_sec / 2 seconds, got {min_sec} and {max_sec}")
    size, whole = int(rate_hz * LEVEL_SEC), int(max_sec * rate_hz + 1e-6)      # 2.01 * 8000 is below 16080
    least, most = math.ceil(min_sec * rate_hz / size - 1e-6), whole // size
    chunks, held, start = iter(chunks), torch.zeros(0), 0
    while True:
        while len(held) < (least + most) * size and (chunk := next(chunks, None)) is not None:
            held = torch.cat([held, chunk])
        if not len(held):
            return
        level = levels(held[:(least + most) * size], size)
        end = len(held) if start == 0 and len(held) <= whole else find_cut(level, least, most) * size
        yield Segment(start / rate_hz, held[:end].clone())
        start, held = start + end, held[end:]


def segments(source: str | os.PathLike | bytes, options, min_sec: float, max_sec: float) -> Iterator[Segment]:
    """A recording, from a path or a file's bytes, cut at pauses; memory does not grow with it. Raises as load_wav."""
    return cut_at_pauses(stream(source, options.sample_rate), options.sample_rate, min_sec, max_sec)


# ---- features ----

FRAME_SEC, SHIFT_SEC = 0.025, 0.010
LOG_FLOOR = 2.0 ** -23          # float32 epsilon, Kaldi's floor
MIN_DEVIATION = 1e-3            # natural log: normalisation does not blow up a constant bin


def mel(hz: np.ndarray | float) -> np.ndarray:
    return 1127.0 * np.log1p(np.asarray(hz) / 700.0)


@functools.lru_cache(maxsize=16)
def mel_matrix(rate_hz: int, num_mels: int, fft_size: int) -> Tensor:
    """(fft_size/2 + 1, num_mels) float32: triangles equally spaced and computed on the mel scale, 20 Hz to Nyquist."""
    edges = np.linspace(mel(20.0), mel(rate_hz / 2), num_mels + 2)
    bins = mel(np.arange(fft_size // 2 + 1) * rate_hz / fft_size)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.clip(np.minimum(rise, fall), 0, None).astype(np.float32))


def fbank(samples: Tensor, rate_hz: int, num_mels: int) -> Tensor:
    """Log-mel filterbank with Kaldi's numbers: samples (N,) in [-1,1) -> (T, num_mels) float32, logs at 16-bit scale.

    Whole frames of 25 ms every 10 ms: T = 1 + (N - window) // shift, and 0 below one window. Per frame: mean removed,
    pre-emphasis 0.97, Hamming, zeros to a power of two, power spectrum, mel triangles, log. No dither, no energy.
    Source: equal to kaldi-native-fbank within 2e-3. FunASR differs below one window, where it shrinks the window.
    """
    check_samples(samples)
    window, shift = int(rate_hz * FRAME_SEC), int(rate_hz * SHIFT_SEC)
    if shift < 1 or num_mels < 1:
        raise ValueError(f"wanted rate_hz >= 100 and num_mels >= 1, got {rate_hz} and {num_mels}")
    if len(samples) < window:
        return torch.zeros(0, num_mels, device=samples.device)
    fft_size = 2 ** math.ceil(math.log2(window))
    mels = mel_matrix(rate_hz, num_mels, fft_size).to(samples.device)
    taper = torch.hamming_window(window, periodic=False, device=samples.device) * 32768
    blocks = []
    for frames in samples.float().unfold(0, window, shift).split(512):      # (t, window): blocks that fit the cache
        x = frames - frames.mean(1, keepdim=True)
        x = (x - 0.97 * torch.cat([x[:, :1], x[:, :-1]], 1)) * taper
        spectrum = torch.view_as_real(torch.fft.rfft(x, fft_size))          # (t, fft_size/2 + 1, 2)
        blocks.append((spectrum.square().sum(-1) @ mels).clamp_(min=LOG_FLOOR).log_())
    return torch.cat(blocks)


def lfr(feats: Tensor, m: int, n: int) -> Tensor:
    """Stack m frames every n frames (low frame rate).

    feats (T,F) -> (ceil(T/n), m*F), also for T == 0. Indices are clamped, so edge frames repeat, (m-1)//2 of them on
    the left. Source: Pundak & Sainath 2016; equal to FunASR's frontend.
    """
    if feats.dim() != 2 or m < 1 or n < 1:
        raise ValueError(f"feats must be (T,F) and m, n >= 1, got {tuple(feats.shape)}, m={m}, n={n}")
    T, F = feats.shape
    if m == n == 1:
        return feats
    index = torch.arange(0, T, n)[:, None] + torch.arange(m) - (m - 1) // 2         # (ceil(T/n), m)
    return feats[index.clamp(0, max(0, T - 1)).to(feats.device)].flatten(1)


def normalise(feats: Tensor, stats: Tensor) -> Tensor:
    """(feats - stats[0]) * stats[1]; feats (T,F), stats (2,F): mean and reciprocal deviation."""
    if feats.dim() != 2 or tuple(stats.shape) != (2, feats.shape[1]):
        raise ValueError(f"feats must be (T,F) and stats (2,F), got {tuple(feats.shape)} and {tuple(stats.shape)}")
    return (feats - stats[0]) * stats[1]


def compute_stats(features: Iterable[Tensor]) -> Tensor:
    """Mean and reciprocal deviation over all frames of arrays (T,F) -> (2,F) float32. ValueError if no frame came."""
    count, total, squares = 0, 0.0, 0.0
    for feats in features:
        if feats.dim() != 2 or count and feats.shape[1:] != total.shape:
            raise ValueError(f"feats must be (T,F) of one F, got {tuple(feats.shape)}")
        x = feats.double()      # float64: a million frames
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    if count == 0:
        raise ValueError("wanted feature frames to normalise by, got none: was every recording skipped?")
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=MIN_DEVIATION)
    return torch.stack([mean, 1 / deviation]).float()


def read_cmvn(path: str | os.PathLike, size: int) -> Tensor:
    """The normalisation in a Kaldi nnet text file (am.mvn): <AddShift> a, <Rescale> s -> (2,size) float32, -a and s.

    Raises ValueError that names the file.
    """
    try:
        text = Path(path).read_text("utf-8")
        shift, scale = [np.array(text[text.index(mark):].split("[", 1)[1].split("]", 1)[0].split(), np.float64)
                        for mark in ("<AddShift>", "<Rescale>")]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: wanted <AddShift> [ numbers ] and <Rescale> [ numbers ], got {error}") from None
    if not len(shift) == len(scale) == size:
        raise ValueError(f"{path}: wanted {size} numbers each, as the features have, got {len(shift)} and {len(scale)}")
    return torch.from_numpy(np.stack([-shift, scale])).float()


def write_cmvn(path: str | os.PathLike, stats: Tensor) -> None:
    """Write stats (2,F) as the Kaldi nnet text that read_cmvn reads, to the last bit."""
    if stats.dim() != 2 or len(stats) != 2:
        raise ValueError(f"stats must be (2,F), got {tuple(stats.shape)}")
    size = stats.shape[1]
    rows = [" ".join(f"{x:.9g}" for x in row) for row in torch.stack([-stats[0], stats[1]]).tolist()]
    lines = ["<Nnet>", f"<Splice> {size} {size}", "[ 0 ]",
             f"<AddShift> {size} {size}", f"<LearnRateCoef> 0 [ {rows[0]} ]",
             f"<Rescale> {size} {size}", f"<LearnRateCoef> 0 [ {rows[1]} ]", "</Nnet>", ""]
    write_atomic(path, "\n".join(lines))


def feature_dim(options) -> int:
    """F, the width of what `frontend` returns."""
    return options.num_mels * options.lfr_m


def frame_sec(options) -> float:
    """Seconds from one feature frame to the next, stacking included."""
    return SHIFT_SEC * options.lfr_n


def num_frames(seconds: np.ndarray, options) -> np.ndarray:
    """seconds (n,) -> frames (n,) int64 that `frontend` makes of them; one off where a duration was rounded."""
    samples = np.rint(seconds * options.sample_rate).astype(np.int64)
    window, shift = int(options.sample_rate * FRAME_SEC), int(options.sample_rate * SHIFT_SEC)
    return np.where(samples < window, 0, -(-(1 + (samples - window) // shift) // options.lfr_n))


def frontend(samples: Tensor, rate_hz: int, options, stats: Tensor | None = None) -> Tensor:
    """samples (N,) at any rate -> features (T, num_mels * lfr_m): resample, fbank, lfr and, with stats, normalise.

    T == 0 below one window of 25 ms. Reads options.sample_rate, num_mels, lfr_m, lfr_n.
    """
    feats = fbank(resample(samples, rate_hz, options.sample_rate), options.sample_rate, options.num_mels)
    feats = lfr(feats, options.lfr_m, options.lfr_n)
    return feats if stats is None else normalise(feats, stats)


# ---- augmentation ----

def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A random generator that these three numbers decide, whatever is drawn before it and in whichever process."""
    return np.random.default_rng((seed, epoch, index))


def add_noise(samples: Tensor, snr_db: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """samples (N,) -> samples + noise, at a signal-to-noise ratio in dB drawn from snr_db (low, high). The noise is
    w[t] + c w[t-1] with w white and c drawn from 0 to 1. The signal's power is that without its DC offset."""
    white = rng.standard_normal(len(samples) + 1, dtype=np.float32)
    noise = torch.from_numpy(white[1:] + np.float32(rng.uniform()) * white[:-1])
    level = 10 ** (-rng.uniform(*snr_db) / 20) * samples.std(correction=0)
    return samples + noise * (level / noise.square().mean().sqrt())


def mask_span(size: int, widest: int, rng: np.random.Generator) -> np.ndarray:
    """(size,) bool, False in one random span of 0..widest entries, True elsewhere."""
    width = rng.integers(min(widest, size) + 1)
    start = rng.integers(size - width + 1)
    place = np.arange(size)
    return (place < start) | (place >= start + width)


def random_channel(num_mels: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """What another microphone or room adds to log energies: a smooth curve over the mel bins, (num_mels,). It is a
    constant and three cosines of 1 to 3 half periods, each times a normal number of deviation `std`."""
    phase = np.pi * (np.arange(num_mels) + 0.5) / num_mels
    return (rng.normal(0, std, (4, 1)) * np.cos(np.arange(4)[:, None] * phase)).sum(0)


def spec_augment(feats: Tensor, options, rng: np.random.Generator) -> Tensor:
    """Normalised feats (T,F) -> a copy with a random channel, and random bands and spans of time set to 0, the mean.

    options.augment: channel_std as in random_channel; freq_masks bands of 0..freq_width mel bins; time_masks spans of
    0..time_width frames, each at most time_share of T. Each of the F / options.num_mels frames that lfr stacked has the
    same channel and the same bands masked.
    Source: Park et al. 2019, without time warping; the channel is ours.
    """
    mels, augment = options.num_mels, options.augment
    if feats.dim() != 2 or feats.shape[1] % mels:
        raise ValueError(f"feats must be (T, a multiple of {mels}), got {tuple(feats.shape)}")
    T, F = feats.shape
    if augment.channel_std:
        feats = feats + torch.from_numpy(np.tile(random_channel(mels, augment.channel_std, rng), F // mels)).to(feats)
    bins, frames = np.ones(mels, bool), np.ones(T, bool)
    for _ in range(augment.freq_masks):
        bins &= mask_span(mels, augment.freq_width, rng)
    for _ in range(augment.time_masks):
        frames &= mask_span(T, min(augment.time_width, int(augment.time_share * T)), rng)
    keep = frames[:, None] & np.tile(bins, F // mels)
    return feats * torch.from_numpy(keep).to(feats)


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


def address(item: int | tuple[int, int], size: int) -> tuple[int, int]:
    """The item of dataset[index] or dataset[epoch, index] -> (epoch, index). Raises IndexError, which ends a `for`."""
    epoch, index = item if isinstance(item, tuple) else (0, item)
    if not 0 <= index < size:
        raise IndexError(f"index {index} of a dataset of {size}")
    return epoch, index


# ---- toy data ----

TOY_STEPS = 64          # positions at which a symbol's trajectory is tabulated
TOY_DIP = 2.0           # natural log: how much weaker a symbol is at its ends than in its middle


@functools.lru_cache(maxsize=4)
def toy_inventory(num_symbols: int, num_mels: int) -> np.ndarray:
    """Spectral trajectories (num_symbols, TOY_STEPS, num_mels) float32, the same for every seed.

    Three formants glide in place and strength under an envelope. Symbols 2k and 2k+1 are time reversals of each other:
    the same frames in another order, so single frames cannot tell them apart. Each pair is, of 32 random ones, the
    farthest from those before it and from its own reversal.
    """
    rng = np.random.default_rng(2206)
    place, glide = np.linspace(0, 1, num_mels), np.linspace(0, 1, TOY_STEPS)[:, None]

    def draw() -> np.ndarray:
        ends = rng.uniform([0.05, 0.3, 0.6], [0.4, 0.7, 0.95], (2, 3))
        centre, strength = ((1 - glide) * a + glide * b for a, b in (ends, rng.uniform(1.5, 4.0, (2, 3))))   # (64, 3)
        bumps = strength[..., None] * np.exp(-0.5 * ((place - centre[..., None]) / 0.05) ** 2)      # (64, 3, num_mels)
        return (bumps.sum(1) - TOY_DIP * (2 * glide - 1) ** 2).astype(np.float32)

    chosen: list[np.ndarray] = []
    while len(chosen) < num_symbols:
        pool = [draw() for _ in range(32)]
        nearest = [min(np.square(x - other).mean() for other in [x[::-1], *chosen]) for x in pool]
        best = pool[int(np.argmax(nearest))]
        chosen += [best, best[::-1]]
    return np.stack(chosen[:num_symbols])


def toy_letter(symbol: int) -> str:
    """a..z, then CJK ideographs: letters without case, so that text normalisation keeps them apart."""
    return chr(ord("a") + symbol) if symbol < 26 else chr(0x4E00 + symbol - 26)


def toy_features(symbols: np.ndarray, durations: np.ndarray, options, rng: np.random.Generator) -> np.ndarray:
    """symbols (U,), durations (U,) frames -> (T, num_mels) float32, natural-log energies above a floor around 0."""
    if symbols.ndim != 1 or symbols.shape != durations.shape or len(symbols) == 0:
        raise ValueError(f"symbols and durations must be (U,), U >= 1, got {symbols.shape} and {durations.shape}")
    toy, inventory = options.toy, toy_inventory(options.toy.num_symbols, options.num_mels)
    ends = durations.cumsum()
    t = np.arange(ends[-1]) + 0.5                               # (T,) middles of the frames
    here = np.repeat(np.arange(len(symbols)), durations)        # (T,) position in the text
    start, end = ends[here] - durations[here], ends[here]
    late = t > (start + end) / 2                                # the nearer neighbour is the next symbol
    there = np.clip(here + np.where(late, 1, -1), 0, len(symbols) - 1)
    distance = np.where(late, end - t, t - start)               # to the boundary with that neighbour
    share = np.clip(0.5 + distance / max(toy.blend_frames, 1e-6), 0, 1).astype(np.float32)[:, None]

    def trajectory(at: np.ndarray) -> np.ndarray:
        position = np.clip((t - ends[at] + durations[at]) / durations[at], 0, 1)
        return inventory[symbols[at], np.rint(position * (TOY_STEPS - 1)).astype(np.int64)]     # (T, num_mels)

    tilt = rng.normal(0, toy.gain_std) + rng.normal(0, toy.tilt_std) * np.linspace(-0.5, 0.5, options.num_mels)
    noise = np.float32(toy.noise) * rng.standard_normal((len(t), options.num_mels), np.float32)
    return share * trajectory(here) + (1 - share) * trajectory(there) + tilt.astype(np.float32) + noise


class ToySeq2SeqDataset(Dataset):
    """Synthetic speech-like features: index -> Utterance, a pure function of (seed, index).

    A text of random symbols, each a trajectory of `toy_inventory` stretched to its duration (in every text of two or
    more, one lasts min_frames and one at least three times that), neighbours cross-faded over blend_frames around the
    true boundaries; loudness and spectral tilt drawn per utterance, white noise on top. stats (2,F) normalise; augment
    adds SpecAugment, which in dataset[epoch, index] depends on the epoch too. Reads options.num_mels, toy and augment.
    """

    def __init__(self, num_utterances: int, options, encode: Callable[[str], list[int]], seed: int = 0,
                 augment: bool = False, stats: Tensor | None = None):
        self.num_utterances, self.options, self.encode, self.seed = num_utterances, options, encode, seed
        self.augment, self.stats = augment, stats

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
        toy, rng = self.options.toy, generator(self.seed, 0, index)
        U = rng.integers(toy.min_symbols, toy.max_symbols + 1)
        symbols = rng.integers(toy.num_symbols, size=U)
        durations = np.rint(np.exp(rng.uniform(*np.log([toy.min_frames, toy.max_frames]), U))).astype(np.int64)
        if U > 1:
            short, long = rng.choice(U, 2, replace=False)
            durations[[short, long]] = toy.min_frames, rng.integers(3 * toy.min_frames, toy.max_frames + 1)
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


def linear_probe(train: list[Utterance], test: list[Utterance]) -> float:
    """Token accuracy of a linear classifier (least squares) of single frames, which is given the true boundaries.

    A token's class is the one with the largest sum of outputs over its frames.
    """
    frames = lambda items: torch.cat([torch.nn.functional.pad(u.feats, (0, 1), value=1.0) for u in items])    # 1: bias
    durations = lambda items: torch.cat([u.boundaries.diff() for u in items]).long()
    tokens = lambda items: torch.cat([u.tokens for u in items])
    labels = torch.nn.functional.one_hot(tokens(train).repeat_interleave(durations(train)))
    weights = torch.linalg.lstsq(frames(train), labels.float()).solution
    said = [part.sum(0).argmax() for part in (frames(test) @ weights).split(durations(test).tolist())]
    return float((torch.stack(said) == tokens(test)).float().mean())


# ---- manifests ----

class Row(NamedTuple):
    key: str
    audio: str                      # path, "" = none given
    text: str
    duration: float | None          # seconds


AUDIO_NAMES, TEXT_NAMES = ("audio", "audio_filepath", "source"), ("text", "target")     # ours, NeMo's, FunASR's


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
    duration, key = fields.get("duration"), fields.get("key")
    if not isinstance(audio, str) or not audio:
        raise ValueError(f"{place}: wanted a path under {' or '.join(AUDIO_NAMES)}, got {audio!r} in {line[:60]}")
    if not isinstance(text, str):
        raise ValueError(f"{place}: wanted a string under {' or '.join(TEXT_NAMES)}, got {text!r}")
    if duration is not None and not (type(duration) in (int, float) and 0 <= duration < 1e9):
        raise ValueError(f"{place}: wanted seconds as duration, from 0 to below 1e9, got {duration!r:.60}")
    if fields.get("offset"):
        raise ValueError(f"{place}: wanted whole recordings, got offset {fields['offset']!r}; cut them first")
    key = os.path.splitext(os.path.basename(audio))[0] if key is None else str(key)     # os.path: Path is 8 x slower
    return Row(printable(key), os.path.join(folder, audio), printable(text), duration)


def read_table(path: str | os.PathLike) -> dict[str, tuple[str, str]]:
    """A Kaldi table, lines `key value` -> {key: (value, file:line)}. Raises ValueError if a key stands twice."""
    table: dict[str, tuple[str, str]] = {}
    for place, _, line in scan_lines(path):
        key, *value = line.split(None, 1)
        if key in table:
            raise ValueError(f"{place}: wanted every key once, got {key!r} again, first at {table[key][1]}")
        table[key] = ("".join(value), place)
    return table


def scan_kaldi(folder: str | os.PathLike) -> Iterator[Row]:
    """Rows of wav.scp (plain paths, relative to the folder) and text. Raises ValueError for pipes and `segments`."""
    if not os.path.exists(f"{folder}/wav.scp"):
        raise ValueError(f"{folder}: wanted a manifest, or a Kaldi folder with wav.scp and text, got a folder without")
    if os.path.exists(f"{folder}/segments"):
        raise ValueError(f"{folder}/segments: wanted one recording an utterance, got segments; cut them first")
    audio, texts = read_table(f"{folder}/wav.scp"), read_table(f"{folder}/text")
    for key in audio | texts:
        (path, place), (text, _) = audio.get(key, ("", "")), texts.get(key, ("", ""))
        if key in audio and (path.endswith("|") or not path):
            raise ValueError(f"{place}: wanted a path, got {path or 'nothing'!r}; run pipes first, list their files")
        yield Row(key, path and os.path.join(folder, path), text, None)


def scan_rows(path: str | os.PathLike) -> Iterator[tuple[int, Row]]:
    """(start, row): the byte where a row's line of a JSON-lines manifest starts, or its number in a Kaldi folder."""
    if os.path.isdir(path):
        return enumerate(scan_kaldi(path))
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
    found = ([name] if os.path.exists(name) else sorted(glob.glob(name)) or [name] for name in names)
    return list(itertools.chain.from_iterable(found))


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


def read_inputs(name: str | os.PathLike) -> list[Row]:
    """Rows of one input of a command line: a manifest (.jsonl, .json), a Kaldi folder (with wav.scp), another folder
    (every recording in it, at any depth, by path), or a recording (anything else). Raises ValueError for an empty
    folder or name."""
    path = Path(name)
    if not os.fspath(name):     # Path("") is here
        raise ValueError("wanted recordings, folders or manifests, got an empty name")
    if path.suffix in (".jsonl", ".json") or (path / "wav.scp").exists():
        return [row for _, row in scan_rows(path)]
    found = [path] if not path.is_dir() else sorted(
        p for p in path.rglob("*") if p.suffix.lower() in RECORDINGS and not p.is_dir())
    if not found:
        raise ValueError(f"{path}: wanted wav.scp or recordings ({' '.join(RECORDINGS)}) in this folder, got none")
    return [Row(printable(str(p)), str(p), "", None) for p in found]


def read_stdin(stdin: BinaryIO, copy: Path) -> list[Row]:
    """Rows of standard input, a recording, or lines that are each an input or a manifest's line. Written to `copy`."""
    with open(copy, "wb") as file:
        shutil.copyfileobj(stdin, file)
    with open(copy, "rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError("standard input: wanted a recording or lines, got nothing")
    if b"\0" in head:       # every recording has zero bytes, no text has
        return [Row("stdin", str(copy), "", None)]
    return [row for place, _, line in scan_lines(copy, "-")
            for row in ([parse_row(line, "", place)] if line.startswith("{") else read_inputs(line))]


class ManifestDataset(Dataset):
    """Recordings of a manifest: [epoch, index] (or index, epoch 0) -> Utterance, or Skip that says why not.

    source: manifests as in find_manifests, or rows. stats (2,F) normalise. augment: one of the speeds, noise, and
    SpecAugment, all pure functions of (seed, epoch, index). frames_per_token: feature frames that a token needs (the
    encoder's subsampling). Raises ValueError on a bad line of the manifest.
    Skipped: no text, no audio, missing, unreadable, empty, shorter than min_sec or one window, longer than max_sec,
    more tokens than T // frames_per_token. With for_training=False only a recording that cannot be read is skipped; no
    text is needed, and one shorter than a window, or longer than whole_sec (which is not read), has T == 0.
    """

    def __init__(self, source: str | os.PathLike | list[Row], options, encode: Callable[[str], list[int]],
                 seed: int = 0, augment: bool = False, stats: Tensor | None = None, frames_per_token: int = 1,
                 for_training: bool = True, whole_sec: float = math.inf):
        self.rows = source if isinstance(source, list) else Manifest(source)
        self.options, self.encode, self.seed, self.augment = options, encode, seed, augment
        self.stats, self.frames_per_token, self.for_training = stats, frames_per_token, for_training
        self.whole_sec = options.max_sec if for_training else whole_sec

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> list[str]:
        return [row.key for row in self.rows]

    @functools.cached_property
    def durations(self) -> np.ndarray:
        """Seconds of every recording: as the manifest says, else by the header, file by file; 0 if that has none."""
        given = [row.duration for row in self.rows] if isinstance(self.rows, list) else self.rows.index["seconds"]
        seconds = np.array(given, np.float64)       # None becomes NaN
        for index in np.flatnonzero(np.isnan(seconds)):
            seconds[index] = audio_seconds(self.rows[index].audio) or 0.0
        return seconds

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Frames of every utterance, estimated from `durations`; with `augment`, at the speeds of that epoch."""
        if not self.augment:
            return num_frames(self.durations, self.options)
        speeds = np.fromiter((self._speed(epoch, index)[0] for index in range(len(self))), np.float64)
        return num_frames(self.durations / speeds, self.options)

    def _speed(self, epoch: int, index: int) -> tuple[float, np.random.Generator]:
        rng, speeds = generator(self.seed, epoch, index), self.options.augment.speeds
        return float(speeds[rng.integers(len(speeds))]) if self.augment else 1.0, rng

    def __getitem__(self, item: int | tuple[int, int]) -> Utterance | Skip:
        epoch, index = address(item, len(self))
        row, options = self.rows[index], self.options
        skip = lambda reason: Skip(row.key, printable(reason))
        if self.for_training and not row.text.strip():
            return skip("no text")
        if not row.audio:
            return skip("no audio: wav.scp has no line for it")
        try:
            with open_recording(row.audio) as (file, header):
                rate_hz, seconds = header.rate_hz, header.num_samples / header.rate_hz
                samples = read_samples(file, header) if seconds <= self.whole_sec else torch.zeros(0)
        except FileNotFoundError:
            return skip(f"missing: {row.audio}")
        except (OSError, ValueError) as error:
            return skip(f"unreadable: {error}")
        shortest, longest = max(options.min_sec, FRAME_SEC), options.max_sec
        if self.for_training and not shortest <= seconds <= longest:
            found = "too long" if seconds > longest else "too short" if seconds else "empty"
            return skip(f"{found}: {seconds:.3f} s, wanted {shortest} to {longest}")
        speed, rng = self._speed(epoch, index)
        if self.augment and options.augment.snr_db:
            samples, rate_hz = resample(samples, rate_hz, options.sample_rate), options.sample_rate
            samples = add_noise(samples, options.augment.snr_db, rng)
        feats = frontend(samples, round(rate_hz * speed), options, self.stats)      # a higher rate plays faster
        if not feats.isfinite().all():
            return skip("features not finite: are the samples of a float WAV far beyond 1?")
        tokens, room = torch.tensor(self.encode(row.text), dtype=torch.int64), len(feats) // self.frames_per_token
        if self.for_training and len(tokens) > room:
            return skip(f"text too long: {len(tokens)} tokens, {len(feats)} frames hold at most {room}")
        feats = spec_augment(feats, options, rng) if self.augment else feats
        return Utterance(row.key, feats, tokens, row.text, None, seconds)


def training_texts(options) -> Iterable[str]:
    """The texts that a tokenizer is built from: those of the training manifests, or every letter of the toy task."""
    if options.kind == "toy":
        return [toy_letter(symbol) for symbol in range(options.toy.num_symbols)]
    return (row.text for path in find_manifests(options.train) for _, row in scan_rows(path))


def open_dataset(options, split: str, encode: Callable[[str], list[int]], seed: int = 0, stats: Tensor | None = None,
                 frames_per_token: int = 1, augment: bool = False) -> Dataset:
    """The dataset of a split (train, dev, test), of options.kind. Toy data differ between all splits and seeds.

    options.train, dev and test are as in find_manifests; where dev or test is "", it is the training manifest.
    """
    if options.kind == "toy":
        size = options.toy.num_train if split == "train" else options.toy.num_dev
        split_seed = 3 * seed + ("train", "dev", "test").index(split)
        return ToySeq2SeqDataset(size, options, encode, split_seed, augment, stats)
    source = getattr(options, split) or options.train
    return ManifestDataset(source, options, encode, seed, augment, stats, frames_per_token)


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
    and at most a tenth of a batch is padding.
    """
    if batch_size < 1 or batch_frames < 1:
        raise ValueError(f"batch_size and batch_frames must be 1 or more, got {batch_size} and {batch_frames}")
    lengths = np.asarray(lengths, np.int64)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (number of utterances,), got {lengths.shape}")
    rng = np.random.default_rng((seed, epoch))
    jitter = rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(lengths)) if shuffle else 1.0
    batches: list[list[int]] = []
    longest = total = 0
    for index in np.argsort(lengths * jitter, kind="stable").tolist():
        length = int(lengths[index])
        longest, total = max(longest, length), total + length
        padded = (len(batches[-1]) + 1) * longest if batches else math.inf
        if padded > batch_frames or len(batches[-1]) == batch_size or not shuffle and total < 0.9 * padded:
            batches.append([])
            longest = total = length
        batches[-1].append(index)
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches


def collate(items: list[Utterance | Skip]) -> Batch:
    """Utterances -> one padded Batch; Skips go to `skipped`. Skips alone give a batch with B == 0."""
    kept = [item for item in items if isinstance(item, Utterance)]
    skipped = [item for item in items if isinstance(item, Skip)]
    feats, tokens = [u.feats for u in kept], [u.tokens for u in kept]
    if len({x.shape[1:] for x in feats}) > 1 or any(x.dim() != 2 for x in feats) or any(x.dim() != 1 for x in tokens):
        raise ValueError("feats must be (T,F) of one width and tokens (U,), got "
                         f"{[(tuple(x.shape), tuple(y.shape)) for x, y in zip(feats, tokens)]}")
    pad = lambda rows, empty: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else empty
    lens = lambda rows: torch.tensor([len(x) for x in rows], dtype=torch.int64)
    return Batch([u.key for u in kept], pad(feats, torch.zeros(0, 0, 0)), lens(feats),
                 pad(tokens, torch.zeros(0, 0, dtype=torch.int64)), lens(tokens), [u.text for u in kept], skipped)


def loader(dataset: Dataset, batches: list[list[int]], epoch: int = 0, num_workers: int = 0,
           start: int = 0) -> Iterable[Batch]:
    """The batches from number `start` on, once, in order, the same for every num_workers; each worker loads two batches
    ahead. With a generator of its own, so that torch's global one stays untouched."""
    addresses = ([(epoch, index) for index in batch] for batch in itertools.islice(batches, start, None))
    return DataLoader(dataset, batch_sampler=addresses, num_workers=num_workers, collate_fn=collate,
                      generator=torch.Generator())


# ---- corpora ----

DIGITS = "zero one two three four five six seven eight nine".split()
SPLITS = ("train", "dev", "test", "unseen_speaker")     # parts of one set of recordings, by seed and options


def manifest_row(out: Path, audio: Path, text: str, speaker: str = "") -> dict:
    """A line of a manifest in `out`. A recording that cannot be read gets no duration; the dataset will skip it."""
    seconds = audio_seconds(audio)
    path = os.path.relpath(audio.parent.resolve() / audio.name, out.resolve())      # `..` of a link is in its target
    return {"audio": path, "text": " ".join(text.split()), "speaker": speaker, "key": audio.stem,
            **({} if seconds is None else {"duration": round(seconds, 4)})}


def write_manifests(rows: Iterable[tuple[str, dict]], out: Path) -> None:
    """(split, row) pairs -> out/<split>.jsonl, each written whole or not at all; rows without text are counted only.

    A manifest of one of SPLITS that has no rows now, left by a run with other options, stays, with a warning.
    """
    splits: dict[str, list[dict]] = {}
    for split, row in rows:
        splits.setdefault(split, []).append(row)
    if not splits:
        raise ValueError(f"{out}: wanted recordings to list, got none: is it the right folder and layout?")
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path, kept = out / f"{split}.jsonl", [row for row in rows if row["text"]]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomic(path, lines.encode(errors="backslashreplace"))     # a file name that is not UTF-8: \udcff
        hours = sum(row.get("duration", 0.0) for row in kept) / 3600
        print(f"{path}: {len(kept)} utterances, {hours:.2f} h; left out {len(rows) - len(kept)} without text")
    for path in (out / f"{split}.jsonl" for split in SPLITS if split not in splits):
        if path.exists():
            print(f"data.py: {path}: not of this run, whose manifests may list the same recordings", file=sys.stderr)


def join_digits(recordings: list[np.ndarray], rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """Recordings (n,) each -> one utterance (N,): edges faded over 5 ms, gaps of 60 to 250 ms, gains of deviation 2 dB
    each and -9 to 3 dB overall, and low-pass noise of -65 to -45 dBFS."""
    fade = rate_hz // 200
    ramp = np.sin(0.5 * np.pi * (np.arange(fade) + 0.5) / fade) ** 2
    gaps = [np.zeros(int(rate_hz * gap_sec)) for gap_sec in rng.uniform(0.06, 0.25, len(recordings) + 1)]
    pieces = gaps[:1]
    for recording, gap in zip(recordings, gaps[1:]):
        envelope = np.concatenate([ramp, np.ones(max(0, len(recording) - 2 * fade)), ramp[::-1]])[:len(recording)]
        pieces += [recording * envelope * 10 ** (rng.normal(0, 2) / 20), gap]
    x = np.concatenate(pieces) * 10 ** (rng.uniform(-9, 3) / 20)
    colour = rng.uniform(0, 0.9) ** np.arange(24)
    hiss = np.convolve(rng.standard_normal(len(x) + 23), colour / np.linalg.norm(colour), "valid")
    return x + hiss * 10 ** (rng.uniform(-65, -45) / 20)


def prepare_fsdd(options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Connected digits, three to seven by one speaker, from recordings <digit>_<speaker>_<index>.wav -> rows.

    Indices 0-4 are the corpus's test recordings, 5-9 make dev, the rest train; a held-out speaker is unseen_speaker.
    """
    source, out, hold_out = options.source, options.out, options.hold_out_speaker
    if min(options.utterances) < 0:
        raise ValueError(f"--utterances: wanted 0 or more each, got {options.utterances}")
    folder = source / "recordings" if (source / "recordings").is_dir() else source
    pools: dict[str, dict[str, list[Path]]] = {split: {} for split in SPLITS}
    for path in sorted(folder.glob("[0-9]_*_*.wav")):
        name = re.fullmatch(r"\d_(.+)_(\d+)", path.stem)
        if not name:
            raise ValueError(f"{path}: wanted <digit>_<speaker>_<index>.wav")
        speaker, index = name.groups()
        split = "test" if int(index) < 5 else "dev" if int(index) < 10 else "train"
        pools["unseen_speaker" if speaker == hold_out else split].setdefault(speaker, []).append(path)
    if hold_out and not pools["unseen_speaker"]:
        raise ValueError(f"{folder}: wanted <digit>_{hold_out}_<index>.wav for --hold-out-speaker, got none")
    for number, ((split, speakers), size) in enumerate(zip(pools.items(), options.utterances)):
        (out / "wav" / split).mkdir(parents=True, exist_ok=True)
        for i in range(size if speakers else 0):
            rng = generator(options.seed, number, i)
            speaker = str(rng.choice(sorted(speakers)))
            picks = [speakers[speaker][j] for j in rng.integers(len(speakers[speaker]), size=rng.integers(3, 8))]
            loaded = [load_wav(path) for path in picks]
            audio, rate_hz = out / "wav" / split / f"{split}_{i:04d}.wav", loaded[0][1]
            recordings = [resample(x, own_hz, rate_hz).numpy() for x, own_hz in loaded]
            save_wav(audio, join_digits(recordings, rate_hz, rng), rate_hz)
            yield split, manifest_row(out, audio, " ".join(DIGITS[int(path.name[0])] for path in picks), speaker)


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


def prepare_folder(options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """name.wav beside name.txt, at any depth, split at random into train, dev and test."""
    dev, test = options.dev_share, options.test_share
    if not (min(dev, test) >= 0 and dev + test <= 1):       # `not`: refuses NaN too
        raise ValueError(f"--dev-share, --test-share: wanted 0 or more, together at most 1, got {dev} and {test}")
    recordings = sorted(path for path in options.source.rglob("*.wav") if not path.is_dir())
    num_dev, num_test = round(dev * len(recordings)), round(test * len(recordings))
    for rank, index in enumerate(generator(options.seed, 0, 0).permutation(len(recordings))):
        split = "dev" if rank < num_dev else "test" if rank < num_dev + num_test else "train"
        audio = recordings[index]
        lines = scan_lines(audio.with_suffix(".txt")) if audio.with_suffix(".txt").is_file() else ()
        yield split, manifest_row(options.out, audio, " ".join(line for *_, line in lines))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description="Turn public corpora into manifests (JSON lines with "
                                     "audio, text, speaker, key, duration), one for each split.")
    commands = parser.add_subparsers(required=True)

    def add(name: str, about: str, prepare: Callable) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(prepare=prepare)
        command.add_argument("source", type=Path, help="the corpus's folder")
        command.add_argument("out", type=Path, help="folder for the manifests, made if need be")
        return command

    fsdd = add("fsdd", "free-spoken-digit-dataset: compose connected digits, its test recordings kept apart",
               prepare_fsdd)
    fsdd.add_argument("--hold-out-speaker", default="", metavar="NAME", help="keep out whole, as unseen_speaker")
    fsdd.add_argument("--utterances", type=int, nargs=4, default=[3000, 200, 300, 300],
                      metavar=("TRAIN", "DEV", "TEST", "UNSEEN"), help="how many of each (default 3000 200 300 300)")
    add("librispeech", "LibriSpeech folders <split>/<speaker>/<chapter> with .trans.txt and .flac", prepare_librispeech)
    add("aishell", "AISHELL-1: data_aishell with transcript/ and unpacked wav/<split>/<speaker>", prepare_aishell)
    folder = add("folder", "any folder of name.wav beside name.txt, at any depth", prepare_folder)
    folder.add_argument("--dev-share", type=float, default=0.1, help="share of recordings for dev (default 0.1)")
    folder.add_argument("--test-share", type=float, default=0.0, help="share of recordings for test (default 0)")
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
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
