"""What recognition while people speak costs: `python bench.py stream`.

Without a checkpoint: a model of the published size with random weights; the time of a chunk, how many streams stay in
real time, and the latency of one over a web socket. With one: the latency of many sockets at real-time pace. Latency is
the time from the sample that completes a chunk, look-ahead included, to the message with its words.

Needs serve.py with all that it needs.
"""
import argparse
import base64
import heapq
import itertools
import json
import math
import os
import selectors
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config as configs
import serve
from audio import frame_sec, stream
from checkpoint import System, export_directory, load_system
from live import samples_until
from manifests import read_inputs
from streaming import Chunk, State, feed, feed_many, start

HERE = Path(__file__).resolve().parent


# ---- the time of a chunk ----

def chunk_samples(system: System) -> int:
    """Samples from one chunk to the next."""
    return samples_until(2 * system.chunk.new, system.config.data) - samples_until(system.chunk.new, system.config.data)


def noise(seed: int, samples: int) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) / 20


def ready_stream(system: System) -> State:
    """A stream that has heard so much that all its caches are full."""
    chunks = system.chunk.encoder_look_back + 3
    return feed(system, start(system, system.chunk), noise(0, chunks * chunk_samples(system)))[0]


def step_ms(system: System, states: Sequence[State], turns: int) -> float:
    """Median of the milliseconds that a chunk of all these streams takes, in one batch."""
    pieces = [noise(100 + i, chunk_samples(system)) for i in range(len(states))]
    spent = []
    for _ in range(turns):
        started = time.perf_counter()
        feed_many(system, states, pieces, [False] * len(states))
        spent.append(1000 * (time.perf_counter() - started))
    return float(np.median(spent))


def difference(system: System, states: Sequence[State]) -> float:
    """The greatest difference between what is kept of streams in a batch, after a chunk, and of each alone."""
    pieces = [noise(200 + i, chunk_samples(system)) for i in range(len(states))]
    found = 0.0
    for i, (together, _) in enumerate(feed_many(system, states, pieces, [False] * len(states))):
        alone, _ = feed(system, states[i], pieces[i])
        for name in ("past", "source", "rows"):
            found = max(found, float((getattr(together, name) - getattr(alone, name)).abs().max()))
        found = max(found, float((together.carry.frame - alone.carry.frame).abs().max()))
    return found


def chunk_figures(system: System, turns: int) -> Iterator[str]:
    """Of a chunk alone, and of batches, which double until they are late."""
    due_ms = 1000 * system.chunk.new * frame_sec(system.config.data)
    state = ready_stream(system)
    ms = step_ms(system, [state], turns)
    yield (f"a chunk of one stream    {ms:8.1f} ms of {due_ms:.0f}: real-time factor {ms / due_ms:.3f}; "
           f"alone, one after another, {int(due_ms / ms)} streams stay in real time")
    most = 0
    late = 1
    while ms < due_ms and late < 512:
        most = late
        late *= 2
        ms = step_ms(system, [state] * late, turns)
        yield f"a batch of {late:3} streams   {ms:8.1f} ms, {ms / late:.1f} a stream"
    while late - most > max(1, most // 8):
        middle = (most + late) // 2
        if step_ms(system, [state] * middle, turns) < due_ms:
            most = middle
        else:
            late = middle
    yield f"in one batch, {most} streams stay in real time"
    yield f"batch against alone, greatest difference: {difference(system, [state] * 4):.1g} (0: equal to the last bit)"


# ---- clients of a web socket ----

PIECE_SEC = 0.02  # of audio in a frame


def to_frame(opcode: int, payload: bytes) -> bytes:
    """A client's frame, masked with zeros, which leave the payload as it is."""
    size = len(payload)
    length = bytes([128 | size]) if size < 126 else struct.pack("!BH", 128 | 126, size)
    return bytes([128 | opcode]) + length + bytes(4) + payload


@dataclass
class Client:
    """Somebody who speaks at real-time pace into a socket."""

    connection: socket.socket
    audio: bytes  # 16-bit samples at the model's rate
    begun: float
    sent: int = 0  # bytes of audio
    received: bytes = b""
    sent_at: list[tuple[int, float]] = field(default_factory=list)  # samples so far, and when
    messages: list[tuple[float, dict]] = field(default_factory=list)

    def speak(self, rate_hz: int) -> float | None:
        """Send the next piece -> when the one after it is due; None behind the last."""
        size = 2 * int(rate_hz * PIECE_SEC)
        self.connection.sendall(to_frame(2, self.audio[self.sent:self.sent + size]))
        self.sent += size
        self.sent_at.append((self.sent // 2, time.monotonic()))
        if self.sent >= len(self.audio):
            self.connection.sendall(to_frame(1, b'{"is_speaking": false}'))
            return None
        return self.begun + (self.sent + size) / 2 / rate_hz

    def listen(self) -> None:
        data = self.connection.recv(65536)
        if not data:
            raise ValueError("the server closed a socket")
        self.received += data
        now = time.monotonic()
        while len(self.received) >= 4:
            size = self.received[1]
            head = 2
            if size >= 126:
                head = 4 if size == 126 else 10
                size = int.from_bytes(self.received[2:head], "big")
            if len(self.received) < head + size:
                return
            payload = self.received[head:head + size]
            if self.received[0] == 0x81:
                self.messages.append((now, json.loads(payload)))
            self.received = self.received[head + size:]


def connect(port: int, audio: bytes, begun: float, rate_hz: int) -> Client:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                       f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = connection.recv(1)
        if not more:
            raise ValueError(f"wanted a web socket, got {answer[:200]!r}")
        answer += more
    if b" 101 " not in answer.partition(b"\r\n")[0]:
        raise ValueError(f"wanted a web socket, got {answer[:200]!r}")
    connection.sendall(to_frame(1, json.dumps({"mode": "online", "audio_fs": rate_hz}).encode()))
    return Client(connection, audio, begun)


def converse(clients: Sequence[Client], rate_hz: int) -> None:
    """All speak at real-time pace, and listen until each has its last message. Raises ValueError if one does not get
    it within a minute of its last word."""
    until = max(client.begun + len(client.audio) / 2 / rate_hz for client in clients) + 60
    due = [(client.begun, i) for i, client in enumerate(clients)]
    heapq.heapify(due)
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.connection, selectors.EVENT_READ, client)
        while selector.get_map():
            if time.monotonic() > until:
                raise ValueError(f"{len(selector.get_map())} of {len(clients)} sockets got no last message in a minute")
            while due and due[0][0] <= time.monotonic():
                _, i = heapq.heappop(due)
                following = clients[i].speak(rate_hz)
                if following is not None:
                    heapq.heappush(due, (following, i))
            wait = due[0][0] - time.monotonic() if due else 1.0
            for key, _ in selector.select(max(0.0, wait)):
                client = key.data
                client.listen()
                if client.messages and client.messages[-1][1].get("is_final"):
                    selector.unregister(client.connection)
                    client.connection.close()


def latencies_ms(client: Client, system: System) -> list[float]:
    """From the sample that completed a chunk to the message with its last token, which says what chunk it is of; left
    out where that token ends within a millisecond of an edge, and what the end of the stream completed."""
    chunk = system.chunk
    seconds = frame_sec(system.config.data)
    counts = [samples for samples, _ in client.sent_at]
    found = []
    for received, message in client.messages:
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
        found.append(1000 * (received - client.sent_at[piece][1]))
    return found


def speeches(system: System, inputs: Sequence[str], count: int, seconds: float) -> list[bytes]:
    """Of each client, so many seconds of the inputs joined, each from another one on; noise without inputs."""
    rate_hz = system.config.data.sample_rate
    wanted = int(seconds * rate_hz)
    sources = []
    if inputs:
        with tempfile.TemporaryDirectory() as scratch:
            rows = read_inputs(inputs, Path(scratch))[0][:4 * count]
            sources = [torch.cat(list(stream(row.audio, rate_hz))) for row in rows]
        if not sum(map(len, sources)):
            raise ValueError("wanted recordings with samples, got none")
    found = []
    for i in range(count):
        joined = noise(i, wanted)
        if sources:
            joined = torch.zeros(0)
            following = itertools.islice(itertools.cycle(sources), i, None)
            while len(joined) < wanted:
                joined = torch.cat([joined, next(following)])
        found.append((joined[:wanted].clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())
    return found


def socket_figures(system: System, port: int, inputs: Sequence[str], count: int, seconds: float) -> Iterator[str]:
    rate_hz = system.config.data.sample_rate
    chunk_sec = system.chunk.new * frame_sec(system.config.data)
    audio = speeches(system, inputs, count, seconds)
    begin = time.monotonic() + 1.0
    clients = [connect(port, x, begin + i * chunk_sec / count, rate_hz) for i, x in enumerate(audio)]
    converse(clients, rate_hz)
    found = []
    for client in clients:
        found += latencies_ms(client, system)
    late = [now - client.begun - samples / rate_hz for client in clients for samples, now in client.sent_at]
    if not found:
        raise ValueError("no chunk of these recordings has words: wanted other recordings, or more seconds")
    p50, p99 = np.quantile(found, [0.5, 0.99], method="higher")
    yield (f"{count} sockets at real-time pace for {seconds:g} s: latency p50 {p50:.0f} ms, p99 {p99:.0f} ms "
           f"(asked of 50 with digits_streaming: p99 under 300), most {max(found):.0f} ms, of {len(found)} messages; "
           f"the client itself was up to {1000 * max(late):.0f} ms late")


# ---- the command ----

def true_size(large_system: Callable[[configs.Config], System]) -> System:
    config = configs.load(str(HERE / "configs/paraformer_large.yaml"))
    system = large_system(replace(config, model=replace(config.model, name="streaming")))
    return system._replace(model=system.model.eval(), chunk=Chunk())


def measure_streams(large_system: Callable, running: Callable, argv: Sequence[str]) -> None:
    """Print the figures. large_system, running: those of bench.py."""
    parser = argparse.ArgumentParser(prog="bench.py stream", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a streaming one (default: random weights of the published size)")
    add("inputs", nargs="*", help="recordings and manifests that the sockets speak (default: noise)")
    add("--sockets", type=int, default=50, help="at once, with a checkpoint (default 50)")
    add("--seconds", type=float, default=30.0, help="that each speaks (default 30)")
    add("--threads", type=int, default=2, help="of torch (default 2)")
    add("--turns", type=int, default=9, help="of which the median is taken (default 9)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = options.checkpoint or folder
        if not options.checkpoint:
            export_directory(true_size(large_system), Path(folder))
        system = load_system(place, "cpu", laid_out=True)
        if system.chunk is None:
            raise ValueError(f"{place}: wanted a streaming model, got a {system.config.model.name}")
        encoder, decoder = system.config.model.encoder, system.config.model.decoder
        print(f"{encoder.num_layers} + {decoder.num_layers} blocks, {encoder.hidden_dim} wide, {options.threads} threads, "
              f"{system.chunk}", flush=True)
        for line in chunk_figures(system, options.turns):
            print(line, flush=True)
        count = options.sockets if options.checkpoint else 1
        with running(serve.parse_arguments(["--checkpoint", place, "--device", "cpu", "--threads",
                                            str(options.threads)])) as (port, _):
            for line in socket_figures(system, port, options.inputs, count, options.seconds):
                print(line, flush=True)
