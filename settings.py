"""What the client of a web socket may ask for, by FunASR's names, and what of it is refused.

Every key is optional and may come again; those that are unknown (chunk_interval, itn) are ignored. Needs streaming.py
and bodies.py with what these need. Source: FunASR's runtime/docs/websocket_protocol.md and its clients.
"""
import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bodies import parse_hotwords
from checkpoint import System
from streaming import Chunk
from web import Refusal

SLOWEST, FASTEST = 8000, 48000          # audio_fs in Hz
MOST_FRAMES = 100                       # of a window, and that the encoder looks back: each frame costs memory


class Models(NamedTuple):
    streaming: System | None            # hears chunk by chunk, its `chunk` if nobody asks for another one
    whole: System | None                # hears whole utterances, cut by its `vad` and written by its `punctuation`

    def loaded(self) -> list[System]:
        return [system for system in (self.whole, self.streaming) if system is not None]

    def modes(self) -> tuple[str, ...]:
        """The first is the one of who asks for none."""
        if self.streaming is None or self.whole is None:
            return ("online",) if self.streaming else ("offline",)
        return "2pass", "online", "offline"

    def rate_hz(self) -> int:
        return self.loaded()[0].config.data.sample_rate


@dataclass(frozen=True)
class Settings:
    mode: str
    chunk: Chunk
    audio_fs: int                       # Hz
    wav_name: str = "microphone"
    wav_format: str = "pcm"
    hotwords: tuple[str, ...] | None = None


def first_settings(models: Models) -> Settings:
    chunk = models.streaming.chunk if models.streaming else Chunk()
    return Settings(models.modes()[0], chunk, 16000)


def bad_value(name: str, wanted: str, got: Any) -> Refusal:
    return Refusal(422, "invalid_value", f"{name}: wanted {wanted}, got {json.dumps(got)[:80]}", name)


def whole_numbers(value: Any) -> list[int] | None:
    """A list of whole numbers, or a text of them with commas between; None: it is none."""
    try:
        numbers = [int(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        return None
    return numbers if isinstance(numbers, list) and all(type(number) is int for number in numbers) else None


def read_mode(given: dict[str, Any], models: Models, settings: Settings) -> dict[str, Any]:
    if given["mode"] not in models.modes():
        raise bad_value("mode", " or ".join(models.modes()), given["mode"])
    return {"mode": given["mode"]}


def read_rate(given: dict[str, Any], models: Models, settings: Settings) -> dict[str, Any]:
    rate_hz = given["audio_fs"]
    if type(rate_hz) is not int or not SLOWEST <= rate_hz <= FASTEST:
        raise bad_value("audio_fs", f"a whole number of Hz from {SLOWEST} to {FASTEST}", rate_hz)
    return {"audio_fs": rate_hz}


def read_texts(given: dict[str, Any], models: Models, settings: Settings) -> dict[str, Any]:
    texts = {name: given[name] for name in ("wav_name", "wav_format") if name in given}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > 1000:
            raise bad_value(name, "a text of at most 1000 characters", text)
    return texts


def read_chunk(given: dict[str, Any], models: Models, settings: Settings) -> dict[str, Any]:
    chunk = settings.chunk
    sizes = whole_numbers(given.get("chunk_size", [chunk.old, chunk.new, chunk.ahead]))
    if sizes is None or len(sizes) != 3:
        raise bad_value("chunk_size", "three whole numbers like [0, 10, 5]", given["chunk_size"])
    encoder = given.get("encoder_chunk_look_back", chunk.encoder_look_back)
    decoder = given.get("decoder_chunk_look_back", chunk.decoder_look_back)
    for name, value in (("encoder_chunk_look_back", encoder), ("decoder_chunk_look_back", decoder)):
        if type(value) is not int or value < 0:
            raise bad_value(name, "a whole number of chunks, 0 or more", value)
    try:
        asked = Chunk(sizes[1], sizes[2], encoder, decoder, sizes[0])
    except ValueError as error:
        raise Refusal(422, "invalid_value", f"chunk_size: {error}", "chunk_size") from None
    most = max(MOST_FRAMES, extent(models.streaming.chunk) if models.streaming else 0)
    if extent(asked) > most:
        raise bad_value("chunk_size", f"at most {most} frames in all, and as many in the chunks to look back", sizes)
    return {"chunk": asked}


def extent(chunk: Chunk) -> int:
    """Frames of a window or of what is kept of earlier ones, whichever are more."""
    kept = max(chunk.encoder_look_back, chunk.decoder_look_back) * chunk.new
    return max(chunk.old + chunk.new + chunk.ahead, kept)


def read_hotwords(given: dict[str, Any], models: Models, settings: Settings) -> dict[str, Any]:
    """A text of phrases, or of a JSON object of them with weights, which do not count. "" is no list."""
    value = given["hotwords"]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = list(json.loads(value))
        except ValueError:
            raise bad_value("hotwords", "phrases, or a JSON object of them", value) from None
    if not value:
        return {"hotwords": None}
    if models.whole is None:
        raise Refusal(422, "no_hotwords", "hotwords: a streaming model cannot be told any", "hotwords")
    return {"hotwords": parse_hotwords(value, models.whole, "hotwords")}


READERS = {("mode",): read_mode, ("audio_fs",): read_rate, ("wav_name", "wav_format"): read_texts,
           ("chunk_size", "encoder_chunk_look_back", "decoder_chunk_look_back"): read_chunk,
           ("hotwords",): read_hotwords}


def read_settings(settings: Settings, given: dict[str, Any], models: Models) -> tuple[Settings, list[Refusal]]:
    """What a message asks for -> the settings with it, and what of it is refused; unknown keys are ignored."""
    refused = []
    for names, read in READERS.items():
        try:
            if any(name in given for name in names):
                settings = replace(settings, **read(given, models, settings))
        except Refusal as refusal:
            refused.append(refusal)
    return settings, refused
