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

First a session, then the conversation. Source: FunASR's runtime/docs/websocket_protocol.md and its clients.
"""
import json
import math
import select
import socket
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import decode
from batcher import Job, Step
from bodies import Recording, parse_terms
from punctuation import RealtimeModel, punctuate_more
from report import Result, Token, Word, token_entry, written_text
from sentences import with_sentences
from settings import Models, Settings, bad_value, first_settings, read_settings
from sockets import Closed, GOING_AWAY, GONE, Socket
from streams import Piece, Stream, Words, samples_due, start_stream
from transcribe import Post, as_wav, recognise
from web import ClientLeft, Connection, Head, Refusal, body_too_large

MOST_TEXT = 65536           # characters of a text message
NO_SPACE = " ，。？、"      # between segments on either side of which there is no space


# ---- a session ----

class Session:
    """What a client sends, utterance by utterance, to what it gets. server: serve.Server; head: of the handshake."""

    def __init__(self, server, head: Head, connection: Connection):
        self.server = server
        self.head = head
        self.connection = connection
        self.models: Models = server.models
        self.settings = first_settings(self.models)
        self.seconds = 0.0                      # of audio in all utterances that have ended
        self.arrived = 0.0                      # monotonic seconds
        self.begin()

    def begin(self) -> None:
        """Nothing of the next utterance is there yet."""
        self.stream: Stream | None = None
        self.received = bytearray()             # not heard yet
        self.parts: list[tuple[float, Result]] = []         # of segments, with their starts, that are not told yet
        self.written = ""                       # the text of segments that are told; mode 2pass
        self.is_open = False                    # the client has words of the segment that has not ended
        self.carried: list[str] = []            # of punctuate_more
        self.failure: Refusal | None = None     # once it has failed, no more of it is heard

    def take(self, message: str | bytes) -> Iterator[dict[str, Any]]:
        """A message of the client -> the answers to it. Raises ClientLeft."""
        self.arrived = time.monotonic()
        if isinstance(message, str):
            return self.take_text(message)
        return self.guarded(self.take_audio(message))

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
                entry = {"mode": self.settings.mode, "wav_name": self.settings.wav_name}
                error = {"error": str(failure)} if failure else {}
                yield {**entry, "is_final": failure is None, "is_end": True, **error}

    def take_audio(self, data: bytes) -> Iterator[dict[str, Any]]:
        if not data or self.failure:
            return
        if self.stream is None:
            self.stream = start_stream(self.models, self.settings)
        settings = self.stream.settings
        self.received += data
        if is_pcm(settings):
            while len(self.received) >= 2 * (count := samples_due(self.models, self.stream)):
                yield from self.hear(count, False)
        elif settings.mode != "offline":
            raise bad_value("wav_format", f"pcm in mode {settings.mode}", settings.wav_format)
        elif len(self.received) > (most := self.server.limits.max_body()):
            raise body_too_large(f"more than {most}", most)

    def hear(self, count: int, is_last: bool) -> Iterator[dict[str, Any]]:
        """Hear so many samples of what was received, together with other streams -> what there is to say."""
        samples = np.frombuffer(self.received[:2 * count], "<i2").astype(np.float32) / 32768
        del self.received[:2 * count]
        now = time.monotonic()
        step = Step(torch.from_numpy(samples), self.stream, now, math.inf, self.has_left, is_last=is_last)
        self.server.batcher.submit_step(step)
        self.stream, events = step.outcome.result()
        for event in events:
            if isinstance(event, Words):
                yield self.tell_words(event)
            else:
                yield from self.tell_piece(event)

    def guarded(self, answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers; with what goes wrong the utterance fails, and the socket goes on."""
        try:
            yield from answers
            return
        except ClientLeft:
            raise
        except Refusal as refusal:
            self.failure = refusal
        except Exception:
            self.server.log("ERROR", "bug", id=self.head.id, traceback=traceback.format_exc())
            self.failure = Refusal(500, "internal", "the server failed on this utterance; its log says more")
        self.received.clear()
        yield error_message(self.failure)

    def finish(self) -> Generator[dict[str, Any], None, Refusal | None]:
        """The utterance ends -> its last messages, the very last one with is_final; returns why it failed, if so."""
        messages = list(self.guarded(self.last_answers()))
        if not messages or "error" in messages[-1]:
            mode = self.stream.settings.mode if self.stream else self.settings.mode
            messages.append(self.message("2pass-offline" if mode == "2pass" else mode, "", self.written, [], []))
        messages[-1]["is_final"] = True
        yield from messages
        failure = self.failure
        self.begin()
        return failure

    def last_answers(self) -> Iterator[dict[str, Any]]:
        if self.stream is None or self.failure:
            return
        settings = self.stream.settings
        result = None
        if not is_pcm(settings):        # a recording in any format, as /transcribe has it
            post = Post(self.server, self.head._replace(path="/transcribe"), time.monotonic(), self.has_left)
            fields = {"hotwords": list(settings.hotwords)} if settings.hotwords else {}
            terms = parse_terms({}, self.server.options.request_timeout)
            _, heard = recognise(post, as_wav(post, Recording(bytes(self.received), fields, terms)))
            result = heard[0].found.result
        else:
            yield from self.hear(len(self.received) // 2, True)
            self.seconds += self.stream.heard / self.models.rate_hz()
            if settings.mode == "offline":
                result = self.joined()
        if result:
            text = written_text(result)
            yield self.message("offline", text, text, list(map(token_entry, result.tokens)), result.words)

    # ---- the models, which may raise Refusal or ClientLeft ----

    def has_left(self) -> bool:
        ended = self.connection.poll(select.POLLIN, 0) and not self.connection.request.recv(1, socket.MSG_PEEK)
        return ended and not self.server.draining.is_set()      # while draining nothing is read any more

    def recognise_piece(self, feats: Tensor, hotwords: tuple[str, ...] | None) -> Result:
        """Features (T,F) by the model of whole utterances, in a batch with requests."""
        if not len(feats):
            return Result("", 0.0, [], [])
        job = Job(feats, object(), time.monotonic(), math.inf, self.has_left, hotwords)
        self.server.batcher.submit([job], bounded=False)
        return job.outcome.result().result

    # ---- answers ----

    def tell_words(self, words: Words) -> dict[str, Any]:
        mark = "\u2581" if self.models.streaming.tokenizer.unit == "word" else ""
        tokens = [{**token_entry(token), "token": mark + token.token} for token in words.tokens]
        new = words.new if self.is_open else self.behind_written(words.new)
        self.is_open = self.is_open or bool(new)
        mode = "online" if self.stream.settings.mode == "online" else "2pass-online"
        return self.message(mode, new, self.written + self.behind_written(words.text), tokens, words.tokens)

    def tell_piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A segment has ended: its text takes the place of the words so far, which are none in mode offline."""
        system = self.models.whole
        result = self.recognise_piece(piece.feats, self.stream.settings.hotwords)
        self.parts.append((piece.start_sec, decode.clip_times(system, result, piece.seconds)))
        if self.stream.settings.mode == "offline":
            return
        joined = self.joined()
        self.parts = []
        text = written_text(joined)
        if system.punctuation and isinstance(system.punctuation.model, RealtimeModel):
            text, _, self.carried = punctuate_more(system.punctuation, self.carried, joined.text)
        if text or self.is_open:
            self.is_open = False
            text = self.behind_written(text)
            self.written += text
            yield self.message("2pass-offline", text, self.written, list(map(token_entry, joined.tokens)), joined.words)

    def joined(self) -> Result:
        """The Result of segments that are not told yet."""
        system = self.models.whole
        return with_sentences(system.punctuation, decode.join_results(system, self.parts))

    def behind_written(self, text: str) -> str:
        """The text with the space that it needs behind the segments before it, if any."""
        if not self.written or not text or self.written[-1] in NO_SPACE or text[0] in NO_SPACE:
            return text
        return f" {text}" if decode.is_spaced(self.models.whole, self.written, text) else text

    def message(self, mode: str, text: str, so_far: str, tokens: list[dict[str, Any]],
                timed: Sequence[Token | Word]) -> dict[str, Any]:
        times = [[round(1000 * item.start), round(1000 * item.end)] for item in timed]
        return {"mode": mode, "wav_name": self.settings.wav_name, "text": text, "is_final": False,
                "timestamp": json.dumps(times) if times else "", "tokens": tokens, "text_so_far": so_far,
                "latency_ms": round(1000 * (time.monotonic() - self.arrived), 1)}


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
    return {"text": "", "is_final": False, "error": refusal.entry()}


# ---- the conversation ----

def hold(server, head: Head, connection: Connection) -> None:
    """A connection from its handshake, which `head` asked for, to its end. `server` is serve.Server."""
    server.phases[connection.request] = "socket"
    limits = server.limits
    session = Session(server, head, connection)
    client = Socket(connection, limits.max_body(), limits.idle_timeout, limits.body_timeout)
    try:
        end = converse(client, session)
        if end.code != GONE:
            client.close(end)
            connection.read_away(1.0)
    except (ClientLeft, OSError):
        end = Closed(GONE, "the connection broke")
    server.metrics.add("asr_audio_seconds_total", amount=session.seconds)
    server.log("INFO", "socket", id=head.id, seconds=round(time.monotonic() - head.started, 1),
               audio=round(session.seconds, 1), code=end.code, reason=end.reason)


def converse(client: Socket, session: Session) -> Closed:
    """Messages of a client and their answers, until either side ends it -> how. Raises ClientLeft or OSError."""
    draining = session.server.draining
    metrics = session.server.metrics
    while not draining.is_set():
        try:
            message = client.read()
        except Closed as end:
            if not draining.is_set():
                return end
        else:
            tell(client, session.take(message), metrics)
    if session.stream:
        tell(client, session.finish(), metrics)
    return Closed(GOING_AWAY, "the server is shutting down")


def tell(client: Socket, answers: Iterable[dict[str, Any]], metrics) -> None:
    for answer in answers:
        client.send_text(json.dumps(answer, ensure_ascii=False, allow_nan=False))
        if "latency_ms" in answer:
            metrics.observe("asr_stream_latency_seconds", answer["latency_ms"] / 1e3)
            if answer["mode"] != "2pass-online":        # whose words come again
                metrics.add("asr_tokens_total", amount=len(answer["tokens"]))
