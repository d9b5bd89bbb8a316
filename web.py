"""HTTP/1.1 on a socket: connections with deadlines, requests parsed strictly, forms, error objects.

The file follows a request: what is answered, its connection (one thread each), its head, a body that is a form. Parsers
are functions from bytes to values. What is served is up to a subclass of `Door`. Python's http.server is not used: its
parser has no deadline, no limit on the size of a header, and answers errors in HTML.

Needs the standard library only and imports nothing of ours, so it can be copied alone.
Sources: RFC 9110 and 9112 (HTTP), 2046 and 7578 (forms); the error object of OpenAI's API.
"""
import contextlib
import ipaddress
import json
import re
import select
import socket
import socketserver
import threading
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

MIB = 2 ** 20
MAX_LINE, MAX_HEAD, MAX_HEADERS = 4096 + 16, 65536, 100        # request line and whole head in bytes; header lines
MAX_PARTS, MAX_PART_HEAD = 128, 8192                    # of a form; the header of a part in bytes
MAX_DRAIN, DRAIN_SEC = 64 * MIB, 3.0                    # bytes of a refused body to discard, so that the answer arrives
MAX_CHUNKS, MAX_CHUNK_LINE = 100_000, 256               # of a chunked body; bytes of the line before each
STATUS_START = b"HTTP/1.1 "                             # with which every answer begins
PROBE_MS = 2                                            # to wait for the reset of a client that has gone


class Refusal(Exception):
    """An answer other than 2xx: the error object of OpenAI's API. Messages begin with `param`, the field that is wrong,
    and name what was found and what is allowed."""

    KINDS = {401: "authentication_error", 429: "rate_limit_error"}

    def __init__(self, status: int, code: str, message: str, param: str | None = None,
                 headers: Sequence[tuple[str, str]] = ()):
        super().__init__(f"{param}: {message}" if param else message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = tuple(headers)

    def entry(self) -> dict[str, str | None]:
        """The error object."""
        kind = self.KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": str(self)[:1000], "type": kind, "param": self.param, "code": self.code}

    def response(self, beside: dict[str, Any] | None = None) -> "Response":
        value = {**(beside or {}), "error": self.entry()}
        return json_response(value, self.status, self.headers)._replace(code=self.code)


class ClientLeft(Exception):
    """The client has disconnected: there is nobody to answer."""


class Limits(NamedTuple):
    """What clients may take of a Door; times in seconds."""

    idle_timeout: float             # between requests
    header_timeout: float
    body_timeout: float
    write_timeout: float            # of an answer
    max_body_mb: float              # MiB
    max_connections: int
    cors_origin: Sequence[str]      # origins whose pages may call, as parse_origin gives them

    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * MIB)


class Head(NamedTuple):
    id: str                         # of the request: the client's X-Request-Id if it is safe to echo, else a new one
    started: float                  # monotonic seconds at which the whole head had arrived
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]         # lower-case names
    length: int | None              # Content-Length: bytes of the body
    chunked: bool                   # the body comes in chunks, its length unknown
    close: bool                     # close after the answer: the client asks for it, or the head could not be read
    peer: str = ""                  # address at the other end of the connection


class Response(NamedTuple):
    status: int
    media_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    code: str = ""                  # of an error, for the log
    batch: int = 0                  # utterances that the model worked through together, for the log
    warning: str = ""               # for the log
    then: "Callable[[Connection], None] | None" = None      # of status 101: who has the connection from now on


CLIENT_LEFT = Response(499, "", b"", code="client_left")        # logged, never sent; nginx's code for it


def json_response(value: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    body = text.encode(errors="backslashreplace")       # half a surrogate pair, which UTF-8 lacks: JSON's own \ud800
    return Response(status, "application/json", body, tuple(headers))


def unread_head(peer: str = "") -> Head:
    """A placeholder for a head that could not be read, or was not: its answer needs a request id as well."""
    return Head(uuid.uuid4().hex, time.monotonic(), "", "", {}, {}, None, False, True, peer)


def to_bytes(head: Head, response: Response, close: bool) -> bytes:
    """The answer to `head` as sent: status line, headers and, except to HEAD, the body."""
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}", f"X-Request-Id: {head.id}",
             f"Server: serve.py\r\nDate: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
             "X-Content-Type-Options: nosniff\r\nCache-Control: no-store"]
    if response.status not in (101, 204):
        lines += [f"Content-Type: {response.media_type}", f"Content-Length: {len(response.body)}"]
    lines += [f"{name}: {value}" for name, value in response.headers]
    if close:
        lines.append("Connection: close")
    sent = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return sent if head.method == "HEAD" else sent + response.body


# ---- the connection: the life of a request ----

class Connection(socketserver.BaseRequestHandler):
    """One connection on its own thread. Every wait for the client has an absolute deadline, whatever trickles in.
    server.phases holds its state: idle (between requests), reading (a request has begun), busy (it has come whole)."""

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()       # received and not parsed yet
        self.writing = threading.Lock()
        self.probed = False             # STATUS_START of the answer has been sent, by has_left

    def handle(self) -> None:
        while self.serve_one():
            pass

    def serve_one(self) -> bool:
        """Read a request, admit it, read its body, answer it -> whether the connection stays open for another."""
        head = unread_head(self.client_address[0])
        body = b""
        unread = True
        try:
            block = self.read_head()
            if block is None:
                return False
            head = parse_head(block)._replace(peer=head.peer)
            unread = bool(head.length) or head.chunked
            self.server.admit(head)
            if head.method == "POST":
                body = self.read_body(head)
                unread = False
            self.server.phases[self.request] = "busy"
            response = self.server.answer(head, body, self.has_left)
        except Refusal as refusal:
            response = refusal.response()
        except (ClientLeft, ConnectionError):
            response = CLIENT_LEFT
        except Exception:
            self.server.log("ERROR", "bug", id=head.id, traceback=traceback.format_exc())
            bug = Refusal(500, "internal", "the server failed on this request; its log says more under this request id")
            response = bug.response()
        return self.finish_one(head, response, unread)

    def finish_one(self, head: Head, response: Response, unread: bool) -> bool:
        """Write, count and log the answer -> whether the connection stays open; never with a body left unread."""
        close = head.close or unread or self.server.draining.is_set()
        sent = False
        if response.status != 499:
            cors = cors_headers(head, response, self.server.limits.cors_origin)
            response = response._replace(headers=response.headers + cors)
            answer = to_bytes(head, response, close)
            with contextlib.suppress(OSError), self.writing:    # one write: a second could wait for a delayed ACK
                self.write(answer.removeprefix(STATUS_START) if self.probed else answer)
                self.probed = False
                sent = True
        self.server.count_and_log(head, response if sent else CLIENT_LEFT)
        if sent and response.then:
            response.then(self)
            close = True
        if sent and unread:
            self.read_away(DRAIN_SEC if response.status != 408 else 0.5)     # 408: a client that is slow already
        self.server.phases[self.request] = "idle"
        return sent and not close

    def write(self, data: bytes) -> None:
        self.request.settimeout(self.server.limits.write_timeout)       # of the whole sendall
        self.request.sendall(data)

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
            if self.server.draining.is_set():
                raise shutting_down()
            raise bad_framing(f"the connection ended within {what}")
        return piece

    def read_head(self) -> bytes | None:
        """The request line and header lines, without the empty line that ends them; None if no request begins."""
        begun = False
        deadline = time.monotonic() + self.server.limits.idle_timeout
        while True:
            self.buffer = self.buffer.removeprefix(b"\r\n")     # an empty line before a request is allowed
            if self.buffer and not begun:
                begun = True
                deadline = time.monotonic() + self.server.limits.header_timeout
                self.server.phases[self.request] = "reading"
            end = self.buffer.find(b"\r\n\r\n")
            check_head_size(self.buffer if end < 0 else self.buffer[:end + 2])
            if end >= 0:
                return self.take(end + 4)[:-4]
            try:
                self.buffer += self.receive(deadline, "the header")
            except (Refusal, ConnectionError):
                if begun:
                    raise
                return None         # idle for too long, or gone: no request

    def read_body(self, head: Head) -> bytes:
        deadline = time.monotonic() + self.server.limits.body_timeout
        if not self.buffer and head.headers.get("expect", "").lower() == "100-continue":
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.chunked:
            return self.read_chunks(deadline)
        return self.take(head.length, deadline, f"the body of {head.length} bytes")

    def take(self, size: int, deadline: float = 0.0, what: str = "") -> bytes:
        """The next `size` bytes: those of the buffer, which then begins behind them, and what is received."""
        while len(self.buffer) < size:
            self.buffer += self.receive(deadline, what)
        taken = bytes(memoryview(self.buffer)[:size])
        del self.buffer[:size]
        return taken

    def take_line(self, most: int, deadline: float) -> bytes:
        """A line of at most so many bytes without its CR LF."""
        while (end := self.buffer.find(b"\r\n", 0, most + 2)) < 0:
            if len(self.buffer) >= most + 2:
                raise bad_framing(f"a line of the chunked body is longer than {most} bytes")
            self.buffer += self.receive(deadline, "the chunked body")
        return self.take(end + 2)[:-2]

    def read_chunks(self, deadline: float) -> bytes:
        """A chunked body, decoded; extensions and trailers are discarded. Source: RFC 9112, 7.1."""
        most = self.server.limits.max_body()
        body = bytearray()
        for _ in range(MAX_CHUNKS):
            size = parse_chunk_size(self.take_line(MAX_CHUNK_LINE, deadline))
            if not size:
                self.discard_trailers(deadline)
                return bytes(body)
            if len(body) + size > most:
                raise body_too_large(f"more than {most}", most)
            chunk = self.take(size + 2, deadline, "the chunked body")
            if chunk[-2:] != b"\r\n":
                raise bad_framing("a chunk does not end in CR LF")
            body += memoryview(chunk)[:size]
        raise bad_framing(f"wanted at most {MAX_CHUNKS} chunks")

    def discard_trailers(self, deadline: float) -> None:
        total = 0
        for _ in range(MAX_HEADERS + 1):
            line = self.take_line(MAX_HEAD, deadline)
            if not line:
                return
            total += len(line) + 2
            if total > MAX_HEAD:
                break
        raise Refusal(431, "headers_too_large", f"wanted at most {MAX_HEAD} bytes and {MAX_HEADERS} lines of trailers")

    def read_away(self, seconds: float) -> None:
        """Discard what comes, within bounds: closing with bytes unread sends a TCP reset, and the answer is lost."""
        deadline = time.monotonic() + seconds
        left = MAX_DRAIN
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            while left > 0 and (piece := self.read_some(deadline)):
                left -= len(piece)

    def has_left(self) -> bool:
        """Whether the client is gone: other threads may ask before they work on its request.
        One that has closed its sending side may still read. The two differ in what the first bytes of the answer meet:
        who is gone answers with a reset, within PROBE_MS unless far away."""
        if not self.writing.acquire(blocking=False):
            return True             # it has an answer already: its deadline has passed
        try:
            if not self.poll(select.POLLIN, 0) or self.request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return False
            if not self.probed:
                self.request.send(STATUS_START, socket.MSG_DONTWAIT)
                self.probed = True
            return self.poll(0, PROBE_MS)
        except (OSError, ValueError):
            return True
        finally:
            self.writing.release()

    def poll(self, events: int, timeout_ms: float) -> bool:
        """Whether one of these events comes in time, or the connection is broken."""
        poll = select.poll()
        poll.register(self.request, events)
        return bool(poll.poll(timeout_ms))


class Door(socketserver.ThreadingTCPServer):
    """The open connections. A subclass says what is behind them: admit(head) checks all that can be checked before the
    body is read, and answer(head, body, has_left) makes a Response; both may raise Refusal, `answer` ClientLeft too.
    count_and_log(head, response) takes note of an answer; its status is 499 where it could not be sent, the method ""
    where no request was read."""

    daemon_threads = True               # a stuck connection must not keep the process alive
    allow_reuse_address = True
    request_queue_size = 1024           # listen backlog: a burst waits to be accepted; the default, 5, would reset it

    def __init__(self, host: str, port: int, limits: Limits, log: Callable[..., None]):
        self.limits = limits
        self.log = log
        self.draining = threading.Event()       # set: no connection stays open after its answer
        self.phases: dict[socket.socket, str] = {}                  # by open connection: idle, reading or busy
        self.refused: list[tuple[float, socket.socket]] = []        # (when to close it, connection), oldest first
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Connection)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if len(self.phases) >= self.limits.max_connections:
            self.refuse(request, client_address[0])
            return
        self.phases[request] = "idle"
        super().process_request(request, client_address)

    def refuse(self, request: socket.socket, peer: str) -> None:
        """Answer 503 without a thread, and leave the client a second to read it (service_actions then closes)."""
        message = f"{self.limits.max_connections} connections are open, which is the most"
        response = Refusal(503, "overloaded", message, headers=[("Retry-After", "1")]).response()
        head = unread_head(peer)
        self.count_and_log(head, response)
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(to_bytes(head, response, close=True))
            request.shutdown(socket.SHUT_WR)
        self.refused.append((time.monotonic() + 1.0, request))

    def service_actions(self) -> None:
        while self.refused and (self.refused[0][0] < time.monotonic() or len(self.refused) > 256):
            self.refused.pop(0)[1].close()

    def shutdown_request(self, request: socket.socket) -> None:
        self.phases.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        self.log("ERROR", "bug", client=client_address[0], traceback=traceback.format_exc())

    def cut(self, phases: Sequence[str], until: float) -> None:
        """End the connections in these phases (their reads return b"" from now on) and wait, until monotonic seconds
        at most, for all to close."""
        for request, phase in list(self.phases.items()):
            if phase in phases:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)
        while self.phases and time.monotonic() < until:
            time.sleep(0.01)


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
    Source: RFC 9112. The one Transfer-Encoding is chunked, in HTTP/1.1 and without Content-Length."""
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
        name = match[1].decode().lower()
        value = match[2].decode("latin-1").strip(" \t")
        if name in headers and name in ("content-length", "transfer-encoding", "host", "content-type", "authorization"):
            raise bad_framing(f"header {name} stands twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if version == "HTTP/1.1" and "host" not in headers:
        raise bad_framing("HTTP/1.1 needs a Host header")
    if version == "HTTP/1.0":
        headers.pop("expect", None)     # to be ignored: HTTP/1.0 has no 100 Continue (RFC 9110, 10.1.1)
    encoding = headers.get("transfer-encoding", "chunked").lower()
    if encoding != "chunked" or version == "HTTP/1.0" and "transfer-encoding" in headers:
        raise bad_framing("Transfer-Encoding must be chunked, in HTTP/1.1")
    path, query = parse_target(target)
    close = version == "HTTP/1.0" or "close" in re.split(r"[ \t,]+", headers.get("connection", "").lower())
    client_id = headers.get("x-request-id", "")
    request_id = client_id if re.fullmatch("[A-Za-z0-9._-]{1,64}", client_id) else uuid.uuid4().hex
    return Head(request_id, time.monotonic(), method, path, query, headers, parse_length(headers),
                "transfer-encoding" in headers, close)


def parse_length(headers: dict[str, str]) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not re.fullmatch("[0-9]+", text):
        raise bad_framing("Content-Length must be one number in digits")
    if "transfer-encoding" in headers:
        raise bad_framing("Content-Length and Transfer-Encoding exclude each other")
    digits = text.lstrip("0") or "0"
    return int(digits[:19])         # 19 exceed any limit; int() raises on 4301


def parse_chunk_size(line: bytes) -> int:
    """The line before a chunk: its size in hex; an extension behind a semicolon is discarded. Raises Refusal."""
    match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?", line)
    if not match:
        raise bad_framing("the size of a chunk must be 1 to 8 hexadecimal digits")
    return int(match[1], 16)


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


def body_too_large(got: int | str, most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"body: {got} bytes, at most {most} are allowed")


def shutting_down() -> Refusal:
    return Refusal(503, "draining", "the server is shutting down", headers=[("Retry-After", "5")])


def parse_origin(text: str) -> str:
    """An origin as browsers send it, or "*" for any, whatever its capitals and slash at the end. Raises ValueError."""
    text = text.strip().lower().removesuffix("/")
    if text == "*":
        return text
    match = re.fullmatch(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::([0-9]{1,5}))?", text)
    if not match:
        raise ValueError(f"wanted an origin like https://example.org or http://localhost:3000, or *, got {text!r}")
    scheme, host, port = match.groups()
    usual = {"http": "80", "https": "443"}[scheme]
    return f"{scheme}://{host}" if port in (None, usual) else f"{scheme}://{host}:{port}"


def cors_headers(head: Head, response: Response, origins: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """CORS headers for pages of these origins; none without any. The answer to OPTIONS has the methods in Allow."""
    if not origins:
        return ()
    found = [("Vary", "Origin")]
    origin = head.headers.get("origin")
    if origin is not None and ("*" in origins or origin in origins):
        found += [("Access-Control-Allow-Origin", "*" if "*" in origins else origin),
                  ("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")]
        if head.method == "OPTIONS":
            found += [("Access-Control-Allow-Methods", dict(response.headers).get("Allow", "")),
                      ("Access-Control-Max-Age", "600"),
                      ("Access-Control-Allow-Headers", head.headers.get("access-control-request-headers", ""))]
    return tuple(found)


def client_address(head: Head, trusted: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> str:
    """Who asks: the peer, or, where that is a trusted proxy, the last address of X-Forwarded-For that is none."""
    found = head.peer.removeprefix("::ffff:")       # IPv4 at a socket of IPv6
    for name in reversed(head.headers.get("x-forwarded-for", "").split(",")):
        try:
            if not any(ipaddress.ip_address(found) in network for network in trusted):
                break
            found = str(ipaddress.ip_address(name.strip()))
        except ValueError:          # no address
            break
    return found


# ---- forms ----

DISPOSITION = re.compile(r"^content-disposition[ \t]*:[ \t]*form-data[ \t]*(;.*)$", re.IGNORECASE | re.MULTILINE)
PARAMETER = re.compile(r';\s*([\w*]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')        # name, quoted or bare value


def bad_form(message: str) -> Refusal:
    return Refusal(400, "invalid_multipart", f"multipart: {message}")


def parse_multipart(body: bytes, content_type: str) -> list[tuple[str, str | None, bytes]]:
    """A form -> (name, name of the file or None where it is none, content) of each part. Raises Refusal 400.
    The body is split as bytes, whatever is in it. Source: RFC 2046, 7578."""
    match = re.search(r';\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))\s*(?:;|$)', content_type, re.IGNORECASE)
    if not match:
        raise bad_form("wanted a boundary of 1 to 70 characters in Content-Type")
    delimiter = b"\r\n--" + (match[1] or match[2]).encode("latin-1")
    parts = []
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
        parts.append((values["name"], values.get("filename", values.get("filename*")), content))
    raise bad_form(f"wanted at most {MAX_PARTS} parts and the closing boundary, as in Content-Type, got {len(parts)} "
                   "parts and no closing one")


def parse_form(body: bytes, content_type: str) -> tuple[str, bytes, dict[str, list[str]]]:
    """A form with one part "file" -> the name of the file, its content, and the texts of each field. x, x[] and x[0]
    are one field: clients differ in how they write a list. Files under other names are ignored. Raises Refusal 400."""
    files = []
    fields: dict[str, list[str]] = {}
    for name, file_name, content in parse_multipart(body, content_type):
        if file_name is not None:
            if name == "file":
                files.append((file_name, content))
            continue
        if name == "file":
            raise Refusal(400, "missing_file", "came as text, wanted a file (with curl: -F file=@NAME)", "file")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise bad_form("a field is not UTF-8") from None
        fields.setdefault(re.sub(r"\[[0-9]*\]$", "", name), []).append(text)
    if len(files) != 1:
        raise Refusal(400, "missing_file", f"wanted one part with that name and a file, got {len(files)}", "file")
    return *files[0], fields


def parse_flag(name: str, value: Any) -> bool:
    """A JSON boolean, or true, false, 1 or 0 as text in any case; None and "" are false. Raises Refusal 400."""
    text = "" if value is None else str(value).lower()
    if text not in ("true", "1", "false", "0", ""):
        raise Refusal(400, "invalid_value", "wanted true or false", name)
    return text in ("true", "1")
