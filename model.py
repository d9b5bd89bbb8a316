"""Paraformer: encoder, CIF predictor, glancing sampler, parallel decoder; tensors in, losses or greedy token ids out.

    feats -> Encoder -> hidden -> Predictor -> alpha -> cif -> embeds -> Decoder(embeds, hidden) -> logits
    (B,T,F)            (B,L,D)                (B,L)           (B,U,D)                              (B,U,V)

Read six functions first: Predictor.forward (weights), scale_weights (their running sum), cif (tokens), glance (the
sampler), Decoder.forward (all tokens at once), Paraformer.forward (the loss). `options` is the model section of a
config, or a part of it (config.py). Needs torch, numpy, attention.py, funasr_layers.py and tokenizer.py.

Dims: B utterances, T feature frames, F feature bins, L = ceil(T / subsampling) encoder frames (up to two fewer in a
relative_conformer), U tokens, D model width, V vocabulary. Masks are bool, True = real. Token 0 is blank and padding.
Sources: Gao et al. 2022 "Paraformer" (the model, its losses, the sampler); Dong & Xu 2020 "CIF" (integrate-and-fire);
the kinds sanm, relative_conformer, bare, dense and depthwise compute what FunASR 1.4 does, whose checkpoints they load.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import (ConformerBlock, PositionalEncoding, TransformerBlock, at_least_float32, check_feats, check_lens,
                       check_shapes, convolve, full_precision, key_mask, near_mask, padding_mask, run_blocks, sinusoids,
                       zero_padding)
from funasr_layers import FramePredictor, RelativeConformerEncoder, SanmDecoder, SanmEncoder, TimingHead
from tokenizer import BLANK, EOS, count_errors


def pick(choices: dict, field: str, name):
    """choices[name]. Raises ValueError that names the field of the config and its choices."""
    if name not in choices:
        raise ValueError(f"{field} must be one of {list(choices)}, got {name!r}")
    return choices[name]


# ---- encoders ----

class Subsampling(nn.Module):
    """Convolutions over 3 frames from F bins to D channels, of which every frame, every 2nd or every 4th is kept."""

    def __init__(self, input_dim: int, dim: int, factor: int):
        super().__init__()
        strides = pick({1: (1,), 2: (2,), 4: (2, 2)}, "subsampling", factor)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim if i else input_dim, dim, 3, stride=stride, padding=1)
                                          for i, stride in enumerate(strides))

    def forward(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,T,F), lens (B,) -> (B,L,D), lens (B,) with each length ceil(len / factor)."""
        check_shapes(x=(x, "B", "T", self.convolutions[0].in_channels), lens=(lens, "B"))
        for layer in self.convolutions:
            x = zero_padding(x, key_mask(lens, x.shape[1]))  # padded frames may hold anything
            x = F.gelu(convolve(x, layer.weight, layer.bias, layer.padding * 2, layer.stride[0]))
            lens = (lens - 1).div(layer.stride[0], rounding_mode="floor") + 1
        return x, lens


class Encoder(nn.Module):
    """Subsampling, positions, and a stack of bidirectional transformer or conformer blocks."""

    def __init__(self, input_dim: int, options):
        super().__init__()
        D = options.hidden_dim
        self.input_dim = input_dim
        self.context = options.context
        self.subsampling = Subsampling(input_dim, D, options.subsampling)
        self.position = PositionalEncoding(D, options.position)
        self.dropout = nn.Dropout(options.dropout)
        block = ConformerBlock if options.kind == "conformer" else TransformerBlock
        self.blocks = nn.ModuleList(block(options) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(D)

    def forward(self, feats: Tensor, lens: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """feats (B,T,F), lens (B,) -> hidden (B,L,D), 0 where it pads, lens (B,), weights (B,H,L,L) if asked for."""
        check_feats(feats, lens, self.input_dim)
        x, lens = self.subsampling(feats, lens)
        real = key_mask(lens, x.shape[1])  # (B,1,L)
        seen = real
        if self.context:
            seen = padding_mask(lens, x.shape[1])[:, None] & near_mask(x.shape[1], self.context, x.device)  # (B,L,L)
        x, layers = run_blocks(self.blocks, self.dropout(self.position(x)), seen, need_weights=need_weights)
        return zero_padding(self.norm(x), real), lens, layers


# ---- predictors: the weight of every frame ----

class Predictor(nn.Module):
    """How much of a token each encoder frame holds, from stacked convolutions."""

    def __init__(self, dim: int, options):
        super().__init__()
        self.dim = dim
        widths = [dim] + [options.hidden_dim] * options.num_layers
        self.convolutions = nn.ModuleList(nn.Conv1d(i, o, options.kernel_size, padding=options.kernel_size // 2)
                                          for i, o in zip(widths, widths[1:]))
        self.dropout = nn.Dropout(options.dropout)
        self.weight = nn.Linear(widths[-1], 1)

    def forward(self, hidden: Tensor, lens: Tensor) -> Tensor:
        """hidden (B,L,D), lens (B,) -> alpha (B,L) float32: the weight of each frame, in (0,1), 0 where it pads.

        The sum over an utterance estimates its number of tokens: Paraformer.forward trains it to be that.
        """
        check_shapes(hidden=(hidden, "B", "L", self.dim), lens=(lens, "B"))
        mask = padding_mask(lens, hidden.shape[1])
        x = hidden
        for convolution in self.convolutions:
            x = convolve(x * mask[:, :, None], convolution.weight, convolution.bias, convolution.padding * 2)
            x = self.dropout(F.relu(x))
        alpha = self.weight(x).squeeze(-1).float().sigmoid()  # (B,L,1) -> (B,L)
        return alpha * mask  # from here on a padded frame adds nothing, to no sum and to no token


# ---- continuous integrate-and-fire ----

def scale_weights(alpha: Tensor, counts: Tensor) -> Tensor:
    """alpha (B,L), counts (B,) -> (B,L) float64, each row scaled to sum to its count. A row of zeros stays zeros.

    Each unit of the running sum is a token, so a row that sums to n makes n tokens. In training n is the true number,
    so that every token has a target. float64: a float32 sum that ends just below n would lose the last one.
    """
    check_shapes(alpha=(alpha, "B", "L"), counts=(counts, "B"))
    alpha = alpha.double()
    return alpha * (counts / alpha.sum(1).clamp(min=1e-12))[:, None]


CIF_UNITS = 64  # tokens that are embedded at a time


def cif(hidden: Tensor, alpha: Tensor, U: int) -> Tensor:
    """Integrate and fire: token u is the mean of the frames in which the running sum of the weights goes from u to u+1.

    hidden (B,L,D), alpha (B,L) float64 -> (B,U,D). With c_t = alpha_1 + ... + alpha_t, the embedding of token u is
    sum_t |[c_{t-1}, c_t] intersected with [u, u+1]| * hidden_t, equal to the sequential loop of Dong & Xu 2020. A
    frame whose weight spans several tokens adds to each of them; a frame of weight 0, as padding is, adds to none;
    tokens past the sum are zero.
    """
    check_shapes(alpha=(alpha, "B", "L"), hidden=(hidden, "B", "L", "D"))
    end = alpha.cumsum(1)[:, None, :]  # (B,1,L)
    start = end - alpha[:, None, :]
    if U > CIF_UNITS:
        return cif_in_blocks(hidden, start, end, U)
    unit = torch.arange(U, device=alpha.device)[:, None]  # (U,1)
    overlap = (torch.minimum(end, unit + 1) - torch.maximum(start, unit)).clamp(min=0)  # (B,U,L)
    return overlap.to(hidden.dtype) @ hidden


def cif_in_blocks(hidden: Tensor, start: Tensor, end: Tensor, U: int) -> Tensor:
    """As cif, with start and end (B,1,L) of each frame's part of the running sum: CIF_UNITS tokens at a time, each from
    the frames that it overlaps. Time and memory grow with L + U, not with L * U."""
    tokens = []
    for first in range(0, U, CIF_UNITS):
        last = min(first + CIF_UNITS, U)
        low = int((end <= first).sum(-1).min())  # frames low to high, of any utterance, reach into these tokens
        high = int((start < first + CIF_UNITS).sum(-1).max())
        unit = torch.arange(first, last, device=hidden.device)[:, None]  # (u,1)
        stop = torch.minimum(end[..., low:high], unit + 1)
        overlap = (stop - torch.maximum(start[..., low:high], unit)).clamp(min=0)  # (B,u,frames)
        tokens.append(overlap.to(hidden.dtype) @ hidden[:, low:high])
    return torch.cat(tokens, 1)


class Carry(NamedTuple):
    """What is left of a stream's weights behind its last token: an unfinished token."""

    weight: Tensor  # () float64, below 1
    frame: Tensor  # (D,) the mean of the frames under that weight; 0 without
    begun: float  # the frame, counted from the start of the stream, where its first BEGUN is reached; -1: not yet


BEGUN = 0.1  # of a token's weight: where it begins, as weights do not fall to 0 in a pause


def cif_step(hidden: Tensor, alpha: Tensor, carry: Carry, first: int,
             tail: float = 0.0) -> tuple[Tensor, list[tuple[float, float]], Carry]:
    """`cif` of a stream's next frames: hidden (L,D), alpha (L,), the carry of the frames before, the number of the
    first frame, and the weight of a frame of zeros behind the last one, which may complete a token
    -> embeds (U,D) of the tokens that fire, the frames in which each begins and ends, the carry.
    Piece by piece or at once, the tokens are the same, but for rounding: the carry enters as a frame of its own."""
    check_shapes(hidden=(hidden, "L", "D"), alpha=(alpha, "L"), frame=(carry.frame, "D"))
    weights = torch.cat([carry.weight[None], alpha.double()])  # (1+L,)
    frames = torch.cat([carry.frame[None].to(hidden), hidden])
    sums = weights.cumsum(0).cpu().numpy()
    if tail > 0:
        sums = np.append(sums, sums[-1] + tail)
    U = int(sums[-1])  # whole tokens; the next one, unfinished, is embedded too
    embeds = cif(frames[None], weights[None], U + 1)[0]
    places = np.arange(len(sums)) + float(first)  # sums[i] is reached at the end of frame first + i - 1

    def place(total: float) -> float:
        return float(np.interp(total, sums, places))

    spans = [(place(u + BEGUN), place(u + 1)) for u in range(U)]
    if U and carry.begun >= 0:
        spans[0] = (carry.begun, spans[0][1])
    rest = sums[-1] - U
    begun = carry.begun if U == 0 else -1.0
    if begun < 0 and rest >= BEGUN:
        begun = place(U + BEGUN)
    weight = torch.tensor(rest, dtype=torch.float64, device=alpha.device)
    return embeds[:U], spans, Carry(weight, embeds[U] / max(rest, 1e-12), begun)


# ---- the glancing sampler ----

def glance(embeds: Tensor, truth: Tensor, counts: Tensor, wrong: Tensor, ratio: float, order: Tensor) -> Tensor:
    """Replace floor(ratio * wrong) acoustic embeddings of each utterance by those of the true tokens.

    The decoder sees all tokens at once and none of them as text, so it cannot learn what follows what. The more it got
    wrong, the more true neighbours it is shown. In decoding there is no truth and no sampler.
    embeds, truth (B,U,D), counts (B,) tokens, wrong (B,) errors of the first pass, order (B,U) float: the positions
    with the smallest values are replaced -> (B,U,D). Source: Gao et al. 2022, 3.3; the floor as in FunASR.
    """
    check_shapes(embeds=(embeds, "B", "U", "D"), truth=(truth, "B", "U", "D"), counts=(counts, "B"), wrong=(wrong, "B"),
                 order=(order, "B", "U"))
    order = order.masked_fill(~padding_mask(counts, embeds.shape[1]), torch.inf)  # padding comes last
    rank = order.argsort(1).argsort(1)  # (B,U): 0 for the smallest
    picked = rank < (wrong * ratio).floor()[:, None]  # (B,U)
    return torch.where(picked[:, :, None], truth, embeds)


# ---- decoders ----

class Decoder(nn.Module):
    """Bidirectional transformer over the acoustic embeddings, with cross-attention to the encoder, in one pass.
    Kind `bare` takes the embeddings as they are; kind `transformer` projects them and adds positions."""

    def __init__(self, source_dim: int, vocab_size: int, options):
        super().__init__()
        D = options.hidden_dim
        self.source_dim = source_dim
        bare = options.kind == "bare"
        self.input = None if bare else nn.Linear(source_dim, D)
        self.position = None if bare else PositionalEncoding(D, options.position)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(options, source_dim) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(D)
        self.output = nn.Linear(D, vocab_size)

    def forward(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor,
                need_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """All tokens in one pass, without a causal mask: each sees every other one and every frame, but no padding.

        embeds (B,U,S), counts (B,), hidden (B,L,S), hidden_lens (B,); S = source_dim, the encoder's width
        -> logits (B,U,V) and the cross-attention weights (B,H,U,L) of each layer where asked for.
        """
        check_shapes(embeds=(embeds, "B", "U", self.source_dim), counts=(counts, "B"),
                     hidden=(hidden, "B", "L", self.source_dim), hidden_lens=(hidden_lens, "B"))
        mask = key_mask(counts, embeds.shape[1])  # (B,1,U), True = real: attention adds nothing from what is False
        hidden_mask = key_mask(hidden_lens, hidden.shape[1])  # (B,1,L)
        x = embeds if self.input is None else self.dropout(self.position(self.input(embeds)))
        x, layers = run_blocks(self.blocks, x, mask, hidden, hidden_mask, need_weights=need_weights)
        return self.output(self.norm(x)), layers


# ---- losses: sums over tokens, divided by the trainer ----

def cross_entropy_sum(logits: Tensor, tokens: Tensor, lens: Tensor, smoothing: float) -> Tensor:
    """KL divergence to the smoothed target, summed over real tokens: q = 1-e at the target, e/(V-1) elsewhere.
    logits (B,U,V), tokens (B,U) int64, lens (B,) -> scalar. The entropy of q is subtracted, so the minimum is 0."""
    check_shapes(logits=(logits, "B", "U", "V"), tokens=(tokens, "B", "U"), lens=(lens, "B"))
    V = logits.shape[-1]
    q = torch.tensor([1 - smoothing, smoothing / (V - 1)], dtype=torch.float64)
    entropy = -(q[0] * q[0].log() + (V - 1) * torch.special.xlogy(q[1], q[1])).item()
    log_p = logits.float().log_softmax(-1)
    target = log_p.gather(2, tokens[:, :, None]).squeeze(2)  # (B,U)
    cost = -(1 - smoothing) * target - smoothing / (V - 1) * (log_p.sum(-1) - target) - entropy
    return torch.where(padding_mask(lens, tokens.shape[1]), cost, 0.0).sum()


def ctc_sum(logits: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """CTC loss summed over utterances; one whose tokens cannot fit its frames contributes 0.
    logits (B,L,V), lens (B,), tokens (B,U), token_lens (B,) -> scalar."""
    check_shapes(logits=(logits, "B", "L", "V"), tokens=(tokens, "B", "U"))
    check_lens("lens", lens, *logits.shape[:2])
    check_lens("token_lens", token_lens, *tokens.shape)
    log_p = logits.float().log_softmax(-1).transpose(0, 1)  # (L,B,V)
    return F.ctc_loss(log_p, tokens, lens, token_lens, blank=BLANK, reduction="sum", zero_infinity=True)


MASKED_SHARE = 0.2  # share of a random candidate's positions that take the second best token


def mwer_sum(logits: Tensor, tokens: Tensor, lens: Tensor, masked: Tensor) -> Tensor:
    """Expected number of token errors above the candidates' mean, summed over utterances.
    logits (B,U,V), tokens (B,U), lens (B,), masked (B,N,U) bool: where the best token is masked, so that candidate n
    takes the second best; candidate 0 ignores it -> scalar, sum_n P_n (errors_n - mean errors), with P normalised over
    the N candidates. Source: Gao et al. 2022, 3.4; Prabhavalkar et al. 2018."""
    (B, N, _), real = masked.shape, padding_mask(lens, tokens.shape[1])[:, None]
    check_shapes(tokens=(tokens, "B", "U"), logits=(logits, "B", "U", "V"))
    log_p, ids = logits.float().log_softmax(-1).topk(2, -1)  # (B,U,2): best and second best
    second = masked & (torch.arange(N, device=masked.device) > 0)[:, None]
    hyps = torch.where(second, ids[:, None, :, 1], ids[:, None, :, 0])  # (B,N,U)
    log_prob = (torch.where(second, log_p[:, None, :, 1], log_p[:, None, :, 0]) * real).sum(-1)  # (B,N)
    errors = torch.zeros(B, N)
    for b, (ref, n) in enumerate(zip(tokens.tolist(), lens.tolist())):
        for k, hyp in enumerate(hyps[b].tolist()):
            errors[b, k] = count_errors(ref[:n], hyp[:n]).errors
    errors = errors.to(log_prob)
    return (log_prob.softmax(1) * (errors - errors.mean(1, keepdim=True))).sum()


# ---- where tokens lie in time ----

def boundaries(alpha: Tensor, n: int) -> Tensor:
    """Boundaries of the n tokens that weights alpha (L,) of one utterance fire: -> (n+1,) float64 in encoder frames.
    The weights of a token peak within it, so the centre of token u is where their running sum, scaled to n, reaches
    u + 1/2. Boundaries lie half way between centres; the outermost mirror the next ones. (The sum passes whole numbers
    in flat stretches between peaks, where the place says little.) A single token takes all frames."""
    check_shapes(alpha=(alpha, "L"))
    L = len(alpha)
    total = np.concatenate([[0.0], np.cumsum(alpha.double().numpy())])
    centres = np.interp(np.arange(n) + 0.5, total * (n / max(total[-1], 1e-12)), np.arange(L + 1))
    return edges_between(centres, L)


def edges_between(centres: np.ndarray, L: int) -> Tensor:
    """Boundaries (n+1,) of tokens with these centres (n,), in encoder frames, in 0..L, as `boundaries` explains."""
    if len(centres) == 0:
        return torch.zeros(1, dtype=torch.float64)
    if len(centres) == 1:
        return torch.tensor([0.0, L], dtype=torch.float64)
    middles = (centres[1:] + centres[:-1]) / 2  # (n-1,)
    first = max(0.0, 2 * centres[0] - middles[0])
    last = min(float(L), 2 * centres[-1] - middles[-1])
    return torch.from_numpy(np.concatenate([[first], middles, [last]]))


def in_feature_frames(edges: Tensor, encoder) -> Tensor:
    """Boundaries in encoder frames -> in feature frames. Encoder frame l, from l to l + 1, is centred in feature frame
    subsampling * l; in a relative_conformer, where it sees frames 4l to 4l + 6, in 4l + 3."""
    shift = 3 if encoder.kind == "relative_conformer" else 0
    return edges * encoder.subsampling - (encoder.subsampling - 1) / 2 + shift


# ---- the model ----

class Prediction(NamedTuple):
    """What a decoder makes of acoustic embeddings."""

    logits: Tensor  # (B,U,V)
    attention: list[Tensor]  # cross-attention (B,H,U,L) of each decoder layer that has one, where asked for
    hotword: Tensor | None = None  # (B,U) bool, as in Hypotheses


class Hypotheses(NamedTuple):
    """What free-running decoding found; tokens and log_probs past an utterance's count are 0. Transformer.decode and
    CTC.decode say what stands in for alpha there."""

    tokens: Tensor  # (B,U) int64
    lens: Tensor  # (B,) int64, predicted counts
    log_probs: Tensor  # (B,U) float32 of each token
    boundaries: list[Tensor]  # (count+1,) float64 each, feature frames: token u lies in [u, u+1]
    alpha: Tensor  # (B,L) float32, the firing weights as predicted
    fine_alpha: list[Tensor]  # (upsampling * L,) float32 each, the weights of the timing head; empty without one
    hotword: Sequence[Tensor] = ()  # (count,) bool each, which tokens the decoder of hotwords put there; or no such


ENCODERS = {"transformer": Encoder, "conformer": Encoder, "sanm": SanmEncoder,
            "relative_conformer": RelativeConformerEncoder}
PREDICTORS = {"stacked": Predictor, "dense": FramePredictor, "depthwise": FramePredictor}
DECODERS = {"transformer": Decoder, "bare": Decoder, "sanm": SanmDecoder}


class Recogniser(nn.Module):
    """What the architectures share: an encoder, how losses are added up and divided, and greedy decoding. A subclass
    adds `forward`, `decode` and `cross_attention`, as Paraformer has them."""

    def __init__(self, options, input_dim: int):
        super().__init__()
        self.options = options
        self.encoder = pick(ENCODERS, "encoder.kind", options.encoder.kind)(input_dim, options.encoder)

    def hear(self, feats: Tensor, feat_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's part, where chunked.py differs: arguments and results as Encoder.forward, without weights."""
        return self.encoder(feats, feat_lens)[:2]

    def encode(self, feats: Tensor, feat_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's part of decoding: feats (B,T,F), feat_lens (B,) -> hidden (B,L,D) in float32 or float64, its
        lens. Raises ValueError naming the utterances whose features are not finite."""
        check_feats(feats, feat_lens, self.encoder.input_dim)
        sums = feats.sum(2, dtype=torch.float64)  # finite if all F float32 of a frame are, and fewer to check
        bad = (~sums.isfinite() & padding_mask(feat_lens, feats.shape[1])).any(1)
        if bad.any():
            raise ValueError(f"feats must be finite, got NaN or infinity in utterances {bad.nonzero()[:, 0].tolist()}")
        hidden, hidden_lens = self.hear(feats, feat_lens)  # after the check, which waits for a GPU's queue
        return at_least_float32(hidden), hidden_lens

    @torch.no_grad()
    def greedy(self, feats: Tensor, feat_lens: Tensor) -> Hypotheses:
        """Decode without a search: feats (B,T,F), feat_lens (B,) -> Hypotheses, see `decode`. Raises as `encode`."""
        hidden, hidden_lens = self.encode(feats, feat_lens)
        with full_precision(hidden, training=False):
            return self.decode(hidden, hidden_lens, feat_lens)

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses and before them `loss`, their sum, each times the option <name>_weight; ce times 1 - ctc_weight
        and timing times quantity_weight / 2."""
        options = self.options
        weights = {"ce": 1 - options.ctc_weight, "timing": options.quantity_weight / 2}
        for name in sums.keys() - weights.keys():
            weights[name] = getattr(options, f"{name}_weight")
        return {"loss": sum(weights[name] * value for name, value in sums.items()), **sums}

    def divisor(self, token_lens: Tensor) -> Tensor:
        """What the loss sums are divided by, a scalar: the sum of token_lens (B,), or B if loss_unit is utterance."""
        if self.options.loss_unit == "token":
            return token_lens.sum()
        return torch.tensor(len(token_lens), device=token_lens.device)


def cut(rows: Tensor, lens: Tensor) -> list[Tensor]:
    """rows (B,N), lens (B,) -> each row without what pads it."""
    return [row[:n] for row, n in zip(rows, lens.tolist())]


class Paraformer(Recogniser):
    """Parallel transformer with the number and place of the tokens from integrate-and-fire. Source: Gao et al. 2022."""

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__(options, input_dim)
        D = options.encoder.hidden_dim
        self.predictor = pick(PREDICTORS, "predictor.kind", options.predictor.kind)(D, options.predictor)
        self.decoder = pick(DECODERS, "decoder.kind", options.decoder.kind)(D, vocab_size, options.decoder)
        self.embedding = nn.Embedding(vocab_size, D)  # of the true tokens, for the sampler
        self.ctc = nn.Linear(D, vocab_size) if options.ctc_weight else None
        self.timing = TimingHead(D, options.predictor) if options.predictor.upsampling else None

    def forward(self, feats: Tensor, feat_lens: Tensor, tokens: Tensor, token_lens: Tensor,
                order: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Training: two passes through the decoder, with the sampler between them.

        feats (B,T,F), feat_lens (B,), tokens (B,U) int64 padded with 0, token_lens (B,); order (B,U): the sampler's
        draw, random if None -> loss sums by name (`loss`: their weighted total), and what to divide them by.
        """
        hidden, hidden_lens = self.hear(feats, feat_lens)
        check_shapes(feats=(feats, "B", "T", "F"), tokens=(tokens, "B", "U"))
        check_lens("token_lens", token_lens, *tokens.shape)
        targets, counts = self.targets(tokens, token_lens)
        alpha = self.weigh(hidden, hidden_lens)
        scaled = scale_weights(alpha, counts)
        embeds = cif(hidden, scaled, targets.shape[1])
        with torch.no_grad():  # this pass only counts errors, which have no gradient
            first = self.predict(embeds, counts, hidden, hidden_lens, scaled).logits
            wrong = ((first.argmax(-1) != targets) & padding_mask(counts, targets.shape[1])).sum(1)
        order = torch.rand(targets.shape, device=targets.device) if order is None else order
        mixed = glance(embeds, self.truth(targets), counts, wrong, self.options.sampling_ratio, order)
        logits = self.predict(mixed, counts, hidden, hidden_lens, scaled).logits
        sums = {"ce": cross_entropy_sum(logits, targets, counts, self.options.label_smoothing),  # are the tokens right?
                "quantity": (alpha.sum(1) - counts).abs().sum()}  # do the weights sum to the number of tokens?
        sums |= self.optional_losses(hidden, hidden_lens, tokens, token_lens, logits)
        return self.total(sums), self.divisor(counts)

    def optional_losses(self, hidden: Tensor, hidden_lens: Tensor, tokens: Tensor, token_lens: Tensor,
                        logits: Tensor) -> dict[str, Tensor]:
        """The losses that options ask for: of the second pass's logits, a CTC head and a timing head on the encoder.
        One more is a line here and its <name>_weight a line in config.py."""
        targets, counts = self.targets(tokens, token_lens)
        sums = {}
        if self.options.mwer_weight:
            draws = torch.rand(len(targets), self.options.mwer_samples, targets.shape[1], device=targets.device)
            sums["mwer"] = mwer_sum(logits, targets, counts, draws < MASKED_SHARE)
        if self.ctc is not None:  # without the end token
            sums["ctc"] = ctc_sum(self.ctc(hidden), hidden_lens, tokens, token_lens)
        if self.timing is not None:
            sums["timing"] = (self.timing(hidden, hidden_lens).sum(1) - counts).abs().sum()
        return sums

    def targets(self, tokens: Tensor, token_lens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B,U), token_lens (B,) -> the same, or with options.end_token (B,U+1) and lens + 1, EOS after each."""
        check_shapes(tokens=(tokens, "B", "U"), token_lens=(token_lens, "B"))
        if not self.options.end_token:
            return tokens, token_lens
        return F.pad(tokens, (0, 1)).scatter(1, token_lens[:, None], EOS), token_lens + 1

    def truth(self, tokens: Tensor) -> Tensor:
        """tokens (B,U) -> the embeddings (B,U,D) that the sampler mixes in."""
        check_shapes(tokens=(tokens, "B", "U"))
        if self.options.share_embedding:
            return F.embedding(tokens, self.decoder.output.weight)
        x = self.embedding(tokens)
        if not self.options.place_embedding:
            return x
        return x * math.sqrt(x.shape[-1]) + sinusoids(torch.arange(x.shape[1]), x.shape[2]).to(x)

    def weigh(self, hidden: Tensor, hidden_lens: Tensor) -> Tensor:
        """The predictor's part, where chunked.py differs: hidden (B,L,D), hidden_lens (B,) -> alpha (B,L)."""
        return self.predictor(hidden, hidden_lens)

    def count(self, alpha: Tensor) -> Tensor:
        """alpha (B,L) -> number of tokens (B,) int64: floor(sum + tail), or without a tail the rounded sum.
        float64: the sum does not depend on the padding; FunASR's in float32 may differ at a whole number."""
        check_shapes(alpha=(alpha, "B", "L"))
        return (alpha.double().sum(1) + (self.options.predictor.tail or 0.5)).floor().long()

    def integrate(self, hidden: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B,L,D), alpha (B,L) -> counts (B,), embeds (B,U,D), from weights that are scaled to the counts.
        With a tail they stay as they are: it completes a token with a frame of zeros, which adds nothing to a sum."""
        check_shapes(alpha=(alpha, "B", "L"), hidden=(hidden, "B", "L", "D"))
        counts = self.count(alpha)
        alpha = alpha.double() if self.options.predictor.tail else scale_weights(alpha, counts)
        U = int(counts.max()) if len(counts) else 0
        return counts, cif(hidden, alpha, U)

    def predict(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor, alpha: Tensor,
                need_weights: bool = False) -> Prediction:
        """The decoder's part, where chunked.py and hotwords.py differ: arguments as Decoder.forward, and the weights
        alpha (B,L) that the tokens fired from."""
        return Prediction(*self.decoder(embeds, counts, hidden, hidden_lens, need_weights))

    def decode(self, hidden: Tensor, hidden_lens: Tensor, feat_lens: Tensor) -> Hypotheses:
        """Greedy decoding after the encoder, in one pass: `count` gives the number of tokens, each the argmax.
        hidden (B,L,D), hidden_lens (B,), feat_lens (B,) -> Hypotheses."""
        check_shapes(hidden=(hidden, "B", "L", self.embedding.embedding_dim), feat_lens=(feat_lens, "B"))
        alpha = self.weigh(hidden, hidden_lens)
        counts, embeds = self.integrate(hidden, alpha)
        found = self.predict(embeds, counts, hidden, hidden_lens, alpha)
        log_p = found.logits.float().log_softmax(-1)
        tokens = log_p.argmax(-1)
        log_p = log_p.gather(2, tokens[:, :, None]).squeeze(2)  # (B,U,V) -> (B,U)
        mask = padding_mask(counts, tokens.shape[1])
        edges = []
        for weights, L, n, T in zip(alpha.cpu(), hidden_lens.tolist(), counts.tolist(), feat_lens.tolist()):
            edges.append(in_feature_frames(boundaries(weights[:L], n), self.options.encoder).clamp(0, T))
        fine_alpha, hotword = [], []
        if self.timing is not None:
            fine_alpha = cut(self.timing(hidden, hidden_lens), hidden_lens * self.options.predictor.upsampling)
        if found.hotword is not None:
            hotword = cut(found.hotword, counts)
        return Hypotheses(tokens * mask, counts, log_p * mask, edges, alpha, fine_alpha, hotword)

    def cross_attention(self, hidden: Tensor, hidden_lens: Tensor, tokens: Tensor, lens: Tensor) -> list[Tensor]:
        """For pictures: the cross-attention (B,H,U,L) of each decoder layer that has one, where decoding behind the
        encoder, hidden (B,L,D), hidden_lens (B,), found tokens (B,U), lens (B,), which only Transformer has to read."""
        alpha = self.weigh(hidden, hidden_lens)
        counts, embeds = self.integrate(hidden, alpha)
        return self.predict(embeds, counts, hidden, hidden_lens, alpha, need_weights=True).attention
