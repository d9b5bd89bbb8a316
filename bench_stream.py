"""What recognition while people speak costs: `python bench.py stream`.

Without a checkpoint: a model of the published size with random weights; the time of a chunk, how many streams stay in
real time, and the latency of one over a web socket. With one: the latency of many sockets at real-time pace. Latency is
the time from the sample that completes a chunk, look-ahead included, to the message with its words.
"""
import argparse
import asyncio
import base64
import contextlib
import json
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import serve
from audio import frame_sec, stream
from bench_long import large_config, large_system, noise, time_turns
from checkpoint import System, export_directory, load_system
from commandline import Parser
from live import samples_until
from manifests import read_inputs
from streaming import State, feed, feed_many, start

HERE = Path(__file__).resolve().parent
TURNS = 9  # of a step, of which the median is taken
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # streams of a batch


# ---- the time of a chunk ----

def chunk_samples(system: System) -> int:
    """Samples from one chunk to the next."""
    return samples_until(2 * system.chunk.new, system.config.data) - samples_until(system.chunk.new, system.config.data)


def step_ms(system: System, states: Sequence[State]) -> float:
    """Median of the milliseconds that a chunk of all these streams takes, in one batch."""
    pieces = [noise(chunk_samples(system), 100 + i) for i in range(len(states))]
    step = partial(feed_many, system, states, pieces, [False] * len(states))
    return statistics.median(time_turns(TURNS, {"step": step})["step"])


def difference(system: System, states: Sequence[State]) -> float:
    """The greatest difference between what is kept of streams in a batch, after a chunk, and of each alone."""
    pieces = [noise(chunk_samples(system), 200 + i) for i in range(len(states))]
    found = 0.0
    for i, (together, _) in enumerate(feed_many(system, states, pieces, [False] * len(states))):
        alone, _ = feed(system, states[i], pieces[i])
        for name in ("past", "source", "rows"):
            found = max(found, float((getattr(together, name) - getattr(alone, name)).abs().max()))
        found = max(found, float((together.carry.frame - alone.carry.frame).abs().max()))
    return found


def chunk_figures(system: System) -> Iterator[str]:
    """Of a chunk alone, and of ever larger batches, until one is late."""
    due_ms = 1000 * system.chunk.new * frame_sec(system.config.data)
    full = noise((system.chunk.encoder_look_back + 3) * chunk_samples(system))  # so much that all caches are full
    state, _ = feed(system, start(system, system.chunk), full)
    ms = step_ms(system, [state])
    yield (f"a chunk of one stream    {ms:8.1f} ms of {due_ms:.0f}: real-time factor {ms / due_ms:.3f}; "
           f"alone, one after another, {int(due_ms / ms)} streams stay in real time")
    most = 1 if ms < due_ms else 0
    for count in SIZES:
        ms = step_ms(system, [state] * count)
        yield f"a batch of {count:3} streams   {ms:8.1f} ms, {ms / count:.1f} a stream"
        if ms >= due_ms:
            break
        most = count
    yield f"in one batch, {most} streams stay in real time"
    yield f"batch against alone, greatest difference: {difference(system, [state] * 4):.1g} (0: equal to the last bit)"


# ---- clients of a web socket ----

PIECE_SEC = 0.02  # of audio in a frame


def to_frame(opcode: int, payload: bytes) -> bytes:
    """A client's frame, masked with zeros, which leave the payload as it is."""
    size = len(payload)
    length = bytes([128 | size]) if size < 126 else struct.pack("!BH", 128 | 126, size)
    return bytes([128 | opcode]) + length + bytes(4) + payload


class Talk(NamedTuple):
    """What became of somebody who spoke into a socket; times are those of time.monotonic."""

    begun: float
    sent_at: list[tuple[int, float]]  # samples so far, and when, of each piece
    messages: list[tuple[float, dict]]  # when each came


async def speak(writer: asyncio.StreamWriter, audio: bytes, begun: float, rate_hz: int) -> list[tuple[int, float]]:
    """Send 16-bit samples as if they were spoken from `begun` on -> Talk.sent_at."""
    size = 2 * int(rate_hz * PIECE_SEC)
    sent_at = []
    for start in range(0, len(audio), size):
        piece = audio[start:start + size]
        samples = (start + len(piece)) // 2
        await asyncio.sleep(begun + samples / rate_hz - time.monotonic())
        writer.write(to_frame(2, piece))
        sent_at.append((samples, time.monotonic()))
    writer.write(to_frame(1, b'{"is_speaking": false}'))
    return sent_at


async def listen(reader: asyncio.StreamReader) -> list[tuple[float, dict]]:
    """The messages up to the last one."""
    messages: list[tuple[float, dict]] = []
    while not messages or not messages[-1][1].get("is_final"):
        kind, size = await reader.readexactly(2)
        if size >= 126:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
        payload = await reader.readexactly(size)
        if kind == 0x81:  # a whole text
            messages.append((time.monotonic(), json.loads(payload)))
    return messages


async def talk(port: int, audio: bytes, begun: float, rate_hz: int) -> Talk:
    """Open a socket, send 16-bit samples as if they were spoken from `begun` on, hear what comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 101 " not in answer.partition(b"\r\n")[0]:
        raise ValueError(f"wanted a web socket, got {answer[:200]!r}")
    writer.write(to_frame(1, json.dumps({"mode": "online", "audio_fs": rate_hz}).encode()))
    listening = asyncio.create_task(listen(reader))
    sent_at = await speak(writer, audio, begun, rate_hz)
    messages = await asyncio.wait_for(listening, 60)
    writer.close()
    return Talk(begun, sent_at, messages)


async def talk_at_once(port: int, speeches: Sequence[bytes], rate_hz: int, apart_sec: float) -> list[Talk]:
    """One socket for each speech, begun one after another, so far apart. Raises ValueError if one is closed, or gets no
    last message within a minute of its last word."""
    begun = time.monotonic() + 1.0
    talks = [talk(port, audio, begun + i * apart_sec, rate_hz) for i, audio in enumerate(speeches)]
    try:
        return await asyncio.gather(*talks)
    except EOFError:
        raise ValueError("the server closed a socket") from None
    except TimeoutError:
        raise ValueError("a socket got no last message within a minute of its last word") from None


def latencies_ms(heard: Talk, system: System) -> list[float]:
    """From the sample that completed a chunk to the message with its last token, which says what chunk it is of; left
    out where that token ends within a millisecond of an edge, and what the end of the stream completed."""
    chunk = system.chunk
    seconds = frame_sec(system.config.data)
    counts = [samples for samples, _ in heard.sent_at]
    found = []
    for received, message in heard.messages:
        if "error" in message:
            raise ValueError(f"the server: {message['error']['message']}")
        if message["is_final"] or not message["tokens"]:
            continue
        place = (message["tokens"][-1]["end"] / seconds + chunk.ahead) / chunk.new  # in chunks
        number = max(0, math.ceil(place) - 1)
        complete = samples_until((number + 1) * chunk.new, system.config.data)
        if abs(place - round(place)) * chunk.new * seconds < 0.001 or complete > counts[-1]:
            continue
        piece = next(i for i, samples in enumerate(counts) if samples >= complete)
        found.append(1000 * (received - heard.sent_at[piece][1]))
    return found


def speeches(system: System, inputs: Sequence[str], count: int, seconds: float) -> list[bytes]:
    """Of each client, so many seconds of the inputs joined, each from another one on; noise without inputs."""
    rate_hz = system.config.data.sample_rate
    wanted = int(seconds * rate_hz)
    sources = [noise(wanted, i) for i in range(count)]
    if inputs:
        with tempfile.TemporaryDirectory() as scratch:
            rows = read_inputs(inputs, Path(scratch))[0][:4 * count]
            sources = [torch.cat(list(stream(row.audio, rate_hz))) for row in rows]
        if not sum(map(len, sources)):
            raise ValueError("wanted recordings with samples, got none")
    found = []
    for i in range(count):
        first = i % len(sources)
        joined = torch.cat(sources[first:] + sources[:first])
        said = joined.repeat(wanted // len(joined) + 1)[:wanted]
        found.append((said.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())
    return found


def socket_figure(system: System, port: int, inputs: Sequence[str], count: int, seconds: float) -> str:
    rate_hz = system.config.data.sample_rate
    chunk_sec = system.chunk.new * frame_sec(system.config.data)
    audio = speeches(system, inputs, count, seconds)
    found: list[float] = []
    late: list[float] = []
    for heard in asyncio.run(talk_at_once(port, audio, rate_hz, chunk_sec / count)):
        found += latencies_ms(heard, system)
        late += [now - heard.begun - samples / rate_hz for samples, now in heard.sent_at]
    if not found:
        raise ValueError("no chunk of these recordings has words: wanted other recordings, or more seconds")
    p50, p99 = np.quantile(found, [0.5, 0.99], method="higher")
    return (f"{count} sockets at real-time pace for {seconds:g} s: latency p50 {p50:.0f} ms, p99 {p99:.0f} ms "
            f"(asked of 50 with digits_streaming: p99 under 300), most {max(found):.0f} ms, of {len(found)} messages; "
            f"the client itself was up to {1000 * max(late):.0f} ms late")


# ---- the command ----

@contextlib.contextmanager
def running(options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """A server in a process of its own -> its port, and the seconds from its start until it listened."""
    started = time.perf_counter()
    names = ("checkpoint", "device", "threads", "dtype", "max_batch_size", "max_wait_ms", "max_batch_frames")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    process = subprocess.Popen([sys.executable, str(HERE / "serve.py"), "--port=0", *given], stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "ASR_API_KEY": ""})
    try:
        output = ""
        while not (match := re.search(r"http://[^:]+:(\d+)", output)):
            line = process.stderr.readline()
            if not line:
                raise ValueError(f"the server did not start: {output.strip()}")
            output += line
        ready = time.perf_counter() - started
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(match[1]), ready
    finally:
        process.terminate()
        process.wait()


def measure_streams(argv: Sequence[str]) -> None:
    """Print the figures."""
    parser = Parser(prog="bench.py stream", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a streaming one (default: random weights of the published size)")
    add("inputs", nargs="*", help="recordings and manifests that the sockets speak (default: noise)")
    add("--sockets", type=int, default=50, help="at once, with a checkpoint (default 50)")
    add("--seconds", type=float, default=30.0, help="that each speaks (default 30)")
    add("--threads", type=int, default=2, help="of torch (default 2)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = options.checkpoint or folder
        if not options.checkpoint:
            config = large_config()
            export_directory(large_system(replace(config, model=replace(config.model, name="streaming"))), Path(folder))
        system = load_system(place, "cpu", laid_out=True)
        if system.chunk is None:
            raise ValueError(f"{place}: wanted a streaming model, got a {system.config.model.name}")
        sizes = system.config.model
        print(f"{sizes.encoder.num_layers} + {sizes.decoder.num_layers} blocks, {sizes.encoder.hidden_dim} wide, "
              f"{options.threads} threads, {system.chunk}", flush=True)
        for line in chunk_figures(system):
            print(line, flush=True)
        count = options.sockets if options.checkpoint else 1
        given = ["--checkpoint", place, "--device", "cpu", "--threads", str(options.threads)]
        with running(serve.parse_arguments(given)) as (port, _):
            print(socket_figure(system, port, options.inputs, count, options.seconds), flush=True)
