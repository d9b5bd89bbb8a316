"""Hotwords: phrases that a model should listen for, in the two Paraformers of FunASR's that can be told them.

    phrases -> token ids -> embedding, LSTM -> a list (n,D): a row per phrase, and one for "none of them"

SeacoParaformer reads the list with a decoder of its own, which either names a token or leaves the place to the first
decoder. ContextualParaformer attends to the list in the last block of its only decoder. Both are a Paraformer but for
`predict`, where acoustic embeddings become logits; utterances of one batch may have different lists.

Dims as in model.py; n entries of a list.
Sources: Shi et al. 2023 "SeACo-Paraformer"; Gao et al. 2023 "FunASR", 3.3; equal to FunASR 1.4, but long lists are
filtered for each utterance, where FunASR filters for the first of a batch.
"""
import copy
import functools
import os
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attention import MultiHeadAttention, key_mask, padding_mask, run_blocks
from funasr_layers import Pointwise, SanmDecoder, SanmDecoderBlock
from model import Paraformer, Prediction
from tokenizer import SOS, parse_file

NONE_OF_THEM = (SOS,)  # the last entry of every list
LONGEST = 50  # entries that SeACo's second decoder chooses from a longer list, before "none of them" is added
CHOOSER = 5  # its layer whose attention chooses them


# ---- phrases ----

KEPT = 64  # encoded lists that are remembered, the ones used last
WEIGHT = re.compile(r"\s+[-+]?\d+(\.\d+)?$")  # at the end of a line, as in the files of FunASR's tools


def split_phrases(text: str) -> list[str]:
    """The phrases of a text: one a line, or between commas, also Chinese ones."""
    return [phrase.strip() for phrase in re.split("[\n,\uff0c\u3001]", text) if phrase.strip()]


def read_hotwords(given: str) -> tuple[list[str], bool]:
    """The phrases of a file, or else the words of a text -> them, and whether weights were left out. A file has a
    phrase a line; empty lines and those that begin with # are none. If every line ends in a number, as FunASR's tools
    write it, that column is weights. Raises ValueError for a file that is not there or no UTF-8."""
    if not os.path.isfile(given):
        if given.endswith(".txt"):
            raise ValueError(f"{given}: wanted a file of hotwords, one a line, got no such file")
        return given.split(), False
    lines = [line.strip() for line in parse_file(given, "hotwords in UTF-8, one a line", str.splitlines)]
    phrases = [line for line in lines if line and not line.startswith("#")]
    if not phrases or not all(WEIGHT.search(phrase) for phrase in phrases):
        return phrases, False
    return [WEIGHT.sub("", phrase) for phrase in phrases], True


def unknown_warning(phrases: Sequence[str], tokenizer) -> str:
    """A warning that names the phrases with words that the vocabulary (a PieceTokenizer) lacks, or "" for none."""
    missed = [phrase for phrase in phrases if tokenizer.unknown in tokenizer.encode_hotword(phrase)]
    if not missed:
        return ""
    return (f"the vocabulary cannot spell, so these hotwords help little: {', '.join(missed)} (write Chinese, digits "
            "and each word of letters apart)")


def why_no_hotwords(model: nn.Module) -> str:
    """What to say of a model that cannot be told hotwords."""
    return ("wanted a model that can be told hotwords, FunASR's SeacoParaformer (paraformer-zh) or "
            f"ContextualParaformer, got a {type(model).__name__}")


def list_encoder(model: nn.Module, encode: Callable[[str], list[int]]) -> Callable[[tuple[str, ...]], Tensor]:
    """What makes an encoded list of phrases. It remembers the KEPT lists used last, so that a thousand requests with
    the same list encode it once; its cache_info() tells."""
    @functools.lru_cache(KEPT)
    def encode_list(phrases: tuple[str, ...]) -> Tensor:
        return model.encode_hotwords([ids for ids in map(encode, phrases) if ids])
    return encode_list


# ---- the two models ----

class HotwordParaformer(Paraformer):
    """What the two have in common: the encoder of a list, and the lists of a batch. A subclass adds `predict`."""

    lists: Sequence[Tensor | None] = ()  # an encoded list or None for each utterance; none at all: as all None
    scale: float = 1.0  # of what hotwords contribute (contextual only); FunASR's clas_scale

    def with_hotwords(self, lists: Sequence[Tensor | None], scale: float = 1.0) -> "HotwordParaformer":
        """This model, weights shared, for a batch with these lists of `encode_hotwords`."""
        bound = copy.copy(self)
        bound.lists = lists
        bound.scale = scale
        return bound

    @torch.no_grad()
    def encode_hotwords(self, phrases: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of each phrase, at least one -> (n+1,D), last the row for none of them."""
        weight = self.hotword_table().weight
        rows = [torch.tensor(ids, device=weight.device) for ids in (*phrases, NONE_OF_THEM)]
        lens = torch.tensor([len(row) for row in rows])
        x = nn.functional.embedding(nn.utils.rnn.pad_sequence(rows, batch_first=True), weight)
        packed = nn.utils.rnn.pack_padded_sequence(x, lens, batch_first=True, enforce_sorted=False)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.hotword_encoder(packed)[0], batch_first=True)
        x = x[torch.arange(len(rows)), lens - 1]
        return x if self.hotword_projection is None else self.hotword_projection(x)

    def stack_lists(self, B: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> the batch's lists (B,n,D), an empty one where there is none, their lens (B,), where there is one (B,)."""
        lists = self.lists or [None] * B
        if len(lists) != B:
            raise ValueError(f"with_hotwords: wanted a list or None for each of {B} utterances, got {len(lists)}")
        given = torch.tensor([entries is not None for entries in lists])
        empty = None if given.all() else self.encode_hotwords([])
        lists = [empty if entries is None else entries for entries in lists]
        lens = torch.tensor([len(entries) for entries in lists])
        stacked = nn.utils.rnn.pad_sequence(lists, batch_first=True)
        return stacked, lens.to(stacked.device), given.to(stacked.device)

    def freeze(self, parts: Sequence[nn.Module]) -> None:
        """Training leaves these as they are: learning them takes hotwords in the training data."""
        for part in parts:
            part.requires_grad_(False)


class SeacoParaformer(HotwordParaformer):
    """A Paraformer beside which a second decoder reads hotwords and replaces tokens. Source: Shi et al. 2023."""

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__(options, input_dim, vocab_size)
        D = options.encoder.hidden_dim
        both_ways = options.hotwords.both_ways
        self.no_bias = options.hotwords.no_bias
        if self.no_bias >= vocab_size:
            raise ValueError(f"model.hotwords.no_bias: wanted a token below {vocab_size}, got {self.no_bias}")
        self.hotword_encoder = nn.LSTM(D, D, 2, batch_first=True, bidirectional=both_ways)
        self.hotword_projection = nn.Linear(2 * D, D) if both_ways else None
        self.hotword_decoder = SanmDecoder(D, vocab_size, options.hotwords.decoder)
        parts = [self.embedding, self.hotword_encoder, self.hotword_decoder]
        self.freeze(parts if self.hotword_projection is None else [*parts, self.hotword_projection])

    def hotword_table(self) -> nn.Embedding:
        """Through which hotwords are read."""
        return self.embedding

    def predict(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor, alpha: Tensor,
                need_weights: bool = False) -> Prediction:
        """As Paraformer.predict; the logits are the second decoder's wherever its best token is not no_bias."""
        states, attention = self.decoder.states(self.decoder.blocks, embeds, counts, hidden, hidden_lens, need_weights)
        logits = self.decoder.output(states)
        if all(entries is None for entries in self.lists):
            return Prediction(logits, attention, torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device))
        entries, lens, given = self.stack_lists(len(embeds))
        entries, lens = self.choose(states, counts, entries, lens)
        second = self.hotword_decoder
        from_sound, _ = second.states(second.blocks, embeds, counts, entries, lens)
        from_words, _ = second.states(second.blocks, states, counts, entries, lens)
        said = second.output(from_sound + from_words)  # (B,U,V)
        named = (said.argmax(-1) != self.no_bias) & given[:, None]
        return Prediction(torch.where(named[:, :, None], said, logits), attention, named)

    def choose(self, states: Tensor, counts: Tensor, entries: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Shorten long lists: states (B,U,D), counts (B,), entries (B,n,D), lens (B,) -> entries, lens. Of more than
        LONGEST entries, those stay that the states attend to most, and "none of them" comes once more."""
        if lens.max() <= LONGEST:
            return entries, lens
        scores = self.scores(states, counts, entries, lens)
        best = torch.cat([scores.topk(LONGEST, 1).indices, lens[:, None] - 1], 1)  # (B,LONGEST+1)
        as_it_is = torch.arange(LONGEST + 1, device=lens.device).expand_as(best)
        long = lens > LONGEST
        index = torch.where(long[:, None], best, as_it_is)
        chosen = entries.gather(1, index[:, :, None].expand(-1, -1, entries.shape[2]))
        return chosen, torch.where(long, LONGEST + 1, lens)

    def scores(self, states: Tensor, counts: Tensor, entries: Tensor, lens: Tensor) -> Tensor:
        """Attention to each entry, summed over tokens and heads: given what `choose` is -> (B,n), -inf past a list."""
        mask, entry_mask = key_mask(counts, states.shape[1]), key_mask(lens, entries.shape[1])
        blocks = self.hotword_decoder.blocks
        x, _ = run_blocks(blocks[:CHOOSER], states, mask, entries, entry_mask, need_weights=False)
        _, weights = blocks[CHOOSER](x, mask, entries, entry_mask, need_weights=True)  # (B,H,U,n)
        weights = weights * padding_mask(counts, states.shape[1])[:, None, :, None]
        return weights.sum((1, 2)).masked_fill(~padding_mask(lens, entries.shape[1]), -torch.inf)


class ContextualBlock(SanmDecoderBlock):
    """A SanmDecoderBlock that attends to hotwords beside the sound, and merges what it finds in the two."""

    def __init__(self, options):
        super().__init__(options)
        D = options.hidden_dim
        self.norm_hotwords = nn.LayerNorm(D)
        self.hotword_attention = MultiHeadAttention(D, options.num_heads)
        self.merge = Pointwise(2 * D, D, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, hidden: Tensor, hidden_mask: Tensor | None,
                need_weights: bool = False, *, entries: Tensor, entry_mask: Tensor | None,
                scale: float) -> tuple[Tensor, Tensor | None]:
        """As SanmDecoderBlock.forward, with entries (B,n,D), entry_mask (B,1,n) and the scale of what they say."""
        x = self.remember(x, mask)
        sound, weights = self.cross_attention(self.norm_cross(x), hidden, hidden_mask, need_weights)
        hotwords, _ = self.hotword_attention(self.norm_hotwords(x), entries, entry_mask)
        return x + self.dropout(self.merge(torch.cat([sound, scale * hotwords], -1))), weights


class ContextualParaformer(HotwordParaformer):
    """A Paraformer whose decoder has a ContextualBlock in the place of its last block with attention."""

    hotword_projection = None

    def __init__(self, options, input_dim: int, vocab_size: int):
        super().__init__(options, input_dim, vocab_size)
        D = options.encoder.hidden_dim
        self.shared = options.hotwords.share_embedding
        self.decoder.blocks.pop(-1)
        block = ContextualBlock(options.decoder)
        self.hotword_block = block
        self.hotword_embedding = nn.Embedding(vocab_size, D)
        self.hotword_encoder = nn.LSTM(D, D, batch_first=True)
        self.freeze([self.hotword_table(), self.hotword_embedding, self.hotword_encoder, block.norm_hotwords,
                     block.hotword_attention, block.merge])

    def hotword_table(self) -> nn.Embedding:
        """As SeacoParaformer.hotword_table."""
        return self.embedding if self.shared else self.hotword_embedding

    def predict(self, embeds: Tensor, counts: Tensor, hidden: Tensor, hidden_lens: Tensor, alpha: Tensor,
                need_weights: bool = False) -> Prediction:
        """As Paraformer.predict; an utterance without a list has the empty one, in training too."""
        entries, lens, _ = self.stack_lists(len(embeds))
        block = functools.partial(self.hotword_block, entries=entries, entry_mask=key_mask(lens, entries.shape[1]),
                                  scale=self.scale)
        blocks = [*self.decoder.blocks, block]
        states, attention = self.decoder.states(blocks, embeds, counts, hidden, hidden_lens, need_weights)
        return Prediction(self.decoder.output(states), attention)
