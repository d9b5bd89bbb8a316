"""The model directories that FunASR publishes: options, files, tensor names, times.

Everything here is a table or a plain function between FunASR's formats and ours: nothing computes with a model. The
layers are in funasr_layers.py, vocabularies and sentences in pieces.py; checkpoint.py puts a model together.
Reading order: the options of its config.yaml (`PUBLISHED`) to and from our Config; names of tensors (`RENAMES`); the
normalisation am.mvn; times from a timing head.
Source: FunASR 1.4, whose published checkpoints these functions read and write.
"""
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import Config, dump_yaml, from_dict, read_yaml, show_value
from downloads import check_files, check_kind
from files import WithoutInit, load_weights, read_file
from rules import check
from tokenizer import parse_file


# ---- options and files ----

FILES = {"config": "config.yaml", "model": "model.pt", "tokens": "tokens.json", "stats": "am.mvn",
         "seg_dict": "seg_dict"}      # unless configuration.json says otherwise, in file_path_metas:
FILE_KEYS = {"init_param": "model", "config": "config", "tokenizer_conf.token_list": "tokens",
             "tokenizer_conf.seg_dict_file": "seg_dict", "frontend_conf.cmvn_file": "stats"}


class Option(NamedTuple):
    """An option of FunASR's: what it means here."""
    default: Any        # where FunASR's config leaves it out
    field: str = ""     # ours of the same meaning; "": we have none
    only: Any = None    # without a field: the one value that is implemented here


class PublishedClass(NamedTuple):
    """A class of FunASR's."""
    ours: dict[str, Any]            # our fields that the class alone decides
    options: dict[str, Option]      # by FunASR's names, in its spelling (sanm_shfit, upsacle_samples)


LAYERS = {
    "attention_heads": Option(4, "num_heads"), "linear_units": Option(2048, "ffn_dim"),
    "num_blocks": Option(6, "num_layers"), "dropout_rate": Option(0.1, "dropout"),
    "normalize_before": Option(True, only=True), "concat_after": Option(False, only=False)}
ENCODER = LAYERS | {
    "output_size": Option(256, "hidden_dim"), "attention_dropout_rate": Option(0.0, "attention_dropout")}
CIF = {
    "l_order": Option(1, "left"), "r_order": Option(1, "right"), "threshold": Option(1.0, only=1.0),
    "smooth_factor": Option(1.0, "smooth"), "noise_threshold": Option(0.0, "noise"), "dropout": Option(0.1, "dropout")}
MODEL = {
    "ctc_weight": Option(0.5, "ctc_weight"), "lsm_weight": Option(0.0, "label_smoothing"),
    "predictor_bias": Option(0, "end_token"), "predictor_weight": Option(0.0, "quantity_weight"),
    "length_normalized_loss": Option(False, "loss_unit"), "sampling_ratio": Option(0.2, "sampling_ratio"),
    "share_embedding": Option(False, "share_embedding")}
SANM_DECODER = LAYERS | {
    "att_layer_num": Option(6, "attention_layers"), "kernel_size": Option(21, "kernel_size"),
    "sanm_shfit": Option(0, "memory_shift"), "self_attention_dropout_rate": Option(0.0, "attention_dropout")}
SANM_ENCODER = ENCODER | {
    "kernel_size": Option(11, "kernel_size"), "sanm_shfit": Option(0, "memory_shift"),
    "selfattention_layer_type": Option("sanm", only="sanm"), "positionwise_layer_type": Option("linear", only="linear")}
FRONTEND = {
    "fs": Option(16000, "sample_rate"), "n_mels": Option(80, "num_mels"), "lfr_m": Option(1, "lfr_m"),
    "lfr_n": Option(1, "lfr_n"), "window": Option("hamming", only="hamming"), "frame_length": Option(25, only=25),
    "frame_shift": Option(10, only=10), "snip_edges": Option(True, only=True),
    "upsacle_samples": Option(True, only=True)}
PUBLISHED = {     # part of a model -> FunASR's classes
    "model": {
        "Paraformer": PublishedClass({"name": "paraformer"}, MODEL),
        "BiCifParaformer": PublishedClass({"name": "paraformer"}, MODEL),
        "ParaformerStreaming": PublishedClass({"name": "streaming"}, MODEL),
        "SeacoParaformer": PublishedClass({"name": "seaco"}, MODEL | {
            "NO_BIAS": Option(8377, "hotwords.no_bias"), "bias_encoder_bid": Option(False, "hotwords.both_ways"),
            "bias_encoder_type": Option("lstm", only="lstm")}),
        "ContextualParaformer": PublishedClass({"name": "contextual"}, MODEL | {
            "use_decoder_embedding": Option(False, "hotwords.share_embedding"),
            "bias_encoder_type": Option("lstm", only="lstm")})},
    "encoder": {
        "SANMEncoder": PublishedClass({"kind": "sanm", "subsampling": 1}, SANM_ENCODER | {
            "input_layer": Option("conv2d", only="pe")}),
        "SANMEncoderChunkOpt": PublishedClass({"kind": "sanm", "subsampling": 1}, SANM_ENCODER | {
            "input_layer": Option("conv2d", only="pe_online")}),
        "ConformerEncoder": PublishedClass({"kind": "relative_conformer", "subsampling": 4}, ENCODER | {
            "cnn_module_kernel": Option(31, "kernel_size"), "input_layer": Option("conv2d", only="conv2d"),
            "macaron_style": Option(False, only=True), "use_cnn_module": Option(True, only=True),
            "activation_type": Option("swish", only="swish"), "pos_enc_layer_type": Option("rel_pos", only="rel_pos"),
            "rel_pos_type": Option("legacy", only="legacy"),
            "selfattention_layer_type": Option("rel_selfattn", only="rel_selfattn")})},
    "predictor": {
        "CifPredictor": PublishedClass({"kind": "depthwise"}, CIF | {"tail_threshold": Option(0.45, "tail")}),
        "CifPredictorV2": PublishedClass({"kind": "dense"}, CIF | {"tail_threshold": Option(0.0, "tail")}),
        "CifPredictorV3": PublishedClass({"kind": "dense"}, CIF | {
            "tail_threshold": Option(0.0, "tail"), "smooth_factor2": Option(1.0, "timing_smooth"),
            "noise_threshold2": Option(0.0, "timing_noise"), "upsample_times": Option(5, "upsampling"),
            "use_cif1_cnn": Option(True, only=False), "upsample_type": Option("cnn", only="cnn_blstm")})},
    "decoder": {
        "ParaformerSANMDecoder": PublishedClass({"kind": "sanm"}, SANM_DECODER),
        "ContextualParaformerDecoder": PublishedClass({"kind": "sanm"}, SANM_DECODER),
        "ParaformerSANDecoder": PublishedClass({"kind": "bare"}, LAYERS)},
    "seaco_decoder": {
        "ParaformerSANMDecoder": PublishedClass({"kind": "sanm"}, SANM_DECODER | {
            "use_output_layer": Option(True, only=False), "wo_input_layer": Option(False, only=True)})},
    "frontend": {
        "WavFrontend": PublishedClass({}, FRONTEND), "WavFrontendOnline": PublishedClass({}, FRONTEND)},
    "tokenizer": {"CharTokenizer": PublishedClass({}, {})},
}
STREAMING = {     # part of a ParaformerStreaming -> its class, which no other model has
    "model": "ParaformerStreaming", "encoder": "SANMEncoderChunkOpt", "frontend": "WavFrontendOnline"}
HOTWORD_MODELS = {"seaco": "SeacoParaformer", "contextual": "ContextualParaformer"}    # our names -> FunASR's
IGNORED = {     # part of these models -> options that change nothing at inference; others that are unknown are errors
    "model": """inner_dim bias_encoder_dropout_rate seaco_lsm_weight seaco_length_normal seaco_length_normalized_loss
        seaco_weight train_decoder crit_attn_weight crit_attn_smooth target_buffer_length use_1st_decoder_loss""",
    "encoder": "positional_dropout_rate pos_enc_class", "predictor": "idim",
    "decoder": "positional_dropout_rate src_attention_dropout_rate",
    "seaco_decoder": "positional_dropout_rate src_attention_dropout_rate"}
CONVERTED = {     # our field -> FunASR's value -> ours; of the other fields, values are the same
    "end_token": {0: False, 1: True}, "loss_unit": {True: "token", False: "utterance"}}


def is_published(path: str | Path) -> bool:
    """Whether path is a model directory of FunASR: one without our checkpoint.pt."""
    return str(path) != "" and Path(path).is_dir() and not (Path(path) / "checkpoint.pt").exists()   # Path("") is "."


def published_files(folder: str) -> dict[str, Path]:
    """{key of FILES: its path in this directory}, without seg_dict if there is none. Raises ValueError that names a bad
    configuration.json, or as downloads.check_files."""
    folder, names = Path(folder), dict(FILES)
    if not (folder / FILES["tokens"]).exists() and (folder / "tokens.txt").exists():
        names["tokens"] = "tokens.txt"
    path = folder / "configuration.json"
    if path.exists():
        try:
            metas = json.loads(path.read_text("utf-8")).get("file_path_metas", {})
            for key, part in FILE_KEYS.items():
                section, _, name = key.rpartition(".")
                named = metas.get(section, {}) if section else metas
                names[part] = named.get(name, names[part])
                if not isinstance(names[part], str):
                    raise ValueError(f"{key} {names[part]!r}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: wanted JSON with file_path_metas, got {error}") from None
    if not (folder / names["seg_dict"]).exists():
        del names["seg_dict"]
    files = {part: folder / name for part, name in names.items()}
    check_files(folder, files)
    return files


def read_values(path: str | Path) -> dict:
    """What stands in a config.yaml of FunASR's, by its names."""
    return read_yaml(path, "the config.yaml of a FunASR model")


def read_section(values: dict, part: str, ignored: Sequence[str], base: Any, place: str) -> Any:
    """The options of a part, but for those that are ignored, as a dataclass like base, which has FunASR's names."""
    given = values.get(f"{part}_conf") or {}
    used = {key: value for key, value in given.items() if key not in ignored}
    return from_dict(used, f"{place}: {part}_conf", base)


def read_published_config(path: str | Path) -> Config:
    """Config with model and front end from FunASR's config.yaml, and defaults for everything else. Raises ValueError
    that names a class or an option that is not implemented here."""
    values = read_values(path)
    parts = {part: translate(values, part, str(path)) for part in PUBLISHED if part != "seaco_decoder"}
    is_streaming = values["model"] == STREAMING["model"]
    for part, name in STREAMING.items():
        if (values[part] == name) != is_streaming:
            raise ValueError(f"{path}: {part} {values[part]} is not implemented for a {values['model']}; wanted "
                             f"{', '.join(STREAMING.values())} together, or none of them")
    width = parts["encoder"]["hidden_dim"]
    decoder = {"hidden_dim": width, **parts["decoder"]}
    if decoder.get("memory_shift", 0) is None:       # FunASR's null: a causal memory
        decoder["memory_shift"] = decoder["kernel_size"] // 2
    model = {"encoder": parts["encoder"], "predictor": parts["predictor"], "decoder": decoder, **parts["model"],
             "norm_eps": 1e-12, "place_embedding": decoder["kind"] == "bare"}
    if model["name"] == "seaco":
        model["hotwords"]["decoder"] = {"hidden_dim": width, **translate(values, "seaco_decoder", str(path))}
    if model["name"] in HOTWORD_MODELS:
        _check_hotwords(values, width, str(path))
    config = from_dict({"model": model, "data": {"kind": "manifest", **parts["frontend"]}}, str(path))
    predictor = config.model.predictor
    if predictor.smooth - predictor.noise > 1:      # a weight above 1, which fires otherwise in FunASR than in `cif`
        raise ValueError(f"{path}: predictor_conf.smooth_factor {predictor.smooth} is not implemented; "
                         f"wanted at most 1 + noise_threshold {predictor.noise}")
    check(replace(config, data=replace(config.data, train="none", dev="none")), str(path))     # manifests come later
    return config


def _check_hotwords(values: dict, width: int, place: str) -> None:
    """Raises ValueError that names what FunASR's config of a model with hotwords, `width` wide, has and we have not."""
    wanted = "ContextualParaformerDecoder" if values["model"] == "ContextualParaformer" else "ParaformerSANMDecoder"
    if values["decoder"] != wanted:
        raise ValueError(f"{place}: decoder {values['decoder']} is not implemented for a {values['model']}; "
                         f"wanted {wanted}")
    inner = values["model_conf"].get("inner_dim", 256)
    if inner != width:
        raise ValueError(f"{place}: model_conf.inner_dim: wanted the encoder's output_size {width}, got {inner}")
    for part, ignored in IGNORED.items():
        published = PUBLISHED[part].get(values.get(part))
        known = published.options if published else {}      # else it is not a part of this model
        for option in values.get(f"{part}_conf") or {}:
            if option not in known and option not in ignored.split():
                raise ValueError(f"{place}: {part}_conf.{option} is not implemented for a {values['model']}")


def translate(values: dict, part: str, place: str) -> dict:
    """{our field or section: value} for a part of FunASR's config. Raises ValueError."""
    classes, name, options = PUBLISHED[part], values.get(part), values.get(f"{part}_conf") or {}
    if isinstance(options, dict) and "sanm_shift" in options and part in ("encoder", "decoder"):
        options = {"sanm_shfit": options["sanm_shift"], **options}      # as FunASR's streaming template spells it
    if not isinstance(name, str) or not isinstance(options, dict):
        raise ValueError(f"{place}: wanted FunASR's '{part}: CLASS' and '{part}_conf: options', got another config; "
                         "a run of ours is loaded by its checkpoint: RUN/checkpoints/best.pt")
    if name not in classes:
        check_kind(name, place)
        raise ValueError(f"{place}: {part} {show_value(name)} is not implemented; wanted {' or '.join(classes)}")
    ours = dict(classes[name].ours)
    for key, option in classes[name].options.items():
        value = options.get(key, option.default)
        known = [value]      # any, here; from_dict checks its type, rules.check its range
        if not option.field:
            known = [option.only]
        elif option.field in CONVERTED:
            known = list(CONVERTED[option.field])
        if value not in known:
            raise ValueError(f"{place}: {part}_conf.{key} {show_value(value)} is not implemented; "
                             f"wanted {' or '.join(map(show_value, known))}")
        if option.field in CONVERTED:
            value = CONVERTED[option.field][value]
        section, _, field = option.field.rpartition(".")
        if section:
            ours.setdefault(section, {})[field] = value
        elif field:
            ours[field] = value
    return ours


def _translate_back(ours: Any, options: dict[str, Option]) -> dict:
    """{FunASR's option: value} from a section of our config."""
    values = {}
    for key, option in options.items():
        value = attrgetter(option.field)(ours) if option.field else option.only
        theirs = {own: funasrs for funasrs, own in CONVERTED.get(option.field, {}).items()}
        values[key] = theirs.get(value, value)
    return values


def _published_class(part: str, ours: Any, upsampling: int) -> str:
    """FunASR's class for a part of our config. Raises ValueError if there is none."""
    for name, published in PUBLISHED[part].items():
        fits = all(getattr(ours, field) == value for field, value in published.ours.items())
        if part in ("model", "predictor") and name != "SeacoParaformer":      # it: with or without timing
            has_timing = name == "BiCifParaformer" or "upsample_times" in published.options
            fits = fits and has_timing == (upsampling > 0)
        if fits:
            return name
    raise ValueError(f"model.{part}: wanted the kind and options of {' or '.join(PUBLISHED[part])} of FunASR, "
                     f"got kind {getattr(ours, 'kind', '')}")


def dump_published_config(config: Config) -> str:
    """The config.yaml from which FunASR builds this model; read_published_config reads the same from it. Raises
    ValueError for a model that FunASR has no classes for."""
    model, width = config.model, 4 * config.model.encoder.hidden_dim
    for field, wanted in (("norm_eps", 1e-12), ("place_embedding", model.decoder.kind == "bare")):
        if getattr(model, field) != wanted:
            got = show_value(getattr(model, field))
            raise ValueError(f"model.{field}: wanted {show_value(wanted)} for FunASR, got {got}")
    encoder = replace(model.encoder, ffn_dim=model.encoder.ffn_dim or width)
    decoder = replace(model.decoder, ffn_dim=model.decoder.ffn_dim or width,
                      attention_layers=model.decoder.attention_layers or model.decoder.num_layers)
    sections = {"model": model, "encoder": encoder, "predictor": model.predictor, "decoder": decoder,
                "frontend": config.data, "tokenizer": config.data}
    if model.name == "seaco":
        sections["seaco_decoder"] = model.hotwords.decoder
    values: dict = {}
    for part, ours in sections.items():
        name = _published_class(part, ours, model.predictor.upsampling)
        if part == "decoder" and model.name == "contextual":
            name = "ContextualParaformerDecoder"
        if model.name == "streaming":
            name = STREAMING.get(part, name)
        values[part] = name
        values[f"{part}_conf"] = _translate_back(ours, PUBLISHED[part][name].options)
    if model.name in HOTWORD_MODELS:
        values["model_conf"]["inner_dim"] = encoder.hidden_dim
    values["predictor_conf"]["idim"] = encoder.hidden_dim      # from here on: what FunASR asks for, and we do not
    values["frontend_conf"]["dither"] = 0.0
    values["tokenizer_conf"] = {"unk_symbol": "<unk>", "split_with_space": True}
    return dump_yaml(values)


# ---- tensor names ----

SANM_DECODER_NAMES = {
    "blocks": "decoders", "memory_blocks": "decoders2", "last": "decoders3.0", "norm": "after_norm",
    "output": "output_layer", "norm_ffn": "norm1", "norm_memory": "norm2", "norm_cross": "norm3",
    "memory": "self_attn.fsmn_block", "cross_attention.query": "src_attn.linear_q",
    "cross_attention.key_value": "src_attn.linear_k_v", "cross_attention.out": "src_attn.linear_out",
    "feed_forward.up": "feed_forward.w_1", "feed_forward.norm": "feed_forward.norm",
    "feed_forward.down": "feed_forward.w_2"}
RENAMES = {  # part and kind: our names in it -> FunASR's; {k,v}: two of its tensors, concatenated along dim 0, are ours
    "encoder sanm": {
        "first": "encoders0.0", "blocks": "encoders", "norm": "after_norm", "norm_self": "norm1", "norm_ffn": "norm2",
        "self_attention.query_key_value": "self_attn.linear_q_k_v", "self_attention.memory": "self_attn.fsmn_block",
        "self_attention.out": "self_attn.linear_out", "layers.0": "w_1", "layers.3": "w_2"},
    "encoder relative_conformer": {
        "subsampling.convolutions.0": "embed.conv.0", "subsampling.convolutions.1": "embed.conv.2",
        "subsampling.out": "embed.out.0", "blocks": "encoders", "norm": "after_norm",
        "norm_first": "norm_ff_macaron", "ffn_first": "feed_forward_macaron", "norm_self": "norm_mha",
        "norm_conv": "norm_conv", "norm_second": "norm_ff", "ffn_second": "feed_forward", "norm_out": "norm_final",
        "self_attention.query": "self_attn.linear_q", "self_attention.key_value": "self_attn.linear_{k,v}",
        "self_attention.out": "self_attn.linear_out", "self_attention.position": "self_attn.linear_pos",
        "self_attention.content_bias": "self_attn.pos_bias_u", "self_attention.position_bias": "self_attn.pos_bias_v",
        "convolution.gate": "conv_module.pointwise_conv1", "convolution.depthwise": "conv_module.depthwise_conv",
        "convolution.norm": "conv_module.norm", "convolution.out": "conv_module.pointwise_conv2",
        "layers.0": "w_1", "layers.3": "w_2"},
    "predictor dense": {"convolution": "cif_conv1d", "firing": "cif_output"},
    "predictor depthwise": {"convolution": "cif_conv1d", "firing": "cif_output"},
    "timing": {"timing.upsample": "predictor.upsample_cnn", "timing.lstm": "predictor.blstm",
               "timing.firing": "predictor.cif_output2"},
    "decoder sanm": SANM_DECODER_NAMES,
    "decoder bare": {
        "blocks": "decoders", "norm": "after_norm", "output": "output_layer", "norm_self": "norm1",
        "norm_cross": "norm2", "norm_ffn": "norm3", "self_attention.query": "self_attn.linear_q",
        "self_attention.key_value": "self_attn.linear_{k,v}", "self_attention.out": "self_attn.linear_out",
        "cross_attention.query": "src_attn.linear_q", "cross_attention.key_value": "src_attn.linear_{k,v}",
        "cross_attention.out": "src_attn.linear_out", "layers.0": "w_1", "layers.3": "w_2"},
    "embedding": {"embedding": "decoder.embed.0"},
    "ctc": {"ctc": "ctc.ctc_lo"},
    "hotword_embedding": {"hotword_embedding": "bias_embed"},
    "hotword_encoder": {"hotword_encoder": "bias_encoder"},
    "hotword_projection": {"hotword_projection": "lstm_proj"},
    "hotword_decoder": SANM_DECODER_NAMES | {
        "hotword_decoder": "seaco_decoder", "hotword_decoder.output": "hotword_output_layer"},
    "hotword_block": SANM_DECODER_NAMES | {
        "hotword_block": "decoder.last_decoder", "hotword_block.norm_hotwords": "decoder.bias_decoder.norm3",
        "hotword_block.hotword_attention.query": "decoder.bias_decoder.src_attn.linear_q",
        "hotword_block.hotword_attention.key_value": "decoder.bias_decoder.src_attn.linear_k_v",
        "hotword_block.hotword_attention.out": "decoder.bias_decoder.src_attn.linear_out",
        "hotword_block.merge": "decoder.bias_output"},
}


def rename(name: str, table: dict[str, str]) -> str:
    """name with the parts between its dots that are keys of the table replaced, the longest first."""
    ours = "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<![^.])(?:{ours})(?![^.])", lambda match: table[match[0]], name)


def funasr_names(name: str, options) -> list[str]:
    """FunASR's names of the tensors that make our tensor `name`. Raises ValueError if FunASR has no such layer."""
    part = name.split(".")[0]
    kind = getattr(getattr(options, part, None), "kind", "")
    table = RENAMES.get(f"{part} {kind}".strip())
    if table is None:
        raise ValueError(f"model.{part}.kind {kind}: FunASR has no such layer; its kinds are "
                         f"{', '.join(key.split()[1] for key in RENAMES if key.startswith(part + ' '))}")
    theirs = rename(name, table)
    if "{k,v}" in theirs:
        return [theirs.replace("{k,v}", "k"), theirs.replace("{k,v}", "v")]
    return [theirs]


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a model.pt of FunASR by its names, mapped as `read_file` does. Bare, or in `state_dict`,
    `model_state_dict` or `model`, with or without `module.` before every name."""
    state = read_file(path, "the weights of a model", mapped=True)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path}: wanted tensors by name, got {type(state).__name__}")
    return {name.removeprefix("module."): x for name, x in state.items()}


def load_model(build: Callable[[], nn.Module], path: str | os.PathLike, names: Callable[[str], list[str]]) -> nn.Module:
    """What `build` makes, with the weights of FunASR's model.pt; names as in load_weights. Raises as
    `read_weights`, with the sizes wanted and found if the file is too short, and `load_weights`."""
    with WithoutInit():  # every tensor comes from the file
        model = build()
    try:
        weights = read_weights(path)
    except ValueError as error:
        found = os.path.getsize(path) if os.path.exists(path) else 0
        needed = sum(x.nbytes for x in model.state_dict().values())
        if not 0 < found < needed:
            raise
        raise ValueError(f"{error}; half a download? Its config asks for {needed:,} bytes at least, it has {found:,}"
                         ) from None
    load_weights(model, weights, str(path), names, adopt=True)
    return model


# ---- am.mvn ----

def read_cmvn(path: str | os.PathLike, size: int) -> Tensor:
    """The normalisation in a Kaldi nnet text file (am.mvn): <AddShift> a, <Rescale> s -> (2,size) float32, -a and s.
    Raises ValueError that names the file."""
    wanted = "means and deviations, <AddShift> [ numbers ] and <Rescale> [ numbers ]"
    shift, scale = parse_file(path, wanted, lambda text: [
        _numbers_behind(text, mark) for mark in ("<AddShift>", "<Rescale>")])
    if not len(shift) == len(scale) == size:
        raise ValueError(f"{path}: wanted {size} numbers each, as the features have, got {len(shift)} and {len(scale)}")
    return torch.from_numpy(np.stack([-shift, scale])).float()


def _numbers_behind(text: str, mark: str) -> np.ndarray:
    """The numbers in the first [ ] behind mark (n,) float64. Raises ValueError."""
    begin = text.index("[", text.index(mark)) + 1
    return np.array(text[begin:text.index("]", begin)].split(), np.float64)


def write_cmvn(path: str | os.PathLike, stats: Tensor) -> None:
    """Write stats (2,F) as the Kaldi nnet text that read_cmvn reads, to the last bit."""
    if stats.dim() != 2 or len(stats) != 2:
        raise ValueError(f"stats must be (2,F), got {tuple(stats.shape)}")
    size = stats.shape[1]
    rows = [" ".join(f"{x:.9g}" for x in row) for row in torch.stack([-stats[0], stats[1]]).tolist()]
    lines = ["<Nnet>", f"<Splice> {size} {size}", "[ 0 ]",
             f"<AddShift> {size} {size}", f"<LearnRateCoef> 0 [ {rows[0]} ]",
             f"<Rescale> {size} {size}", f"<LearnRateCoef> 0 [ {rows[1]} ]", "</Nnet>", ""]
    Path(path).write_text("\n".join(lines))


# ---- times ----

# All are FunASR's; the last three in frames of the timing head.
FIRED = np.float32(1 - 1e-4)  # sum of the timing head's weights, in float32, that fires
FIRE_SHIFT = -1.5  # added to the frame of a firing, which comes late
LONGEST = 12  # of a token
EDGE = 5  # the longest silence at the end that the last token takes


def firings(weights: np.ndarray) -> np.ndarray:
    """When the running sum of weights (n,) float32 reaches FIRED, which is then taken off it -> (m,), in frames."""
    places = []
    total = np.float32(0)
    for t, weight in enumerate(weights):
        total = total + weight
        if total >= FIRED:
            total = total - FIRED
            places.append(t + FIRE_SHIFT)
    return np.array(places)


def firing_spans(weights: np.ndarray, n: int) -> list[tuple[float, float]]:
    """Begin and end of n tokens, in frames of the timing head, from its weights, float32. A token lasts from one firing
    to the next. Source: equal to FunASR's ts_prediction_lfr6_standard without <sil>."""
    fired = firings(weights)
    if len(fired) != n + 1:  # another number of tokens than the decoder's: scale the weights to that
        if not weights.any():
            weights = np.ones_like(weights)
        fired = firings(weights / (weights.sum() / np.float32(n + 1)))
    fired = np.pad(fired, (0, n + 1), constant_values=len(weights))[:n + 1]  # too few even so: the rest at the end
    spans = [(float(start), float(min(end, start + LONGEST))) for start, end in zip(fired, fired[1:])]
    if spans and spans[-1][1] == fired[-1]:  # the last one was not cut: it goes on into the end
        silence = len(weights) - fired[-1]
        end = len(weights) - silence / 2 if silence > EDGE else len(weights)
        spans[-1] = (spans[-1][0], float(end))
    return spans
