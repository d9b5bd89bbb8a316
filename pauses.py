"""Where a long recording is cut: at its pauses, into segments that are recognised one by one.

Needs torch and numpy; imports nothing of ours, so it can be copied alone. Samples are (N,) float32.
"""
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVEL_SEC = 0.010       # from one level to the next
PAUSE_SEC = 0.4         # a pause of this length ends a segment, a shorter one only where there is none
FLOOR_PERCENT = 10      # the floor, i.e. the level of the background, is this percentile of the levels
RANGE_DB = 70           # from the loudest level to the lowest that is told from silence
SILENCE = 1e-16         # power: below 24-bit samples, above what float32 leaves of a mean of 0.03
QUIET_SHARE = 0.25      # quiet is what lies below this share of the way from the floor to the loudest level


class Segment(NamedTuple):
    start_sec: float        # from the start of the recording
    samples: Tensor         # (n,) at the model's rate


def levels(samples: Tensor, size: int) -> np.ndarray:
    """samples (N,) -> the power of each block of `size` samples, (ceil(N / size),) float32 in dBFS. Without the mean of
    each block, so that an offset, also a drifting one, is no sound. At least RANGE_DB below the loudest block, so that
    zeros between words do not make a faint noise loud."""
    missing = -len(samples) % size
    blocks = torch.cat([samples, samples[-1:].expand(missing)]).view(-1, size)
    blocks = blocks - blocks.mean(1, keepdim=True)
    level = 10 * blocks.square().mean(1).clamp(SILENCE, 1e9).log10()
    return level.clamp(min=level.max().item() - RANGE_DB).numpy()


def runs(quiet: np.ndarray) -> list[tuple[int, int]]:
    """quiet (n,) bool -> (start, end) of each run of True; end is the first entry behind it."""
    found = []
    start = 0
    for is_quiet, entries in itertools.groupby(quiet.tolist()):
        end = start + len(list(entries))
        if is_quiet:
            found.append((start, end))
        start = end
    return found


def find_cut(level: np.ndarray, least: int, most: int) -> int:
    """How many levels a segment takes: level (n,) in dB, one per LEVEL_SEC -> n, or least..min(most, n - least).

    It ends in the middle of the first pause of PAUSE_SEC or more. Without one it takes all n if they are at most
    `most`; else it ends in the middle of the longest pause, or, without any, at the lowest level. A pause is a run of
    quiet levels after a sound (and before one, if n <= most: the recording ends here). Levels are smoothed over 50 ms.
    Quiet is relative to the floor and to the loudest level, so that the gain does not matter.
    """
    n = len(level)
    smooth = np.convolve(np.pad(level, 2, mode="edge"), np.full(5, 0.2), "valid")
    floor = np.percentile(smooth, FLOOR_PERCENT)
    quiet = smooth <= floor + QUIET_SHARE * (smooth.max() - floor)
    loud = np.flatnonzero(~quiet)
    if len(loud):
        quiet[:loud[0]] = False
        if n <= most:
            quiet[loud[-1]:] = False
    stop = max(least, min(most, n - least)) + 1
    pauses = runs(quiet[least:stop])
    long = [(start, end) for start, end in pauses if end - start >= PAUSE_SEC / LEVEL_SEC]
    if long:
        start, end = long[0]
    elif n <= most:
        return n
    elif pauses:
        start, end = max(pauses, key=lambda pause: pause[1] - pause[0])
    else:
        return least + int(smooth[least:stop].argmin())
    return least + (start + end) // 2


class Pauses(NamedTuple):
    """How a recording is cut at pauses: into segments of min_sec to max_sec, 0 < 2 * min_sec <= max_sec."""

    rate_hz: int
    min_sec: float
    max_sec: float

    def size(self) -> int:
        """Samples of a level."""
        return int(self.rate_hz * LEVEL_SEC)

    def whole(self) -> int:
        """Samples of the longest recording that is one segment."""
        return int(self.max_sec * self.rate_hz + 1e-6)      # 2.01 * 8000 is below 16080

    def least(self) -> int:
        """Levels of the shortest segment."""
        return math.ceil(self.min_sec * self.rate_hz / self.size() - 1e-6)

    def ahead(self) -> int:
        """Samples that must be known, or all up to the end, before a segment is cut."""
        return (self.least() + self.whole() // self.size()) * self.size()

    def cut(self, held: Tensor, is_first: bool) -> int:
        """held (n,): the samples `ahead` or more, or all that are left -> how many of them the next segment takes."""
        if is_first and len(held) <= self.whole():
            return len(held)
        level = levels(held[:self.ahead()], self.size())
        return find_cut(level, self.least(), self.whole() // self.size()) * self.size()

    def ends(self, held: Tensor, first: int, is_last: bool) -> tuple[list[tuple[int, int]], int]:
        """held (n,): samples of a recording from the place `first` on, or, if is_last, all that are left -> where
        segments that are certain begin and end, and where the next one begins."""
        found = []
        place = first
        stop = first + len(held)
        while stop - place >= self.ahead() or is_last and stop > place:
            end = place + self.cut(held[place - first:], place == 0)
            found.append((place, end))
            place = end
        return found, place


def cut_at_pauses(chunks: Iterable[Tensor], rate_hz: int, min_sec: float, max_sec: float) -> Iterator[Segment]:
    """Samples in pieces (n,) at rate_hz -> segments of min_sec to max_sec that hold every sample once, in order. A
    recording of at most max_sec is one segment; the last segment may fall short of min_sec by LEVEL_SEC. Looks ahead by
    max_sec + min_sec. Raises ValueError unless 0 < 2 * min_sec <= max_sec."""
    if not 0 < 2 * min_sec <= max_sec:
        raise ValueError(f"wanted segments of 0 < min_sec <= max_sec / 2 seconds, got {min_sec} and {max_sec}")
    pauses = Pauses(rate_hz, min_sec, max_sec)
    held = torch.zeros(0)
    first = 0  # the place of held[0] in the recording
    for chunk in itertools.chain(chunks, [None]):
        held = held if chunk is None else torch.cat([held, chunk])
        ends, free = pauses.ends(held, first, chunk is None)
        for begin, end in ends:
            yield Segment(begin / rate_hz, held[begin - first:end - first].clone())
        held = held[free - first:]
        first = free
