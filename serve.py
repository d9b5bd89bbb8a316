"""Serve recognition over HTTP: python serve.py --checkpoint runs/latest/checkpoints/best.pt --port 8000

    curl -H "Content-Type: application/json" -d '{"features": [[0.1, ...], ...]}' http://localhost:8000/transcribe
    curl -H "Content-Type: audio/wav" --data-binary @a.wav http://localhost:8000/transcribe?alignment=true
    curl -F file=@a.wav -F response_format=srt http://localhost:8000/v1/audio/transcriptions     (OpenAI's)
    http://localhost:8000                  a page to drop recordings on        /health  /metrics  /v1/models
    python serve.py --benchmark            overhead, throughput and latency of this machine

The file follows a request: its connection (one thread each), its head, its body parsed to features (on a parser
thread), the queue and the one inference thread that owns the model, the answer, the routes, the metrics; then come the
command line and the benchmark; the page is page.html. Parsers are functions from bytes to values; the batching rule
takes the time as an argument. Of http.server only ThreadingHTTPServer is used: its request parser has no deadline, no limit on the
size of a header, and answers errors in HTML.

Needs torch (2.10 or later; serve your own checkpoints only), numpy, and decode.py with all that it needs.
Sources: RFC 9110 and 9112 (HTTP), 7578 (forms); OpenAI's API reference for audio transcriptions; Prometheus text 0.0.4.
"""
import argparse
import contextlib
import ctypes
import hmac
import http.client
import io
import itertools
import json
import math
import os
import queue
import re
import select
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from timeit import repeat, timeit
from typing import Any, NamedTuple, NoReturn

# Set before torch is loaded: idle OpenMP threads then spin for 10 us and sleep. By default they spin for so long that
# every operator is late when another process keeps a core busy.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from torch import Tensor

import audio
import decode
from audio import frame_sec, frontend, normalise, read_header
from checkpoint import PRECISIONS, System, load_system
from report import Result, cues, join_words, log_confidence, subtitles, word_entry

MIB = 2 ** 20
MAX_LINE, MAX_HEAD, MAX_HEADERS = 4096 + 16, 65536, 100        # request line and whole head in bytes; header lines
MAX_PARTS, MAX_PART_HEAD = 128, 8192                    # of a form; the header of a part in bytes
MAX_ITEMS = 64                                          # utterances in one request
MAX_DRAIN, DRAIN_SEC = 64 * MIB, 3.0                    # bytes of a refused body to discard, so that the answer arrives
CUT_SEC = 2.0                                           # for requests that are still being sent at SIGTERM


class Refusal(Exception):
    """An answer other than 2xx: the error object of OpenAI's API. Messages name what was found and what is allowed."""

    KINDS = {401: "authentication_error", 429: "rate_limit_error"}

    def __init__(self, status: int, code: str, message: str, param: str | None = None,
                 headers: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, tuple(headers)

    def response(self, beside: dict[str, Any] | None = None) -> "Response":
        kind = self.KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": str(self)[:1000], "type": kind, "param": self.param, "code": self.code}
        return json_response({**(beside or {}), "error": error}, self.status, self.headers)


class Gone(Exception):
    """The client has disconnected: there is nobody to answer."""


class Head(NamedTuple):
    id: str                         # of the request: the client's X-Request-Id if it is safe to echo, else a new one
    started: float                  # monotonic seconds at which the whole head had arrived
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]         # lower-case names
    length: int | None              # Content-Length: bytes of the body
    close: bool                     # close after the answer: the client asks for it, or the head could not be read


class Response(NamedTuple):
    status: int
    media_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    note: str = ""                  # for the log


def json_response(value: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return Response(status, "application/json", body, tuple(headers))


def unread_head() -> Head:
    """A placeholder for a head that could not be read, or was not: its answer needs a request id as well."""
    return Head(uuid.uuid4().hex, time.monotonic(), "", "", {}, {}, None, True)


def to_bytes(head: Head, response: Response, close: bool) -> bytes:
    """The answer to `head` as sent: status line, headers and, except to HEAD, the body."""
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}", f"X-Request-Id: {head.id}",
             f"Server: serve.py\r\nDate: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
             "X-Content-Type-Options: nosniff\r\nCache-Control: no-store"]
    if response.status != 204:
        lines += [f"Content-Type: {response.media_type}", f"Content-Length: {len(response.body)}"]
    lines += [f"{name}: {value}" for name, value in response.headers]
    lines += ["Connection: close"] if close else []
    body = b"" if head.method == "HEAD" else response.body
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# ---- the connection: the life of a request ----

class Connection(socketserver.BaseRequestHandler):
    """One connection on its own thread. Every wait for the client has an absolute deadline, whatever trickles in.

    server.phases holds its state: idle (between requests), reading (a request has begun), busy (it has come whole).
    """

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()       # received and not parsed yet

    def handle(self) -> None:
        while self.serve_one():
            pass

    def serve_one(self) -> bool:
        """Read a request, admit it, read its body, answer it -> whether the connection stays open for another."""
        head, body, unread = unread_head(), b"", True
        try:
            block = self.read_head()
            if block is None:
                return False
            head = parse_head(block)
            unread = bool(head.length) or "transfer-encoding" in head.headers
            self.server.admit(head)
            if head.method == "POST":
                body, unread = self.read_body(head), False
            self.server.phases[self.request] = "busy"
            response = self.server.answer(head, body, self.hung_up)
        except Refusal as refusal:
            response = refusal.response()
        except (Gone, ConnectionError):
            response = Response(499, "", b"")       # nginx's code for a client that closed; logged, never sent
        except Exception:
            self.server.log(f"{head.id} {traceback.format_exc()}")
            bug = Refusal(500, "internal", "the server failed on this request; its log says more under this request id")
            response = bug.response()
        return self.finish_one(head, response, unread)

    def finish_one(self, head: Head, response: Response, unread: bool) -> bool:
        """Write, count and log the answer -> whether the connection stays open; never with a body left unread."""
        close = head.close or unread or self.server.draining.is_set()
        sent = False
        if response.status != 499:
            cors = cors_headers(head, self.server.options.cors_origin, self.server.allowed(head))
            response = response._replace(headers=response.headers + cors)
            with contextlib.suppress(OSError):
                self.request.settimeout(self.server.options.write_timeout)      # of the whole sendall
                # one write: a second one could wait for the client's delayed ACK
                self.request.sendall(to_bytes(head, response, close))
                sent = True
        self.server.note(head, response, response.status if sent else 499)
        if sent and unread:
            self.read_away(DRAIN_SEC if response.status != 408 else 0.5)     # 408: a client that is slow already
        self.server.phases[self.request] = "idle"
        return sent and not close

    def read_some(self, deadline: float) -> bytes:
        """The next bytes; b"" when the client sends no more. Raises TimeoutError at `deadline` (monotonic seconds)."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self.request.settimeout(remaining)
        return self.request.recv(262144)

    def receive(self, deadline: float, what: str) -> bytes:
        """The next bytes of a request, never b"". Raises Refusal if the client is late or sends no more."""
        try:
            piece = self.read_some(deadline)
        except TimeoutError:
            raise Refusal(408, "request_timeout", f"{what} did not come whole in time") from None
        if not piece:
            raise draining() if self.server.draining.is_set() else bad_framing(f"the connection ended within {what}")
        return piece

    def read_head(self) -> bytes | None:
        """The request line and header lines, without the empty line that ends them; None if no request begins."""
        begun, deadline = False, time.monotonic() + self.server.options.idle_timeout
        while True:
            self.buffer = self.buffer.removeprefix(b"\r\n")     # an empty line before a request is allowed
            if self.buffer and not begun:
                begun, deadline = True, time.monotonic() + self.server.options.header_timeout
                self.server.phases[self.request] = "reading"
            end = self.buffer.find(b"\r\n\r\n")
            check_head_size(self.buffer if end < 0 else self.buffer[:end + 2])
            if end >= 0:
                block = bytes(self.buffer[:end])
                del self.buffer[:end + 4]
                return block
            try:
                self.buffer += self.receive(deadline, "the header")
            except (Refusal, ConnectionError):
                if begun:
                    raise
                return None         # idle for too long, or gone: no request

    def read_body(self, head: Head) -> bytes:
        """The body, exactly head.length bytes."""
        deadline = time.monotonic() + self.server.options.body_timeout
        if len(self.buffer) < head.length and head.headers.get("expect", "").lower() == "100-continue":
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < head.length:
            self.buffer += self.receive(deadline, f"the body of {head.length} bytes")
        body = bytes(memoryview(self.buffer)[:head.length])
        del self.buffer[:head.length]
        return body

    def read_away(self, seconds: float) -> None:
        """Discard what comes, within bounds: closing with bytes unread sends a TCP reset, and the answer is lost."""
        deadline, left = time.monotonic() + seconds, MAX_DRAIN
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            while left > 0 and (piece := self.read_some(deadline)):
                left -= len(piece)

    def hung_up(self) -> bool:
        """Whether the client has closed its side; parser and inference threads ask before they work on the request."""
        try:
            poll = select.poll()
            poll.register(self.request, select.POLLIN)
            return bool(poll.poll(0)) and not self.request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (OSError, ValueError):
            return True


class Door(ThreadingHTTPServer):
    """The open connections, at most options.max_connections of them. A subclass says what is behind it: `admit`,
    `answer`, `allowed` and `note`."""

    request_queue_size = 1024           # listen backlog: a burst waits to be accepted; the default, 5, would reset it

    def __init__(self, options: argparse.Namespace, log: Callable[[str], None]):
        self.options, self.log, self.draining = options, log, threading.Event()
        self.phases: dict[socket.socket, str] = {}                  # by open connection: idle, reading or busy
        self.refused: list[tuple[float, socket.socket]] = []        # (when to close it, connection), oldest first
        self.address_family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        super().__init__((options.host, options.port), Connection)

    def admit(self, head: Head) -> None:
        """Check all that can be checked before the body is read. Raises Refusal."""
        raise NotImplementedError

    def answer(self, head: Head, body: bytes, gone: Callable[[], bool]) -> Response:
        """A whole, admitted request -> its answer; gone() asks whether its client has left. Raises Refusal or Gone."""
        raise NotImplementedError

    def allowed(self, head: Head) -> str:
        """The methods of the path, as the header Allow has them."""
        raise NotImplementedError

    def note(self, head: Head | None, response: Response, status: int) -> None:
        """Count and log an answer; status is 499 where it could not be sent, head None where no request was read."""
        raise NotImplementedError

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)    # HTTPServer's also resolves the host's name, which can take seconds

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if len(self.phases) >= self.options.max_connections:
            self.refuse(request)
            return
        self.phases[request] = "idle"
        super().process_request(request, client_address)

    def refuse(self, request: socket.socket) -> None:
        """Answer 503 without a thread, and leave the client a second to read it (service_actions then closes)."""
        message = f"{self.options.max_connections} connections are open, which is the most"
        response = Refusal(503, "overloaded", message, headers=[("Retry-After", "1")]).response()
        self.note(None, response, response.status)
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(to_bytes(unread_head(), response, close=True))
            request.shutdown(socket.SHUT_WR)
        self.refused.append((time.monotonic() + 1.0, request))

    def service_actions(self) -> None:
        while self.refused and (self.refused[0][0] < time.monotonic() or len(self.refused) > 256):
            self.refused.pop(0)[1].close()

    def shutdown_request(self, request: socket.socket) -> None:
        self.phases.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        self.log(traceback.format_exc())

    def cut(self, phases: Sequence[str]) -> None:
        """End the connections in these phases: their reads return b"" from now on."""
        for request, phase in list(self.phases.items()):
            with contextlib.suppress(OSError):
                if phase in phases:
                    request.shutdown(socket.SHUT_RD)


# ---- the head of a request ----

REQUEST_LINE = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]+) ([!-~]+) (HTTP/1\.[01])")
HEADER_LINE = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


def bad_framing(message: str) -> Refusal:
    return Refusal(400, "bad_framing", message)


def check_head_size(block: bytes) -> None:
    """Refuse a head (or what has come of it) that is too large or has bare line feeds. Raises Refusal."""
    if len(block[:MAX_LINE + 2].split(b"\r\n", 1)[0]) > MAX_LINE:
        raise Refusal(414, "uri_too_long", f"the request line is longer than {MAX_LINE} bytes")
    if len(block) > MAX_HEAD or block.count(b"\r\n") > MAX_HEADERS + 1:
        raise Refusal(431, "headers_too_large", f"wanted at most {MAX_HEAD} bytes and {MAX_HEADERS} lines of header")
    if block.count(b"\n") != block.count(b"\r\n"):
        raise bad_framing("lines of the header must end in CR LF")


def parse_head(block: bytes) -> Head:
    """Request line and header lines -> Head. Strict: what two parsers could read differently raises Refusal 400.

    Source: RFC 9112. Transfer-Encoding is never decoded: alone it gets 411 (in `admit`), with Content-Length 400.
    """
    first, *lines = block.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise bad_framing("wanted a request line like 'GET /health HTTP/1.1'")
    method, target, version = (group.decode() for group in match.groups())
    headers: dict[str, str] = {}
    for line in lines:
        match = HEADER_LINE.fullmatch(line)
        if not match:
            raise bad_framing("a header line is not 'Name: value'")
        name, value = match[1].decode().lower(), match[2].decode("latin-1").strip(" \t")
        if name in headers and name in ("content-length", "transfer-encoding", "host", "content-type", "authorization"):
            raise bad_framing(f"header {name} stands twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if version == "HTTP/1.1" and "host" not in headers:
        raise bad_framing("HTTP/1.1 needs a Host header")
    if version == "HTTP/1.0":
        headers.pop("expect", None)     # to be ignored: HTTP/1.0 has no 100 Continue (RFC 9110, 10.1.1)
    path, query = parse_target(target)
    close = version == "HTTP/1.0" or "close" in re.split(r"[ \t,]+", headers.get("connection", "").lower())
    client_id = headers.get("x-request-id", "")
    id = client_id if re.fullmatch("[A-Za-z0-9._-]{1,64}", client_id) else uuid.uuid4().hex
    return Head(id, time.monotonic(), method, path, query, headers, parse_length(headers), close)


def parse_length(headers: dict[str, str]) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not re.fullmatch("[0-9]+", text):
        raise bad_framing("Content-Length must be one number in digits")
    if "transfer-encoding" in headers:
        raise bad_framing("Content-Length and Transfer-Encoding exclude each other")
    return int(text.lstrip("0")[:19] or 0)      # 19 exceed any limit; int() raises on 4301


def parse_target(target: str) -> tuple[str, dict[str, str]]:
    """/path?name=value&... (or an absolute URI, as sent to a proxy) -> decoded path, query (a name's last value)."""
    target = re.sub("^https?://[^/?]*", "", target, flags=re.IGNORECASE)
    path, _, query = target.partition("?")
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100)
        return urllib.parse.unquote(path, errors="strict") or "/", dict(pairs)
    except ValueError:
        raise bad_framing("the URI is not UTF-8, or its query has more than 100 fields") from None


def media_type(head: Head) -> str:
    return head.headers.get("content-type", "").partition(";")[0].strip().lower()


def draining() -> Refusal:
    return Refusal(503, "draining", "the server is shutting down", headers=[("Retry-After", "5")])


def cors_headers(head: Head, origins: Sequence[str], allowed: str) -> tuple[tuple[str, str], ...]:
    """CORS headers for pages of these origins; none without any. allowed: the methods of the path."""
    origin = head.headers.get("origin")
    found = [("Vary", "Origin")] if origins else []
    if origin in origins:
        found += [("Access-Control-Allow-Origin", origin),
                  ("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")]
        if head.method == "OPTIONS":
            found += [("Access-Control-Allow-Methods", allowed),
                      ("Access-Control-Max-Age", "600"),
                      ("Access-Control-Allow-Headers", head.headers.get("access-control-request-headers", ""))]
    return tuple(found)


# ---- the body: bytes to features ----

class Utterance(NamedTuple):
    pieces: list[tuple[float, Tensor]]      # start in seconds, features (T,F) float32 on the CPU, normalised
    seconds: float                          # of the whole recording


class Ask(NamedTuple):
    """A parsed body: what one POST asks for."""

    utterances: list[Utterance]
    fields: dict[str, Any]          # options, not checked yet
    many: bool = False              # from {"batch": ...}: the answer is a list


INTERRUPTIBLE = MIB // 2    # bytes of JSON; larger bodies have a parser thread of their own and yield the GIL


def parse_json(body: bytes) -> dict:
    """A JSON object, all numbers as float; overflow gives inf, which its reader refuses. Raises Refusal 400.

    In a large body a Python function converts each number: json's C code alone does not yield the GIL.
    """
    number = float if len(body) < INTERRUPTIBLE else lambda text: float(text)
    try:
        value = json.loads(body.decode(), parse_int=number, parse_float=number, parse_constant=float)
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is a ValueError
        raise Refusal(400, "invalid_json", f"the body cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", 'the body must be a JSON object like {"features": [[...], ...]}')
    return value


def parse_body(body: bytes, dim: int, max_frames: int) -> dict:
    """parse_json, but features of plain decimals at the start are read as an array, in a third of the time."""
    opening, end = re.match(rb'\s*{\s*"features"\s*:\s*(?=\[\[)', body), body.rfind(b"]]") + 2
    if opening and not re.search(rb"\\|features", body[end:]):      # JSON takes the last "features", maybe escaped
        feats = parse_decimals(body[opening.end():end], dim, max_frames)
        if feats is not None:
            with contextlib.suppress(Refusal):      # parse it whole: the error then has the right position
                return {**parse_json(body[:opening.end()] + b"[]" + body[end:]), "features": feats}
    return parse_json(body)


POWERS = 10.0 ** np.arange(23)      # up to 1e22, the last power of ten that float64 holds exactly
DIGITS = np.array([0x0F0F0F0F0F0F0F0F & -1 << 8 * (8 - n) for n in range(9)], np.uint64)    # values of the last n bytes
PAIRS = ((10, 8, 0x00FF00FF00FF00FF), (100, 16, 0x0000FFFF0000FFFF), (10000, 32, 0x00000000FFFFFFFF))


def eight_digits(words: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers of the `sizes` digits, clipped to 0 to 8, before the offsets `ends`; words[i] is bytes i to i + 7.

    Neighbours are joined three times: 10 * a + b, 100 * ab + cd, ... Source: Lemire 2022, "SWAR explained".
    """
    word = words[ends - 8] & DIGITS.take(sizes, mode="clip")
    for factor, shift, keep in PAIRS:
        word = word * np.uint64((factor << shift) + 1) >> np.uint64(shift) & np.uint64(keep)
    return word


def parse_decimals(block: bytes, dim: int, max_frames: int) -> np.ndarray | None:
    """b"[[-0.25, 3.0, ...], ...]" -> (T,dim) float32, equal to json.loads' numbers as float32.

    None unless it has 1 to max_frames rows of `dim` numbers like -12.34 (at most 22 digits, some on each side), none so
    close to halfway between two float32 that the relative error of this sum (below 2^-48) could change its rounding.
    """
    text = np.frombuffer(b" " * 8 + block, np.uint8)        # eight bytes stand before each number's end
    is_mark = (text | 2 == ord(".")) | (text == ord("]"))     # "," | 2 == "."
    rows, row_marks = np.count_nonzero(is_mark) // (2 * dim + 1), b".," * (dim - 1) + b".]"
    if not 1 <= rows <= max_frames:         # checked before np.flatnonzero takes eight bytes for each mark
        return None
    marks = np.flatnonzero(is_mark)
    if text[marks].tobytes() != b",".join([row_marks] * rows) + b"]":
        return None
    marks, end = marks.reshape(rows, 2 * dim + 1), marks[-1] + 1
    dots, stops = marks[:, :-1:2].ravel(), marks[:, 1::2].ravel()
    opens = np.append(8, marks[:-1, -1]) + 1        # where each row has its "["
    opens += text[opens] == ord(" ")
    starts = np.append(0, stops[:-1]) + 1
    starts[::dim] = opens + 1
    starts += text[starts] == ord(" ")
    minus = text[starts] == ord("-")
    starts += minus
    whole, fraction = dots - starts, stops - dots - 1
    digits = whole + fraction
    if not ((text[opens] == ord("[")).all() and (marks[:, -1] == marks[:, -2] + 1).all() and end == len(text)
            and whole.min() > 0 and fraction.min() > 0 and digits.max() < 23
            and digits.sum() == np.count_nonzero(text - ord("0") < 10)        # each byte of a number is a digit
            and ((whole == 1) | (text[starts] != ord("0"))).all()):     # JSON has no leading zeros
        return None
    words, value = np.ndarray(len(text) - 7, "<u8", text, strides=(1,)), np.zeros(len(digits))
    for k in range(0, fraction.max(), 8):
        value += eight_digits(words, stops - k, fraction - k) * POWERS[k]
    for k in range(0, whole.max(), 8):
        value += eight_digits(words, dots - k, whole - k) * POWERS.take(fraction + k, mode="clip")
    value = np.where(minus, -value, value) / POWERS[fraction]
    low, high = ((value * scale).astype(np.float32) for scale in (1 - 2.0 ** -47, 1 + 2.0 ** -47))
    return low.reshape(rows, dim) if np.array_equal(low, high) else None


def kind_of(value: Any) -> str:
    """The JSON type of a value, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")


def parse_features(value: Any, dim: int, max_frames: int, place: str) -> np.ndarray:
    """A JSON array of T rows of `dim` numbers -> (T,dim) float32, finite. Raises Refusal, which names `place`."""
    if isinstance(value, np.ndarray):       # parse_body has read it
        return value
    if not isinstance(value, list):
        raise Refusal(400, "invalid_type", f"{place}: wanted an array of rows, got {kind_of(value)}", place)
    if not value:
        raise Refusal(422, "empty_features", f"{place}: wanted at least one row", place)
    if len(value) > max_frames:
        raise Refusal(413, "too_many_frames", f"{place}: {len(value)} rows, at most {max_frames} are allowed", place)
    feats = np.empty((len(value), dim), np.float32)
    with np.errstate(over="ignore"):        # gives inf, found below
        for i, row in enumerate(value):
            if not isinstance(row, list):
                raise Refusal(422, "invalid_type", f"{place}: row {i} must be an array, got {kind_of(row)}", place)
            if len(row) != dim:
                raise Refusal(422, "wrong_dim", f"{place}: row {i} has {len(row)} values, the model needs {dim}", place)
            if set(map(type, row)) != {float}:
                j, found = next((j, x) for j, x in enumerate(row) if type(x) is not float)
                message = f"{place}: row {i}, column {j} must be a number, got {kind_of(found)}"
                raise Refusal(422, "invalid_type", message, place)
            feats[i] = row
    finite = np.isfinite(feats)
    if not finite.all():
        i, j = np.argwhere(~finite)[0]
        raise Refusal(422, "not_finite", f"{place}: row {i}, column {j} is not finite as float32", place)
    return feats


def prepare(system: System, feats: Tensor, place: str) -> Tensor:
    """Raw features (T,F) -> the model's input (T,F), normalised and clamped. Raises Refusal 422 for NaN."""
    feats = normalise(feats, system.stats.cpu())
    if feats.isnan().any():
        raise Refusal(422, "not_finite", f"{place}: not finite after normalisation", place)
    return feats.clamp(-1e3, 1e3)       # real ones reach about 10; 1e30 would overflow inside the model


def parse_utterances(body: bytes, system: System, options: argparse.Namespace) -> Ask:
    """{"features": ...} or {"batch": [{"features": ...}, ...]}, with options beside -> Ask. Raises Refusal."""
    dim = system.stats.shape[1]
    fields = parse_body(body, dim, options.max_frames)      # not kept in Ask: each number has 24 bytes
    others = {name: value for name, value in fields.items() if name not in ("features", "batch")}

    def utterance(item: dict, place: str) -> Utterance:
        if "features" not in item:
            raise Refusal(400, "missing_field", f"{place} is missing: wanted an array of rows of {dim} numbers", place)
        feats = parse_features(item["features"], dim, options.max_frames, place)
        seconds = len(feats) * frame_sec(system.config.data)
        return Utterance([(0.0, prepare(system, torch.from_numpy(feats), place))], seconds)

    if "batch" not in fields:
        return Ask([utterance(fields, "features")], others)
    batch, most = fields["batch"], min(MAX_ITEMS, options.max_queue)
    if "features" in fields or not isinstance(batch, list) or not 1 <= len(batch) <= most:
        message = f"batch: wanted an array of 1 to {most} objects, and no features beside it"
        raise Refusal(422, "invalid_value", message, "batch")
    for i, item in enumerate(batch):
        if not isinstance(item, dict):
            raise Refusal(422, "invalid_type", f"batch[{i}] must be an object, got {kind_of(item)}", f"batch[{i}]")
    return Ask([utterance(item, f"batch[{i}].features") for i, item in enumerate(batch)], others, True)


MAGIC = ((rb"ID3|\xff\xfb", "MP3"), (rb"OggS", "Ogg"), (rb"fLaC", "FLAC"), (rb"\x1aE\xdf\xa3", "WebM"),
         (rb"....ftyp", "MP4"), (rb"RIFX", "big-endian WAV"), (rb"RF64", "RF64"), (rb"FORM", "AIFF"),
         (rb"RIFF", "WAV with another sample format"), (rb"", "something else"))       # first bytes, for the message


def parse_wav(body: bytes, system: System, options: argparse.Namespace) -> Utterance:
    """A WAV file -> features, one piece per segment (those of data.segments with system.segment_sec). Raises Refusal.

    All that the header tells is checked before any sample is decoded.
    """
    if not body:
        raise Refusal(400, "empty_audio", "file: got 0 bytes", "file")
    try:
        header = read_header(io.BytesIO(body))
    except ValueError as error:
        raise Refusal(400, "unsupported_format", f"file: broken WAV: {error}", "file") from None
    if header is None or not (header.channels <= 8 and 4000 <= header.rate_hz <= 384000):
        known = next(name for start, name in MAGIC if re.match(start, body, re.DOTALL))
        found = f"{header.channels} channels at {header.rate_hz} Hz" if header else known
        raise Refusal(400, "unsupported_format", "file: wanted WAV (PCM 8/16/24/32 bit or float 32/64, "
                      f"1 to 8 channels, 4 to 384 kHz), got {found}", "file")
    seconds, config = header.num_samples / header.rate_hz, system.config.data
    if not seconds:
        raise Refusal(400, "empty_audio", "file: a WAV without samples", "file")
    if seconds > options.max_audio_seconds:
        message = f"file: {seconds:.1f} s, at most {options.max_audio_seconds:g} s are allowed"
        raise Refusal(413, "audio_too_long", message, "file")
    try:
        pieces = [(piece.start_sec, frontend(piece.samples, config.sample_rate, config))
                  for piece in audio.segments(body, config, *system.segment_sec)]
    except ValueError as error:
        message = str(error).removeprefix("<bytes>: ")
        raise Refusal(422, "not_finite", f"file: {message}", "file") from None
    return Utterance([(start, prepare(system, feats, "file")) for start, feats in pieces], seconds)


DISPOSITION = re.compile(r"^content-disposition[ \t]*:[ \t]*form-data[ \t]*(;.*)$", re.IGNORECASE | re.MULTILINE)
PARAMETER = re.compile(r';\s*([\w*]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')        # name, quoted or bare value


def bad_form(message: str) -> Refusal:
    return Refusal(400, "invalid_multipart", f"multipart: {message}")


def parse_multipart(body: bytes, content_type: str) -> list[tuple[str, bool, bytes]]:
    """A form -> (name, whether it is a file, content) of each part. Raises Refusal 400. Source: RFC 2046, 7578.

    The body is split as bytes, whatever is in it; file names are never used.
    """
    match = re.search(r';\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))\s*(?:;|$)', content_type, re.IGNORECASE)
    if not match:
        raise bad_form("wanted a boundary of 1 to 70 characters in Content-Type")
    delimiter, parts = b"\r\n--" + (match[1] or match[2]).encode("latin-1"), []
    _, *pieces = (b"\r\n" + body).split(delimiter, MAX_PARTS + 1)        # the preamble before the first is ignored
    for piece in pieces:
        if piece.startswith(b"--"):
            return parts
        head, blank, content = piece.partition(b"\r\n\r\n")
        line, _, head = head.partition(b"\r\n")
        complete = blank or head.endswith(b"\r\n")     # an empty part may share its last CR LF with the boundary
        if line.strip(b" \t") or not complete or len(head) > MAX_PART_HEAD:
            raise bad_form(f"a boundary line is broken, or a part's header does not end within {MAX_PART_HEAD} bytes")
        match = DISPOSITION.search(head.decode("utf-8", "replace"))
        pairs = PARAMETER.findall(match[1]) if match else []
        values = {name.lower(): quoted or bare for name, quoted, bare in pairs}
        if not values.get("name"):
            raise bad_form("a part has no 'Content-Disposition: form-data; name=...'")
        parts.append((values["name"], bool(values.keys() & {"filename", "filename*"}), content))
    raise bad_form(f"wanted at most {MAX_PARTS} parts and the closing boundary, as in Content-Type, got {len(parts)} "
                   "parts and no closing one")


def parse_form(body: bytes, content_type: str) -> tuple[bytes, dict[str, Any]]:
    """A form with one part "file" -> its content, and the fields: a text each, or a list of texts for names in "[]".

    Files under other names are ignored. Raises Refusal 400.
    """
    files, fields = [], {}
    for name, is_file, content in parse_multipart(body, content_type):
        if is_file:
            files += [content] if name == "file" else []
            continue
        if name == "file":
            raise Refusal(400, "missing_file", "file: came as text, wanted a file (with curl: -F file=@NAME)", "file")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise bad_form("a field is not UTF-8") from None
        fields[name] = [*fields.get(name, []), text] if name.endswith("[]") else text
    if len(files) != 1:
        raise Refusal(400, "missing_file", f"file: wanted one part with that name and a file, got {len(files)}", "file")
    return files[0], fields


def read_ask(head: Head, body: bytes, system: System, options: argparse.Namespace) -> Ask:
    """The body of a POST of any media type -> Ask; /transcribe takes options from the query too, the body's win."""
    if media_type(head) == "application/json":
        ask = parse_utterances(body, system, options)
    elif media_type(head) == "multipart/form-data":
        audio, fields = parse_form(body, head.headers["content-type"])
        ask = Ask([parse_wav(audio, system, options)], fields)
    else:
        ask = Ask([parse_wav(body, system, options)], {})
    return ask._replace(fields={**head.query, **ask.fields}) if head.path == "/transcribe" else ask


def parse_timeout(value: Any, longest: float) -> float:
    """Seconds above 0, as float or text, None = `longest` -> those, at most `longest`. Raises Refusal 422."""
    try:
        seconds = longest if value is None else float(value) if type(value) in (float, str) else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refusal(422, "invalid_value", "timeout: wanted seconds above 0", "timeout")
    return min(seconds, longest)


def parse_flag(name: str, value: Any) -> bool:
    """A JSON boolean, or true, false, 1 or 0 as text in any case; None and "" are false. Raises Refusal 400."""
    text = "" if value is None else str(value).lower()
    if text not in ("true", "1", "false", "0", ""):
        raise Refusal(400, "invalid_value", f"{name}: wanted true or false", name)
    return text in ("true", "1")


# ---- batching ----

RATIO = 1.5         # longest to shortest of a batch: above it, a large model's padding costs more than the batch saves


def choose_batch(lengths: Sequence[int], max_size: int, max_frames: int, slack: int = 0) -> list[int]:
    """The next batch of those that wait -> its indices in `lengths` (frames, oldest first), always with the oldest.

    It is the largest set of like lengths around the oldest: the longest at most RATIO times the shortest, or `slack`
    frames above it (pass_worth); at most max_size utterances and max_frames padded frames (a longer one goes alone).
    Nobody starves, as everybody becomes the oldest. Where a pass costs more than the padding it saves, few large
    batches answer the slowest client sooner, though many small ones would do somewhat less work.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    oldest, best = order.index(0), [0]
    for low in range(max(0, oldest - max_size + 1), oldest + 1):
        shortest, high = lengths[order[low]], low
        longest = max(RATIO * shortest, shortest + slack)
        while (high < len(order) and high - low < max_size and lengths[order[high]] <= longest
               and (high - low + 1) * lengths[order[high]] <= max_frames):
            high += 1
        if high > oldest and high - low > len(best):
            best = order[low:high]
    return best


class Job:
    """A piece of an utterance in the queue; pieces of one have the same `utterance`. Times are monotonic; `gone` asks
    whether its client has hung up; `outcome` will be what the model makes of the piece."""

    def __init__(self, feats: Tensor, utterance: object, now: float, deadline: float, gone: Callable[[], bool]):
        self.feats, self.utterance, self.queued, self.deadline, self.gone = feats, utterance, now, deadline, gone
        self.taken, self.infer_sec, self.batch_size = now, 0.0, 0
        self.outcome: Future = Future()


def num_utterances(jobs: Sequence[Job]) -> int:
    """How many utterances the jobs belong to: the pieces of one count once."""
    return len({id(job.utterance) for job in jobs})


class Batcher:
    """The queue, and the rule that makes batches of it. The one thread in `run` is the only one to call the model."""

    def __init__(self, infer: Callable[[list[Tensor]], list], options: argparse.Namespace, metrics: "Metrics",
                 slack: int = 0):
        self.infer, self.options, self.metrics, self.slack = infer, options, metrics, slack
        self.waiting: list[Job] = []        # oldest first
        self.arriving = 0                   # requests that are being parsed
        self.expected, self.answered = 0, -math.inf     # utterances of the last batch less those since; its end
        self.padded = self.padding = 0      # frames run so far with padding, and those that were padding
        self.changed = threading.Condition()        # guards waiting, arriving, back and answered

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Held around parsing and `submit`: the next batch waits a little for the requests in here."""
        with self.changed:
            self.arriving += 1
        try:
            yield
        finally:
            with self.changed:
                self.arriving -= 1
                if self.waiting and not self.arriving:
                    self.changed.notify()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of them, or none: Refusal 429."""
        with self.changed:
            waiting, more = num_utterances(self.waiting), num_utterances(jobs)
            if waiting + more > self.options.max_queue:
                message = (f"{waiting} utterances wait and this request brings {more}, at most "
                           f"{self.options.max_queue} may wait; send it again later")
                raise Refusal(429, "queue_full", message, headers=[("Retry-After", "1")])
            self.waiting += jobs
            self.expected -= more
            if not waiting or len(self.waiting) >= self.options.max_batch_size:
                self.changed.notify()       # only then: waking `run` while it must wait takes the GIL from the parsers

    def poll(self, now: float) -> tuple[list[Job], float | None]:
        """The batch to run at `now`, or [] and the seconds to wait for more (None: until `changed`). Needs the lock.

        It waits only while a request is being parsed, or a client of the last batch may be back (many ask again at
        once); while fewer than max_batch_size jobs wait; and until max_wait_ms have passed since the newest job or
        the last answer, whichever came later, or eight times that since the oldest job.
        """
        if not self.waiting:
            return [], None
        wait = self.options.max_wait_ms / 1e3
        first, last = self.waiting[0].queued, max(self.waiting[-1].queued, self.answered)
        patience = min(last + wait, first + 8 * wait) - now
        returning = self.expected > 0 and first < self.answered + wait
        if (self.arriving or returning) and len(self.waiting) < self.options.max_batch_size and patience > 0:
            return [], patience
        chosen = choose_batch([len(job.feats) for job in self.waiting], self.options.max_batch_size,
                              self.options.max_batch_frames, self.slack)
        batch = [self.waiting[i] for i in chosen]
        self.waiting = [job for i, job in enumerate(self.waiting) if i not in chosen]
        return batch, 0.0

    def run(self) -> None:
        while True:
            with self.changed:
                batch, wait = self.poll(time.monotonic())
                if not batch:
                    self.changed.wait(wait)
            try:
                self.run_batch(batch)
            except Exception as error:      # of any kind: the only inference thread must survive
                for job in batch:
                    if not job.outcome.done():
                        job.outcome.set_exception(error)
            del batch           # else its features stay in memory until the next one

    def run_batch(self, batch: Sequence[Job]) -> None:
        """Drop late and gone jobs, run the rest; if that fails, each alone, so that none can harm another."""
        now, kept = time.monotonic(), []
        for job in batch:
            stale = deadline_passed() if now >= job.deadline else Gone() if job.gone() else None
            if stale:
                job.outcome.set_exception(stale)
            else:
                kept.append(job)
        if not kept:
            return
        try:
            found = self.infer([job.feats for job in kept])
        except Exception as error:
            if len(kept) == 1:
                kept[0].outcome.set_exception(error)
            else:
                for job in kept:
                    self.run_batch([job])
            return
        seconds = time.monotonic() - now
        self.measure(kept, now, seconds)
        with self.changed:
            unanswered = {job.gone for job in self.waiting}     # by request: those with other jobs that wait
            self.expected = num_utterances([job for job in kept if job.gone not in unanswered])
            self.answered = now + seconds
        for job, recognition in zip(kept, found):
            job.taken, job.infer_sec, job.batch_size = now, seconds, len(kept)
            job.outcome.set_result(recognition)

    def measure(self, jobs: Sequence[Job], now: float, seconds: float) -> None:
        lengths = [len(job.feats) for job in jobs]
        self.metrics.observe("asr_batch_size", len(jobs))
        self.metrics.observe("asr_inference_seconds", seconds)
        self.padded += max(lengths) * len(jobs)
        self.padding += max(lengths) * len(jobs) - sum(lengths)
        for job in jobs:
            self.metrics.observe("asr_queue_seconds", now - job.queued)


def deadline_passed() -> Refusal:
    return Refusal(504, "deadline_exceeded", "the answer was not ready within the deadline of the request",
                   headers=[("x-should-retry", "false")])


# ---- recognition and its forms ----

class Recognition(NamedTuple):
    result: Result              # tokens that spell its text when joined, "▁" for the space before a word
    weights: list[float]        # (L,) firing weight of each encoder frame


def recognise(system: System, feats: Sequence[Tensor]) -> list[Recognition]:
    """Normalised features (T,F), T >= 1 -> a Recognition each, in one batch.

    Whole words get the mark "▁"; characters, and pieces as they are published (hel@@ lo), stay.
    """
    found, mark = decode.decode_batch(system, feats), "▁" if system.tokenizer.unit == "word" else ""
    results = []
    for i, x in enumerate(feats):
        result = decode.read_result(system, found, i)
        tokens = [token._replace(token=mark + token.token) for token in result.tokens]
        weights = found.alpha[i, :-(-len(x) // system.config.model.encoder.subsampling)].tolist()
        results.append(Recognition(result._replace(tokens=tokens), weights))
    return results


def segments(result: Result, temperature: float) -> list[dict]:
    """The segments of verbose_json, one per subtitle cue. no_speech_prob is 0: no part of the model predicts it."""
    found, rows = cues(result.words), []
    starts = [0.0, *(cue[0].start for cue in found[1:]), math.inf]
    for i, cue in enumerate(found):
        text, tokens = join_words(cue), [t for t in result.tokens if starts[i] <= t.start < starts[i + 1]]
        rows.append({"id": i, "seek": 0, "start": cue[0].start, "end": cue[-1].end, "text": text,
                     "tokens": [t.id for t in tokens], "temperature": temperature,
                     "avg_logprob": round(statistics.fmean(map(log_confidence, tokens)), 4) if tokens else 0.0,
                     "no_speech_prob": 0.0,
                     "compression_ratio": round(len(text.encode()) / len(zlib.compress(text.encode())), 4)})
    return rows


def parse_openai_form(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the form -> what openai_response takes beside the result.

    Unknown fields are ignored, as clients made for OpenAI's API send many. Raises Refusal 400.
    """
    form = fields.get("response_format", "json")
    granularities = fields.get("timestamp_granularities[]", ["segment"])
    include = fields.get("include[]", [])
    for name, values, allowed in (("response_format", [form], ("json", "text", "srt", "vtt", "verbose_json")),
                                  ("timestamp_granularities[]", granularities, ("segment", "word")),
                                  ("include[]", include, ("logprobs",))):
        for value in values:
            if value not in allowed:
                raise Refusal(400, "invalid_value", f"{name}: wanted {' or '.join(allowed)}, got {value[:40]!r}", name)
    try:
        temperature = float(fields.get("temperature", "0"))
    except ValueError:
        temperature = math.nan
    if not 0 <= temperature <= 1:
        raise Refusal(400, "invalid_value", "temperature: wanted a number from 0 to 1", "temperature")
    return {"form": form, "granularities": granularities, "temperature": temperature, "logprobs": bool(include),
            "stream": parse_flag("stream", fields.get("stream")), "language": fields.get("language", "")}


def openai_response(result: Result, seconds: float, form: str, granularities: Sequence[str], temperature: float,
                    logprobs: bool, stream: bool, language: str) -> Response:
    """The result as response_format `form`, or (stream) as server-sent events; seconds: of the recording."""
    text = result.text.strip()
    usage = {"type": "duration", "seconds": round(seconds, 3)}
    if stream:
        events = [{"type": "transcript.text.delta", "delta": text},
                  {"type": "transcript.text.done", "text": text, "usage": usage}]
        lines = "".join(f"data: {json.dumps(event, ensure_ascii=False, allow_nan=False)}\n\n" for event in events)
        return Response(200, "text/event-stream; charset=utf-8", lines.encode())
    if form == "json":
        value = {"text": text, "usage": usage}
        if logprobs:
            value["logprobs"] = [{"token": t.token, "bytes": list(t.token.encode()),
                                  "logprob": round(log_confidence(t), 4)} for t in result.tokens]
        return json_response(value)
    if form == "verbose_json":
        value = {"task": "transcribe", "language": language, "duration": round(seconds, 3), "text": text,
                 "usage": usage}
        if "segment" in granularities:
            value["segments"] = segments(result, temperature)
        if "word" in granularities:
            value["words"] = [word_entry(word) for word in result.words]
        return json_response(value)
    content = text + "\n" if form == "text" else subtitles(result.words, form)
    return Response(200, f"text/{'vtt' if form == 'vtt' else 'plain'}; charset=utf-8", content.encode())


# ---- routes ----

GET, POST = "GET, HEAD, OPTIONS", "POST, OPTIONS"       # values of the header Allow
ROUTES = {"/": GET, "/health": GET, "/metrics": GET, "/v1/models": GET, "/v1/models/{id}": GET,
          "/transcribe": POST, "/v1/audio/transcriptions": POST}
MEDIA_TYPES = {"/transcribe": ("application/json", "audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave",
                               "multipart/form-data"),
               "/v1/audio/transcriptions": ("multipart/form-data",)}


def route_of(head: Head) -> str:
    """The key in ROUTES, or "other", as metrics and log name it."""
    name = "/v1/models/{id}" if head.path.startswith("/v1/models/") else head.path
    return name if name in ROUTES else "other"


class Server(Door):
    """What the routes need, and the routes."""

    def __init__(self, system: System, options: argparse.Namespace, log: Callable[[str], None], created: int = 0,
                 slack: int = 0):
        self.system, self.model = system, system.config.model.name
        self.created, self.started = created, time.monotonic()      # checkpoint, seconds since 1970; server, monotonic
        self.page = (Path(__file__).resolve().parent / "page.html").read_text("utf-8")
        self.metrics = Metrics()
        self.batcher = Batcher(lambda feats: recognise(system, feats), options, self.metrics, slack)
        self.key = os.environ.get("ASR_API_KEY", "")                # "" = anybody may
        # One thread each: parsing holds the GIL, and torch keeps a pool of its own for every thread that calls it.
        self.parser, self.large_json_parser = ThreadPoolExecutor(1, "parser"), ThreadPoolExecutor(1, "large JSON")
        super().__init__(options, log)

    def admit(self, head: Head) -> None:
        """Check all that can be checked before the body is read: route, method, key, length, type. Raises Refusal."""
        route = route_of(head)
        allow = ROUTES.get(route)
        if not allow:
            raise Refusal(404, "not_found", f"wanted one of {', '.join(ROUTES)}")
        if head.method not in allow.split(", "):
            raise Refusal(405, "method_not_allowed", f"{route} takes {allow}", headers=[("Allow", allow)])
        if head.method == "OPTIONS" or route in ("/", "/health", "/metrics"):
            return
        scheme, _, given_key = head.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if self.key and not (scheme.lower() == b"bearer" and hmac.compare_digest(self.key.encode(), given_key)):
            raise Refusal(401, "invalid_api_key",
                          "wanted the header 'Authorization: Bearer KEY' with this server's key",
                          headers=[("WWW-Authenticate", "Bearer")])
        if self.draining.is_set():
            raise draining()
        if head.method != "POST":
            return
        limit = int(self.options.max_body_mb * MIB)
        if head.length is None:
            raise Refusal(411, "length_required", "wanted a Content-Length header; chunked bodies are not decoded")
        if media_type(head) not in MEDIA_TYPES[route] or "content-encoding" in head.headers:
            wanted = ", ".join(MEDIA_TYPES[route])
            raise Refusal(415, "unsupported_media_type", f"{route} takes {wanted}, without Content-Encoding")
        if head.length > limit:
            raise Refusal(413, "body_too_large", f"body: {head.length} bytes, at most {limit} are allowed")

    def answer(self, head: Head, body: bytes, gone: Callable[[], bool]) -> Response:
        """A whole, admitted request -> its answer. Raises Refusal or Gone."""
        route = route_of(head)
        if head.method == "OPTIONS":
            return Response(204, "", b"", (("Allow", ROUTES[route]),))
        if route == "/":
            return page_response(self.page)
        if route == "/health":
            return health(self)
        if route == "/metrics":
            return Response(200, "text/plain; version=0.0.4; charset=utf-8", metrics_text(self).encode())
        if route == "/v1/models":
            return json_response({"object": "list", "data": [model_card(self)]})
        if route == "/v1/models/{id}":
            if head.path != f"/v1/models/{self.model}":
                raise Refusal(404, "not_found", f"the one model here is {self.model}", "model")
            return json_response(model_card(self))
        return recognise_route(self, head, body, gone)

    def allowed(self, head: Head) -> str:
        return ROUTES.get(route_of(head), "")

    def note(self, head: Head | None, response: Response, status: int) -> None:
        if head is None:
            self.metrics.add("asr_rejected_total", 'reason="overloaded"')
            return
        route, seconds = route_of(head), time.monotonic() - head.started
        self.metrics.count_request(route, status, seconds)
        self.log(f"{head.id} {route} {status} {seconds * 1e3:.1f} ms{response.note}")


def health(server: Server) -> Response:
    system, ending = server.system, server.draining.is_set()
    about = {"status": "draining" if ending else "ok", "model": server.model, "feature_dim": system.stats.shape[1],
             "sample_rate": system.config.data.sample_rate, "device": str(system.stats.device),
             "uptime": round(time.monotonic() - server.started, 3)}
    return draining().response(beside=about) if ending else json_response(about)


def page_response(page: str) -> Response:
    """The page, whose scripts and styles carry a nonce; it loads nothing else from anywhere."""
    nonce = uuid.uuid4().hex
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
              "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    headers = (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))
    return Response(200, "text/html; charset=utf-8", page.replace("NONCE", nonce).encode(), headers)


def model_card(server: Server) -> dict:
    return {"id": server.model, "object": "model", "created": server.created, "owned_by": "local"}


def enqueue(server: Server, head: Head, body: bytes, complete: float,
            gone: Callable[[], bool]) -> tuple[Ask, dict[str, Any], list[list[Job]]]:
    """Parse a body and queue its jobs, on a parser thread -> its Ask; the options for `entry` or openai_response;
    per utterance, a job for each piece (one without frames is not queued, as its outcome is known).

    complete: monotonic seconds at which the whole request had arrived; its deadline counts from there.
    Raises Refusal, or Gone if the client left before its turn.
    """
    if gone():
        raise Gone
    ask = read_ask(head, body, server.system, server.options)
    fields, now = ask.fields, time.monotonic()
    if head.path == "/transcribe":
        chosen = {"alignment": parse_flag("alignment", fields.get("alignment"))}
    else:
        chosen = parse_openai_form(fields)
    deadline = complete + parse_timeout(fields.get("timeout"), server.options.request_timeout)
    jobs = [[Job(feats, utterance, now, deadline, gone) for _, feats in utterance.pieces]
            for utterance in ask.utterances]
    for job in itertools.chain(*jobs):
        if not len(job.feats):
            job.outcome.set_result(Recognition(Result("", 0.0, [], []), []))
    server.batcher.submit([job for job in itertools.chain(*jobs) if len(job.feats)])
    return ask, chosen, jobs


def frame_step(system: System) -> float:
    """Seconds from one firing weight to the next."""
    return frame_sec(system.config.data) * system.config.model.encoder.subsampling


def join_pieces(system: System, utterance: Utterance, found: Sequence[Recognition]) -> Recognition:
    """An utterance's Recognition of those of its pieces, times from its start; weights between pieces are 0."""
    starts, weights = [start for start, _ in utterance.pieces], []
    for start, piece in zip(starts, found):
        place = round(start / frame_step(system))
        weights += [0.0] * (place - len(weights)) + piece.weights
    parts = [(start, x.result) for start, x in zip(starts, found)]
    joined = decode.join_results(system, parts) if len(parts) > 1 else found[0].result
    return Recognition(decode.clip_times(system, joined, utterance.seconds), weights)


def recognise_route(server: Server, head: Head, body: bytes, gone: Callable[[], bool]) -> Response:
    """POST /transcribe and /v1/audio/transcriptions, which differ in their options and in the form of the answer."""
    large = len(body) >= INTERRUPTIBLE and media_type(head) == "application/json"
    parser = server.large_json_parser if large else server.parser
    try:
        with server.batcher.preparing():
            parsing = parser.submit(enqueue, server, head, body, time.monotonic(), gone)
            ask, chosen, jobs = parsing.result(server.options.request_timeout)
        recognised = [[job.outcome.result(max(0.0, job.deadline - time.monotonic())) for job in each] for each in jobs]
    except TimeoutError:
        parsing.cancel()        # has no effect once it has begun
        raise deadline_passed() from None
    found = [join_pieces(server.system, *each) for each in zip(ask.utterances, recognised)]
    server.metrics.add("asr_audio_seconds_total", amount=sum(utterance.seconds for utterance in ask.utterances))
    server.metrics.add("asr_tokens_total", amount=sum(len(recognition.result.tokens) for recognition in found))
    if head.path == "/transcribe":
        total_ms = (time.monotonic() - head.started) * 1e3
        results = [entry(server.system, *each, total_ms, **chosen) for each in zip(ask.utterances, jobs, found)]
        answered = {"results": results} if ask.many else results[0]
        response = json_response({"id": head.id, "model": server.model, **answered})
    else:
        response = openai_response(found[0].result, ask.utterances[0].seconds, **chosen)
    return response._replace(note=f" batch {jobs[0][0].batch_size}")


def entry(system: System, utterance: Utterance, jobs: Sequence[Job], found: Recognition, total_ms: float,
          alignment: bool) -> dict:
    """The answer for one utterance. alignment adds the firing weights, one every `step` seconds, for pictures."""
    queued, batches = jobs[0].queued, {job.taken: job.infer_sec for job in jobs}  # pieces may share a batch
    timing = {"queue_ms": round((min(batches) - queued) * 1e3, 2), "infer_ms": round(sum(batches.values()) * 1e3, 2),
              "total_ms": round(total_ms, 2), "batch_size": max(job.batch_size for job in jobs)}
    tokens = [token._asdict() for token in found.result.tokens]
    value = {"text": found.result.text, "confidence": found.result.confidence, "tokens": tokens,
             "frames": sum(len(feats) for _, feats in utterance.pieces), "duration": round(utterance.seconds, 3),
             "timing": timing}
    if alignment:
        weights = [round(weight, 4) for weight in found.weights]
        value["alignment"] = {"step": round(frame_step(system), 4), "weights": weights}
    return value


# ---- metrics and log ----

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
HISTOGRAMS = {"asr_request_duration_seconds": SECONDS, "asr_queue_seconds": SECONDS, "asr_inference_seconds": SECONDS,
              "asr_batch_size": (1, 2, 4, 8, 12, 16, 24, 32, 64)}
HELP = {"asr_requests_total": "answers by route and status; 499: the client left",
        "asr_request_duration_seconds": "from the end of a request's header to its answer",
        "asr_queue_seconds": "from the queue to the model", "asr_inference_seconds": "of one forward pass",
        "asr_batch_size": "utterances in one forward pass", "asr_audio_seconds_total": "seconds of speech recognised",
        "asr_tokens_total": "tokens recognised", "asr_rejected_total": "refused for load, time or shutdown",
        "asr_batch_padding_ratio": "share of padding in all frames run so far",
        "asr_queue_depth": "utterances that wait", "asr_inflight_requests": "complete requests without an answer",
        "asr_connections": "open connections",
        "process_resident_memory_bytes": "memory", "process_start_time_seconds": "since 1970"}
REASONS = {429: "queue_full", 503: "draining", 504: "deadline_exceeded", 408: "request_timeout", 413: "too_large"}


def sample(name: str, labels: str, value: str) -> str:
    """A line of Prometheus' text format; labels: 'a="1",b="2"', or "" for none."""
    return f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


class Metrics:
    """Counters and histograms, by name and labels, under one lock that is never held for long."""

    def __init__(self):
        self.lock = threading.Lock()
        self.sums: dict[str, dict[str, float]] = {name: {} for name in HELP}
        self.sums["asr_audio_seconds_total"][""] = self.sums["asr_tokens_total"][""] = 0
        # each list: a count per bucket, the count above the last bound, the sum of the values
        self.histograms: dict[str, dict[str, list[float]]] = {name: {} for name in HISTOGRAMS}

    def add(self, name: str, labels: str = "", amount: float = 1) -> None:
        with self.lock:
            self.sums[name][labels] = self.sums[name].get(labels, 0) + amount

    def observe(self, name: str, value: float, labels: str = "") -> None:
        bounds = HISTOGRAMS[name]
        with self.lock:
            row = self.histograms[name].setdefault(labels, [0] * (len(bounds) + 2))
            row[sum(bound < value for bound in bounds)] += 1
            row[-1] += value

    def count_request(self, route: str, status: int, seconds: float) -> None:
        self.add("asr_requests_total", f'route="{route}",status="{status}"')
        self.observe("asr_request_duration_seconds", seconds, f'route="{route}"')
        if status in REASONS:
            self.add("asr_rejected_total", f'reason="{REASONS[status]}"')

    def text(self, gauges: dict[str, float]) -> str:
        """Everything in Prometheus' text format 0.0.4."""
        lines = []
        with self.lock:
            for name, meaning in HELP.items():
                kind = "histogram" if name in HISTOGRAMS else "gauge" if name in gauges else "counter"
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
                sums = {"": gauges[name]} if name in gauges else self.sums[name]
                lines += [sample(name, labels, f"{value:.17g}") for labels, value in sums.items()]
                for labels, row in self.histograms.get(name, {}).items():
                    totals = np.cumsum(row[:-1])
                    lines += [sample(f"{name}_bucket", labels + "," * bool(labels) + f'le="{bound}"', f"{total:.0f}")
                              for bound, total in zip((*HISTOGRAMS[name], "+Inf"), totals)]
                    lines += [sample(f"{name}_sum", labels, f"{row[-1]:.10g}"),
                              sample(f"{name}_count", labels, f"{totals[-1]:.0f}")]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Memory of this process in bytes; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0


def metrics_text(server: Server) -> str:
    phases, batcher = list(server.phases.values()), server.batcher
    return server.metrics.text({
        "asr_batch_padding_ratio": batcher.padding / max(1, batcher.padded),
        "asr_queue_depth": num_utterances(batcher.waiting), "asr_inflight_requests": phases.count("busy"),
        "asr_connections": len(phases), "process_resident_memory_bytes": resident_bytes(),
        "process_start_time_seconds": time.time() - (time.monotonic() - server.started)})


def start_log() -> Callable[[str], None]:
    """A function whose own thread writes each line to standard error; above 1000 unwritten ones lines are dropped."""
    lines: queue.Queue[str] = queue.Queue(1000)

    def write() -> None:
        while True:
            print(lines.get(), file=sys.stderr, flush=True)

    def log(line: str) -> None:
        with contextlib.suppress(queue.Full):
            lines.put_nowait(line)

    threading.Thread(target=write, daemon=True, name="log").start()
    return log


# ---- the command line ----

def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve recognition over HTTP. The environment variable ASR_API_KEY, "
                                     "if set, is a key that clients must send.")
    add = parser.add_argument
    add("--checkpoint", "--ckpt", default=decode.DEFAULT_CHECKPOINT, help=f"default: {decode.DEFAULT_CHECKPOINT}")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 = any free one (default 8000)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", default="float32", choices=list(PRECISIONS), help="of matrix products (default float32)")
    add("--prepack", action="store_true", help="lay the weights out for a CPU's matrix products, as decode.py does")
    add("--threads", type=int, default=0, help="threads of torch; 0 = its own choice, one less for a small model")
    numbers = {"max-batch-size": (16, "utterances in a batch"),
               "max-wait-ms": (5.0, "ms to wait for the next of them, 8 times that in all"),
               "max-batch-frames": (20000, "padded frames in a batch"),
               "max-queue": (128, "utterances that may wait"),
               "request-timeout": (30.0, "s from a complete request to its answer"),
               "header-timeout": (10.0, "s for the header"),
               "body-timeout": (30.0, "s for the body"), "write-timeout": (15.0, "s for the answer"),
               "idle-timeout": (15.0, "s between requests"), "drain-timeout": (20.0, "s to finish after SIGTERM"),
               "max-body-mb": (25.0, "MiB of a request"), "max-audio-seconds": (60.0, "s of a recording"),
               "max-frames": (6000, "rows of features"), "max-connections": (256, "open connections")}
    for name, (default, meaning) in numbers.items():
        add(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default:g})")
    add("--cors-origin", action="append", default=[], metavar="URL", help="let pages of this origin call; repeatable")
    add("--benchmark", action="store_true", help="measure a server of this checkpoint on a free port and stop")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    if arguments.prepack and arguments.dtype != "float32":
        parser.error(f"--prepack is for --dtype float32, got {arguments.dtype}")
    for name in ("threads", *numbers):
        least = 0 if name in ("threads", "max-wait-ms") else 1e-3
        if not least <= getattr(arguments, name.replace("-", "_")) < math.inf:
            parser.error(f"--{name} must be {'0 or more' if not least else 'above 0'}")
    return arguments


def start(server: Server) -> Server:
    """Start the inference thread and the one that accepts connections."""
    threading.Thread(target=server.batcher.run, daemon=True, name="inference").start()
    threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True, name="accept").start()
    return server


def drain(server: Server, timeout: float) -> None:
    """Refuse new requests, answer those that came whole, cut the others after CUT_SEC; takes `timeout` s at most."""
    started = time.monotonic()
    server.draining.set()
    for phases, seconds in ((["idle"], min(CUT_SEC, 0.3 * timeout)),
                          (["idle", "reading"], max(0.5 * timeout, timeout - 1.0))):
        server.cut(phases)
        while server.phases and time.monotonic() < started + seconds:
            time.sleep(0.01)
    with server.batcher.changed:
        late, server.batcher.waiting = server.batcher.waiting, []
    for job in late:
        job.outcome.set_exception(draining())
    time.sleep(0.2 if late else 0.0)        # for their answers
    server.shutdown()
    server.server_close()


def pass_worth(system: System) -> int:
    """How many frames of padding cost as much as another pass through the model, measured: many for a small model.

    Measured on zeros; a transformer's time includes the decoding steps of tokens it imagines there.
    """
    def seconds(frames: int) -> float:
        feats = torch.zeros(frames, system.stats.shape[1])
        return min(repeat(lambda: recognise(system, [feats]), number=1, repeat=10))

    fixed, longer = seconds(1), seconds(401)
    return min(1000, int(400 * fixed / max(longer - fixed, 1e-6)))        # 401 frames say little about thousands


def tune(system: System, options: argparse.Namespace) -> int:
    """Set torch's threads (with --threads 0, a small model leaves one core to the parsers) -> slack of choose_batch.

    Runs the model, so that the first client does not wait for torch.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    short = torch.zeros(50, system.stats.shape[1])
    recognise(system, [short])
    slow = timeit(lambda: recognise(system, [short]), number=1) > 0.1       # a large model: slack 0, unmeasured
    slack = 0 if slow else pass_worth(system)
    if not options.threads and slack > 100:         # frames: then a pass takes no longer than parsing does
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        slack = pass_worth(system)
    return slack


def bound_memory() -> None:
    """Keep memory flat over thousands of requests. Before torch's first forward pass, and on Linux only.

    By default oneDNN caches 1024 compiled kernels, some for each batch shape, and glibc opens a heap for new threads.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-8, 2)         # M_ARENA_MAX


def run(options: argparse.Namespace) -> NoReturn:
    bound_memory()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sys.setswitchinterval(0.0002)       # default 5 ms: while bodies are parsed, inference waits less for the GIL
    system = load_system(options.checkpoint, options.device, options.dtype, options.prepack)
    slack, created = tune(system, options), int(Path(options.checkpoint).stat().st_mtime)
    try:
        server = start(Server(system, options, start_log(), created, slack))
    except OSError as error:
        raise ValueError(f"--host {options.host} --port {options.port}: {error.strerror}; "
                         "--port 0 takes a free port") from None
    host, port = server.server_address[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"listening on http://{shown}:{port} ({server.model}, {options.checkpoint}, {system.stats.device})",
          file=sys.stderr, flush=True)
    stop.wait()
    drain(server, options.drain_timeout)
    os._exit(0)         # a normal exit would wait for the parsers, and abort if a thread is still inside torch


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    try:
        return benchmark(options) if options.benchmark else run(options)
    except (ValueError, OSError, OverflowError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2


# ---- benchmark ----

@contextlib.contextmanager
def running(options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """A server in a process of its own -> its port, and the seconds from its start until it listened."""
    started = time.perf_counter()
    names = ("checkpoint", "device", "threads", "dtype", "max_batch_size", "max_wait_ms", "max_batch_frames")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, "--port=0", *given, *["--prepack"] * options.prepack]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "ASR_API_KEY": ""})
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


def time_clients(port: int, bodies: Sequence[bytes], clients: int) -> tuple[float, list[tuple[float, dict]]]:
    """Send bodies over `clients` kept connections -> seconds in all, and (ms, the answer's timing) of each body."""
    def work(mine: Sequence[bytes]) -> list[tuple[float, dict]]:
        connection, found = http.client.HTTPConnection("127.0.0.1", port), []
        for body in mine:
            started = time.perf_counter()
            connection.request("POST", "/transcribe", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            answered, spent = reply.read(), (time.perf_counter() - started) * 1e3
            if reply.status != 200:
                raise ValueError(f"wanted 200, got {reply.status} {answered[:200]!r}")
            found.append((spent, json.loads(answered)["timing"]))
        connection.close()
        return found

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [one for each in pool.map(work, [bodies[i::clients] for i in range(clients)]) for one in each]
    return time.perf_counter() - started, found


ASK_HEALTH = """
import http.client, sys, time
connection, times = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), []
for _ in range(200):
    started = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    times.append(1e3 * (time.perf_counter() - started))
    time.sleep(0.02)
print(*times)
"""
ROUNDS_SEC = 15     # no round of a benchmark starts later; a large model's first takes longer and is its only one


def benchmark(options: argparse.Namespace) -> int:
    """Print the figures that a server of this checkpoint reaches, client and server on this machine."""
    system = load_system(options.checkpoint, options.device, options.dtype, options.prepack)
    tune(system, options)
    mean, rng = system.stats[0].cpu().numpy(), np.random.default_rng(0)

    def body(frames: int) -> bytes:
        feats = mean + rng.standard_normal((frames, len(mean)))
        return json.dumps({"features": feats.round(4).tolist()}).encode()

    bodies = {"mixed": [body(n) for n in rng.integers(10, 261, 160)], "equal": [body(100) for _ in range(160)]}
    largest = [torch.randn(260, len(mean)) for _ in range(options.max_batch_size)]
    importing = min(repeat(lambda: subprocess.run([sys.executable, "-c", "import torch"]), number=1, repeat=3))
    rounds: dict[tuple[str, int], list] = {(kind, clients): [] for kind in bodies for clients in (1, 16)}
    batches: list[float] = []
    with running(options) as (port, ready):
        time_clients(port, bodies["mixed"][:32], 4)
        until = time.monotonic() + ROUNDS_SEC
        while not batches or time.monotonic() < until:      # kinds in turn, as the machine's speed drifts
            batches.append(timeit(lambda: recognise(system, largest), number=1))
            for (kind, clients), found in rounds.items():
                found.append(time_clients(port, bodies[kind], clients))
        asker = subprocess.Popen([sys.executable, "-c", ASK_HEALTH, str(port)], stdout=subprocess.PIPE, text=True)
        while asker.poll() is None:
            time_clients(port, bodies["mixed"], 16)
    health = sorted(map(float, asker.stdout.read().split())) or [math.nan]      # nan: it failed, and has said why
    overhead = statistics.median(ms - timing["infer_ms"] for _, found in rounds["equal", 1] for ms, timing in found)
    crowd = sorted(ms for _, found in rounds["mixed", 16] for ms, _ in found)
    p99, full = crowd[int(0.99 * len(crowd))], 1e3 * statistics.median(batches)
    print(f"start to ready beyond import torch     {ready - importing:8.2f} s     (asked for: at most 1)")
    print(f"overhead of a request, median          {overhead:8.2f} ms    (at most 3; 100 frames, JSON)")
    for kind, asked in (("mixed", 1.3), ("equal", 2.0)):
        one, many = (160 / statistics.median(seconds for seconds, _ in rounds[kind, clients]) for clients in (1, 16))
        print(f"throughput, {kind} lengths, 16 clients  {many:8.1f} /s    {many / one:.2f} x one client (at least "
              f"{asked}; medians of {len(batches)} rounds)")
    print(f"p99 at 16 clients, mixed lengths       {p99:8.1f} ms    {p99 / full:.2f} x a full batch (at most 3)")
    print(f"/health meanwhile, most                {health[-1]:8.1f} ms    {statistics.median(health):.1f} ms in the "
          f"median (at most 50; {len(health)} asked)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
