"""Paraformer: encoder, CIF predictor, glancing sampler, parallel decoder; tensors in, losses or greedy token ids out.

Reading order: Encoder, the predictor (Predictor, scale_weights, cif, boundaries), Decoder, the sampler (glance),
the losses, Paraformer, which puts them together, ARCHITECTURES, from which `build` chooses by name, and checkpoints.
Needs torch, numpy and attention.py. The sizes come from a config section whose attributes are read by name (config.py).

    feats -> Encoder -> hidden -> Predictor -> alpha -> cif -> embeds -> Decoder(embeds, hidden) -> logits
    (B,T,F)            (B,L,D)                (B,L)           (B,U,D)                              (B,U,V)

Dims: B utterances, T feature frames, F feature bins, L = ceil(T / subsampling) encoder frames, U tokens, D model width,
V vocabulary. Masks are bool, True = real. Token id 0 is both the CTC blank and the padding of token tensors.
Sources: Gao et al. 2022 "Paraformer" (the model, its losses, the sampler); Dong & Xu 2020 "CIF" (integrate-and-fire).
"""
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import ConformerBlock, PositionalEncoding, TransformerBlock, check_lens, check_shape, padding_mask

BLANK = 0  # CTC blank and padding


# ---- encoder ----


class Subsampling(nn.Module):
    """Convolutions over 3 frames that bring F bins to D channels and keep every frame, every 2nd or every 4th."""

    STRIDES = {1: (1,), 2: (2,), 4: (2, 2)}

    def __init__(self, input_dim: int, dim: int, factor: int):
        super().__init__()
        if factor not in self.STRIDES:
            raise ValueError(f"subsampling must be one of {list(self.STRIDES)}, got {factor}")
        widths = [input_dim] + [dim] * len(self.STRIDES[factor])
        self.convolutions = nn.ModuleList(nn.Conv1d(i, o, 3, stride=s, padding=1)
                                          for i, o, s in zip(widths, widths[1:], self.STRIDES[factor]))

    def forward(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,T,F), lens (B,) -> (B,L,D), lens (B,) with each length ceil(len / factor)."""
        check_shape("x", x, "B", "T", self.convolutions[0].in_channels)
        check_shape("lens", lens, x.shape[0])
        for convolution in self.convolutions:
            x = x.masked_fill(~padding_mask(lens, x.shape[1])[:, :, None], 0.0)  # what pads may hold anything
            x = F.gelu(convolution(x.transpose(1, 2)).transpose(1, 2))
            lens = (lens - 1).div(convolution.stride[0], rounding_mode="floor") + 1
        return x, lens


class Encoder(nn.Module):
    """Subsampling, positions, and a stack of bidirectional transformer or conformer blocks."""

    def __init__(self, input_dim: int, options):
        super().__init__()
        self.input_dim, D = input_dim, options.hidden_dim
        self.subsampling = Subsampling(input_dim, D, options.subsampling)
        self.position = PositionalEncoding(D, options.position)
        self.dropout = nn.Dropout(options.dropout)
        sizes = dict(dim=D, num_heads=options.num_heads, ffn_dim=options.ffn_dim or 4 * D, dropout=options.dropout)
        make = {"transformer": lambda: TransformerBlock(**sizes),
                "conformer": lambda: ConformerBlock(**sizes, kernel_size=options.kernel_size)}
        if options.kind not in make:
            raise ValueError(f"encoder.kind must be one of {list(make)}, got {options.kind!r}")
        self.blocks = nn.ModuleList(make[options.kind]() for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(D)

    def forward(self, feats: Tensor, lens: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """feats (B,T,F), lens (B,) -> hidden (B,L,D), 0 where it pads, its lens (B,), and the weights of each layer."""
        check_shape("feats", feats, "B", "T", self.input_dim)
        check_lens("feat_lens", lens, feats.shape[0], feats.shape[1])
        if feats.shape[1] == 0:
            raise ValueError(f"feats must have at least one frame, got {tuple(feats.shape)}")
        x, lens = self.subsampling(feats, lens)
        mask = padding_mask(lens, x.shape[1])
        x, layers = self.dropout(self.position(x)), []
        for block in self.blocks:
            x, weights = block(x, mask[:, None, :], need_weights=need_weights)
            layers.append(weights)
        return self.norm(x).masked_fill(~mask[:, :, None], 0.0), lens, layers if need_weights else []


# ---- predictor: continuous integrate-and-fire ----


class Predictor(nn.Module):
    """Firing weight of each encoder frame, in (0,1); their sum estimates the number of tokens."""

    def __init__(self, dim: int, options):
        super().__init__()
        self.dim = dim
        widths = [dim] + [options.hidden_dim] * options.num_layers
        self.convolutions = nn.ModuleList(nn.Conv1d(i, o, options.kernel_size, padding=options.kernel_size // 2)
                                          for i, o in zip(widths, widths[1:]))
        self.dropout = nn.Dropout(options.dropout)
        self.weight = nn.Linear(widths[-1], 1)

    def forward(self, hidden: Tensor, lens: Tensor) -> Tensor:
        """hidden (B,L,D), lens (B,) -> alpha (B,L) float32, 0 where it pads."""
        check_shape("hidden", hidden, "B", "L", self.dim)
        check_shape("lens", lens, hidden.shape[0])
        mask = padding_mask(lens, hidden.shape[1])
        x = hidden
        for convolution in self.convolutions:
            x = (x * mask[:, :, None]).transpose(1, 2)  # (B,D,L)
            x = self.dropout(F.relu(convolution(x).transpose(1, 2)))
        return self.weight(x).squeeze(-1).float().sigmoid() * mask


def scale_weights(alpha: Tensor, counts: Tensor) -> Tensor:
    """Scale each row of alpha (B,L) to sum to counts (B,): -> (B,L) float64. A row of zeros stays zeros.

    float64: with float32 sums the last token of an utterance is lost at random, when its sum ends just below the count.
    """
    check_shape("alpha", alpha, "B", "L")
    check_shape("counts", counts, alpha.shape[0])
    alpha = alpha.double()
    return alpha * (counts / alpha.sum(1).clamp(min=1e-12))[:, None]


def cif(hidden: Tensor, alpha: Tensor, U: int) -> Tensor:
    """Integrate and fire: one embedding for each unit of the running sum of the weights.

    hidden (B,L,D), alpha (B,L) float64 -> (B,U,D). With c_t = alpha_1 + ... + alpha_t, token u is
    sum_t |[c_{t-1}, c_t] intersected with [u, u+1]| * hidden_t, which the sequential loop of Dong & Xu 2020 gives too;
    a frame that carries more than one unit gives to all of them, and units past the sum are zero.
    """
    check_shape("alpha", alpha, "B", "L")
    check_shape("hidden", hidden, *alpha.shape, "D")
    end = alpha.cumsum(1)[:, None, :]  # (B,1,L)
    start = end - alpha[:, None, :]
    unit = torch.arange(U, device=alpha.device)[:, None]  # (U,1)
    overlap = (torch.minimum(end, unit + 1) - torch.maximum(start, unit)).clamp(min=0)  # (B,U,L)
    return overlap.to(hidden.dtype) @ hidden


def boundaries(alpha: Tensor, n: int) -> Tensor:
    """Boundaries of the n tokens that weights alpha (L,) of one utterance fire: -> (n+1,) float64 in encoder frames.

    The weights of a token are a peak within it, so its centre is where their sum, scaled to n, reaches u + 1/2;
    neighbours meet half way between their centres and the outer edges mirror that. (The sum crosses whole numbers in
    the flat parts between peaks, where the place says little.) One token alone takes all frames.
    """
    check_shape("alpha", alpha, "L")
    L = len(alpha)
    if n < 2:
        return torch.tensor([0.0, L][:n + 1], dtype=torch.float64)
    total = np.concatenate([[0.0], np.cumsum(alpha.double().numpy())])
    centre = np.interp(np.arange(n) + 0.5, total * (n / total[-1]), np.arange(L + 1))  # (n,)
    middle = (centre[1:] + centre[:-1]) / 2  # (n-1,)
    outer = max(0.0, 2 * centre[0] - middle[0]), min(float(L), 2 * centre[-1] - middle[-1])
    return torch.from_numpy(np.concatenate([outer[:1], middle, outer[1:]]))


# ---- decoder ----


class Decoder(nn.Module):
    """Bidirectional transformer over the acoustic embeddings, with cross-attention to the encoder, in one pass."""

    def __init__(self, memory_dim: int, vocab_size: int, options):
        super().__init__()
        D = options.hidden_dim
        self.input = nn.Linear(memory_dim, D)
        self.position = PositionalEncoding(D, options.position)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(D, options.num_heads, options.ffn_dim or 4 * D, options.dropout,
                                                     memory_dim) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(D)
        self.output = nn.Linear(D, vocab_size)

    def forward(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor,
                need_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """embeds (B,U,Dm), counts (B,), hidden (B,L,Dm), hidden_lens (B,)
        -> logits (B,U,V) and the cross-attention weights (B,H,U,L) of each layer where asked for."""
        check_shape("embeds", embeds, "B", "U", self.input.in_features)
        check_shape("counts", counts, embeds.shape[0])
        check_shape("hidden", hidden, embeds.shape[0], "L", self.input.in_features)
        check_shape("hidden_lens", hidden_lens, embeds.shape[0])
        mask = padding_mask(counts, embeds.shape[1])[:, None, :]
        memory_mask = padding_mask(hidden_lens, hidden.shape[1])[:, None, :]
        x, layers = self.dropout(self.position(self.input(embeds))), []
        for block in self.blocks:
            x, weights = block(x, mask, hidden, memory_mask, need_weights)
            layers.append(weights)
        return self.output(self.norm(x)), layers if need_weights else []


# ---- the glancing sampler ----


def glance(embeds: Tensor, truth: Tensor, counts: Tensor, wrong: Tensor, ratio: float, order: Tensor) -> Tensor:
    """Replace floor(ratio * wrong) acoustic embeddings of each utterance by those of the true tokens.

    embeds, truth (B,U,D), counts (B,) tokens, wrong (B,) errors of the first pass, order (B,U) float: the positions
    with the smallest values are replaced -> (B,U,D). Source: Gao et al. 2022, 3.3; the floor as in FunASR.
    """
    check_shape("embeds", embeds, "B", "U", "D")
    check_shape("truth", truth, *embeds.shape)
    check_shape("counts", counts, embeds.shape[0])
    check_shape("wrong", wrong, embeds.shape[0])
    check_shape("order", order, *embeds.shape[:2])
    order = order.masked_fill(~padding_mask(counts, embeds.shape[1]), torch.inf)
    rank = order.argsort(1).argsort(1)  # (B,U): 0 for the smallest
    picked = rank < (wrong * ratio).floor()[:, None]
    return torch.where(picked[:, :, None], truth, embeds)


# ---- losses: sums over tokens, divided by the trainer ----


def cross_entropy_sum(logits: Tensor, tokens: Tensor, lens: Tensor, smoothing: float) -> Tensor:
    """KL divergence to the smoothed target, summed over real tokens: q = 1-e at the target, e/(V-1) elsewhere.

    logits (B,U,V), tokens (B,U) int64, lens (B,) -> scalar. The entropy of q is subtracted, so the minimum is 0.
    """
    check_shape("logits", logits, "B", "U", "V")
    check_shape("tokens", tokens, *logits.shape[:2])
    check_shape("lens", lens, logits.shape[0])
    V = logits.shape[-1]
    q = torch.tensor([1 - smoothing, smoothing / (V - 1)], dtype=torch.float64)
    entropy = -(q[0] * q[0].log() + (V - 1) * torch.special.xlogy(q[1], q[1])).item()
    log_p = logits.float().log_softmax(-1)
    target = log_p.gather(2, tokens[:, :, None]).squeeze(2)  # (B,U)
    cost = -(1 - smoothing) * target - smoothing / (V - 1) * (log_p.sum(-1) - target) - entropy
    return torch.where(padding_mask(lens, tokens.shape[1]), cost, 0.0).sum()


def ctc_sum(logits: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """CTC loss summed over utterances; one whose tokens cannot fit its frames contributes 0.

    logits (B,L,V), lens (B,), tokens (B,U), token_lens (B,) -> scalar.
    """
    check_shape("logits", logits, "B", "L", "V")
    check_shape("tokens", tokens, logits.shape[0], "U")
    check_lens("lens", lens, *logits.shape[:2])
    check_lens("token_lens", token_lens, *tokens.shape)
    log_p = logits.float().log_softmax(-1).transpose(0, 1)  # (L,B,V)
    return F.ctc_loss(log_p, tokens, lens, token_lens, blank=BLANK, reduction="sum", zero_infinity=True)


# ---- the model ----


class Hypotheses(NamedTuple):
    """What free-running decoding found. U is the largest predicted count; tokens and log_probs past an utterance's
    count are 0."""

    tokens: Tensor  # (B,U) int64
    lens: Tensor  # (B,) int64, predicted counts
    log_probs: Tensor  # (B,U) float32 of each token
    boundaries: list[Tensor]  # (count+1,) float64 each, feature frames: token u lies in [u, u+1]
    alpha: Tensor  # (B,L) float32, the firing weights as predicted
    attention: list[Tensor]  # cross-attention (B,H,U,L) of each decoder layer, where asked for


class Paraformer(nn.Module):
    """Parallel transformer with the number and place of the tokens from integrate-and-fire. Source: Gao et al. 2022."""

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__()
        D = options.encoder.hidden_dim
        self.options = options
        self.encoder = Encoder(input_dim, options.encoder)
        self.predictor = Predictor(D, options.predictor)
        self.decoder = Decoder(D, vocab_size, options.decoder)
        self.embedding = nn.Embedding(vocab_size, D)  # of the true tokens, for the sampler
        self.ctc = nn.Linear(D, vocab_size) if options.ctc_weight else None

    def forward(self, feats: Tensor, feat_lens: Tensor, tokens: Tensor, token_lens: Tensor,
                order: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Training losses: two passes through the decoder, the first without gradient, with the sampler between them.

        feats (B,T,F) float, feat_lens (B,) int64, tokens (B,U) int64 padded with 0, token_lens (B,) int64; order (B,U)
        is the sampler's random draw, taken from torch's generator if None.
        -> sums by name (`loss` is their weighted total) and the number of tokens to divide them by.
        """
        hidden, hidden_lens, _ = self.encoder(feats, feat_lens)
        check_shape("tokens", tokens, feats.shape[0], "U")
        check_lens("token_lens", token_lens, *tokens.shape)
        alpha = self.predictor(hidden, hidden_lens)
        embeds = cif(hidden, scale_weights(alpha, token_lens), tokens.shape[1])
        with torch.no_grad():
            first, _ = self.decoder(embeds, token_lens, hidden, hidden_lens)
            wrong = ((first.argmax(-1) != tokens) & padding_mask(token_lens, tokens.shape[1])).sum(1)
        order = torch.rand(tokens.shape, device=tokens.device) if order is None else order
        mixed = glance(embeds, self.embedding(tokens), token_lens, wrong, self.options.sampling_ratio, order)
        logits, _ = self.decoder(mixed, token_lens, hidden, hidden_lens)
        sums = {"ce": cross_entropy_sum(logits, tokens, token_lens, self.options.label_smoothing),
                "quantity": (alpha.sum(1) - token_lens).abs().sum()}
        if self.ctc is not None:
            sums["ctc"] = ctc_sum(self.ctc(hidden), hidden_lens, tokens, token_lens)
        return self.total(sums), token_lens.sum()

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `loss` = (1 - w) ce + quantity_weight quantity + w ctc, with w = ctc_weight."""
        w = self.options.ctc_weight
        loss = (1 - w) * sums["ce"] + self.options.quantity_weight * sums["quantity"] + w * sums.get("ctc", 0.0)
        return {"loss": loss, **sums}

    @torch.no_grad()
    def greedy(self, feats: Tensor, feat_lens: Tensor, need_weights: bool = False) -> Hypotheses:
        """Decode in one pass: the rounded sum of the weights is the token count, each token is its argmax.

        feats (B,T,F), feat_lens (B,) -> Hypotheses. A count of zero gives an utterance without tokens.
        Raises ValueError naming the utterances whose features are not finite.
        """
        check_shape("feats", feats, "B", "T", self.encoder.input_dim)
        check_lens("feat_lens", feat_lens, *feats.shape[:2])
        real = padding_mask(feat_lens, feats.shape[1])[:, :, None]
        bad = (~feats.isfinite() & real).flatten(1).any(1)
        if bad.any():
            raise ValueError(f"feats must be finite, got NaN or infinity in utterances {bad.nonzero()[:, 0].tolist()}")
        hidden, hidden_lens, _ = self.encoder(feats, feat_lens)
        alpha = self.predictor(hidden, hidden_lens)
        counts = (alpha.double().sum(1) + 0.5).floor().long()
        U = int(counts.max()) if len(counts) else 0
        scaled = scale_weights(alpha, counts)
        logits, attention = self.decoder(cif(hidden, scaled, U), counts, hidden, hidden_lens, need_weights)
        log_p, tokens = logits.float().log_softmax(-1).max(-1)
        mask = padding_mask(counts, U)
        rows = zip(alpha.cpu(), hidden_lens.tolist(), counts.tolist(), feat_lens.tolist())
        s = self.options.encoder.subsampling  # encoder frame l is centred on feature frame s * l
        edges = [(boundaries(a[:L], n) * s - (s - 1) / 2).clamp(0, T) for a, L, n, T in rows]
        return Hypotheses(tokens * mask, counts, log_p * mask, edges, alpha, attention)


# ---- by name, and from a file ----

ARCHITECTURES = {"paraformer": Paraformer}


def build(options, input_dim: int, vocab_size: int) -> nn.Module:
    """The model that options.name asks for, with fresh weights. Raises ValueError if there is none of that name."""
    if options.name not in ARCHITECTURES:
        raise ValueError(f"model.name must be one of {sorted(ARCHITECTURES)}, got {options.name!r}")
    return ARCHITECTURES[options.name](options, input_dim, vocab_size)


CHECKPOINT_KEYS = ("config", "tokenizer", "stats", "model")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The state that train.py saved, on the CPU, loaded with weights_only. Raises ValueError if it is no such file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: wanted a checkpoint, got no such file; train one: python train.py CONFIG") from None
    except Exception as error:  # whatever unpickling or the zip reader raise
        kind = type(error).__name__
        raise ValueError(f"{path}: wanted a checkpoint of train.py, got what torch cannot load ({kind})") from None
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path}: wanted a checkpoint of train.py, got a file without {', '.join(missing)}")
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str) -> None:
    """Copy all weights into the model. Raises one ValueError that names every missing, unused and misshapen tensor."""
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in weights]
    wrong += [f"unused {name}" for name in weights if name not in own]
    wrong += [f"{name} {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}" for name in own
              if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"{place}: weights do not fit the model of its config: {'; '.join(wrong)}")
    model.load_state_dict(weights)
