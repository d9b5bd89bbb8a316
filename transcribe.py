"""A POST with features or recordings to its answer: parsed, queued, recognised, joined.

The file follows a request: its features (made of its body by bodies.py, on a parser thread) become text (on the one
inference thread, which owns the model). `server` is serve.Server, of which the models, the options, the batcher, the
parsers and the metrics are used.
"""
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import decode
from audio import ffmpeg_to_wav, format_name, frame_sec
from batcher import Job, deadline_passed, seconds_left
from bodies import INTERRUPTIBLE, Recording, Terms, Upload, is_wav, parse_request, read_recording
from checkpoint import System
from hotwords import unknown_warning
from openai_forms import openai_response
from report import Result, sentence_entries, token_entry, written_text
from sentences import with_sentences
from web import ClientLeft, Head, Refusal, Response, json_response, media_type


# ---- recognition ----

class Recognition(NamedTuple):
    result: Result              # tokens that spell its text when joined, "▁" for the space before a word
    weights: list[float]        # (L,) firing weight of each encoder frame


def recognise_batch(system: System, feats: Sequence[Tensor],
                    hotwords: Sequence[tuple[str, ...] | None] | None = None) -> list[Recognition]:
    """Normalised features (T,F), T >= 1, and for each what to listen for, as decode.decode_batch -> a Recognition each.
    Whole words get the mark "▁"; characters, and pieces as they are published (hel@@ lo), stay."""
    found = decode.decode_batch(system, feats, hotwords)
    mark = "▁" if system.tokenizer.unit == "word" else ""
    recognised = []
    for i, x in enumerate(feats):
        result = decode.read_result(system, found, i)
        tokens = [token._replace(token=mark + token.token) for token in result.tokens]
        frames = math.ceil(len(x) / system.config.model.encoder.subsampling)
        recognised.append(Recognition(result._replace(tokens=tokens), found.alpha[i, :frames].tolist()))
    return recognised


def recognise_jobs(system: System, jobs: Sequence[Job]) -> list[Recognition]:
    return recognise_batch(system, [job.feats for job in jobs], [job.hotwords for job in jobs])


def frame_step(system: System) -> float:
    """Seconds from one firing weight to the next."""
    return frame_sec(system.config.data) * system.config.model.encoder.subsampling


def join_pieces(system: System, upload: Upload, found: Sequence[Recognition]) -> Recognition:
    """An upload's Recognition of those of its pieces, times from its start; weights between pieces are 0."""
    weights: list[float] = []
    parts = []
    for (start, _), piece in zip(upload.pieces, found):
        place = round(start / frame_step(system))
        weights += [0.0] * (place - len(weights)) + piece.weights
        parts.append((start, piece.result))
    joined = decode.join_results(system, parts) if len(parts) > 1 else found[0].result
    result = with_sentences(system.punctuation, decode.clip_times(system, joined, upload.seconds))
    return Recognition(result, weights)


def trained_on(system: System) -> str:
    """What a checkpoint has learned from, for who wonders about its answers."""
    options = system.config.data
    if options.kind == "toy":
        return "toy features"
    source = Path(options.train).name or "recordings"
    return f"{source} at {options.sample_rate} Hz"


# ---- requests ----

class Post(NamedTuple):
    """A request that has come whole. `server` is serve.Server."""

    server: Any
    head: Head
    complete: float                     # monotonic seconds at which it had come: its deadline counts from there
    has_left: Callable[[], bool]        # asks for its client


def refuse_toy(system: System) -> None:
    """Raises Refusal 400 if the system has never heard a recording."""
    if system.config.data.kind == "toy":
        raise Refusal(400, "toy_checkpoint", f"this checkpoint was trained on {trained_on(system)}, which are no "
                      "speech: it takes features as JSON, and no recordings", "file")


def as_wav(post: Post, recording: Recording) -> Recording:
    """The recording as WAV, by ffmpeg if it must, once one of the conversions has ended. What is too long becomes a
    little longer than is allowed, and is refused by who reads it. Raises as `enqueue`."""
    server = post.server
    if is_wav(recording.wav) or server.options.no_ffmpeg or not shutil.which("ffmpeg"):
        return recording
    if post.has_left():
        raise ClientLeft
    deadline = post.complete + recording.terms.timeout
    if not server.conversions.acquire(timeout=seconds_left(deadline)):
        raise deadline_passed()
    try:
        with ffmpeg_to_wav(recording.wav, server.options.max_audio_seconds + 0.1, seconds_left(deadline)) as file:
            file.seek(0)
            return recording._replace(wav=file.read())
    except TimeoutError:
        raise deadline_passed() from None
    except ValueError as error:
        raise Refusal(400, "unsupported_format", f"got {format_name(recording.wav[:1000])}; {error}", "file") from None
    finally:
        server.conversions.release()


class Heard(NamedTuple):
    """One utterance of a request, and what became of it."""

    upload: Upload
    jobs: list[Job]             # of its pieces
    found: Recognition


def enqueue(post: Post, sent: bytes | Recording) -> tuple[Terms, list[tuple[Upload, list[Job]]]]:
    """Parse what was sent and queue its jobs, on a parser thread -> its terms, and each upload with a job per piece.
    A piece without frames is not queued, as its outcome is known.
    Raises Refusal, or ClientLeft if the client left before its turn."""
    if post.has_left():
        raise ClientLeft
    uploads, terms = parse_request(post.head, sent, post.server.models.whole, post.server.options)
    deadline = post.complete + terms.timeout
    now = time.monotonic()
    queue = []
    queued = []
    for upload in uploads:
        jobs = []
        for _, feats in upload.pieces:
            job = Job(feats, upload, now, deadline, post.has_left, upload.hotwords, taken=now)
            jobs.append(job)
            if len(feats):
                queue.append(job)
            else:
                job.outcome.set_result(Recognition(Result("", 0.0, [], []), []))
        queued.append((upload, jobs))
    post.server.batcher.submit(queue)
    return terms, queued


def recognise(post: Post, sent: bytes | Recording) -> tuple[Terms, list[Heard]]:
    """What was sent -> its terms and utterances. Raises as `enqueue`, and Refusal 504."""
    server = post.server
    is_large = isinstance(sent, bytes) and len(sent) >= INTERRUPTIBLE
    parser = server.large_json_parser if is_large else server.parser
    heard = []
    try:
        with server.batcher.preparing():
            parsing = parser.submit(enqueue, post, sent)
            terms, queued = parsing.result(seconds_left(post.complete + server.options.request_timeout))
        for upload, jobs in queued:
            pieces = [job.outcome.result(seconds_left(job.deadline)) for job in jobs]
            heard.append(Heard(upload, jobs, join_pieces(server.models.whole, upload, pieces)))
    except TimeoutError:
        parsing.cancel()        # has no effect once it has begun
        raise deadline_passed() from None
    server.metrics.add("asr_audio_seconds_total", amount=sum(one.upload.seconds for one in heard))
    server.metrics.add("asr_tokens_total", amount=sum(len(one.found.result.tokens) for one in heard))
    return terms, heard


def transcribe(server, head: Head, body: bytes, has_left: Callable[[], bool]) -> Response:
    """POST /transcribe and /v1/audio/transcriptions, which differ in the form of the answer."""
    post = Post(server, head, time.monotonic(), has_left)
    system = server.models.whole
    if system is None:
        raise Refusal(400, "streaming_checkpoint", "the model here hears streams: wanted a web socket (GET /ws), or a "
                      "server with --offline-checkpoint")
    sent = body
    if media_type(head) != "application/json":
        refuse_toy(system)
        sent = as_wav(post, read_recording(head, body, server.options))
    terms, heard = recognise(post, sent)
    upload, jobs, found = heard[0]
    if terms.openai:
        response = openai_response(found.result, upload.seconds, terms.openai)
    else:
        total_ms = (time.monotonic() - head.started) * 1e3
        results = [entry(system, one, total_ms, terms.alignment) for one in heard]
        answered = {"results": results} if terms.is_batch else results[0]
        response = json_response({"id": head.id, "model": system.config.model.name, **answered})
    warning = unknown_warning(upload.hotwords or (), system.tokenizer) or ""
    return response._replace(batch=jobs[0].batch_size, warning=warning)


def entry(system: System, heard: Heard, total_ms: float, alignment: bool) -> dict:
    """The answer for one utterance. alignment adds the firing weights, one every `step` seconds, for pictures."""
    upload, jobs, (result, weights) = heard
    batches = {job.taken: job.infer_sec for job in jobs}        # pieces may share a batch
    timing = {"queue_ms": round((min(batches) - jobs[0].queued) * 1e3, 2),
              "infer_ms": round(sum(batches.values()) * 1e3, 2),
              "total_ms": round(total_ms, 2), "batch_size": max(job.batch_size for job in jobs)}
    value = {"text": written_text(result), "confidence": result.confidence,
             "tokens": [token_entry(token) for token in result.tokens],
             "frames": sum(len(feats) for _, feats in upload.pieces), "duration": round(upload.seconds, 3),
             "timing": timing}
    if result.sentences is not None:
        value["sentences"] = sentence_entries(result)
    if warning := unknown_warning(upload.hotwords or (), system.tokenizer):
        value["warning"] = warning
    if alignment:
        step = round(frame_step(system), 4)
        value["alignment"] = {"step": step, "weights": [round(weight, 4) for weight in weights]}
    return value
