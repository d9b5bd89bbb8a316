"""Recordings, and standard input, heard by a streaming model: what decode.py does with one.

`hear_stream` says what is certain after each piece of a recording, `stream_result` makes a Result of all of it, and
`show_streams` prints the text as it grows. `system` as checkpoint.System.
"""
import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from audio import stream
from live import pipe_header, pipe_samples, resample_pieces
from pieces import UNSPOKEN
from report import Result, join_words, mean_confidence, text_of, token_entry, words_of
from sentences import with_sentences
from streaming import Chunk, StreamResult, feed, start
from survival import ERASE
from tokenizer import Token


def asked_chunk(arguments: argparse.Namespace, usual: Chunk) -> Chunk:
    """The usual one with what --chunk and --look-back change of it. Raises ValueError for one that cannot be."""
    new, ahead = arguments.chunk or (usual.new, usual.ahead)
    encoder, decoder = arguments.look_back or (usual.encoder_look_back, usual.decoder_look_back)
    return Chunk(new, ahead, encoder, decoder, usual.old)


def hear_stream(system, pieces: Iterable[Tensor]) -> Iterator[StreamResult]:
    """What is certain after each of these pieces (n,) at the model's rate, and at the end. A KeyboardInterrupt (Ctrl-C)
    in between comes behind the result of all pieces that were heard."""
    state = start(system, system.chunk)
    interrupted = None
    try:
        for piece in pieces:
            state, result = feed(system, state, piece)
            yield result
    except KeyboardInterrupt as pressed:
        interrupted = pressed
    yield feed(system, state, torch.zeros(0), last=True)[1]
    if interrupted:
        raise interrupted


def stream_result(system, tokens: list[Token]) -> Result:
    """The Result of all tokens of a stream."""
    unit = system.tokenizer.unit
    words = words_of(tokens, system.tokenizer, unit == "word")
    return Result(text_of(tokens, words, unit), mean_confidence(tokens), tokens, words)


def pieces_of(name: str, pcm_hz: int | None, rate_hz: int) -> Iterator[Tensor]:
    """A recording in pieces of 0.1 s at rate_hz; "-" is a WAV on standard input, or, with pcm_hz, bare 16-bit samples,
    in pieces as they come. Raises as audio.stream and pipe_header."""
    if name != "-":
        return itertools.chain.from_iterable(piece.split(rate_hz // 10) for piece in stream(name, rate_hz))
    header = pipe_header(sys.stdin.buffer, pcm_hz)
    return resample_pieces(pipe_samples(sys.stdin.buffer, header), header.rate_hz, rate_hz)


class Written(NamedTuple):
    """What a punctuation model has made of a stream."""

    over: str = ""  # sentences that no later word changes
    last: str = ""  # their last word, without marks
    rest: tuple[Token, ...] = ()  # the tokens behind them


def write_sentences(system, written: Written, tokens: Sequence[Token]) -> tuple[Written, str]:
    """More tokens of a stream -> the text so far with marks. Only the last sentence is written again: it may go on."""
    over, last, rest = written
    rest = (*rest, *(token for token in tokens if token.token not in UNSPOKEN))
    result = stream_result(system, list(rest))
    found = with_sentences(system.punctuation, result, last).sentences
    count = 0
    for sentence in found[:-1]:
        over = join_words(sentence.words, over)
        count += len(sentence.words)
        last = result.words[count - 1].text
        rest = tuple(token for token in rest if token.end > sentence.end)
    return Written(over, last, rest), join_words(found[-1].words if found else [], over)


def show_streams(system, names: Sequence[str], pcm_hz: int | None) -> None:
    """Print the text of each recording as it grows: on a terminal in one line that is written over, else a line of JSON
    for each result that has tokens. Raises as `pieces_of`, and KeyboardInterrupt once all that was heard is printed."""
    for name in names:
        text = ""
        written = Written()
        try:
            for result in hear_stream(system, pieces_of(name, pcm_hz, system.config.data.sample_rate)):
                if system.punctuation is None:
                    text = result.text
                elif result.tokens:
                    written, text = write_sentences(system, written, result.tokens)
                show_growing(name, result._replace(text=text))
        finally:
            if sys.stdout.isatty():
                print(f"{ERASE}{text}")


def show_growing(name: str, result: StreamResult) -> None:
    if sys.stdout.isatty():
        room = (shutil.get_terminal_size().columns - 1) // 2  # an ideograph takes two columns
        print(ERASE + result.text[-room:], end="", flush=True)
    elif result.tokens:
        row = {"key": name, "text": result.text, "tokens": list(map(token_entry, result.tokens))}
        print(json.dumps(row, ensure_ascii=False), flush=True)
