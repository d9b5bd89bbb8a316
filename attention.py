"""Attention, feed-forward and position modules, and the blocks built from them.

Needs torch and numpy and imports nothing of ours, so it can be copied alone. Reading order: checks and masks,
positions, attention, feed-forwards, blocks.

Dims: B utterances, T query steps, S key steps (S = T in self-attention), D model width, H heads, K = D / H head width,
W hypotheses of an utterance; in decoders U tokens, L encoder frames. `source` is what cross-attention reads.
Masks are bool, True = real (may be seen), and are made by `padding_mask`, `causal_mask` and `near_mask` only (by
chunked.py for the windows of a stream); `key_mask` is padding_mask shaped for the keys:

    encoder self-attention    key_mask(lens, T)                                       (B,1,T), None without padding
    limited to n neighbours   padding_mask(lens, T)[:, None, :] & near_mask(T, n)     (B,T,T)
    causal self-attention     padding_mask(lens, T)[:, None, :] & causal_mask(T)      (B,T,T)
    cross-attention           key_mask(source_lens, S)                                (B,1,S), None without padding

Sources: Vaswani et al. 2017 "Attention is all you need" (attention, sinusoids); Gulati et al. 2020 "Conformer".
"""
import contextlib
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- checks and masks ----

def check_shapes(**wanted: tuple[Tensor | str | int, ...]) -> None:
    """Raise ValueError unless each name=(tensor, *dims) has these dims: an int is that size, a str any size, but the
    same for all tensors: check_shapes(x=(x, "B", "T", 80), lens=(lens, "B"))."""
    sizes: dict[str, int] = {}
    for name, (x, *dims) in wanted.items():
        known = sizes.copy()
        fits = x.dim() == len(dims)
        for dim, size in zip(dims, x.shape):
            fits = fits and size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
        if not fits:
            dims = ",".join(str(known.get(dim, dim)) for dim in dims)
            raise ValueError(f"{name} must be ({dims}), got {tuple(x.shape)}")


def check_lens(name: str, lens: Tensor, B: int, T: int) -> None:
    """Raise ValueError unless lens is (B,) int64 with values in 0..T. A GPU's are not waited for."""
    if lens.shape != (B,) or lens.dtype != torch.int64:
        raise ValueError(f"{name} must be ({B},) int64, got {tuple(lens.shape)} {lens.dtype}")
    if lens.device.type == "cpu" and not all(0 <= n <= T for n in lens.tolist()):
        raise ValueError(f"{name} must lie in 0..{T}, got {lens.tolist()}")


def padding_mask(lens: Tensor, T: int) -> Tensor:
    """lens (B,) int64 -> (B,T) bool, True where the step is real. Raises as check_lens."""
    check_lens("lens", lens, lens.shape[0] if lens.dim() else 0, T)
    return torch.arange(T, device=lens.device) < lens[:, None]


def key_mask(lens: Tensor, S: int) -> Tensor | None:
    """lens (B,) int64 -> (B,1,S) bool, True where the key is real, or None if all are, which saves every layer the
    masking (lens on the CPU only, as in check_lens). Raises as check_lens."""
    if S and lens.device.type == "cpu" and lens.tolist() == [S] * lens.numel():
        return None
    return padding_mask(lens, S)[:, None, :]


def causal_mask(T: int, device: torch.device | None = None) -> Tensor:
    """(T,T) bool, True where query row t may see key column s: s <= t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def near_mask(T: int, context: int, device: torch.device | None = None) -> Tensor:
    """(T,T) bool, True where query row t may see key column s: |t - s| <= context."""
    step = torch.arange(T, device=device)
    return (step[:, None] - step).abs() <= context


def full_precision(x: Tensor, training: bool) -> contextlib.AbstractContextManager:
    """In evaluation, no autocast: half precision could move the sums that give the token count past a whole number."""
    return contextlib.nullcontext() if training else torch.autocast(x.device.type, enabled=False)


def check_feats(feats: Tensor, lens: Tensor, input_dim: int) -> None:
    """Raise ValueError unless feats is (B,T,input_dim) with a frame or more, and lens (B,) int64 in 0..T."""
    check_shapes(feats=(feats, "B", "T", input_dim))
    check_lens("feat_lens", lens, feats.shape[0], feats.shape[1])
    if feats.shape[1] == 0:
        raise ValueError(f"feats must have at least one frame, got {tuple(feats.shape)}")


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B,T,D) with zeros where mask (B,1,T) of `key_mask` is False, so that no result depends on the batch; None: x
    as it is. Raises ValueError for other shapes."""
    if mask is None:
        return x
    check_shapes(x=(x, "B", "T", "D"), mask=(mask, "B", 1, "T"))
    return x.masked_fill(~mask.transpose(1, 2), 0.0)


# ---- positions ----

def sinusoids(places: Tensor, dim: int) -> Tensor:
    """places (...) -> (...,dim) float32: column 2i is sin, 2i+1 cos of place * 10000^(-2i/dim). Vaswani et al. 2017."""
    if dim % 2:
        raise ValueError(f"sinusoids: dim must be even, got {dim}")
    rate = torch.exp(torch.arange(0, dim, 2, device=places.device) * (-math.log(10000.0) / dim))
    angle = places[..., None] * rate  # (...,dim/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class PositionalEncoding(nn.Module):
    """Add position codes to x (B,T,D): fixed `sinusoidal` for any T, `learnable` for T <= max_len, or `none`.
    With `none`, only the convolutions of a conformer tell the order: attention without positions can neither memorise
    where words usually stand, a risk with a small corpus, nor fail past the longest training utterance."""

    def __init__(self, dim: int, kind: str = "sinusoidal", max_len: int = 2000):
        super().__init__()
        if kind not in ("sinusoidal", "learnable", "none"):
            raise ValueError(f"position must be sinusoidal, learnable or none, got {kind!r}")
        self.dim = dim
        self.kind = kind
        self.max_len = max_len
        if kind == "learnable":
            self.table = nn.Parameter(torch.randn(max_len, dim) * 0.02)
        elif kind == "sinusoidal":
            self.register_buffer("table", sinusoids(torch.arange(max_len), dim), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """x (B,T,D), whose first step has position `first` -> (B,T,D). Raises ValueError past a learnable table."""
        check_shapes(x=(x, "B", "T", self.dim))
        last = first + x.shape[1]
        if self.kind == "none":
            return x
        if last <= self.max_len:
            return x + self.table[first:last]
        if self.kind == "learnable":
            raise ValueError(f"position: the learnable table ends at {self.max_len} steps, got {last}; use sinusoidal")
        return x + sinusoids(torch.arange(first, last), self.dim).to(x)


# ---- attention ----

def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, bias: Tensor | None = None,
           dropout: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """softmax(q k' / sqrt(K) + bias) v. q (B,H,T,K), k, v (B,H,S,K), mask (B,1 or T,S) bool, bias (B,H,T,S)
    -> (B,H,T,K), weights (B,H,T,S) or None. dropout: share of the weights dropped (callers pass 0 in evaluation).
    A query that sees no key gives 0. Weights are only known on the explicit path, which is equal to the fused one."""
    check_shapes(q=(q, "B", "H", "T", "K"), k=(k, "B", "H", "S", "K"), v=(v, "B", "H", "S", "K"))
    B, _, T, _ = q.shape
    S = k.shape[2]
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, 1, S), (B, T, S))):
        raise ValueError(f"mask must be ({B},1,{S}) or ({B},{T},{S}) bool, got {tuple(mask.shape)} {mask.dtype}")
    if need_weights:
        return attend_explicit(q, k, v, mask, bias, dropout)
    return attend_fused(q, k, v, mask, bias, dropout), None


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout: float) -> Tensor:
    """`attend` by torch's kernel, which never holds all weights at once."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    mask, has_key = open_empty_rows(mask)
    if bias is not None:
        mask = bias.masked_fill(~mask, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout) * has_key


def attend_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` without a mask, to the last bit the same in every batch, on any number of threads: the last bits of
    torch's kernel depend on where in a cache line the scratch of a thread begins, which queries in sixteens align."""
    T = q.shape[2]
    return attend(F.pad(q, (0, 0, 0, -T % 16)), k, v, None, need_weights=False)[0][:, :, :T]


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
                    dropout: float) -> tuple[Tensor, Tensor]:
    """`attend` step by step -> (B,H,T,K), weights (B,H,T,S)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B,H,T,S)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        weights = scores.softmax(-1)
    else:
        mask, has_key = open_empty_rows(mask)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1) * has_key
    return F.dropout(weights, dropout, dropout > 0) @ v, weights


def open_empty_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask (B,1 or T,S) -> mask (B,1,1 or T,S), in which a query without a key sees all; has_key (B,1,1 or T,1), by
    which to multiply the result, so that such a query gives 0: a softmax over nothing is NaN, in the gradient too."""
    mask = mask[:, None]  # (B,1 or T,S) -> (B,1,1 or T,S)
    has_key = mask.any(-1, keepdim=True)  # (B,1,1 or T,1)
    return mask | ~has_key, has_key


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in H heads; the keys come from x itself or from a source of width source_dim.
    No dropout on the attention weights, which the fused CPU kernels lack; the blocks apply it to the output."""

    def __init__(self, dim: int, num_heads: int, source_dim: int | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {num_heads} heads and dim {dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.source_dim = source_dim or dim
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(self.source_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B,T,D) -> (B,H,T,K)

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None,
                need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,T,D), source (B,S,source_dim) or None for self-attention, mask (B,1 or T,S) bool
        -> out (B,T,D), weights (B,H,T,S) where asked for, else None."""
        source = x if source is None else source
        check_shapes(x=(x, "B", "T", self.dim), source=(source, "B", "S", self.source_dim))
        return self.attend_to(x, *self.keys_values(source), mask, need_weights)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B,S,source_dim) -> its keys and its values, (B,H,S,K) each, for attend_to or a cache."""
        k, v = self.key_value(source).chunk(2, dim=-1)
        return self.split_heads(k), self.split_heads(v)

    def attend_to(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                  need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """As forward, with the keys and values k, v (B,H,S,K) of a source in place of the source."""
        out, weights = attend(self.split_heads(self.query(x)), k, v, mask, need_weights)
        out = self.out(out.transpose(1, 2).flatten(2))  # (B,H,T,K) -> (B,T,D)
        if mask is not None:
            out = out * mask.any(-1, keepdim=True)  # no key: 0, without the bias of self.out
        return out, weights


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is if float64: half precision loses the low bits of long sums."""
    return x if x.dtype == torch.float64 else x.float()


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in inference in the memory of y, which must be new: memory outside the cache costs more than sums."""
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else y.add_(x)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reach: tuple[int, int], stride: int = 1) -> Tensor:
    """F.conv1d over the steps of x (B,T,C) -> (B,T',D), 3 to 10 times faster on a CPU.
    weight (D,C,k), or (D,1,k) for a depthwise convolution; bias (D,) or None; reach: zeros padded before and after, k-1
    in all if T' is to be T at stride 1. F.conv1d would have x copied to (B,C,T): this is a matrix product with windows
    of x or, if depthwise, a convolution over an image of height 1 whose channels are last."""
    before, after = reach
    is_dense = weight.shape[1] == x.shape[2]
    if is_dense or before != after or torch.is_grad_enabled():
        x = F.pad(x, (0, 0, before, after))
        before = 0  # else conv2d pads, both ends alike, which saves a copy; its gradients would differ in the last bit
    if is_dense:
        return F.linear(x.unfold(1, weight.shape[2], stride).flatten(2), weight.flatten(1), bias)  # (B,T',C*k)
    x = x.transpose(1, 2)[:, :, None]  # (B,C,1,T)
    x = F.conv2d(x, weight[:, :, None], bias, (1, stride), (0, before), groups=len(weight))
    return x[:, :, 0].transpose(1, 2)


class Relu(nn.Module):
    """max(x, 0), in inference in the memory of x, as `plus`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=not torch.is_grad_enabled())


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: (B,T,D) -> (B,T,D). ffn_dim 0 means 4 * dim."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float = 0.0, activation: type[nn.Module] = Relu):
        super().__init__()
        ffn_dim = ffn_dim or 4 * dim
        self.layers = nn.Sequential(nn.Linear(dim, ffn_dim), activation(), nn.Dropout(dropout), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        check_shapes(x=(x, "B", "T", self.layers[0].in_features))
        return self.layers(x)


# ---- blocks ----

class TransformerBlock(nn.Module):
    """Pre-norm block: self-attention, cross-attention if source_dim is given, feed-forward; each added to its input.
    Reads options.hidden_dim, num_heads, ffn_dim and dropout."""

    def __init__(self, options, source_dim: int | None = None):
        super().__init__()
        dim = options.hidden_dim
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = MultiHeadAttention(dim, options.num_heads)
        self.cross_attention = None
        if source_dim is not None:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross_attention = MultiHeadAttention(dim, options.num_heads, source_dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, options.ffn_dim, options.dropout)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, source: Tensor | None = None,
                source_mask: Tensor | None = None, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,T,D), mask (B,1 or T,T), source (B,S,source_dim), source_mask (B,1,S)
        -> (B,T,D) and, where asked for, the weights of the cross-attention (B,H,T,S), or else of the self-attention."""
        check_shapes(x=(x, "B", "T", self.self_attention.dim))
        if (source is None) != (self.cross_attention is None):
            raise ValueError(f"source must be given if and only if source_dim was, got {type(source).__name__}")
        out, weights = self.self_attention(self.norm_self(x), mask=mask, need_weights=need_weights)
        x = plus(x, self.dropout(out))
        if source is not None:
            out, weights = self.cross_attention(self.norm_cross(x), source, source_mask, need_weights)
            x = plus(x, self.dropout(out))
        return plus(x, self.dropout(self.feed_forward(self.norm_ffn(x)))), weights

    def step(self, x: Tensor, past: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor],
             source_mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """One more token for each of W hypotheses: equal to forward's last step under a causal mask, without dropout.
        x (B,W,D), past: keys and values (B,W,H,t,K) of the t earlier tokens, source: keys and values (B,H,S,K) of the
        cross-attention, source_mask (B,1,S) -> (B,W,D), past with this token, the latter's weights (B,H,W,S)."""
        B, W, D = x.shape
        y = self.norm_self(x).view(B * W, 1, D)  # (B,W,D) -> (B*W,1,D): each hypothesis attends to its own past
        key, value = self.self_attention.keys_values(y)  # (B*W,H,1,K) each
        keys = torch.cat((past[0], key.unflatten(0, (B, W))), dim=3)  # (B,W,H,t+1,K)
        values = torch.cat((past[1], value.unflatten(0, (B, W))), dim=3)
        out, _ = self.self_attention.attend_to(y, keys.flatten(0, 1), values.flatten(0, 1))
        x = x + out.view(B, W, D)
        out, weights = self.cross_attention.attend_to(self.norm_cross(x), *source, source_mask, need_weights=True)
        x = x + out  # the W hypotheses took the place of forward's T steps, as they share one source
        return x + self.feed_forward(self.norm_ffn(x)), (keys, values), weights


class ConvolutionModule(nn.Module):
    """Pointwise, gated, depthwise over `kernel_size` steps, pointwise: the local half of a Conformer block.
    LayerNorm stands where Gulati et al. have BatchNorm, so that no utterance depends on its batch."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B,T,D), mask (B,1,T): padded steps enter the convolution as zeros -> (B,T,D)."""
        check_shapes(x=(x, "B", "T", self.depthwise.in_channels))
        x = zero_padding(F.glu(self.gate(x), dim=-1), mask)
        x = convolve(x, self.depthwise.weight, self.depthwise.bias, self.depthwise.padding * 2)
        return self.out(F.silu(self.normalise(x, mask)))

    def normalise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B,T,D) -> (B,T,D). mask (B,1,T) is for BatchNormConvolution, which looks at real steps only."""
        return self.norm(x)


class ConformerBlock(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward, norm. Source: Gulati et al. 2020, Fig. 1.
    Reads of options what TransformerBlock does, and kernel_size."""

    def __init__(self, options):
        super().__init__()
        dim = options.hidden_dim
        self.norm_first = nn.LayerNorm(dim)
        self.ffn_first = FeedForward(dim, options.ffn_dim, options.dropout, nn.SiLU)
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = MultiHeadAttention(dim, options.num_heads)
        self.norm_conv = nn.LayerNorm(dim)
        self.convolution = ConvolutionModule(dim, options.kernel_size)
        self.norm_second = nn.LayerNorm(dim)
        self.ffn_second = FeedForward(dim, options.ffn_dim, options.dropout, nn.SiLU)
        self.norm_out = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None,
                need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,T,D), mask (B,1,T) or (B,T,T) -> (B,T,D) and, where asked for, the self-attention weights (B,H,T,T).
        The convolution sees every step that any query may see."""
        check_shapes(x=(x, "B", "T", self.self_attention.dim))
        x = x + 0.5 * self.dropout(self.ffn_first(self.norm_first(x)))
        out, weights = self.self_attention(self.norm_self(x), mask=mask, need_weights=need_weights)
        x = plus(x, self.dropout(out))
        seen = None if mask is None else mask.any(1, keepdim=True)  # (B,T or 1,T) -> (B,1,T)
        x = plus(x, self.dropout(self.convolution(self.norm_conv(x), seen)))
        x = x + 0.5 * self.dropout(self.ffn_second(self.norm_second(x)))
        return self.norm_out(x), weights


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *rest: Tensor | None,
               need_weights: bool) -> tuple[Tensor, list[Tensor]]:
    """x (B,T,D) through one block after another, each called with `rest` -> x, the attention weights they return."""
    layers = []
    for block in blocks:
        x, weights = block(x, *rest, need_weights=need_weights)
        if weights is not None:
            layers.append(weights)
    return x, layers
