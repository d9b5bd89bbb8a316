"""Vocabularies of word pieces, as FunASR publishes them: text to ids, and symbols to the words of a sentence.

Needs tokenizer.py. Source: FunASR's CharTokenizer, seg_dict and sentence_postprocess.
"""
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from tokenizer import SPECIALS, UNK, parse_file, spoken_symbols, tidy


# ---- vocabularies and sentences ----

PIECE = "@@"  # at the end of a symbol: the next symbol continues the word
UNSPOKEN = ("<s>", "</s>", "<unk>", "<OOV>")  # symbols that FunASR leaves out of a sentence


def _split_lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n")  # not splitlines: U+2028 may be a symbol


@dataclass(frozen=True)
class PieceTokenizer:
    """A vocabulary of characters and word pieces, as FunASR's CharTokenizer reads it: ids 0 to 2 are BLANK, SOS and EOS
    whatever their symbols are. pieces[word] are the symbols of a word; without pieces, they are its characters."""

    symbols: tuple[str, ...]
    pieces: dict[str, list[str]] | None
    unit: ClassVar[str] = "piece"

    @classmethod
    def load(cls, tokens: str | os.PathLike, dictionary: str | os.PathLike | None = None) -> "PieceTokenizer":
        """Symbols from a JSON list or a file with one on each line, and a dictionary `word piece piece ...`, if given.
        Raises ValueError that names the file."""
        parse = json.loads if Path(tokens).suffix == ".json" else _split_lines
        symbols = parse_file(tokens, "a list of symbols", parse)
        pieces = parse_file(dictionary, "a dictionary", str) if dictionary else None
        return cls.from_state({"symbols": symbols, "pieces": pieces}, str(tokens))

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols)}  # a repeated symbol: its last id

    @property
    def unknown(self) -> int:
        """The id of what has no symbol."""
        return self._ids.get(SPECIALS[UNK], len(self) - 1)

    def _spelled(self, words: Sequence[str], pattern: str) -> list[str]:
        """words; in the place of one that is not in pieces and is of this pattern, its characters."""
        units = []
        for word in words:
            is_spelled = word not in self.pieces and re.fullmatch(pattern, word)
            units += word if is_spelled else [word]
        return units

    def units(self, text: str) -> list[str]:
        """What is looked up of a text once it is `tidy`: characters; with `pieces`, its words in lower case, and of a
        word not in pieces that begins with a Chinese character, ASCII letter or digit the characters."""
        if self.pieces is None:
            return [c for c in tidy(text) if c != " "]
        return self._spelled(tidy(text).lower().split(" "), "[\u4e00-\u9fa5a-z0-9].*")

    def _ids_of(self, units: Sequence[str]) -> list[int]:
        symbols = []
        for unit in units:
            symbols += [unit] if self.pieces is None else self.pieces.get(unit, [SPECIALS[UNK]])
        return [self._ids.get(symbol, self.unknown) for symbol in symbols]

    def unknown_units(self, text: str) -> list[str]:
        """The units of a text that encode gives the unknown id."""
        return [unit for unit in self.units(text) if self.unknown in self._ids_of([unit])]

    def encode(self, text: str) -> list[int]:
        """The ids of the symbols of a text; no SOS or EOS is added. In FunASR a second space or a tab is unknown."""
        return self._ids_of(self.units(text))

    def encode_hotword(self, phrase: str) -> list[int]:
        """The ids of a phrase that a model is to listen for, as FunASR reads it: words at any white space; one that is
        not in pieces is spelled if it is all Chinese and digits, else unknown. Without pieces, words are looked up."""
        words = tidy(phrase).split()
        if self.pieces is not None:
            words = self._spelled([word.lower() for word in words], "[\u4e00-\u9fa50-9]+")
        return self._ids_of(words)

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence of ids. Raises ValueError if an id is outside the vocabulary."""
        return write_sentence(spell_words(spoken_symbols(ids, self.symbols)))

    def state(self) -> dict:
        """Plain containers, as Tokenizer.state; pieces as lines of a dictionary: torch.load reads lists 5 x slower."""
        pieces = None
        if self.pieces is not None:
            pieces = "\n".join(" ".join([word, *parts]) for word, parts in self.pieces.items())
        return {"unit": "piece", "symbols": list(self.symbols), "pieces": pieces}

    @classmethod
    def from_state(cls, state: dict, where: str = "tokenizer state") -> "PieceTokenizer":
        """The inverse of state(), or of an older one, whose pieces are lists by word. Raises as Tokenizer's."""
        symbols, pieces = state.get("symbols"), state.get("pieces")
        if isinstance(pieces, str):
            rows = [line.split() for line in pieces.split("\n")]
            pieces = {row[0]: row[1:] for row in rows if row}
        if not (isinstance(symbols, list) and len(symbols) > UNK and all(isinstance(x, str) for x in symbols)):
            raise ValueError(f"{where}: wanted a list of four symbols or more, got {symbols!r:.60}")
        if pieces is not None and not (isinstance(pieces, dict) and all(isinstance(x, list) for x in pieces.values())):
            raise ValueError(f"{where}: wanted a list of pieces by word, got {pieces!r:.60}")
        return cls(tuple(symbols), pieces)


class SpelledWord(NamedTuple):
    text: str
    start: int  # its first symbol, counted without the UNSPOKEN ones
    end: int  # the one behind its last
    kind: str  # "han": no space before it | "word": a space after it | "other"


def _is_han(text: str) -> bool:
    """Whether FunASR takes text for Chinese: also digits and @; of a longer text mostly the first character counts."""
    return "\u4e00" <= text <= "\u9fff" or "0" <= text <= "9" or text == "@"


def _kind(symbol: str) -> str:
    """"piece", or as SpelledWord.kind."""
    if all(map(_is_han, symbol)):
        return "han"
    if PIECE in symbol:
        return "piece"
    return "word" if all(c.isalpha() or c == "'" for c in symbol) else "other"


def spell_words(symbols: Sequence[str]) -> list[SpelledWord]:
    """Symbols to words: pieces joined, runs of single letters in capitals, UNSPOKEN symbols left out.
    Source: FunASR's sentence_postprocess, which also loses characters: of a word that breaks off (his@@ 不) and of a
    mark between a word and Chinese (ok % 不). Here all are kept; the rest is equal."""
    spoken = [symbol for symbol in symbols if symbol and symbol not in UNSPOKEN]
    all_han = all(map(_is_han, spoken))
    words: list[SpelledWord] = []
    unfinished = False  # whether the last word so far ended with a piece, so that more of it follows
    for u, symbol in enumerate(spoken):
        kind = "han" if all_han else _kind(symbol)
        text = symbol.replace(PIECE, "") if kind == "piece" else symbol
        start = u
        if unfinished and kind in ("piece", "word"):
            begun = words.pop()
            text = begun.text + text
            start = begun.start
        unfinished = kind == "piece"
        words.append(SpelledWord(text, start, u + 1, "word" if unfinished else kind))
    return merge_letters(words)


def _is_letter(word: SpelledWord) -> bool:
    return word.kind == "word" and len(word.text) == 1 and word.text.isascii()


def merge_letters(words: Sequence[SpelledWord]) -> list[SpelledWord]:
    """Runs of two or more words of one ASCII letter become one word in capitals: a b c -> ABC."""
    merged: list[SpelledWord] = []
    for are_letters, group in itertools.groupby(words, _is_letter):
        run = list(group)
        if are_letters and len(run) > 1:
            text = "".join(word.text for word in run).upper()
            run = [SpelledWord(text, run[0].start, run[-1].end, "word")]
        merged += run
    return merged


def are_spaced(before: SpelledWord, after: SpelledWord) -> bool:
    """Whether a space separates two words: after a word of letters, unless a Chinese character follows."""
    return before.kind == "word" and after.kind != "han"


def write_sentence(words: Sequence[SpelledWord]) -> str:
    text = ""
    for i, word in enumerate(words):
        if i > 0 and are_spaced(words[i - 1], word):
            text += " "
        text += word.text
    return text
