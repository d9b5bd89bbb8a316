"""Recognise speech: python decode.py [--ckpt CHECKPOINT] [INPUT ...].

    python decode.py                                the last run's checkpoint, on its toy data or its test manifest
    python decode.py a.wav b.wav                    recordings
    python decode.py --output out.jsonl dev.jsonl   a manifest or a Kaldi folder; its texts are the references
    python decode.py --plot pictures a.wav          also two SVGs per utterance: features and firing, cross-attention
    python decode.py --ckpt DIR a.wav               with a model directory as FunASR publishes it
    python decode.py --nbest 5 --ctc-weight 0.3 a.wav    search, where greedy is the default (class Search)
    python decode.py --export DIR                   the model alone, as such a directory where FunASR knows the model

Results go to standard output and to JSON lines, everything else to standard error. Exit code 0, 1 if an input could not
be recognised, 2 for bad arguments.
Reading order: load_system, search, transcribe (all that serving needs), pictures, the report, exports, main.
Needs torch, numpy, config.py, tokenizer.py, data.py and model.py.
"""
import argparse
import base64
import html
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config as configs
import data
from model import (Hypotheses, build, encode, funasr_names, load_published, load_weights, padding_mask,
                   read_checkpoint)
from tokenizer import (BLANK, EOS, SOS, SPECIALS, Counts, PieceTokenizer, Tokenizer, Word, char_errors, count_errors,
                       join_words, spell_words, token_accuracy, word_errors)

DEFAULT_CHECKPOINT = "runs/latest/checkpoints/best.pt"
BATCH_FRAMES = 60000  # padded frames of a batch at most: ten minutes at 10 ms

# ---- a checkpoint, ready to recognise ----


class Search(NamedTuple):
    """How hypotheses are found. All defaults together: greedily, by the model itself."""

    beam: int = 1  # hypotheses kept at a time; of a Paraformer, for each number of tokens
    nbest: int = 1  # alternatives in a Result where more than 1; the search keeps no fewer than so many
    length_penalty: float = 0.6  # transformer: log probability is divided by ((5 + length) / 6) ** length_penalty
    coverage_penalty: float = 0.0  # transformer: weight of the log of the attention that each frame got, at most 1
    ctc_weight: float = 0.0  # share of the CTC head in the score, 0 to 1

    @property
    def width(self) -> int:
        return max(self.beam, self.nbest)


class System(NamedTuple):
    config: configs.Config
    tokenizer: Tokenizer | PieceTokenizer
    stats: Tensor  # (2,F) mean and reciprocal deviation that the features are normalised with
    model: nn.Module  # in eval mode
    lossless: bool = True  # False: texts of a PieceTokenizer lose the characters that FunASR loses
    precision: str = "float32"  # key of PRECISIONS, of the matrix products
    search: Search = Search()


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_directory(folder: str | os.PathLike) -> System:
    """The system in a directory that FunASR publishes. Raises ValueError for what is missing or not implemented."""
    files = configs.published_files(folder)
    config = configs.load_published(files["config"])
    tokenizer = PieceTokenizer.load(files["tokens"], files.get("seg_dict"))
    stats = data.read_cmvn(files["stats"], data.feature_dim(config.data))
    model = load_published(config.model, stats.shape[1], len(tokenizer), files["model"])
    return System(config, tokenizer, stats, model.eval())


def load_system(path: str | os.PathLike, device: str = "auto") -> System:
    """The system of a checkpoint of train.py or of a FunASR directory. Raises ValueError: file and what is wrong."""
    if device not in ("auto", "cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted auto, cpu or, where torch finds a GPU, cuda; got {device}")
    target = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if configs.is_published(path):
        system = load_directory(path)
        return system._replace(stats=system.stats.to(target), model=system.model.to(target))
    state = read_checkpoint(path)
    config = configs.from_dict(state["config"], f"{path}: config")
    tokenizer = Tokenizer.from_state(state["tokenizer"], f"{path}: tokenizer")
    model = build(config.model, state["stats"].shape[1], len(tokenizer))
    load_weights(model, state["model"], str(path))
    return System(config, tokenizer, state["stats"].to(target), model.to(target).eval())


# ---- search ----


class NBest(NamedTuple):
    """N hypotheses of each utterance, best first; where there are fewer, log_probs and scores of the rest are -inf."""

    tokens: Tensor  # (B,N,U) int64, 0 behind the end
    lens: Tensor  # (B,N) int64
    log_probs: Tensor  # (B,N) of the whole hypothesis
    norms: Tensor  # (B,N) what a log probability is divided by in a score
    scores: Tensor  # (B,N)


def pick_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B,W,...), index (B,N) -> (B,N,...): x[b, index[b, n]]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def ranked(found: NBest) -> NBest:
    order = found.scores.argsort(dim=1, descending=True, stable=True)
    return NBest(*(pick_rows(x, order) for x in found))


def certain(n: int, place: int, like: Tensor) -> Tensor:
    """(n,) log probabilities of what is sure: 0 at place, -inf elsewhere."""
    return torch.where(torch.arange(n, device=like.device) == place, 0.0, -math.inf).to(like.dtype)


def beam_search(step: Callable, past: list[Tensor], frames: Tensor, search: Search) -> NBest:
    """The most probable texts of a model that tells a token from those before it.

    step(tokens (B,W), past) -> log probabilities (B,W,V), past, attention (B,W,L), as Transformer.begin makes it, with
    past of W = search.width hypotheses; frames (B,) bound the number of tokens. score = log_prob / norm + coverage.
    A hypothesis that has ended stays in the beam as long as its score is among the W best, so it is compared with
    longer ones that go on, and W = 1 is greedy. An utterance is settled when no open hypothesis, were the rest of it
    certain, could enter the n-best. Source: Wu et al. 2016 "GNMT", 7.
    """
    B, W = len(frames), search.width
    norm = lambda length: ((5 + length) / 6) ** search.length_penalty
    last, tokens = torch.full((B, W), SOS, device=frames.device), frames.new_zeros(B, W, 0)
    lens, ended = torch.zeros_like(last), torch.zeros_like(last, dtype=torch.bool)
    log_prob = certain(W, 0, torch.empty(0, device=frames.device)).expand(B, W)  # one hypothesis, that says nothing yet
    covered = (~padding_mask(frames, int(frames.max()))).float()[:, None].expand(B, W, -1)  # (B,W,L): padding is
    wanted = W if search.ctc_weight else search.nbest  # that have to be settled
    for t in range(int(frames.max()) + 1):
        told, past, attention = step(last, past)
        end = certain(told.shape[2], EOS, told)
        told = torch.where((t >= frames)[:, None, None], told + end, told)  # it must end
        told = torch.where(ended[:, :, None], end, told)  # it has ended: no change, at no cost
        total, length = log_prob[:, :, None] + told, lens + ~ended  # (B,W,V), (B,W)
        covered = covered + attention[:, :, :covered.shape[2]] * ~ended[:, :, None]
        score, place = (total / norm(length)[:, :, None] + coverage(covered, search)).flatten(1).topk(W)
        parent, last = place // told.shape[2], place % told.shape[2]
        log_prob = total.flatten(1).gather(1, place)
        lens, covered, tokens, *past = (pick_rows(x, parent) for x in (length, covered, tokens, *past))
        tokens, ended = torch.cat((tokens, last[:, :, None]), 2), last == EOS
        least = score.masked_fill(~ended, -math.inf).topk(wanted).values[:, -1:]
        if (ended | (log_prob / norm(frames + 1)[:, None] <= least)).all():
            break
    words, open_ = lens - 1, ~ended  # the end token is none
    real = torch.arange(tokens.shape[2], device=tokens.device) < words[:, :, None]
    return ranked(NBest(tokens * real, words, log_prob.masked_fill(open_, -math.inf), norm(lens),
                        score.masked_fill(open_, -math.inf)))


UNSEEN = 0.01  # of the attention that a frame got: no less, or a single frame would decide


def coverage(covered: Tensor, search: Search) -> Tensor:
    """covered (B,W,L), the attention that each frame got -> (B,W,1), 0 where all got 1 and negative where not."""
    return search.coverage_penalty * covered.clamp(UNSEEN, 1.0).log().sum(-1, keepdim=True)


def join_prefixes(more: Tensor, tokens: Tensor, n: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Where prefix j is prefix i and one token more, and both are in the beam, the way from i to j belongs to j.

    more (B,W,V) log probabilities of a prefix and one token more, tokens (B,W,U), n (B,W) their lengths, alive (B,W)
    -> more without such ways, and what each prefix gets by them (B,W).
    """
    at = (n[:, :, None] - 1).clamp(min=0)
    way = tokens.gather(2, at).transpose(1, 2).expand(-1, more.shape[1], -1)  # (B,W,W): the token from i to j
    cut = tokens.scatter(2, at, BLANK)
    grown = (tokens[:, :, None] == cut[:, None]).all(3) & (n[:, :, None] + 1 == n[:, None]) & alive[:, None]
    joined = more.gather(2, way).masked_fill(~grown, -math.inf).logsumexp(1)
    return more.scatter_reduce(2, way, torch.where(grown, -math.inf, math.inf).to(more), "amin"), joined


def prefix_search(log_p: Tensor, lens: Tensor, W: int) -> NBest:
    """The most probable texts of a CTC model, each the sum over all paths that spell it.

    log_p (B,L,V), lens (B,). At each frame the W best prefixes are kept, with the probability of the paths that end in
    a blank and of those that do not. Source: Graves & Jaitly 2014; Hannun et al. 2014.
    """
    B, L, V = log_p.shape
    log_p = torch.where(padding_mask(lens, L)[:, :, None], log_p, certain(V, BLANK, log_p))  # padding says nothing
    tokens, n = lens.new_zeros(B, W, 1), lens.new_zeros(B, W)
    blank, spoken = certain(W, 0, log_p).expand(B, W), log_p.new_full((B, W), -math.inf)
    for frame in log_p.unbind(1):  # (B,V)
        total = torch.logaddexp(blank, spoken)
        last = tokens.gather(2, (n[:, :, None] - 1).clamp(min=0))  # (B,W,1), BLANK of the empty prefix
        more = total[:, :, None].expand(-1, -1, V).scatter(2, last, blank[:, :, None])  # the same again: after a blank
        more = (more + frame[:, None]).scatter(2, torch.full_like(last, BLANK), -math.inf)
        more, joined = join_prefixes(more, tokens, n, total > -math.inf)
        blank, spoken = total + frame[:, BLANK, None], torch.logaddexp(spoken + frame.gather(1, last[:, :, 0]), joined)
        score, place = torch.cat((torch.logaddexp(blank, spoken), more.flatten(1)), 1).topk(W)
        same = place < W  # a prefix of the beam, else one with a token more
        parent, token = torch.where(same, place, (place - W) // V), (place - W) % V
        tokens, n = F.pad(pick_rows(tokens, parent), (0, 1)), n.gather(1, parent)
        tokens = tokens.scatter_add(2, n[:, :, None], token.masked_fill(same, 0)[:, :, None])
        blank = blank.gather(1, parent).masked_fill(~same, -math.inf)
        spoken = torch.where(same, spoken.gather(1, parent), score)
        n = n + ~same
        tokens = tokens[:, :, :int(n.max()) + 1]  # one column of 0 behind the longest
    return ranked(NBest(tokens, n, score, torch.ones_like(score), score))


def best_expansions(log_p: Tensor, counts: Tensor, W: int) -> tuple[Tensor, Tensor]:
    """The W most probable texts where no position knows of the others: log_p (B,U,V), counts (B,) -> tokens (B,W,U),
    log probabilities (B,W), best first, -inf where there are fewer."""
    U, K = log_p.shape[1], min(W, log_p.shape[2])
    best, ids = log_p.topk(K, 2)
    mask = padding_mask(counts, U)[:, :, None]
    best = torch.where(mask, best, certain(K, 0, log_p))  # past the end there is one choice, for nothing
    total, tokens = certain(W, 0, log_p).expand(len(counts), W), counts.new_zeros(len(counts), W, 0)
    for u in range(U):
        total, place = (total[:, :, None] + best[:, u, None]).flatten(1).topk(W)
        token = ids[:, u].gather(1, place % K)
        tokens = torch.cat((pick_rows(tokens, place // K), token[:, :, None]), 2)
    return tokens * mask.transpose(1, 2), total


COUNT_PRICE = 0.3  # of a token more or less than the firing weights sum to, in mean log probability: chosen on digits


def count_search(emit: Callable, alpha: Tensor, counts: Tensor, W: int) -> NBest:
    """The most probable texts of a Paraformer with its own number of tokens (B,), one fewer and one more.

    emit(counts (3B,)) -> log probabilities (3B,U,V) of three copies of each utterance with so many tokens; alpha (B,L).
    score = mean log probability of the tokens - COUNT_PRICE * |sum of alpha - number of tokens|.
    """
    B = len(counts)
    near = counts[:, None] + torch.tensor([0, -1, 1], device=counts.device)  # (B,3)
    number = near.clamp(min=0).flatten()
    tokens, log_prob = best_expansions(emit(number), number, W)
    tokens, log_prob = tokens.view(B, 3 * W, tokens.shape[2]), log_prob.view(B, 3, W)
    log_prob = log_prob.masked_fill((near < 0)[:, :, None], -math.inf).flatten(1)
    lens = near.clamp(min=0).repeat_interleave(W, 1)  # (B,3W)
    norms = lens.clamp(min=1)
    off = (alpha.double().sum(1, keepdim=True) - lens).abs().float()
    return ranked(NBest(tokens, lens, log_prob, norms, log_prob / norms - COUNT_PRICE * off))


def ctc_scores(log_p: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """log P(tokens) by CTC: log_p (B,L,V), lens (B,), tokens (B,N,U), token_lens (B,N) -> (B,N), -inf if they do not
    fit the frames."""
    (B, N, U), L = tokens.shape, log_p.shape[1]
    tokens = F.pad(tokens, (0, 1)).view(B * N, U + 1)
    special = (tokens == BLANK) | (tokens == SOS) | (tokens == EOS) | ~padding_mask(token_lens.flatten(), U + 1)
    tokens = tokens.gather(1, special.long().argsort(dim=1, stable=True))  # those that CTC does not say behind the others
    names = (tokens[:, :, None] == tokens[:, None, :]).long().argmax(2) + 1  # where a token is first said, from 1
    columns = F.pad(tokens, (1, 0), value=BLANK)[:, None].expand(-1, L, -1)  # the part of V that this text needs
    own = log_p.repeat_interleave(N, 0).gather(2, columns)  # (B*N,L,U+2)
    loss = F.ctc_loss(own.transpose(0, 1), names, lens.repeat_interleave(N), (~special).sum(1), reduction="none")
    return -loss.view(B, N)


def search_paraformer(model: nn.Module, hidden: Tensor, lens: Tensor, search: Search) -> NBest:
    alpha = model.predictor(hidden, lens)
    three = [x.repeat_interleave(3, 0) for x in (hidden, lens, alpha)]
    return count_search(lambda counts: model.emit(*three, counts)[1], alpha, model.count(alpha), search.width)


def search_transformer(model: nn.Module, hidden: Tensor, lens: Tensor, search: Search) -> NBest:
    step, past = model.begin(hidden, lens, search.width)
    return beam_search(step, past, lens, search)


def search_ctc(model: nn.Module, hidden: Tensor, lens: Tensor, search: Search) -> NBest:
    return prefix_search(model.log_probs(hidden), lens, search.width)


SEARCHES = {"paraformer": search_paraformer, "transformer": search_transformer, "ctc": search_ctc}


def find_nbest(system: System, hidden: Tensor, lens: Tensor) -> NBest:
    """What system.search finds behind the encoder: hidden (B,L,D), lens (B,) -> hypotheses, best first. With
    ctc_weight w the score has (1 - w) log_prob + w log P_ctc in the place of log_prob."""
    search, model = system.search, system.model
    found = SEARCHES[system.config.model.name](model, hidden, lens, search)
    if not search.ctc_weight:
        return found
    by_ctc = ctc_scores(model.ctc(hidden).float().log_softmax(-1), lens, found.tokens, found.lens)
    by_ctc = by_ctc.clamp(min=-1e4)  # a text that does not fit the frames is the last one, but there is a text
    joint = found.scores + search.ctc_weight * (by_ctc - found.log_probs) / found.norms
    return ranked(found._replace(scores=torch.where(found.scores.isfinite(), joint, -math.inf)))


def with_search(system: System, search: Search) -> System:
    """The system, searching so. Raises ValueError for what is out of range or has no effect on the system's model."""
    name, usual = system.config.model.name, Search()
    rules = {"beam": (search.beam >= 1, "1 or more"), "nbest": (search.nbest >= 1, "1 or more"),
             "ctc_weight": (0 <= search.ctc_weight <= 1, "between 0 and 1"),
             "length_penalty": (0 <= search.length_penalty < math.inf, "0 or more"),
             "coverage_penalty": (0 <= search.coverage_penalty < math.inf, "0 or more")}
    for field in ("length_penalty", "coverage_penalty") if name != "transformer" else ():
        same = getattr(search, field) == getattr(usual, field)
        rules[field] = (same, f"{getattr(usual, field)}, as it has no effect on a {name}")
    if search.ctc_weight and getattr(system.model, "ctc", None) is None:
        rules["ctc_weight"] = (False, f"0, as this {name} has no CTC head beside its decoder")
    for field, (fits, wanted) in rules.items():
        if not fits:
            raise ValueError(f"--{field.replace('_', '-')}: wanted {wanted}, got {getattr(search, field)}")
    return system._replace(search=search)


# ---- recognition ----


class Token(NamedTuple):
    token: str
    id: int
    confidence: float  # probability of this token, 0 to 1
    start: float  # seconds from the start of the recording
    end: float


class Alternative(NamedTuple):
    text: str
    score: float  # by which they are ranked: higher is better, comparable within an utterance
    confidence: float  # geometric mean of the tokens' probabilities; 0 without tokens


class Result(NamedTuple):
    text: str
    confidence: float  # geometric mean of the tokens' probabilities; 0 without tokens
    tokens: list[Token]
    words: list[Word]  # in seconds, of a PieceTokenizer; else none
    nbest: tuple[Alternative, ...] = ()  # best first, of different texts, the first one's is `text`; where asked for


FIRED = np.float32(1 - 1e-4)  # of the timing head: a sum in float32 that reaches this has fired
FIRE_SHIFT = -1.5  # the timing head fires so many of its frames late
LONGEST, EDGE = 12, 5  # of its frames: a longer token is cut, and a shorter silence at the end belongs to the token


def running_sums(weights: np.ndarray) -> np.ndarray:
    """weights (n,) float32 -> their sum at every step, (n,) float32; where it reaches FIRED that is taken off."""
    sums, total = np.empty_like(weights), np.float32(0)
    for t, weight in enumerate(weights):
        sums[t] = total = total + weight
        total = total - FIRED if total >= FIRED else total
    return sums


def firing_spans(weights: np.ndarray, sums: np.ndarray, n: int) -> list[tuple[float, float]]:
    """Begin and end of n tokens, in frames of the timing head, from its weights and their running sums (both float32).

    A token lasts from one firing to the next. Source: equal to FunASR's ts_prediction_lfr6_standard without <sil>.
    """
    fired = np.flatnonzero(sums >= FIRED) + FIRE_SHIFT
    if len(fired) != n + 1:  # the head saw another number of tokens than the decoder: scale it to that number
        weights = weights if weights.any() else np.ones_like(weights)
        fired = np.flatnonzero(running_sums(weights / (weights.sum() / np.float32(n + 1))) >= FIRED) + FIRE_SHIFT
    missing = max(0, n + 1 - len(fired))  # after scaling too: those times are the end
    fired = np.pad(fired, (0, missing), constant_values=len(weights))[:n + 1]
    spans = [(float(a), float(min(b, a + LONGEST))) for a, b in zip(fired, fired[1:])]
    if spans and spans[-1][1] == fired[-1]:  # the last one was not cut: it goes on into the end
        left = len(weights) - fired[-1]
        spans[-1] = spans[-1][0], float(len(weights) - left / 2 if left > EDGE else len(weights))
    return spans


def token_times(system: System, found: Hypotheses, i: int, spoken: Sequence[int]) -> list[tuple[float, float]]:
    """Seconds at which the tokens at the places `spoken` of utterance i begin and end."""
    options = system.config.model
    if not found.timing:
        edges = (found.boundaries[i] * data.frame_sec(system.config.data)).tolist()
        return [(round(edges[u], 3), round(edges[u + 1], 3)) for u in spoken]
    weights = found.timing[i].float()
    weights = (weights * (found.lens[i] / weights.sum().clamp(min=1e-9))).numpy()
    rate = data.frame_sec(system.config.data) * options.encoder.subsampling / options.predictor.upsampling
    spans = firing_spans(weights, running_sums(weights), len(spoken))
    return [(int(a * rate * 1000) / 1000, int(b * rate * 1000) / 1000) for a, b in spans]  # whole ms, cut as in FunASR


def read_result(system: System, found: Hypotheses, i: int) -> Result:
    """Utterance i of a decoded batch in words and seconds; blank, start and end are no tokens."""
    ids = found.tokens[i, :found.lens[i]].tolist()
    spoken = [u for u, id in enumerate(ids) if id not in (BLANK, SOS, EOS)]
    times, log_probs = token_times(system, found, i, spoken), found.log_probs[i, spoken].double()
    tokens = [Token(system.tokenizer.symbols[ids[u]], ids[u], round(p, 4), start, end)
              for u, p, (start, end) in zip(spoken, log_probs.exp().tolist(), times)]
    confidence = round(log_probs.mean().exp().item(), 4) if spoken else 0.0
    if not isinstance(system.tokenizer, PieceTokenizer):
        return Result(system.tokenizer.decode(ids), confidence, tokens, [])
    words = spell_words([token.token for token in tokens], times, system.lossless)
    text = " ".join(word.text for word in words) if found.timing else join_words(words)
    return Result(text, confidence, tokens, words)


def read_alternatives(system: System, found: NBest, i: int, text: str) -> tuple[Alternative, ...]:
    """The search.nbest best hypotheses of utterance i that differ in text; `text` is the best one's."""
    kept: dict[str, Alternative] = {}
    rows = zip(found.tokens[i], found.lens[i].tolist(), found.log_probs[i].tolist(), found.scores[i].tolist())
    for rank, (tokens, n, log_prob, score) in enumerate(rows):
        words = text if rank == 0 else system.tokenizer.decode(tokens[:n].tolist())
        if math.isfinite(score):
            kept.setdefault(words, Alternative(words, round(score, 4), round(math.exp(log_prob / n), 4) if n else 0.0))
    return tuple(kept.values())[:system.search.nbest]


@torch.inference_mode()
def search_batch(system: System, feats: Sequence[Tensor],
                 need_weights: bool = False) -> tuple[Hypotheses, NBest | None]:
    """Normalised features (T,F) each -> Hypotheses and, unless it was found greedily, the n-best; on the CPU."""
    lens = torch.tensor([len(x) for x in feats])
    padded = torch.nn.utils.rnn.pad_sequence(list(feats), batch_first=True)
    device = system.stats.device
    dtype = PRECISIONS[system.precision]
    padded, lens, best = padded.to(device), lens.to(device), None
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if system.search == Search():
            found = system.model.greedy(padded, lens, need_weights)
        else:
            hidden, hidden_lens = encode(system.model.encoder, padded, lens)
    if system.search != Search():  # without autocast, as greedy does it behind the encoder
        best = find_nbest(system, hidden, hidden_lens)
        found = system.model.decode(hidden, hidden_lens, lens, need_weights, best.tokens[:, 0], best.lens[:, 0])
        best = NBest(*(x.cpu() for x in best))
    return Hypotheses(*(x.cpu() if isinstance(x, Tensor) else [a.cpu() for a in x] for x in found)), best


def decode_batch(system: System, feats: Sequence[Tensor], need_weights: bool = False) -> Hypotheses:
    """Normalised features (T,F) each -> Hypotheses, on the CPU. Fewer frames than one, and T = 0, give no tokens."""
    return search_batch(system, feats, need_weights)[0]


def transcribe(system: System, feats: Sequence[Tensor]) -> list[Result]:
    """Normalised features (T,F) of some utterances, as `data.frontend` makes them -> a Result each, in one batch."""
    spoken = [i for i, x in enumerate(feats) if len(x)]
    results = [Result("", 0.0, [], [])] * len(feats)
    if spoken:
        found, best = search_batch(system, [feats[i] for i in spoken])
        for row, i in enumerate(spoken):
            results[i] = read_result(system, found, row)
            if best is not None and system.search.nbest > 1:
                results[i] = results[i]._replace(nbest=read_alternatives(system, best, row, results[i].text))
    return results


# ---- pictures ----

PALETTE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # dark to bright, as viridis
SVG_STYLE = ("text{font:12px sans-serif;fill:#333} path{fill:none} .axis{stroke:#888}"
             " .fire{stroke:#e45756;stroke-width:1.5} .true{stroke:#fff;stroke-dasharray:3 3}"
             " .weight{fill:#4c78a8} .sum{stroke:#f58518;stroke-width:1.5}"
             " @media(prefers-color-scheme:dark){svg{background:#1b1b1b} text{fill:#ddd} .weight{fill:#7aa6d6}}")
LEFT, WIDTH = 90, 900  # pixels: of the plots within the picture


def heat_map(values: np.ndarray) -> str:
    """values (rows, columns), row 0 at the top, smallest dark and largest bright -> a PNG as a data: URI."""
    low, high = float(values.min()), float(values.max())
    levels = np.rint((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    colours = np.stack([np.interp(np.linspace(0, 4, 256), range(5), channel) for channel in zip(*PALETTE)], 1)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *values.shape[::-1], 8, 3, 0, 0, 0)),  # 8 bits a pixel, by palette
              (b"PLTE", np.rint(colours).astype(np.uint8).tobytes()),
              (b"IDAT", zlib.compress(np.pad(levels, ((0, 0), (1, 0))).tobytes())),  # filter type 0 before each row
              (b"IEND", b"")]
    image = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)
    return "data:image/png;base64," + base64.b64encode(image).decode()


def picture(title: str, height: int, body: Sequence[str]) -> str:
    """An SVG document with a title line, readable on light and dark ground."""
    width = LEFT + WIDTH + 20
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f'<style>{SVG_STYLE}</style><text x="{LEFT}" y="20" font-weight="bold">{html.escape(title)}</text>'
            f'{"".join(body)}</svg>\n')


def image_svg(values: np.ndarray, y: float, height: float) -> str:
    return (f'<image x="{LEFT}" y="{y}" width="{WIDTH}" height="{height}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="{heat_map(values)}"/>')


def label_svg(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape("␣" if text == " " else text)}</text>'


def time_axis(seconds: float, y: float) -> str:
    """A line under the plots with about ten labelled ticks."""
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600) if seconds / s <= 12 or s == 3600)
    ticks = [(LEFT + WIDTH * k * step / seconds, f"{k * step:.4g}") for k in range(int(seconds / step) + 1)]
    marks = "".join(f'<path class="axis" d="M{x:.1f} {y}v5"/>{label_svg(x, y + 19, label)}' for x, label in ticks)
    return f'<path class="axis" d="M{LEFT} {y}h{WIDTH}"/>{marks}{label_svg(LEFT + WIDTH, y + 34, "seconds", "end")}'


def firing_svg(alpha: Tensor, bottom: float, height: float) -> list[str]:
    """The weights alpha (L,) as bars and their running sum as a line, both from `bottom` up."""
    frame, total = WIDTH / len(alpha), alpha.cumsum(0)
    width, full = max(frame - 0.5, 0.5), max(1.0, float(total[-1]))
    bars = [(LEFT + i * frame, height * w / max(1.0, float(alpha.max()))) for i, w in enumerate(alpha.tolist())]
    body = [f'<rect class="weight" x="{x:.1f}" y="{bottom - h:.1f}" width="{width:.1f}" height="{h:.1f}"/>'
            for x, h in bars if h > 0.1]
    heights = (height * total / full).tolist()
    line = "L".join(f"{LEFT + (i + 1) * frame:.1f} {bottom - h:.1f}" for i, h in enumerate(heights))
    return body + [f'<path class="sum" d="M{LEFT} {bottom}L{line}"/>',
                   label_svg(LEFT - 8, bottom - height / 2, "weights", "end"),
                   label_svg(LEFT - 8, bottom - height / 2 + 18, f"sum {float(total[-1]):.2f}", "end")]


def alignment_svg(title: str, feats: Tensor, alpha: Tensor, result: Result, seconds: float,
                  truth: Tensor | None = None) -> str:
    """The features (T,F) with the tokens and their boundaries over them, and below them the firing weights alpha (L,)
    with their running sum; `truth` (U+1,) are true boundaries in seconds, drawn dashed."""
    x = lambda t: LEFT + WIDTH * t / seconds
    edges = [token.start for token in result.tokens] + [token.end for token in result.tokens[-1:]]
    lines = 1 if len(result.tokens) < 60 else 3  # labels of many tokens stand on three lines
    body = [image_svg(feats.T.flip(0).numpy(), 70, 200), label_svg(LEFT - 8, 170, "features", "end")]
    body += [f'<path class="true" d="M{x(t):.1f} 70v200"/>' for t in ([] if truth is None else truth.tolist())]
    body += [f'<path class="fire" d="M{x(t):.1f} 60v340"/>' for t in edges]
    body += [label_svg(x((token.start + token.end) / 2), 55 - 11 * (i % lines), token.token)
             for i, token in enumerate(result.tokens)]
    return picture(title, 444, body + firing_svg(alpha, 400, 110) + [time_axis(seconds, 402)])


def attention_svg(title: str, weights: Tensor, tokens: Sequence[str], seconds: float) -> str:
    """Attention weights (U,L) of the tokens over the encoder frames, a row per token."""
    height = max(60, min(22 * len(tokens), 16 * 60))
    row = height / max(1, len(tokens))
    every = max(1, round(13 / row))  # labels that would overlap are left out
    body = [image_svg(weights.numpy(), 34, height)] if weights.numel() else []
    body += [label_svg(LEFT - 8, 38 + (i + 0.5) * row, tokens[i], "end") for i in range(0, len(tokens), every)]
    return picture(title, int(height) + 76, body + [time_axis(seconds, 36 + height)])


def write_pictures(folder: Path, system: System, item: data.Utterance) -> None:
    """KEY.alignment.svg and KEY.attention.svg (last layer, mean of the heads) of one utterance that has frames."""
    found = decode_batch(system, [item.feats], need_weights=True)
    result, frame_sec = read_result(system, found, 0), data.frame_sec(system.config.data)
    seconds = len(item.feats) * frame_sec
    truth = None if item.boundaries is None else item.boundaries * frame_sec
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in item.key)
    title = f"{item.key}: {result.text}"
    rows = [u for u, id in enumerate(found.tokens[0].tolist()) if id not in (BLANK, SOS, EOS)]  # as in the result
    attention = attention_svg(title, found.attention[-1][0].mean(0)[rows], [t.token for t in result.tokens], seconds)
    data.write_atomic(folder / f"{name}.alignment.svg",
                      alignment_svg(title, item.feats, found.alpha[0], result, seconds, truth))
    data.write_atomic(folder / f"{name}.attention.svg", attention)


# ---- the report ----


class Tally(NamedTuple):
    """Sums over the utterances that have a reference; every rate is divided at the end."""

    tokens: Counts = Counts()
    chars: Counts = Counts()
    words: Counts = Counts()
    right: int = 0
    utterances: int = 0

    def with_utterance(self, system: System, text: str, result: Result) -> "Tally":
        ref, hyp = system.tokenizer.encode(text), [token.id for token in result.tokens]
        return Tally(self.tokens + count_errors(ref, hyp), self.chars + char_errors(text, result.text),
                     self.words + word_errors(text, result.text), self.right + (ref == hyp), self.utterances + 1)

    def lines(self) -> list[str]:
        words, exact = self.words, self.right / max(1, self.utterances)
        return [f"token accuracy {token_accuracy(self.tokens):.4f}  sequence accuracy {exact:.4f}  "
                f"({self.utterances} utterances with a reference)",
                f"%WER {100 * words.rate:.2f} [ {words.errors} / {words.ref}, {words.ins} ins, {words.del_} del, "
                f"{words.sub} sub ]  %CER {100 * self.chars.rate:.2f}"]


def json_line(key: str, reference: str, seconds: float, result: Result) -> str:
    """One line of --output."""
    row = {"key": key, "text": result.text, "confidence": result.confidence, "duration": round(seconds, 3),
           "tokens": [token._asdict() for token in result.tokens]}
    if result.words:
        row["words"] = [{"word": word.text, "start": word.start, "end": word.end} for word in result.words]
    return json.dumps({**row, "reference": reference} if reference else row, ensure_ascii=False)


# ---- exports ----


def save_tensors(path: Path, state: dict) -> None:
    """torch.save that replaces the file whole, without a second copy in memory."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def export_directory(system: System, folder: Path) -> None:
    """Write a directory that FunASR loads. Raises ValueError for a model that it has no classes for."""
    weights = {}
    for name, x in system.model.state_dict().items():
        theirs = funasr_names(name, system.config.model)
        weights |= {part: y.clone() for part, y in zip(theirs, x.chunk(len(theirs)) if len(theirs) > 1 else [x])}
    config, tokenizer = configs.dump_published(system.config), system.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    special = dict(zip(SPECIALS, ("<blank>", "<s>", "</s>", "<unk>")))
    symbols = [special.get(symbol, symbol) for symbol in tokenizer.symbols]
    pieces = getattr(tokenizer, "pieces", None)
    if pieces is None and getattr(tokenizer, "unit", "") == "word":
        pieces = {symbol: (symbol,) for symbol in symbols[len(SPECIALS):]}
    data.write_atomic(folder / "config.yaml", config)
    data.write_atomic(folder / "tokens.json", json.dumps(symbols, ensure_ascii=False, indent=0) + "\n")
    data.write_cmvn(folder / "am.mvn", system.stats.cpu())
    if pieces is not None:
        lines = [" ".join([word, *parts]) for word, parts in pieces.items()]
        data.write_atomic(folder / "seg_dict", "\n".join(lines) + "\n")
    save_tensors(folder / "model.pt", weights)


def export(system: System, path: str) -> str:
    """Write the model without optimizer state -> what was written, in words.

    Where path ends in .pt, a checkpoint of ours; else a directory: FunASR's where it has classes for the model, one with
    checkpoint.pt of ours where not.
    """
    place, reason = Path(path), ""
    if place.suffix != ".pt":
        try:
            export_directory(system, place)
            return f"{place}: a FunASR directory"
        except ValueError as error:
            place, reason = place / "checkpoint.pt", f"; no FunASR directory: {error}"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(place, {"config": configs.to_dict(system.config), "tokenizer": system.tokenizer.state(),
                         "stats": system.stats.cpu(), "model": system.model.state_dict()})
    return f"{place}: a checkpoint{reason}"


# ---- figures ----

MEASURE = """
import re, sys, time, torch
torch.set_num_threads(2)
peak_mb = lambda: int(re.search("VmHWM: *\t *([0-9]+)", open("/proc/self/status").read())[1]) * 1.024e-3
before, started = peak_mb(), time.perf_counter()
import data, decode
system = decode.load_system(sys.argv[1], "cpu")
loaded = time.perf_counter()
samples = torch.randn(160000, generator=torch.Generator().manual_seed(0)) / 50
spent = []
for _ in range(3):
    at = time.perf_counter()
    result = decode.transcribe(system, [data.frontend(samples, 16000, system.config.data, system.stats)])[0]
    spent.append(time.perf_counter() - at)
peak = peak_mb()
weights = sum(x.numel() * x.element_size() for x in system.model.state_dict().values()) / 1e6
print(f"import, build and load {weights:.0f} MB of weights: {loaded - started:.2f} s")
print(f"10 s of audio, {len(result.tokens)} tokens, 2 threads: {' '.join(f'{s:.2f}' for s in spent)} s")
print(f"peak memory {peak:.0f} MB, {peak / weights:.2f} x the weights; {before:.0f} MB of it before loading (torch)")
"""


def benchmark() -> int:
    """Print how fast and in how much memory a model of configs/paraformer_large.yaml with random weights loads and
    runs, measured in a fresh process."""
    here = Path(__file__).resolve().parent
    config = configs.load(str(here / "configs/paraformer_large.yaml"))
    symbols = ("<blank>", "<s>", "</s>", *(chr(0x4e00 + i) for i in range(8400)), "<unk>")
    torch.manual_seed(0)
    model = build(config.model, data.feature_dim(config.data), len(symbols))
    system = System(config, PieceTokenizer(symbols, None), torch.stack([torch.zeros(560), torch.ones(560) / 4]), model)
    with tempfile.TemporaryDirectory() as folder:
        export_directory(system, Path(folder))
        passive = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads that spin are slow on a machine that is shared
        return subprocess.run([sys.executable, "-c", MEASURE, folder], cwd=here, env=passive).returncode


# ---- main ----


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recognise speech.", epilog="Without INPUT: the checkpoint's own toy "
                                     "data, or the test (else dev) manifest of its config.")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="WAV files, manifests (.jsonl) or Kaldi folders")
    parser.add_argument("--ckpt", "--checkpoint", default=DEFAULT_CHECKPOINT,
                        help=f"a checkpoint, or a model directory of FunASR (default: {DEFAULT_CHECKPOINT})")
    parser.add_argument("--export", metavar="PATH", help="write the model alone and recognise nothing without INPUT: "
                        "FILE.pt as a checkpoint, any other path as a directory, FunASR's if it knows the model")
    parser.add_argument("--funasr-text", action="store_true", help="also lose the characters that FunASR's text loses")
    parser.add_argument("--output", metavar="FILE", help="write JSON lines: text, confidence, tokens with times")
    parser.add_argument("--plot", metavar="DIR", help="write pictures of each utterance (with --limit, of so many)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N utterances; 0 = all")
    parser.add_argument("--batch-size", type=int, default=16, help="utterances in a batch (default 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--precision", default="float32", choices=list(PRECISIONS), help="of matrix products")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 = torch's own choice")
    parser.add_argument("--beam", type=int, default=Search().beam, help="hypotheses kept at a time (default 1: greedy)")
    parser.add_argument("--nbest", type=int, default=Search().nbest, help="alternatives of each utterance (default 1)")
    parser.add_argument("--length-penalty", type=float, default=Search().length_penalty,
                        help="of a transformer's beam: 0 favours short texts (default 0.6)")
    parser.add_argument("--coverage-penalty", type=float, default=Search().coverage_penalty,
                        help="of a transformer's beam: for frames that got little attention (default 0)")
    parser.add_argument("--ctc-weight", type=float, default=Search().ctc_weight,
                        help="share of the CTC head, if the model has one, in the score (default 0)")
    parser.add_argument("--benchmark", action="store_true", help="only measure loading and decoding of the true-size "
                        "model of configs/paraformer_large.yaml with random weights")
    arguments = parser.parse_args(argv)
    for name, least in (("limit", 0), ("batch_size", 1), ("threads", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(arguments, name)}")
    return arguments


def open_inputs(system: System, inputs: Sequence[str]) -> torch.utils.data.Dataset:
    """A dataset of the inputs, or of the checkpoint's own toy data or test manifest where there are none."""
    options, encode = system.config.data, system.tokenizer.encode
    stats = system.stats.cpu()
    if not inputs and options.kind == "manifest" and not (options.test or options.dev):
        raise ValueError("wanted INPUT: the checkpoint names no test or dev manifest")
    if options.kind == "toy" and not inputs:
        return data.open_dataset(options, "test", encode, system.config.training.seed, stats)
    rows = data.read_inputs(inputs or [options.test or options.dev])
    return data.ManifestDataset(rows, options, encode, stats=stats, for_training=False)


def recognise(system: System, dataset: torch.utils.data.Dataset, batch_size: int,
              limit: int) -> Iterator[tuple[int, data.Utterance | data.Skip, Result | None]]:
    """The first `limit` items (0: all), each with its number and, unless it is a Skip, its Result; shortest first."""
    for indices in data.make_batches(dataset.lengths[:limit or None], batch_size, BATCH_FRAMES, shuffle=False):
        items = [dataset[i] for i in indices]
        results = iter(transcribe(system, [item.feats for item in items if isinstance(item, data.Utterance)]))
        for i, item in zip(indices, items):
            yield i, item, next(results) if isinstance(item, data.Utterance) else None


def run(arguments: argparse.Namespace) -> int:
    """Recognise everything, print in the order of the inputs, report -> exit code."""
    system = load_system(arguments.ckpt, arguments.device)
    system = system._replace(lossless=not arguments.funasr_text, precision=arguments.precision)
    system = with_search(system, Search(*(getattr(arguments, field) for field in Search._fields)))
    if arguments.export:
        print(f"decode.py: wrote {export(system, arguments.export)}", file=sys.stderr)
        if not arguments.inputs:
            return 0
    dataset = open_inputs(system, arguments.inputs)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    if arguments.plot:
        Path(arguments.plot).mkdir(parents=True, exist_ok=True)
    started, seconds, failed, tally = time.perf_counter(), 0.0, 0, Tally()
    lines, texts, spoken = {}, {}, []
    for i, item, result in recognise(system, dataset, arguments.batch_size, arguments.limit):
        if result is None:
            print(f"decode.py: {item.key}: {item.reason}", file=sys.stderr)
            failed += 1
            continue
        seconds += item.seconds
        lines[i], texts[i] = json_line(item.key, item.text, item.seconds, result), f"{item.key}\t{result.text}"
        spoken += [i] if len(item.feats) else []
        tally = tally.with_utterance(system, item.text, result) if item.text else tally
    spent = time.perf_counter() - started
    if texts:
        print("\n".join(texts[i] for i in sorted(texts)))
    if arguments.output:
        data.write_atomic(arguments.output, "".join(lines[i] + "\n" for i in sorted(lines)))
    for i in sorted(spoken) if arguments.plot else ():
        write_pictures(Path(arguments.plot), system, dataset[i])
    for line in tally.lines() if tally.utterances else ():
        print(line, file=sys.stderr)
    print(f"{len(texts)} utterances, {seconds:.1f} s of audio in {spent:.2f} s, real-time factor "
          f"{spent / max(seconds, 1e-9):.4f}; {failed} could not be read", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        return benchmark() if arguments.benchmark else run(arguments)
    except (ValueError, OSError) as error:
        print(f"decode.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
