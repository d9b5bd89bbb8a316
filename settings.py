"""What the client of a web socket may ask for, by FunASR's names, and what of it is refused.

Every key is optional and may come again; those that are unknown (chunk_interval, itn) are ignored.
Source: FunASR's runtime/docs/websocket_protocol.md and its clients.
"""
import json
from typing import Any, NamedTuple

from bodies import parse_hotwords
from checkpoint import System
from streaming import Chunk
from web import Refusal

SLOWEST, FASTEST = 8000, 48000          # audio_fs in Hz
MOST_CHARACTERS = 1000                  # of a name
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


class Settings(NamedTuple):
    mode: str
    chunk: Chunk
    audio_fs: int                       # Hz
    wav_name: str = "microphone"
    wav_format: str = "pcm"
    hotwords: tuple[str, ...] | None = None


def first_settings(models: Models) -> Settings:
    return Settings(models.modes()[0], models.streaming.chunk if models.streaming else Chunk(), 16000)


def bad_value(name: str, wanted: str, got: Any) -> Refusal:
    return Refusal(422, "invalid_value", f"wanted {wanted}, got {json.dumps(got)[:80]}", name)


# ---- the values of keys: each raises Refusal 422 ----

def read_mode(name: str, value: Any, models: Models) -> str:
    if value not in models.modes():
        raise bad_value(name, " or ".join(models.modes()), value)
    return value


def read_rate(name: str, value: Any, models: Models) -> int:
    if type(value) is not int or not SLOWEST <= value <= FASTEST:
        raise bad_value(name, f"a whole number of Hz from {SLOWEST} to {FASTEST}", value)
    return value


def read_text(name: str, value: Any, models: Models) -> str:
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        raise bad_value(name, f"a text of at most {MOST_CHARACTERS} characters", value)
    return value


def read_hotwords(name: str, value: Any, models: Models) -> tuple[str, ...] | None:
    """A text of phrases, or of a JSON object of them with weights, which do not count. "" is no list."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = list(json.loads(value))
        except (ValueError, RecursionError):
            raise bad_value(name, "phrases, or a JSON object of them", value) from None
    if value and models.whole is None:
        raise Refusal(422, "no_hotwords", "a streaming model cannot be told any", name)
    return parse_hotwords(value or None, models.whole, name)


def read_chunk(given: dict[str, Any], models: Models, usual: Chunk) -> Chunk:
    sizes = whole_numbers(given.get("chunk_size", [usual.old, usual.new, usual.ahead]))
    if sizes is None or len(sizes) != 3:
        raise bad_value("chunk_size", "three whole numbers like [0, 10, 5]", given["chunk_size"])
    for name in ("encoder_chunk_look_back", "decoder_chunk_look_back"):
        value = given.get(name, 0)
        if type(value) is not int or value < 0:
            raise bad_value(name, "a whole number of chunks, 0 or more", value)
    encoder = given.get("encoder_chunk_look_back", usual.encoder_look_back)
    decoder = given.get("decoder_chunk_look_back", usual.decoder_look_back)
    try:
        asked = Chunk(sizes[1], sizes[2], encoder, decoder, sizes[0])
    except ValueError as error:
        raise Refusal(422, "invalid_value", str(error), "chunk_size") from None
    most = max(MOST_FRAMES, extent(models.streaming.chunk) if models.streaming else 0)
    if extent(asked) > most:
        raise bad_value("chunk_size", f"at most {most} frames in all, and as many in the chunks to look back", sizes)
    return asked


def whole_numbers(value: Any) -> list[int] | None:
    """A list of whole numbers, or a text of them with commas between; None: it is none."""
    try:
        numbers = [int(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        return None
    return numbers if isinstance(numbers, list) and all(type(number) is int for number in numbers) else None


def extent(chunk: Chunk) -> int:
    """Frames of a window or of what is kept of earlier ones, whichever are more."""
    kept = max(chunk.encoder_look_back, chunk.decoder_look_back) * chunk.new
    return max(chunk.old + chunk.new + chunk.ahead, kept)


READERS = {"mode": read_mode, "audio_fs": read_rate, "wav_name": read_text, "wav_format": read_text,
           "hotwords": read_hotwords}
OF_CHUNK = {"chunk_size", "encoder_chunk_look_back", "decoder_chunk_look_back"}


def read_settings(settings: Settings, given: dict[str, Any], models: Models) -> tuple[Settings, list[Refusal]]:
    """What a message asks for -> the settings with it, and what of it is refused; unknown keys are ignored."""
    refused = []
    for name, read in READERS.items():
        try:
            if name in given:
                settings = settings._replace(**{name: read(name, given[name], models)})
        except Refusal as refusal:
            refused.append(refusal)
    if given.keys() & OF_CHUNK:
        try:
            settings = settings._replace(chunk=read_chunk(given, models, settings.chunk))
        except Refusal as refusal:
            refused.append(refusal)
    return settings, refused
