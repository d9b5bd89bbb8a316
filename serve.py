"""Serve recognition over HTTP: python serve.py --checkpoint runs/latest/checkpoints/best.pt --port 8000

    curl -H "Content-Type: application/json" -d '{"features": [[0.1, ...], ...]}' http://localhost:8000/transcribe
    curl -H "Content-Type: audio/wav" --data-binary @a.wav http://localhost:8000/transcribe?alignment=true
    curl -F file=@a.wav -F response_format=srt http://localhost:8000/v1/audio/transcriptions     (OpenAI's)
    http://localhost:8000          a page to drop recordings on        /health  /ready  /metrics  /v1/models

Here are the routes and the command line. What a POST asks for is done in transcribe.py, how requests arrive is in
web.py, how they wait and are batched in batcher.py, OpenAI's answers in openai_forms.py; the page is page.html.
Needs torch 2.10 or later; serve your own checkpoints only.
"""
import argparse
import contextlib
import ctypes
import errno
import hmac
import ipaddress
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from commandline import Parser, path_text, refuse, spin_briefly

if __name__ == "__main__":      # before torch is loaded, which takes seconds
    # Until catch_signals: process 1 of a container gets only the signals that it has a handler for.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
    spin_briefly()

import torch

import decode
from batcher import Batcher, num_utterances
from checkpoint import check_not_streaming, load_system
from decode_options import DEFAULT_CHECKPOINT, add_parts
from listen import asked_chunk
from monitor import Log, Metrics, log_line, resident_bytes
from sessions import hold
from settings import Models
from sockets import handshake, is_same_host, is_upgrade, why_no_handshake
from streaming import feed, start as start_stream
from streams import hear_steps
from transcribe import recognise_batch, recognise_jobs, refuse_toy, trained_on, transcribe
from web import (Door, Head, Limits, Refusal, Response, body_too_large, client_address, json_response,
                 media_type, parse_origin, shutting_down)

CUT_SEC = 2.0                                           # for requests that are still being sent at SIGTERM


# ---- routes ----

GET, POST = "GET, HEAD, OPTIONS", "POST, OPTIONS"       # values of the header Allow
ROUTES = {"/": GET, "/ws": GET, "/health": GET, "/ready": GET, "/metrics": GET, "/v1/models": GET,
          "/v1/models/{id}": GET, "/transcribe": POST, "/v1/audio/transcriptions": POST}
OPEN = ("/", "/health", "/ready", "/metrics")           # without a key, and while draining
MEDIA_TYPES = {"/transcribe": ("application/json", "audio/*", "video/webm", "video/mp4", "multipart/form-data"),
               "/v1/audio/transcriptions": ("multipart/form-data",)}


def route_of(head: Head) -> str:
    """The key in ROUTES, or "other", as metrics and log name it."""
    name = "/v1/models/{id}" if head.path.startswith("/v1/models/") else head.path
    return name if name in ROUTES else "other"


def is_taken(kind: str, route: str) -> bool:
    """Whether a POST to the route may have a body of this media type."""
    return kind in MEDIA_TYPES[route] or f"{kind.partition('/')[0]}/*" in MEDIA_TYPES[route]


def asks_for_socket(head: Head) -> bool:
    return head.method == "GET" and head.path in ("/", "/ws") and is_upgrade(head.headers)


class Server(Door):
    """What the routes need, and the routes. It listens at once; `open` gives it what it recognises with."""

    def __init__(self, options: argparse.Namespace, log: Callable[..., None]):
        self.options = options
        self.loaded = threading.Event()
        self.models: Models | None = None               # until loaded
        self.created = 0                                # the checkpoint, seconds since 1970
        self.started = time.monotonic()
        page = (Path(__file__).resolve().parent / "page.html").read_text("utf-8")
        self.page = page.replace("LONGEST", f"{options.max_audio_seconds:g}")
        self.metrics = Metrics()
        self.batcher = Batcher(lambda jobs: recognise_jobs(self.models.whole, jobs), options, self.metrics,
                               lambda steps: hear_steps(self.models, steps))
        self.key = read_key()                           # "" = anybody may
        self.conversions = threading.Semaphore(os.cpu_count() or 1)     # each by a process of ffmpeg
        # One thread each: parsing holds the GIL, and torch keeps a pool of its own for every thread that calls it.
        self.parser = ThreadPoolExecutor(1, "parser")
        self.large_json_parser = ThreadPoolExecutor(1, "large JSON")
        limits = Limits(*(getattr(options, name) for name in Limits._fields))
        super().__init__(options.host, options.port, limits, log)

    def open(self, models: Models, created: int = 0) -> None:
        self.models = models
        self.created = created
        self.loaded.set()

    def wait_loaded(self) -> None:
        """Who comes early waits. Raises Refusal 503."""
        if not self.loaded.wait(self.options.request_timeout):
            raise loading()

    def admit(self, head: Head) -> None:
        """Check all that can be checked before the body is read: route, method, key, length, type. Raises Refusal."""
        route = route_of(head)
        allow = ROUTES.get(route)
        if not allow:
            raise Refusal(404, "not_found", f"wanted one of {', '.join(ROUTES)}")
        if head.method not in allow.split(", "):
            raise Refusal(405, "method_not_allowed", f"{route} takes {allow}", headers=[("Allow", allow)])
        if asks_for_socket(head):
            check_handshake(head, self.limits.cors_origin)
        elif head.method == "OPTIONS" or route in OPEN:
            return
        self.check_key(head)
        if self.draining.is_set():
            raise shutting_down()
        if head.method == "POST":
            check_body(head, route, self.limits.max_body())

    def check_key(self, head: Head) -> None:
        scheme, _, key = head.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if asks_for_socket(head) and "key" in head.query:       # a browser sends no headers with one
            scheme, key = b"bearer", head.query["key"].encode()
        if self.key and not (scheme.lower() == b"bearer" and hmac.compare_digest(self.key.encode(), key)):
            raise Refusal(401, "invalid_api_key",
                          "wanted the header 'Authorization: Bearer KEY' with this server's key",
                          headers=[("WWW-Authenticate", "Bearer")])

    def answer(self, head: Head, body: bytes, has_left: Callable[[], bool]) -> Response:
        """A whole, admitted request -> its answer. Raises Refusal or ClientLeft."""
        route = route_of(head)
        if head.method == "OPTIONS":
            return Response(204, "", b"", (("Allow", ROUTES[route]),))
        if asks_for_socket(head):
            return socket_response(self, head)
        if route == "/ws":
            raise Refusal(426, "upgrade_required", "wanted a web socket", headers=[("Upgrade", "websocket")])
        if route == "/":
            return page_response(self.page)
        if route == "/health":
            return health(self)
        if route == "/ready":
            return ready(self)
        if route == "/metrics":
            return Response(200, "text/plain; version=0.0.4; charset=utf-8", metrics_text(self).encode())
        self.wait_loaded()
        if route in ("/v1/models", "/v1/models/{id}"):
            return models_response(self, head.path.removeprefix("/v1/models").removeprefix("/"))
        return transcribe(self, head, body, has_left)

    def count_and_log(self, head: Head, response: Response) -> None:
        seconds = time.monotonic() - head.started
        if response.code == "overloaded":
            self.metrics.add("asr_rejected_total", 'reason="overloaded"')
        else:
            self.metrics.count_request(route_of(head), response.status, response.code, seconds)
        client = client_address(head, self.options.trusted_proxy)
        fields = {"id": head.id, "client": client, "method": head.method or "-", "path": head.path[:200] or "-",
                  "status": response.status, "ms": round(seconds * 1e3, 1)}
        for name, value in (("batch", response.batch), ("error", response.code), ("warning", response.warning)):
            if value:
                fields[name] = value
        level = "ERROR" if response.status >= 500 else "WARNING" if response.status >= 400 else "INFO"
        self.log(level, "request", **fields)


def check_handshake(head: Head, origins: Sequence[str]) -> None:
    """Raises Refusal, also for the page of a site that is not among the origins: browsers ask nobody before."""
    wrong = why_no_handshake(head.headers)
    if head.close or head.length or head.chunked:
        wrong = "wanted HTTP/1.1, without a body and without Connection: close"
    if wrong:
        raise Refusal(400, "bad_handshake", wrong, headers=[("Sec-WebSocket-Version", "13")])
    origin = head.headers.get("origin")
    if origin and not {"*", origin} & set(origins) and not is_same_host(origin, head.headers.get("host", "")):
        raise Refusal(403, "forbidden_origin", f"origin {origin[:200]}: wanted this host, or one of --cors-origin")


def check_body(head: Head, route: str, most: int) -> None:
    """Raises Refusal for a body that the route does not take, or of more than `most` bytes."""
    if head.length is None and not head.chunked:
        raise Refusal(411, "length_required", "wanted a Content-Length header, or Transfer-Encoding: chunked")
    if not is_taken(media_type(head), route) or "content-encoding" in head.headers:
        wanted = ", ".join(MEDIA_TYPES[route])
        raise Refusal(415, "unsupported_media_type", f"{route} takes {wanted}, without Content-Encoding")
    if head.length is not None and head.length > most:
        raise body_too_large(head.length, most)


def read_key() -> str:
    """The key in ASR_API_KEY, "" for none. Raises ValueError for one that no client can send."""
    given = os.environ.get("ASR_API_KEY", "")
    key = given.strip()
    if given and not re.fullmatch("[!-~]+", key):       # the key itself is never shown
        raise ValueError("ASR_API_KEY: wanted ASCII letters, digits and signs, got "
                         + ("a space or another character within" if key else "spaces only"))
    return key


def loading() -> Refusal:
    return Refusal(503, "loading", "the model is being loaded", headers=[("Retry-After", "1")])


def health(server: Server) -> Response:
    """200 from the start, as the process is well; 503 while draining."""
    about = {"status": "ok" if server.loaded.is_set() else "loading", "model": None, "feature_dim": None,
             "sample_rate": None, "device": None, "trained_on": None, "modes": None}     # modes: of the web socket
    if server.loaded.is_set():
        system = server.models.loaded()[0]
        about.update(model=system.config.model.name, feature_dim=system.stats.shape[1],
                     sample_rate=system.config.data.sample_rate, device=str(system.stats.device),
                     trained_on=trained_on(system), modes=server.models.modes())
    about["uptime"] = round(time.monotonic() - server.started, 3)
    if server.draining.is_set():
        return shutting_down().response(beside={**about, "status": "draining"})
    return json_response(about)


def ready(server: Server) -> Response:
    """200 while requests are answered without delay: the model is loaded and warm, and nothing is draining."""
    if server.draining.is_set():
        return shutting_down().response(beside={"status": "draining"})
    if not server.loaded.is_set():
        return loading().response(beside={"status": "loading"})
    return json_response({"status": "ready"})


def page_response(page: str) -> Response:
    """The page, whose scripts and styles carry a nonce; it loads nothing else from anywhere."""
    nonce = uuid.uuid4().hex
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
              "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    headers = (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))
    return Response(200, "text/html; charset=utf-8", page.replace("NONCE", nonce).encode(), headers)


def socket_response(server: Server, head: Head) -> Response:
    """The answer to who asks for a web socket; a session then has the connection. Raises Refusal."""
    server.wait_loaded()
    for system in server.models.loaded():
        refuse_toy(system)
    return Response(101, "", b"", handshake(head.headers, "binary"),
                    then=lambda connection: hold(server, head, connection))


def models_response(server: Server, name: str) -> Response:
    """The model of this name; "": all of them. Raises Refusal 404."""
    cards = {}
    for system in server.models.loaded():
        card = {"id": system.config.model.name, "object": "model", "created": server.created, "owned_by": "local"}
        cards[card["id"]] = card
    if not name:
        return json_response({"object": "list", "data": list(cards.values())})
    if name not in cards:
        raise Refusal(404, "not_found", f"the models here are {', '.join(cards)}", "model")
    return json_response(cards[name])


def metrics_text(server: Server) -> str:
    phases = list(server.phases.values())
    batcher = server.batcher
    return server.metrics.text({
        "asr_batch_padding_ratio": batcher.padding / max(1, batcher.padded),
        "asr_queue_depth": num_utterances(batcher.waiting), "asr_inflight_requests": phases.count("busy"),
        "asr_connections": len(phases), "asr_sockets": phases.count("socket"),
        "process_resident_memory_bytes": resident_bytes(),
        "process_start_time_seconds": time.time() - (time.monotonic() - server.started)})


# ---- the command line ----

NUMBERS = {  # by option: its default, what it is
    "max-batch-size": (16, "utterances in a batch"), "max-batch-frames": (20000, "padded frames in a batch"),
    "max-wait-ms": (5.0, "ms to wait for the next of them, 8 times that in all"),
    "max-queue": (128, "utterances that may wait"),
    "request-timeout": (30.0, "s from a complete request to its answer"), "header-timeout": (10.0, "s for the header"),
    "body-timeout": (30.0, "s for the body"), "write-timeout": (15.0, "s for the answer"),
    "idle-timeout": (15.0, "s between requests"), "drain-timeout": (20.0, "s to finish after SIGTERM"),
    "max-body-mb": (25.0, "MiB of a request"), "max-audio-seconds": (60.0, "s of a recording"),
    "max-frames": (6000, "rows of features"), "max-connections": (256, "open connections")}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Serve recognition over HTTP. The environment variable ASR_API_KEY, if set, is a key "
                    "that clients must send.")
    add = parser.add_argument
    add("--checkpoint", "--ckpt", default=DEFAULT_CHECKPOINT, help=f"default: {DEFAULT_CHECKPOINT}")
    add("--offline-checkpoint", metavar="DIR", type=path_text, help="of whole utterances, beside a streaming one: for "
        "a second pass of web sockets, and for requests")
    add_parts(add)      # of streams, clients may ask for another chunk
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 = any free one (default 8000)")
    add("--threads", type=int, default=0, help="threads of torch; 0 = its own choice")
    for name, (default, meaning) in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default:g})")
    add("--no-ffmpeg", action="store_true", help="take WAV only, also where ffmpeg is installed")
    add("--cors-origin", action="append", default=[], metavar="URL",
        help="let pages of this origin call, as https://example.org, or * for any; repeatable")
    add("--trusted-proxy", action="append", default=[], metavar="ADDRESS",
        help="believe the X-Forwarded-For of this address or network, for the log; repeatable")
    add("--log-format", choices=["text", "json"], default="text", help="of the log on standard error (default text)")
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: Parser, arguments: argparse.Namespace) -> None:
    """End the program where an option could never work; origins and networks become what the server compares with."""
    if arguments.vad_schedule and not arguments.vad:
        parser.error("--vad-schedule needs --vad")
    try:
        arguments.cors_origin = [parse_origin(text) for text in arguments.cors_origin]
    except ValueError as error:
        parser.error(f"--cors-origin: {error}")
    try:
        arguments.trusted_proxy = [ipaddress.ip_network(text, strict=False) for text in arguments.trusted_proxy]
    except ValueError as error:
        parser.error(f"--trusted-proxy: {error}")
    if not arguments.host.strip():
        parser.error("--host: wanted an address, got none; 0.0.0.0 is for all networks")
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    for name in ("threads", *NUMBERS):
        least = 0 if name in ("threads", "max-wait-ms") else 1e-3
        if not least <= getattr(arguments, name.replace("-", "_")) < math.inf:
            parser.error(f"--{name} must be {'above 0' if least else '0 or more'}")


def start(server: Server) -> Server:
    """Start the thread that accepts connections; they wait until `open`."""
    threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True, name="accept").start()
    return server


def drain(server: Server, timeout: float) -> None:
    """Refuse new requests, answer those that came whole, cut the others after CUT_SEC; takes `timeout` s at most."""
    started = time.monotonic()
    server.draining.set()
    server.cut(["idle", "socket"], started + min(CUT_SEC, 0.3 * timeout))
    server.cut(["idle", "reading"], started + max(0.5 * timeout, timeout - 1.0))
    with server.batcher.changed:
        late = [*server.batcher.waiting, *server.batcher.steps]
        server.batcher.waiting = []
        server.batcher.steps = []
    for job in late:
        job.outcome.set_exception(shutting_down())
    if late:
        time.sleep(0.2)         # for their answers
    server.shutdown()
    server.server_close()


def load_warm(options: argparse.Namespace) -> Models:
    """The systems, after one pass on as many threads as are asked for: the first client does not wait for torch.
    Raises ValueError that says which of the options do not go together."""
    if options.threads:
        torch.set_num_threads(options.threads)
    models = load_models(options)
    if models.whole:
        recognise_batch(models.whole, [torch.zeros(50, models.whole.stats.shape[1])])
    if models.streaming:
        samples = torch.zeros(models.rate_hz())
        feed(models.streaming, start_stream(models.streaming, models.streaming.chunk), samples, last=True)
    return models


def load_models(options: argparse.Namespace) -> Models:
    usual = parse_arguments([])
    system = load_system(options.checkpoint, options.device, options.dtype, laid_out=True)
    if system.chunk is None:
        refuse(options, usual, ("offline_checkpoint", "chunk", "look_back"),
               f"wanted a streaming --checkpoint, got a {system.config.model.name}")
        return Models(None, decode.with_parts(options, system))
    system = system._replace(chunk=asked_chunk(options, system.chunk))
    if options.offline_checkpoint is None:
        refuse(options, usual, ("vad", "punctuate"), "is for whole utterances, and wants an --offline-checkpoint "
               "beside the streaming one, got none")
        return Models(system, None)
    whole = load_system(options.offline_checkpoint, options.device, options.dtype, laid_out=True)
    check_not_streaming(whole.config, options.offline_checkpoint)
    wanted, got = system.config.data.sample_rate, whole.config.data.sample_rate
    if wanted != got:
        raise ValueError(f"--offline-checkpoint: wanted {wanted} Hz as the --checkpoint has, got {got} Hz")
    return Models(system, decode.with_parts(options, whole))


LOADED = 0              # a byte beside the numbers of signals


def catch_signals() -> tuple[int, int]:
    """SIGTERM and SIGINT from now on -> a descriptor with a byte to read for each, its number, and the other end.
    The system may hand a signal to any thread. Python calls its handler in the main thread, which would sleep on in
    Event.wait(); only set_wakeup_fd's byte is written by the thread that the signal has reached."""
    to_read, to_write = os.pipe()
    os.set_blocking(to_write, False)
    signal.set_wakeup_fd(to_write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    return to_read, to_write


def listen(options: argparse.Namespace, log: Callable[..., None]) -> Server:
    """Raises ValueError that says which of --host and --port is wrong."""
    try:
        return start(Server(options, log))
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        if isinstance(error, (socket.gaierror, UnicodeError)) or error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"--host {options.host}: no address of this machine: {said}; 127.0.0.1 is for this "
                             "machine only, 0.0.0.0 for all networks") from None
        hint = "; --port 0 takes a free port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        raise ValueError(f"--host {options.host} --port {options.port}: {said}{hint}") from None


def serve_model(server: Server, failures: list[Exception], wake: int) -> None:
    """The inference thread: load the model, say so by a byte to `wake`, and work through the queue."""
    try:
        server.open(load_warm(server.options), int(Path(server.options.checkpoint).stat().st_mtime))
    except Exception as error:
        failures.append(error)
    os.write(wake, bytes([LOADED]))
    if not failures:
        server.batcher.run()


def announce(server: Server, log: Log) -> None:
    """Say where it listens and what it has loaded: in a log of text by a plain line, for people and their scripts."""
    host, port = server.server_address[:2]
    shown = f"[{host}]" if ":" in host else host
    system = server.models.loaded()[-1]
    line = (f"listening on http://{shown}:{port} ({system.config.model.name}, {server.options.checkpoint}, "
            f"{system.stats.device}, trained on {trained_on(system)})")
    if server.options.log_format == "text":
        log.write(line)
        log("INFO", "ready")
    else:
        log("INFO", "ready", message=line)


def end_at_next(signals: int, log: Log) -> None:
    number = os.read(signals, 1)[0]
    log("WARNING", "signal", name=signal.Signals(number).name, message="the second one: ending at once")
    log.flush(0.2)
    os._exit(0)


def log_warnings(log: Log) -> None:
    """Warnings become lines of the log, those of recordings each time."""
    def show(message: Warning | str, *place: object) -> None:
        log("WARNING", "warning", message=str(message))

    warnings.filterwarnings("always", module="audio")
    warnings.showwarning = show


def run(options: argparse.Namespace) -> NoReturn:
    # Memory stays flat over thousands of requests, where oneDNN would cache 1024 compiled kernels, some for each batch
    # shape, and glibc open a heap for each new thread. Before torch's first forward pass, and on Linux only.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-8, 2)         # M_ARENA_MAX
    signals, wake = catch_signals()
    sys.setswitchinterval(0.0002)       # default 5 ms: while bodies are parsed, inference waits less for the GIL
    log = Log(options.log_format)
    log_warnings(log)
    server = listen(options, log)
    host, port = server.server_address[:2]
    begun = {"host": host, "port": port, "checkpoint": options.checkpoint}
    log.write(log_line(options.log_format, time.time(), "INFO", "loading", begun))
    failures: list[Exception] = []
    threading.Thread(target=serve_model, args=(server, failures, wake), daemon=True, name="inference").start()
    number = os.read(signals, 1)[0]
    if failures:
        raise failures[0]               # one line, as the log's thread has not begun
    if number == LOADED:
        announce(server, log)
    log.thread.start()
    if number == LOADED:
        number = os.read(signals, 1)[0]
    log("INFO", "signal", name=signal.Signals(number).name)
    threading.Thread(target=end_at_next, args=(signals, log), daemon=True, name="second signal").start()
    if server.loaded.is_set():
        log("INFO", "drain", seconds=options.drain_timeout)
        drain(server, options.drain_timeout)
    log("INFO", "stop")
    log.flush(0.5)
    os._exit(0)         # a normal exit would wait for the parsers, and abort if a thread is still inside torch


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    try:
        run(options)
    except (ValueError, OSError, OverflowError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
