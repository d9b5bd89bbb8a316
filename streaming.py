"""Recognition while people speak: a Paraformer that hears a recording chunk by chunk.

    state = start(system, Chunk(10, 5))                            nothing heard yet
    state, result = feed(system, state, samples)                   any number of samples at the model's rate
    state, result = feed(system, state, samples, last=True)        the rest; the state is then that of `start`

A state is a value: `feed` changes nothing that it is given, one system serves all streams, and what comes out depends
neither on how samples are cut into calls nor, in `feed_many`, on the other streams. A chunk goes through the encoder in
a window with look-ahead, frames of which the next chunk computes again, and sees the keys and values of earlier ones;
weights that have not made a token yet (model.Carry) wait for the next chunk; tokens that fire are decoded at once.

Dims as in model.py; S steps of a cache. `system`: what checkpoint.System has.
Source: equal to ParaformerStreaming of FunASR 1.4, but for the text (FunASR forgets the first part of a word that falls
into two calls) and for a single block of a decoder that has no cross-attention (FunASR leaves it out).
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attention import at_least_float32
from audio import frame_sec
from config import ChunkConfig
from live import first_sample, frame_samples, frontend_part, samples_until
from model import Carry, cif_step
from pieces import PieceTokenizer, UNSPOKEN, are_spaced, spell_words, write_sentence
from tokenizer import Token, spoken_places


@dataclass(frozen=True)
class Chunk(ChunkConfig):
    """How a stream is cut, in feature frames (of 60 ms in FunASR's models). Raises ValueError for what cannot be."""

    def __post_init__(self):
        if self.new < 1 or self.old < 0 or self.encoder_look_back < -1 or self.decoder_look_back < -1:
            raise ValueError(f"chunk: wanted 1 new frame or more, 0 old ones or more, and look-backs of -1 or more, "
                             f"got {self}")
        if self.ahead < 1:
            raise ValueError(f"chunk: wanted 1 look-ahead frame or more, got {self.ahead}: the next chunk begins with "
                             "the frames ahead, and FunASR keeps nothing without them")


class State(NamedTuple):
    """What a stream has to remember; of fixed size, but for the text and where encoder_look_back is -1."""

    chunk: Chunk
    samples: Tensor  # (n,) float32 on the CPU: those that the next frame depends on, and what came after them
    frames: int  # feature frames so far
    window: Tensor  # (1,old+ahead,F): end of the encoder's last window, scaled and placed; zeros at the start
    past: Tensor  # (layers,2,1,H,S,K) keys and values of the encoder's earlier windows
    carry: Carry  # the unfinished token
    rows: Tensor | None  # (layers,1,kernel_size-1,D) of the decoder's FSMNs; None before the first token
    source: Tensor  # (blocks,2,1,H,S,K) keys and values of the decoder's cross-attention
    settled: str  # text that no later token changes
    recent: tuple[str, ...]  # symbols of the last word, which may go on


class StreamResult(NamedTuple):
    tokens: list[Token]  # that became certain in this call; from when a tenth of its weight is heard until all of it is
    text: str  # all so far


# ---- start and feed ----

def start(system, chunk: Chunk = Chunk()) -> State:
    """The state of a stream of which nothing is heard."""
    encoder, decoder = system.config.model.encoder, system.config.model.decoder
    device = system.stats.device
    blocks = decoder.attention_layers or decoder.num_layers
    past = torch.zeros(encoder.num_layers, 2, 1, encoder.num_heads, 0, encoder.hidden_dim // encoder.num_heads,
                       device=device)
    source = torch.zeros(blocks, 2, 1, decoder.num_heads, 0, decoder.hidden_dim // decoder.num_heads, device=device)
    window = torch.zeros(1, chunk.old + chunk.ahead, system.stats.shape[1], device=device)
    weight = torch.zeros((), dtype=torch.float64, device=device)
    carry = Carry(weight, torch.zeros(encoder.hidden_dim, device=device), -1.0)
    return State(chunk, torch.zeros(0), 0, window, past, carry, None, source, "", ())


def feed(system, state: State, samples: Tensor, last: bool = False) -> tuple[State, StreamResult]:
    """Hear more of a stream: samples (n,) float32 at the model's rate, n >= 0; last: the stream ends with them, and the
    state is then that of `start`. A stream without a sample has no words. Raises ValueError if they are not finite."""
    return feed_many(system, [state], [samples], [last])[0]


@torch.no_grad()
def feed_many(system, states: Sequence[State], pieces: Sequence[Tensor],
              last: Sequence[bool]) -> list[tuple[State, StreamResult]]:
    """`feed` of several streams, each with its samples and whether they are its last: chunks that are due together go
    through the model together where their shapes are alike, and give what they give alone, to the last bit."""
    states = [hear(state, samples) for state, samples in zip(states, pieces, strict=True)]
    tokens: list[list[Token]] = [[] for _ in states]
    running = [i for i, state in enumerate(states) if state.frames or len(state.samples)]
    while running:
        due: dict[int, Due] = {}
        for i in running:
            if (part := cut_chunk(system, states[i], last[i])) is not None:
                due[i] = part
        stepped = step_together(system, list(due.values()))
        for i, (state, found) in zip(due, stepped, strict=True):
            states[i] = state
            tokens[i] += found
        running = [i for i, part in due.items() if not part.is_last]
    results = []
    for i, state in enumerate(states):
        state, text = write_on(system.tokenizer, state, [token.token for token in tokens[i]])
        state = start(system, state.chunk) if last[i] else alone(state)
        results.append((state, StreamResult(tokens[i], text)))
    return results


def alone(state: State) -> State:
    """The state without what its tensors are cut from: a longer past, the other streams of a batch, all samples."""
    rows = None if state.rows is None else state.rows.clone()
    return state._replace(samples=state.samples.clone(), window=state.window.clone(), past=state.past.clone(),
                          source=state.source.clone(), rows=rows)


# ---- samples to chunks ----

class Due(NamedTuple):
    """The next chunk of a stream."""

    state: State  # without the samples of the chunk
    feats: Tensor  # (T,F): as many as chunk.new, fewer in the last one
    is_last: bool


def hear(state: State, samples: Tensor) -> State:
    if samples.dim() != 1 or samples.dtype != torch.float32:
        raise ValueError(f"samples must be (n,) float32, got {tuple(samples.shape)} {samples.dtype}")
    if not samples.isfinite().all():
        raise ValueError("samples must be finite, got NaN or infinity")
    return state._replace(samples=torch.cat([state.samples, samples.cpu()]))


def samples_missing(system, state: State) -> int:
    """How many samples must come until the next chunk is due; not above 0: it is."""
    options = system.config.data
    stop = samples_until(state.frames + state.chunk.new, options)
    return stop - first_sample(state.frames, options) - len(state.samples)


def cut_chunk(system, state: State, last: bool) -> Due | None:
    """The next chunk, of `chunk.new` frames; None if they are not all there, but at the end of a stream its last chunk.
    That one may have no new frame: samples of less than a frame are left out, as in FunASR. Raises ValueError if
    features are not finite."""
    options, stats = system.config.data, system.stats.cpu()
    begin = first_sample(state.frames, options)
    stop = state.frames + state.chunk.new
    needed = len(state.samples) + samples_missing(system, state)
    is_last = len(state.samples) < needed
    if is_last and not last:
        return None
    if not is_last:
        feats = frontend_part(state.samples[:needed], state.frames, stop, options, stats)
        state = state._replace(samples=state.samples[first_sample(stop, options) - begin:])
    elif begin + len(state.samples) >= (state.frames + 1) * frame_samples(options):
        feats = frontend_part(state.samples, state.frames, None, options, stats)
    else:
        feats = torch.zeros(0, stats.shape[1])
    if not feats.isfinite().all():
        raise ValueError("features not finite: are the samples of a float recording far beyond 1?")
    return Due(state, feats.to(system.stats.device), is_last)


# ---- chunks to tokens ----

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # System.precision: of the encoder's products
FEWEST_ROWS = 12  # in a matrix product: with fewer, its last bits depend on their number


def groups(keys: Sequence) -> list[list[int]]:
    """The places of equal keys, together."""
    found: dict = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def stack(tensors: Sequence[Tensor], dim: int, rows: int) -> Tensor:
    """Tensors of several streams, of 1 each along dim, as one; streams are repeated until they have FEWEST_ROWS."""
    copies = -(-FEWEST_ROWS // (rows * len(tensors)))
    return torch.cat([*tensors] * copies, dim)


def step_together(system, due: Sequence[Due]) -> list[tuple[State, list[Token]]]:
    """One chunk of each stream -> its state, with the chunk heard, and the tokens that fired."""
    stepped: list = [None] * len(due)
    for same in groups([(part.state.chunk, part.feats.shape, part.state.past.shape) for part in due]):
        for i, hidden, alpha, state in zip(same, *encode(system, [due[i] for i in same]), strict=True):
            stepped[i] = integrate(system, due[i], state, hidden, alpha)
    fired = [i for i, (_, _, embeds, _) in enumerate(stepped) if len(embeds)]
    logits: list = [None] * len(due)
    keys = []
    for i in fired:
        state, hidden, embeds, _ = stepped[i]
        keys.append((state.chunk, hidden.shape, embeds.shape, state.rows is None, state.source.shape))
    for same in groups(keys):
        places = [fired[k] for k in same]
        for i, state, scores in zip(places, *decode(system, [stepped[i] for i in places]), strict=True):
            stepped[i] = (state, *stepped[i][1:])
            logits[i] = scores
    return [(state, read_tokens(system, scores, spans)) for (state, _, _, spans), scores in zip(stepped, logits)]


def encode(system, due: Sequence[Due]) -> tuple[Tensor, Tensor, list[State]]:
    """Chunks of like shapes -> hidden (B,L,D) of their windows, alpha (B,L), their states with the window heard."""
    encoder = system.model.encoder
    chunk = due[0].state.chunk
    windows = []
    for state, feats, _ in due:
        windows.append(torch.cat([state.window, encoder.place(feats[None], state.frames)], 1))
    rows = windows[0].shape[1]
    past = stack([part.state.past for part in due], 2, rows)
    half = HALVES.get(system.precision)
    with torch.autocast(past.device.type, half, enabled=half is not None):
        hidden, own = encoder.step(stack(windows, 0, rows), past)
    hidden = at_least_float32(hidden)
    lens = torch.full((1,), rows, device=hidden.device)
    alphas = []
    states = []
    for i, (state, feats, _) in enumerate(due):
        # each alone: the last bits of a product with a vector depend on B
        alphas.append(system.model.predictor(hidden[i:i + 1], lens))
        seen = state.past
        if chunk.encoder_look_back != 0:
            seen = torch.cat([seen, own[:, :, i:i + 1, :, :rows - chunk.ahead]], 4)
        if chunk.encoder_look_back > 0 and state.past.shape[4]:  # what the first chunk leaves is kept whole
            seen = seen[..., -chunk.encoder_look_back * chunk.new:, :]
        states.append(state._replace(frames=state.frames + len(feats), past=seen,
                                     window=windows[i][:, rows - chunk.old - chunk.ahead:]))
    return hidden[:len(due)], torch.cat(alphas), states


Fired = tuple[State, Tensor, Tensor, list[tuple[float, float]]]  # state, hidden (L,D), embeds (U,D), span of each


def integrate(system, part: Due, state: State, hidden: Tensor, alpha: Tensor) -> Fired:
    """The tokens that fire in a chunk's window: hidden (L,D), alpha (L,), of which the chunk's own frames count."""
    chunk = state.chunk
    counted = torch.arange(len(alpha), device=alpha.device) >= chunk.old
    if not part.is_last:
        counted[chunk.old + chunk.new:] = False
    first = part.state.frames - chunk.old - chunk.ahead
    tail = system.config.model.predictor.tail if part.is_last else 0.0
    embeds, spans, carry = cif_step(hidden, alpha * counted, state.carry, first, tail)
    return state._replace(carry=carry), hidden, embeds, spans


def decode(system, fired: Sequence[Fired]) -> tuple[list[State], list[Tensor]]:
    """Streams of like shapes that have tokens -> their states with these decoded, logits (U,V) of each."""
    decoder = system.model.decoder
    chunk = fired[0][0].chunk
    rows = len(fired[0][2])
    states = [state for state, _, _, _ in fired]
    embeds = stack([embeds[None] for _, _, embeds, _ in fired], 0, rows)
    hidden = stack([hidden[None] for _, hidden, _, _ in fired], 0, rows)
    past = None
    if states[0].rows is not None:
        past = stack([state.rows for state in states], 1, rows)
    source = torch.cat([stack([state.source for state in states], 2, rows), decoder.keys_values(hidden)], 4)
    logits, past = decoder.step(embeds, past, source)
    kept = max(0, chunk.decoder_look_back) * chunk.new
    kept_source = source[..., source.shape[4] - min(kept, source.shape[4]):, :]
    after = [state._replace(rows=past[:, i:i + 1], source=kept_source[:, :, i:i + 1]) for i, state in enumerate(states)]
    return after, list(logits[:len(states)])


# ---- tokens to text ----

def read_tokens(system, logits: Tensor | None, spans: Sequence[tuple[float, float]]) -> list[Token]:
    """logits (U,V) of the tokens that fired and the frames of each -> those that are spoken."""
    if logits is None:
        return []
    log_p, ids = logits.float().log_softmax(-1).max(-1)
    seconds = frame_sec(system.config.data)
    tokens = []
    for u in spoken_places(ids.tolist()):
        begin, end = (round(max(0.0, place * seconds), 3) for place in spans[u])
        token = int(ids[u])
        tokens.append(Token(system.tokenizer.symbols[token], token, round(log_p[u].exp().item(), 4), begin, end))
    return tokens


def certain_text(tokenizer, state: State, text: str) -> str:
    """What of the text so far stays as it is, whatever follows: without a last word of single letters, which become
    capitals as soon as there are two of them."""
    if not isinstance(tokenizer, PieceTokenizer):
        return text
    word = text[len(state.settled):]
    is_spelled = word.isascii() and word.isalpha() and len(word) <= len(state.recent)
    return state.settled.rstrip(" ") if is_spelled else text


def write_on(tokenizer, state: State, symbols: Sequence[str]) -> tuple[State, str]:
    """The state with these symbols written, and the text so far, which is that of all symbols together. Only the last
    word is written again, so an hour of speech costs no more a second than a minute."""
    if not isinstance(tokenizer, PieceTokenizer):
        between = " " if tokenizer.unit == "word" else ""
        text = between.join([*([state.settled] if state.settled else []), *symbols])
        return state._replace(settled=text), text
    recent = [*state.recent, *(symbol for symbol in symbols if symbol and symbol not in UNSPOKEN)]
    words = spell_words(recent)
    text = state.settled + write_sentence(words)
    if not words:
        return state, text
    settled = state.settled + write_sentence(words[:-1])
    if len(words) > 1 and are_spaced(words[-2], words[-1]):
        settled += " "
    return state._replace(settled=settled, recent=tuple(recent[words[-1].start:])), text
