"""Configuration: frozen dataclasses, the rules that a config must keep, and a reader for the YAML subset it needs.

Reading order: the sections of a config; the range of every number (`RANGES`), the options that a kind has no use for
(`UNUSED`) and the rules between fields; `load` and `dump`; YAML. To add a field, give it a line with its unit in its
dataclass and, if it is a number, put its name in `RANGES` (the weight of a loss needs no more than its line).

The YAML subset: nested maps by indentation, scalars (int, float, true/false, null, quoted and bare text), inline and
block lists, the empty map {}, comments. Values are those of PyYAML's safe loader, except that `1e-4` is a float.
Scalars that YAML readers disagree on (yes, 010, 1:30, 1_000, -.5), and all YAML outside the subset, are errors that
name file and line.

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
    ahead: int = 5                       # frames heard beyond them before they are decided
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


# ---- rules ----

RANGES = {  # range -> (its test, which nan and inf fail; names of the fields, in every section, that must lie in it)
    "1 or more": (lambda x: 1 <= x < math.inf, """hidden_dim num_heads num_train num_dev num_symbols
        min_symbols max_symbols min_frames max_frames sample_rate num_mels lfr_m lfr_n batch_size batch_frames
        num_epochs max_bad_steps accumulate new ahead"""),
    "2 or more": (lambda x: 2 <= x < math.inf, "mwer_samples"),
    "0 or more": (lambda x: 0 <= x < math.inf, """num_layers context ffn_dim blend_frames noise gain_std
        tilt_std channel_std freq_masks freq_width time_masks time_width min_sec num_workers threads warmup_steps
        weight_decay checkpoint_steps picture_epochs overfit patience
        no_bias memory_shift old left right smooth upsampling timing_smooth timing_noise attention_layers"""),
    "-1 or more": (lambda x: -1 <= x < math.inf, "encoder_look_back decoder_look_back"),
    "above 0": (lambda x: 0 < x < math.inf, "max_sec learning_rate max_grad_norm norm_eps"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, """dropout label_smoothing ctc_weight average_decay
        attention_dropout tail"""),
    "between 0 and 1": (lambda x: 0 <= x <= 1, """sampling_ratio time_share reverb_share final_lr_ratio
        target_token_accuracy target_sequence_accuracy"""),
    "from 0 to 0.2": (lambda x: 0 <= x <= 0.2, "warmup_share average_share"),
    "from 0.1 to 10": (lambda x: 0.1 <= x <= 10, "speeds"),
    "at least 0 and below 2^64": (lambda x: 0 <= x < 2**64, "seed"),
    "odd and above 0": (lambda x: x > 0 and x % 2 == 1, "kernel_size"),
}

UNUSED = {  # field -> value -> fields and sections beside it that then have no effect, so they must have their defaults
    "model.name": {
        "paraformer": "hotwords chunk", "streaming": "hotwords", "seaco": "hotwords.share_embedding chunk",
        "contextual": "hotwords.decoder hotwords.both_ways hotwords.no_bias chunk",
        "transformer": """hotwords chunk predictor decoder.kind sampling_ratio quantity_weight mwer_weight mwer_samples
            end_token share_embedding place_embedding""",
        "ctc": """hotwords chunk predictor decoder sampling_ratio label_smoothing quantity_weight ctc_weight mwer_weight
            mwer_samples end_token share_embedding place_embedding"""},
    "model.encoder.kind": {
        "transformer": "kernel_size memory_shift attention_dropout", "conformer": "memory_shift attention_dropout",
        "sanm": "position context", "relative_conformer": "memory_shift position context"},
    "model.predictor.kind": {
        "stacked": "left right smooth noise upsampling", "dense": "hidden_dim num_layers kernel_size",
        "depthwise": "hidden_dim num_layers kernel_size upsampling"},
    "model.predictor.upsampling": {0: "timing_smooth timing_noise"},
    "model.decoder.kind": {
        "transformer": "attention_layers kernel_size memory_shift attention_dropout",
        "bare": "attention_layers kernel_size memory_shift position attention_dropout", "sanm": "position"},
    "data.kind": {"toy": """train dev test unit lfr_m lfr_n augment.speeds augment.snr_db augment.noise
        augment.reverb"""},
    "data.augment.reverb": {"": "reverb_share"},
}


Error = tuple[str, str]      # dotted path of a field, the values wanted


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field, depth first; a section comes before its fields."""
    for f in fields(section):
        value = getattr(section, f.name)
        yield prefix + f.name, value
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{f.name}.")


def _range_of(name: str) -> str:
    """The range of a field in RANGES; the weight of a loss that is not there is 0 or more. "" for what has none."""
    for wanted, (_, names) in RANGES.items():
        if name in names.split():
            return wanted
    return "0 or more" if name.endswith("_weight") else ""


def _value_errors(config: Config) -> list[Error]:
    """Values wrong by themselves: outside RANGES, or integers of 2^31 and more."""
    errors = []
    for path, value in _walk(config):
        name = path.split(".")[-1]
        if type(value) is int and value >= 2**31 and name != "seed":
            errors.append((path, "below 2^31"))
        numbers = value if isinstance(value, tuple) else (value,)
        wanted = _range_of(name)
        if wanted and type(value) is not str and not (numbers and all(map(RANGES[wanted][0], numbers))):
            errors.append((path, wanted))
    return errors


def _unused_values(config: Config) -> Iterator[tuple[str, str]]:
    """(path of a choice, path of a value that has no effect with it and yet is not its default): see UNUSED."""
    values, defaults = dict(_walk(config)), dict(_walk(Config()))
    for path, choices in UNUSED.items():
        section = path.rpartition(".")[0]
        for name in choices.get(values[path], "").split():
            unused = f"{section}.{name}"
            for other, value in values.items():
                is_inside = other == unused or other.startswith(f"{unused}.")
                if is_inside and not is_dataclass(value) and value != defaults[other]:
                    yield path, other


def _unused_errors(config: Config) -> list[Error]:
    values, defaults, errors = dict(_walk(config)), dict(_walk(Config())), []
    for path, other in _unused_values(config):
        default = show_value(defaults[other])
        errors.append((other, f"its default {default}, as {path} {values[path]} has no use for it"))
    return errors


def _without_unused(config: Config, typed: Sequence[str]) -> Config:
    """config in which what a file says for another choice than the one typed on the command line has its default
    again: who switches a kind there need not undo what belongs to the file's."""
    defaults = dict(_walk(Config()))
    for path in UNUSED:
        for choice, other in list(_unused_values(config)):
            if choice == path and choice in typed and other not in typed:
                values = defaults[other]
                for key in reversed(other.split(".")):
                    values = {key: values}
                config = _merge(config, values, other)
    return config


def _model_errors(model: ModelConfig) -> list[Error]:
    encoder, predictor, decoder, errors = model.encoder, model.predictor, model.decoder, []
    if encoder.kind == "sanm" and encoder.subsampling != 1:
        errors.append(("model.encoder.subsampling", "1 for kind sanm"))
    if encoder.kind == "relative_conformer" and encoder.subsampling != 4:
        errors.append(("model.encoder.subsampling", "4 for kind relative_conformer"))
    if encoder.num_layers == 0:
        errors.append(("model.encoder.num_layers", "1 or more"))
    if model.name == "streaming":      # layers that have a `step`
        if encoder.kind != "sanm":
            errors.append(("model.encoder.kind", "sanm for a streaming model"))
        if decoder.kind != "sanm":
            errors.append(("model.decoder.kind", "sanm for a streaming model"))
        if predictor.kind == "stacked" or predictor.upsampling:
            errors.append(("model.predictor.kind", "dense or depthwise without a timing head for a streaming model"))
    if predictor.num_layers == 0:
        errors.append(("model.predictor.num_layers", "1 or more"))
    if decoder.num_layers == 0 and (decoder.kind == "sanm" or model.name != "paraformer"):
        errors.append(("model.decoder.num_layers", "1 or more"))
    if predictor.kind != "stacked" and predictor.smooth - predictor.noise > 1:      # a weight above 1 fires twice
        errors.append(("model.predictor.smooth", f"at most 1 + noise {predictor.noise}, as weights are at most 1"))
    if decoder.attention_layers > decoder.num_layers:
        errors.append(("model.decoder.attention_layers", f"at most num_layers {decoder.num_layers}"))
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        if part.memory_shift > part.kernel_size // 2:
            errors.append((f"model.{name}.memory_shift", f"at most half of kernel_size {part.kernel_size}"))
        if part.num_heads > 0 and part.hidden_dim % part.num_heads != 0:      # RANGES reports 0 and below
            errors.append((f"model.{name}.num_heads", f"a divisor of hidden_dim {part.hidden_dim}"))
        has_sinusoids = part.kind == "relative_conformer" or (
            part.kind in ("transformer", "conformer") and part.position == "sinusoidal")
        is_placed = part is encoder and model.place_embedding      # the sampler adds sinusoids to embeddings
        if part.hidden_dim % 2 != 0 and (has_sinusoids or is_placed):
            errors.append((f"model.{name}.hidden_dim", "an even width for sinusoids"))
    width = f"the encoder's {encoder.hidden_dim}"
    if decoder.kind != "transformer" and decoder.hidden_dim != encoder.hidden_dim:      # no projection of its input
        errors.append(("model.decoder.hidden_dim", f"{width} for kind {decoder.kind}"))
    elif model.share_embedding and decoder.hidden_dim != encoder.hidden_dim:
        errors.append(("model.decoder.hidden_dim", f"{width} for share_embedding"))
    return errors


def _hotword_errors(model: ModelConfig) -> list[Error]:
    """Broken rules of the models seaco and contextual."""
    second, width, errors = model.hotwords.decoder, model.encoder.hidden_dim, []
    if model.name in ("seaco", "contextual") and model.decoder.kind != "sanm":
        errors.append(("model.decoder.kind", f"sanm for a {model.name}"))
    if model.name == "seaco" and second.kind != "sanm":
        errors.append(("model.hotwords.decoder.kind", "sanm"))
    if model.name == "seaco" and second.hidden_dim != width:
        errors.append(("model.hotwords.decoder.hidden_dim", f"the encoder's {width}"))
    if model.name == "seaco" and (second.attention_layers or second.num_layers) < 6:
        errors.append(("model.hotwords.decoder.attention_layers",
                       "6 or more: the sixth layer's attention chooses from a long list"))
    return errors


def _data_errors(data: DataConfig) -> list[Error]:
    toy, snr_db, errors = data.toy, data.augment.snr_db, []
    if toy.max_symbols < toy.min_symbols:
        errors.append(("data.toy.max_symbols", f"at least min_symbols {toy.min_symbols}"))
    if toy.max_frames < 3 * toy.min_frames:
        errors.append(("data.toy.max_frames", f"at least 3 x min_frames {toy.min_frames}"))
    if toy.blend_frames > toy.min_frames:
        errors.append(("data.toy.blend_frames", f"at most min_frames {toy.min_frames}"))
    if data.max_sec < data.min_sec:
        errors.append(("data.max_sec", f"at least min_sec {data.min_sec}"))
    if snr_db and not (len(snr_db) == 2 and -100 <= snr_db[0] <= snr_db[1] <= 100):
        errors.append(("data.augment.snr_db", "[] or two numbers from -100 to 100, the lower first"))
    if data.augment.noise and not snr_db:
        errors.append(("data.augment.snr_db", "two numbers, how loud the recordings of data.augment.noise are"))
    if data.augment.freq_width > data.num_mels:
        errors.append(("data.augment.freq_width", f"at most num_mels {data.num_mels}"))
    return errors


def _cross_errors(config: Config) -> list[Error]:
    """Broken rules between data, model and training."""
    data, kind, errors = config.data, config.model.encoder.kind, []
    width = data.num_mels * data.lfr_m
    product = f"a product with lfr_m {data.lfr_m} that is"
    if kind == "sanm" and (width < 4 or width % 2 != 0):      # for halved_sinusoids
        errors.append(("data.num_mels", f"{product} even and 4 or more for kind sanm"))
    if kind == "relative_conformer" and width < 7:      # for two 3 x 3 windows
        errors.append(("data.num_mels", f"{product} 7 or more for kind relative_conformer"))
    manifest = "a manifest or a Kaldi folder, as data.kind is manifest"
    if data.kind == "manifest" and data.train == "":
        errors.append(("data.train", manifest))
    if data.kind == "manifest" and data.dev == "" and config.training.init_from == "":     # fine-tuning can do without
        errors.append(("data.dev", manifest))
    if config.model.name == "streaming" and config.training.picture_epochs:
        errors.append(("training.picture_epochs", "0 for a streaming model, whose windows overlap"))
    for share, number in (("warmup_share", "warmup_steps"), ("average_share", "average_decay")):
        default = getattr(TrainingConfig(), number)
        if getattr(config.training, share) and getattr(config.training, number) != default:
            errors.append((f"training.{number}", f"its default {default} beside {share}, which replaces it"))
    return errors


def check(config: Config, place: str = "config") -> None:
    """Raises one ValueError, beginning with place, that lists every value out of range and every broken rule."""
    values = dict(_walk(config))
    broken = [*_value_errors(config), *_unused_errors(config), *_model_errors(config.model),
              *_hotword_errors(config.model), *_data_errors(config.data), *_cross_errors(config)]
    errors = [f"{path}: wanted {wanted}, got {show_value(values[path])}" for path, wanted in broken]
    if errors:
        raise ValueError("\n  ".join([f"{place}: wanted values that fit together, got {len(errors)} wrong:", *errors]))


# ---- from and to plain dicts ----

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
    elsewhere = [path for path, _ in _walk(Config()) if path.split(".")[-1] == key]
    if elsewhere and not similar:
        return elsewhere[0]
    return section + (similar or get_close_matches(key, names, 1, 0))[0]


def _merge(base: Any, values: dict, place: str, section: str = "") -> Any:
    """A copy of base, the dataclass of this section, with `values` in place of its own. Errors begin with the line of a
    Key, or with place where a key is a plain str."""
    hints, new = get_type_hints(type(base)), {}
    for key, value in values.items():
        path = f"{section}{key}"
        where = key.where if isinstance(key, Key) else place
        if key not in hints:
            raise ValueError(f"{where}: unknown key '{path}' (did you mean '{_nearest(section, str(key), hints)}'?)")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            new[key] = _merge(getattr(base, key), value, place, f"{path}.")
            continue
        try:
            new[key] = _convert(hints[key], value)
        except TypeError:
            wanted = _type_name(hints[key])
            raise ValueError(f"{where}: {path}: wanted {wanted}, got {show_value(value)}") from None
    return replace(base, **new)


def from_dict(values: dict, place: str, base: Any = Config()) -> Any:
    """base, a dataclass like Config, with nested plain dicts in place of its values. Checks keys and types, not the
    rules: raises ValueError that begins with `place` for an unknown key or a wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"{place}: wanted a map of sections, got {show_value(values)}")
    return _merge(base, values, place)


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Config from a YAML file and then from `--section.key=value` overrides, checked. Raises ValueError that names the
    file (and line) or the override at fault."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: wanted a config in YAML (UTF-8), got {error}") from None
    config = overridden(_merge(Config(), parse_yaml(text, path), path), overrides)
    config = _without_unused(config, [override[2:].partition("=")[0] for override in overrides])
    check(config, " ".join((str(path), *overrides)))
    return config


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """config with `--section.key=value` overrides, not checked. Raises ValueError that names the override at fault."""
    for override in overrides:
        match = re.fullmatch(r"--([^=]+)= *(.*)", override)
        if not match:
            raise ValueError(f"{override}: wanted --section.key=value")
        values = ""      # of `--section.key=`; in YAML it would be null
        if match[2]:
            values = _value(match[2].rstrip(" "), override)
        for key in reversed(match[1].split(".")):
            values = {key: values}
        config = _merge(config, values, override)
    return config


def differing_values(one: Config, other: Config) -> list[tuple[str, Any]]:
    """(dotted path, value in other) of the fields, not sections, in which two configs differ."""
    values = dict(_walk(one))
    return [(path, value) for path, value in _walk(other) if not is_dataclass(value) and value != values[path]]


def differing(one: Config, other: Config) -> list[str]:
    return [path for path, _ in differing_values(one, other)]


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


class Line(NamedTuple):
    where: str      # file:number
    indent: int     # spaces before text
    text: str       # not blank, and not only a comment


class Key(str):
    """A key of a map that remembers where it was read: `file:number`."""
    where: str


def parse_yaml(text: str, place: str = "<yaml>") -> dict[Key, Any]:
    """Nested dicts, lists and scalars of a YAML text whose top level is a map. Raises ValueError `place:line: ...` for
    anything outside the YAML subset that this file's docstring describes."""
    lines = _read_lines(text, place)
    first = lines[0] if lines else Line(f"{place}:1", 0, "")
    try:
        values = _parse_block(lines, -1)
    except RecursionError:
        raise ValueError(f"{place}:1: wanted a few levels of nesting, got too many") from None
    if not isinstance(values, dict):
        raise ValueError(f"{first.where}: wanted 'key: value' lines, got '{first.text}'")
    return values


def _read_lines(text: str, place: str) -> deque[Line]:
    """The lines without blank and comment lines."""
    lines = deque()
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{place}:{number}"
        line = line.removesuffix("\r")
        _refuse_outside(line, where)
        if line.startswith(("---", "...")):
            raise ValueError(f"{where}: wanted one document, got a document mark '{line}'")
        rest = line.lstrip(" ")
        if rest and rest[0] != "#":
            lines.append(Line(where, len(line) - len(rest), rest))
    return lines


def _refuse_outside(text: str, where: str) -> None:
    bad = re.search(OUTSIDE, text)
    if bad:
        name = "a tab" if bad[0] == "\t" else f"the character U+{ord(bad[0]):04X}"
        raise ValueError(f"{where}: wanted printable text and spaces, got {name} (in double quotes write an escape)")


def _starts_with_dash(line: Line) -> bool:
    return line.text == "-" or line.text.startswith("- ")


def _parse_block(lines: deque[Line], outer: int) -> Any:
    """The list, map or scalar in the lines that are indented deeper than outer; null if there are none."""
    if not lines or lines[0].indent <= outer:
        return None
    where, indent, text = lines[0]
    is_one_line = len(lines) == 1 or lines[1].indent <= outer
    if _starts_with_dash(lines[0]):
        value = _parse_list(lines, indent)
    elif is_one_line and not KEY.fullmatch(text):
        value = _value(text, where)
        lines.popleft()
    else:
        value = _parse_map(lines, indent)
    if lines and lines[0].indent > outer:
        raise ValueError(f"{lines[0].where}: wanted an indentation used above, got '{lines[0].text}'")
    return value


def _parse_list(lines: deque[Line], indent: int) -> list:
    """A list whose dashes stand at indent."""
    values = []
    while lines and lines[0].indent == indent and _starts_with_dash(lines[0]):
        where, _, text = lines.popleft()
        rest = text[1:].lstrip(" ")
        if rest and rest[0] != "#":      # `- a: 1` spells the same as a dash and, on the next line, `  a: 1`
            lines.appendleft(Line(where, indent + len(text) - len(rest), rest))
        values.append(_parse_block(lines, indent))
    return values


def _parse_map(lines: deque[Line], indent: int) -> dict[Key, Any]:
    """A map whose keys stand at indent."""
    values: dict[Key, Any] = {}
    while lines and lines[0].indent == indent:
        where, _, text = lines.popleft()
        match = KEY.fullmatch(text)
        name = _value(match[1].rstrip(" "), where) if match else None
        if type(name) is not str:
            raise ValueError(f"{where}: wanted 'key: value' with text for a key, got '{text}'")
        if name in values:
            raise ValueError(f"{where}: wanted every key once, got '{name}' again")
        key = Key(name)
        key.where = where
        if match[2]:
            values[key] = _value(match[2], where)
        elif lines and lines[0].indent == indent and _starts_with_dash(lines[0]):
            values[key] = _parse_list(lines, indent)      # the one thing below a key that need not be indented
        else:
            values[key] = _parse_block(lines, indent)
    return values


def _value(text: str, where: str) -> Any:
    """A scalar or an inline list, with nothing but a comment after it; "" is null."""
    _refuse_outside(text, where)
    value, rest = _scan(text, where) if text else (None, "")
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
