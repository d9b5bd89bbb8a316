"""A model from its name, from a checkpoint of train.py or from a directory of FunASR's; and back into files.

Reading order: by name and from a file, the checkpoints of a run, a system that is ready to recognise, what training
starts from, exports. Needs torch and what its imports name.
"""
import contextlib
import itertools
import json
import math
import os
import runpy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import config as configs
import data
from audio import compute_stats, feature_dim
from baselines import CTC, Search, Transformer
from chunked import StreamingParaformer, check_trainable
from downloads import check_name, check_pointer
from files import WithoutInit, load_weights, read_file, replacing, save, save_atomic
from funasr import (HOTWORD_MODELS, dump_published_config, funasr_names, is_published, load_model, published_files,
                    read_cmvn, read_published_config, write_cmvn)
from hotwords import ContextualParaformer, HotwordParaformer, SeacoParaformer, list_encoder
from model import Paraformer, pick
from packed import Int8Linear, Int8Weights, PackedLinear, lay_out, quantise, trim
from pieces import PieceTokenizer
from punctuation import Punctuation
from rules import check
from streaming import Chunk
from tokenizer import SPECIALS, Tokenizer
from vad import Vad


# ---- by name, and from a file ----

ARCHITECTURES = {"paraformer": Paraformer, "streaming": StreamingParaformer, "seaco": SeacoParaformer,
                 "contextual": ContextualParaformer, "transformer": Transformer, "ctc": CTC}


def architecture(name: str) -> type[nn.Module]:
    """One of ARCHITECTURES, or of file.Class a class of file.py in the working directory. Raises ValueError."""
    stem, dot, kind = name.rpartition(".")
    if not dot:
        return pick(ARCHITECTURES, "model.name", name)
    if not os.path.isfile(f"{stem}.py"):
        raise ValueError(f"model.name: wanted {stem}.py in the working directory for {name}, got none in {os.getcwd()}")
    found = runpy.run_path(f"{stem}.py").get(kind)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"model.name: wanted a torch.nn.Module of the name {kind} in {stem}.py, got {found!r}")
    return found


def build(options, input_dim: int, vocab_size: int) -> nn.Module:
    """The model that options.name asks for, with fresh weights. Raises ValueError if there is none of that name."""
    model = architecture(options.name)(options, input_dim, vocab_size)
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = options.norm_eps
    return model


def read_tokenizer(state: dict, where: str) -> Tokenizer | PieceTokenizer:
    """The tokenizer whose state() this is. Raises ValueError that begins with where if it is none."""
    is_piece = isinstance(state, dict) and state.get("unit") == PieceTokenizer.unit
    return (PieceTokenizer if is_piece else Tokenizer).from_state(state, where)


def pick_device(name: str, field: str = "device") -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a GPU that is not there."""
    if name not in ("auto", "cpu", "cuda") or name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{field}: wanted auto, cpu or, where torch finds a GPU, cuda; got {name}; "
                         f"torch finds {'a' if torch.cuda.is_available() else 'no'} GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


CHECKPOINT_FORMAT = 2  # goes up when train.py writes what older code cannot read
CHECKPOINT_KEYS = ("config", "tokenizer", "stats", "model")
RETIRED = ("model.padding_leaks", "model.predictor.firing", "training.compile", "training.checkpoint_minutes",
           "training.keep_epochs")  # fields that only configs of older checkpoints hold


def without_retired(values: dict, section: str = "") -> dict:
    """A config's nested dict without the RETIRED fields; what is no dict stays, for from_dict to refuse."""
    if not isinstance(values, dict):
        return values
    return {name: without_retired(value, f"{section}{name}.") for name, value in values.items()
            if f"{section}{name}" not in RETIRED}


def read_checkpoint(path: str | os.PathLike, mapped: bool = False) -> dict:
    """The state that train.py saved, its config without RETIRED fields; of a directory, its checkpoint.pt."""
    check_name(str(path))
    check_pointer(Path(path))
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    state = read_file(path, "a checkpoint, which python train.py CONFIG makes, or a directory of FunASR's", mapped)
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(state, dict) or key not in state]
    if missing and (Path(path).parent / "config.yaml").exists():
        raise ValueError(f"{path}: wanted a checkpoint of train.py or a directory of FunASR's, got its weights alone: "
                         f"pass the folder, {Path(path).parent}")
    if missing:
        raise ValueError(f"{path}: wanted a checkpoint of train.py, got a file without {', '.join(missing)}")
    check_state(state, str(path))
    if state.get("format", 1) > CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: wanted a checkpoint of format {CHECKPOINT_FORMAT} or less, got {state['format']}: "
                         "it is from a newer version of this project; update")
    return {**state, "config": without_retired(state["config"])}


def is_dense(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta


def check_state(state: dict, place: str) -> None:
    """Raises ValueError for a field of a checkpoint that is not of its kind."""
    def require(is_right: bool, field: str, wanted: str, got: object) -> None:
        if is_right:
            return
        shown = " ".join(f"{got!r:.60}".split())
        if isinstance(got, Tensor):
            shown = f"a {got.layout} tensor of shape {tuple(got.shape)}"
        raise ValueError(f"{place}: {field}: wanted {wanted}, got {shown}")

    stats = state["stats"]
    require(type(state.get("format", 1)) is int, "format", "a whole number", state.get("format"))
    require(is_dense(stats) and stats.dim() == 2 and len(stats) == 2 and stats.is_floating_point(),
            "stats", "a tensor (2,F) of floats", stats)
    for part in ("model", "trained") if "trained" in state else ("model",):
        require(isinstance(state[part], dict), part, "tensors by name", state[part])
        for name, x in state[part].items():
            require(is_dense(x), part, f"a dense tensor under {name!r:.60}", x)
    if "trained" in state:
        progress = state.get("progress")
        require(isinstance(progress, dict) and "epoch" in progress and "batch" in progress,
                "progress", "what to resume from", progress)
        require(isinstance(state.get("history"), (list, tuple)), "history", "a row an epoch", state.get("history"))


SIZES = ("hidden_dim", "ffn_dim", "num_layers", "num_heads", "kernel_size")


def check_sizes(config: configs.Config, weights: dict[str, Tensor], place: str) -> None:
    """Raises ValueError for a size of the model, above 10,000, that none of its weights has: before it is built."""
    largest = max([10_000, len(weights), *(max(x.shape, default=0) for x in weights.values())])
    for path, value in configs.differing(configs.Config(), config).items():
        if path.startswith("model.") and path.rpartition(".")[2] in SIZES and value > largest:
            raise ValueError(f"{place}: {path}: wanted a size that its weights have, at most {largest}, got {value}")


def check_finite(model: nn.Module, place: str) -> None:
    """Raises ValueError with the name of a tensor that has NaN or infinite values."""
    for name, x in model.state_dict().items():
        if x.is_meta or not x.is_floating_point():
            continue
        if not x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite():
            raise ValueError(f"{place}: wanted finite weights, got NaN or infinity in {name}")


# ---- the checkpoints of a run ----

def save_run(folder: Path, state: dict, is_best: bool) -> None:
    """Write checkpoints/latest.pt of a run; the one before becomes previous.pt.
    The best is written as best.pt first: a run killed in between repeats the epoch. If writing fails, both stay."""
    folder = folder / "checkpoints"
    if is_best:
        save_atomic(folder / "best.pt", state)
    save_atomic(folder / "next.pt", state)
    if (folder / "latest.pt").exists():
        os.replace(folder / "latest.pt", folder / "previous.pt")
    os.replace(folder / "next.pt", folder / "latest.pt")


FIXED = ("model.", "data.kind", "data.unit", "data.sample_rate", "data.num_mels", "data.lfr_", "data.toy.",
         "training.seed", "training.overfit", "training.init_from")  # what a run began with: it stays so
FIXED_IN_EPOCH = ("training.batch_", "data.train", "data.augment.speeds")  # they decide what the next batches hold


def changed_config(config: configs.Config, folder: Path, overrides: Sequence[str], within_epoch: bool,
                   place: Path) -> configs.Config:
    """The config that a run goes on with: config.yaml of its folder, with overrides. config: that of its checkpoint, at
    place. Raises ValueError with the name of an option that cannot change."""
    written = folder / "config.yaml"
    changed = config
    if written.exists():
        changed = configs.from_dict(without_retired(configs.read_yaml(written, "the config of a run")), str(written))
    if any(path.startswith(FIXED) for path in configs.differing(config, changed)):
        raise ValueError(f"{place}: wanted a checkpoint of this run, got one with another config than config.yaml; put "
                         f"the file back, or start a new run with these weights: --training.init_from={place}")
    changed = configs.overridden(changed, overrides)
    for path in configs.differing(config, changed):
        if path.startswith(FIXED):
            raise ValueError(f"{path}: cannot change in a run that has begun; start a new one from its weights: "
                             f"--training.init_from={place}")
        if within_epoch and path.startswith(FIXED_IN_EPOCH):
            raise ValueError(f"{path}: cannot change within an epoch; go on without it until one is done")
    check(changed, " ".join([str(folder), *overrides]))
    return changed


def last_checkpoint(folder: Path, overrides: Sequence[str] = ()) -> tuple[Path, dict, configs.Config]:
    """latest.pt of a run, or, with a warning, previous.pt if that cannot be read -> path, state, `changed_config`.
    Raises ValueError if neither can be read, or if it is of an older format, has weights only, or is another run's."""
    path, previous = folder / "checkpoints/latest.pt", folder / "checkpoints/previous.pt"
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        if not previous.exists():
            raise
        path, state = previous, read_checkpoint(previous)
        print(f"train.py: {error}; going on from {previous}", file=sys.stderr)
    if state.get("format", 1) != CHECKPOINT_FORMAT or "trained" not in state:
        got = f"format {state.get('format', 1)}" + ("" if "trained" in state else ", weights only")
        raise ValueError(f"{path}: wanted a checkpoint to resume, format {CHECKPOINT_FORMAT}, got {got}; start a new "
                         f"run with its weights: --training.init_from={path}")
    config = configs.from_dict(state["config"], str(path))
    config = changed_config(config, folder, overrides, state["progress"]["batch"] > 0, path)
    done = state["progress"]["epoch"]
    if config.training.num_epochs < done:
        raise ValueError(f"training.num_epochs: wanted {done}, which are done, or more, got "
                         f"{config.training.num_epochs}")
    return path, {**state, "config": asdict(config)}, config


# ---- a checkpoint, ready to recognise ----

SEGMENT_SEC = 1.0, 20.0  # shortest and longest segment that a long recording is cut into


class System(NamedTuple):
    config: configs.Config
    tokenizer: Tokenizer | PieceTokenizer
    stats: Tensor  # (2,F) mean and reciprocal deviation that the features are normalised with
    model: nn.Module  # in eval mode
    precision: str = "float32"  # of the matrix products, a key of PRECISIONS
    search: Search = Search()
    segment_sec: tuple[float, float] = SEGMENT_SEC
    batch_size: int = 16  # utterances, or segments of a long recording, in a batch at most
    batch_seconds: float = 300.0  # of audio in a batch at most, padding included; a longer utterance goes alone
    encode_list: Callable[[tuple[str, ...]], Tensor] | None = None  # hotwords.list_encoder; None: the model takes none
    hotwords: tuple[str, ...] | None = None  # phrases to listen for in every utterance; None: no list
    vad: Vad | None = None  # what cuts recordings, in place of their pauses
    punctuation: Punctuation | None = None  # what makes sentences of a text
    chunk: Chunk | None = None  # how a streaming model hears, which hears no utterance at once; None: another model


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


def load_directory(folder: str | os.PathLike, run: configs.Config | None = None) -> System:
    """The system in a directory as FunASR publishes it. Raises ValueError for what is missing or not implemented."""
    files = published_files(folder)
    config = run or read_published_config(files["config"])
    tokenizer = PieceTokenizer.load(files["tokens"], files.get("seg_dict"))
    stats = read_cmvn(files["stats"], feature_dim(config.data))
    model = load_model(lambda: build(config.model, stats.shape[1], len(tokenizer)), files["model"],
                       lambda name: funasr_names(name, config.model))
    return System(config, tokenizer, stats, model)


def load_state(state: dict, where: str, run: configs.Config | None = None, adopt: bool = False) -> System:
    """The system in the state of a checkpoint; in int8, its large linears are Int8Weights. adopt: the model takes the
    state's tensors themselves and draws no weights. Raises ValueError if the weights do not fit the config."""
    config = run or configs.from_dict(state["config"], f"{where}: config")
    tokenizer = read_tokenizer(state["tokenizer"], f"{where}: tokenizer")
    check_sizes(config, state["model"], where)
    hollow = adopt and config.model.name in ARCHITECTURES  # a class of the user's may fill what no file holds
    with WithoutInit() if hollow else contextlib.nullcontext():
        model = build(config.model, state["stats"].shape[1], len(tokenizer))
    precision = "float32"
    if any(x.dtype == torch.int8 for x in state["model"].values()):
        precision = "int8"
        if any(name.endswith(".sums") for name in state["model"]):
            raise ValueError(f"{where}: wanted int8 weights as this version writes them, got an older one's: export "
                             "the model again")
        lay_out(model, Int8Weights)
    load_weights(model, state["model"], where, adopt=adopt)
    return System(config, tokenizer, state["stats"].clone(), model, precision)


def load_parts(path: str | os.PathLike, run: configs.Config | None = None) -> System:
    """The system in a FunASR directory or a checkpoint, weights memory-mapped; run: a config in place of its own."""
    if is_published(path):
        return load_directory(path, run)
    return load_state(read_checkpoint(path, mapped=True), str(path), run, adopt=True)


def runs_on(precision: str, device: torch.device) -> bool:
    """Whether the processor has instructions for matrix products in this precision; emulated ones are slow."""
    on_cpu = device.type == "cpu"
    if precision == "int8":
        return on_cpu and torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()
    if precision == "bfloat16" and on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bfloat16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "float16" and on_cpu:
        return torch.cpu._is_amx_fp16_supported()
    return True


def repack(model: nn.Module, linear: Callable[[nn.Module], nn.Module]) -> int:
    """`lay_out`, after which no other weight is in the file either -> how many were laid out."""
    count = lay_out(model, linear)
    if count and type(model) is Paraformer:  # the others may read hotwords through it
        model.embedding.to("meta")  # only the sampler reads it, in training: 17 MB of a large model
    for x in itertools.chain(model.parameters(), model.buffers()):
        x.data = x.data.clone()
    trim()
    return count


def lay_out_products(system: System) -> None:
    """On a CPU in float32, put large weights, in place, into the order that its products want: a second for 1 GB."""
    if system.precision == "float32" and system.stats.device.type == "cpu" and torch.backends.mkldnn.is_available():
        repack(system.model, PackedLinear)


def load_system(path: str | os.PathLike, device: str = "auto", precision: str = "float32",
                laid_out: bool = False) -> System:
    """The system of a checkpoint of train.py or of a FunASR directory. Raises ValueError: file and what is wrong.
    If the processor lacks the precision, or no matrix is LARGE enough for int8, it is float32, with a warning.
    laid_out: see `lay_out_products`; weights in int8 are. Else they are memory-mapped, which starts sooner."""
    target = pick_device(device)
    if not runs_on(precision, target):
        print(f"warning: this {target.type} has no {precision} products; going on in float32", file=sys.stderr)
        precision = "float32"
    system = load_parts(path)
    if system.precision == "int8" and precision != "int8":
        raise ValueError(f"{path}: wanted --dtype int8, as its weights are in int8, got {precision}")
    if precision != "int8":
        check_finite(system.model, str(path))
    model = system.model.to(target).eval()
    if precision == "int8":
        count = repack(model, Int8Linear)
        check_finite(model, str(path))
        if not count:
            print("warning: no matrix of this model is large enough for int8 to pay; going on in float32",
                  file=sys.stderr)
            precision = "float32"
    encode_list = None
    if isinstance(model, HotwordParaformer):
        encode_list = list_encoder(model, system.tokenizer.encode_hotword)
    chunk = Chunk(**asdict(system.config.model.chunk)) if system.config.model.name == "streaming" else None
    system = system._replace(stats=system.stats.to(target), model=model, precision=precision, encode_list=encode_list,
                             chunk=chunk)
    if laid_out:
        lay_out_products(system)
    return system


def check_not_streaming(config: configs.Config, place: str) -> None:
    """Raises ValueError that says what to use instead where only whole utterances are heard."""
    if config.model.name == "streaming":
        raise ValueError(f"{place}: wanted a model that hears whole utterances, such as paraformer-zh, got a streaming "
                         "one (model.name streaming), which runs in decode.py --ckpt DIR [--stream] and "
                         "serve.py --checkpoint DIR")


# ---- what training starts from ----

STATS_UTTERANCES = 500  # the normalisation is measured on so many utterances at most, spread over the training set


def check_vocabulary(texts: Iterable[str], tokenizer: Tokenizer | PieceTokenizer, place: str) -> None:
    """Raises ValueError if most of the texts' symbols are unknown to the vocabulary of the model to start from."""
    unknown = Counter()
    count = 0
    for text in texts:
        count += len(tokenizer.encode(text))
        unknown.update(tokenizer.unknown_units(text))
    if 2 * unknown.total() > count:
        raise ValueError(f"training.init_from={place}: wanted a vocabulary for the training texts, got one without "
                         f"{unknown.total()} of their {count} symbols, the most frequent "
                         f"{' '.join(repr(unit) for unit, _ in unknown.most_common(5))}")


def fresh(config: configs.Config) -> System:
    """A tokenizer and statistics of the training data, and a model with random weights. Raises ValueError for a model
    with a part that training leaves as it is."""
    if config.model.name in HOTWORD_MODELS:
        raise ValueError(f"model.name: a {config.model.name} starts from a published one, as training does not teach "
                         "it to read hotwords: training.init_from=DIR")
    check_trainable(config.model, "model")
    tokenizer = Tokenizer.build(data.training_texts(config.data), config.data.unit)
    plain = data.open_dataset(config.data, "train", tokenizer.encode, config.training.seed, None,
                              config.model.encoder.subsampling)
    items = (plain[i] for i in range(0, len(plain), math.ceil(len(plain) / STATS_UTTERANCES)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first epoch says them
        data.check_usable(plain, "data.train")
        stats = compute_stats(item.feats for item in items if isinstance(item, data.Utterance))
    return System(config, tokenizer, stats, build(config.model, stats.shape[1], len(tokenizer)))


def adopted(config: configs.Config, overrides: Sequence[str] = ()) -> configs.Config:
    """config with the model section and the front end of training.init_from, if it names one, and then with overrides
    of the model, such as another dropout. Raises ValueError if they ask for another front end or do not fit."""
    place = config.training.init_from
    if not place:
        return config
    if is_published(place):
        other = read_published_config(published_files(place)["config"])
        unit = config.data.unit     # FunASR's configs name none
    else:
        other = configs.from_dict(read_checkpoint(place, mapped=True)["config"], f"{place}: config")
        unit = other.data.unit
    front = {name: getattr(other.data, name) for name in ("sample_rate", "num_mels", "lfr_m", "lfr_n")}
    mwer = {name: getattr(config.model, name) for name in ("mwer_weight", "mwer_samples")}  # a loss, and no weights
    theirs = replace(config, model=replace(other.model, **mwer), data=replace(config.data, unit=unit, **front))
    changed = configs.overridden(theirs, overrides)
    for path, got in configs.differing(theirs, changed).items():
        if path.startswith("data."):
            raise ValueError(f"{path}: wanted {dict(configs.walk(theirs))[path]}, as the model of training.init_from="
                             f"{place} hears, got {got}")
    check_trainable(changed.model, f"training.init_from={place}")
    check(changed, f"training.init_from={place}")
    origin = str(Path(place).resolve())     # runs/latest is about to become another run
    return replace(changed, training=replace(changed.training, init_from=origin))


def start_from(config: configs.Config) -> System:
    """What a new run starts from: fresh weights, or those of training.init_from, a FunASR directory or a checkpoint,
    for a config that `adopted` its model. Raises ValueError if they do not fit the data."""
    place = config.training.init_from
    if not place:
        return fresh(config)
    system = load_parts(place, config)
    if system.precision == "int8":
        raise ValueError(f"training.init_from={place}: wanted weights in float32, got int8, which cannot learn")
    texts = itertools.islice(data.training_texts(system.config.data), STATS_UTTERANCES)
    check_vocabulary(texts, system.tokenizer, place)
    return system


# ---- exports ----

def check_new(place: Path) -> None:
    """Raises ValueError if an export to this file or folder would replace a file, or mix a folder's model with it."""
    names = ("checkpoint.pt", "configuration.json", "config.yaml", "model.pt", "tokens.json", "seg_dict", "am.mvn")
    for file in (place, *(place / name for name in names)):
        if file.is_file():
            raise ValueError(f"--export: wanted a path where no model is, got {place}, where {file} is")


def export_directory(system: System, folder: Path) -> None:
    """Write a directory that FunASR loads. Raises ValueError for a model that it has no classes for."""
    weights = {}
    for name, x in system.model.state_dict().items():
        theirs = funasr_names(name, system.config.model)
        parts = [x] if len(theirs) == 1 else x.chunk(len(theirs))
        for their_name, part in zip(theirs, parts):
            weights[their_name] = part.clone()
    config, tokenizer = dump_published_config(system.config), system.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    special = dict(zip(SPECIALS, ("<blank>", "<s>", "</s>", "<unk>")))
    symbols = [special.get(symbol, symbol) for symbol in tokenizer.symbols]
    pieces = None  # word -> its symbols
    if isinstance(tokenizer, PieceTokenizer):
        pieces = tokenizer.pieces
    elif tokenizer.unit == "word":
        pieces = {symbol: (symbol,) for symbol in symbols[len(SPECIALS):]}
    with contextlib.ExitStack() as stack:  # all is written before anything has its name: no part on a full disk
        def new(name: str) -> Path:
            return stack.enter_context(replacing(folder / name))

        new("config.yaml").write_text(config, "utf-8")
        new("tokens.json").write_text(json.dumps(symbols, ensure_ascii=False, indent=0) + "\n", "utf-8")
        write_cmvn(new("am.mvn"), system.stats.cpu())
        if pieces is not None:
            lines = [" ".join([word, *parts]) for word, parts in pieces.items()]
            new("seg_dict").write_text("\n".join(lines) + "\n", "utf-8")
        save(new("model.pt"), weights)


def export_int8(source: str, path: str) -> str:
    """Write the checkpoint or directory at source with its large weights in int8, as FILE.pt or as checkpoint.pt of a
    folder -> what was written, in words. Raises ValueError if they are in int8 already, or none is large or finite, or
    one is there already."""
    check_new(Path(path))
    system = load_parts(source)
    if system.precision == "int8":
        raise ValueError(f"--export: wanted weights in float32 to make int8 of, got {source}, which is in int8")
    if not lay_out(system.model, quantise):
        raise ValueError(f"--export: no matrix of {source} is large enough for int8 to pay; leave out --dtype")
    check_finite(system.model, source)
    place = Path(path) if Path(path).suffix == ".pt" else Path(path) / "checkpoint.pt"
    return write_checkpoint(system, place) + " in int8"


def write_checkpoint(system: System, place: Path) -> str:
    """Write a checkpoint of ours, without optimizer state -> what was written, in words."""
    place.parent.mkdir(parents=True, exist_ok=True)
    state = {"config": asdict(system.config), "tokenizer": system.tokenizer.state(),
             "stats": system.stats.cpu(), "model": system.model.state_dict()}
    save_atomic(place, state)
    return f"{place}: a checkpoint"


def export(system: System, path: str) -> str:
    """Write the model without optimizer state -> what was written, in words.
    Where path ends in .pt, a checkpoint of ours; else a directory: FunASR's where it has classes for the model, one
    with checkpoint.pt of ours where not. Raises ValueError if a model is there."""
    place = Path(path)
    check_new(place)
    reason = ""
    if place.suffix != ".pt":
        try:
            export_directory(system, place)
            return f"{place}: a FunASR directory"
        except ValueError as error:
            place = place / "checkpoint.pt"
            reason = f"; no FunASR directory: {error}"
    return write_checkpoint(system, place) + reason
