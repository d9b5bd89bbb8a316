"""What must not end a program or cost a result: a console that is gone, full or narrow; a signal in the middle of
something; a second process in the same place.

Reading order: standard streams, signals, locks. Needs the standard library alone.
"""
import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO


# ---- standard streams ----

ERASE = "\r\x1b[K"  # a terminal's line


class SafeStream:
    """Standard output or error that never raises: what its encoding lacks becomes ?, and once it is gone or full, what
    is written goes nowhere and `error` says why."""

    def __init__(self, stream: TextIO, error: str = ""):
        self.stream = stream
        self.error = error
        stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """What is left in the buffer, and what libraries write, goes nowhere too."""
        self.error = str(error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def warning_line(message: Warning | str, *place: object) -> str:
    return f"warning: {message}\n"


def keep_streams() -> None:
    """Make standard output and error SafeStreams, and a line of each warning. A stream that is closed (>&-) is opened
    on nothing first: else the next file that is opened would get its number, and what libraries print."""
    warnings.formatwarning = warning_line
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, SafeStream(open(os.devnull, "w", encoding="utf-8"), "it is closed"))
        else:
            setattr(sys, name, SafeStream(stream))


# ---- signals ----

class Ended(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the program to end. args: its number."""


def raise_ended(number: int, frame: object) -> None:
    raise Ended(number)


def end_as_ctrl_c() -> None:
    """SIGTERM, and SIGHUP unless nohup has it ignored, raise Ended, which is a KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, raise_ended)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, raise_ended)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells count: 128 + the number of the signal."""
    return 128 + (interrupt.args[0] if isinstance(interrupt, Ended) else signal.SIGINT)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C, and what `end_as_ctrl_c` makes of others, is held back until the block ends; a second one comes at
    once."""
    usual = {}
    held = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.default_int_handler, raise_ended):
            usual[number] = signal.getsignal(number)

    def remember(number: int, frame: object) -> None:
        held.append(number)
        if len(held) > 1:
            usual[number](number, frame)

    for number in usual:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if held:
        usual[held[0]](held[0], None)


def catch_signals() -> threading.Event:
    """An event that SIGTERM or Ctrl-C sets; a second one ends the program at once. SIGHUP, from a terminal that is
    closed, is ignored: what runs without a console goes on."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return stop


def leave_signals_to_parent(worker: int) -> None:
    """In a loader process: what timeout, a terminal or systemd sends to all processes of a run is for the first alone.
    SIGTERM from that one ends it: torch and multiprocessing send it to what is stuck."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where nobody can tell who sent a signal
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for the ffmpeg that it starts too

    def watch() -> None:
        while signal.sigwaitinfo(signals).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


# ---- locks ----

def lock(path: Path, wanted: str) -> BinaryIO:
    """Make the file at path this process's own for as long as what is returned is kept open; the system ends that with
    the process, however it dies. Raises ValueError, which begins with wanted (place: wanted a ...), with pid and host
    of the process that has it. On a file system without locks nothing is locked."""
    file = open(path, "a+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().decode(errors="replace").strip()
        file.close()
        raise ValueError(f"{wanted} that no process works on, got one of {holder}") from None
    except OSError:
        return file
    if os.fstat(file.fileno()).st_nlink == 0:  # released since it was opened
        file.close()
        return lock(path, wanted)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    file.flush()
    return file


def release(held: BinaryIO | None) -> None:
    """Give up a lock, and remove its file."""
    if held:
        Path(held.name).unlink(missing_ok=True)
        held.close()
