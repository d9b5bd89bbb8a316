"""Web sockets: the handshake, frames and messages of RFC 6455, for a server.

The file goes from the request that asks for a socket, over bytes of a frame, to `Socket`, which reads and writes whole
messages over a connection that it is given. Every wait has a deadline; nothing that a client sends is kept without
bound. No extension and no compression.

Needs the standard library only and imports nothing of ours, so it can be copied alone. Source: RFC 6455.
"""
import base64
import binascii
import hashlib
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NOT_UTF8, POLICY, TOO_BIG = 1000, 1001, 1002, 1007, 1008, 1009
GONE = 1006                 # never sent
MOST_EMPTY = 1000           # frames a second that carry no data: pings, and empty fragments


class Closed(Exception):
    """The socket is to be closed with this code, or the client has closed it (1005: without a code), or it is GONE."""

    def __init__(self, code: int, reason: str = ""):
        super().__init__(reason)
        self.code = code
        self.reason = reason


def broken(reason: str) -> Closed:
    return Closed(PROTOCOL_ERROR, reason)


# ---- the handshake ----

def words(header: str) -> list[str]:
    """The entries of a header that is a list, in lower case."""
    return [word.strip().lower() for word in header.split(",")]


def is_upgrade(headers: Mapping[str, str]) -> bool:
    """Whether a request, with header names in lower case, asks for a socket."""
    return "websocket" in words(headers.get("upgrade", "")) and "upgrade" in words(headers.get("connection", ""))


def why_no_handshake(headers: Mapping[str, str]) -> str:
    """What is wrong with a request that asks for a socket; "" if nothing is."""
    if headers.get("sec-websocket-version") != "13":
        return f"Sec-WebSocket-Version: wanted 13, got {headers.get('sec-websocket-version', 'none')[:40]}"
    try:
        size = len(base64.b64decode(headers.get("sec-websocket-key", ""), validate=True))
    except (binascii.Error, ValueError):
        size = -1
    return "" if size == 16 else "Sec-WebSocket-Key: wanted 16 bytes in base64"


def is_same_host(origin: str, host: str) -> bool:
    """Whether a page of this origin was loaded from the host, a Host header; a proxy may have another scheme."""
    match = re.fullmatch(r"https?://([^/]+)", origin.strip().lower())
    return match is not None and re.sub(":(80|443)$", "", match[1]) == re.sub(":(80|443)$", "", host.strip().lower())


def handshake(headers: Mapping[str, str], subprotocol: str) -> tuple[tuple[str, str], ...]:
    """The headers of the answer, status 101; the subprotocol is taken where it is offered."""
    key = headers["sec-websocket-key"].encode("latin-1") + GUID
    accept = base64.b64encode(hashlib.sha1(key).digest()).decode()
    answer = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept))
    if subprotocol in words(headers.get("sec-websocket-protocol", "")):
        answer += (("Sec-WebSocket-Protocol", subprotocol),)
    return answer


# ---- frames ----

class Header(NamedTuple):
    is_last: bool       # of its message's frames
    opcode: int
    size: int           # of the payload in bytes
    mask: bytes         # 4 bytes
    length: int         # of the header itself


def parse_header(data: bytes) -> Header | None:
    """The header with which data begins; None if it is not all there. Raises Closed for what no client may send."""
    if len(data) < 2:
        return None
    is_last = bool(data[0] & 0x80)
    opcode = data[0] & 0x0F
    if data[0] & 0x70:
        raise broken("a reserved bit is set, and no extension was agreed on")
    if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        raise broken(f"opcode {opcode} is unknown")
    if not data[1] & 0x80:
        raise broken("frames of a client must be masked")
    size = data[1] & 0x7F
    if opcode >= CLOSE and (size > 125 or not is_last):
        raise broken("control frames have at most 125 bytes and no fragments")
    more = {126: 2, 127: 8}.get(size, 0)
    length = 2 + more + 4
    if len(data) < length:
        return None
    if more:
        size = int.from_bytes(data[2:2 + more], "big")
        if size >= 2 ** 63 or size < (126 if more == 2 else 65536):
            raise broken("the length of a frame is not written in the fewest bytes, or has its first bit set")
    return Header(is_last, opcode, size, bytes(data[length - 4:length]), length)


def unmask(data: bytes, mask: bytes) -> bytes:
    """The payload, each byte of it exclusive or with the mask's: as one long number, which is fast."""
    n = len(data)
    repeated = (mask * (n // 4 + 1))[:n]
    return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(n, "little")


def to_frame(opcode: int, payload: bytes) -> bytes:
    """A whole message as a server sends it: one frame, not masked."""
    n = len(payload)
    if n < 126:
        size = bytes([n])
    elif n < 65536:
        size = b"\x7e" + n.to_bytes(2, "big")
    else:
        size = b"\x7f" + n.to_bytes(8, "big")
    return bytes([0x80 | opcode]) + size + payload


def parse_close(payload: bytes) -> Closed:
    """What a close frame says. Raises Closed if it may not say that."""
    if not payload:
        return Closed(1005)
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not (1000 <= code <= 1014 and code not in (1004, 1005, 1006) or 3000 <= code <= 4999):
        raise broken("a close frame has a code that none may have")
    return Closed(code, to_text(payload[2:]))


def to_text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise Closed(NOT_UTF8, "a text is not UTF-8") from None


# ---- messages ----

class Socket:
    """The messages of one client, of `most` bytes at most.
    connection: `buffer`, what has come; read_some(deadline), more, as web.Connection; take(size); write(data).
    idle_sec: without a frame for so long the client is pinged, for so long again it is closed. frame_sec: for the rest
    of a frame or message that has begun."""

    def __init__(self, connection, most: int, idle_sec: float, frame_sec: float):
        self.connection = connection
        self.most = most
        self.idle_sec = idle_sec
        self.frame_sec = frame_sec
        self.second = 0.0           # that `empty` counts in
        self.empty = 0              # frames without data in it

    def send_text(self, text: str) -> None:
        """Half a surrogate pair, which UTF-8 lacks, goes as \\ud800, which is JSON's own escape."""
        self.connection.write(to_frame(TEXT, text.encode(errors="backslashreplace")))

    def read(self) -> str | bytes:
        """The next message. Pings are answered. Raises Closed, or OSError where the connection breaks."""
        kind = None
        message = bytearray()
        until = None                # when the message that has begun must be whole
        while True:
            header, payload = self.read_frame(self.most - len(message), until)
            if header.opcode >= CLOSE:
                self.control(header.opcode, payload)
                continue
            if (header.opcode == CONTINUATION) != (kind is not None):
                raise broken("a message begins within another one, or goes on without a beginning")
            if kind is None:
                kind = header.opcode
                until = time.monotonic() + self.frame_sec
            if not payload:
                self.count_empty()
            message += payload
            if header.is_last:
                return to_text(message) if kind == TEXT else bytes(message)

    def control(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            raise parse_close(payload)
        self.count_empty()
        if opcode == PING:
            self.connection.write(to_frame(PONG, payload))

    def count_empty(self) -> None:
        now = time.monotonic()
        if now > self.second + 1:
            self.second = now
            self.empty = 0
        self.empty += 1
        if self.empty > MOST_EMPTY:
            raise Closed(POLICY, f"more than {MOST_EMPTY} frames without data in a second")

    def read_frame(self, most: int, until: float | None) -> tuple[Header, bytes]:
        """The next frame and its payload, of at most so many bytes, by `until` (monotonic; None: it may take long)."""
        if until is None and not self.connection.buffer:
            self.wait()
        until = until or time.monotonic() + self.frame_sec
        while (header := parse_header(self.connection.buffer)) is None:
            self.fill(until)
        if header.size > most and header.opcode < CLOSE:
            raise Closed(TOO_BIG, f"a message has more than {self.most} bytes")
        size = header.length + header.size
        while len(self.connection.buffer) < size:
            self.fill(until)
        return header, unmask(self.connection.take(size)[header.length:], header.mask)

    def wait(self) -> None:
        """Until something comes. Who is silent is pinged once, and then closed."""
        try:
            self.fill(time.monotonic() + self.idle_sec)
        except Closed as late:
            if late.code != GOING_AWAY:
                raise
            self.connection.write(to_frame(PING, b""))
            self.fill(time.monotonic() + self.idle_sec)

    def fill(self, until: float) -> None:
        try:
            data = self.connection.read_some(until)
        except TimeoutError:
            raise Closed(GOING_AWAY, "nothing came in time") from None
        if not data:
            raise Closed(GONE, "the connection ended")
        self.connection.buffer += data

    def close(self, why: Closed) -> None:
        """Send a close frame, also as the answer to the client's; the connection is ended by who has it."""
        payload = b"" if why.code == 1005 else why.code.to_bytes(2, "big") + why.reason.encode("ascii", "replace")[:120]
        self.connection.write(to_frame(CLOSE, payload))
