"""A Paraformer on whole utterances that computes what it would chunk by chunk: to train a model that streams.

A stream (streaming.py) sends a chunk through the encoder in a window with frames before and behind it, so frames are
computed in several windows, and counts the weights of some rows of a window. Here all windows of a batch lie side by
side, and masks let each layer see what its `step` sees. Frames of zeros stand before the first one, as in a stream.

    new 3, ahead 2     frames -2 -1  0  1  2 | 1  2  3  4  5 | 4  5  6           seven frames, three windows
                       counted *  *  *       | *  *  *       | *  *  *           the last window counts to its end

Dims as in model.py; C windows of W = old + new + ahead rows, S = C * W. hidden (B,S,D): first the L = ahead + T rows
that count, which are frames in their order, and behind them the others, which a decoder sees too.
Source: equal to streaming.py, so to FunASR's ParaformerStreaming.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import at_least_float32, check_feats, key_mask, padding_mask, run_blocks, zero_padding
from model import Hypotheses, Paraformer, Prediction


def check_trainable(options, place: str) -> None:
    """Raises ValueError for a streaming model that hears tokens to come; options: the model section of a config."""
    if options.name != "streaming":
        return
    decoder = options.decoder
    if decoder.attention_layers not in (0, decoder.num_layers):
        raise ValueError(f"{place}: decoder.attention_layers: wanted 0, all layers, to train a streaming model, got "
                         f"{decoder.attention_layers}: the others would hear tokens to come")
    if decoder.memory_shift != decoder.kernel_size // 2:
        raise ValueError(f"{place}: decoder.memory_shift: wanted {decoder.kernel_size // 2}, half of kernel_size, to "
                         f"train a streaming model that hears no tokens to come, got {decoder.memory_shift}")
    if not options.predictor.tail:
        raise ValueError(f"{place}: predictor.tail: wanted a weight, such as 0.45, to train a streaming model, whose "
                         "count is not rounded, got 0")


# ---- windows ----

class Rows(NamedTuple):
    """The rows of all windows."""

    window: Tensor  # (S,) int64
    place: Tensor  # (S,) int64, in the window
    real: Tensor  # (B,S) bool: a frame of the utterance, or of zeros before it
    order: Tensor  # (B,S) int64: first the rows that count


def num_rows(chunk) -> int:
    return chunk.old + chunk.new + chunk.ahead


def rows_of(chunk, lens: Tensor, S: int) -> Rows:
    """lens (B,) frames of each utterance."""
    row = torch.arange(S, device=lens.device)
    window, place = row // num_rows(chunk), row % num_rows(chunk)
    frame = window * chunk.new + place - chunk.old - chunk.ahead  # (S,)
    last = (lens[:, None] - 1).div(chunk.new, rounding_mode="floor")  # (B,1) window; -1 without frames
    real = (frame < lens[:, None]) & (window <= last)
    counted = real & (place >= chunk.old) & ((place < chunk.old + chunk.new) | (window == last))
    return Rows(window, place, real, (~counted).long().argsort(stable=True))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B,S,D), index (B,S) -> (B,S,D), the rows in this order."""
    return x.gather(1, index[:, :, None].expand_as(x))


def seen_by_encoder(chunk, rows: Rows) -> Tensor:
    """(B,S,S) bool: a row sees its window, and of earlier ones all rows but those ahead, as many as look back."""
    kept = chunk.old + chunk.new  # rows of a window that later ones see
    number = torch.where(rows.place < kept, rows.window * kept + rows.place, -1)  # (S,) among all such rows
    first = torch.zeros_like(number)
    if chunk.encoder_look_back >= 0:
        first = (rows.window * kept - chunk.encoder_look_back * chunk.new).clamp(min=0)
    if chunk.encoder_look_back > 0:
        first = first.masked_fill(rows.window == 1, 0)  # what the first chunk leaves is kept whole
    earlier = rows.window < rows.window[:, None]
    seen = (rows.window == rows.window[:, None]) | earlier & (number >= first[:, None])
    return seen & rows.real[:, None]


def seen_by_decoder(chunk, rows: Rows, alpha: Tensor, last: Tensor, counts: Tensor, U: int) -> Tensor:
    """(B,U,S) bool: a token sees the window in which it fires, and of earlier windows with a token the last rows, as
    many as look back. alpha (B,S) and the rows seen are in rows.order, last (B,) is the last row that counts."""
    W = num_rows(chunk)
    window, place = rows.window[rows.order], rows.place[rows.order]  # (B,S) each
    unit = torch.arange(1, U + 1, device=alpha.device).double().repeat(len(alpha), 1)
    row = torch.searchsorted(alpha.detach().double().cumsum(1), unit)  # (B,U): where the running sum reaches it
    own = window.gather(1, torch.minimum(row, last[:, None]))  # (B,U) the window in which a token fires
    every = torch.arange(len(rows.window) // W, device=alpha.device)
    fires = ((own[:, :, None] == every) & padding_mask(counts, U)[:, :, None]).any(1)  # (B,C)
    start = fires.cumsum(1) * W  # (B,C): how many rows windows with a token have, up to this one
    number = (start.gather(1, window) + place)[:, None]  # (B,1,S) among all such rows
    own_start = start.gather(1, own)[:, :, None]  # (B,U,1)
    is_near = (number >= own_start - max(0, chunk.decoder_look_back) * chunk.new) & (number < own_start + W)
    is_there = fires.gather(1, window) & rows.real.gather(1, rows.order)  # (B,S)
    return is_near & is_there[:, None]


# ---- the model ----

class StreamingParaformer(Paraformer):
    """A Paraformer of kind sanm that hears through windows, as options.chunk says."""

    def hear(self, feats: Tensor, feat_lens: Tensor) -> tuple[Tensor, Tensor]:
        """feats (B,T,F), feat_lens (B,) -> hidden (B,S,D), its lens (B,): ahead + T, 0 for none."""
        chunk, encoder = self.options.chunk, self.encoder
        check_feats(feats, feat_lens, encoder.input_dim)
        B, T, _ = feats.shape
        C = -(-T // chunk.new)
        x = encoder.place(zero_padding(feats, key_mask(feat_lens, T)), 0)
        x = F.pad(x, (0, 0, chunk.old + chunk.ahead, C * chunk.new - T))
        x = x.unfold(1, num_rows(chunk), chunk.new).transpose(2, 3).flatten(0, 1)  # (B,C,F,W) -> (B*C,W,F)
        rows = rows_of(chunk, feat_lens, C * num_rows(chunk))
        mask = rows.real.view(B * C, 1, -1)
        seen = seen_by_encoder(chunk, rows)
        for block in [encoder.first, *encoder.blocks]:
            x = at_least_float32(block(x, mask, seen=seen)[0])
        hidden = encoder.norm(x).view(B, -1, encoder.dim).masked_fill(~rows.real[:, :, None], 0.0)
        return take(hidden, rows.order), torch.where(feat_lens > 0, feat_lens + chunk.ahead, 0)

    def weigh(self, hidden: Tensor, hidden_lens: Tensor) -> Tensor:
        """As Paraformer.weigh, of hidden (B,S,D) -> (B,S): the predictor sees a window, and some of its rows count."""
        B, S, _ = hidden.shape
        rows = rows_of(self.options.chunk, hidden_lens - self.options.chunk.ahead, S)
        windows = take(hidden, rows.order.argsort(1)).view(-1, num_rows(self.options.chunk), self.encoder.dim)
        alpha = self.predictor(windows, rows.real.view(*windows.shape[:2]).sum(1))
        return alpha.view(B, S).gather(1, rows.order) * padding_mask(hidden_lens, S)

    def predict(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor, alpha: Tensor,
                need_weights: bool = False) -> Prediction:
        """As Paraformer.predict."""
        chunk, decoder = self.options.chunk, self.decoder
        U = embeds.shape[1]
        rows = rows_of(chunk, hidden_lens - chunk.ahead, hidden.shape[1])
        seen = seen_by_decoder(chunk, rows, alpha, (hidden_lens - 1).clamp(min=0), counts, U)
        x, attention = run_blocks(decoder.blocks, embeds, key_mask(counts, U), hidden, seen, need_weights=need_weights)
        return Prediction(decoder.output(decoder.norm(decoder.last(x))), attention)

    def decode(self, hidden: Tensor, hidden_lens: Tensor, feat_lens: Tensor) -> Hypotheses:
        """As Paraformer.decode; the zeros before the first frame have no time."""
        ahead = self.options.chunk.ahead
        found = super().decode(hidden, hidden_lens, feat_lens + ahead)
        return found._replace(boundaries=[(edges - ahead).clamp(min=0) for edges in found.boundaries])
