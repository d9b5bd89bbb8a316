"""One queue, one model, batches of like lengths. The batching rule takes the time as an argument."""
import argparse
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from monitor import Metrics
from web import ClientLeft, Refusal

RATIO = 1.5         # longest to shortest of a batch: above it, a large model's padding costs more than the batch saves


def choose_batch(lengths: Sequence[int], max_size: int, max_frames: int) -> list[int]:
    """The next batch of those that wait -> its indices in `lengths` (frames, oldest first), always with the oldest.
    It is the largest set of like lengths around the oldest, the longest at most RATIO times the shortest, of at most
    max_size utterances and max_frames padded frames (a longer one goes alone). Everybody becomes the oldest."""
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
    options: max_batch_size and max_queue (utterances), max_batch_frames (padded), max_wait_ms."""

    def __init__(self, infer: Callable[[Sequence[Job]], list], options: argparse.Namespace, metrics: Metrics,
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
        """With the lock held: what to run at `now`, or [] and the seconds to wait for more (None: until `changed`)."""
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
        the last answer, whichever came later, or eight times that since the oldest job."""
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


def seconds_left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def deadline_passed() -> Refusal:
    return Refusal(504, "deadline_exceeded", "the answer was not ready within the deadline of the request",
                   headers=[("x-should-retry", "false")])
