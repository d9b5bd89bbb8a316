"""Voice activity detection: where somebody speaks in a recording, by the FSMN-VAD that FunASR publishes (fsmn-vad).

    python vad.py VAD_DIR a.wav [...]           begin and end in ms and the file's name, a line per stretch of speech
    python vad.py VAD_DIR --schedule funasr a.wav   with FunASR's silence limits, which fall as a stretch goes on

Reading order: the options of its directory, the network, one frame's decision, the state machine from decisions to
segments, a stream of samples, whole recordings, loading. Segments and events are in ms from the start of the stream.
Dims: B streams (1), T frames of 10 ms, F 400 features (5 filterbank frames), D width, P width of the memories.
Source: Zhang et al. 2018 "Deep-FSMN"; FunASR 1.4, whose segments these are.
"""
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

from commandline import Parser, spin_briefly

if __name__ == "__main__":
    spin_briefly()  # before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import convolve
from audio import Source, stream
from downloads import check_part
from funasr import load_model, published_files, read_cmvn, read_section, read_values, rename
from live import first_sample, frontend_part
from pauses import Segment


# ---- options, by FunASR's names ----

@dataclass(frozen=True)
class FrontEnd:
    fs: int = 16000                         # Hz
    n_mels: int = 80
    lfr_m: Literal[5] = 5                   # filterbank frames of a feature frame, two on either side
    lfr_n: Literal[1] = 1
    window: Literal["hamming"] = "hamming"
    frame_length: Literal[25] = 25          # ms
    frame_shift: Literal[10] = 10           # ms


@dataclass(frozen=True)
class Network:
    input_dim: int = 400
    input_affine_dim: int = 140
    fsmn_layers: int = 4
    linear_dim: int = 250                   # D
    proj_dim: int = 128                     # P
    lorder: int = 20                        # frames that a memory sees, its own included
    rorder: Literal[0] = 0
    lstride: Literal[1] = 1
    rstride: Literal[0, 1] = 0              # of no use with rorder 0
    output_affine_dim: int = 140
    output_dim: int = 248


@dataclass(frozen=True)
class Options:
    sample_rate: int = 16000
    detect_mode: Literal[0, 1] = 1          # 0: one segment, then nothing more
    max_end_silence_time: int = 800         # ms of silence that end a segment, with speech_to_sil_time_thres in it
    max_start_silence_time: int = 3000      # ms; detect_mode 0: more silence than this ends it without a segment
    window_size_ms: int = 200               # over which frames of speech are counted
    sil_to_speech_time_thres: int = 150     # so many of them begin speech,
    speech_to_sil_time_thres: int = 150     # so few end it
    speech_2_noise_ratio: float = 1.0       # exponent on the probability of silence
    do_extend: Literal[0, 1] = 1            # use the next two
    lookback_time_start_point: int = 200    # ms before the window that a segment begins
    lookahead_time_end_point: int = 100     # ms of the last silence that a segment keeps
    max_single_segment_time: int = 60000    # ms
    snr_thres: float = -100.0               # dB above the noise that speech must have
    noise_frame_num_used_for_snr: int = 100
    decibel_thres: float = -100.0           # dB that speech must have
    speech_noise_thres: float = 0.6         # by which speech must be likelier than silence
    silence_pdf_num: int = 1
    sil_pdf_ids: tuple[int, ...] = (0,)     # classes of the network that are silence
    frame_in_ms: Literal[10] = 10
    frame_length_ms: Literal[25] = 25


IGNORED = """dither upsacle_samples snip_edges cmvn_file snr_mode do_start_point_detection do_end_point_detection
    nn_eval_block_size dcd_block_size fe_prior_thres speech_noise_thresh_low speech_noise_thresh_high
    output_frame_probs""".split()           # options that change nothing in FunASR either
SCHEDULE = ((10000, 2000), (20000, 1000), (30000, 800), (40000, 600), (50000, 400), (60000, 200), (math.inf, 100))
SCHEDULES = {"config": (), "funasr": SCHEDULE}
SCHEDULED_THRES = 0.5                       # speech_noise_thres of a schedule


def read_options(path: Path) -> tuple[FrontEnd, Network, Options]:
    """The sections of a config.yaml. Raises ValueError that names what is not implemented here."""
    values = read_values(path)
    wanted = {"model": ("FsmnVADStreaming",), "encoder": ("FSMN",), "frontend": ("WavFrontendOnline", "WavFrontend")}
    for part, names in wanted.items():
        if values.get(part) not in names:
            raise ValueError(f"{path}: wanted {part} {' or '.join(names)}, got {values.get(part)}")
    front_end = read_section(values, "frontend", IGNORED, FrontEnd(), str(path))
    network = read_section(values, "encoder", IGNORED, Network(), str(path))
    options = read_section(values, "model", IGNORED, Options(), str(path))
    if options.sample_rate != front_end.fs:
        raise ValueError(f"{path}: wanted one sample rate, got {options.sample_rate} and {front_end.fs}")
    if options.silence_pdf_num != len(options.sil_pdf_ids):
        raise ValueError(f"{path}: silence_pdf_num: wanted the {len(options.sil_pdf_ids)} of sil_pdf_ids, got "
                         f"{options.silence_pdf_num}")
    return front_end, network, options


# ---- network ----

class FsmnBlock(nn.Module):
    """To a narrow width, a sum over the last lorder frames with a weight each, and back."""

    def __init__(self, options: Network):
        super().__init__()
        self.down = nn.Linear(options.linear_dim, options.proj_dim, bias=False)
        self.memory = nn.Conv2d(options.proj_dim, options.proj_dim, (options.lorder, 1), groups=options.proj_dim,
                                bias=False)  # holds the weights in FunASR's shape; `convolve` is faster
        self.up = nn.Linear(options.proj_dim, options.linear_dim)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,T,D), past (B,lorder-1,P), what the last call returned -> (B,T,D), past of the next call."""
        y = torch.cat([past, self.down(x)], 1)  # (B,lorder-1+T,P)
        summed = convolve(y, self.memory.weight[..., 0], None, (0, 0))  # (B,T,P)
        seen = y[:, past.shape[1]:] + summed
        return F.relu(self.up(seen)), y[:, y.shape[1] - past.shape[1]:]


class Fsmn(nn.Module):
    """Features to probabilities; causal, so a stream can be computed piece by piece."""

    def __init__(self, options: Network):
        super().__init__()
        self.options = options
        self.first = nn.Linear(options.input_dim, options.input_affine_dim)
        self.second = nn.Linear(options.input_affine_dim, options.linear_dim)
        self.blocks = nn.ModuleList(FsmnBlock(options) for _ in range(options.fsmn_layers))
        self.third = nn.Linear(options.linear_dim, options.output_affine_dim)
        self.output = nn.Linear(options.output_affine_dim, options.output_dim)

    def start(self) -> tuple[Tensor, ...]:
        """What every memory holds before the first frame."""
        shape = 1, self.options.lorder - 1, self.options.proj_dim
        return tuple(torch.zeros(shape) for _ in self.blocks)

    def forward(self, feats: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """feats (B,T,F), past as the last call returned it -> probabilities (B,T,classes), past of the next call."""
        x = F.relu(self.second(self.first(feats)))
        kept = []
        for block, before in zip(self.blocks, past, strict=True):
            x, after = block(x, before)
            kept.append(after)
        return self.output(self.third(x)).softmax(-1), tuple(kept)


NAMES = {"first": "encoder.in_linear1.linear", "second": "encoder.in_linear2.linear", "blocks": "encoder.fsmn",
         "down": "linear.linear", "memory": "fsmn_block.conv_left", "up": "affine.linear",
         "third": "encoder.out_linear1.linear", "output": "encoder.out_linear2.linear"}     # ours -> FunASR's


# ---- from probabilities to segments ----

def find_speech(options: Options, thres: float, silence: np.ndarray, level: np.ndarray | None,
                noise: float) -> tuple[list[bool], float]:
    """silence (T,) probabilities, level (T,) dB or None where it does not matter, noise in dB before the first frame
    -> whether each frame is speech, noise behind the last."""
    likely = 1 - silence >= silence ** options.speech_2_noise_ratio + thres
    if level is None:
        return likely.tolist(), noise
    found = []
    count = options.noise_frame_num_used_for_snr
    for is_likely, db in zip(likely.tolist(), level.tolist()):
        loud = db >= options.decibel_thres
        found.append(loud and is_likely and db - noise >= options.snr_thres)
        if loud and not is_likely:
            noise = db if noise < -99.9 else (db + noise * (count - 1)) / count
    return found, noise


@dataclass
class Detector:
    """Frames of speech or silence to segments; counts in frames. A stream's own: `feed` changes a copy."""

    options: Options
    t: int = -1             # the last frame
    window: int = 0         # a bit for each of the last frames, 1 = speech
    voiced: bool = False    # whether the window holds speech
    quiet: int = 0          # frames since that changed; while the window holds none, of silence
    begin: int = -1         # of the segment that is open; -1: none is
    free: int = 0           # the first frame that no segment may hold yet
    done: bool = False      # detect_mode 0: its one segment is closed

    def reach(self) -> int:
        """Frames before the current one where a segment may begin."""
        options = self.options
        return (options.window_size_ms + options.lookback_time_start_point * options.do_extend) // 10

    def earliest(self) -> int:
        """The first frame that a segment not closed yet can hold."""
        return self.begin if self.begin >= 0 else max(self.free, self.t + 1 - self.reach())

    def look(self, is_speech: bool) -> bool:
        """Put a frame into the window -> whether it is one more of silence."""
        size = self.options.window_size_ms // 10
        self.window = (self.window << 1 | is_speech) & ((1 << size) - 1)
        count = self.window.bit_count()
        if self.voiced:
            changes = count <= self.options.speech_to_sil_time_thres // 10
        else:
            changes = count >= self.options.sil_to_speech_time_thres // 10
        self.quiet += 1
        if changes:
            self.voiced = not self.voiced
            self.quiet = 0
        return not changes and not self.voiced

    def step(self, is_speech: bool, limit_ms: int, is_last: bool) -> tuple[int, int] | None:
        """The next frame -> the segment (begin, end) in ms that it closes, if any. limit_ms of silence close one."""
        self.t += 1
        is_quiet = self.look(is_speech)
        if self.begin < 0:
            if self.voiced:
                self.begin = max(self.free, self.t - self.reach())
            self.done = self.options.detect_mode == 0 and 10 * self.quiet > self.options.max_start_silence_time
            return None
        if is_quiet and 10 * self.quiet >= limit_ms:
            back = limit_ms // 10
            if self.options.do_extend:
                back = max(0, back - self.options.lookahead_time_end_point // 10 - 1)
            return self.close(self.t - back)
        if 10 * (self.t - self.begin + 1) > self.options.max_single_segment_time or is_last:
            return self.close(self.t)
        if not is_quiet:
            self.free = self.t + 1
        return None

    def close(self, last: int) -> tuple[int, int]:
        """End the segment with the frame `last`."""
        segment = 10 * self.begin, 10 * (last + 1)
        self.free = max(self.free, last) + 1
        self.begin = -1
        self.window = 0
        self.voiced = False
        self.done = self.options.detect_mode == 0
        return segment


# ---- streams ----

class Vad(NamedTuple):
    front_end: FrontEnd
    options: Options
    network: Fsmn
    stats: Tensor                                   # (2,F) mean and reciprocal deviation
    schedule: tuple[tuple[float, int], ...] = ()    # (ms of open segment up to which, ms of silence); () = the options'
    piece_ms: int = 60000                           # samples are worked through in pieces of this length
    announce: bool = False                          # report where a segment begins before it is closed


class State(NamedTuple):
    """A stream between two calls."""

    waiting: Tensor                     # (n,) samples that are no whole piece yet
    heard: Tensor                       # (m,) samples that the next frame depends on
    frames: int                         # so far
    past: tuple[Tensor, ...]            # the network's
    noise: float                        # dB
    detector: Detector
    announced: bool                     # whether the beginning of the open segment was reported
    open_ms: int                        # how long a schedule takes the open segment to be


Event = tuple[int, int]                 # begin and end in ms; -1: not known yet, or reported before


def start(vad: Vad) -> State:
    """The state before the first sample."""
    return State(torch.zeros(0), torch.zeros(0), 0, vad.network.start(), -100.0, Detector(vad.options), False, 0)


def feed(vad: Vad, state: State, samples: Tensor, last: bool = False) -> tuple[State, list[Event]]:
    """More samples (n,) float32 at front_end.fs Hz, any n -> state, what came to light: closed segments and, with
    vad.announce, (begin, -1) of one that stays open and (-1, end) of one that was reported so.

    Does not depend on how the samples are cut into calls. last: nothing follows; the state is then that of `start`.
    An open segment is closed, but with vad.announce one that begins in the very last frame has (begin, -1) only. Raises
    ValueError if samples are not finite.
    """
    waiting = torch.cat([state.waiting, samples])
    size = vad.front_end.fs * vad.piece_ms // 1000
    events = []
    while len(waiting) >= size:
        state, found = feed_piece(vad, state, waiting[:size], False)
        events += found
        waiting = waiting[size:]
    if not last:
        return state._replace(waiting=waiting.clone()), events
    state, found = feed_piece(vad, state, waiting, True)
    return start(vad), events + found


@torch.inference_mode()
def feed_piece(vad: Vad, state: State, samples: Tensor, last: bool) -> tuple[State, list[Event]]:
    """`feed` of one piece."""
    open_ms = state.open_ms + vad.piece_ms * (state.detector.begin >= 0)
    limit_ms, thres = limits(vad, open_ms)
    state, feats, level = next_features(vad, state, samples, last)
    if not feats.isfinite().all():
        raise ValueError("features not finite: are the samples of a float WAV far beyond 1?")
    if not len(feats):
        return state._replace(open_ms=open_ms), []
    scores, past = vad.network(feats[None], state.past)
    silence = scores[0, :, list(vad.options.sil_pdf_ids)].sum(1).double().numpy()  # (T,)
    speech, noise = find_speech(vad.options, thres, silence, level, state.noise)
    detector = replace(state.detector)
    announced = state.announced
    events: list[Event] = []
    for i, is_speech in enumerate(speech):
        if detector.done:
            break
        closed = detector.step(is_speech, limit_ms, last and i == len(speech) - 1)
        if closed:
            events.append((-1, closed[1]) if announced else closed)
            announced = False
    if detector.begin >= 0 and not announced:
        if vad.announce:
            events.append((10 * detector.begin, -1))
            announced = True
        elif last:  # it began in the very last frame
            events.append((10 * detector.begin, 10 * (detector.t + 1)))
    open_ms = 0 if events else open_ms
    return state._replace(past=past, noise=noise, detector=detector, announced=announced, open_ms=open_ms), events


def limits(vad: Vad, open_ms: int) -> tuple[int, float]:
    """ms of silence that close a segment, open for so long, and by how much speech must be likelier."""
    if not vad.schedule:
        limit_ms = vad.options.max_end_silence_time
        return limit_ms - vad.options.speech_to_sil_time_thres, vad.options.speech_noise_thres
    limit_ms = next((ms for up_to, ms in vad.schedule if open_ms <= up_to), vad.schedule[-1][1])
    return max(0, limit_ms - vad.options.speech_to_sil_time_thres), SCHEDULED_THRES


def next_features(vad: Vad, state: State, samples: Tensor, last: bool) -> tuple[State, Tensor, np.ndarray | None]:
    """More samples -> state, features (T,F) of all frames whose neighbours are known, their levels (T,) in dB if they
    matter: of the sum of squares, not of their mean."""
    given = vad.front_end
    options = SimpleNamespace(sample_rate=given.fs, num_mels=given.n_mels, lfr_m=given.lfr_m, lfr_n=given.lfr_n)
    window, shift = given.fs * 25 // 1000, given.fs // 100
    samples = torch.cat([state.heard, samples])
    begin = first_sample(state.frames, options)  # the place of samples[0]
    whole = (begin + len(samples) - window) // shift + 1  # filterbank frames so far
    feats = frontend_part(samples, state.frames, None if last else whole - given.lfr_m // 2, options, vad.stats)
    level = None
    matters = vad.options.decibel_thres > -60 or vad.options.snr_thres > -87  # else no level of samples in [-1,1) does
    if matters and len(feats):
        frames = samples[state.frames * shift - begin:].unfold(0, window, shift)[:len(feats)]
        level = 10 * np.log10(frames.square().sum(1).double().numpy() + 1e-6)
    frames = state.frames + len(feats)
    rest = samples[first_sample(frames, options) - begin:].clone()
    return state._replace(heard=rest, frames=frames), feats, level


# ---- whole recordings ----

def segments_of(vad: Vad, chunks: Iterable[Tensor]) -> Iterator[Event]:
    """A recording's samples in pieces (n,) -> its segments in ms; memory does not grow with it."""
    state = start(vad)
    for samples in chunks:
        state, events = feed(vad, state, samples)
        yield from events
    yield from feed(vad, state, torch.zeros(0), last=True)[1]


def cut_speech(vad: Vad, source: Source, rate_hz: int) -> Iterator[Segment]:
    """The stretches of speech of a recording, from a path or a file's bytes, at rate_hz; as cut_at_pauses otherwise.
    Keeps at most the open segment and what can belong to the next one. Raises as load_wav and `feed`."""
    state = start(vad)
    held = torch.zeros(0)
    first = 0  # the place of held[0] in the recording
    for heard, wanted, last in at_both_rates(source, vad.front_end.fs, rate_hz):
        held = torch.cat([held, wanted])
        state, ends, free = find_ends(vad, state, heard, last, rate_hz)
        for begin, end in ends:
            yield Segment(begin / rate_hz, held[begin - first:end - first].clone())
        held = held[max(0, free - first):].clone()
        first = max(first, free)


def find_ends(vad: Vad, state: State, samples: Tensor, last: bool,
              rate_hz: int) -> tuple[State, list[tuple[int, int]], int]:
    """`feed` -> state, begin and end of each segment at rate_hz, the first sample that a later one may hold."""
    state, events = feed(vad, state, samples, last)
    ends = [(begin * rate_hz // 1000, end * rate_hz // 1000) for begin, end in events]
    return state, ends, state.detector.earliest() * rate_hz // 100


def at_both_rates(source: Source, rate_hz: int, other_hz: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """The same stretch of a recording at both rates, and whether it is the end, which has no samples."""
    others = stream(source, other_hz)
    for samples in stream(source, rate_hz):
        yield samples, samples if other_hz == rate_hz else next(others), False
    yield torch.zeros(0), torch.zeros(0), True


# ---- loading, and the command ----

def load_vad(folder: str, schedule: str = "config") -> Vad:
    """The VAD of a directory as FunASR publishes it, memory-mapped; schedule: a key of SCHEDULES. Raises ValueError."""
    check_part(folder, "--vad")
    files = published_files(folder)
    front_end, network, options = read_options(files["config"])
    stats = read_cmvn(files["stats"], front_end.n_mels * front_end.lfr_m)
    if network.input_dim != stats.shape[1]:
        raise ValueError(f"{files['config']}: encoder_conf.input_dim: wanted n_mels x lfr_m {stats.shape[1]}, got "
                         f"{network.input_dim}")
    model = load_model(lambda: Fsmn(network), files["model"], lambda name: [rename(name, NAMES)])
    return Vad(front_end, options, model.eval(), stats, SCHEDULES[schedule])


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="vad.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="VAD_DIR", help="a directory as FunASR publishes it")
    parser.add_argument("recordings", metavar="RECORDING", nargs="+")
    parser.add_argument("--schedule", choices=SCHEDULES, default="config",
                        help="silence that ends a segment: as in its config, or falling from 2 s to 0.1 s as FunASR's")
    arguments = parser.parse_args(argv)
    try:
        vad = load_vad(arguments.folder, arguments.schedule)
        for path in arguments.recordings:
            for begin, end in segments_of(vad, stream(path, vad.front_end.fs)):
                print(f"{begin}\t{end}\t{path}")
    except (ValueError, OSError) as error:
        print(f"vad.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
