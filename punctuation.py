"""Punctuation: marks behind the words of a text, by the CT-Transformers that FunASR publishes (ct-punc).

    python punctuation.py PUNC_DIR < texts      every line punctuated; of a realtime model, each goes on from the last

Reading order: text to tokens, the network, marks, marks into text, words of a recogniser, realtime, loading.
Dims: T tokens, D width, P kinds of marks, V vocabulary.
Source: Chen et al. 2020 "Controllable time-delay transformer"; FunASR 1.4, whose texts these are.
"""
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from commandline import Parser, spin_briefly

if __name__ == "__main__":
    spin_briefly()  # before torch is loaded

import torch
from torch import Tensor, nn

from attention import causal_mask
from config import EncoderConfig, from_dict
from downloads import check_part
from funasr import RENAMES, load_model, published_files, read_section, read_values, rename, translate
from funasr_layers import SanmEncoder
from tokenizer import parse_file


# ---- tokens ----

def is_ascii(token: str) -> bool:
    return token[0] < "\x80"


def split_tokens(text: str) -> list[str]:
    """Runs of ASCII characters without a space, and single other characters: "你,b é" -> 你 | ,b | é."""
    ascii_run = r"[^\x80-\U0010ffff\s]+"
    other = r"[^\x00-\x7f\s]"
    return re.findall(f"{ascii_run}|{other}", text)


# ---- network ----

@dataclass(frozen=True)
class Options:
    """model_conf, by FunASR's names."""
    embed_unit: int = 128
    att_unit: int = 256                             # as embed_unit: D
    punc_list: tuple[str, ...] = ()                 # "_" is no mark
    sentence_end_id: int = 3                        # of punc_list: the mark that ends a sentence where one has to end


IGNORED = "ignore_id punc_weight dropout_rate".split()     # options that change nothing at inference


class PunctuationModel(nn.Module):
    """Ids to the scores of marks, with a SAN-M encoder that sees all tokens."""

    def __init__(self, vocab_size: int, num_marks: int, options: EncoderConfig):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, options.hidden_dim)
        self.encoder = SanmEncoder(options.hidden_dim, options)
        self.output = nn.Linear(options.hidden_dim, num_marks)
        for norm in (module for module in self.modules() if isinstance(module, nn.LayerNorm)):
            norm.eps = 1e-12

    def encode(self, ids: Tensor, num_carried: int) -> Tensor:
        """ids (T,), the first num_carried of which an earlier call has seen -> (T,D)."""
        lens = torch.tensor([len(ids)])
        return self.encoder(self.embedding(ids)[None], lens)[0][0]

    def forward(self, ids: Tensor, num_carried: int = 0) -> Tensor:
        """As `encode` -> (T,P) scores of the mark behind each token."""
        return self.output(self.encode(ids, num_carried))


class RealtimeModel(PunctuationModel):
    """The same, but no token sees a later one, except in the last block."""

    def encode(self, ids: Tensor, num_carried: int) -> Tensor:
        encoder = self.encoder
        T = len(ids)
        x = encoder.place(self.embedding(ids)[None], 0)  # (1,T,D)
        past = causal_mask(T)
        seen = torch.ones(T, T, dtype=torch.bool)
        if 0 < num_carried < T:
            seen[:num_carried - 1, num_carried:] = False  # what is decided already is not decided again
        blocks = [encoder.first, *encoder.blocks]
        for block in blocks[:-1]:
            x, _ = block(x, None, seen=past[None])
        x, _ = blocks[-1](x, None, seen=seen[None])
        return encoder.norm(x)[0]


# ---- marks ----

class Punctuation(NamedTuple):
    model: PunctuationModel
    ids: dict[str, int]             # of the vocabulary's tokens
    marks: tuple[str, ...]          # punc_list
    end: int                        # sentence_end_id


NO_MARK = "_"
SPLIT_SIZE = 20                     # tokens that are read at a time
LONGEST = 200                       # tokens without a stop, behind which a sentence ends at a comma
MOST = 1000                         # without a comma either, behind which reading begins anew; FunASR reads on and on
STOPS = "。？"                      # where FunASR ends what it reads; a list of marks with "?" has no question then
SENTENCE_ENDS = ("。", "？", ".", "?", "！", "!")
Group = tuple[list[str], list[int]]  # tokens and the mark behind each, an index into punc_list


@torch.inference_mode()
def choose_marks(punctuation: Punctuation, tokens: Sequence[str], num_carried: int = 0) -> list[int]:
    unknown = punctuation.ids["<unk>"]
    ids = torch.tensor([punctuation.ids.get(token, unknown) for token in tokens])
    return punctuation.model(ids, num_carried).argmax(-1).tolist()


def last_mark(punctuation: Punctuation, marks: Sequence[int], kinds: str) -> int:
    """The last place of one of these marks that is not among the first two or the last; -1: there is none."""
    found = [i for i in range(2, len(marks) - 1) if punctuation.marks[marks[i]] in kinds]
    return found[-1] if found else -1


def mark_tokens(punctuation: Punctuation, tokens: Sequence[str], split_size: int = SPLIT_SIZE,
                num_carried: int = 0) -> list[Group]:
    """All tokens in groups that end with a sentence. Each piece is read with what followed the last stop before it."""
    groups: list[Group] = []
    rest: list[str] = []
    for first in range(0, len(tokens), split_size):
        read = rest + list(tokens[first:first + split_size])
        marks = choose_marks(punctuation, read, num_carried)
        end = last_mark(punctuation, marks, STOPS)
        if end < 0 and len(read) > LONGEST:
            end = last_mark(punctuation, marks, "，")
            if end >= 0 and first + split_size < len(tokens):
                marks[end] = punctuation.end
        if first + split_size >= len(tokens) or end < 0 and len(read) > MOST:
            end = len(read) - 1
        groups.append((read[:end + 1], marks[:end + 1]))
        rest = read[end + 1:]
    return groups


# ---- marks into text ----

HALF_WIDTH = {"，": ",", "。": ".", "？": "?"}      # behind ASCII


def write_group(punctuation: Punctuation, tokens: Sequence[str], marks: Sequence[int]) -> list[str]:
    """Each token with its mark behind it, a capital where a sentence begins, and a space in front between ASCII."""
    written = []
    for i, (token, mark) in enumerate(zip(tokens, marks, strict=True)):
        sign = punctuation.marks[mark]
        text = token
        if is_ascii(token):
            if i == 0 or punctuation.marks[marks[i - 1]] in STOPS:
                text = token.capitalize()
            if i == 0 or is_ascii(tokens[i - 1]):
                text = " " + text
            sign = HALF_WIDTH.get(sign, sign)
        written.append(text if sign == NO_MARK else text + sign)
    return written


def write_end(text: str) -> str:
    """The last token as a text ends with it: with a stop."""
    if text[-1] in "。？.?":
        return text
    stop = "." if text[-1].isascii() else "。"
    return text[:-1] + stop if text[-1] in "，、," else text + stop


def write_tokens(punctuation: Punctuation, groups: Sequence[Group]) -> tuple[list[str], list[int]]:
    """What each token of a text becomes, and its mark."""
    written: list[str] = []
    marks: list[int] = []
    for group in groups:
        written += write_group(punctuation, *group)
        marks += group[1]
    ended = write_end(written[-1])
    if ended != written[-1]:
        written[-1] = ended
        marks[-1] = punctuation.end
    return written, marks


def punctuate(punctuation: Punctuation, text: str, split_size: int = SPLIT_SIZE) -> tuple[str, list[int] | None]:
    """A text -> the text with marks, and the mark behind every token; ("", None) for a blank one. Equal to FunASR's
    without jieba: a text that begins in English begins with a space."""
    tokens = split_tokens(text)
    if not tokens:
        return "", None
    written, marks = write_tokens(punctuation, mark_tokens(punctuation, tokens, split_size))
    return "".join(written), marks


# ---- the words of a recogniser ----

class Written(NamedTuple):
    """A word of a punctuated text."""

    text: str               # with its mark
    spaced: bool            # a space stands before it
    ends_sentence: bool     # it is the last word of one


def punctuate_words(punctuation: Punctuation, words: Sequence[str]) -> list[Written]:
    """The words of a text, none of them blank, as `punctuate` writes them. They stay side by side with their times,
    also where FunASR glues two of them into one and shifts all that follow."""
    sizes = [len(split_tokens(word)) for word in words]
    tokens = [token for word in words for token in split_tokens(word)]
    if not tokens:
        return []
    written, _ = write_tokens(punctuation, mark_tokens(punctuation, tokens))
    found = []
    first = 0
    for size in sizes:
        text = "".join(written[first:first + size])
        found.append(Written(text.lstrip(" "), text.startswith(" "), text.endswith(SENTENCE_ENDS)))
        first += size
    return found


# ---- realtime ----

def punctuate_more(punctuation: Punctuation, carried: Sequence[str], text: str) -> tuple[str, list[int], list[str]]:
    """More of a text -> what is new of it with marks, the marks of its last piece, what to carry into the next call.
    carried: tokens of the sentence that is not finished, [] at first. What is new may begin with the mark behind the
    last token of the call before, and the last mark is left to the next call. A blank text changes nothing."""
    if not text.strip():
        return "", [], list(carried)
    tokens = split_tokens("".join(carried) + " " + text)
    groups = mark_tokens(punctuation, tokens, num_carried=len(carried))
    marks = []
    for group in groups:
        marks += group[1]
    spaced = list(tokens)
    for i in range(1, len(tokens)):
        if is_ascii(tokens[i]) and is_ascii(tokens[i - 1]):
            spaced[i] = " " + tokens[i]
    said = ""
    for i, token in enumerate(spaced):
        if i >= len(carried):
            said += token
        sign = punctuation.marks[marks[i]]
        if i >= len(carried) - 1 and sign != NO_MARK:
            said += sign
    if said.endswith(punctuation.marks):
        said = said[:-1]
    return said, groups[-1][1], spaced[last_mark(punctuation, marks, STOPS) + 1:]


# ---- loading, and the command ----

def read_vocabulary(path: Path) -> dict[str, int]:
    symbols = parse_file(path, "a list of tokens in JSON", json.loads)
    if not isinstance(symbols, list) or "<unk>" not in symbols:
        raise ValueError(f"{path}: wanted a list of tokens with <unk> among them")
    return {symbol: i for i, symbol in enumerate(symbols)}


def load_punctuation(folder: str) -> Punctuation:
    """The model of a directory as FunASR publishes it, memory-mapped. Raises ValueError that names what is missing or
    not implemented. Words that the vocabulary expects jieba to cut are read character by character, with a warning."""
    check_part(folder, "--punctuate")
    files = published_files(folder)
    place = str(files["config"])
    values = read_values(place)
    classes = {"CTTransformer": ("SANMEncoder", PunctuationModel),
               "CTTransformerStreaming": ("SANMVadEncoder", RealtimeModel)}
    encoder, kind = classes.get(values.get("model"), ("", None))
    if values.get("encoder") != encoder:
        raise ValueError(f"{place}: wanted model {' or '.join(classes)} with encoder SANMEncoder or SANMVadEncoder, "
                         f"got {values.get('model')} with {values.get('encoder')}")
    options = read_section(values, "model", IGNORED, Options(), place)
    shape = from_dict(translate({**values, "encoder": "SANMEncoder"}, "encoder", place), place, EncoderConfig())
    if not options.embed_unit == options.att_unit == shape.hidden_dim:
        raise ValueError(f"{place}: wanted embed_unit, att_unit and output_size alike, got {options.embed_unit}, "
                         f"{options.att_unit} and {shape.hidden_dim}")
    if NO_MARK not in options.punc_list or not 0 <= options.sentence_end_id < len(options.punc_list):
        raise ValueError(f"{place}: wanted a punc_list with {NO_MARK} and sentence_end_id in it, got "
                         f"{list(options.punc_list)} and {options.sentence_end_id}")
    ids = read_vocabulary(files["tokens"])
    names = RENAMES["encoder sanm"] | {"embedding": "embed", "output": "decoder"}
    model = load_model(lambda: kind(len(ids), len(options.punc_list), shape), files["model"],
                       lambda name: [rename(name, names)])
    if (Path(folder) / "jieba_usr_dict").exists():
        print(f"warning: {folder}: its vocabulary holds words as jieba cuts them; here every character is read by "
              "itself, which it knows too, but marks may differ from FunASR's", file=sys.stderr)
    return Punctuation(model.eval(), ids, options.punc_list, options.sentence_end_id)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="punctuation.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="PUNC_DIR", help="a directory as FunASR publishes it")
    arguments = parser.parse_args(argv)
    try:
        punctuation = load_punctuation(arguments.folder)
    except (ValueError, OSError) as error:
        print(f"punctuation.py: {error}", file=sys.stderr)
        return 2
    carried: list[str] = []
    for line in sys.stdin:
        if isinstance(punctuation.model, RealtimeModel):
            text, _, carried = punctuate_more(punctuation, carried, line)
        else:
            text, _ = punctuate(punctuation, line)
        print(text.strip(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
