"""Configuration: frozen dataclasses, overrides of a command line, and a reader for the YAML subset that fills them.

To add a field, give it a line with its unit in its dataclass. What values must keep is in rules.py.

The YAML subset: nested maps by indentation, scalars (int, float, true/false, null, quoted and bare text), inline and
block lists, the empty map {}, comments. Values are those of PyYAML's safe loader, except that `1e-4` is a float.
Scalars that YAML readers disagree on (yes, 010, 1:30, 1_000, -.5), and all other YAML, are errors with file and line.

Needs the standard library only and nothing of this project: copy it alone.
Sources: yaml.org/spec/1.1 (indentation, escapes); PyYAML 6 resolver.py (what a bare scalar means).
"""
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


# ---- sections ----

@dataclass(frozen=True)
class EncoderConfig:
    kind: Literal["transformer", "conformer", "sanm", "relative_conformer"] = "transformer"
    num_layers: int = 4                  # blocks
    hidden_dim: int = 144                # D, a multiple of num_heads
    num_heads: int = 4                   # H
    ffn_dim: int = 0                     # width inside the feed-forward; 0 = 4 x hidden_dim
    kernel_size: int = 15                # conformer convolution or sanm memory, encoder frames, odd
    memory_shift: int = 0                # sanm: the window of the memory is moved this many frames into the past
    subsampling: Literal[1, 2, 4] = 1    # input frames per encoder frame; 1 for sanm, 4 for relative_conformer
    position: Literal["sinusoidal", "learnable", "none"] = "sinusoidal"     # learnable: up to 2000 frames
    context: int = 0                     # transformer, conformer: encoder frames attended to on either side; 0 = all
    dropout: float = 0.1                 # probability, [0, 1)
    attention_dropout: float = 0.0       # sanm, relative_conformer: on attention weights and memory, [0, 1)


@dataclass(frozen=True)
class PredictorConfig:
    kind: Literal["stacked", "dense", "depthwise"] = "stacked"      # dense: one convolution; depthwise: with a residual
    hidden_dim: int = 256                # stacked: width of its convolutions
    num_layers: int = 2                  # stacked: convolutions in front of the firing weight
    kernel_size: int = 3                 # stacked: encoder frames, odd
    left: int = 1                        # dense, depthwise: encoder frames before the current one
    right: int = 1                       # dense, depthwise: encoder frames after the current one
    smooth: float = 1.0                  # dense, depthwise: weight = max(0, smooth * sigmoid - noise)
    noise: float = 0.0                   # dense, depthwise: see smooth
    tail: float = 0.0                    # token count = floor(sum of weights + tail), [0, 1); 0 = the rounded sum
    upsampling: int = 0                  # dense: weights of the timing head per encoder frame; 0 = no such head
    timing_smooth: float = 0.25          # timing head: weight = max(0, timing_smooth * sigmoid - timing_noise)
    timing_noise: float = 0.01           # timing head: see timing_smooth
    dropout: float = 0.1                 # probability, [0, 1); dense applies none, though published configs set it


@dataclass(frozen=True)
class DecoderConfig:
    kind: Literal["transformer", "bare", "sanm"] = "transformer"    # bare: no input projection, no positions
    num_layers: int = 2                  # blocks; 0: the output layer reads the acoustic embeddings
    attention_layers: int = 0            # sanm: how many of them, from the first, have cross-attention; 0 = all
    hidden_dim: int = 144                # D, a multiple of num_heads; for bare, sanm, share_embedding the encoder's
    num_heads: int = 4                   # H
    ffn_dim: int = 0                     # width inside the feed-forward; 0 = 4 x hidden_dim
    kernel_size: int = 11                # sanm: window of the memory, tokens, odd
    memory_shift: int = 0                # sanm: the window of the memory is moved this many tokens into the past
    position: Literal["sinusoidal", "learnable", "none"] = "sinusoidal"     # learnable: up to 2000 tokens
    dropout: float = 0.1                 # probability, [0, 1)
    attention_dropout: float = 0.0       # sanm: on the memory, [0, 1)


@dataclass(frozen=True)
class HotwordConfig:                     # of the models seaco and contextual, which only FunASR publishes
    no_bias: int = 8377                  # seaco: the token by which its second decoder leaves a place to the first
    both_ways: bool = False              # seaco: hotwords are read in both directions
    decoder: DecoderConfig = DecoderConfig()     # seaco: the second decoder, of kind sanm and the encoder's hidden_dim
    share_embedding: bool = False        # contextual: hotwords are read through the sampler's embedding


@dataclass(frozen=True)
class ChunkConfig:                       # how a streaming model hears; frames as data.lfr_n stacks them
    new: int = 10                        # frames of a chunk
    ahead: int = 5                       # frames heard beyond them before they are decided: the latency on top of new
    encoder_look_back: int = 4           # chunks before it that the encoder sees; -1 = all
    decoder_look_back: int = 1           # chunks before it that the decoder sees
    old: int = 0                         # frames before it that are computed again


@dataclass(frozen=True)
class ModelConfig:
    name: str = "paraformer"             # paraformer streaming seaco contextual transformer ctc; they ignore: UNUSED
    encoder: EncoderConfig = EncoderConfig()
    predictor: PredictorConfig = PredictorConfig()
    decoder: DecoderConfig = DecoderConfig()
    sampling_ratio: float = 0.5          # glancing sampler: share of first-pass errors replaced by the truth, [0, 1]
    label_smoothing: float = 0.1         # share of the target spread over all tokens, [0, 1)
    quantity_weight: float = 0.1         # weight of the token count loss, 0 or more; 1 dominates early training
    ctc_weight: float = 0.3              # weight of the CTC loss, [0, 1); cross-entropy has 1 - this; 0 = no head
    mwer_weight: float = 0.0             # weight of the expected token errors (MWER loss), 0 or more; 0 = no such loss
    mwer_samples: int = 4                # candidates of the MWER loss: the best and random others, 2 or more
    end_token: bool = False              # every utterance ends with <eos>, which takes a firing of its own
    loss_unit: Literal["token", "utterance"] = "token"      # what the losses are means over
    share_embedding: bool = False        # glancing sampler: true embeddings are rows of the decoder's output matrix
    place_embedding: bool = False        # glancing sampler: true embeddings are scaled by sqrt(D) and get positions
    norm_eps: float = 1e-5               # of every LayerNorm, added to the variance
    hotwords: HotwordConfig = HotwordConfig()
    chunk: ChunkConfig = ChunkConfig()


@dataclass(frozen=True)
class ToyConfig:
    num_train: int = 2000                # utterances an epoch
    num_dev: int = 1000                  # unseen utterances
    num_symbols: int = 26                # different symbols
    min_symbols: int = 3                 # symbols in an utterance
    max_symbols: int = 12                # symbols in an utterance, at least min_symbols
    min_frames: int = 6                  # duration of a symbol, frames
    max_frames: int = 20                 # duration of a symbol, frames, at least 3 x min_frames
    blend_frames: int = 2                # frames over which neighbours blend, at most min_frames
    noise: float = 0.6                   # standard deviation, natural-log energy
    gain_std: float = 0.5                # loudness of an utterance: standard deviation, natural-log energy
    tilt_std: float = 0.5                # spectral tilt: likewise, at the top bin (its negative at the bottom bin)


@dataclass(frozen=True)
class AugmentConfig:
    speeds: tuple[float, ...] = (1.0,)   # speed factors, 0.1 to 10; one is drawn per utterance and epoch
    snr_db: tuple[float, ...] = ()       # range (low, high) of the signal-to-noise ratio of added noise, dB; () = none
    noise: str = ""                      # manifests of noises, read at a random place; "" = synthetic, white to dull
    reverb: str = ""                     # manifests of the impulse responses of rooms; "" = none
    reverb_share: float = 0.5            # share of utterances that a room is drawn for, [0, 1]
    channel_std: float = 0.0             # a random smooth curve over the bins, in feature deviations; 0 = none
    freq_masks: int = 0                  # masks over feature bins per utterance
    freq_width: int = 0                  # their largest width, bins, at most num_mels
    time_masks: int = 0                  # masks over time per utterance
    time_width: int = 0                  # their largest width, frames
    time_share: float = 1.0              # largest share of an utterance under one time mask, [0, 1]


@dataclass(frozen=True)
class DataConfig:
    kind: Literal["toy", "manifest"] = "toy"
    train: str = ""                      # JSON lines or Kaldi folder: a path, a pattern, or several with commas between
    dev: str = ""                        # likewise
    test: str = ""                       # likewise; "" = none
    unit: Literal["char", "word"] = "char"
    sample_rate: int = 16000             # Hz; every recording is resampled to it
    num_mels: int = 80                   # filterbank bins
    lfr_m: int = 1                       # frames stacked into one
    lfr_n: int = 1                       # frames from one stack to the next
    min_sec: float = 0.1                 # seconds; shorter recordings are skipped
    max_sec: float = 30.0                # seconds; longer recordings are skipped
    num_workers: int = 0                 # loader processes; 0 = none
    toy: ToyConfig = ToyConfig()
    augment: AugmentConfig = AugmentConfig()


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = 16                 # utterances at most in a batch, over all processes
    batch_frames: int = 20000            # padded frames at most in a batch, likewise
    learning_rate: float = 1e-3          # peak, after the warm-up
    num_epochs: int = 10                 # passes over the training set
    max_grad_norm: float = 1.0           # gradients are clipped to this norm
    warmup_steps: int = 100              # steps of linear warm-up; 0 = none
    warmup_share: float = 0.0            # share of the run that warms up, in place of warmup_steps; [0, 0.2], 0 = none
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"      # after the warm-up
    final_lr_ratio: float = 0.05         # cosine ends at this share of learning_rate, [0, 1]
    weight_decay: float = 0.01           # on matrices only, 0 or more
    average_decay: float = 0.0           # moving average of the weights, per step, [0, 1): 0.999 = 1000 steps; 0 = none
    average_share: float = 0.0           # share of the run averaged over, in place of average_decay; [0, 0.2], 0 = none
    seed: int = 0                        # at least 0 and below 2^64
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0                     # of torch on a CPU; 0 = its own choice, 1 beside a loader process is faster
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"   # auto: bfloat16 on a GPU that has it
    accumulate: int = 1                  # parts that a batch is split into, to save memory; the step is the same
    recompute_blocks: bool = False       # encoder blocks keep no activations; the backward pass computes them again
    checkpoint_steps: int = 0            # also a checkpoint every this many steps; 0 = none
    picture_epochs: int = 0              # epochs between alignment pictures of three dev utterances; 0 = never
    overfit: int = 0                     # train and evaluate on this many utterances only, the first; 0 = all
    max_bad_steps: int = 10              # non-finite steps in a row that stop the run
    init_from: str = ""                  # FunASR directory or checkpoint giving weights and model section; "" = none
    target_token_accuracy: float = 0.0   # the run stops once both targets are reached, [0, 1]; 0 = never
    target_sequence_accuracy: float = 0.0   # likewise
    patience: int = 0                    # epochs without improvement that stop the run; 0 = never


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()


# ---- from and to plain dicts ----

def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field, depth first; a section comes before its fields."""
    for f in fields(section):
        value = getattr(section, f.name)
        yield prefix + f.name, value
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")


def differing(one: Config, other: Config) -> dict[str, Any]:
    """{dotted path: value in other} of the fields, not sections, in which two configs differ."""
    values = dict(walk(one))
    return {path: value for path, value in walk(other) if value != values[path] and not is_dataclass(value)}


def show_value(value: Any) -> str:
    """A scalar or list as an error names it: as YAML writes it, text in single quotes."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _type_name(hint: Any) -> str:
    """What an error calls the values that a type hint of a field allows."""
    if is_dataclass(hint):
        return "a section (key: value lines)"
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return f"a list of {get_args(hint)[0].__name__}" if get_origin(hint) is tuple else hint.__name__


def _convert(hint: Any, value: Any) -> Any:
    """value as a field with this type hint holds it: an int becomes a float, a list a tuple. Raises TypeError."""
    kind, choices = get_origin(hint), get_args(hint)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(choices[0], x) for x in value)
    if kind is Literal and value in choices:
        hint = type(choices[0])      # then True is not taken for 1
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _nearest(section: str, key: str, names: Iterable[str]) -> str:
    """The path to suggest for an unknown key: a similar one in its section, which has these names, else the same key of
    another section, else the least different in its section. section: "" or "path."."""
    similar = get_close_matches(key, names, 1, 0.75)
    elsewhere = [path for path, _ in walk(Config()) if path.split(".")[-1] == key]
    if elsewhere and not similar:
        return elsewhere[0]
    return section + (similar or get_close_matches(key, names, 1, 0))[0]


def from_dict(values: dict, place: str, base: Any = Config(), section: str = "") -> Any:
    """base, a dataclass like Config, with nested plain dicts in place of its values. Checks keys and types only: raises
    ValueError that begins with the line of a Key, or with `place`; section: "" or "path.", of base."""
    if not isinstance(values, dict):
        raise ValueError(f"{place}: wanted a map of sections, got {show_value(values)}")
    hints, new = get_type_hints(type(base)), {}
    for key, value in values.items():
        path = f"{section}{key}"
        where = key.where if isinstance(key, Key) else place
        if key not in hints:
            raise ValueError(f"{where}: unknown key '{path}' (did you mean '{_nearest(section, str(key), hints)}'?)")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            new[key] = from_dict(value, place, getattr(base, key), f"{path}.")
            continue
        try:
            new[key] = _convert(hints[key], value)
        except TypeError:
            wanted = _type_name(hints[key])
            raise ValueError(f"{where}: {path}: wanted {wanted}, got {show_value(value)}") from None
    return replace(base, **new)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """config with `--section.key=value` overrides, not checked. Raises ValueError that names the override at fault."""
    for override in overrides:
        match = re.fullmatch(r"--([^=]+)= *(.*)", override)
        if not match:
            raise ValueError(f"{override}: wanted --section.key=value")
        _refuse_outside(override, override)
        value = _value(match[2].rstrip(" "), override) if match[2] else ""      # in YAML it would be null
        config = from_dict(nested(match[1], value), override, config)
    return config


def nested(path: str, value: Any) -> dict:
    """a.b and a value -> {"a": {"b": value}}."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def dump(config: Config) -> str:
    """YAML text that load turns back into exactly this config; PyYAML reads the same values from it."""
    return dump_yaml(asdict(config))


def dump_yaml(values: dict, indent: str = "") -> str:
    """YAML text of nested dicts, lists and scalars, which parse_yaml reads back; every line begins with indent."""
    text = ""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            text += f"{indent}{key}:\n" + dump_yaml(value, indent + "  ")
        else:
            text += f"{indent}{key}: {_dump_value(value)}\n"
    return text


def _dump_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_dump_value, value))}]"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(OUTSIDE, lambda match: rf"\U{ord(match[0]):08x}", quoted) + '"'
    text = show_value(value)
    if isinstance(value, float) and "." not in text:
        return text.replace("e", ".0e")      # 1e-05 is text to PyYAML
    return text


# ---- YAML ----

OUTSIDE = r"[^ -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"   # escapes only
QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'(?!')"""
START = r"""(?:[^-?:,\[\]{}#&*!|>'"%@` ]|-(?![ ,?\[\]{}]|$))"""                         # how bare text begins
BARE = START + r"(?:[^ :]|:(?! |$)| +(?![ #]|$))*"
BARE_INLINE = START + r"(?:[^ :,?\[\]{}]|:(?![ ,?\[\]{}]|$)| +(?![ #]|$))*"              # inside [ ]
KEY = re.compile(rf"({QUOTED}|{BARE}) *:(?: +(?:#.*|(.*)))?")
WORDS = {"~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True, "TRUE": True,
         "false": False, "False": False, "FALSE": False}
INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,99})")
FLOAT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?")
AMBIGUOUS = re.compile(r"yes|no|on|off|<<|=|[-+]?\.(?:inf|nan)|[-+]?\.?[0-9][0-9_.:]*(?:e[-+]?[0-9]*)?"
                     r"|[-+]?0[xob][0-9a-f_]*|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[t ].*)?", re.IGNORECASE)
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U((?:000[0-9a-fA-F]|0010)[0-9a-fA-F]{4})|(.))")
ESCAPES = dict(zip('0abtnvfre "\\/N_LP', '\0\a\b\t\n\v\f\r\x1b "\\/\x85\xa0\u2028\u2029'))


BELOW = object()      # in the place of a value: none on this line


class Key(str):
    """A key of a map that remembers where it was read: `file:number`."""
    where: str


class Line(NamedTuple):
    where: str          # file:number
    indent: int         # spaces before it
    key: Key | None     # of a map; None: the dash of a list
    value: Any          # or BELOW


def read_yaml(path: str | Path, wanted: str) -> dict[Key, Any]:
    """The map in a YAML file, as parse_yaml reads it. Raises ValueError that names the file and what was wanted."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        got = getattr(error, "strerror", None) or error  # the path stands before it
        raise ValueError(f"{path}: wanted {wanted}, got {got}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, place: str = "<yaml>") -> dict[Key, Any]:
    """Nested dicts, lists and scalars of a YAML text whose top level is a map. Raises ValueError `place:line: ...` for
    anything outside the subset that this file's docstring describes."""
    lines: deque[Line] = deque()
    for number, line in enumerate(text.split("\n"), 1):
        lines += _read_line(line.removesuffix("\r"), f"{place}:{number}")
    if not lines or lines[0].key is None:
        raise ValueError(f"{lines[0].where if lines else f'{place}:1'}: wanted 'key: value' lines, got none")
    try:
        return _parse_block(lines, -1)
    except RecursionError:
        raise ValueError(f"{place}:1: wanted a few levels of nesting, got too many") from None


def _read_line(text: str, where: str) -> Iterator[Line]:
    """The dashes and the key of a line, each as if it had a line of its own; none in a blank one and a comment."""
    _refuse_outside(text, where)
    if text.startswith(("---", "...")):
        raise ValueError(f"{where}: wanted one document, got a document mark '{text}'")
    rest = text.lstrip(" ")
    while _is_dash(rest):
        indent = len(text) - len(rest)
        rest = rest[1:].lstrip(" ")
        if rest and rest[0] != "#" and not _is_dash(rest) and not KEY.fullmatch(rest):
            yield Line(where, indent, None, _value(rest, where))
            return
        yield Line(where, indent, None, BELOW)
    if not rest or rest[0] == "#":
        return
    match = KEY.fullmatch(rest)
    name = _value(match[1].rstrip(" "), where) if match else None
    if type(name) is not str:
        raise ValueError(f"{where}: wanted 'key: value' with text for a key, got '{rest}'")
    key = Key(name)
    key.where = where
    yield Line(where, len(text) - len(rest), key, _value(match[2], where) if match[2] else BELOW)


def _is_dash(text: str) -> bool:
    return text == "-" or text.startswith("- ")


def _refuse_outside(text: str, where: str) -> None:
    bad = re.search(OUTSIDE, text)
    if bad:
        name = "a tab" if bad[0] == "\t" else f"the character U+{ord(bad[0]):04X}"
        raise ValueError(f"{where}: wanted printable text and spaces, got {name} (in double quotes write an escape)")


def _parse_block(lines: deque[Line], outer: int) -> Any:
    """The list or map in the lines that are indented deeper than outer; null if there are none."""
    if not lines or lines[0].indent <= outer:
        return None
    values = _parse_list(lines) if lines[0].key is None else _parse_map(lines)
    if lines and lines[0].indent > outer:
        raise ValueError(f"{lines[0].where}: wanted an indentation used above, got {lines[0].indent} spaces")
    return values


def _parse_list(lines: deque[Line]) -> list:
    """The list whose first dash comes first."""
    values = []
    indent = lines[0].indent
    while lines and lines[0].indent == indent and lines[0].key is None:
        value = lines.popleft().value
        values.append(_parse_block(lines, indent) if value is BELOW else value)
    return values


def _parse_map(lines: deque[Line]) -> dict[Key, Any]:
    """The map whose first key comes first."""
    values: dict[Key, Any] = {}
    indent = lines[0].indent
    while lines and lines[0].indent == indent and lines[0].key is not None:
        where, _, key, value = lines.popleft()
        if key in values:
            raise ValueError(f"{where}: wanted every key once, got '{key}' again")
        if value is BELOW and lines and lines[0].indent == indent and lines[0].key is None:
            value = _parse_list(lines)      # the one thing below a key that need not be indented
        elif value is BELOW:
            value = _parse_block(lines, indent)
        values[key] = value
    return values


def _value(text: str, where: str) -> Any:
    """A scalar or an inline list, with nothing but a comment after it."""
    value, rest = _scan(text, where)
    if not re.fullmatch(r" *(?: #.*)?", rest):
        raise ValueError(f"{where}: wanted the end of the value, got '{rest}' (put text with ': ' in it into quotes)")
    return value


def _scan(text: str, where: str, depth: int = 0) -> tuple[Any, str]:
    """The scalar or list that text starts with -> value, rest of the text; depth counts the brackets around it."""
    if text[:1] == "[" and depth < 20:      # deeper, an error below: no list of a config is
        values = []
        rest = text[1:].lstrip(" ")
        while rest[:1] != "]":
            value, rest = _scan(rest, where, depth + 1)
            values.append(value)
            rest = rest.lstrip(" ")
            if rest[:1] not in ("]", ","):
                raise ValueError(f"{where}: wanted ',' or ']' in the list on this line, got '{rest}'")
            rest = rest.removeprefix(",").lstrip(" ")
        return values, rest[1:]
    if match := re.match(r"\{ *\}", text):
        return {}, text[match.end():]
    if match := re.match(QUOTED, text):
        return _unquote(match[0], where), text[match.end():]
    match = re.match(BARE_INLINE if depth else BARE, text)
    if not match:
        raise ValueError(f"{where}: wanted a value on this line, got '{text}' (put text that starts so into quotes)")
    return _scalar(match[0].rstrip(" "), where), text[match.end():]


def _unquote(text: str, where: str) -> str:
    """What text in single or double quotes means."""
    def escape(match: re.Match) -> str:
        code = match[1] or match[2] or match[3]
        if not code and match[4] not in ESCAPES:
            raise ValueError(f"{where}: wanted an escape such as \\n or \\u00e9, got '{match[0]}'")
        return chr(int(code, 16)) if code else ESCAPES[match[4]]
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    return ESCAPE.sub(escape, text[1:-1])


def _scalar(text: str, where: str) -> Any:
    """What bare text means: null, bool, int, float or itself."""
    if text in WORDS:
        return WORDS[text]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if AMBIGUOUS.fullmatch(text):
        raise ValueError(f"{where}: wanted true, false, a plain decimal number or text, got '{text}', "
                         "which YAML readers take differently (put text into quotes)")
    return text
