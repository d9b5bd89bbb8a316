"""The body of a POST to features: JSON, recordings, forms; what may be asked beside them.

Everything here is a function from bytes to values. Bad input raises web.Refusal, which names the field, what was
wanted and what came.
"""
import argparse
import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import decode
from audio import Part, format_name, frame_sec, frontend, normalise, read_header
from checkpoint import System
from hotwords import split_phrases, why_no_hotwords
from openai_forms import OpenAIForm, parse_openai_form
from web import Head, MIB, Refusal, media_type, parse_flag, parse_form

MAX_ITEMS = 64      # utterances in one request


class Upload(NamedTuple):
    """One utterance of a request."""

    pieces: list[tuple[float, Tensor]]      # start in seconds, features (T,F) float32 on the CPU, normalised
    seconds: float                          # of all of it
    hotwords: tuple[str, ...] | None = None     # None: no list


class Terms(NamedTuple):
    """What a POST says about its answer."""

    timeout: float                  # seconds
    is_batch: bool                  # from {"batch": ...}: the answer is a list
    alignment: bool                 # with the firing weights
    openai: OpenAIForm | None       # None on /transcribe


class Recording(NamedTuple):
    """A POST with a recording, before its samples are read."""

    wav: bytes
    fields: dict[str, Any]          # texts; hotwords may be a list of them
    terms: Terms
    name: str = ""                  # of its file, as the client says, for the log


INTERRUPTIBLE = MIB // 2    # bytes of JSON; larger bodies have a parser thread of their own and yield the GIL


def to_float(text: str) -> float:
    return float(text)


def once_each(pairs: list[tuple[str, Any]]) -> dict:
    """The object of these keys and values. Raises ValueError if a key comes twice: one of its values would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (twice, _), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:40]!r} stands twice in an object")
    return value


def parse_json(body: bytes) -> dict:
    """A JSON object, all numbers as float; overflow gives inf, which its reader refuses. Raises Refusal 400.
    In a large body a Python function converts each number: json's C code alone does not yield the GIL, and /health
    would wait for it."""
    number = float if len(body) < INTERRUPTIBLE else to_float
    try:
        value = json.loads(body.decode(), parse_int=number, parse_float=number, parse_constant=float,
                           object_pairs_hook=once_each)
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
        raise Refusal(400, "invalid_type", f"wanted an array of rows, got {json_type(value)}", place)
    if not value:
        raise Refusal(422, "empty_features", "wanted at least one row", place)
    if len(value) > max_frames:
        raise Refusal(413, "too_many_frames", f"{len(value)} rows, at most {max_frames} are allowed", place)
    feats = np.empty((len(value), dim), np.float32)
    with np.errstate(over="ignore"):        # gives inf, found below
        for i, row in enumerate(value):
            if not isinstance(row, list):
                raise Refusal(422, "invalid_type", f"row {i}: wanted an array, got {json_type(row)}", place)
            if len(row) != dim:
                raise Refusal(422, "wrong_dim", f"row {i} has {len(row)} values, the model needs {dim}", place)
            types = list(map(type, row))
            if types.count(float) < dim:
                j = next(j for j, found in enumerate(types) if found is not float)
                got = json_type(row[j])
                raise Refusal(422, "invalid_type", f"row {i}, column {j}: wanted a number, got {got}", place)
            feats[i] = row
    finite = np.isfinite(feats)
    if not finite.all():
        i, j = np.argwhere(~finite)[0]
        raise Refusal(422, "not_finite", f"row {i}, column {j} is not finite as float32", place)
    return feats


def features(system: System, samples: Tensor, place: str) -> Tensor:
    """Samples (n,) at the model's rate -> its input (T,F). Raises Refusal 422 for NaN."""
    config = system.config.data
    return prepare(system, frontend(samples, config.sample_rate, config), place)


def prepare(system: System, feats: Tensor, place: str) -> Tensor:
    """Raw features (T,F) -> the model's input (T,F), normalised and clamped. Raises Refusal 422 for NaN."""
    feats = normalise(feats, system.stats.cpu())
    if feats.isnan().any():
        raise Refusal(422, "not_finite", "not finite after normalisation", place)
    return feats.clamp(-1e3, 1e3)       # real ones reach about 10; 1e30 would overflow inside the model


MAX_HOTWORDS, MAX_HOTWORD_LENGTH = 1000, 64      # entries of a list, characters of each


def parse_hotwords(value: Any, system: System, place: str) -> tuple[str, ...] | None:
    """An array of phrases, or text with one a line or commas between them; None: no list. Raises Refusal 422."""
    if value is None:
        return None
    if system.encode_list is None:
        raise Refusal(422, "no_hotwords", why_no_hotwords(system.model), place)
    phrases = split_phrases(value) if isinstance(value, str) else value
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise Refusal(422, "invalid_type", "wanted an array of strings, or a string with one phrase a line "
                      "or commas between them", place)
    longest = max(map(len, phrases), default=0)
    if len(phrases) > MAX_HOTWORDS or longest > MAX_HOTWORD_LENGTH:
        raise Refusal(422, "too_many_hotwords", f"wanted at most {MAX_HOTWORDS} phrases of at most "
                      f"{MAX_HOTWORD_LENGTH} characters, got {len(phrases)}, the longest of {longest}", place)
    return tuple(phrases)


def features_upload(item: dict, system: System, max_frames: int, prefix: str = "") -> Upload:
    """{"features": ..., "hotwords": ...} -> Upload; prefix: of its fields, in messages. Raises Refusal."""
    dim = system.stats.shape[1]
    place = f"{prefix}features"
    if "features" not in item:
        raise Refusal(400, "missing_field", f"wanted an array of rows of {dim} numbers, got none", place)
    feats = torch.from_numpy(parse_features(item["features"], dim, max_frames, place))
    hotwords = parse_hotwords(item.get("hotwords"), system, f"{prefix}hotwords")
    return Upload([(0.0, prepare(system, feats, place))], len(feats) * frame_sec(system.config.data), hotwords)


def json_uploads(value: dict, system: System, options: argparse.Namespace) -> list[Upload]:
    """{"features": ...} or {"batch": [{"features": ...}, ...]} -> its utterances. Raises Refusal."""
    if "batch" not in value:
        return [features_upload(value, system, options.max_frames)]
    batch = value["batch"]
    most = min(MAX_ITEMS, options.max_queue)
    if "features" in value or not isinstance(batch, list) or not 1 <= len(batch) <= most:
        raise Refusal(422, "invalid_value", f"wanted 1 to {most} objects in an array, without features beside", "batch")
    uploads = []
    for i, item in enumerate(batch):
        if not isinstance(item, dict):
            raise Refusal(422, "invalid_type", f"wanted an object, got {json_type(item)}", f"batch[{i}]")
        uploads.append(features_upload(item, system, options.max_frames, f"batch[{i}]."))
    return uploads


def wav_seconds(body: bytes, longest: float) -> float:
    """The length of a WAV file, once its header has been checked. Raises Refusal."""
    if not body:
        raise Refusal(400, "empty_audio", "got 0 bytes", "file")
    try:
        header = read_header(io.BytesIO(body))
    except ValueError as error:
        raise Refusal(400, "unsupported_format", f"broken WAV: {error}", "file") from None
    if header is None or not (header.channels <= 8 and 4000 <= header.rate_hz <= 384000):
        found = f"{header.channels} channels at {header.rate_hz} Hz" if header else format_name(body[:1000])
        raise Refusal(400, "unsupported_format", "wanted WAV (PCM 8/16/24/32 bit, float 32/64, A-law or "
                      f"mu-law, 1 to 8 channels, 4 to 384 kHz), got {found}", "file")
    seconds = header.num_samples / header.rate_hz
    if not seconds:
        raise Refusal(400, "empty_audio", "a WAV without samples", "file")
    if seconds > longest:
        raise Refusal(413, "audio_too_long", f"{seconds:.1f} s, at most {longest:g} s are allowed", "file")
    return seconds


def wav_upload(body: bytes, system: System, options: argparse.Namespace, place: str) -> Upload:
    """A WAV file -> Upload, one piece per segment of decode.cut_recording; place: of it, in warnings. Raises Refusal.
    All that the header tells is checked before any sample is decoded."""
    seconds = wav_seconds(body, options.max_audio_seconds)
    pieces = []
    try:
        for piece in decode.cut_recording(system, Part(body, name=place)):
            pieces.append((piece.start_sec, features(system, piece.samples, "file")))
    except ValueError as error:
        raise Refusal(422, "not_finite", str(error).removeprefix(f"{place}: "), "file") from None
    return Upload(pieces or [(0.0, torch.zeros(0, system.stats.shape[1]))], seconds)        # there may be no speech


def parse_timeout(value: Any, longest: float) -> float:
    """Seconds above 0, as float or text, None = `longest` -> those, at most `longest`. Raises Refusal 422."""
    seconds = longest if value is None else math.nan
    if type(value) in (float, str):         # in JSON, in a query or form
        with contextlib.suppress(ValueError):
            seconds = float(value)
    if not 0 < seconds < math.inf:
        raise Refusal(422, "invalid_value", "wanted a number of seconds above 0", "timeout")
    return min(seconds, longest)


def told_hotwords(uploads: Sequence[Upload], fields: dict[str, Any], system: System, path: str) -> list[Upload]:
    """The uploads with the hotwords that a request has for all of them. Raises Refusal 422."""
    place = "hotwords"
    value = fields.get("hotwords")
    if value is None and path != "/transcribe" and system.encode_list is not None:
        place = "prompt"        # the field of OpenAI's clients, which a model that takes none ignores
        value = fields.get("prompt") or None
    hotwords = parse_hotwords(value, system, place)
    return [upload._replace(hotwords=hotwords) if upload.hotwords is None else upload for upload in uploads]


def parse_terms(fields: dict[str, Any], longest: float, is_batch: bool = False,
                openai: OpenAIForm | None = None) -> Terms:
    alignment = openai is None and parse_flag("alignment", fields.get("alignment"))
    return Terms(parse_timeout(fields.get("timeout"), longest), is_batch, alignment, openai)


def read_recording(head: Head, body: bytes, options: argparse.Namespace) -> Recording:
    """A form, or a recording of any format; /transcribe has fields of the query too, the body's win. Raises Refusal."""
    texts: dict[str, list[str]] = {}
    name = ""
    if media_type(head) == "multipart/form-data":
        name, body, texts = parse_form(body, head.headers["content-type"])
    fields: dict[str, Any] = {field: values[-1] for field, values in texts.items()}
    if len(texts.get("hotwords", ())) > 1:
        fields["hotwords"] = texts["hotwords"]
    if head.path == "/transcribe":
        fields = {**head.query, **fields}
        return Recording(body, fields, parse_terms(fields, options.request_timeout), name)
    openai = parse_openai_form(texts)
    return Recording(body, fields, parse_terms(fields, options.request_timeout, openai=openai), name)


def is_wav(body: bytes) -> bool:
    """Whether wav_seconds is the one to judge it, good or bad."""
    return not body or body[:4] in (b"RIFF", b"RF64") and body[8:12] == b"WAVE"


def parse_request(head: Head, sent: bytes | Recording, system: System,
                  options: argparse.Namespace) -> tuple[list[Upload], Terms]:
    """JSON as it came, or a Recording, which is WAV -> its utterances and terms. Raises Refusal."""
    if isinstance(sent, Recording):
        fields, terms = sent.fields, sent.terms
        uploads = [wav_upload(sent.wav, system, options, f"request {head.id} {sent.name[:100]}".rstrip())]
    else:
        given = parse_json(sent)
        if isinstance(given.get("timeout"), str):
            given["timeout"] = math.nan         # text is for queries and forms
        fields = {**head.query, **given}        # not kept: each number of features has 24 bytes
        uploads = json_uploads(given, system, options)
        terms = parse_terms(fields, options.request_timeout, "batch" in given)
    return told_hotwords(uploads, fields, system, head.path), terms
