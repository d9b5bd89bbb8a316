"""One queue, one model, batches of like lengths; and what an operator sees of it all: metrics and a log.

The batching rule takes the time as an argument. Needs torch and web.py.
Source: Prometheus text format 0.0.4.
"""
import argparse
import bisect
import contextlib
import itertools
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from web import ClientLeft, Refusal


# ---- batching ----

RATIO = 1.5         # longest to shortest of a batch: above it, a large model's padding costs more than the batch saves


def choose_batch(lengths: Sequence[int], max_size: int, max_frames: int) -> list[int]:
    """The next batch of those that wait -> its indices in `lengths` (frames, oldest first), always with the oldest.

    It is the largest set of like lengths around the oldest: the longest at most RATIO times the shortest; at most
    max_size utterances and max_frames padded frames (a longer one goes alone). Nobody starves, as everybody becomes
    the oldest.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)        # shortest first
    oldest = order.index(0)
    best = [0]
    for low in range(max(0, oldest - max_size + 1), oldest + 1):
        group = []
        for i in order[low:low + max_size]:
            if lengths[i] > RATIO * lengths[order[low]] or lengths[i] * (len(group) + 1) > max_frames:
                break
            group.append(i)
        if 0 in group and len(group) > len(best):
            best = group
    return best


@dataclass(eq=False)
class Job:
    """A piece of an utterance in the queue. Times are monotonic seconds."""

    feats: Tensor                       # (T,F)
    utterance: object                   # the same object for all its pieces
    queued: float
    deadline: float
    has_left: Callable[[], bool]        # asks for its client; the same function for all jobs of a request
    hotwords: tuple[str, ...] | None = None     # what the model is told to listen for
    taken: float = math.nan             # when its batch began, of batch_size pieces, which took infer_sec
    infer_sec: float = 0.0
    batch_size: int = 0
    outcome: Future = field(default_factory=Future)         # of what the model makes of it


@dataclass(eq=False)
class Step(Job):
    """More of a stream: feats are its next samples (n,), utterance is its state."""

    is_last: bool = False               # the stream ends with them


def num_utterances(jobs: Sequence[Job]) -> int:
    """How many utterances the jobs belong to: the pieces of one count once."""
    return len({id(job.utterance) for job in jobs})


class Batcher:
    """The queue, and the rule that makes batches of it. The one thread in `run` is the only one to call the model.

    Steps of streams are not queued: all that are there go through `infer_steps` together, and a step waits for one
    batch of utterances at most, as these for one batch of steps.

    options: max_batch_size (utterances), max_batch_frames (padded), max_wait_ms, max_queue (utterances that may wait).
    """

    def __init__(self, infer: Callable[[Sequence[Job]], list], options: argparse.Namespace, metrics: "Metrics",
                 infer_steps: Callable[[Sequence[Step]], list] | None = None):
        self.infer = infer
        self.infer_steps = infer_steps
        self.options = options
        self.metrics = metrics
        self.waiting: list[Job] = []        # oldest first
        self.steps: list[Step] = []
        self.stepped = False                # whether the last batch was one of steps
        self.arriving = 0                   # requests that are being parsed
        self.num_expected = 0               # utterances of the last batch less those since: many clients ask again
        self.last_answer = -math.inf        # when the last batch ended
        self.padded = 0                     # frames run so far with padding
        self.padding = 0                    # those of them that were padding
        self.changed = threading.Condition()        # guards all these but the padding

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

    def submit(self, jobs: Sequence[Job], bounded: bool = True) -> None:
        """Queue all of them, or, if bounded and there is no room, none: Refusal 429."""
        with self.changed:
            waiting = num_utterances(self.waiting)
            more = num_utterances(jobs)
            if bounded and waiting + more > self.options.max_queue:
                message = (f"{waiting} utterances wait and this request brings {more}, at most "
                           f"{self.options.max_queue} may wait; send it again later")
                raise Refusal(429, "queue_full", message, headers=[("Retry-After", "1")])
            self.waiting += jobs
            self.num_expected -= more
            if not waiting or len(self.waiting) >= self.options.max_batch_size:
                self.changed.notify()       # only then: waking `run` while it must wait takes the GIL from the parsers

    def submit_step(self, step: Step) -> None:
        with self.changed:
            self.steps.append(step)
            self.changed.notify()

    def poll(self, now: float) -> tuple[Sequence[Job], float | None]:
        """The batch to run at `now`, of steps or of utterances, or [] and the seconds to wait for more (None: until
        `changed`). Needs the lock."""
        batch: Sequence[Job] = []
        wait = None
        if self.stepped or not self.steps:
            batch, wait = self.poll_utterances(now)
        self.stepped = False
        if not batch and self.steps:
            batch = self.steps
            self.steps = []
            self.stepped = True
        return batch, wait

    def poll_utterances(self, now: float) -> tuple[list[Job], float | None]:
        """`poll` of what is queued.

        It waits only while a request is being parsed, or a client of the last batch may be back (many ask again at
        once); while fewer than max_batch_size jobs wait; and until max_wait_ms have passed since the newest job or
        the last answer, whichever came later, or eight times that since the oldest job.
        """
        if not self.waiting:
            return [], None
        wait_sec = self.options.max_wait_ms / 1e3
        first = self.waiting[0].queued
        last = max(self.waiting[-1].queued, self.last_answer)
        patience = min(last + wait_sec, first + 8 * wait_sec) - now
        returning = self.num_expected > 0 and first < self.last_answer + wait_sec
        if (self.arriving or returning) and len(self.waiting) < self.options.max_batch_size and patience > 0:
            return [], patience
        chosen = choose_batch([len(job.feats) for job in self.waiting], self.options.max_batch_size,
                              self.options.max_batch_frames)
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
        now = time.monotonic()
        kept = []
        for job in batch:
            if now >= job.deadline:
                job.outcome.set_exception(deadline_passed())
            elif job.has_left():
                job.outcome.set_exception(ClientLeft())
            else:
                kept.append(job)
        if not kept:
            return
        infer = self.infer_steps if isinstance(kept[0], Step) else self.infer
        try:
            found = infer(kept)
        except Exception as error:
            if len(kept) == 1:
                kept[0].outcome.set_exception(error)
            else:
                for job in kept:
                    self.run_batch([job])
            return
        seconds = time.monotonic() - now
        if isinstance(kept[0], Step):
            self.metrics.observe("asr_step_size", len(kept))
            self.metrics.observe("asr_step_seconds", seconds)
        else:
            self.measure(kept, now, seconds)
        for job, outcome in zip(kept, found):
            job.taken = now
            job.infer_sec = seconds
            job.batch_size = len(kept)
            job.outcome.set_result(outcome)

    def measure(self, jobs: Sequence[Job], now: float, seconds: float) -> None:
        lengths = [len(job.feats) for job in jobs]
        self.metrics.observe("asr_batch_size", len(jobs))
        self.metrics.observe("asr_inference_seconds", seconds)
        self.padded += max(lengths) * len(jobs)
        self.padding += max(lengths) * len(jobs) - sum(lengths)
        for job in jobs:
            self.metrics.observe("asr_queue_seconds", now - job.queued)
        with self.changed:
            unanswered = {job.has_left for job in self.waiting}     # by request: those with other jobs that wait
            self.num_expected = num_utterances([job for job in jobs if job.has_left not in unanswered])
            self.last_answer = now + seconds


def deadline_passed() -> Refusal:
    return Refusal(504, "deadline_exceeded", "the answer was not ready within the deadline of the request",
                   headers=[("x-should-retry", "false")])


# ---- metrics ----

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
HISTOGRAMS = {"asr_request_duration_seconds": SECONDS, "asr_queue_seconds": SECONDS, "asr_inference_seconds": SECONDS,
              "asr_batch_size": (1, 2, 4, 8, 12, 16, 24, 32, 64), "asr_step_seconds": SECONDS,
              "asr_step_size": (1, 2, 4, 8, 12, 16, 24, 32, 64, 128), "asr_stream_latency_seconds": SECONDS}
HELP = {"asr_requests_total": "answers by route and status; 499: the client left",
        "asr_request_duration_seconds": "from the end of a request's header to its answer",
        "asr_queue_seconds": "from the queue to the model", "asr_inference_seconds": "of one forward pass",
        "asr_batch_size": "utterances in one forward pass", "asr_step_size": "streams that were heard together",
        "asr_step_seconds": "of one pass for them", "asr_sockets": "open web sockets",
        "asr_stream_latency_seconds": "from what completes a chunk to its message",
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

    Lines that cannot be written, and those above 1000 that wait, are lost; how many is said once there is room again.
    """

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
