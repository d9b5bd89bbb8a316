"""A result as OpenAI's API answers: json, text, srt, vtt, verbose_json or server-sent events.

Source: OpenAI's API reference for audio transcriptions.
"""
import contextlib
import json
import math
import statistics
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from report import Result, cues, join_words, log_confidence, subtitles, word_entry, written_text
from web import Refusal, Response, json_response, parse_flag


class OpenAIForm(NamedTuple):
    response_format: str            # json, text, srt, vtt or verbose_json
    granularities: list[str]        # of verbose_json: segment, word
    logprobs: bool                  # in json, for each token
    temperature: float              # has no effect
    stream: bool                    # as server-sent events
    language: str                   # the client's, or "unknown", in verbose_json


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise Refusal(400, "invalid_value", f"wanted {' or '.join(allowed)}, got {value[:40]!r}", name)


def parse_openai_form(texts: dict[str, list[str]]) -> OpenAIForm:
    """The texts of each field of a form, of which most count by their last. Unknown fields are ignored, as clients made
    for OpenAI's API send many. Raises Refusal 400."""
    last = {name: values[-1] for name, values in texts.items()}
    response_format = last.get("response_format", "json")
    granularities = texts.get("timestamp_granularities", ["segment"])
    include = texts.get("include", [])
    check_choice("response_format", response_format, ("json", "text", "srt", "vtt", "verbose_json"))
    for value in granularities:
        check_choice("timestamp_granularities[]", value, ("segment", "word"))
    for value in include:
        check_choice("include[]", value, ("logprobs",))
    temperature = math.nan
    with contextlib.suppress(ValueError):
        temperature = float(last.get("temperature", "0"))
    if not 0 <= temperature <= 1:
        raise Refusal(400, "invalid_value", "wanted a number from 0 to 1", "temperature")
    stream = parse_flag("stream", last.get("stream"))
    language = last.get("language", "").strip() or "unknown"
    return OpenAIForm(response_format, granularities, bool(include), temperature, stream, language)


def segment_entries(result: Result, temperature: float) -> list[dict]:
    """The segments of verbose_json: sentences or, without punctuation, subtitles. Nothing predicts no_speech_prob."""
    found = cues(result)
    if result.sentences is not None:
        found = [sentence.words for sentence in result.sentences]
    starts = [0.0, *(cue[0].start for cue in found[1:]), math.inf]
    entries = []
    for i, cue in enumerate(found):
        text = join_words(cue)
        raw = text.encode()
        tokens = [token for token in result.tokens if starts[i] <= token.start < starts[i + 1]]
        mean = statistics.fmean(map(log_confidence, tokens)) if tokens else 0.0
        entries.append({"id": i, "seek": 0, "start": cue[0].start, "end": cue[-1].end, "text": text,
                        "tokens": [token.id for token in tokens], "temperature": temperature,
                        "avg_logprob": round(mean, 4), "no_speech_prob": 0.0,
                        "compression_ratio": round(len(raw) / len(zlib.compress(raw)), 4)})
    return entries


def openai_response(result: Result, seconds: float, form: OpenAIForm) -> Response:
    """The result as `form` wants it; seconds: of the recording."""
    text = written_text(result).strip()
    usage = {"type": "duration", "seconds": round(seconds, 3)}
    if form.stream:
        events = ({"type": "transcript.text.delta", "delta": text},
                  {"type": "transcript.text.done", "text": text, "usage": usage})
        lines = [f"data: {json.dumps(event, ensure_ascii=False, allow_nan=False)}\n\n" for event in events]
        return Response(200, "text/event-stream; charset=utf-8", "".join(lines).encode())
    if form.response_format == "json":
        value = {"text": text, "usage": usage}
        if form.logprobs:
            value["logprobs"] = [{"token": t.token, "bytes": list(t.token.encode()),
                                  "logprob": round(log_confidence(t), 4)} for t in result.tokens]
        return json_response(value)
    if form.response_format == "verbose_json":
        value = {"task": "transcribe", "language": form.language, "duration": round(seconds, 3), "text": text,
                 "usage": usage}
        if "segment" in form.granularities:
            value["segments"] = segment_entries(result, form.temperature)
        if "word" in form.granularities:
            value["words"] = [word_entry(word) for word in result.words]
        return json_response(value)
    content = text + "\n" if form.response_format == "text" else subtitles(result, form.response_format)
    kind = "vtt" if form.response_format == "vtt" else "plain"
    return Response(200, f"text/{kind}; charset=utf-8", content.encode())
