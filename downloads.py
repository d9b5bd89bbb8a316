"""Models that FunASR publishes: which of them run here, how to download one, and what a path holds that is none.

Nothing is fetched here: the errors say the command. Needs the standard library only: copy it alone.
Source: the names in FunASR 1.4's model list; sizes are those of the classes at the templates' dimensions.
"""
import re
from pathlib import Path
from typing import NamedTuple


class Download(NamedTuple):
    name: str  # FunASR's short name; "": it has none
    modelscope: str  # there by organisation and name
    huggingface: str  # likewise; "": not there
    megabytes: int  # of model.pt


MODELSCOPE = "iic/speech_"
DOWNLOADS = (
    Download("paraformer-zh", MODELSCOPE + "seaco_paraformer_large_asr_nat-zh-cn-16k-common-vocab8404-pytorch",
             "funasr/paraformer-zh", 989),
    Download("paraformer", MODELSCOPE + "paraformer-large_asr_nat-zh-cn-16k-common-vocab8404-pytorch", "", 881),
    Download("", MODELSCOPE + "paraformer-large-vad-punc_asr_nat-zh-cn-16k-common-vocab8404-pytorch", "", 900),
    Download("", MODELSCOPE + "paraformer-large-contextual_asr_nat-zh-cn-16k-common-vocab8404", "", 912),
    Download("paraformer-en", MODELSCOPE + "paraformer-large-vad-punc_asr_nat-en-16k-common-vocab10020",
             "funasr/paraformer-en", 887),
    Download("paraformer-zh-streaming", MODELSCOPE + "paraformer-large_asr_nat-zh-cn-16k-common-vocab8404-online",
             "funasr/paraformer-zh-streaming", 880),
)
TAKE = DOWNLOADS[0]  # where another cannot be used
PARTS = {  # option of decode.py and serve.py -> the model that it takes
    "--vad": Download("fsmn-vad", MODELSCOPE + "fsmn_vad_zh-cn-16k-common-pytorch", "funasr/fsmn-vad", 2),
    "--punctuate": Download("ct-punc", "iic/punc_ct-transformer_cn-en-common-vocab471067-large", "funasr/ct-punc",
                            1050),
}


class Other(NamedTuple):
    name: str  # FunASR's short name of a model that does not run here
    kind: str  # its class, as the `model` of its config.yaml
    what: str


OTHERS = (
    Other("SenseVoiceSmall", "SenseVoiceSmall", "recognises five languages with an encoder alone"),
    Other("fsmn-vad", "FsmnVADStreaming", "finds where somebody speaks and goes with --vad"),
    Other("ct-punc", "CTTransformer", "puts marks into text and goes with --punctuate"),
    Other("ct-punc-realtime", "CTTransformerStreaming", "puts marks into text and goes with --punctuate"),
    Other("fa-zh", "MonotonicAligner", "finds the times of a text that is known"),
    Other("cam++", "CAMPPlus", "tells speakers apart and writes no text"),
)


def commands(model: Download, folder: str) -> str:
    """What downloads a model into a folder: a command, or two to choose from."""
    found = f"modelscope download --model {model.modelscope} --local_dir {folder}"
    if model.huggingface:
        found += f"  or  hf download {model.huggingface} --local-dir {folder}"
    return found


def advice() -> str:
    """Which model to take, and the command for it."""
    return f"take {TAKE.name}: {commands(TAKE, TAKE.name)}"


def check_name(path: str) -> None:
    """Raises ValueError that says what to do if there is no such path and it is FunASR's name of a model."""
    given = path.rstrip("/").lower()
    if not given or Path(path).exists():
        return
    for model in DOWNLOADS:
        names = (model.name, model.huggingface, model.modelscope, model.modelscope.replace("iic/", "damo/", 1))
        if given in names or given == Path(model.modelscope).name:
            folder = model.name or "paraformer"
            raise ValueError(f"{path}: wanted a path, got FunASR's name of a model ({model.megabytes} MB); download it "
                             f"with {commands(model, folder)}, and pass {folder}")
    for other in OTHERS:
        if Path(given).name == other.name.lower():
            raise ValueError(f"{path}: {refusal(other)}")


def check_part(path: str, option: str) -> None:
    """Raises ValueError that says how to download what this option of PARTS takes if path is no directory."""
    if not Path(path).is_dir():
        model = PARTS[option]
        raise ValueError(f"{option} {path}: wanted a directory as FunASR publishes {model.name} ({model.megabytes} "
                         f"MB); download it with {commands(model, model.name)}, and pass {model.name}")


def check_kind(kind: str, place: str) -> None:
    """Raises ValueError that begins with place if this class of FunASR's is one of OTHERS."""
    for other in OTHERS:
        if kind == other.kind:
            raise ValueError(f"{place}: model {kind}: {refusal(other)}")


def refusal(other: Other) -> str:
    return f"wanted a recogniser that runs here, got FunASR's {other.name}, which {other.what}; {advice()}"


def check_pointer(path: Path) -> None:
    """Raises ValueError if the file is a Git-LFS pointer in the place of what it points to."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        count = f" of {int(size[1]):,} bytes" if size else ""
        raise ValueError(f"{path}: a pointer, not the weights{count}: git lfs pull in {path.parent}")


def check_files(folder: Path, files: dict[str, Path]) -> None:
    """Raises ValueError that says what to do if a directory of FunASR's, with these files, is not all there."""
    for path in files.values():
        check_pointer(path)
    if files["model"].exists():
        return
    exported = sorted(path.name for path in folder.glob("*.onnx"))
    unfinished = [path for path in folder.rglob("*") if path.suffix == ".incomplete" or path.name == "._____temp"]
    if unfinished:
        raise ValueError(f"{folder}: wanted {files['model'].name}, got a download that has not finished "
                         f"({unfinished[0].relative_to(folder)}): run its command again")
    if exported:
        raise ValueError(f"{folder}: wanted {files['model'].name}, got an ONNX export ({', '.join(exported)}), which "
                         f"onnxruntime runs and PyTorch does not; {advice()}")
