"""Pictures as SVG documents: the alignment of an utterance, the heads of an attention layer, the curves of a run.

Needs torch and numpy and imports nothing of ours, so it can be copied alone. Each picture is a function that returns
the text of a document, readable on light and dark backgrounds.

Dims: T feature frames, F feature bins, L encoder frames, U tokens, H heads.
"""
import base64
import html
import itertools
import math
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# ---- pictures ----

PALETTE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # dark to bright, as viridis
SVG_STYLE = ('text{font:12px sans-serif,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei";fill:#333}'
             " .title{font-weight:bold} path{fill:none} .axis{stroke:#888} .grid{stroke:#8884}"
             " .fire{stroke:#e45756;stroke-width:1.5} .true{stroke:#fff;stroke-width:1.5;stroke-dasharray:5 4}"
             " .weight{fill:#4c78a8} .sum{stroke:#f58518;stroke-width:1.5} .ground{fill:#3b528b}"
             " @media(prefers-color-scheme:dark){svg{background:#1b1b1b} text{fill:#ddd} .weight{fill:#7aa6d6}}"
             " .second{fill:#f58518} .title text{font-weight:bold}")
LEFT, WIDTH, RIGHT = 90, 900, 40  # pixels: left margin, least width of the plots, right margin
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Span = tuple[str, float, float]  # a token: its text, its start and its end in seconds


class Panel(NamedTuple):
    """A plot over time within a picture: its place in pixels, and the seconds that its width stands for."""

    left: float
    top: float
    width: float
    height: float
    seconds: float

    def x(self, sec: float) -> float:
        return self.left + self.width * sec / self.seconds


def escape(text: str) -> str:
    """text for XML and HTML; characters that XML cannot hold become �."""
    return html.escape(NOT_XML.sub("\ufffd", text))


def char_width(char: str) -> float:
    """Estimated width of a character in pixels, in a wide sans-serif of 12 px."""
    if unicodedata.combining(char):
        return 0
    if unicodedata.east_asian_width(char) in "WF" or char in "mMW@%…":
        return 12
    return 9.5 if char.isupper() or char == "w" else 7.5


def text_width(text: str) -> float:
    return sum(map(char_width, text))


def fit(text: str, room: float) -> str:
    """text, or as much of it as fits into `room` pixels with an ellipsis, which takes 12."""
    if text_width(text) <= room:
        return text
    count, width = 0, 0.0
    while width + char_width(text[count]) <= room - 12:
        width += char_width(text[count])
        count += 1
    return text[:count] + "…"


def place(sizes: Sequence[float], centres: Sequence[float], lines: int) -> list[tuple[int, int]]:
    """Stack labels so that none overlap: (index, line) of each label that finds room, on the lowest line possible.
    sizes and centres in pixels, from left to right; labels without room are left out."""
    ends = [-math.inf] * lines      # where the last label of each line ends
    placed = []
    for i, (size, centre) in enumerate(zip(sizes, centres)):
        line = next((n for n, end in enumerate(ends) if centre - size / 2 >= end + 4), None)
        if line is not None:
            ends[line] = centre + size / 2
            placed.append((i, line))
    return placed


def heat_map(values: np.ndarray) -> str:
    """values (rows, columns), row 0 at the top, smallest dark and largest bright -> a PNG as a data: URI."""
    low, high = float(values.min()), float(values.max())
    levels = np.rint((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    colours = np.stack([np.interp(np.linspace(0, 4, 256), range(5), channel) for channel in zip(*PALETTE)], 1)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *values.shape[::-1], 8, 3, 0, 0, 0)),  # 8 bits a pixel, by palette
              (b"PLTE", np.rint(colours).astype(np.uint8).tobytes()),
              (b"IDAT", zlib.compress(np.pad(levels, ((0, 0), (1, 0))).tobytes())),  # filter type 0 before each row
              (b"IEND", b"")]
    image = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)
    return "data:image/png;base64," + base64.b64encode(image).decode()


def picture(title: str, height: float, body: Sequence[str], plots: float = WIDTH) -> str:
    """An SVG document with a title above plots `plots` pixels wide, readable on light and dark backgrounds."""
    size = f'width="{LEFT + plots + RIGHT:.0f}" height="{height:.0f}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {LEFT + plots + RIGHT:.0f} {height:.0f}">'
            f'<style>{SVG_STYLE}</style><text class="title" x="{LEFT}" y="20">{escape(fit(title, plots))}</text>'
            f'{"".join(body)}</svg>\n')


def clip(panel: Panel, body: str) -> str:
    """The SVG elements of body, cut off at the edges of the panel."""
    left, top, width, height, _ = panel
    return (f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f'{body}</svg>')


def image_svg(panel: Panel, values: Tensor, across: tuple[float, float], down: tuple[float, float]) -> str:
    """values (rows, columns) as a heat map from across[0] to across[1] and from down[0] to down[1], in seconds; the
    panel's height stands for as many seconds as its width. Where values share a pixel, it shows the largest."""
    if not values.numel():
        return ""
    rows, columns = values.shape
    pixels = min(rows, round(panel.height)), min(columns, round(panel.width))
    values = F.adaptive_max_pool2d(values.float()[None], pixels)[0]
    left, right = map(panel.x, across)
    top, bottom = (panel.top + panel.height * sec / panel.seconds for sec in down)
    return clip(panel, f'<image x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{bottom - top:.2f}" '
                       'preserveAspectRatio="none" style="image-rendering:pixelated" '
                       f'href="{heat_map(values.numpy())}"/>')


def label_svg(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape("␣" if text == " " else text)}</text>'


def time_axis(panel: Panel) -> str:
    """A line under the panel with labelled ticks, at least 75 pixels apart."""
    bottom = panel.top + panel.height + 2
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600)
    step = next((s for s in steps if panel.seconds / s <= panel.width / 75), 3600)
    axis = [f'<path class="axis" d="M{panel.left} {bottom}h{panel.width}"/>']
    for k in range(int(panel.seconds / step) + 1):
        x = panel.x(k * step)
        axis += [f'<path class="axis" d="M{x:.1f} {bottom}v5"/>', label_svg(x, bottom + 18, f"{k * step:.4g}")]
    if panel.left == LEFT:
        axis.append(label_svg(panel.left - 8, bottom + 18, "seconds", "end"))
    return "".join(axis)


def token_labels(panel: Panel, tokens: Sequence[Span], lines: int) -> tuple[list[str], int]:
    """The tokens' texts above the panel, each centred on its token's time -> labels, number of lines they take."""
    texts = [fit(text, 120) for text, _, _ in tokens]
    sizes = [text_width(text) for text in texts]
    left = panel.left - 12
    right = panel.left + panel.width + 12
    centres = []
    for (_, start, end), size in zip(tokens, sizes):
        middle = panel.x((start + end) / 2)
        centres.append(min(max(middle, left + size / 2), right - size / 2))
    placed = place(sizes, centres, lines)
    labels = [label_svg(centres[i], panel.top - 12 - 13 * line, texts[i]) for i, line in placed]
    return labels, max((line for _, line in placed), default=0) + 1


def firing_svg(panel: Panel, alpha: Tensor, across: tuple[float, float]) -> list[str]:
    """Firing weights alpha (L,) of frames from across[0] to across[1] s as bars, their running sum as a line."""
    bottom = panel.top + panel.height
    total = alpha.double().cumsum(0).tolist()
    full = 1.03 * max(1.0, total[-1])       # the sum at the top of the panel

    def height(value: float) -> float:
        return bottom - panel.height * value / full

    every = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if full / n <= 8), 1000)
    grid = []
    for n in range(0, math.floor(full) + 1, every):
        grid += [f'<path class="grid" d="M{panel.left} {height(n):.1f}h{panel.width}"/>',
                 label_svg(panel.left + panel.width + 6, height(n) + 4, str(n), "start")]
    edges = np.linspace(panel.x(across[0]), panel.x(across[1]), len(alpha) + 1)
    width = max(edges[1] - edges[0] - 0.5, 0.5)
    heights = (panel.height * alpha / max(1.0, float(alpha.max()))).tolist()
    bars = [f'<rect class="weight" x="{x:.1f}" y="{bottom - h:.1f}" width="{width:.1f}" height="{h:.1f}"/>'
            for x, h in zip(edges, heights) if h > 0.1]
    line = "".join(f"L{x:.1f} {height(value):.1f}" for x, value in zip(edges[1:], total))
    middle = panel.top + panel.height / 2
    names = [label_svg(panel.left - 8, middle, "weights", "end"),
             label_svg(panel.left - 8, middle + 18, f"sum {total[-1]:.2f}", "end")]
    return grid + [clip(panel, "".join(bars) + f'<path class="sum" d="M{edges[0]:.1f} {bottom}{line}"/>'), *names]


def alignment_svg(title: str, feats: Tensor, alpha: Tensor, tokens: Sequence[Span], seconds: float,
                  frames: tuple[float, float], truth: Tensor | None = None) -> str:
    """An SVG of the features (T,F) under their tokens and token boundaries, and below, the firing weights alpha (L,) of
    the encoder's frames with their running sum.
    seconds: duration of the features; frames: start of the first and end of the last encoder frame, s; truth (U+1,):
    true boundaries, s, drawn dashed. Many tokens make the picture wider."""
    width = max(WIDTH, 12 * len(tokens))
    lines = token_labels(Panel(LEFT, 0, width, 0, seconds), tokens, 6)[1]
    image = Panel(LEFT, 38 + 13 * lines, width, 200, seconds)
    firing = Panel(LEFT, image.top + 212, width, 118, seconds)
    bottom = firing.top + firing.height
    edges = [start for _, start, _ in tokens] + [end for _, _, end in tokens[-1:]]
    body = [image_svg(image, feats.T.flip(0), (0, seconds), (0, seconds)), *token_labels(image, tokens, 6)[0],
            label_svg(LEFT - 8, image.top + 100, "features", "end"), *firing_svg(firing, alpha, frames),
            time_axis(firing)]
    body += [f'<path class="fire" d="M{image.x(t):.1f} {image.top - 10}V{bottom}"/>' for t in edges]
    y = bottom + 44  # of the legend
    meanings = {"fire": "boundaries of tokens", "sum": "running sum of the weights"}
    if truth is not None:
        body += [f'<path class="true" d="M{image.x(t):.1f} {image.top}v200"/>' for t in truth.tolist()]
        meanings["true"] = "true boundaries"
    for x, (name, meaning) in zip(range(LEFT, LEFT + WIDTH, 230), meanings.items()):
        if name == "true":  # a white line
            body.append(f'<rect class="ground" x="{x}" y="{y - 11}" width="30" height="14"/>')
        body += [f'<path class="{name}" d="M{x} {y - 4}h30"/>', label_svg(x + 36, y, meaning, "start")]
    return picture(title, bottom + 56, body, width)


def attention_svg(title: str, weights: Tensor, tokens: Sequence[Span], seconds: float, frames: tuple[float, float],
                  cross: bool) -> str:
    """An SVG with a panel for each attention head, brightest at its own largest weight: encoder frames across; down,
    the tokens (cross: weights (H,U,L)) or the frames (weights (H,L,L)). seconds, frames: as in alignment_svg."""
    columns = min(2, len(weights))
    width = (WIDTH - 30 * (columns - 1)) / columns
    height = min(420, max(60, 16 * len(tokens))) if cross else 320
    lines = token_labels(Panel(LEFT, 0, width, 0, seconds), tokens, 3)[1]
    pitch = 13 * lines + height + 64        # from one row of panels to the next
    if cross:
        middles = [height * ((i + 0.5) / len(tokens)) for i in range(len(tokens))]
    else:
        middles = [height * ((start + end) / 2 / seconds) for _, start, end in tokens]
    body = []
    for h, head in enumerate(weights):
        row, column = divmod(h, columns)
        left = LEFT + column * (width + 30)
        top = 58 + 13 * lines + row * pitch
        panel = Panel(left, top, width, height, seconds)
        largest = f", up to {head.max():.2g}" if head.numel() else ""
        body += [label_svg(left, top - 13 * lines - 14, f"head {h + 1}{largest}", "start"), time_axis(panel),
                 image_svg(panel, head, frames, (0, seconds) if cross else frames), *token_labels(panel, tokens, 3)[0]]
        if column == 0:
            body += [label_svg(LEFT - 8, top + middles[i] + 4, fit(tokens[i][0], LEFT - 12), "end")
                     for i, _ in place([10] * len(tokens), middles, 1)]
    return picture(title, 30 + math.ceil(len(weights) / columns) * pitch, body)


# ---- the way of one utterance through a model ----

def guesses_svg(panel: Panel, tokens: Sequence[Span], shares: Sequence[float],
                seconds: Sequence[tuple[str, float]]) -> Iterator[str]:
    """A column for each token, tied to its time above the panel: both guesses, bars of their probabilities, times."""
    column, bottom = panel.width / max(1, len(tokens)), panel.top + panel.height
    for u, ((text, start, end), share, (other, other_share)) in enumerate(zip(tokens, shares, seconds)):
        middle = panel.left + column * (u + 0.5)
        said = panel.x((start + end) / 2)
        yield f'<path class="axis" d="M{said:.1f} {panel.top - 48}L{middle:.1f} {panel.top - 24}"/>'
        for x, value, name in ((middle - 26, share, "weight"), (middle + 2, other_share, "second")):
            high = panel.height * value
            yield f'<rect class="{name}" x="{x:.1f}" y="{bottom - high:.1f}" width="24" height="{high:.1f}"/>'
            yield label_svg(x + 12, bottom - high - 4, f"{value:.0%}")
        yield f'<path class="axis" d="M{middle - 28:.1f} {bottom}h56"/>'
        yield label_svg(middle, bottom + 18, f"{fit(text, column / 2)} or {fit(other, column / 2 - 24)}?")
        yield f'<g class="title">{label_svg(middle, bottom + 62, fit(text, column))}</g>'
        yield label_svg(middle, bottom + 80, f"{start:.2f}–{end:.2f} s")


def explain_svg(title: str, feats: Tensor, alpha: Tensor, embeds: Tensor, tokens: Sequence[Span],
                shares: Sequence[float], seconds: Sequence[tuple[str, float]], duration: float,
                frames: tuple[float, float]) -> str:
    """An SVG that follows an utterance down: features (T,F), firing weights alpha (L,), the embeddings (U,D) of tokens,
    shares and seconds: probability of each token, second guess and its probability, then the text with its times.
    duration, s; frames: as in alignment_svg."""
    width = max(WIDTH, 84 * len(tokens))
    image, firing, columns, guesses = (Panel(LEFT, top, width, height, duration)
                                       for top, height in ((46, 130), (190, 110), (314, 90), (478, 80)))
    body = [image_svg(image, feats.T.flip(0), (0, duration), (0, duration)), time_axis(columns),
            *firing_svg(firing, alpha, frames), *guesses_svg(guesses, tokens, shares, seconds)]
    if len(tokens):  # the values of each over its time, dark where no token is
        values = torch.full((embeds.shape[1], round(width)), float(embeds.min()))
        for column, (_, start, end) in zip(embeds, tokens):
            first, last = (round(width * sec / duration) for sec in (start, end))
            values[:, first:max(last, first + 1)] = column[:, None]
        body.append(image_svg(columns, values, (0, duration), (0, duration)))
    for edge in [start for _, start, _ in tokens] + [end for _, _, end in tokens[-1:]]:
        body.append(f'<path class="fire" d="M{image.x(edge):.1f} {image.top}V{columns.top + columns.height}"/>')
    names = {110: "1 features", 230: "2 firing", 350: "3 tokens'", 368: "embeddings", 510: "4 guesses", 620: "5 text"}
    body += [label_svg(LEFT - 8, y, name, "end") for y, name in names.items()]
    return picture(title, 670, body, width)


# ---- a page of alignments, epoch by epoch ----

def epochs_page(title: str, names: Sequence[str]) -> str:
    """HTML that shows the pictures <number>_..._<epoch>.svg of one epoch at a time, chosen with a slider."""
    epochs: dict[str, list[str]] = {}
    for name in names:
        epochs.setdefault(name.removesuffix(".svg").rpartition("_")[2], []).append(name)
    parts = []
    for epoch, pictures in sorted(epochs.items()):
        images = "".join(f'<p><img src="{escape(name)}" alt="{escape(name)}"></p>' for name in pictures)
        hidden = " hidden" if len(parts) + 1 < len(epochs) else ""
        parts.append(f"<section{hidden}><h2>epoch {int(epoch)}</h2>{images}</section>")
    show = "document.querySelectorAll('section').forEach((part, n) => part.hidden = n + 1 != this.value)"
    slider = (f'<input type="range" min="1" max="{len(epochs)}" value="{len(epochs)}" aria-label="epoch" '
              f'oninput="{show}">')
    style = "body{font:14px sans-serif;margin:16px} input{width:60%} img{max-width:100%}"
    return ('<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            f"<title>{escape(title)}</title><style>{style}</style><h1>{escape(title)}</h1>"
            f"<p>Where tokens fire, epoch by epoch: move the slider.</p>{slider}{''.join(parts)}</html>\n")


# ---- curves of a run, and of several ----

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d")
ERRORS = {"wer": "WER", "cer": "CER", "token_accuracy": "wrong tokens", "length_accuracy": "wrong counts"}


class Curve(NamedTuple):
    name: str  # beside the panel; "" = none
    values: Sequence[float]  # one an epoch, NaN where there is none
    colour: str
    dashed: bool = False


def round_ticks(low: float, high: float, log_scale: bool) -> list[float]:
    """1, 2 or 5 times powers of ten, from at most low to at least high; beyond two decades in log the powers alone."""
    if log_scale:
        factors = (1,) if high > 100 * low else (1, 2, 5)
        ticks = []
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2):
            ticks += [float(f"{factor}e{power}") for factor in factors]
        first = max(i for i, tick in enumerate(ticks) if tick <= low)
        last = min(i for i, tick in enumerate(ticks) if tick >= high and i > first)
        return ticks[first:last + 1]
    power = math.floor(math.log10((high - low) / 5))
    step = next(size for size in (1, 2, 5, 10) if size * 10.0 ** power >= (high - low) / 5)
    first, last = (bound / (step * 10.0 ** power) for bound in (low, high))
    return [float(f"{k * step}e{power}") for k in range(math.floor(first), math.ceil(last - 1e-9) + 1)]


def curve_svg(panel: Panel, curve: Curve, height: Callable[[float], float], is_drawn: Callable[[float], bool]) -> str:
    """The line through the values that can be drawn; epoch 1 stands at the panel's left edge."""
    points = [f"{panel.x(i):.1f} {height(v):.1f}" for i, v in enumerate(curve.values) if is_drawn(v)]
    if not points:
        return ""
    dot = "h0.1" if len(points) == 1 else ""  # a line of one point is not drawn
    dashes = ' stroke-dasharray="6 5"' if curve.dashed else ""
    return (f'<path stroke="{curve.colour}" stroke-width="2" stroke-linecap="round"{dashes} '
            f'd="M{"L".join(points)}{dot}"/>')


def curves_panel(panel: Panel, title: str, curves: Sequence[Curve], log_scale: bool = False,
                 most: float = math.inf) -> Iterator[str]:
    """Curves with round ticks under a title, their names and last values beside them. The panel's `seconds` are epochs
    here, from the first to the last. A linear scale begins at 0; what is above `most` is drawn there."""
    def is_drawn(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not log_scale)

    drawn: list[float] = []
    for curve in curves:
        drawn += filter(is_drawn, curve.values)
    low, high = min(drawn, default=1.0), min(most, max(drawn, default=1.0))
    ticks = round_ticks(low if log_scale else min(0.0, low), max(high, 1e-9), log_scale)

    def height(value: float) -> float:
        bottom, place, top = (math.log10(v) if log_scale else v for v in (ticks[0], min(value, most), ticks[-1]))
        return panel.top + panel.height * (top - place) / (top - bottom)

    right = panel.left + panel.width
    yield label_svg(panel.left, panel.top - 10, title, "start")
    for tick in ticks:
        yield f'<path class="grid" d="M{panel.left} {height(tick):.1f}h{panel.width}"/>'
        yield label_svg(panel.left - 6, height(tick) + 4, f"{tick:g}", "end")
    for epoch in sorted({max(1.0, tick) for tick in round_ticks(0, panel.seconds + 1, False)}):
        if epoch <= panel.seconds + 1 and epoch % 1 == 0:
            yield label_svg(panel.x(epoch - 1), panel.top + panel.height + 16, f"{epoch:g}")
    for curve in curves:
        yield curve_svg(panel, curve, height, is_drawn)
    for n, curve in enumerate([curve for curve in curves if curve.name]):
        down = panel.top + 8 + 20 * n
        dashes = ' stroke-dasharray="6 5"' if curve.dashed else ""
        yield f'<path stroke="{curve.colour}" stroke-width="2"{dashes} d="M{right + 14} {down}h24"/>'
        yield label_svg(right + 44, down + 4, f"{curve.name} {curve.values[-1]:.3g}", "start")


def column_names(history: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(history)))  # an epoch without a finite step has fewer


def column(history: Sequence[dict], name: str) -> list[float]:
    """A figure of every epoch, an accuracy as the share of what is wrong."""
    values = [row.get(name, math.nan) for row in history]
    return [1 - value for value in values] if name.endswith("_accuracy") else values


def three_panels(title: str, panels: dict[str, list[Curve]], epochs: int) -> str:
    """Three panels of curves, the first one logarithmic, the others up to 1, each as high as the most names need."""
    body: list[str] = []
    names = max(sum(curve.name != "" for curve in curves) for curves in panels.values())
    height = max(200, 20 * names)
    for k, (name, curves) in enumerate(panels.items()):
        panel = Panel(LEFT, 66 + (height + 56) * k, 460, height, max(1, epochs - 1))
        body += curves_panel(panel, name, curves, log_scale=k == 0, most=math.inf if k == 0 else 1.0)
    return picture(title, 66 + (height + 56) * len(panels), body, 690)


def curves_svg(history: Sequence[dict]) -> str:
    """Losses in training and on dev, error rates on dev and the learning rate by epoch, as an SVG document."""
    losses, errors = [], []
    names = [name for name in column_names(history) if name.startswith("loss")]
    for name, colour in zip(names, itertools.cycle(COLOURS)):
        losses.append(Curve(name.removeprefix("loss_"), column(history, name), colour))
        losses.append(Curve("   on dev", column(history, f"dev_{name}"), colour, dashed=True))
    for name, colour in zip(ERRORS, COLOURS):
        errors.append(Curve(ERRORS[name], column(history, name), colour))
    rate = Curve("", column(history, "learning_rate"), COLOURS[0])
    panels = {"losses: in training, and dashed on dev": losses, "errors on dev": errors, "learning rate": [rate]}
    return three_panels("a run by epoch", panels, len(history))
