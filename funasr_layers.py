"""The layers of the Paraformers that FunASR publishes: SAN-M, relative conformer, frame predictor, timing head.

model.py chooses them by the kinds `sanm`, `relative_conformer`, `dense` and `depthwise` of a config. They compute what
FunASR 1.4 computes, but nothing of an utterance depends on what it is batched with.

Dims: B utterances, T steps (of features, F wide, in the encoders), L encoder frames, U tokens, D model width, H heads,
K = D / H head width, V vocabulary. An *FSMN* is SAN-M's depthwise convolution over time; attributes that hold one are
called memory, as in every saved checkpoint.
Sources: Gao et al. 2020 "SAN-M" (self-attention with the FSMN of Zhang et al. 2018); Gulati et al. 2020 "Conformer";
Dai et al. 2019 (relative positions); FunASR 1.4.
"""
import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import (ConformerBlock, ConvolutionModule, FeedForward, MultiHeadAttention, Relu, at_least_float32,
                       attend, attend_step, check_feats, check_lens, check_shapes, convolve, full_precision, key_mask,
                       padding_mask, plus, run_blocks, sinusoids, zero_padding)


# ---- positions ----

def halved_sinusoids(T: int, dim: int, first: int = 0) -> Tensor:
    """(T,dim) float32: column i of row t is sin, column dim/2 + i cos of (first + t + 1) * 10000^(-i / (dim/2 - 1)).
    Source: tensor2tensor; SAN-M adds them to its input features, dim wide."""
    if dim % 2 or dim < 4:
        raise ValueError(f"halved_sinusoids: dim must be even and 4 or more, got {dim}")
    rate = torch.exp(torch.arange(dim // 2).float() * (-math.log(10000.0) / (dim // 2 - 1)))
    angle = torch.arange(first + 1, first + T + 1)[:, None] * rate  # (T, dim/2)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


RELATIVE_SPAN = 5000  # ESPnet's max_len: positions count down from here, or from the length of a longer utterance


def relative_codes(lens: Tensor, T: int, dim: int) -> Tensor:
    """lens (B,) int64 -> (B,T,dim) float32: row r is the sinusoid of position P-1-r, P = max(RELATIVE_SPAN, length).
    Source: ESPnet's first ("legacy") relative attention, which published conformers were trained with; in Dai et al.
    2019, P is the length."""
    check_shapes(lens=(lens, "B"))
    return sinusoids(lens.clamp(min=RELATIVE_SPAN)[:, None] - 1 - torch.arange(T, device=lens.device), dim)


# ---- attention ----

def relative_shift(scores: Tensor, lens: Tensor) -> Tensor:
    """Scores of queries against position codes (B,H,T,T) -> scores against keys (B,H,T,T), lens (B,).

    For each utterance, n = lens[b], prepend a zero column to its (n,n) scores, view the result as (n+1,n) and drop the
    first row: key s <= t of query t gets the score of code n-1-(t-s). Key t+1 gets 0 and later keys get scores of query
    t+1. Source: Dai et al. 2019, appendix B, as in ESPnet's first version, on which published weights rely.
    """
    check_shapes(scores=(scores, "B", "H", "T", "T"), lens=(lens, "B"))
    B, H, T, _ = scores.shape
    step = torch.arange(T, device=lens.device)
    length = lens[:, None, None]
    flat = (step[:, None] + 1) * length + step  # (B,T,T): index into the flattened (n,n+1) table
    row = flat // (length + 1)
    column = flat % (length + 1) - 1  # -1: the column of zeros
    place = row * T + column.clamp(min=0)  # (B,T,T): index into (T,T)
    place = place.flatten(1)[:, None].expand(B, H, T * T)
    moved = scores.flatten(2).gather(2, place).view(B, H, T, T)  # (B,H,T*T) -> (B,H,T,T)
    return moved.masked_fill((column < 0)[:, None], 0.0)


class RelativeAttention(MultiHeadAttention):
    """Self-attention whose scores also depend on the distance of query and key. Source: Dai et al. 2019, 3.3."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__(dim, num_heads)
        self.dropout = dropout
        self.position = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_heads, dim // num_heads)))
        self.position_bias = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_heads, dim // num_heads)))

    def forward(self, x: Tensor, codes: Tensor, lens: Tensor, mask: Tensor | None = None,
                need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,T,D), codes (B,T,D) = relative_codes(lens, T, D), lens (B,), mask (B,1,T)
        -> out (B,T,D), weights (B,H,T,T) where asked for, else None."""
        check_shapes(x=(x, "B", "T", self.dim), codes=(codes, "B", "T", self.dim))
        q, p = self.split_heads(self.query(x)), self.split_heads(self.position(codes))  # (B,H,T,K)
        k, v = self.keys_values(x)
        scores = (q + self.position_bias[:, None]) @ p.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B,H,T,T)
        bias = relative_shift(scores, lens)
        out, weights = attend(q + self.content_bias[:, None], k, v, mask, need_weights, bias,
                              self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2)), weights  # (B,H,T,K) -> (B,T,D)


class Fsmn(nn.Module):
    """x plus a depthwise convolution of it over time. Source: the FSMN of Zhang et al. 2018. The window of kernel_size
    steps begins (kernel_size - 1) // 2 + shift steps before the current one."""

    def __init__(self, dim: int, kernel_size: int, shift: int = 0, dropout: float = 0.0):
        super().__init__()
        left = (kernel_size - 1) // 2 + shift
        if not 0 <= left < kernel_size:
            raise ValueError(f"shift must be within half of kernel_size {kernel_size}, got {shift}")
        self.reach = left, kernel_size - 1 - left
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, 1, kernel_size), math.sqrt(5)))  # Conv1d's
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B,T,D), mask (B,1,T) or None -> (B,T,D); padded steps enter as zeros and come out as zeros."""
        check_shapes(x=(x, "B", "T", self.weight.shape[0]))
        x = zero_padding(x, mask)
        if x.shape[1] == 0:
            return x
        return zero_padding(self.dropout(plus(x, convolve(x, self.weight, None, self.reach))), mask)

    def step(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next steps of a sequence, x (B,T,D), behind past (B,kernel_size-1,D): what this returned for the steps
        before, None for the first ones, around which are zeros as in forward -> (B,T,D), the past of the next."""
        window = F.pad(x, (0, 0, *self.reach)) if past is None else torch.cat([past, x], 1)
        return x + convolve(window, self.weight, None, (0, 0)), window[:, window.shape[1] - sum(self.reach):]


class SanmAttention(nn.Module):
    """Self-attention from width in_dim to the model's, plus an FSMN over its values. Source: Gao et al. 2020."""

    def __init__(self, in_dim: int, options):
        super().__init__()
        dim = options.hidden_dim
        self.num_heads = options.num_heads
        if dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got {self.num_heads} heads and dim {dim}")
        self.dropout = options.attention_dropout
        self.query_key_value = nn.Linear(in_dim, 3 * dim)
        self.memory = Fsmn(dim, options.kernel_size, options.memory_shift, self.dropout)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, need_weights: bool = False,
                seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B,T,in_dim), mask (B,1,T) -> (B,T,dim), weights (B,H,T,T) where asked for.

        seen (b,S,S) bool, b * S = B * T, None for one window each: x are the windows of b sequences of S steps, whose
        queries attend to these keys, also of other windows; the FSMN sees the window alone.
        """
        check_shapes(x=(x, "B", "T", self.query_key_value.in_features))
        with full_precision(x, self.training):
            x = x if self.training else at_least_float32(x)
            q, k, v = self.query_key_value(x).chunk(3, dim=-1)  # (B,T,dim) each
            joined = (q, k, v) if seen is None else [y.reshape(*seen.shape[:2], -1) for y in (q, k, v)]
            heads = [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in joined]  # (B,H,T,K) each
            keys = mask if seen is None else seen
            out, weights = attend(*heads, keys, need_weights, dropout=self.dropout if self.training else 0.0)
            out = self.out(out.transpose(1, 2).flatten(2)).view(v.shape)  # (B,H,T,K) -> (B,T,dim)
            return plus(out, self.memory(v, mask)), weights

    def step(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """A window of a stream, x (B,T,in_dim), which sees itself and the past (2,B,H,S,K), keys and values
        -> (B,T,dim), the window's own (2,B,H,T,K). The FSMN sees the window alone."""
        with full_precision(x, training=False):
            q, k, v = self.query_key_value(at_least_float32(x)).chunk(3, dim=-1)  # (B,T,dim) each
            query, key, value = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B,H,T,K)
            own = torch.stack([key, value])
            keys, values = torch.cat([past, own], 3)
            out = attend_step(query, keys, values)
            return self.out(out.transpose(1, 2).flatten(2)) + self.memory(v, None), own


class NormedFeedForward(nn.Module):
    """Linear, ReLU, LayerNorm, linear without bias: (B,T,D) -> (B,T,D), the feed-forward of SAN-M decoders.
    ffn_dim 0 means 4 * dim."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float):
        super().__init__()
        ffn_dim = ffn_dim or 4 * dim
        self.up = nn.Linear(dim, ffn_dim)
        self.activation = Relu()
        self.norm = nn.LayerNorm(ffn_dim)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        check_shapes(x=(x, "B", "T", self.up.in_features))
        return self.down(self.norm(self.dropout(self.activation(self.up(x)))))


# ---- blocks ----

class StepNorm(nn.BatchNorm1d):
    """BatchNorm1d, but a single step, which has no variance, is normalised by the running statistics in training."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.num_features:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Pointwise(nn.Conv1d):
    """A Conv1d of kernel size 1 on (...,in), computed as an nn.Linear; its weight (out,in,1) fits published ones."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0], self.bias)


class BatchNormConvolution(ConvolutionModule):
    """The convolution module as Gulati et al. 2020 published it, with BatchNorm in place of LayerNorm. In training the
    statistics of the batch are those of its real steps only."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__(dim, kernel_size)
        self.gate = Pointwise(dim, 2 * dim, 1)
        self.norm = StepNorm(dim)
        self.out = Pointwise(dim, dim, 1)

    def normalise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or not self.training:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        real = mask[:, 0]  # (B,T)
        return x.masked_scatter(real[:, :, None], self.norm(x[real]).to(x.dtype))


class RelativeConformerBlock(ConformerBlock):
    """A conformer block with relative positions and BatchNorm, as in the paper and in published checkpoints."""

    def __init__(self, options):
        super().__init__(options)
        self.self_attention = RelativeAttention(options.hidden_dim, options.num_heads, options.attention_dropout)
        self.convolution = BatchNormConvolution(options.hidden_dim, options.kernel_size)

    def forward(self, x: Tensor, mask: Tensor | None, codes: Tensor, lens: Tensor,
                need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,T,D), mask (B,1,T), codes (B,T,D) = relative_codes(lens, T, D), lens (B,)
        -> (B,T,D) and, where asked for, the self-attention weights (B,H,T,T)."""
        check_shapes(x=(x, "B", "T", self.self_attention.dim), lens=(lens, "B"))
        x = x + 0.5 * self.dropout(self.ffn_first(self.norm_first(x)))
        with full_precision(x, self.training):
            x = x if self.training else at_least_float32(x)
            out, weights = self.self_attention(self.norm_self(x), codes, lens, mask, need_weights)
            x = plus(x, self.dropout(out))
            x = plus(x, self.dropout(self.convolution(self.norm_conv(x), mask)))
        x = x + 0.5 * self.dropout(self.ffn_second(self.norm_second(x)))
        return self.norm_out(x), weights


class SanmBlock(nn.Module):
    """Pre-norm SanmAttention, then feed-forward; attention has no residual if in_dim differs from the model's width."""

    def __init__(self, in_dim: int, options):
        super().__init__()
        self.norm_self = nn.LayerNorm(in_dim)
        self.self_attention = SanmAttention(in_dim, options)
        self.norm_ffn = nn.LayerNorm(options.hidden_dim)
        self.feed_forward = FeedForward(options.hidden_dim, options.ffn_dim, options.dropout)
        self.residual = in_dim == options.hidden_dim
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, need_weights: bool = False,
                seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As SanmAttention.forward."""
        check_shapes(x=(x, "B", "T", self.self_attention.query_key_value.in_features))
        out, weights = self.self_attention(self.norm_self(x), mask, need_weights, seen)
        out = self.dropout(out)
        x = plus(x, out) if self.residual else out
        return plus(x, self.dropout(self.feed_forward(self.norm_ffn(x)))), weights

    def step(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """A window of a stream, x (B,T,in_dim), past as in SanmAttention.step -> (B,T,dim), its own keys and values."""
        out, own = self.self_attention.step(self.norm_self(x), past)
        x = x + out if self.residual else out
        return x + self.feed_forward(self.norm_ffn(x)), own


class SanmDecoderBlock(nn.Module):
    """Feed-forward, an FSMN in place of self-attention, and cross-attention; without that, the FSMN is centred."""

    def __init__(self, options, attends: bool = True):
        super().__init__()
        dim = options.hidden_dim
        self.norm_ffn = nn.LayerNorm(dim)
        self.feed_forward = NormedFeedForward(dim, options.ffn_dim, options.dropout)
        self.norm_memory = nn.LayerNorm(dim)
        self.memory = Fsmn(dim, options.kernel_size, options.memory_shift if attends else 0, options.attention_dropout)
        self.norm_cross = nn.LayerNorm(dim) if attends else None
        self.cross_attention = MultiHeadAttention(dim, options.num_heads) if attends else None
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, hidden: Tensor, hidden_mask: Tensor | None,
                need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,U,D), mask (B,1,U), hidden (B,L,D), hidden_mask (B,1,L)
        -> (B,U,D), cross-attention weights (B,H,U,L) where asked for, else None."""
        x = self.remember(x, mask)
        if self.cross_attention is None:
            return x, None
        out, weights = self.cross_attention(self.norm_cross(x), hidden, hidden_mask, need_weights)
        return plus(x, self.dropout(out)), weights

    def remember(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The block before its cross-attention: x (B,U,D), mask (B,1,U) -> (B,U,D)."""
        check_shapes(x=(x, "B", "U", self.memory.weight.shape[0]))
        y = self.feed_forward(self.norm_ffn(x))
        y = self.memory(self.norm_memory(y), mask)
        return plus(x, self.dropout(y))  # one residual around feed-forward and memory

    def step(self, x: Tensor, past: Tensor | None, source: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next tokens of a stream, x (B,U,D), past as in Fsmn.step, source (2,B,H,S,K): keys and values of the
        cross-attention, None without one -> (B,U,D), the past of the next."""
        y, past = self.memory.step(self.norm_memory(self.feed_forward(self.norm_ffn(x))), past)
        x = x + y
        if self.cross_attention is None:
            return x, past
        cross = self.cross_attention
        out = attend_step(cross.split_heads(cross.query(self.norm_cross(x))), *source)  # (B,H,U,K)
        return x + cross.out(out.transpose(1, 2).flatten(2)), past


# ---- encoders ----

class SanmEncoder(nn.Module):
    """SanmBlocks without subsampling; positions are added to the features themselves. Source: Gao et al. 2020."""

    def __init__(self, input_dim: int, options):
        super().__init__()
        self.input_dim = input_dim
        self.dim = options.hidden_dim
        self.first = SanmBlock(input_dim, options)  # to the model's width
        self.blocks = nn.ModuleList(SanmBlock(self.dim, options) for _ in range(options.num_layers - 1))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, feats: Tensor, lens: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As Encoder.forward, with L = T."""
        check_feats(feats, lens, self.input_dim)
        mask = key_mask(lens, feats.shape[1])
        x = self.place(zero_padding(feats, mask), 0)  # padded frames may hold anything
        x, first = run_blocks([self.first], x, mask, need_weights=need_weights)
        x = at_least_float32(x)  # float32: in half precision the sum over 50 blocks would lose its low bits
        x, layers = run_blocks(self.blocks, x, mask, need_weights=need_weights)
        return zero_padding(self.norm(x), mask), lens, first + layers

    def place(self, feats: Tensor, first: int) -> Tensor:
        """Frames first.. of a stream, feats (B,T,F) -> (B,T,F), scaled and placed, as `step` takes them."""
        return feats * math.sqrt(self.dim) + halved_sinusoids(*feats.shape[1:], first).to(feats)

    def step(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """A window of a stream, x (B,T,F) of `place`, which sees itself and the past (layers,2,B,H,S,K), what this
        returned for earlier windows -> hidden (B,T,D), the window's keys and values (layers,2,B,H,T,K)."""
        owns = []
        for block, layer_past in zip([self.first, *self.blocks], past):
            x, own = block.step(x, layer_past)
            x = at_least_float32(x)
            owns.append(own)
        return self.norm(x), torch.stack(owns)


class ImageSubsampling(nn.Module):
    """Two 3 x 3 convolutions of stride 2 over the (time, bins) image without padding, and a projection to D."""

    def __init__(self, input_dim: int, dim: int):
        super().__init__()
        self.input_dim = input_dim
        self.convolutions = nn.ModuleList([nn.Conv2d(1, dim, 3, stride=2), nn.Conv2d(dim, dim, 3, stride=2)])
        self.out = nn.Linear(dim * (((input_dim - 1) // 2 - 1) // 2), dim)

    def forward(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,T,F), lens (B,) -> (B,L,D), lens ((len - 1) // 2 - 1) // 2 or 0: of frames that see no padding."""
        check_shapes(x=(x, "B", "T", self.input_dim), lens=(lens, "B"))
        x = F.pad(x, (0, 0, 0, max(0, 7 - x.shape[1])))[:, None]  # (B,1,T,F); both windows together see 7 frames
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
            lens = (lens - 1).div(2, rounding_mode="floor").clamp(min=0)
        return self.out(x.transpose(1, 2).flatten(2)), lens  # (B,D,L,bins) -> (B,L,D*bins) -> (B,L,D)


class RelativeConformerEncoder(nn.Module):
    """Image subsampling and conformer blocks with relative positions. Source: Gulati et al. 2020."""

    def __init__(self, input_dim: int, options):
        super().__init__()
        self.input_dim = input_dim
        self.dim = options.hidden_dim
        self.subsampling = ImageSubsampling(input_dim, self.dim)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(RelativeConformerBlock(options) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, feats: Tensor, lens: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As Encoder.forward, but with no encoder frame for an utterance of fewer than 7 frames."""
        check_feats(feats, lens, self.input_dim)
        feats = zero_padding(feats, key_mask(lens, feats.shape[1]))  # padded frames may hold anything
        with full_precision(feats, self.training):
            x, lens = self.subsampling(feats, lens)
        codes = self.dropout(relative_codes(lens, *x.shape[1:]).to(x))  # (B,L,D)
        mask = key_mask(lens, x.shape[1])  # (B,1,L)
        x = self.dropout(x * math.sqrt(self.dim))
        x, layers = run_blocks(self.blocks, x, mask, codes, lens, need_weights=need_weights)
        return zero_padding(self.norm(x), mask), lens, layers


# ---- predictors: the weight of every frame ----

class FramePredictor(nn.Module):
    """FunASR's predictors: firing weights from one convolution, `dense`, or `depthwise` with a residual."""

    def __init__(self, dim: int, options):
        super().__init__()
        self.options = options
        self.dim = dim
        groups = dim if options.kind == "depthwise" else 1
        self.convolution = nn.Conv1d(dim, dim, options.left + 1 + options.right, groups=groups)
        self.dropout = nn.Dropout(options.dropout)
        self.firing = nn.Linear(dim, 1)

    def forward(self, hidden: Tensor, lens: Tensor) -> Tensor:
        """hidden (B,L,D), lens (B,) -> alpha (B,L) float32, 0 in padded frames; hidden itself is not masked here."""
        check_shapes(hidden=(hidden, "B", "L", self.dim), lens=(lens, "B"))
        y = convolve(hidden, self.convolution.weight, self.convolution.bias, (self.options.left, self.options.right))
        if self.options.kind == "depthwise":
            y = self.dropout(y + hidden)
        weight = self.firing(F.relu(y)).squeeze(-1).float().sigmoid()
        return F.relu(weight * self.options.smooth - self.options.noise) * padding_mask(lens, hidden.shape[1])


class TimingHead(nn.Module):
    """Firing weights at `upsampling` times the encoder's rate, fine enough to tell when a token begins and ends."""

    def __init__(self, dim: int, options):
        super().__init__()
        self.options = options
        self.upsample = nn.ConvTranspose1d(dim, dim, options.upsampling, stride=options.upsampling)
        self.lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.firing = nn.Linear(2 * dim, 1)

    def forward(self, hidden: Tensor, lens: Tensor) -> Tensor:
        """hidden (B,L,D), lens (B,) -> (B,upsampling*L) float32, 0 in padded frames, which the LSTM does not see."""
        check_shapes(hidden=(hidden, "B", "L", self.upsample.in_channels))
        check_lens("lens", lens, *hidden.shape[:2])
        rate = self.options.upsampling
        x = self.upsample(hidden.transpose(1, 2)).transpose(1, 2)  # (B,rate*L,D)
        steps = (lens * rate).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, steps, batch_first=True, enforce_sorted=False)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        weight = self.firing(x).squeeze(-1).float().sigmoid()
        weight = F.relu(weight * self.options.timing_smooth - self.options.timing_noise)
        return weight * padding_mask(lens * rate, x.shape[1])


# ---- decoders ----

class SanmDecoder(nn.Module):
    """SanmDecoderBlocks, of which the first attention_layers have cross-attention to the encoder."""

    def __init__(self, source_dim: int, vocab_size: int, options):
        super().__init__()
        D = options.hidden_dim
        count = options.attention_layers or options.num_layers
        others = options.num_layers - count  # centred as in FunASR
        self.source_dim = source_dim
        self.blocks = nn.ModuleList(SanmDecoderBlock(options) for _ in range(count))
        self.memory_blocks = nn.ModuleList(SanmDecoderBlock(options, attends=False) for _ in range(others))
        feed_forward = NormedFeedForward(D, options.ffn_dim, options.dropout)
        self.last = nn.Sequential(OrderedDict(norm_ffn=nn.LayerNorm(D), feed_forward=feed_forward))  # no residual
        self.norm = nn.LayerNorm(D)
        self.output = nn.Linear(D, vocab_size)

    def forward(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor,
                need_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """As Decoder.forward."""
        x, layers = self.states(self.blocks, embeds, counts, hidden, hidden_lens, need_weights)
        return self.output(x), layers

    def states(self, blocks: Iterable[nn.Module], embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor,
               need_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """forward before `output`, through these blocks with cross-attention -> (B,U,D), as Decoder.forward."""
        check_shapes(embeds=(embeds, "B", "U", self.source_dim), counts=(counts, "B"),
                     hidden=(hidden, "B", "L", self.source_dim), hidden_lens=(hidden_lens, "B"))
        mask = key_mask(counts, embeds.shape[1])
        hidden_mask = key_mask(hidden_lens, hidden.shape[1])
        blocks = [*blocks, *self.memory_blocks]
        x, layers = run_blocks(blocks, embeds, mask, hidden, hidden_mask, need_weights=need_weights)
        return self.norm(self.last(x)), layers

    def keys_values(self, hidden: Tensor) -> Tensor:
        """hidden (B,L,D) -> keys and values of the cross-attention of every block that has one (blocks,2,B,H,L,K)."""
        return torch.stack([torch.stack(block.cross_attention.keys_values(hidden)) for block in self.blocks])

    def step(self, embeds: Tensor, past: Tensor | None, source: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens of a stream, embeds (B,U,D), which see the source (blocks,2,B,H,S,K), of `keys_values`, and
        the past (layers,B,kernel_size-1,D), what this returned for the tokens before, None for the first ones
        -> logits (B,U,V), the past of the next."""
        x = embeds
        pasts = []
        for i, block in enumerate([*self.blocks, *self.memory_blocks]):
            block_source = source[i] if i < len(self.blocks) else None
            x, rows = block.step(x, None if past is None else past[i], block_source)
            pasts.append(rows)
        return self.output(self.norm(self.last(x))), torch.stack(pasts)
