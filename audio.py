"""From a recording to features: WAV, resampling, the filterbank.

`frontend` is the only way from samples to features, for training, decoding and serving. Needs torch and numpy and
imports nothing of ours, so it can be copied alone: functions take `options`, any object with the attributes of the
config's data section (sample_rate, num_mels, lfr_m, ...). Bad input is a ValueError that names the place.

Dims: N samples, T frames, F feature bins (num_mels * lfr_m). Samples are float32 in [-1,1), energies natural logs.
Sources: Kaldi's compute-fbank-feats (numbers), Smith's bandlimited interpolation (resampling), ITU-T G.711 (A-law).
"""
import contextlib
import functools
import io
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import textwrap
import warnings
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor


# ---- wav ----

class WavHeader(NamedTuple):
    code: int           # format tag: 1 = integers, 3 = floats, 6 = A-law, 7 = mu-law
    bits: int           # of one sample of one channel
    size: int           # bytes that it takes
    channels: int
    rate_hz: int
    start: int          # byte where the samples begin
    num_samples: int    # of one channel
    channel: int | None = None      # the only one that is read; None = the mean of all
    lost: int = 0       # samples that it promises behind the end of the file


MAX_CHUNKS = 10000      # of a WAV file before its samples: a file of empty chunks must not keep a server busy
UNKNOWN_SIZE = 2**32 - 1
STREAMED_SIZE = 2**31 - 2**12       # and above: of writers into pipes, as sox (0x7ffff000) and arecord (2^31)
CHUNK_SEC = 10          # of a recording are read at a time
CANCELLED = 0.1         # share of the louder channel's power: -10 dB
SAMPLE_TYPES = {        # (code, bits) -> numpy type, value of silence, full scale; 24 bits become the upper ones of 32
    (1, 8): ("u1", 128, 2.0 ** 7), (1, 16): ("<i2", 0, 2.0 ** 15), (1, 24): ("<i4", 0, 2.0 ** 31),
    (1, 32): ("<i4", 0, 2.0 ** 31), (3, 32): ("<f4", 0, 1.0), (3, 64): ("<f8", 0, 1.0),
    (6, 8): ("u1", 0, 2.0 ** 12), (7, 8): ("u1", 0, 2.0 ** 13)}     # once law_table has made numbers of the bytes


@functools.lru_cache
def law_table(code: int) -> np.ndarray:
    """The number that each byte of A-law (13 bits) or mu-law (14 bits) stands for, (256,)."""
    byte = np.arange(256) ^ (0x55 if code == 6 else 0xFF)
    exponent = (byte >> 4) & 7
    mantissa = byte & 15
    if code == 6:
        number = np.where(exponent == 0, 2 * mantissa + 1, (2 * mantissa + 33) << np.maximum(exponent - 1, 0))
        return np.where(byte & 128, number, -number)
    number = ((2 * mantissa + 33) << exponent) - 33
    return np.where(byte & 128, -number, number)


def sample_size(bits: int, channels: int, align: int) -> int:
    """Bytes of a sample of one channel, whose fmt chunk says that one of all channels takes `align`.
    24 bits may lie in 4 bytes. 0 and 1 mean nothing: some writers put them. Raises ValueError for a contradiction."""
    packed = bits // 8
    if bits == 24 and align == 4 * channels:
        return 4
    if align not in (0, 1, packed * channels):
        raise ValueError(f"wanted a block align of {packed * channels} for {channels} x {bits} bits, got {align}")
    return packed


def parse_fmt(fmt: bytes) -> tuple[int, int, int, int, int]:
    """The 'fmt ' chunk -> code, bits, channels, rate_hz, align."""
    if len(fmt) < 16:
        raise ValueError(f"wanted a 'fmt ' chunk of 16 bytes or more before 'data', got {len(fmt)}")
    code, channels, rate_hz, _, align, bits = struct.unpack("<HHIIHH", fmt[:16])
    if code == 0xFFFE and len(fmt) >= 26:       # WAVE_FORMAT_EXTENSIBLE: the real code opens the sub-format
        code = int.from_bytes(fmt[24:26], "little")
    if channels < 1 or not 1000 <= rate_hz <= 1_000_000:
        raise ValueError(f"wanted one channel or more at 1000 to 1000000 Hz, got {channels} at {rate_hz} Hz")
    return code, bits, channels, rate_hz, align


def read_header(file: BinaryIO) -> WavHeader | None:
    """Walk the RIFF chunks of a seekable file; None if it is no WAV of SAMPLE_TYPES, ValueError if it is a broken one.
    Our own walk, because `wave` (Python 3.11) refuses float and WAVE_FORMAT_EXTENSIBLE, which recorders write for 24
    and 32 bits. A data size of 0, of 2^32-1 or past the end, as of streams, is "until the end"; RF64's is in ds64."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    fmt = b""
    long_size = 0
    if end == 0:
        raise ValueError("wanted a recording, got an empty file")
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        return None
    for _ in range(MAX_CHUNKS):
        if len(head := file.read(8)) < 8:
            break
        size = int.from_bytes(head[4:], "little")
        start = file.tell()
        if head[:4] == b"fmt ":
            fmt = file.read(min(size, 40))
        elif head[:4] == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        elif head[:4] == b"data":
            code, bits, channels, rate_hz, align = parse_fmt(fmt)
            if (code, bits) not in SAMPLE_TYPES:
                return None
            if size == UNKNOWN_SIZE:
                size = long_size
            sample = sample_size(bits, channels, align)
            num_samples = min(size or end, end - start) // (channels * sample)
            lost = size // (channels * sample) - num_samples if 0 < size < STREAMED_SIZE or long_size else 0
            return WavHeader(code, bits, sample, channels, rate_hz, start, num_samples, lost=lost)
        file.seek(start + size + size % 2)      # chunks are padded to an even size
    raise ValueError(f"wanted a 'data' chunk among the first {MAX_CHUNKS}, got none")


def read_channels(file: BinaryIO, header: WavHeader, start: int, stop: int) -> np.ndarray:
    """Samples start..stop-1 -> (N, channels) float64."""
    size = header.channels * header.size
    file.seek(header.start + start * size)
    x = np.frombuffer(file.read((stop - start) * size), np.uint8)
    if header.bits == 24:       # in 3 or 4 bytes; they become the upper three of 4
        x = x.reshape(-1, header.size)
        if header.size == 4 and (x[:, 3] != np.where(x[:, 2] & 128, 255, 0)).any():
            raise ValueError("wanted 24-bit samples in the lower three of 4 bytes, got others")
        x = np.pad(x[:, :3], ((0, 0), (1, 0)))
    kind, zero, full_scale = SAMPLE_TYPES[header.code, header.bits]
    x = x.view(kind)
    if header.code in (6, 7):
        x = law_table(header.code)[x]
    return ((x.astype(np.float64) - zero) / full_scale).reshape(-1, header.channels)


def choose_channel(file: BinaryIO, header: WavHeader, place: str) -> WavHeader:
    """The header; for stereo whose channels cancel each other it asks for the louder one, with a warning, which a
    recording that breaks off gets too. They cancel where the power of the mean, offsets left out, is below CANCELLED
    of the louder channel's: 0.25 is what silence in the other leaves of it. Reads stereo once, in pieces."""
    if header.lost > ROUNDED_SEC * header.rate_hz:
        found = header.num_samples / header.rate_hz
        warnings.warn(f"{place}: wanted the {found + header.lost / header.rate_hz:.3f} s that its header promises, got "
                      f"{found:.3f} s: it breaks off")
    if header.channels != 2 or header.num_samples == 0:
        return header
    total = squares = np.zeros(3)
    step = CHUNK_SEC * header.rate_hz
    for start in range(0, header.num_samples, step):
        x = read_channels(file, header, start, min(start + step, header.num_samples))
        x = np.column_stack([x, x.mean(1)])         # (n, 3): left, right, their mean
        total = total + x.sum(0)
        squares = squares + np.square(x).sum(0)
    power = squares / header.num_samples - np.square(total / header.num_samples)
    louder = int(power[:2].argmax())
    if not power[2] < CANCELLED * power[louder]:    # `not`: of what is not finite too
        return header
    name = ("left", "right")[louder]
    warnings.warn(f"{place}: the channels cancel each other (opposite phase), reading the {name} one")
    return header._replace(channel=louder)


def read_samples(file: BinaryIO, header: WavHeader, start: int = 0, stop: int | None = None) -> Tensor:
    """Samples start..stop-1, or all -> (N,) float32, channels averaged, or the header's. ValueError if not finite."""
    x = read_channels(file, header, start, header.num_samples if stop is None else stop)
    with np.errstate(over="ignore"):            # a float64 beyond float32 becomes infinite
        x = (x.mean(1) if header.channel is None else x[:, header.channel]).astype(np.float32)
    if not np.isfinite(x).all():
        bad = int(np.argmin(np.isfinite(x)))
        raise ValueError(f"wanted finite samples, got {x[bad]} at sample {start + bad}")
    return torch.from_numpy(x)


FORMATS = (             # what the first bytes of a file say
    (rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", "MP3"), (rb"\xff[\xf0\xf1\xf8\xf9]|ADIF", "AAC"),
    (rb"OggS.{24}OpusHead", "Opus in Ogg"), (rb"OggS", "Ogg"), (rb"fLaC", "FLAC"),
    (rb"\x1aE\xdf\xa3", "WebM or Matroska"), (rb".{4}ftyp", "MP4 or M4A"), (rb"RIFF.{4}AVI", "AVI"),
    (rb"RIFF|RF64", "WAV with another sample format"),
    (rb"RIFX", "big-endian WAV"), (rb"FORM", "AIFF"), (rb"caff", "CAF"), (rb"#!AMR", "AMR"),
    (rb"\x30\x26\xb2\x75", "WMA"), (rb"\.snd", "AU"), (rb"\s*<(!doctype html|html)", "an HTML page"),
    (rb"\s*[{\[]", "JSON"), (rb"%PDF", "PDF"),
    (rb"PK\x03\x04", "a ZIP archive"), (rb"\x1f\x8b", "gzip"), (rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture"))
WORST_RATE = 8 * 192000     # bytes a second that ffmpeg may make: two channels of floats at 192 kHz


def format_name(start: bytes) -> str:
    """What a file is by its first bytes, for messages."""
    for pattern, name in FORMATS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return name
    return "an unknown format"


def ffmpeg_to_wav(source: str | bytes, most_sec: float | None = None, timeout: float | None = None) -> BinaryIO:
    """A recording, a path or a file's bytes, in any format that ffmpeg knows -> an unnamed temporary float WAV.
    A playlist cannot make ffmpeg open other files or URLs. What comes behind most_sec is left out. Raises ValueError if
    ffmpeg is missing or fails, TimeoutError after `timeout` seconds."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("wanted WAV (PCM 8/16/24/32 bit, float 32/64, A-law, mu-law), got another format: that needs "
                         "ffmpeg, which is not installed")
    if isinstance(source, bytes):       # cache: M4A files are read from their end; ffmpeg unlinks the cache at once
        given = ["-protocol_whitelist", "cache,pipe", "-read_ahead_limit", "-1", "-i", "cache:pipe:0"]
    else:
        given = ["-protocol_whitelist", "file", "-i", f"file:{source}"]
    bounds = []
    if most_sec is not None:
        most_bytes = int(most_sec * WORST_RATE)
        bounds = ["-t", f"{most_sec:.3f}", "-fs", str(most_bytes)]
    command = ["ffmpeg", "-v", "error", *given, "-vn", *bounds, "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
    converted = tempfile.TemporaryFile()
    try:
        done = subprocess.run(command, input=source if isinstance(source, bytes) else b"", stdout=converted,
                              stderr=subprocess.PIPE, timeout=timeout, process_group=0)  # Ctrl-C is for us alone
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            said = textwrap.shorten(said.replace(f"{given[-1]}: ", ""), 300) or f"nothing (exit code {done.returncode})"
            raise ValueError(f"wanted a recording, ffmpeg says: {said}")
        if most_sec is not None and converted.seek(0, os.SEEK_END) >= most_bytes:
            raise ValueError(f"wanted a recording of at most {most_bytes} bytes once it is decoded, got more")
        return converted
    except subprocess.TimeoutExpired:
        converted.close()
        raise TimeoutError(f"ffmpeg took longer than {timeout:.3f} s") from None
    except ValueError:
        converted.close()
        raise


class Part(NamedTuple):
    """`seconds` of a recording (a path or a file's bytes) from `offset` on; None: from the start, to the end."""
    recording: str | os.PathLike | bytes
    offset: float | None = None
    seconds: float | None = None
    name: str = "<bytes>"       # of bytes, in errors and warnings


Source = str | os.PathLike | bytes | Part

OVERSHOOT_SEC = 0.5     # a part may end so far behind its recording and is cut, as by Kaldi's extract-segments
ROUNDED_SEC = 0.1       # what `seconds` without an offset may fall short of the whole: rounded, or padded by an encoder


def cut_header(header: WavHeader, part: Part) -> WavHeader:
    """The header of the part alone, to the sample. Raises ValueError if the recording does not hold it."""
    start = part.offset or 0.0
    whole = header.num_samples / header.rate_hz
    end = whole if part.seconds is None else start + part.seconds
    if start > whole or end > whole + OVERSHOOT_SEC:
        raise ValueError(f"wanted the part from {start:g} to {end:g} s, got a recording of {whole:.3f} s")
    if part.offset is None and whole - end < ROUNDED_SEC:
        return header
    first = round(start * header.rate_hz)
    last = min(round(end * header.rate_hz), header.num_samples)
    size = header.channels * header.size
    lost = header.lost if part.seconds is None else 0
    return header._replace(start=header.start + first * size, num_samples=last - first, lost=lost)


def as_part(source: Source) -> Part:
    return source if isinstance(source, Part) else Part(source)


def place_of(source: Source) -> str:
    part = as_part(source)
    return part.name if isinstance(part.recording, bytes) else str(part.recording)


def open_bytes(recording: str | os.PathLike | bytes) -> BinaryIO:
    """Raises ValueError for a pipe or device, of which nobody knows when something comes."""
    if isinstance(recording, bytes):
        return io.BytesIO(recording)
    if os.path.exists(recording) and not os.path.isfile(recording):
        raise ValueError("wanted a file, got a folder, a pipe or a device")
    return open(recording, "rb")


@contextlib.contextmanager
def open_recording(source: Source) -> Iterator[tuple[BinaryIO, WavHeader]]:
    """The WAV of a recording and its header; of a Part, the header of that alone.
    WAV and RF64 of SAMPLE_TYPES are read here, every other format through ffmpeg where it is installed.
    A ValueError, also one that the block of the `with` raises, is prefixed with the path."""
    part = as_part(source)
    recording = part.recording
    try:
        with open_bytes(recording) as file:
            if header := read_header(file):
                yield file, cut_header(header, part)
                return
        with ffmpeg_to_wav(recording if isinstance(recording, bytes) else os.fspath(recording)) as file:
            yield file, cut_header(read_header(file), part)
    except ValueError as error:
        raise ValueError(f"{place_of(source)}: {error}") from None


def load_wav(source: Source) -> tuple[Tensor, int]:
    """A recording -> samples (N,) float32 in [-1,1), and their rate in Hz.
    Channels are averaged; of two that cancel each other the louder one is read, with a warning. Float samples are taken
    as they are, also beyond 1. Raises ValueError (place, wanted, got) or OSError."""
    with open_recording(source) as (file, header):
        header = choose_channel(file, header, place_of(source))
        return read_samples(file, header), header.rate_hz


def audio_seconds(source: Source) -> float | None:
    """Duration of a recording: of WAV and FLAC by their headers, of others by decoding; None if it cannot be read."""
    part = as_part(source)
    try:
        with open_bytes(part.recording) as file:
            head = file.read(26)
        word = int.from_bytes(head[18:26], "big")       # FLAC STREAMINFO: 20 bits rate, 3 channels, 5 depth, 36 samples
        rate_hz = word >> 44
        num_samples = word % 2**36
        if head[:4] == b"fLaC" and rate_hz and num_samples and part[1:3] == (None, None):
            return num_samples / rate_hz
        with open_recording(part) as (_, header):
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
    -> offset, weights (span, count) float32: out[p*up + first + c] = sum_i in[p*down + offset + i] * weights[i, c]."""
    band = ROLL_OFF * min(1.0, up / down)               # cut-off, as a fraction of the input's Nyquist frequency
    half = ZERO_CROSSINGS / band                        # half the kernel's width, in input samples
    centres = (first + np.arange(count)) * (down / up)
    offset = math.ceil(centres[0] - half)
    stop = math.floor(centres[-1] + half) + 1
    t = np.arange(offset, stop)[:, None] - centres      # (span, count)
    window = np.i0(KAISER_BETA * np.sqrt(np.clip(1 - (t / half) ** 2, 0, None))) * (np.abs(t) <= half)
    weights = np.sinc(band * t) * window
    return offset, torch.from_numpy((weights / weights.sum(0)).astype(np.float32))      # a constant keeps its value


def check_samples(samples: Tensor) -> None:
    if samples.dim() != 1 or not samples.is_floating_point():
        raise ValueError(f"samples must be (N,) float, got {tuple(samples.shape)} {samples.dtype}")


def reach(up: int, down: int) -> int:
    """Inputs on either side that an output depends on, in whole periods of `down`."""
    half_width = math.ceil(ZERO_CROSSINGS / ROLL_OFF * max(1.0, down / up)) + 1
    return -(-half_width // down) * down


def resample(samples: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """samples (N,) at rate_in Hz -> (ceil(N * rate_out / rate_in),) at rate_out Hz, by a Kaiser-windowed sinc.
    Zeros are assumed beyond the edges. Any two integer rates, in bounded memory: PHASES outputs of each period are one
    matrix product of at most 2^18 gathered samples with their block of weights. Raises ValueError for rates below 1."""
    check_samples(samples)
    if min(rate_in, rate_out) < 1:
        raise ValueError(f"rates must be positive Hz, got {rate_in} and {rate_out}")
    if rate_in == rate_out:
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


def stream(source: Source, rate_hz: int) -> Iterator[Tensor]:
    """The samples that load_wav and resample make of a recording, in pieces, in constant memory. Raises as load_wav."""
    with open_recording(source) as (file, header):
        header = choose_channel(file, header, place_of(source))
        up, down = Fraction(rate_hz, header.rate_hz).as_integer_ratio()
        around = reach(up, down)
        step = CHUNK_SEC * header.rate_hz       # whole periods of `down` inputs too
        for start in range(0, header.num_samples, step):
            first = max(0, start - around)
            stop = min(header.num_samples, start + step + around)
            piece = resample(read_samples(file, header, first, stop), header.rate_hz, rate_hz)
            skipped = (start - first) // down * up
            yield piece[skipped:skipped + step // down * up]


# ---- features ----

FRAME_SEC = 0.025
SHIFT_SEC = 0.010
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
    Source: equal to kaldi-native-fbank within 2e-3. FunASR differs below one window, where it shrinks the window."""
    check_samples(samples)
    window = int(rate_hz * FRAME_SEC)
    shift = int(rate_hz * SHIFT_SEC)
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
    the left. Source: Pundak & Sainath 2016; equal to FunASR's frontend."""
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
    count = 0
    total = squares = 0.0
    for feats in features:
        if feats.dim() != 2 or count and feats.shape[1:] != total.shape:
            raise ValueError(f"feats must be (T,F) of one F, got {tuple(feats.shape)}")
        x = feats.double()      # float64: a million frames
        count += len(x)
        total = total + x.sum(0)        # (F,), 0.0 at first
        squares = squares + x.square().sum(0)
    if count == 0:
        raise ValueError("wanted feature frames to normalise by, got none: was every recording skipped?")
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=MIN_DEVIATION)
    return torch.stack([mean, 1 / deviation]).float()


def feature_dim(options) -> int:
    """F, the width of what `frontend` returns."""
    return options.num_mels * options.lfr_m


def frame_sec(options) -> float:
    """Seconds from one feature frame to the next, stacking included."""
    return SHIFT_SEC * options.lfr_n


def num_frames(seconds: np.ndarray, options) -> np.ndarray:
    """seconds (n,) -> frames (n,) int64 that `frontend` makes of them; one off where a duration was rounded."""
    samples = np.rint(seconds * options.sample_rate).astype(np.int64)
    window = int(options.sample_rate * FRAME_SEC)
    shift = int(options.sample_rate * SHIFT_SEC)
    frames = 1 + (samples - window) // shift
    return np.where(samples < window, 0, -(-frames // options.lfr_n))


def frontend(samples: Tensor, rate_hz: int, options, stats: Tensor | None = None) -> Tensor:
    """samples (N,) at any rate -> features (T, num_mels * lfr_m): resample, fbank, lfr and, with stats, normalise.
    T == 0 below one window of 25 ms. Reads options.sample_rate, num_mels, lfr_m, lfr_n."""
    feats = fbank(resample(samples, rate_hz, options.sample_rate), options.sample_rate, options.num_mels)
    feats = lfr(feats, options.lfr_m, options.lfr_n)
    return feats if stats is None else normalise(feats, stats)
