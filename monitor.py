"""What an operator sees of a server: metrics as Prometheus scrapes them, and a log that never holds anybody up.

Needs the standard library only, so it can be copied alone. Source: Prometheus text format 0.0.4.
"""
import bisect
import itertools
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# ---- metrics ----

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
HISTOGRAMS = {"asr_request_duration_seconds": SECONDS, "asr_queue_seconds": SECONDS, "asr_inference_seconds": SECONDS,
              "asr_batch_size": (1, 2, 4, 8, 12, 16, 24, 32, 64), "asr_step_seconds": SECONDS,
              "asr_step_size": (1, 2, 4, 8, 12, 16, 24, 32, 64, 128), "asr_stream_latency_seconds": SECONDS}
HELP = {"asr_requests_total": "answers by route and status; 499: the client left",
        "asr_request_duration_seconds": "from the end of a request's header to its answer",
        "asr_queue_seconds": "from the queue to the model", "asr_inference_seconds": "of one forward pass",
        "asr_batch_size": "utterances, or pieces of long ones, in one pass",
        "asr_step_size": "streams that were heard together", "asr_step_seconds": "of one pass for them",
        "asr_sockets": "open web sockets", "asr_stream_latency_seconds": "from what completes a chunk to its message",
        "asr_audio_seconds_total": "seconds of speech recognised",
        "asr_tokens_total": "tokens recognised", "asr_rejected_total": "refused for load, time or shutdown",
        "asr_batch_padding_ratio": "share of padding in all frames run so far",
        "asr_queue_depth": "utterances that wait", "asr_inflight_requests": "complete requests without an answer",
        "asr_connections": "open connections",
        "process_resident_memory_bytes": "memory", "process_start_time_seconds": "since 1970"}
REASONS = {429: "queue_full", 504: "deadline_exceeded", 408: "request_timeout", 413: "too_large"}


def sample(name: str, labels: str, value: str) -> str:
    """A line of Prometheus' text format; labels: 'a="1",b="2"', or "" for none."""
    return f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def histogram_lines(name: str, labels: str, row: Sequence[float]) -> list[str]:
    """A row of Metrics.histograms: how many values are at most each bound, the sum, the count."""
    others = labels + "," if labels else ""
    totals = list(itertools.accumulate(row[:-1]))
    lines = []
    for bound, total in zip((*HISTOGRAMS[name], "+Inf"), totals):
        lines.append(sample(f"{name}_bucket", f'{others}le="{bound}"', str(total)))
    return [*lines, sample(f"{name}_sum", labels, f"{row[-1]:.10g}"), sample(f"{name}_count", labels, str(totals[-1]))]


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
            row[bisect.bisect_left(bounds, value)] += 1
            row[-1] += value

    def count_request(self, route: str, status: int, code: str, seconds: float) -> None:
        self.add("asr_requests_total", f'route="{route}",status="{status}"')
        self.observe("asr_request_duration_seconds", seconds, f'route="{route}"')
        reason = REASONS.get(status, code if status == 503 else "")
        if reason and route not in ("/health", "/ready"):
            self.add("asr_rejected_total", f'reason="{reason}"')

    def text(self, gauges: dict[str, float]) -> str:
        """Everything in Prometheus' text format 0.0.4."""
        lines = []
        with self.lock:
            for name, meaning in HELP.items():
                lines.append(f"# HELP {name} {meaning}")
                if name in HISTOGRAMS:
                    lines.append(f"# TYPE {name} histogram")
                    for labels, row in self.histograms[name].items():
                        lines += histogram_lines(name, labels, row)
                elif name in gauges:
                    lines += [f"# TYPE {name} gauge", sample(name, "", f"{gauges[name]:.17g}")]
                else:
                    lines.append(f"# TYPE {name} counter")
                    lines += [sample(name, labels, f"{value:.17g}") for labels, value in self.sums[name].items()]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Memory of this process in bytes; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0


# ---- the log ----

def log_line(form: str, seconds: float, level: str, event: str, fields: dict[str, Any]) -> str:
    """A line of the log in the form text or json; seconds since 1970, shown in UTC."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1e3) % 1000:03d}Z"
    if form == "json":
        return json.dumps({"time": now, "level": level, "event": event, **fields})
    shown = []
    for name, value in fields.items():
        is_plain = re.fullmatch(r"[!#-~]+", str(value))     # else quoted: its escapes keep a line a line
        shown.append(f"{name}={value if is_plain else json.dumps(str(value))}")
    return " ".join([now, level, event, *shown])


class Log:
    """Called with a level, an event and fields; once begun, its own thread writes a line for each to standard error.
    Lines that cannot be written, and those above 1000 that wait, are lost; how many is said once there is room."""

    def __init__(self, form: str):
        self.form = form
        self.descriptor = 2 if sys.stderr else -1       # closed by who started it: 2 may be a client's connection
        self.lines: queue.Queue[str] = queue.Queue(1000)
        self.num_lost = 0
        self.is_torn = False            # the last line was written in part
        self.thread = threading.Thread(target=self.write_all, daemon=True, name="log")

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        try:
            self.lines.put_nowait(log_line(self.form, time.time(), level, event, fields))
        except queue.Full:
            self.num_lost += 1

    def write_all(self) -> None:
        while True:
            line = self.lines.get()
            lost = self.num_lost
            if lost:
                line = log_line(self.form, time.time(), "ERROR", "log", {"lost": lost}) + "\n" + line
            if self.write(line):
                self.num_lost -= lost
            else:
                self.num_lost += 1
            self.lines.task_done()

    def write(self, line: str) -> bool:
        """Write a line without Python's buffers, which keep what has failed -> whether all of it went out."""
        if self.is_torn:
            line = "\n" + line
        rest = (line + "\n").encode()
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest):]
        except OSError:
            self.is_torn = self.is_torn or len(rest) < size
            return False
        self.is_torn = False
        return True

    def flush(self, seconds: float) -> None:
        """Wait until all lines are written, but no longer than that."""
        until = time.monotonic() + seconds
        while self.lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)
