"""The models that a Paraformer is compared with, an autoregressive transformer and CTC, and their searches.

Reading order: the models, then the searches. Needs torch, numpy, attention.py, model.py and tokenizer.py.

Dims: B utterances, L encoder frames, U tokens, D model width, V vocabulary, W beam.
Sources: Vaswani et al. 2017 (transformer); Graves et al. 2006 (CTC); Wu et al. 2016 "GNMT"; Hannun et al. 2014.
"""
import collections
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attention import (PositionalEncoding, TransformerBlock, causal_mask, check_lens, check_shapes, key_mask,
                       padding_mask, run_blocks)
from model import Hypotheses, Recogniser, cross_entropy_sum, ctc_sum, edges_between, in_feature_frames
from tokenizer import BLANK, EOS, SOS


# ---- models ----

class CausalDecoder(nn.Module):
    """Autoregressive transformer: each token is predicted from those before it and cross-attention to the encoder."""

    def __init__(self, source_dim: int, vocab_size: int, options):
        super().__init__()
        D = options.hidden_dim
        self.embedding = nn.Embedding(vocab_size, D)
        self.position = PositionalEncoding(D, options.position)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(options, source_dim) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(D)
        self.output = nn.Linear(D, vocab_size)

    def forward(self, tokens: Tensor, hidden: Tensor, hidden_lens: Tensor,
                need_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """tokens (B,U), from the start token on, hidden (B,L,Dm), hidden_lens (B,) -> logits (B,U,V) of the token after
        each, and the cross-attention weights (B,H,U,L) of each layer where asked for."""
        mask = causal_mask(tokens.shape[1], tokens.device).expand(len(tokens), -1, -1)
        hidden_mask = key_mask(hidden_lens, hidden.shape[1])
        x = self.dropout(self.position(self.embedding(tokens)))
        x, layers = run_blocks(self.blocks, x, mask, hidden, hidden_mask, need_weights=need_weights)
        return self.output(self.norm(x)), layers


def token_edges(centres: Sequence[float], L: int, T: int, encoder) -> Tensor:
    """Boundaries (n+1,) in feature frames, in 0..T, of tokens with these centres in encoder frames, in 0..L."""
    return in_feature_frames(edges_between(np.array(centres), L), encoder).clamp(0, T)


class Transformer(Recogniser):
    """Autoregressive encoder-decoder, with a CTC head on the encoder. Source: Vaswani et al. 2017."""

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__(options, input_dim)
        D = options.encoder.hidden_dim
        self.decoder = CausalDecoder(D, vocab_size, options.decoder)
        self.ctc = nn.Linear(D, vocab_size) if options.ctc_weight else None

    def forward(self, feats: Tensor, feat_lens: Tensor, tokens: Tensor,
                token_lens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Training losses with teacher forcing, as Paraformer.forward. The end token counts as a token."""
        hidden, hidden_lens, _ = self.encoder(feats, feat_lens)
        check_shapes(feats=(feats, "B", "T", "F"), tokens=(tokens, "B", "U"))
        check_lens("token_lens", token_lens, *tokens.shape)
        targets = F.pad(tokens, (0, 1)).scatter(1, token_lens[:, None], EOS)
        logits, _ = self.decoder(F.pad(tokens, (1, 0), value=SOS), hidden, hidden_lens)
        sums = {"ce": cross_entropy_sum(logits, targets, token_lens + 1, self.options.label_smoothing)}
        if self.ctc is not None:
            sums["ctc"] = ctc_sum(self.ctc(hidden), hidden_lens, tokens, token_lens)
        return self.total(sums), self.divisor(token_lens + 1)

    def begin(self, hidden: Tensor, hidden_lens: Tensor, W: int) -> tuple[Callable, list[Tensor]]:
        """hidden (B,L,D), hidden_lens (B,) -> step, past of W hypotheses of each utterance.
        step(tokens (B,W), the last of each, past) -> log probabilities (B,W,V) of the next token, past with these
        tokens, attention (B,W,L) of the last layer, mean of the heads. `past` is keys and values (B,W,H,t,K) layer by
        layer; a search that reorders hypotheses must reorder them along W too."""
        decoder = self.decoder
        sources = [block.cross_attention.keys_values(hidden) for block in decoder.blocks]  # which no step changes
        B, H, _, K = sources[0][0].shape
        mask = key_mask(hidden_lens, hidden.shape[1])

        def step(tokens: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
            x = decoder.position(decoder.embedding(tokens).flatten(0, 1)[:, None], past[0].shape[3])  # (B*W,1,D)
            x = x.view(*tokens.shape, x.shape[2])
            longer = []
            for block, keys, values, source in zip(decoder.blocks, past[::2], past[1::2], sources):
                x, keys_values, weights = block.step(x, (keys, values), source, mask)
                longer += keys_values  # two tensors
            return decoder.output(decoder.norm(x)).log_softmax(-1), longer, weights.mean(1)

        return step, [hidden.new_zeros(B, W, H, 0, K)] * (2 * len(sources))

    def greedy_tokens(self, hidden: Tensor, hidden_lens: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B,L,D), hidden_lens (B,) -> tokens (B,U), lens (B,): one at a time, each the argmax, until the end
        token or until there are as many tokens as encoder frames."""
        step, past = self.begin(hidden, hidden_lens, 1)
        last = torch.full_like(hidden_lens, SOS)[:, None]  # (B,1)
        lens = torch.zeros_like(hidden_lens)
        found = []
        while True:
            log_p, past, _ = step(last, past)
            last = log_p.argmax(-1)
            goes_on = (lens == len(found)) & (last[:, 0] != EOS) & (lens < hidden_lens)
            if not goes_on.any():
                break
            found.append(last)
            lens = lens + goes_on
        return torch.cat(found, 1) if found else lens.new_zeros(len(lens), 0), lens

    def search(self, hidden: Tensor, hidden_lens: Tensor, search: "Search") -> list[list["Candidate"]]:
        """hidden (B,L,D), hidden_lens (B,) -> what beam search finds for each utterance, best first."""
        return beam_search(*self.begin(hidden, hidden_lens, search.width), hidden_lens, search)

    def decode(self, hidden: Tensor, hidden_lens: Tensor, feat_lens: Tensor,
               texts: Sequence[list[int]] | None = None) -> Hypotheses:
        """As Paraformer.decode: one pass over all tokens, those of greedy decoding or of the texts of a search.
        A token is centred where the last layer's attention peaks, but not before the previous token. alpha is the
        attention that a frame gets from all tokens, mean of the heads, so that it sums to their number."""
        if texts is None:
            tokens, lens = self.greedy_tokens(hidden, hidden_lens)
        else:
            lens = hidden_lens.new_tensor([len(text) for text in texts])
            tokens = pad_sequence([lens.new_tensor(text) for text in texts], batch_first=True)
        mask = padding_mask(lens, tokens.shape[1])
        tokens = tokens * mask
        logits, layers = self.decoder(F.pad(tokens, (1, 0), value=SOS)[:, :-1], hidden, hidden_lens, need_weights=True)
        log_p = logits.float().log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2) * mask
        attention = layers[-1].float().mean(1) * mask[:, :, None]  # (B,U,L)
        centres = (attention.argmax(-1) + 0.5).cummax(1).values
        rows = zip(centres.tolist(), lens.tolist(), hidden_lens.tolist(), feat_lens.tolist())
        edges = [token_edges(row[:n], L, T, self.options.encoder) for row, n, L, T in rows]
        return Hypotheses(tokens, lens, log_p, edges, attention.sum(1), [])

    def cross_attention(self, hidden: Tensor, hidden_lens: Tensor, tokens: Tensor, lens: Tensor) -> list[Tensor]:
        """As Paraformer.cross_attention."""
        return self.decoder(F.pad(tokens, (1, 0), value=SOS)[:, :-1], hidden, hidden_lens, need_weights=True)[1]


def ctc_path(log_p: Tensor, tokens: Sequence[int]) -> list[int]:
    """The most probable CTC path that spells the tokens: log_p (L,V) -> L ids.
    There must be a frame for each token and one more between equal neighbours. Viterbi over the 2U + 1 states blank,
    token 1, blank, ..., token U, blank."""
    states = [BLANK]
    for token in tokens:
        states += [token, BLANK]
    scores = [0.0] + [-math.inf] * (len(states) - 1)  # a path begins in the first blank or, a step on, in token 1
    steps = []  # of each frame, for each state: how many states back its best path comes from
    for frame in log_p.tolist():
        taken = [best_step(scores, states, s) for s in range(len(states))]
        scores = [scores[s - step] + frame[states[s]] for s, step in enumerate(taken)]
        steps.append(taken)
    here = len(states) - 1
    if tokens and scores[here] < scores[here - 1]:
        here -= 1
    path = []
    for taken in reversed(steps):
        path.append(states[here])
        here -= taken[here]
    return path[::-1]


def best_step(scores: Sequence[float], states: Sequence[int], s: int) -> int:
    """How many states before s the most probable path that may go on to s has come: 0, 1 or 2."""
    steps = [0]
    if s >= 1:
        steps.append(1)
    if s >= 2 and states[s] not in (BLANK, states[s - 2]):  # over a blank to another token
        steps.append(2)
    return max(steps, key=lambda step: scores[s - step])


def loudest_frames(log_p: Tensor, path: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens that a CTC path says, and of each the frame on it that says it loudest. log_p (L,V)."""
    tokens = []
    frames = []
    end = 0
    for token, run in itertools.groupby(path):
        start = end
        end += len(list(run))
        if token != BLANK:
            tokens.append(token)
            frames.append(start + int(log_p[start:end, token].argmax()))
    return tokens, frames


class CTC(Recogniser):
    """The encoder and one linear layer: every frame gives a token or blank. Source: Graves et al. 2006."""

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__(options, input_dim)
        self.output = nn.Linear(options.encoder.hidden_dim, vocab_size)

    def forward(self, feats: Tensor, feat_lens: Tensor, tokens: Tensor,
                token_lens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The CTC loss; arguments and result as Paraformer.forward."""
        hidden, hidden_lens, _ = self.encoder(feats, feat_lens)
        loss = ctc_sum(self.output(hidden), hidden_lens, tokens, token_lens)
        return {"loss": loss, "ctc": loss}, self.divisor(token_lens)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """hidden (B,L,D) -> (B,L,V) float32."""
        return self.output(hidden).float().log_softmax(-1)

    def search(self, hidden: Tensor, hidden_lens: Tensor, search: "Search") -> list[list["Candidate"]]:
        """hidden (B,L,D), hidden_lens (B,) -> what prefix search finds for each utterance, best first."""
        log_p = self.log_probs(hidden)
        return [prefix_search(log_p[i, :n], search.width) for i, n in enumerate(hidden_lens.tolist())]

    def decode(self, hidden: Tensor, hidden_lens: Tensor, feat_lens: Tensor,
               texts: Sequence[list[int]] | None = None) -> Hypotheses:
        """As Paraformer.decode: the tokens of the best path, or of the best path of each text of a search.
        A token has its centre and probability from its most probable frame on the path. alpha: of not being blank."""
        B, L, _ = hidden.shape
        log_p = self.log_probs(hidden)
        tokens = hidden_lens.new_zeros(B, L)  # at most a token a frame
        log_probs = log_p.new_zeros(B, L)
        counts = []
        edges = []
        for i, (n, T) in enumerate(zip(hidden_lens.tolist(), feat_lens.tolist())):
            real = log_p[i, :n]
            path = real.argmax(-1).tolist() if texts is None else ctc_path(real, texts[i])
            said, frames = loudest_frames(real, path)
            U = len(said)
            tokens[i, :U] = tokens.new_tensor(said)
            log_probs[i, :U] = real[frames, said]
            counts.append(U)
            edges.append(token_edges([frame + 0.5 for frame in frames], n, T, self.options.encoder))
        U = max(counts, default=0)
        alpha = (1 - log_p[:, :, BLANK].exp()) * padding_mask(hidden_lens, L)
        return Hypotheses(tokens[:, :U], hidden_lens.new_tensor(counts), log_probs[:, :U], edges, alpha, [])

    def cross_attention(self, hidden: Tensor, hidden_lens: Tensor, tokens: Tensor, lens: Tensor) -> list[Tensor]:
        """In place of Paraformer.cross_attention, (B,1,U,L): the probability of each token in each frame."""
        L = hidden.shape[1]
        log_p = self.log_probs(hidden).transpose(1, 2).gather(1, tokens[:, :, None].expand(-1, -1, L))  # (B,U,L)
        real = padding_mask(lens, tokens.shape[1])[:, :, None] & padding_mask(hidden_lens, L)[:, None, :]
        return [(log_p.exp() * real)[:, None]]


# ---- search ----

class Search(NamedTuple):
    """How hypotheses are found. Search(), all defaults, is greedy decoding by the model itself."""

    beam: int = 1  # hypotheses kept at a time
    nbest: int = 1  # alternatives in a Result, if more than 1; the beam is at least as wide
    length_penalty: float = 0.6  # transformer: log probability is divided by ((5 + length) / 6) ** length_penalty
    coverage_penalty: float = 0.0  # transformer: weight of sum over frames of log(min(1, attention that it got))

    @property
    def width(self) -> int:
        return max(self.beam, self.nbest)


def check_search(search: Search, model: nn.Module, name: str) -> None:
    """Raises ValueError, with decode.py's option, for what is out of range or has no effect on a model of this name."""
    if search != Search() and not hasattr(model, "search"):
        raise ValueError(f"a {name} model decodes greedily: leave out --beam, --nbest and penalties")
    for field in ("beam", "nbest"):
        value = getattr(search, field)
        if not 1 <= value < 2**31:
            raise ValueError(f"--{field}: wanted 1 or more, below 2^31, got {value}")
    for field in ("length_penalty", "coverage_penalty"):
        option = f"--{field.replace('_', '-')}"
        value = getattr(search, field)
        usual = getattr(Search(), field)
        if not 0 <= value < math.inf:
            raise ValueError(f"{option}: wanted 0 or more, got {value}")
        if name != "transformer" and value != usual:
            raise ValueError(f"{option}: wanted {usual}, as it has no effect on a {name}, got {value}")


class Candidate(NamedTuple):
    """A text that a search has found. Its result is a list of them for each utterance, best first."""

    tokens: list[int]
    log_prob: float  # of the whole text
    score: float  # by which it is ranked


UNSEEN = 0.01  # the attention that a frame counts as having got at least, or the log of one frame would decide


class Beam(NamedTuple):
    """W hypotheses of each utterance. One that has ended stays as long as its score is among the W best."""

    tokens: Tensor  # (B,W,1+t) int64 from the start token on; behind the end token, end tokens
    lens: Tensor  # (B,W) int64 tokens, the end token counted
    ended: Tensor  # (B,W) bool
    log_probs: Tensor  # (B,W)
    scores: Tensor  # (B,W)
    covered: Tensor  # (B,W,L) the attention that each frame has got; 1 where it pads


def pick_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B,W,...), index (B,N) -> (B,N,...): x[b, index[b, n]]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def length_norm(lens: Tensor, search: Search) -> Tensor:
    """What log probabilities of texts with so many tokens are divided by."""
    return ((5 + lens) / 6) ** search.length_penalty


def begin_beam(frames: Tensor, W: int) -> Beam:
    """One empty text; the other W - 1 are impossible. frames (B,) of each utterance."""
    B = len(frames)
    L = int(frames.max())
    lens = frames.new_zeros(B, W)
    log_probs = torch.full((B, W), -math.inf, device=frames.device)
    log_probs[:, 0] = 0.0
    covered = (~padding_mask(frames, L)).float()[:, None].expand(B, W, L)
    return Beam(lens[:, :, None] + SOS, lens, lens.bool(), log_probs, log_probs, covered)


def extend_beam(beam: Beam, log_p: Tensor, attention: Tensor, last: Tensor, search: Search) -> tuple[Beam, Tensor]:
    """The best of all texts with one token more, and of those that have ended.
    log_p (B,W,V) of the next token, attention (B,W,>=L), last (B,) bool: it must be the end token -> Beam, (B,W) which
    hypothesis of the old one each comes from."""
    B, W, V = log_p.shape
    end = log_p.new_full((V,), -math.inf)
    end[EOS] = 0.0
    log_p = torch.where(last[:, None, None], log_p + end, log_p)
    log_p = torch.where(beam.ended[:, :, None], end, log_p)  # no change, at no cost
    lens = torch.where(beam.ended, beam.lens, beam.lens + 1)
    covered = beam.covered + attention[:, :, :beam.covered.shape[2]].masked_fill(beam.ended[:, :, None], 0.0)
    coverage = search.coverage_penalty * covered.clamp(UNSEEN, 1.0).log().sum(-1)  # (B,W) <= 0
    totals = beam.log_probs[:, :, None] + log_p  # (B,W,V)
    scores, places = (totals / length_norm(lens, search)[:, :, None] + coverage[:, :, None]).flatten(1).topk(W)
    parents = places // V
    tokens = places % V
    log_probs = totals.flatten(1).gather(1, places)
    said = torch.cat((pick_rows(beam.tokens, parents), tokens[:, :, None]), 2)
    return Beam(said, pick_rows(lens, parents), tokens == EOS, log_probs, scores, pick_rows(covered, parents)), parents


def is_settled(beam: Beam, frames: Tensor, search: Search) -> bool:
    """Whether no open hypothesis could pass the best ended one, or the W-th best if alternatives are asked for, even if
    its remaining tokens were certain."""
    wanted = beam.lens.shape[1] if search.nbest > 1 else 1  # all W, as texts may be equal
    least = beam.scores.masked_fill(~beam.ended, -math.inf).topk(wanted).values[:, -1:]
    most = beam.log_probs / length_norm(frames + 1, search)[:, None]
    return bool((beam.ended | (most <= least)).all())


def finish_beam(beam: Beam) -> list[list[Candidate]]:
    """The texts that have ended, without their end token."""
    found = []
    for tokens, lens, ended, log_probs, scores in zip(*beam[:5]):
        rows = (ended & scores.isfinite()).nonzero()[:, 0].tolist()
        found.append([Candidate(tokens[w, 1:lens[w]].tolist(), log_probs[w].item(), scores[w].item()) for w in rows])
    return found


def beam_search(step: Callable, past: list[Tensor], frames: Tensor, search: Search) -> list[list[Candidate]]:
    """The most probable texts of an autoregressive model.
    step(tokens (B,W), past) -> log probabilities (B,W,V), past, attention (B,W,L), as Transformer.begin makes it, with
    past of W = search.width hypotheses; frames (B,) bound the number of tokens. The score is log probability /
    `length_norm` + coverage_penalty * sum of log coverage; W = 1 is greedy. Source: Wu et al. 2016 "GNMT", 7."""
    beam = begin_beam(frames, search.width)
    for t in range(int(frames.max()) + 1):
        log_p, past, attention = step(beam.tokens[:, :, -1], past)
        beam, parents = extend_beam(beam, log_p, attention, t >= frames, search)
        past = [pick_rows(x, parents) for x in past]
        if is_settled(beam, frames, search):
            break
    return finish_beam(beam)


class Prefix(NamedTuple):
    """Log probabilities of the CTC paths that spell a text so far."""

    blank: float = -math.inf  # of those that end in a blank
    spoken: float = -math.inf  # of the others

    @property
    def total(self) -> float:
        return float(np.logaddexp(self.blank, self.spoken))


def extend_prefixes(beam: dict[tuple, Prefix], frame: Sequence[float], likely: set[int]) -> dict[tuple, Prefix]:
    """All texts of the beam, as they are and with one of the tokens `likely` more, after a frame (V,) of log_p more."""
    grown: dict[tuple, Prefix] = collections.defaultdict(Prefix)

    def add(text: tuple, log_p: float) -> None:
        spoken = float(np.logaddexp(grown[text].spoken, log_p))
        grown[text] = grown[text]._replace(spoken=spoken)

    for text, old in beam.items():
        last = text[-1] if text else BLANK
        grown[text] = grown[text]._replace(blank=old.total + frame[BLANK])
        add(text, old.spoken + frame[last])  # of the empty text nothing is spoken
        for token in likely:
            before = old.blank if token == last else old.total  # a repeat needs a blank between
            add((*text, token), before + frame[token])
    return grown


def prefix_search(log_p: Tensor, W: int) -> list[Candidate]:
    """The most probable texts of a CTC model for one utterance, each with the sum over all paths that spell it.
    log_p (L,V) -> at most W candidates, best first. Source: Graves & Jaitly 2014; Hannun et al. 2014."""
    beam = {(): Prefix(blank=0.0)}
    # Among the W best is no text with another token more, blank and its last one set aside, if it is not in the beam.
    best = log_p.topk(min(W + 2, log_p.shape[1])).indices.tolist()
    for frame, ids in zip(log_p.tolist(), best):
        lasts = [text[-1] for text in beam if text]
        grown = extend_prefixes(beam, frame, {*ids, *lasts} - {BLANK})
        ranked = sorted(grown, key=lambda text: grown[text].total, reverse=True)[:W]
        beam = {text: grown[text] for text in ranked if grown[text].total > -math.inf}
    return [Candidate(list(text), prefix.total, prefix.total) for text, prefix in beam.items()]
