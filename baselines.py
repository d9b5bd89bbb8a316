"""The models that a Paraformer is compared with, an autoregressive transformer and CTC, and the searches for hypotheses.

Reading order: the models, then the searches. Needs torch, attention.py, model.py and tokenizer.py.

Dims: B utterances, L encoder frames, U tokens, D model width, V vocabulary, W beam, N hypotheses.
Sources: Vaswani et al. 2017 (transformer); Graves et al. 2006 (CTC); Wu et al. 2016 "GNMT" (beam search); Graves &
Jaitly 2014, Hannun et al. 2014 (prefix search).
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import (PositionalEncoding, TransformerBlock, causal_mask, check_lens, check_shapes, key_mask,
                       padding_mask, run_blocks)
from model import BLANK, EOS, Hypotheses, Recogniser, SOS, cross_entropy_sum, ctc_sum, halfway, in_feature_frames


# ---- models ----

class CausalDecoder(nn.Module):
    """Autoregressive transformer: each token is predicted from those before it and cross-attention to the encoder."""

    def __init__(self, memory_dim: int, vocab_size: int, options):
        super().__init__()
        D = options.hidden_dim
        self.embedding = nn.Embedding(vocab_size, D)
        self.position = PositionalEncoding(D, options.position)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(D, options.num_heads, options.ffn_dim, options.dropout, memory_dim)
                                    for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(D)
        self.output = nn.Linear(D, vocab_size)

    def forward(self, tokens: Tensor, hidden: Tensor, hidden_lens: Tensor,
                need_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """tokens (B,U), from the start token on, hidden (B,L,Dm), hidden_lens (B,) -> logits (B,U,V) of the token after
        each, and the cross-attention weights (B,H,U,L) of each layer where asked for."""
        mask = causal_mask(tokens.shape[1], tokens.device).expand(len(tokens), -1, -1)
        memory_mask = key_mask(hidden_lens, hidden.shape[1])
        x = self.dropout(self.position(self.embedding(tokens)))
        x, layers = run_blocks(self.blocks, x, mask, hidden, memory_mask, need_weights=need_weights)
        return self.output(self.norm(x)), layers


class Transformer(Recogniser):
    """Autoregressive encoder-decoder, with a CTC head on the encoder. Source: Vaswani et al. 2017."""

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__(options, input_dim)
        D = options.encoder.hidden_dim
        self.decoder = CausalDecoder(D, vocab_size, options.decoder)
        self.ctc = nn.Linear(D, vocab_size) if options.ctc_weight else None

    def forward(self, feats: Tensor, feat_lens: Tensor, tokens: Tensor,
                token_lens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Training losses with teacher forcing; arguments and result as Paraformer.forward. The end token counts as a
        token."""
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
        layer; a search that reorders hypotheses must reorder them along W too.
        """
        decoder = self.decoder
        memory = [block.cross_attention.keys_values(hidden) for block in decoder.blocks]  # which no step changes
        B, H, _, K = memory[0][0].shape
        mask = key_mask(hidden_lens, hidden.shape[1])

        def step(tokens: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
            x = decoder.position(decoder.embedding(tokens).flatten(0, 1)[:, None], past[0].shape[3])  # (B*W,1,D)
            x, longer = x.view(*tokens.shape, x.shape[2]), []
            for block, keys, values, memory_kv in zip(decoder.blocks, past[::2], past[1::2], memory):
                x, keys_values, weights = block.step(x, (keys, values), memory_kv, mask)
                longer += keys_values  # two tensors
            return decoder.output(decoder.norm(x)).log_softmax(-1), longer, weights.mean(1)

        return step, [hidden.new_zeros(B, W, H, 0, K)] * (2 * len(memory))

    def greedy_tokens(self, hidden: Tensor, hidden_lens: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B,L,D), hidden_lens (B,) -> tokens (B,U), lens (B,): one at a time, each the argmax, until the end
        token or until there are as many tokens as encoder frames."""
        step, past = self.begin(hidden, hidden_lens, 1)
        last, found, lens = torch.full_like(hidden_lens, SOS)[:, None], [], torch.zeros_like(hidden_lens)
        while True:
            log_p, past, _ = step(last, past)
            last = log_p.argmax(-1)  # (B,1)
            goes_on = (lens == len(found)) & (last[:, 0] != EOS) & (lens < hidden_lens)
            if not goes_on.any():
                break
            found, lens = found + [last], lens + goes_on
        return torch.cat(found, 1) if found else lens.new_zeros(len(lens), 0), lens

    def search(self, hidden: Tensor, hidden_lens: Tensor, search: "Search") -> "NBest":
        """What beam search finds: hidden (B,L,D), hidden_lens (B,)."""
        return beam_search(*self.begin(hidden, hidden_lens, search.width), hidden_lens, search)

    def decode(self, hidden: Tensor, hidden_lens: Tensor, feat_lens: Tensor,
               tokens: Tensor | None = None, lens: Tensor | None = None) -> Hypotheses:
        """As Paraformer.decode, or of tokens (B,U), lens (B,) that a search found: one pass over all of them.

        A token is centred where the last layer's attention peaks, but not before the previous token. alpha is the
        attention that a frame gets from all tokens, mean of the heads, so that it sums to their number.
        """
        if tokens is None:
            tokens, lens = self.greedy_tokens(hidden, hidden_lens)
        mask = padding_mask(lens, tokens.shape[1])
        tokens = tokens * mask
        logits, layers = self.decoder(F.pad(tokens, (1, 0), value=SOS)[:, :-1], hidden, hidden_lens, need_weights=True)
        log_p = logits.float().log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2) * mask
        attention = layers[-1].float().mean(1) * mask[:, :, None]  # (B,U,L)
        centres = (attention.argmax(-1) + 0.5).cummax(1).values
        rows = zip(centres.cpu().double().numpy(), hidden_lens.tolist(), lens.tolist(), feat_lens.tolist())
        edges = [in_feature_frames(halfway(c[:n], L), self.options.encoder).clamp(0, T) for c, L, n, T in rows]
        return Hypotheses(tokens, lens, log_p, edges, attention.sum(1), [])

    def cross_attention(self, hidden: Tensor, hidden_lens: Tensor, tokens: Tensor, lens: Tensor) -> list[Tensor]:
        """As Paraformer.cross_attention."""
        return self.decoder(F.pad(tokens, (1, 0), value=SOS)[:, :-1], hidden, hidden_lens, need_weights=True)[1]


def ctc_path(log_p: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """The most probable CTC path that spells the tokens: log_p (B,L,V), tokens (B,U) -> (B,L) int64, BLANK past lens.

    Every utterance needs a frame for each token and one more between equal neighbours. Viterbi over the 2U + 1 states
    blank, token 1, blank, ..., token U, blank.
    """
    L = log_p.shape[1]
    states = torch.stack((torch.full_like(tokens, BLANK), tokens), 2).flatten(1)  # (B,2U)
    states = F.pad(states, (0, 1), value=BLANK)
    leap = (states != BLANK) & (states != F.pad(states, (2, 0), value=BLANK)[:, :-2])  # over a blank to another token
    score, moves = torch.full(states.shape, -math.inf, dtype=log_p.dtype, device=log_p.device), []
    score[:, 0] = 0.0  # so a path begins in the first blank or, a move on, in the first token
    for t in range(L):
        before = F.pad(score, (2, 0), value=-math.inf)
        best, move = torch.stack((score, before[:, 1:-1], before[:, :-2].masked_fill(~leap, -math.inf))).max(0)
        real = (t < lens)[:, None]
        score = torch.where(real, best + log_p[:, t].gather(1, states), score)
        moves.append(torch.where(real, move, 0))
    last = 2 * token_lens[:, None]
    here = last - (score.gather(1, last) < score.gather(1, (last - 1).clamp(min=0))).long()
    path = []
    for t in reversed(range(L)):
        path.append(torch.where((t < lens)[:, None], states.gather(1, here), BLANK))
        here = here - moves[t].gather(1, here)
    return torch.cat(path[::-1], 1)


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

    def search(self, hidden: Tensor, hidden_lens: Tensor, search: "Search") -> "NBest":
        """What prefix search finds: hidden (B,L,D), hidden_lens (B,)."""
        return prefix_search(self.log_probs(hidden), hidden_lens, search.width)

    def decode(self, hidden: Tensor, hidden_lens: Tensor, feat_lens: Tensor,
               tokens: Tensor | None = None, lens: Tensor | None = None) -> Hypotheses:
        """As Paraformer.decode: the tokens of the best path, or of the best path of those that were found.

        A token has its centre and probability from its most probable frame on the path. alpha is the probability of
        not being blank.
        """
        log_p = self.log_probs(hidden)
        real = padding_mask(hidden_lens, hidden.shape[1])
        path = log_p.argmax(-1) * real if tokens is None else ctc_path(log_p, hidden_lens, tokens, lens)
        spoken = path != BLANK
        number = (spoken & (path != F.pad(path, (1, 0))[:, :-1])).cumsum(1)  # (B,L): tokens that have begun
        lens = number[:, -1]
        U = int(lens.max()) if len(lens) else 0
        unit = torch.arange(1, U + 1, device=path.device)[:, None]
        on = (number[:, None, :] == unit) & spoken[:, None, :]  # (B,U,L): the frames that say token u
        mask = padding_mask(lens, U)
        tokens = (on * path[:, None, :]).amax(-1)
        token_log_p = log_p.transpose(1, 2).gather(1, tokens[:, :, None].expand(-1, -1, path.shape[1]))  # (B,U,L)
        best, frame = token_log_p.masked_fill(~on, -math.inf).max(-1)
        rows = zip((frame + 0.5).cpu().double().numpy(), hidden_lens.tolist(), lens.tolist(), feat_lens.tolist())
        edges = [in_feature_frames(halfway(c[:n], L), self.options.encoder).clamp(0, T) for c, L, n, T in rows]
        alpha = (1 - log_p[:, :, BLANK].exp()) * real
        return Hypotheses(tokens, lens, best.masked_fill(~mask, 0.0), edges, alpha, [])

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


class NBest(NamedTuple):
    """N hypotheses of each utterance, best first; where there are fewer, log_probs and scores of the rest are -inf."""

    tokens: Tensor  # (B,N,U) int64, 0 behind the end
    lens: Tensor  # (B,N) int64
    log_probs: Tensor  # (B,N) of the whole hypothesis
    scores: Tensor  # (B,N) by which they are ranked


def pick_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B,W,...), index (B,N) -> (B,N,...): x[b, index[b, n]]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def ranked(found: NBest) -> NBest:
    order = found.scores.argsort(dim=1, descending=True, stable=True)
    return NBest(*(pick_rows(x, order) for x in found))


def certain(n: int, place: int, like: Tensor) -> Tensor:
    """(n,) log probabilities of a certain outcome: 0 at place, -inf elsewhere; dtype and device of `like`."""
    return torch.where(torch.arange(n, device=like.device) == place, 0.0, -math.inf).to(like.dtype)


UNSEEN = 0.01  # the attention that a frame counts as having got at least, or the log of one frame would decide


def beam_search(step: Callable, past: list[Tensor], frames: Tensor, search: Search) -> NBest:
    """The most probable texts of an autoregressive model.

    step(tokens (B,W), past) -> log probabilities (B,W,V), past, attention (B,W,L), as Transformer.begin makes it, with
    past of W = search.width hypotheses; frames (B,) bound the number of tokens. score = log_prob / norm + coverage.
    A hypothesis that has ended stays in the beam as long as its score is among the W best, so it is compared with
    longer ones that go on, and W = 1 is greedy. The search ends when no open hypothesis could still pass the best ended
    one (or the W-th best), even if its remaining tokens were certain. Source: Wu et al. 2016 "GNMT", section 7.
    """
    B, W = len(frames), search.width
    norm = lambda length: ((5 + length) / 6) ** search.length_penalty
    last, tokens = torch.full((B, W), SOS, device=frames.device), frames.new_zeros(B, W, 0)
    lens, ended = torch.zeros_like(last), torch.zeros_like(last, dtype=torch.bool)
    log_prob = certain(W, 0, torch.empty(0, device=frames.device)).expand(B, W)  # the beam begins with one empty text
    covered = (~padding_mask(frames, int(frames.max()))).float()[:, None].expand(B, W, -1)  # (B,W,L), of padding 1
    wanted = W if search.nbest > 1 else 1  # to settle: texts may be equal
    for t in range(int(frames.max()) + 1):
        log_p, past, attention = step(last, past)
        V, end = log_p.shape[2], certain(log_p.shape[2], EOS, log_p)
        log_p = torch.where((t >= frames)[:, None, None], log_p + end, log_p)  # it must end
        log_p = torch.where(ended[:, :, None], end, log_p)  # it has ended: no change, at no cost
        total, length = log_prob[:, :, None] + log_p, lens + ~ended  # (B,W,V), (B,W)
        covered = covered + attention[:, :, :covered.shape[2]] * ~ended[:, :, None]
        coverage = search.coverage_penalty * covered.clamp(UNSEEN, 1.0).log().sum(-1, keepdim=True)  # (B,W,1) <= 0
        score, place = (total / norm(length)[:, :, None] + coverage).flatten(1).topk(W)
        parent, last = place // V, place % V
        log_prob = total.flatten(1).gather(1, place)
        lens, covered, tokens, *past = (pick_rows(x, parent) for x in (length, covered, tokens, *past))
        tokens, ended = torch.cat((tokens, last[:, :, None]), 2), last == EOS
        least = score.masked_fill(~ended, -math.inf).topk(wanted).values[:, -1:]
        if (ended | (log_prob / norm(frames + 1)[:, None] <= least)).all():  # an open one's score can rise to this
            break
    lens_said, open_ = lens - 1, ~ended  # without the end token
    real = torch.arange(tokens.shape[2], device=tokens.device) < lens_said[:, :, None]
    return ranked(NBest(tokens * real, lens_said, log_prob.masked_fill(open_, -math.inf),
                        score.masked_fill(open_, -math.inf)))


def join_prefixes(more: Tensor, tokens: Tensor, n: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """If prefix j of the beam is prefix i and one token more, that extension of i is j: its probability goes to j.

    more (B,W,V) log probabilities of each prefix with one token more, tokens (B,W,U), n (B,W) their lengths, alive
    (B,W) -> more, with -inf for these extensions, and (B,W) what each prefix j gets from them.
    """
    at = (n[:, :, None] - 1).clamp(min=0)
    way = tokens.gather(2, at).transpose(1, 2).expand(-1, more.shape[1], -1)  # (B,W,W): [b,i,j], last token of j
    cut = tokens.scatter(2, at, BLANK)  # each prefix without its last token
    grown = (tokens[:, :, None] == cut[:, None]).all(3) & (n[:, :, None] + 1 == n[:, None]) & alive[:, None]
    joined = more.gather(2, way).masked_fill(~grown, -math.inf).logsumexp(1)
    return more.scatter_reduce(2, way, torch.where(grown, -math.inf, math.inf).to(more), "amin"), joined


def prefix_search(log_p: Tensor, lens: Tensor, W: int) -> NBest:
    """The most probable texts of a CTC model, each with the sum over all paths that spell it (prefix beam search).

    log_p (B,L,V), lens (B,). At each frame the W best prefixes are kept, with the log probabilities `blank` of their
    paths that end in a blank and `spoken` of the others. Source: Graves & Jaitly 2014; Hannun et al. 2014.
    """
    B, L, V = log_p.shape
    log_p = torch.where(padding_mask(lens, L)[:, :, None], log_p, certain(V, BLANK, log_p))  # padding says nothing
    tokens, n = lens.new_zeros(B, W, 1), lens.new_zeros(B, W)
    blank, spoken = certain(W, 0, log_p).expand(B, W), log_p.new_full((B, W), -math.inf)
    for frame in log_p.unbind(1):  # (B,V)
        total = torch.logaddexp(blank, spoken)
        last = tokens.gather(2, (n[:, :, None] - 1).clamp(min=0))  # (B,W,1), BLANK of the empty prefix
        more = total[:, :, None].expand(-1, -1, V).scatter(2, last, blank[:, :, None])  # a repeat needs a blank
        more = (more + frame[:, None]).scatter(2, torch.full_like(last, BLANK), -math.inf)
        more, joined = join_prefixes(more, tokens, n, total > -math.inf)
        blank, spoken = total + frame[:, BLANK, None], torch.logaddexp(spoken + frame.gather(1, last[:, :, 0]), joined)
        score, place = torch.cat((torch.logaddexp(blank, spoken), more.flatten(1)), 1).topk(W)
        same = place < W  # the prefix itself, else the prefix and one token more
        parent, token = torch.where(same, place, (place - W) // V), (place - W) % V
        tokens, n = F.pad(pick_rows(tokens, parent), (0, 1)), n.gather(1, parent)
        tokens = tokens.scatter_add(2, n[:, :, None], token.masked_fill(same, 0)[:, :, None])
        blank = blank.gather(1, parent).masked_fill(~same, -math.inf)
        spoken = torch.where(same, spoken.gather(1, parent), score)
        n = n + ~same
        tokens = tokens[:, :, :int(n.max()) + 1]  # one column of 0 behind the longest
    return ranked(NBest(tokens, n, score, score))
