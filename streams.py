"""Streams of several clients, heard together: samples to words while somebody speaks, and to segments of speech.

A Stream is a value, and everything here runs on the one inference thread. Words are those of streaming.py; segments are
cut as decode.py cuts a recording, by a VAD or at pauses, and are recognised elsewhere.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import vad
from batcher import Step
from bodies import features
from decode import shifted
from live import Resampling, resample_more
from pauses import Pauses
from settings import Models, Settings
from streaming import State, certain_text, feed_many, samples_missing, start
from tokenizer import Token

VAD_MS = 100                # that a VAD hears at a time
STEP_SEC = 0.6              # of audio that are heard at a time where no chunks set the pace


class Stream(NamedTuple):
    """What one utterance has to remember; of fixed size, but for the text."""

    settings: Settings                  # that it began with
    resampling: Resampling              # from audio_fs to the models' rate
    heard: int                          # samples so far, at the models' rate
    online: State | None                # None: mode offline
    begun: int                          # sample at which `online` began
    pending: Tensor                     # (n,) samples that `online` is still to hear
    shown: str                          # what the client has of its text
    vad: vad.State | None               # of what cuts segments; None: pauses do
    vad_resampling: Resampling | None
    held: Tensor                        # (n,) samples that are in no segment yet
    first: int                          # the place of held[0]


class Words(NamedTuple):
    new: str                            # what the client is to append
    text: str                           # all of the stream, or since the last segment
    tokens: list[Token]


class Piece(NamedTuple):
    """A segment for the model of whole utterances."""

    start_sec: float
    seconds: float
    feats: Tensor                       # (T,F)


def start_stream(models: Models, settings: Settings) -> Stream:
    rate_hz = models.rate_hz()
    resampling = Resampling(settings.audio_fs, rate_hz, torch.zeros(0))
    online = None if settings.mode == "offline" else start(models.streaming, settings.chunk)
    detector = vad_resampling = None
    if settings.mode != "online" and models.whole.vad:
        detector = vad.start(models.whole.vad)
        vad_resampling = Resampling(rate_hz, models.whole.vad.front_end.fs, torch.zeros(0))
    return Stream(settings, resampling, 0, online, 0, torch.zeros(0), "", detector, vad_resampling, torch.zeros(0), 0)


def samples_due(models: Models, stream: Stream) -> int:
    """How many more samples at audio_fs make the next step worth while: a chunk is whole then, or STEP_SEC."""
    if stream.online is None:
        return int(STEP_SEC * stream.settings.audio_fs)
    missing = samples_missing(models.streaming, stream.online) - len(stream.pending)
    return stream.resampling.inputs_for(missing) if missing > 0 else 0


def hear_steps(models: Models, steps: Sequence[Step]) -> list[tuple[Stream, list[Words | Piece]]]:
    """The next samples (n,) at audio_fs of several streams -> each, and what is certain of it now."""
    streams: list[Stream] = []
    events: list[list[Words | Piece]] = []
    online = []                         # places of those that hear a chunk
    for i, step in enumerate(steps):
        stream: Stream = step.utterance
        resampling, samples = resample_more(stream.resampling, step.feats, step.is_last)
        pending = stream.pending if stream.online is None else torch.cat([stream.pending, samples])
        stream = stream._replace(resampling=resampling, heard=stream.heard + len(samples), pending=pending)
        pieces: list[Words | Piece] = []
        if stream.settings.mode != "online":
            stream, pieces = cut(models, stream, samples, step.is_last)
        streams.append(stream)
        events.append(pieces)
        if stream.settings.mode == "online" or stream.online and not pieces and not step.is_last:
            online.append(i)            # else the other model's text takes the place of its words
    heard = hear_chunks(models, [streams[i] for i in online], [steps[i].is_last for i in online])
    for i, (stream, words) in zip(online, heard, strict=True):
        streams[i] = stream
        if words.new or words.tokens or steps[i].is_last:
            events[i].append(words)
    return list(zip(streams, events))


def hear_chunks(models: Models, streams: Sequence[Stream], last: Sequence[bool]) -> list[tuple[Stream, Words]]:
    """Streams that wait for words hear a chunk each, or all that is left."""
    system = models.streaming
    pieces = []
    for stream, is_last in zip(streams, last, strict=True):
        missing = samples_missing(system, stream.online)
        pieces.append(stream.pending if is_last else stream.pending[:missing])
    found = []
    states = [stream.online for stream in streams]
    for stream, piece, is_last, (state, result) in zip(streams, pieces, last, feed_many(system, states, pieces, last)):
        shown = result.text if is_last else certain_text(system.tokenizer, state, result.text)
        tokens = shifted(result.tokens, stream.begun / models.rate_hz())
        words = Words(shown[len(stream.shown):], result.text, tokens)
        found.append((stream._replace(online=state, pending=stream.pending[len(piece):].clone(), shown=shown), words))
    return found


def cut(models: Models, stream: Stream, samples: Tensor, is_last: bool) -> tuple[Stream, list[Piece]]:
    """More samples of a stream -> the segments that end in them, behind which its words begin anew."""
    rate_hz = models.rate_hz()
    held = torch.cat([stream.held, samples])
    if stream.vad:
        detector = models.whole.vad._replace(piece_ms=VAD_MS)
        resampling, samples = resample_more(stream.vad_resampling, samples, is_last)
        state, ends, free = vad.find_ends(detector, stream.vad, samples, is_last, rate_hz)
        free = min(stream.heard, max(stream.first, free))
        stream = stream._replace(vad=state, vad_resampling=resampling)
    else:
        ends, free = Pauses(rate_hz, *models.whole.segment_sec).ends(held, stream.first, is_last)
    pieces = []
    for begin, end in ends:
        piece = held[begin - stream.first:end - stream.first]
        pieces.append(Piece(begin / rate_hz, len(piece) / rate_hz, features(models.whole, piece, "audio")))
    if ends and stream.online:
        end = min(stream.heard, ends[-1][1])
        stream = stream._replace(online=start(models.streaming, stream.settings.chunk), begun=end, shown="",
                                 pending=held[end - stream.first:].clone())
    return stream._replace(held=held[free - stream.first:].clone(), first=free), pieces
