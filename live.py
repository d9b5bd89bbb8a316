"""A recording that is still being made: samples from a pipe, resampling and features, piece by piece.

What comes out is what audio.py makes of the whole recording, but each piece as soon as all that it depends on is
there. Dims and units as in audio.py.
"""
import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from audio import (FRAME_SEC, SHIFT_SEC, UNKNOWN_SIZE, WavHeader, fbank, normalise, reach, read_header, read_samples,
                   resample)


# ---- pipes ----

PIPE_BYTES = 3200       # are read at a time at most: 0.1 s at 16 kHz


def pipe_header(file: BinaryIO, pcm_hz: int | None = None) -> WavHeader:
    """Read a WAV from a pipe up to its samples; pcm_hz: the rate of bare 16-bit mono samples, which have no header.
    Raises ValueError if it is no WAV of SAMPLE_TYPES."""
    if pcm_hz is not None:
        return WavHeader(1, 16, 2, 1, pcm_hz, 0, UNKNOWN_SIZE)
    head = file.read(12)
    while len(head) < 2**20 and len(chunk := file.read(8)) == 8:
        head += chunk
        if chunk[:4] == b"data":
            header = read_header(io.BytesIO(head))
            if header is None:
                break
            size = int.from_bytes(chunk[4:], "little")
            most = size // (header.channels * header.size) if size else UNKNOWN_SIZE
            return header._replace(start=0, num_samples=most)
        size = int.from_bytes(chunk[4:], "little")
        head += file.read(min(size + size % 2, 2**20))
    raise ValueError("standard input: wanted a WAV (PCM 8/16/24/32 bit, float 32/64, A-law, mu-law) or, with --pcm "
                     f"RATE, bare 16-bit samples, got {head[:12]!r}")


def pipe_samples(file: BinaryIO, header: WavHeader) -> Iterator[Tensor]:
    """The samples behind `pipe_header` as they come, (n,) float32, channels averaged. Raises as read_samples."""
    size = header.channels * header.size
    left = header.num_samples * size
    held = b""
    while left > len(held) and (got := file.read1(min(PIPE_BYTES, left - len(held)))):
        held += got
        n = len(held) // size
        yield read_samples(io.BytesIO(held), header, 0, n)
        left -= n * size
        held = held[n * size:]


# ---- resampling ----

class Resampling(NamedTuple):
    """What resampling a stream has to remember; of fixed size."""

    rate_in: int
    rate_out: int
    held: Tensor        # the last inputs
    before: int = 0     # inputs at the start of `held` that are there only for what follows

    def inputs_for(self, count: int) -> int:
        """How many more inputs must come until `count` more outputs, 1 or more, are there."""
        up, down = Fraction(self.rate_out, self.rate_in).as_integer_ratio()
        if up == down:
            return count
        return max(0, -(-count // up) * down + reach(up, down) + self.before - len(self.held))


def resample_more(state: Resampling, piece: Tensor, last: bool = False) -> tuple[Resampling, Tensor]:
    """More of a recording (n,) -> what `resample` makes of the whole, as far as all that it depends on is there."""
    up, down = Fraction(state.rate_out, state.rate_in).as_integer_ratio()
    if up == down:
        return state, piece
    held = torch.cat([state.held, piece])
    before = state.before
    if last:
        rest = resample(held, state.rate_in, state.rate_out)[before // down * up:]
        return Resampling(state.rate_in, state.rate_out, torch.zeros(0)), rest
    around = reach(up, down)
    ready = (len(held) - before - around) // down * down
    if ready <= 0:
        return state._replace(held=held), torch.zeros(0)
    part = resample(held[:before + ready + around], state.rate_in, state.rate_out)
    kept = min(before + ready, around)
    after = state._replace(held=held[before + ready - kept:].clone(), before=kept)
    return after, part[before // down * up:(before + ready) // down * up]


def resample_pieces(pieces: Iterable[Tensor], rate_in: int, rate_out: int) -> Iterator[Tensor]:
    """`resample_more` of all pieces, in pieces that are not empty."""
    state = Resampling(rate_in, rate_out, torch.zeros(0))
    for piece in pieces:
        state, part = resample_more(state, piece)
        if len(part):
            yield part
    yield resample_more(state, torch.zeros(0), last=True)[1]


# ---- features ----

def first_sample(frame: int, options) -> int:
    """The first sample that feature frame number `frame` of `frontend` depends on."""
    shift = int(options.sample_rate * SHIFT_SEC)
    return shift * max(0, frame * options.lfr_n - (options.lfr_m - 1) // 2)


def frame_samples(options) -> int:
    """Samples from one feature frame to the next."""
    return int(options.sample_rate * SHIFT_SEC) * options.lfr_n


def samples_until(frame: int, options) -> int:
    """How many samples of a recording must be there until its feature frames below `frame`, 1 or more, are certain: at
    least that many frames' time, which FunASR waits for, as many as the last one's window needs."""
    shift = int(options.sample_rate * SHIFT_SEC)
    last_row = (frame - 1) * options.lfr_n + options.lfr_m // 2     # of the filterbank
    window = int(options.sample_rate * FRAME_SEC)
    return max(frame * frame_samples(options), last_row * shift + window)


def frontend_part(samples: Tensor, first: int, stop: int | None, options, stats: Tensor) -> Tensor:
    """Rows first..stop-1 of what `frontend` makes of a recording; stop None: up to its end, where edge frames repeat.
    samples (n,): the recording's from first_sample(first) on, to samples_until(stop) or its end -> (T,F)."""
    bank = fbank(samples, options.sample_rate, options.num_mels)
    shift = int(options.sample_rate * SHIFT_SEC)
    skipped = first_sample(first, options) // shift     # rows of the filterbank before the samples
    total = skipped + len(bank)
    if stop is None:
        stop = -(-total // options.lfr_n) if len(bank) else first
    rows = torch.arange(first, max(first, stop))[:, None] * options.lfr_n
    rows = rows + torch.arange(options.lfr_m) - (options.lfr_m - 1) // 2        # (T, lfr_m), in the whole filterbank
    return normalise(bank[rows.clamp(0, max(0, total - 1)) - skipped].flatten(1), stats)
