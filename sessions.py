"""What FunASR's websocket clients send, and what they get: recognition while somebody speaks, in three modes.

    ws://localhost:8000/     {"mode": "online", "chunk_size": [0, 10, 5], "audio_fs": 16000, "wav_name": "x"}     text
                             16-bit little-endian mono samples at audio_fs (8,000 to 48,000), any number of bytes
                             {"is_speaking": false}     the utterance ends, the socket stays open for the next one
    {"mode": "online", "wav_name": "x", "text": " and", "is_final": false, "timestamp": "[[480,720]]", ...}     answers

Modes: `online` sends what is new as soon as it is certain; `offline` one text at the end, by a model of whole
utterances (with wav_format other than pcm the bytes are a file); `2pass` both: `2pass-online` while somebody speaks,
and at the end of each segment its text by the other model as `2pass-offline`, which replaces it. Every key is optional
and may come again: it counts from the next utterance on. `text` has the space that it needs in front, so who appends
gets the whole text. `timestamp` is JSON in a string, as FunASR's page parses it: ms of each token (online) or word.
Ours beside FunASR's keys: tokens, text_so_far, latency_ms. What is refused is said in {"error": ...}, and nothing else
changes. `"is_end": true` beside is_speaking asks for an acknowledgement.

Reading order: settings, a stream on the inference thread, a session, the conversation over a socket.
Needs torch, numpy and what its imports name. Source: FunASR's runtime/docs/websocket_protocol.md and its clients.
"""
import contextlib
import json
import math
import select
import socket
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import decode
from batcher import Job, Step
from bodies import Recording, parse_terms
from punctuation import RealtimeModel, punctuate_more
from report import Result, Word, token_entry, written_text
from sentences import with_sentences
from settings import Models, Settings, bad_value, first_settings, read_settings
from sockets import Closed, GOING_AWAY, GONE, Socket
from streaming import StreamToken
from streams import Piece, Stream, Words, samples_due, start_stream
from transcribe import as_wav, recognise
from web import ClientLeft, Connection, Head, MIB, Refusal, body_too_large

MOST_TEXT = 65536           # characters of a text message
NO_SPACE = " ，。？、"      # between segments on either side of which there is no space

# ---- a session ----

class Engine(NamedTuple):
    """What a session lets others do for it. All three may raise Refusal, or ClientLeft."""

    hear: Callable[[Stream, Tensor, bool], tuple[Stream, list[Words | Piece]]]      # hear_steps of one stream
    recognise: Callable[[Tensor, tuple[str, ...] | None], Result]   # features (T,F), hotwords: by the other model
    read_file: Callable[[bytes, tuple[str, ...] | None], Result]    # a recording in any format, hotwords


class Session:
    """What a client sends, utterance by utterance, to what it gets."""

    def __init__(self, models: Models, engine: Engine, max_bytes: int, log: Callable[..., None]):
        self.models = models
        self.engine = engine
        self.max_bytes = max_bytes              # of a recording that is a file
        self.log = log
        self.settings = first_settings(models)
        self.seconds = 0.0                      # of audio in all utterances that have ended
        self.arrived = 0.0                      # monotonic seconds
        self.begin()

    def begin(self) -> None:
        """Nothing of the next utterance is there yet."""
        self.stream: Stream | None = None
        self.received = bytearray()             # not heard yet
        self.parts: list[tuple[float, Result]] = []         # of its segments, with their starts; mode offline
        self.written = ""                       # the text of its segments; mode 2pass
        self.is_open = False                    # the client has words of the segment that has not ended
        self.carried: list[str] = []            # of punctuate_more
        self.failure: Refusal | None = None     # once it has failed, no more of it is heard

    def take(self, message: str | bytes) -> Iterator[dict[str, Any]]:
        """A message of the client -> the answers to it. Raises ClientLeft."""
        self.arrived = time.monotonic()
        return self.take_text(message) if isinstance(message, str) else self.take_audio(message)

    def take_text(self, text: str) -> Iterator[dict[str, Any]]:
        try:
            given = parse_message(text)
        except Refusal as refusal:
            yield error_message(refusal)
            return
        self.settings, refused = read_settings(self.settings, given, self.models)
        for refusal in refused:
            yield error_message(refusal)
        if given.get("is_speaking") is False or given.get("is_end") is True:
            failure = yield from self.finish()
            if given.get("is_end") is True:
                yield acknowledgement(self.settings, failure)

    def take_audio(self, data: bytes) -> Iterator[dict[str, Any]]:
        if not data or self.failure:
            return
        if self.stream is None:
            self.stream = start_stream(self.models, self.settings)
        settings = self.stream.settings
        self.received += data
        if not is_pcm(settings):
            if settings.mode != "offline":
                yield self.fail(bad_value("wav_format", f"pcm in mode {settings.mode}", settings.wav_format))
            elif len(self.received) > self.max_bytes:
                yield self.fail(body_too_large(f"more than {self.max_bytes}", self.max_bytes))
            return
        while not self.failure and len(self.received) >= 2 * (count := samples_due(self.models, self.stream)):
            yield from self.step(count, False)

    def step(self, count: int, is_last: bool) -> Iterator[dict[str, Any]]:
        """Hear so many samples of what was received -> what there is to say."""
        samples = np.frombuffer(self.received[:2 * count], "<i2").astype(np.float32) / 32768
        del self.received[:2 * count]
        try:
            self.stream, events = self.engine.hear(self.stream, torch.from_numpy(samples), is_last)
            for event in events:
                if isinstance(event, Words):
                    yield self.tell_words(event)
                else:
                    yield from self.tell_piece(event)
        except ClientLeft:
            raise
        except Refusal as refusal:
            yield self.fail(refusal)
        except Exception:
            yield self.fail(self.bug())

    def bug(self) -> Refusal:
        self.log("ERROR", "bug", traceback=traceback.format_exc())
        return Refusal(500, "internal", "the server failed on this utterance; its log says more")

    def fail(self, refusal: Refusal) -> dict[str, Any]:
        self.failure = refusal
        self.received.clear()
        return error_message(refusal)

    # ---- answers ----

    def tell_words(self, words: Words) -> dict[str, Any]:
        mark = "\u2581" if self.models.streaming.tokenizer.unit == "word" else ""
        tokens = [{**token._asdict(), "token": mark + token.token} for token in words.tokens]
        gap = self.gap(words.text)
        new = words.new if self.is_open else self.gap(words.new) + words.new
        self.is_open = self.is_open or bool(new)
        mode = "online" if self.stream.settings.mode == "online" else "2pass-online"
        return self.message(mode, new, self.written + gap + words.text, tokens, words.tokens)

    def tell_piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A segment has ended: its text takes the place of the words so far, which are none in mode offline."""
        result = self.engine.recognise(piece.feats, self.stream.settings.hotwords)
        if self.stream.settings.mode == "offline":
            self.parts.append((piece.start_sec, result))
            return
        system = self.models.whole
        result = self.finished([(piece.start_sec, result)])
        text = written_text(result)
        if system.punctuation and isinstance(system.punctuation.model, RealtimeModel):
            text, _, self.carried = punctuate_more(system.punctuation, self.carried, result.text)
        if text or self.is_open:
            self.is_open = False
            text = self.gap(text) + text
            self.written += text
            yield self.whole_message("2pass-offline", result, text, self.written)

    def finished(self, parts: Sequence[tuple[float, Result]]) -> Result:
        """The Result of segments that are recognised, as decode.py writes one."""
        system = self.models.whole
        joined = decode.join_results(system, parts)
        clipped = decode.clip_times(system, joined, self.stream.heard / self.models.rate_hz())
        return with_sentences(system.punctuation, clipped)

    def gap(self, text: str) -> str:
        """The space that text needs behind the segments before it, if any."""
        if not self.written or not text or self.written[-1] in NO_SPACE or text[0] in NO_SPACE:
            return ""
        before, after = (Word(x, 0.0, 0.0, 0.0, True) for x in (self.written, text))
        return " " if decode.is_spaced(self.models.whole, before, after) else ""

    def whole_message(self, mode: str, result: Result, text: str, so_far: str) -> dict[str, Any]:
        tokens = [token_entry(token) for token in result.tokens]
        return self.message(mode, text, so_far, tokens, result.words)

    def message(self, mode: str, text: str, so_far: str, tokens: list[dict[str, Any]],
                timed: Sequence[StreamToken | Word]) -> dict[str, Any]:
        times = [[round(1000 * item.start), round(1000 * item.end)] for item in timed]
        return {"mode": mode, "wav_name": self.settings.wav_name, "text": text, "is_final": False,
                "timestamp": json.dumps(times) if times else "", "tokens": tokens, "text_so_far": so_far,
                "latency_ms": round(1000 * (time.monotonic() - self.arrived), 1)}

    def finish(self) -> Generator[dict[str, Any], None, Refusal | None]:
        """The utterance ends -> its last messages, the very last one with is_final; returns why it failed, if so."""
        messages = list(self.last_messages())
        if not messages or "error" in messages[-1]:
            mode = self.stream.settings.mode if self.stream else self.settings.mode
            messages.append(self.message("2pass-offline" if mode == "2pass" else mode, "", self.written, [], []))
        messages[-1]["is_final"] = True
        yield from messages
        failure = self.failure
        self.begin()
        return failure

    def last_messages(self) -> Iterator[dict[str, Any]]:
        if self.stream is None or self.failure:
            return
        settings = self.stream.settings
        if is_pcm(settings):
            yield from self.step(len(self.received) // 2, True)
            self.seconds += self.stream.heard / self.models.rate_hz()
        if settings.mode != "offline" or self.failure:
            return
        try:
            result = self.finished(self.parts) if is_pcm(settings) else self.engine.read_file(
                bytes(self.received), settings.hotwords)
        except Refusal as refusal:
            yield self.fail(refusal)
            return
        yield self.whole_message("offline", result, written_text(result), written_text(result))


def is_pcm(settings: Settings) -> bool:
    return settings.wav_format.lower() == "pcm"


def parse_message(text: str) -> dict[str, Any]:
    """A JSON object. Raises Refusal."""
    try:
        value = json.loads(text) if len(text) <= MOST_TEXT else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", "a text message: wanted a JSON object like {\"is_speaking\": false}, of at "
                      f"most {MOST_TEXT} characters")
    for name in ("is_speaking", "is_end"):
        if type(value.get(name, True)) is not bool:
            raise bad_value(name, "true or false", value[name])
    return value


def error_message(refusal: Refusal) -> dict[str, Any]:
    """HTTP's error object; its empty text is for clients that append whatever comes."""
    return json.loads(refusal.response({"text": "", "is_final": False}).body)


def acknowledgement(settings: Settings, failure: Refusal | None) -> dict[str, Any]:
    entry = {"mode": settings.mode, "wav_name": settings.wav_name, "is_final": failure is None, "is_end": True}
    return {**entry, "error": str(failure)} if failure else entry


# ---- the conversation ----

def converse(socket: Socket, session: Session, draining: Event, told: Callable[[dict[str, Any]], None]) -> Closed:
    """Messages of a client and their answers, until either side ends it -> how. told: each answer that was sent."""
    try:
        while True:
            try:
                if draining.is_set():
                    raise Closed(GOING_AWAY)
                message = socket.read()
            except Closed as end:
                if not draining.is_set():
                    raise
                tell(socket, session.finish() if session.stream else (), told)
                raise Closed(GOING_AWAY, "the server is shutting down") from end
            tell(socket, session.take(message), told)
    except Closed as end:
        with contextlib.suppress(OSError):
            if end.code != GONE:
                socket.close(end)
        return end
    except (ClientLeft, OSError):
        return Closed(GONE, "the connection broke")


def tell(socket: Socket, answers: Iterable[dict[str, Any]], told: Callable[[dict[str, Any]], None]) -> None:
    for answer in answers:
        socket.send_text(json.dumps(answer, ensure_ascii=False, allow_nan=False))
        told(answer)


# ---- the connection ----

def hold(server, head: Head, connection: Connection) -> None:
    """A connection from its handshake, which `head` asked for, to its end. `server` is serve.Server."""
    batcher, limits = server.batcher, server.limits

    def has_left() -> bool:
        ended = connection.poll(select.POLLIN, 0) and not connection.request.recv(1, socket.MSG_PEEK)
        return ended and not server.draining.is_set()       # while draining nothing is read any more

    def hear(stream: Stream, samples: Tensor, is_last: bool) -> tuple[Stream, list[Words | Piece]]:
        step = Step(samples, stream, time.monotonic(), math.inf, has_left, is_last=is_last)
        batcher.submit_step(step)
        return step.outcome.result()

    def recognise_piece(feats: Tensor, hotwords: tuple[str, ...] | None) -> Result:
        if not len(feats):
            return Result("", 0.0, [], [])
        job = Job(feats, object(), time.monotonic(), math.inf, has_left, hotwords)
        batcher.submit([job], bounded=False)
        return job.outcome.result().result

    def read_file(body: bytes, hotwords: tuple[str, ...] | None) -> Result:
        fields = {"hotwords": list(hotwords)} if hotwords else {}
        now = time.monotonic()
        recording = Recording(body, fields, parse_terms({}, server.options.request_timeout))
        wav = as_wav(server, recording, now, has_left)
        return recognise(server, head._replace(path="/transcribe"), wav, now, has_left)[2][0].result

    def told(answer: dict[str, Any]) -> None:
        if "latency_ms" in answer:
            server.metrics.observe("asr_stream_latency_seconds", answer["latency_ms"] / 1e3)

    server.phases[connection.request] = "socket"
    most = int(limits.max_body_mb * MIB)
    session = Session(server.models, Engine(hear, recognise_piece, read_file), most, server.log)
    client = Socket(connection.read_some, connection.write, most, limits.idle_timeout, limits.body_timeout,
                    connection.take(len(connection.buffer)))
    end = converse(client, session, server.draining, told)
    if end.code != GONE:
        connection.read_away(1.0)
    server.metrics.add("asr_audio_seconds_total", amount=session.seconds)
    server.log("INFO", "socket", id=head.id, seconds=round(time.monotonic() - head.started, 1),
               audio=round(session.seconds, 1), code=end.code, reason=end.reason)
