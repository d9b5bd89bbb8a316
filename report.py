"""Results in files: txt, json, srt, vtt, tsv and ctm; error rates and confusions; report.html.

Needs torch, numpy, tokenizer.py, audio.py, data.py, files.py, model.py, pieces.py and plot.py. Everything here is a
function of results, which decode.py makes.
Sources: Bisani & Ney 2004 (intervals); whisper's tsv; NIST's ctm.
"""
import html
import json
import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from audio import frame_sec
from data import Utterance
from files import write_atomic
from model import Hypotheses, in_feature_frames
from pieces import PIECE, PieceTokenizer, UNSPOKEN, are_spaced, spell_words
from plot import alignment_svg, attention_svg, escape
from tokenizer import (Counts, Token, Tokenizer, align, char_errors, count_errors, format_alignment, normalise_text,
                       spoken_places, token_accuracy, word_errors)


# ---- results ----

class Word(NamedTuple):
    text: str
    start: float
    end: float
    confidence: float  # geometric mean of its tokens' probabilities
    spaced: bool = True  # a space stands between it and the word before it


class Alternative(NamedTuple):
    text: str
    score: float  # by which they are ranked: higher is better, comparable within an utterance
    confidence: float  # probability of the whole, to the power 1 / its tokens; 0 without tokens


class Sentence(NamedTuple):
    text: str  # with marks and capitals
    start: float
    end: float
    words: list[Word]  # as the text has them


class Result(NamedTuple):
    text: str
    confidence: float  # geometric mean of the tokens' probabilities; 0 without tokens
    tokens: list[Token]
    words: list[Word]  # what spaces separate, and every ideograph
    nbest: tuple[Alternative, ...] = ()  # best first, of different texts, the first one's is `text`; where asked for
    sentences: tuple[Sentence, ...] | None = None  # None: no punctuation model was asked


def log_confidence(item: Token | Result) -> float:
    return math.log(max(item.confidence, 5e-5))  # confidences are rounded to 4 digits


def mean_confidence(tokens: Sequence[Token]) -> float:
    """exp(mean log p), 0 without tokens."""
    return round(math.exp(statistics.fmean(map(log_confidence, tokens))), 4) if tokens else 0.0


def written_text(result: Result) -> str:
    """The text for people: with punctuation, where there is some."""
    if result.sentences is None:
        return result.text
    return join_words([word for sentence in result.sentences for word in sentence.words])


def is_ideograph(text: str) -> bool:
    """Whether text is one Han character or kana, which are written without spaces."""
    return len(text) == 1 and ("\u3040" <= text <= "\u30ff" or "\u3400" <= text <= "\u9fff" or text >= "\U00020000")


def join_words(words: Sequence[Word], text: str = "") -> str:
    """The text with the words behind it."""
    for word in words:
        text += f" {word.text}" if text and word.spaced else word.text
    return text


def words_of_units(tokens: Sequence[Token], unit: str) -> list[Word]:
    """The words of a Tokenizer's tokens: each is one (unit "word"), or those that a space or an ideograph separates."""
    groups: list[tuple[bool, list[Token]]] = []  # (spaced, tokens)
    space = True
    for token in tokens:
        if token.token == " ":
            space = True
            continue
        if space or is_ideograph(token.token) or is_ideograph(groups[-1][1][-1].token):
            groups.append((space, []))
        groups[-1][1].append(token)
        space = unit == "word"
    words = []
    for spaced, group in groups:
        text = "".join(token.token for token in group)
        words.append(Word(text, group[0].start, group[-1].end, mean_confidence(group), spaced))
    return words


def words_of_pieces(tokens: Sequence[Token], all_spaced: bool) -> list[Word]:
    """The words of a PieceTokenizer's tokens. Their times are too early by one behind an unspoken token, as FunASR's,
    which leaves out the token and not its time."""
    spelled = spell_words([token.token for token in tokens])
    heard = [token for token in tokens if token.token and token.token not in UNSPOKEN]
    words = []
    for i, word in enumerate(spelled):
        spaced = i == 0 or all_spaced or are_spaced(spelled[i - 1], word)
        confidence = mean_confidence(heard[word.start:word.end])
        words.append(Word(word.text, tokens[word.start].start, tokens[word.end - 1].end, confidence, spaced))
    return words


def words_of(tokens: Sequence[Token], tokenizer: Tokenizer | PieceTokenizer, all_spaced: bool) -> list[Word]:
    if isinstance(tokenizer, PieceTokenizer):
        return words_of_pieces(tokens, all_spaced)
    return words_of_units(tokens, tokenizer.unit)


def text_of(tokens: Sequence[Token], words: Sequence[Word], unit: str) -> str:
    return "".join(token.token for token in tokens) if unit == "char" else join_words(words)


class Outcome(NamedTuple):
    """What became of one input."""

    index: int  # its place among the inputs
    key: str
    seconds: float = 0.0
    reference: str = ""  # its true text, "" where none is known
    result: Result | None = None  # None: not recognised
    reason: str = ""  # why not


# ---- forms ----

CUE_SEC = 7.0  # of a subtitle at most
CUE_CHARS = 84
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff]")  # Thai, Lao, Tibetan, Burmese, Khmer: no spaces between words
LEADING = "เแโใไເແໂໃໄ\u1039\u17d2"  # vowels written before their consonant, and what stacks the next consonant
PAUSES = ("，", "、", "；", ",", ";")  # behind a word: the marks where a sentence is cut that is too long


def fits(words: Sequence[Word]) -> bool:
    return words[-1].end - words[0].start <= CUE_SEC and len(join_words(words)) <= CUE_CHARS


def belong_together(before: str, after: str) -> bool:
    """Whether no cut may come between two pieces of a word: `after` begins with a mark on the letter before it, or with
    a vowel that is one and a letter."""
    return before[-1] in LEADING or unicodedata.category(after[0]).startswith("M") or after[0] in "\u0e33\u0eb3"


def timed_pieces(word: Word, tokens: Sequence[Token]) -> list[tuple[str, float, float]]:
    """The text of a word in (piece, start, end): its tokens, or, where these spell it otherwise, its characters."""
    own = [token for token in tokens if word.start <= token.start and token.end <= word.end]
    spelled = [token.token.removesuffix(PIECE) for token in own]
    marks = word.text.removeprefix("".join(spelled))  # that punctuation put behind it
    if len(spelled) > 1 and word.text != marks and all(1 <= len(piece) <= CUE_CHARS for piece in spelled):
        spelled[-1] += marks
        return [(piece, token.start, token.end) for piece, token in zip(spelled, own)]
    step = (word.end - word.start) / len(word.text)
    return [(c, word.start + i * step, word.start + (i + 1) * step) for i, c in enumerate(word.text)]


def split_word(word: Word, tokens: Sequence[Token]) -> list[Word]:
    """A word as subtitles take it: whole; in pieces if it is longer than one and of a script without spaces, or of more
    than CUE_CHARS. None is shown for longer than CUE_SEC."""
    pieces = [word]
    if not fits([word]) and (len(word.text) > CUE_CHARS or UNSPACED.search(word.text)):
        pieces = []
        for text, start, end in timed_pieces(word, tokens):
            if pieces and belong_together(pieces[-1].text, text):
                pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + text, end=end)
            else:
                pieces.append(Word(text, start, end, word.confidence, word.spaced and not pieces))
    return [piece._replace(end=min(piece.end, piece.start + CUE_SEC)) for piece in pieces]


def pack_words(words: Sequence[Word], tokens: Sequence[Token]) -> list[list[Word]]:
    pieces: list[Word] = []
    for word in words:
        pieces += split_word(word, tokens)
    return pack([piece] for piece in pieces)


def pack(parts: Iterable[list[Word]]) -> list[list[Word]]:
    """As many of the parts in a subtitle as fit; one that does not fit stays alone."""
    found: list[list[Word]] = []
    for part in parts:
        if found and fits(found[-1] + part):
            found[-1] = found[-1] + part
        else:
            found.append(part)
    return found


def clauses(words: Sequence[Word]) -> list[list[Word]]:
    """The words up to each mark of PAUSES."""
    found: list[list[Word]] = [[]]
    for word in words:
        found[-1].append(word)
        if word.text.endswith(PAUSES):
            found.append([])
    return [clause for clause in found if clause]


def cues(result: Result) -> list[list[Word]]:
    """The subtitles of a result. A sentence begins a new one; too long a one is cut at its commas, between words where
    that is not enough, and between tokens where a script writes no spaces. Each keeps CUE_SEC and CUE_CHARS."""
    if result.sentences is None:
        return pack_words(result.words, result.tokens)
    found = []
    for sentence in result.sentences:
        for cue in pack(clauses(sentence.words)):
            found += pack_words(cue, result.tokens)
    return found


def timestamp(seconds: float, mark: str) -> str:
    """00:00:01,234 with mark ',' (srt), 00:00:01.234 with '.' (vtt)."""
    ms = round(seconds * 1000)
    return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"


def subtitles(result: Result, form: str) -> str:
    """Numbered cues, times as `timestamp` writes them: srt, or vtt, where <unk> would be a tag, so it is escaped."""
    lines = ["WEBVTT\n\n"] if form == "vtt" else []
    mark = "." if form == "vtt" else ","
    for i, cue in enumerate(cues(result), 1):
        text = join_words(cue)
        if form == "vtt":
            text = html.escape(text, quote=False)
        lines.append(f"{i}\n{timestamp(cue[0].start, mark)} --> {timestamp(cue[-1].end, mark)}\n{text}\n\n")
    return "".join(lines)


def token_entry(token: Token) -> dict:
    """As JSON has it: `hotword` only where it is true."""
    entry = token._asdict()
    if not token.hotword:
        del entry["hotword"]
    return entry


def word_entry(word: Word) -> dict:
    return {"word": word.text, "start": word.start, "end": word.end, "confidence": word.confidence}


def sentence_entries(result: Result) -> list[dict]:
    entries = []
    for sentence in result.sentences:
        words = [word_entry(word) for word in sentence.words]
        entries.append({"text": sentence.text, "start": sentence.start, "end": sentence.end, "words": words})
    return entries


def json_row(outcome: Outcome) -> dict:
    result = outcome.result
    row = {"key": outcome.key, "text": written_text(result), "confidence": result.confidence,
           "duration": round(outcome.seconds, 3), "tokens": [token_entry(token) for token in result.tokens],
           "words": [word_entry(word) for word in result.words]}
    if result.sentences is not None:
        row["sentences"] = sentence_entries(result)
    if result.nbest:
        row["nbest"] = [alternative._asdict() for alternative in result.nbest]
    if outcome.reference:
        row["reference"] = outcome.reference
    return row


def to_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def tsv(outcome: Outcome) -> str:
    """A line of begin, end (whole ms) and text per subtitle, under a header: whisper's."""
    lines = [f"{round(cue[0].start * 1000)}\t{round(cue[-1].end * 1000)}\t{join_words(cue)}\n"
             for cue in cues(outcome.result)]
    return "".join(["start\tend\ttext\n", *lines])


def ctm(outcome: Outcome) -> str:
    """A line of key, channel, begin, duration (seconds), word and confidence per word: NIST's."""
    key = "_".join(outcome.key.split()) or "_"
    return "".join(f"{key} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text} {word.confidence:.4f}\n"
                   for word in outcome.result.words)


FORMS: dict[str, Callable[[Outcome], str]] = {  # of --format; one file per utterance, but of ctm
    "txt": lambda outcome: written_text(outcome.result) + "\n", "json": lambda outcome: to_line(json_row(outcome)),
    "srt": lambda outcome: subtitles(outcome.result, "srt"), "vtt": lambda outcome: subtitles(outcome.result, "vtt"),
    "tsv": tsv, "ctm": ctm}


# ---- pictures ----

def layer_of(layers: Sequence[Tensor], number: int) -> tuple[str, Tensor]:
    """(name, weights) of layer `number`, counted from 1; the last one for 0 and for a number beyond it."""
    number = min(number or len(layers), len(layers))
    return f"layer {number} of {len(layers)}", layers[number - 1]


def utterance_svgs(title: str, item: Utterance, found: Hypotheses, tokens: Sequence[tuple[str, float, float]], config,
                   encoder_layers: Sequence[Tensor] = (), cross_layers: Sequence[Tensor] = (),
                   layer: int = 0) -> dict[str, str]:
    """SVGs of an utterance decoded alone: its alignment (features, tokens, firing); as encoder and cross, the heads of
    attention layer `layer_of` of the encoder (1,H,L,L) and of the decoder (1,H,U,L), where such layers are given.
    tokens: (text, start, end) in seconds; config: with sections model and data."""
    encoder = config.model.encoder
    hop_sec = frame_sec(config.data)
    seconds = len(item.feats) * hop_sec
    L = found.alpha.shape[1]
    span = in_feature_frames(0, encoder) * hop_sec, in_feature_frames(L, encoder) * hop_sec  # of the encoder's frames
    truth = None if item.boundaries is None else item.boundaries * hop_sec
    pictures = {"alignment": alignment_svg(title, item.feats, found.alpha[0].cpu(), tokens, seconds, span, truth)}
    if encoder_layers:
        name, heads = layer_of(encoder_layers, layer)
        name = f"encoder, {name}, {title}"
        pictures["encoder"] = attention_svg(name, heads[0].float().cpu(), tokens, seconds, span, cross=False)
    if cross_layers:
        name, heads = layer_of(cross_layers, layer)
        rows = spoken_places(found.tokens[0].tolist())  # what pads is BLANK
        name = f"cross, {name}, {title}"
        pictures["cross"] = attention_svg(name, heads[0, :, rows].float().cpu(), tokens, seconds, span, cross=True)
    return pictures


# ---- the report ----

class Score(NamedTuple):
    """One utterance against its reference."""

    index: int  # its place among the inputs
    key: str
    reference: str
    text: str
    tokens: Counts
    chars: Counts
    words: Counts
    units: Counts  # of readable_units

    @property
    def steps(self) -> list[tuple[str, str | None, str | None]]:
        """The alignment for a reader: (op, reference's unit, recognised one), as `align` gives it."""
        return align(readable_units(self.reference), readable_units(self.text))


def readable_units(text: str) -> list[str]:
    """The words of a text, an ideograph being a word: what is aligned for a reader."""
    return "".join(f" {c} " if is_ideograph(c) else c for c in normalise_text(text)).split()


def score(outcome: Outcome, encode: Callable[[str], list[int]]) -> Score:
    """encode: the tokenizer's, so that tokens are compared as the model knows them."""
    text = outcome.result.text
    reference = outcome.reference
    tokens = count_errors(encode(reference), [token.id for token in outcome.result.tokens])
    units = count_errors(readable_units(reference), readable_units(text))
    return Score(outcome.index, outcome.key, reference, text, tokens, char_errors(reference, text),
                 word_errors(reference, text), units)


def bootstrap_interval(counts: Sequence[Counts]) -> tuple[float, float]:
    """The 95% interval of the error rate of 1,000 sets drawn with replacement. Source: Bisani & Ney 2004."""
    errors = np.array([c.errors for c in counts])
    refs = np.array([c.ref for c in counts])
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        sample = rng.integers(len(counts), size=len(counts))
        rates.append(errors[sample].sum() / max(refs[sample].sum(), 1))
    return float(np.quantile(rates, 0.025)), float(np.quantile(rates, 0.975))


def error_figure(counts: Sequence[Counts]) -> str:
    total = sum(counts, Counts())
    text = (f"{100 * total.rate:.2f} [ {total.errors} / {total.ref}, {total.ins} ins, {total.del_} del, "
            f"{total.sub} sub ]")
    if len(counts) == 1:    # drawn again and again it would vary by nothing
        return text
    low, high = bootstrap_interval(counts)
    return f"{text}  95% interval {100 * low:.2f} to {100 * high:.2f}"


def report_lines(scores: Sequence[Score]) -> list[str]:
    """The error rates of one or more utterances, sums divided once, and their ten most frequent errors."""
    tokens = sum((s.tokens for s in scores), Counts())
    exact = len([s for s in scores if s.tokens.errors == 0])
    right = len([s for s in scores if s.chars.errors == 0])
    confused: Counter[tuple[str, str]] = Counter()
    for s in scores:
        confused.update((ref or "", hyp or "") for op, ref, hyp in s.steps if op != "hit")
    worst = sorted(confused.items(), key=lambda item: (-item[1], item[0]))[:10]
    lines = [f"token accuracy {token_accuracy(tokens):.4f}  sequence accuracy {exact / len(scores):.4f}  "
             f"({len(scores)} utterances with a reference)",
             f"%WER {error_figure([s.words for s in scores])}", f"%CER {error_figure([s.chars for s in scores])}",
             f"sentence accuracy {right / len(scores):.4f} ({right} of {len(scores)} texts without an error)"]
    if worst:
        lines.append("most frequent confusions (*** is nothing):")
    lines += [f"{times:6}  {ref or '***'} -> {hyp or '***'}" for (ref, hyp), times in worst]
    return lines


# ---- report.html ----

WORST = 50  # utterances of the page at most, about 30 kB each
REPORT_STYLE = """
:root{--ground:#fff;--ink:#222;--faint:#667;--line:#ddd;--sub:#ffedb8;--del:#ffd9d9;--ins:#d3efd9}
@media(prefers-color-scheme:dark){:root{--ground:#1b1b1b;--ink:#ddd;--faint:#99a;--line:#444;--sub:#5c4a10;
--del:#6b2525;--ins:#1f5130;color-scheme:dark}}
body{margin:0 auto;padding:0 1rem 3rem;max-width:66rem;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.6 sans-serif,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei"}
h1{font-size:1.4rem} h2{font-size:1.1rem;margin-top:2rem} h3{font-size:1rem;margin:0} p{margin:.2rem 0}
small,summary{color:var(--faint);font-size:.85rem}
article{border-top:1px solid var(--line);padding:.7rem 0} summary{cursor:pointer} details div{overflow-x:auto}
pre{white-space:pre-wrap}
del,ins{padding:0 .25em;border-radius:.2em} del{background:var(--del)} ins{background:var(--ins);text-decoration:none}
span del,span ins{background:var(--sub)} h3,pre,del,ins,bdi{unicode-bidi:isolate}
"""


def edit_html(op: str, ref: str | None, hyp: str | None) -> str:
    """One step of an alignment: a deletion is struck out, an insertion green, a substitution both, on yellow."""
    if op == "hit":
        return escape(ref)
    old = f"<del>{escape(ref)}</del>" if ref else ""
    new = f"<ins>{escape(hyp)}</ins>" if hyp else ""
    return f"<span>{old}{new}</span>" if op == "sub" else old + new


def case_html(s: Score, svg: str) -> str:
    """An utterance of the page, its texts and its picture (an SVG, or none) folded."""
    n = s.units
    texts = (f"<p><small>reference</small> <bdi>{escape(s.reference)}</bdi></p>"
             f"<p><small>recognised</small> <bdi>{escape(s.text)}</bdi></p>")
    return (f"<article><h3>{escape(s.key)}</h3><small>errors: {n.errors} in {n.ref} ({n.sub} replaced, "
            f"{n.del_} missing, {n.ins} too many)</small><p>{' '.join(edit_html(*step) for step in s.steps)}</p>"
            f"<details><summary>{'texts and picture' if svg else 'texts'}</summary>{texts}<div>{svg}</div></details>"
            "</article>\n")


def report_html(title: str, lines: Sequence[str], cases: Sequence[tuple[Score, str]]) -> str:
    """A page that needs no other file: the lines of the summary, the utterances with their pictures."""
    summary = escape("\n".join(lines))
    safe = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (f'<!doctype html>\n<html><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{safe}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{REPORT_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><pre>{summary}</pre>\n"
            f"<h2>The worst first: {len(cases)}</h2><p><small><span><del>replaced</del><ins>by</ins></span> "
            "<del>missing</del> <ins>too many</ins></small></p>\n"
            f"{''.join(case_html(*case) for case in cases)}</body></html>\n")


def write_report(folder: Path, scores: Sequence[Score], lines: Sequence[str], picture: Callable[[int], str]) -> None:
    """summary.txt, alignments.txt, report.html with the WORST utterances and picture(index) of each, an SVG or ""."""
    alignments = []
    for s in scores:
        n = s.units
        alignments.append(f"{s.key}: {n.errors} of {n.ref} ({n.sub} sub, {n.ins} ins, {n.del_} del)\n"
                          f"{format_alignment(readable_units(s.reference), readable_units(s.text))}\n\n")
    write_atomic(folder / "alignments.txt", "".join(alignments))
    write_atomic(folder / "summary.txt", "\n".join([*lines, ""]))
    worst = sorted(scores, key=lambda s: (-s.units.errors, -s.units.rate))[:WORST]
    cases = [(s, picture(s.index)) for s in worst]
    page = report_html(f"{len(scores)} utterances and their references", lines, cases)
    write_atomic(folder / "report.html", page)
