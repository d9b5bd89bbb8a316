"""Serve recognition over HTTP: python serve.py --checkpoint runs/latest/checkpoints/best.pt --port 8000

    curl -H "Content-Type: application/json" -d '{"features": [[0.1, ...], ...]}' http://localhost:8000/transcribe
    curl -H "Content-Type: audio/wav" --data-binary @a.wav http://localhost:8000/transcribe?alignment=true
    curl -F file=@a.wav -F response_format=srt http://localhost:8000/v1/audio/transcriptions     (OpenAI's)
    http://localhost:8000                  a page to drop recordings on        /health  /metrics  /v1/models

The file follows a request: its body becomes features (on a parser thread), these become text (on the one inference
thread, which owns the model); then come the routes and the command line. How requests arrive is in web.py, how they
wait and are batched in batcher.py, OpenAI's answers in openai_forms.py; the page is page.html.

Needs torch (2.10 or later; serve your own checkpoints only), numpy, and decode.py with all that it needs.
"""
import argparse
import contextlib
import ctypes
import hmac
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# Set before torch is loaded: idle OpenMP threads then spin for 10 us and sleep. By default they spin for so long that
# every operator is late when another process keeps a core busy.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from torch import Tensor

import audio
import decode
from audio import frame_sec, frontend, normalise, read_header
from batcher import Batcher, Job, Metrics, deadline_passed, num_utterances, resident_bytes
from checkpoint import PRECISIONS, System, load_system
from hotwords import split_phrases, unknown_warning, why_no_hotwords
from openai_forms import OpenAIForm, openai_response, parse_openai_form
from report import Result, token_entry
from web import (ClientLeft, Door, Head, Limits, MIB, Refusal, Response, json_response, media_type, parse_flag,
                 parse_form, shutting_down, start_log)

MAX_ITEMS = 64                                          # utterances in one request
CUT_SEC = 2.0                                           # for requests that are still being sent at SIGTERM


# ---- the body: bytes to features ----

class Upload(NamedTuple):
    """One utterance of a request."""

    pieces: list[tuple[float, Tensor]]      # start in seconds, features (T,F) float32 on the CPU, normalised
    seconds: float                          # of all of it
    hotwords: tuple[str, ...] | None = None     # None: no list


class Request(NamedTuple):
    """What a POST asks for."""

    uploads: list[Upload]
    timeout: float                  # seconds
    is_batch: bool                  # from {"batch": ...}: the answer is a list
    alignment: bool                 # with the firing weights
    openai: OpenAIForm | None       # None on /transcribe


INTERRUPTIBLE = MIB // 2    # bytes of JSON; larger bodies have a parser thread of their own and yield the GIL


def to_float(text: str) -> float:
    return float(text)


def parse_json(body: bytes) -> dict:
    """A JSON object, all numbers as float; overflow gives inf, which its reader refuses. Raises Refusal 400.

    In a large body a Python function converts each number: json's C code alone does not yield the GIL, and /health
    would wait for it.
    """
    number = float if len(body) < INTERRUPTIBLE else to_float
    try:
        value = json.loads(body.decode(), parse_int=number, parse_float=number, parse_constant=float)
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is a ValueError
        raise Refusal(400, "invalid_json", f"the body cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", 'the body must be a JSON object like {"features": [[...], ...]}')
    return value


def json_type(value: Any) -> str:
    """The JSON type of a value, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")


def parse_features(value: Any, dim: int, max_frames: int, place: str) -> np.ndarray:
    """A JSON array of T rows of `dim` numbers -> (T,dim) float32, finite. Raises Refusal, which names `place`."""
    if not isinstance(value, list):
        raise Refusal(400, "invalid_type", f"{place}: wanted an array of rows, got {json_type(value)}", place)
    if not value:
        raise Refusal(422, "empty_features", f"{place}: wanted at least one row", place)
    if len(value) > max_frames:
        raise Refusal(413, "too_many_frames", f"{place}: {len(value)} rows, at most {max_frames} are allowed", place)
    feats = np.empty((len(value), dim), np.float32)
    with np.errstate(over="ignore"):        # gives inf, found below
        for i, row in enumerate(value):
            if not isinstance(row, list):
                raise Refusal(422, "invalid_type", f"{place}: row {i} must be an array, got {json_type(row)}", place)
            if len(row) != dim:
                raise Refusal(422, "wrong_dim", f"{place}: row {i} has {len(row)} values, the model needs {dim}", place)
            types = list(map(type, row))
            if types.count(float) < dim:
                j = next(j for j, found in enumerate(types) if found is not float)
                message = f"{place}: row {i}, column {j} must be a number, got {json_type(row[j])}"
                raise Refusal(422, "invalid_type", message, place)
            feats[i] = row
    finite = np.isfinite(feats)
    if not finite.all():
        i, j = np.argwhere(~finite)[0]
        raise Refusal(422, "not_finite", f"{place}: row {i}, column {j} is not finite as float32", place)
    return feats


def prepare(system: System, feats: Tensor, place: str) -> Tensor:
    """Raw features (T,F) -> the model's input (T,F), normalised and clamped. Raises Refusal 422 for NaN."""
    feats = normalise(feats, system.stats.cpu())
    if feats.isnan().any():
        raise Refusal(422, "not_finite", f"{place}: not finite after normalisation", place)
    return feats.clamp(-1e3, 1e3)       # real ones reach about 10; 1e30 would overflow inside the model


MAX_HOTWORDS, MAX_HOTWORD_LENGTH = 1000, 64      # entries of a list, characters of each


def parse_hotwords(value: Any, system: System, place: str) -> tuple[str, ...] | None:
    """An array of phrases, or text with one a line or commas between them; None: no list. Raises Refusal 422."""
    if value is None:
        return None
    if system.encode_list is None:
        raise Refusal(422, "no_hotwords", f"{place}: {why_no_hotwords(system.model)}", place)
    phrases = split_phrases(value) if isinstance(value, str) else value
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise Refusal(422, "invalid_type", f"{place}: wanted an array of strings, or a string with one phrase a line "
                      "or commas between them", place)
    longest = max(map(len, phrases), default=0)
    if len(phrases) > MAX_HOTWORDS or longest > MAX_HOTWORD_LENGTH:
        raise Refusal(422, "too_many_hotwords", f"{place}: wanted at most {MAX_HOTWORDS} phrases of at most "
                      f"{MAX_HOTWORD_LENGTH} characters, got {len(phrases)}, the longest of {longest}", place)
    return tuple(phrases)


def features_upload(item: dict, system: System, max_frames: int, place: str) -> Upload:
    """{"features": ...} -> Upload. Raises Refusal."""
    dim = system.stats.shape[1]
    if "features" not in item:
        raise Refusal(400, "missing_field", f"{place} is missing: wanted an array of rows of {dim} numbers", place)
    feats = parse_features(item["features"], dim, max_frames, place)
    seconds = len(feats) * frame_sec(system.config.data)
    return Upload([(0.0, prepare(system, torch.from_numpy(feats), place))], seconds)


def json_uploads(value: dict, system: System, options: argparse.Namespace) -> list[Upload]:
    """{"features": ...} or {"batch": [{"features": ...}, ...]} -> its utterances. Raises Refusal."""
    if "batch" not in value:
        return [features_upload(value, system, options.max_frames, "features")]
    batch = value["batch"]
    most = min(MAX_ITEMS, options.max_queue)
    if "features" in value or not isinstance(batch, list) or not 1 <= len(batch) <= most:
        message = f"batch: wanted an array of 1 to {most} objects, and no features beside it"
        raise Refusal(422, "invalid_value", message, "batch")
    for i, item in enumerate(batch):
        if not isinstance(item, dict):
            raise Refusal(422, "invalid_type", f"batch[{i}] must be an object, got {json_type(item)}", f"batch[{i}]")
    uploads = []
    for i, item in enumerate(batch):
        upload = features_upload(item, system, options.max_frames, f"batch[{i}].features")
        hotwords = parse_hotwords(item.get("hotwords"), system, f"batch[{i}].hotwords")
        uploads.append(upload._replace(hotwords=hotwords))
    return uploads


MAGIC = ((rb"ID3|\xff\xfb", "MP3"), (rb"OggS", "Ogg"), (rb"fLaC", "FLAC"), (rb"\x1aE\xdf\xa3", "WebM"),
         (rb"....ftyp", "MP4"), (rb"RIFX", "big-endian WAV"), (rb"FORM", "AIFF"),
         (rb"RIFF|RF64", "WAV with another sample format"), (rb"", "something else"))   # first bytes, for the message


def wav_seconds(body: bytes, longest: float) -> float:
    """The length of a WAV file, once its header has been checked. Raises Refusal."""
    if not body:
        raise Refusal(400, "empty_audio", "file: got 0 bytes", "file")
    try:
        header = read_header(io.BytesIO(body))
    except ValueError as error:
        raise Refusal(400, "unsupported_format", f"file: broken WAV: {error}", "file") from None
    if header is None or not (header.channels <= 8 and 4000 <= header.rate_hz <= 384000):
        if header:
            found = f"{header.channels} channels at {header.rate_hz} Hz"
        else:
            found = next(name for start, name in MAGIC if re.match(start, body, re.DOTALL))
        raise Refusal(400, "unsupported_format", "file: wanted WAV (PCM 8/16/24/32 bit, float 32/64, A-law or "
                      f"mu-law, 1 to 8 channels, 4 to 384 kHz), got {found}", "file")
    seconds = header.num_samples / header.rate_hz
    if not seconds:
        raise Refusal(400, "empty_audio", "file: a WAV without samples", "file")
    if seconds > longest:
        raise Refusal(413, "audio_too_long", f"file: {seconds:.1f} s, at most {longest:g} s are allowed", "file")
    return seconds


def wav_upload(body: bytes, system: System, options: argparse.Namespace) -> Upload:
    """A WAV file -> Upload, one piece per segment (those of audio.segments with system.segment_sec). Raises Refusal.

    All that the header tells is checked before any sample is decoded.
    """
    seconds = wav_seconds(body, options.max_audio_seconds)
    config = system.config.data
    pieces = []
    try:
        for piece in audio.segments(body, config, *system.segment_sec):
            pieces.append((piece.start_sec, frontend(piece.samples, config.sample_rate, config)))
    except ValueError as error:
        message = str(error).removeprefix("<bytes>: ")
        raise Refusal(422, "not_finite", f"file: {message}", "file") from None
    return Upload([(start, prepare(system, feats, "file")) for start, feats in pieces], seconds)


def parse_timeout(value: Any, longest: float) -> float:
    """Seconds above 0, as float or text, None = `longest` -> those, at most `longest`. Raises Refusal 422."""
    seconds = longest if value is None else math.nan
    if type(value) in (float, str):         # in JSON, in a query or form
        with contextlib.suppress(ValueError):
            seconds = float(value)
    if not 0 < seconds < math.inf:
        raise Refusal(422, "invalid_value", "timeout: wanted seconds above 0", "timeout")
    return min(seconds, longest)


def told_hotwords(uploads: Sequence[Upload], fields: dict[str, Any], system: System, path: str) -> list[Upload]:
    """The uploads with the hotwords that a request has for all of them. Raises Refusal 422."""
    place = "hotwords"
    value = fields.get("hotwords", fields.get("hotwords[]"))
    if value is None and path != "/transcribe" and system.encode_list is not None:
        place = "prompt"        # the field of OpenAI's clients, which a model that takes none ignores
        value = fields.get("prompt") or None
    hotwords = parse_hotwords(value, system, place)
    return [upload._replace(hotwords=hotwords) if upload.hotwords is None else upload for upload in uploads]


def parse_request(head: Head, body: bytes, system: System, options: argparse.Namespace) -> Request:
    """A POST of any media type; /transcribe takes fields from the query too, the body's win. Raises Refusal."""
    fields: dict[str, Any] = {}         # not kept: each number of features has 24 bytes
    is_batch = False
    if media_type(head) == "application/json":
        fields = parse_json(body)
        is_batch = "batch" in fields
        uploads = json_uploads(fields, system, options)
    elif media_type(head) == "multipart/form-data":
        file, fields = parse_form(body, head.headers["content-type"])
        uploads = [wav_upload(file, system, options)]
    else:
        uploads = [wav_upload(body, system, options)]
    alignment = False
    openai = None
    if head.path == "/transcribe":
        fields = {**head.query, **fields}
        alignment = parse_flag("alignment", fields.get("alignment"))
    else:
        openai = parse_openai_form(fields)
    uploads = told_hotwords(uploads, fields, system, head.path)
    timeout = parse_timeout(fields.get("timeout"), options.request_timeout)
    return Request(uploads, timeout, is_batch, alignment, openai)


# ---- recognition ----

class Recognition(NamedTuple):
    result: Result              # tokens that spell its text when joined, "▁" for the space before a word
    weights: list[float]        # (L,) firing weight of each encoder frame


def recognise_batch(system: System, feats: Sequence[Tensor],
                    hotwords: Sequence[tuple[str, ...] | None] | None = None) -> list[Recognition]:
    """Normalised features (T,F), T >= 1, and for each what to listen for, as decode.decode_batch -> a Recognition each.

    Whole words get the mark "▁"; characters, and pieces as they are published (hel@@ lo), stay.
    """
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
    return Recognition(decode.clip_times(system, joined, upload.seconds), weights)


# ---- routes ----

GET, POST = "GET, HEAD, OPTIONS", "POST, OPTIONS"       # values of the header Allow
ROUTES = {"/": GET, "/health": GET, "/metrics": GET, "/v1/models": GET, "/v1/models/{id}": GET,
          "/transcribe": POST, "/v1/audio/transcriptions": POST}
MEDIA_TYPES = {"/transcribe": ("application/json", "audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave",
                               "multipart/form-data"),
               "/v1/audio/transcriptions": ("multipart/form-data",)}


def route_of(head: Head) -> str:
    """The key in ROUTES, or "other", as metrics and log name it."""
    name = "/v1/models/{id}" if head.path.startswith("/v1/models/") else head.path
    return name if name in ROUTES else "other"


class Server(Door):
    """What the routes need, and the routes."""

    def __init__(self, system: System, options: argparse.Namespace, log: Callable[[str], None], created: int = 0):
        self.system = system
        self.options = options
        self.model = system.config.model.name
        self.created = created                          # the checkpoint, seconds since 1970
        self.started = time.monotonic()
        self.page = (Path(__file__).resolve().parent / "page.html").read_text("utf-8")
        self.metrics = Metrics()
        self.batcher = Batcher(partial(recognise_jobs, system), options, self.metrics)
        self.key = os.environ.get("ASR_API_KEY", "")                # "" = anybody may
        # One thread each: parsing holds the GIL, and torch keeps a pool of its own for every thread that calls it.
        self.parser = ThreadPoolExecutor(1, "parser")
        self.large_json_parser = ThreadPoolExecutor(1, "large JSON")
        limits = Limits(*(getattr(options, name) for name in Limits._fields))
        super().__init__(options.host, options.port, limits, log)

    def admit(self, head: Head) -> None:
        """Check all that can be checked before the body is read: route, method, key, length, type. Raises Refusal."""
        route = route_of(head)
        allow = ROUTES.get(route)
        if not allow:
            raise Refusal(404, "not_found", f"wanted one of {', '.join(ROUTES)}")
        if head.method not in allow.split(", "):
            raise Refusal(405, "method_not_allowed", f"{route} takes {allow}", headers=[("Allow", allow)])
        if head.method == "OPTIONS" or route in ("/", "/health", "/metrics"):
            return
        self.check_key(head)
        if self.draining.is_set():
            raise shutting_down()
        if head.method != "POST":
            return
        limit = int(self.options.max_body_mb * MIB)
        if head.length is None:
            raise Refusal(411, "length_required", "wanted a Content-Length header; chunked bodies are not decoded")
        if media_type(head) not in MEDIA_TYPES[route] or "content-encoding" in head.headers:
            wanted = ", ".join(MEDIA_TYPES[route])
            raise Refusal(415, "unsupported_media_type", f"{route} takes {wanted}, without Content-Encoding")
        if head.length > limit:
            raise Refusal(413, "body_too_large", f"body: {head.length} bytes, at most {limit} are allowed")

    def check_key(self, head: Head) -> None:
        scheme, _, key = head.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if self.key and not (scheme.lower() == b"bearer" and hmac.compare_digest(self.key.encode(), key)):
            raise Refusal(401, "invalid_api_key",
                          "wanted the header 'Authorization: Bearer KEY' with this server's key",
                          headers=[("WWW-Authenticate", "Bearer")])

    def answer(self, head: Head, body: bytes, has_left: Callable[[], bool]) -> Response:
        """A whole, admitted request -> its answer. Raises Refusal or ClientLeft."""
        route = route_of(head)
        if head.method == "OPTIONS":
            return Response(204, "", b"", (("Allow", ROUTES[route]),))
        if route == "/":
            return page_response(self.page)
        if route == "/health":
            return health(self)
        if route == "/metrics":
            return Response(200, "text/plain; version=0.0.4; charset=utf-8", metrics_text(self).encode())
        if route == "/v1/models":
            return json_response({"object": "list", "data": [model_card(self)]})
        if route == "/v1/models/{id}":
            if head.path != f"/v1/models/{self.model}":
                raise Refusal(404, "not_found", f"the one model here is {self.model}", "model")
            return json_response(model_card(self))
        return transcribe(self, head, body, has_left)

    def count_and_log(self, head: Head | None, response: Response, status: int) -> None:
        if head is None:
            self.metrics.add("asr_rejected_total", 'reason="overloaded"')
            return
        route = route_of(head)
        seconds = time.monotonic() - head.started
        self.metrics.count_request(route, status, seconds)
        self.log(f"{head.id} {route} {status} {seconds * 1e3:.1f} ms{response.remark}")


def health(server: Server) -> Response:
    system = server.system
    about = {"status": "draining" if server.draining.is_set() else "ok", "model": server.model,
             "feature_dim": system.stats.shape[1], "sample_rate": system.config.data.sample_rate,
             "device": str(system.stats.device), "uptime": round(time.monotonic() - server.started, 3)}
    if about["status"] == "ok":
        return json_response(about)
    return shutting_down().response(beside=about)


def page_response(page: str) -> Response:
    """The page, whose scripts and styles carry a nonce; it loads nothing else from anywhere."""
    nonce = uuid.uuid4().hex
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
              "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    headers = (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))
    return Response(200, "text/html; charset=utf-8", page.replace("NONCE", nonce).encode(), headers)


def model_card(server: Server) -> dict:
    return {"id": server.model, "object": "model", "created": server.created, "owned_by": "local"}


def enqueue(server: Server, head: Head, body: bytes, complete: float,
            has_left: Callable[[], bool]) -> tuple[Request, list[list[Job]]]:
    """Parse a body and queue its jobs, on a parser thread -> its Request; for each upload, a job per piece.

    A piece without frames is not queued, as its outcome is known. complete: monotonic seconds at which the whole
    request had arrived; its deadline counts from there.
    Raises Refusal, or ClientLeft if the client left before its turn.
    """
    if has_left():
        raise ClientLeft
    request = parse_request(head, body, server.system, server.options)
    now = time.monotonic()
    queue, by_upload = [], []
    for upload in request.uploads:
        jobs = [Job(feats, upload, now, complete + request.timeout, has_left, upload.hotwords, taken=now)
                for _, feats in upload.pieces]
        by_upload.append(jobs)
        for job in jobs:
            if len(job.feats):
                queue.append(job)
            else:
                job.outcome.set_result(Recognition(Result("", 0.0, [], []), []))
    server.batcher.submit(queue)
    return request, by_upload


def transcribe(server: Server, head: Head, body: bytes, has_left: Callable[[], bool]) -> Response:
    """POST /transcribe and /v1/audio/transcriptions, which differ in the form of the answer."""
    is_large = len(body) >= INTERRUPTIBLE and media_type(head) == "application/json"
    parser = server.large_json_parser if is_large else server.parser
    found = []
    try:
        with server.batcher.preparing():
            parsing = parser.submit(enqueue, server, head, body, time.monotonic(), has_left)
            request, by_upload = parsing.result(server.options.request_timeout)
        for upload, jobs in zip(request.uploads, by_upload):
            pieces = [job.outcome.result(max(0.0, job.deadline - time.monotonic())) for job in jobs]
            found.append(join_pieces(server.system, upload, pieces))
    except TimeoutError:
        parsing.cancel()        # has no effect once it has begun
        raise deadline_passed() from None
    server.metrics.add("asr_audio_seconds_total", amount=sum(upload.seconds for upload in request.uploads))
    server.metrics.add("asr_tokens_total", amount=sum(len(recognition.result.tokens) for recognition in found))
    if request.openai:
        response = openai_response(found[0].result, request.uploads[0].seconds, request.openai)
    else:
        total_ms = (time.monotonic() - head.started) * 1e3
        results = [entry(server.system, upload, jobs, recognition, total_ms, request.alignment)
                   for upload, jobs, recognition in zip(request.uploads, by_upload, found)]
        answered = {"results": results} if request.is_batch else results[0]
        response = json_response({"id": head.id, "model": server.model, **answered})
    remark = f" batch {by_upload[0][0].batch_size}"
    if warning := unknown_warning(request.uploads[0].hotwords or (), server.system.tokenizer):
        remark += f" {json.dumps(warning)}"       # its escapes keep a line a line
    return response._replace(remark=remark)


def entry(system: System, upload: Upload, jobs: Sequence[Job], found: Recognition, total_ms: float,
          alignment: bool) -> dict:
    """The answer for one upload. alignment adds the firing weights, one every `step` seconds, for pictures."""
    batches = {job.taken: job.infer_sec for job in jobs}        # pieces may share a batch
    timing = {"queue_ms": round((min(batches) - jobs[0].queued) * 1e3, 2),
              "infer_ms": round(sum(batches.values()) * 1e3, 2),
              "total_ms": round(total_ms, 2), "batch_size": max(job.batch_size for job in jobs)}
    value = {"text": found.result.text, "confidence": found.result.confidence,
             "tokens": [token_entry(token) for token in found.result.tokens],
             "frames": sum(len(feats) for _, feats in upload.pieces), "duration": round(upload.seconds, 3),
             "timing": timing}
    if warning := unknown_warning(upload.hotwords or (), system.tokenizer):
        value["warning"] = warning
    if alignment:
        weights = [round(weight, 4) for weight in found.weights]
        value["alignment"] = {"step": round(frame_step(system), 4), "weights": weights}
    return value


def metrics_text(server: Server) -> str:
    phases = list(server.phases.values())
    batcher = server.batcher
    return server.metrics.text({
        "asr_batch_padding_ratio": batcher.padding / max(1, batcher.padded),
        "asr_queue_depth": num_utterances(batcher.waiting), "asr_inflight_requests": phases.count("busy"),
        "asr_connections": len(phases), "process_resident_memory_bytes": resident_bytes(),
        "process_start_time_seconds": time.time() - (time.monotonic() - server.started)})


# ---- the command line ----

def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve recognition over HTTP. The environment variable ASR_API_KEY, "
                                     "if set, is a key that clients must send.")
    add = parser.add_argument
    add("--checkpoint", "--ckpt", default=decode.DEFAULT_CHECKPOINT, help=f"default: {decode.DEFAULT_CHECKPOINT}")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 = any free one (default 8000)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", default="float32", choices=list(PRECISIONS), help="of matrix products (default float32)")
    add("--threads", type=int, default=0, help="threads of torch; 0 = its own choice")
    numbers = {"max-batch-size": (16, "utterances in a batch"),
               "max-wait-ms": (5.0, "ms to wait for the next of them, 8 times that in all"),
               "max-batch-frames": (20000, "padded frames in a batch"),
               "max-queue": (128, "utterances that may wait"),
               "request-timeout": (30.0, "s from a complete request to its answer"),
               "header-timeout": (10.0, "s for the header"),
               "body-timeout": (30.0, "s for the body"), "write-timeout": (15.0, "s for the answer"),
               "idle-timeout": (15.0, "s between requests"), "drain-timeout": (20.0, "s to finish after SIGTERM"),
               "max-body-mb": (25.0, "MiB of a request"), "max-audio-seconds": (60.0, "s of a recording"),
               "max-frames": (6000, "rows of features"), "max-connections": (256, "open connections")}
    for name, (default, meaning) in numbers.items():
        add(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default:g})")
    add("--cors-origin", action="append", default=[], metavar="URL", help="let pages of this origin call; repeatable")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    for name in ("threads", *numbers):
        least = 0 if name in ("threads", "max-wait-ms") else 1e-3
        if not least <= getattr(arguments, name.replace("-", "_")) < math.inf:
            parser.error(f"--{name} must be {'0 or more' if not least else 'above 0'}")
    return arguments


def start(server: Server) -> Server:
    """Start the inference thread and the one that accepts connections."""
    threading.Thread(target=server.batcher.run, daemon=True, name="inference").start()
    threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True, name="accept").start()
    return server


def drain(server: Server, timeout: float) -> None:
    """Refuse new requests, answer those that came whole, cut the others after CUT_SEC; takes `timeout` s at most."""
    started = time.monotonic()
    server.draining.set()
    server.cut(["idle"], started + min(CUT_SEC, 0.3 * timeout))
    server.cut(["idle", "reading"], started + max(0.5 * timeout, timeout - 1.0))
    with server.batcher.changed:
        late = server.batcher.waiting
        server.batcher.waiting = []
    for job in late:
        job.outcome.set_exception(shutting_down())
    if late:
        time.sleep(0.2)         # for their answers
    server.shutdown()
    server.server_close()


def load_warm(options: argparse.Namespace) -> System:
    """The system, after one pass on as many threads as are asked for: the first client does not wait for torch."""
    if options.threads:
        torch.set_num_threads(options.threads)
    system = load_system(options.checkpoint, options.device, options.dtype, laid_out=True)
    recognise_batch(system, [torch.zeros(50, system.stats.shape[1])])
    return system


def bound_memory() -> None:
    """Keep memory flat over thousands of requests. Before torch's first forward pass, and on Linux only.

    By default oneDNN caches 1024 compiled kernels, some for each batch shape, and glibc opens a heap for new threads.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-8, 2)         # M_ARENA_MAX


def catch_signals() -> int:
    """SIGTERM and SIGINT from now on -> a descriptor with a byte to read for each.

    The system may hand a signal to any thread. Python calls its handler in the main thread, which would sleep on in
    Event.wait(); only set_wakeup_fd's byte is written by the thread that the signal has reached.
    """
    to_read, to_write = os.pipe()
    os.set_blocking(to_write, False)
    signal.set_wakeup_fd(to_write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    return to_read


def run(options: argparse.Namespace) -> NoReturn:
    bound_memory()
    signals = catch_signals()
    sys.setswitchinterval(0.0002)       # default 5 ms: while bodies are parsed, inference waits less for the GIL
    system = load_warm(options)
    created = int(Path(options.checkpoint).stat().st_mtime)
    try:
        server = start(Server(system, options, start_log(), created))
    except OSError as error:
        raise ValueError(f"--host {options.host} --port {options.port}: {error.strerror}; "
                         "--port 0 takes a free port") from None
    host, port = server.server_address[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"listening on http://{shown}:{port} ({server.model}, {options.checkpoint}, {system.stats.device})",
          file=sys.stderr, flush=True)
    os.read(signals, 1)         # waits for the first
    drain(server, options.drain_timeout)
    os._exit(0)         # a normal exit would wait for the parsers, and abort if a thread is still inside torch


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    try:
        run(options)
    except (ValueError, OSError, OverflowError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
