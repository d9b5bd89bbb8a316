"""Texts to token ids and back, and the edit distance between two texts.

Reading order: the one text normalisation, Tokenizer, alignment, error counts, a picture of an alignment. Vocabularies
that FunASR publishes are in pieces.py. Needs numpy; imports nothing of ours, so it can be copied alone.

Glossary: the unit of a vocabulary is what its ids stand for, char or word; a symbol is the text of one id;
ref is what was said, hyp is what was recognised.
"""
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLANK, SOS, EOS, UNK = 0, 1, 2, 3  # BLANK is the padding id as well
SPECIALS = ("<blank>", "<sos>", "<eos>", "<unk>")  # index = id


def spoken_places(ids: Sequence[int]) -> list[int]:
    """Indices of the ids that stand for text: all but BLANK, SOS and EOS."""
    return [u for u, id in enumerate(ids) if id not in (BLANK, SOS, EOS)]


def spoken_symbols(ids: Sequence[int], symbols: Sequence[str]) -> list[str]:
    """The symbols of the ids at spoken_places(ids). Raises ValueError if an id is outside the vocabulary."""
    outside = [int(id) for id in ids if not 0 <= id < len(symbols)]
    if outside:
        raise ValueError(f"token ids must be in 0..{len(symbols) - 1}, got {outside[0]}")
    return [symbols[ids[u]] for u in spoken_places(ids)]


class Token(NamedTuple):
    """One that was recognised."""

    token: str
    id: int
    confidence: float  # probability of this token, 0 to 1
    start: float  # seconds from the start of the recording
    end: float
    hotword: bool = False  # whether the decoder of hotwords put it there


# ---- text ----

# What is not seen: soft hyphens, zero-width spaces, word joiners, byte order marks, marks of direction. Joiners
# (U+200C, U+200D) stay: Persian and Indian scripts are spelled with them.
UNSEEN = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]+")
WHOLE = "\u0e33\u0eb3\u0edc\u0edd"  # Thai and Lao letters that NFKC takes apart and nothing joins again


def tidy(text: str) -> str:
    """The text as it is written, without what is UNSEEN, with single spaces for any white space, stripped."""
    return " ".join(UNSEEN.sub("", text).split())


def fold(text: str) -> str:
    """NFKC, lower case."""
    text = unicodedata.normalize("NFKC", text).lower()
    return unicodedata.normalize("NFKC", text)  # again: İ lowers to i + U+0307, perhaps out of canonical order


def normalise_text(text: str) -> str:
    """The one normalisation, before encoding and before scoring: tidy, NFKC but for WHOLE letters, lower case.
    Punctuation stays: whether a corpus speaks it is decided where its manifest is written.
    Lower case, not casefold, which misspells what is shown to a reader (ß -> ss, final ς -> σ).
    A lone surrogate becomes U+FFFD, so that every result can be written as UTF-8. Idempotent."""
    text = UNSEEN.sub("", re.sub("[\ud800-\udfff]", "\ufffd", text))
    return tidy(re.sub(f"[^{WHOLE}]+", lambda between: fold(between[0]), text))


def split_units(text: str, unit: str) -> list[str]:
    """The characters (spaces too) or the words of a normalised text."""
    return list(text) if unit == "char" else text.split()


# ---- tokenizer ----

def parse_file(path: str | os.PathLike, wanted: str, parse: Callable) -> object:
    """parse(text of a UTF-8 file). Raises ValueError that names the file and what was wanted."""
    try:
        return parse(Path(path).read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: wanted {wanted}, got no JSON ({error})") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        got = getattr(error, "strerror", None) or error  # the path stands before it
        raise ValueError(f"{path}: wanted {wanted}, got {got}") from None


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary: symbols[id] is what id stands for, the four SPECIALS first.
    decode(encode(text)) == normalise_text(text) for every text of known symbols. A word spelled like a special is
    never a symbol: typed in a text, "<eos>" is five characters, or the one word UNK.
    Raises ValueError if the unit or a symbol is one that encode can never produce."""

    unit: str  # "char" | "word"
    symbols: tuple[str, ...]

    def __post_init__(self):
        unit, symbols = self.unit, self.symbols
        if unit not in ("char", "word"):
            raise ValueError(f"tokenizer unit must be char or word, got {unit!r:.60}")
        if symbols[:len(SPECIALS)] != SPECIALS:
            raise ValueError(f"symbols must begin with {SPECIALS}, got {symbols[:len(SPECIALS)]!r:.60}")
        ids = {symbol: i for i, symbol in enumerate(SPECIALS)}
        for i, symbol in enumerate(symbols[len(SPECIALS):], len(SPECIALS)):
            is_space = unit == "char" and symbol == " "  # normalise_text would strip it
            is_unit = isinstance(symbol, str) and [symbol] in (
                split_units(normalise_text(symbol), unit), split_units(fold(symbol), unit))  # fold: older checkpoints
            if not (is_space or is_unit):
                raise ValueError(f"symbols[{i}] must be one normalised {unit}, got {symbol!r:.60}")
            if symbol in ids:
                raise ValueError(f"symbols[{i}] repeats symbols[{ids[symbol]}], {symbol!r:.60}")
            ids[symbol] = i

    @classmethod
    def build(cls, texts: Iterable[str], unit: str = "char") -> "Tokenizer":
        """The vocabulary of texts: their units, in code point order."""
        units: set[str] = set()
        for text in texts:
            units.update(split_units(normalise_text(text), unit))
        return cls(unit, SPECIALS + tuple(sorted(units.difference(SPECIALS))))

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols) if symbol not in SPECIALS}

    def _ids_of(self, unit: str) -> list[int]:
        if unit in self._ids:
            return [self._ids[unit]]
        parts = split_units(fold(unit), self.unit)  # of a vocabulary that was made when WHOLE letters were taken apart
        return [self._ids[part] for part in parts] if all(part in self._ids for part in parts) else [UNK]

    def encode(self, text: str) -> list[int]:
        """The ids of normalise_text(text), UNK where a unit is not known; no SOS or EOS is added."""
        ids = []
        for unit in split_units(normalise_text(text), self.unit):
            ids += self._ids_of(unit)
        return ids

    def unknown_units(self, text: str) -> list[str]:
        """The units of a text that encode gives UNK."""
        return [unit for unit in split_units(normalise_text(text), self.unit) if self._ids_of(unit) == [UNK]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids: BLANK, SOS and EOS left out wherever they stand, UNK written <unk>, words joined by spaces.
        Raises ValueError if an id is outside the vocabulary."""
        return ("" if self.unit == "char" else " ").join(spoken_symbols(ids, self.symbols))

    def state(self) -> dict:
        """{"unit": str, "symbols": list of str}: plain containers, for JSON and for torch.load(weights_only=True)."""
        return {"unit": self.unit, "symbols": list(self.symbols)}

    @classmethod
    def from_state(cls, state: dict, where: str = "tokenizer state") -> "Tokenizer":
        """The inverse of state(). Raises ValueError that begins with where if state is not one."""
        if not (isinstance(state, dict) and set(state) == {"unit", "symbols"} and isinstance(state["symbols"], list)):
            raise ValueError(f"{where}: wanted {{'unit': ..., 'symbols': [...]}}, got {state!r:.60}")
        try:
            return cls(state["unit"], tuple(state["symbols"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write state() as UTF-8 JSON; path holds the old file or the whole new one, never a part."""
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.state(), ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read what save wrote. Raises a one-line ValueError that names the file."""
        return cls.from_state(parse_file(path, "a tokenizer written by Tokenizer.save", json.loads), str(path))


# ---- alignment ----

def _edit_costs(ref: Sequence[Hashable], hyp: Sequence[Hashable], gap: int) -> Iterator[np.ndarray]:
    """Row i = 0, 1, ... of the edit-distance table: [j] is the least cost of turning ref[:i] into hyp[:j], where a
    deletion or an insertion costs gap and a substitution gap + 1."""
    codes: dict[Hashable, int] = {}  # equal items have equal codes, which numpy compares faster
    ref_codes = [codes.setdefault(item, len(codes)) for item in ref]
    hyp_codes = np.array([codes.setdefault(item, len(codes)) for item in hyp], np.int64)
    inserted = gap * np.arange(len(hyp) + 1)  # the cost of the first j items of hyp out of nothing
    row = inserted
    yield row
    for code in ref_codes:
        best = row + gap  # deletion
        paired = row[:-1] + np.where(hyp_codes == code, 0, gap + 1)  # hit or substitution
        best[1:] = np.minimum(best[1:], paired)
        row = np.minimum.accumulate(best - inserted) + inserted  # insertions: min over k <= j, best[k] + gap * (j - k)
        yield row


def align(ref: Sequence[Hashable], hyp: Sequence[Hashable]) -> list[tuple[str, Hashable | None, Hashable | None]]:
    """The alignment with the fewest edits and, among those, the most hits: (op, ref item, hyp item) in order.
    op is "hit", "sub", "ins" (ref item None) or "del" (hyp item None). This fixes how many of each there are; where
    they go is decided from the end backwards, preferring a pair to an insertion and an insertion to a deletion.
    Time and memory grow with len(ref) * len(hyp): 0.05 s and 8 MB for 2,000 by 2,000 items."""
    gap = min(len(ref), len(hyp)) + 1  # more than there can be substitutions, so that their + 1 only breaks ties
    moves = []  # for each item of ref: after which items of hyp a substitution, and an insertion, costs least
    for above, row in itertools.pairwise(_edit_costs(ref, hyp, gap)):
        moves.append((row[1:] - above[:-1] == gap + 1, row[1:] - row[:-1] == gap))
    steps = []
    i, j = len(ref), len(hyp)
    while i > 0 or j > 0:
        if i > 0 and j > 0 and (ref[i - 1] == hyp[j - 1] or moves[i - 1][0][j - 1]):  # a hit always costs least
            i -= 1
            j -= 1
            steps.append(("hit" if ref[i] == hyp[j] else "sub", ref[i], hyp[j]))
        elif j > 0 and (i == 0 or moves[i - 1][1][j - 1]):
            j -= 1
            steps.append(("ins", None, hyp[j]))
        else:
            i -= 1
            steps.append(("del", ref[i], None))
    return steps[::-1]


# ---- error counts ----

@dataclass(frozen=True)
class Counts:
    """Errors against a reference of ref items; sums, to be added over utterances and divided once."""

    sub: int = 0
    ins: int = 0
    del_: int = 0  # del is a keyword
    ref: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.sub + other.sub, self.ins + other.ins, self.del_ + other.del_, self.ref + other.ref)

    @property
    def errors(self) -> int:
        return self.sub + self.ins + self.del_

    @property
    def rate(self) -> float:
        """errors / ref; without a reference the number of errors, as if ref were 1: finite, so JSON can hold it."""
        return self.errors / max(self.ref, 1)


def count_errors(ref: Sequence[Hashable], hyp: Sequence[Hashable]) -> Counts:
    """The errors of align(ref, hyp) from one row at a time: the table of an hour's characters would take 20 GB."""
    gap = min(len(ref), len(hyp)) + 1
    for row in _edit_costs(ref, hyp, gap):
        pass  # only the last one is wanted
    edits, sub = divmod(row[-1].item(), gap)  # the cost is gap * edits + sub
    ins = (edits - sub + len(hyp) - len(ref)) // 2  # ins - del = len(hyp) - len(ref)
    return Counts(sub, ins, edits - sub - ins, len(ref))


def char_errors(ref_text: str, hyp_text: str) -> Counts:
    """Character errors of two texts once normalised; a space is a character, as in jiwer.cer."""
    return count_errors(normalise_text(ref_text), normalise_text(hyp_text))


def word_errors(ref_text: str, hyp_text: str) -> Counts:
    """Word errors of two texts once normalised; words are what white space separates, as in jiwer.wer."""
    return count_errors(normalise_text(ref_text).split(), normalise_text(hyp_text).split())


def token_accuracy(counts: Counts) -> float:
    """max(0, 1 - errors / ref): insertions count as errors, so a hypothesis cannot gain by being long."""
    return max(0.0, 1.0 - counts.rate)


# ---- picture ----

def _display_width(text: str) -> int:
    """Terminal columns that text takes: 2 for a wide character, 0 for one drawn on its neighbour."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


MARKS = {"hit": "", "sub": "S", "ins": "I", "del": "D"}


def format_alignment(ref: Sequence, hyp: Sequence) -> str:
    """align(ref, hyp) as three lines REF, HYP, OPS in columns of a monospace terminal.
    OPS marks S, I, D; an empty slot is ***, and an item that is a space is drawn as ␣."""
    lines = ["REF:", "HYP:", "OPS:"]
    for op, ref_item, hyp_item in align(ref, hyp):
        cells = [_show_item(ref_item), _show_item(hyp_item), MARKS[op]]
        width = max(map(_display_width, cells))
        for n, cell in enumerate(cells):
            lines[n] += " " + cell + " " * (width - _display_width(cell))
    return "\n".join(line.rstrip() for line in lines)


def _show_item(item: Hashable | None) -> str:
    if item is None:
        return "***"
    return "␣" if item == " " else str(item)
