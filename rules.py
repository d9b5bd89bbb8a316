"""What a config must keep: the range of every number, options without effect, rules between fields.

`load` reads a file and checks it. A new number's name goes into `RANGES` (but for the weight of a loss), an option that
a kind has no use for into `UNUSED`, a rule between fields is an `if` with field and what is wanted. Needs config.py.
"""
import math
from collections.abc import Iterator, Sequence

from config import (Config, DataConfig, DecoderConfig, EncoderConfig, ModelConfig, TrainingConfig, differing, from_dict,
                    nested, overridden, read_yaml, show_value, walk)

RANGES = {  # range -> (its test, which nan and inf fail; names of the fields, in every section, that must lie in it)
    "1 or more": (lambda x: 1 <= x < math.inf, """hidden_dim num_heads num_train num_dev num_symbols
        min_symbols max_symbols min_frames max_frames lfr_m lfr_n batch_size batch_frames num_epochs
        max_bad_steps accumulate new ahead"""),
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
    "from 1 to 1000": (lambda x: 1 <= x <= 1000, "num_mels"),
    "from 1000 to 1000000": (lambda x: 1000 <= x <= 1_000_000, "sample_rate"),  # as of recordings, in audio.py
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
    "data.kind": {"toy": "train dev test unit lfr_m lfr_n augment.speeds augment.snr_db augment.noise augment.reverb"},
    "data.augment.reverb": {"": "reverb_share"},
}

Errors = Iterator[tuple[str, str]]      # dotted path of a field, the values wanted


def _range_of(name: str) -> str:
    """The range of a field in RANGES; the weight of a loss that is not there is 0 or more. "" for what has none."""
    for wanted, (_, names) in RANGES.items():
        if name in names.split():
            return wanted
    return "0 or more" if name.endswith("_weight") else ""


def _value_errors(config: Config) -> Errors:
    """Values wrong by themselves: outside RANGES, or integers of 2^31 and more."""
    for path, value in walk(config):
        name = path.rpartition(".")[2]
        if type(value) is int and value >= 2**31 and name != "seed":
            yield path, "below 2^31"
        numbers = value if isinstance(value, tuple) else (value,)
        wanted = _range_of(name)
        if wanted and type(value) is not str and not (numbers and all(map(RANGES[wanted][0], numbers))):
            yield path, wanted


def _unused(config: Config) -> Iterator[tuple[str, str]]:
    """(path of a choice, path of a value that has no effect with it and yet is not its default): see UNUSED."""
    values = dict(walk(config))
    changed = differing(Config(), config)
    for choice, unused_by_value in UNUSED.items():
        for name in unused_by_value.get(values[choice], "").split():
            unused = f"{choice.rpartition('.')[0]}.{name}"
            for path in changed:
                if path == unused or path.startswith(f"{unused}."):
                    yield choice, path


def _unused_errors(config: Config) -> Errors:
    values = dict(walk(config))
    defaults = dict(walk(Config()))
    for choice, path in _unused(config):
        yield path, f"its default {show_value(defaults[path])}, as {choice} {values[choice]} has no use for it"


def _without_unused(config: Config, typed: Sequence[str]) -> Config:
    """config in which what a file says for another choice than the one typed on the command line has its default
    again: who switches a kind there need not undo what belongs to the file's."""
    defaults = dict(walk(Config()))
    switched = set(typed)
    for choice in UNUSED:      # one by one, as a switch may switch another choice back
        for other, path in list(_unused(config)):
            if other == choice and choice in switched and path not in typed:
                config = from_dict(nested(path, defaults[path]), path, config)
                switched.add(path)
    return config


def _model_errors(model: ModelConfig) -> Errors:
    encoder, predictor, decoder = model.encoder, model.predictor, model.decoder
    if encoder.kind == "sanm" and encoder.subsampling != 1:
        yield "model.encoder.subsampling", "1 for kind sanm"
    if encoder.kind == "relative_conformer" and encoder.subsampling != 4:
        yield "model.encoder.subsampling", "4 for kind relative_conformer"
    if encoder.num_layers == 0:
        yield "model.encoder.num_layers", "1 or more"
    if model.name == "streaming" and encoder.kind != "sanm":      # layers that have a `step`
        yield "model.encoder.kind", "sanm for a streaming model"
    if model.name == "streaming" and decoder.kind != "sanm":
        yield "model.decoder.kind", "sanm for a streaming model"
    if model.name == "streaming" and (predictor.kind == "stacked" or predictor.upsampling):
        yield "model.predictor.kind", "dense or depthwise without a timing head for a streaming model"
    if predictor.num_layers == 0:
        yield "model.predictor.num_layers", "1 or more"
    if predictor.kind != "stacked" and predictor.smooth - predictor.noise > 1:      # a weight above 1 fires twice
        yield "model.predictor.smooth", f"at most 1 + noise {predictor.noise}, as weights are at most 1"
    if decoder.num_layers == 0 and (decoder.kind == "sanm" or model.name != "paraformer"):
        yield "model.decoder.num_layers", "1 or more"
    if decoder.attention_layers > decoder.num_layers:
        yield "model.decoder.attention_layers", f"at most num_layers {decoder.num_layers}"
    needs_width = decoder.kind != "transformer" or model.share_embedding      # no projection of the decoder's input
    if needs_width and decoder.hidden_dim != encoder.hidden_dim:
        why = f"kind {decoder.kind}" if decoder.kind != "transformer" else "share_embedding"
        yield "model.decoder.hidden_dim", f"the encoder's {encoder.hidden_dim} for {why}"
    second = model.hotwords.decoder
    if model.name == "seaco" and (second.attention_layers or second.num_layers) < 6:
        yield ("model.hotwords.decoder.attention_layers",
               "6 or more: the sixth layer's attention chooses from a long list")
    yield from _layer_errors("model.encoder", encoder, model.place_embedding)      # the sampler adds sinusoids to them
    yield from _layer_errors("model.decoder", decoder, False)


def _layer_errors(path: str, part: EncoderConfig | DecoderConfig, is_placed: bool) -> Errors:
    if part.memory_shift > part.kernel_size // 2:
        yield f"{path}.memory_shift", f"at most half of kernel_size {part.kernel_size}"
    if part.num_heads > 0 and part.hidden_dim % part.num_heads != 0:      # RANGES reports 0 and below
        yield f"{path}.num_heads", f"a divisor of hidden_dim {part.hidden_dim}"
    has_sinusoids = part.kind in ("transformer", "conformer") and part.position == "sinusoidal"
    if part.hidden_dim % 2 != 0 and (has_sinusoids or part.kind == "relative_conformer" or is_placed):
        yield f"{path}.hidden_dim", "an even width for sinusoids"


def _data_errors(data: DataConfig) -> Errors:
    toy, snr_db = data.toy, data.augment.snr_db
    if toy.max_symbols < toy.min_symbols:
        yield "data.toy.max_symbols", f"at least min_symbols {toy.min_symbols}"
    if toy.max_frames < 3 * toy.min_frames:
        yield "data.toy.max_frames", f"at least 3 x min_frames {toy.min_frames}"
    if toy.blend_frames > toy.min_frames:
        yield "data.toy.blend_frames", f"at most min_frames {toy.min_frames}"
    if data.max_sec < data.min_sec:
        yield "data.max_sec", f"at least min_sec {data.min_sec}"
    if snr_db and not (len(snr_db) == 2 and -100 <= snr_db[0] <= snr_db[1] <= 100):
        yield "data.augment.snr_db", "[] or two numbers from -100 to 100, the lower first"
    if data.augment.noise and not snr_db:
        yield "data.augment.snr_db", "two numbers, how loud the recordings of data.augment.noise are"
    if data.augment.freq_width > data.num_mels:
        yield "data.augment.freq_width", f"at most num_mels {data.num_mels}"


def _cross_errors(config: Config) -> Errors:
    """Broken rules between data, model and training."""
    data, training, kind = config.data, config.training, config.model.encoder.kind
    width = data.num_mels * data.lfr_m
    product = f"a product with lfr_m {data.lfr_m} that is"
    if kind == "sanm" and (width < 4 or width % 2 != 0):      # for halved_sinusoids
        yield "data.num_mels", f"{product} even and 4 or more for kind sanm"
    if kind == "relative_conformer" and width < 7:      # for two 3 x 3 windows
        yield "data.num_mels", f"{product} 7 or more for kind relative_conformer"
    manifest = "a manifest or a Kaldi folder, as data.kind is manifest"
    if data.kind == "manifest" and data.train == "":
        yield "data.train", manifest
    if data.kind == "manifest" and data.dev == "" and training.init_from == "":     # fine-tuning can do without
        yield "data.dev", manifest
    if config.model.name == "streaming" and training.picture_epochs:
        yield "training.picture_epochs", "0 for a streaming model, whose windows overlap"
    if training.warmup_share and training.warmup_steps != TrainingConfig().warmup_steps:
        yield "training.warmup_steps", f"its default {TrainingConfig().warmup_steps} beside warmup_share"
    if training.average_share and training.average_decay:
        yield "training.average_decay", f"its default {TrainingConfig().average_decay} beside average_share"


def check(config: Config, place: str = "config") -> None:
    """Raises one ValueError, beginning with place, that lists every value out of range and every broken rule."""
    broken = [*_value_errors(config), *_unused_errors(config), *_model_errors(config.model),
              *_data_errors(config.data), *_cross_errors(config)]
    if broken:
        values = dict(walk(config))
        errors = [f"{path}: wanted {wanted}, got {show_value(values[path])}" for path, wanted in broken]
        raise ValueError("\n  ".join([f"{place}: wanted values that fit together, got {len(errors)} wrong:", *errors]))


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file with `--section.key=value` overrides, checked. ValueError: file, line or override."""
    config = overridden(from_dict(read_yaml(path, "a config in YAML (UTF-8)"), path), overrides)
    config = _without_unused(config, [override[2:].partition("=")[0] for override in overrides])
    check(config, " ".join((str(path), *overrides)))
    return config
