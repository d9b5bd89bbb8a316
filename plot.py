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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor


# ---- pictures ----

PALETTE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # dark to bright, as viridis
SVG_STYLE = ('text{font:12px sans-serif,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei";fill:#333}'
             " .title{font-weight:bold} path{fill:none} .axis{stroke:#888} .grid{stroke:#8884}"
             " .fire{stroke:#e45756;stroke-width:1.5} .true{stroke:#fff;stroke-width:1.5;stroke-dasharray:5 4}"
             " .weight{fill:#4c78a8} .sum{stroke:#f58518;stroke-width:1.5} .ground{fill:#3b528b}"
             " @media(prefers-color-scheme:dark){svg{background:#1b1b1b} text{fill:#ddd} .weight{fill:#7aa6d6}}")
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


def text_width(text: str) -> float:
    """Estimated width of text in pixels, in a wide sans-serif of 12 px; a CJK character takes 12."""
    return sum(0 if unicodedata.combining(c) else 12 if unicodedata.east_asian_width(c) in "WF" or c in "mMW@%…"
               else 9.5 if c.isupper() or c == "w" else 7.5 for c in text)


def fit(text: str, room: float) -> str:
    """text, or as much of it as fits into `room` pixels with an ellipsis, which takes 12."""
    if text_width(text) <= room:
        return text
    return text[:sum(end <= room - 12 for end in itertools.accumulate(map(text_width, text)))] + "…"


def place(sizes: Sequence[float], centres: Sequence[float], lines: int) -> list[tuple[int, int]]:
    """Stack labels so that none overlap: (index, line) of each label that finds room, on the lowest line possible.
    sizes and centres in pixels, from left to right; labels without room are left out."""
    ends, placed = [-math.inf] * lines, []
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
    panel's height stands for as many seconds as its width. Where values share a pixel, it shows the largest.
    """
    if not values.numel():
        return ""
    most = round(panel.height), round(panel.width)
    values = F.adaptive_max_pool2d(values.float()[None], [min(pair) for pair in zip(values.shape, most)])[0]
    y = lambda sec: panel.top + panel.height * sec / panel.seconds
    x0, x1, y0, y1 = *map(panel.x, across), *map(y, down)
    return clip(panel, f'<image x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}" '
                       'preserveAspectRatio="none" style="image-rendering:pixelated" '
                       f'href="{heat_map(values.numpy())}"/>')


def label_svg(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape("␣" if text == " " else text)}</text>'


def time_axis(panel: Panel) -> str:
    """A line under the panel with labelled ticks, at least 75 pixels apart."""
    x, bottom = panel.x, panel.top + panel.height + 2
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600)
    step = next((s for s in steps if panel.seconds / s <= panel.width / 75), 3600)
    ticks = [k * step for k in range(int(panel.seconds / step) + 1)]
    marks = "".join(f'<path class="axis" d="M{x(t):.1f} {bottom}v5"/>{label_svg(x(t), bottom + 18, f"{t:.4g}")}'
                    for t in ticks)
    unit = label_svg(panel.left - 8, bottom + 18, "seconds", "end") if panel.left == LEFT else ""
    return f'<path class="axis" d="M{panel.left} {bottom}h{panel.width}"/>{marks}{unit}'


def token_labels(panel: Panel, tokens: Sequence[Span], lines: int) -> tuple[list[str], int]:
    """The tokens' texts above the panel, each centred on its token's time -> labels, number of lines they take."""
    texts = [fit(text, 120) for text, _, _ in tokens]
    sizes = [text_width(text) for text in texts]
    left, right = panel.left - 12, panel.left + panel.width + 12
    centres = [min(max(panel.x((start + end) / 2), left + size / 2), right - size / 2)
               for (_, start, end), size in zip(tokens, sizes)]
    placed = place(sizes, centres, lines)
    labels = [label_svg(centres[i], panel.top - 12 - 13 * line, texts[i]) for i, line in placed]
    return labels, max((line for _, line in placed), default=0) + 1


def firing_svg(panel: Panel, alpha: Tensor, across: tuple[float, float]) -> list[str]:
    """Firing weights alpha (L,) of frames from across[0] to across[1] s as bars, their running sum as a line."""
    bottom, total = panel.top + panel.height, alpha.double().cumsum(0).tolist()
    edges = np.linspace(panel.x(across[0]), panel.x(across[1]), len(alpha) + 1)
    largest, full = max(1.0, float(alpha.max())), 1.03 * max(1.0, total[-1])
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if full / n <= 8), 1000)
    level = lambda value: bottom - panel.height * value / full
    grid = [f'<path class="grid" d="M{panel.left} {level(n):.1f}h{panel.width}"/>'
            f'{label_svg(panel.left + panel.width + 6, level(n) + 4, str(n), "start")}'
            for n in range(0, math.floor(full) + 1, every)]
    heights, width = (panel.height * alpha / largest).tolist(), max(edges[1] - edges[0] - 0.5, 0.5)
    bars = [f'<rect class="weight" x="{x:.1f}" y="{bottom - h:.1f}" width="{width:.1f}" height="{h:.1f}"/>'
            for x, h in zip(edges, heights) if h > 0.1]
    line = "".join(f"L{x:.1f} {level(value):.1f}" for x, value in zip(edges[1:], total))
    names = [label_svg(panel.left - 8, panel.top + panel.height / 2 + 18 * i, name, "end")
             for i, name in enumerate(("weights", f"sum {total[-1]:.2f}"))]
    return grid + [clip(panel, "".join(bars) + f'<path class="sum" d="M{edges[0]:.1f} {bottom}{line}"/>'), *names]


def legend_svg(y: float, meanings: dict[str, str]) -> str:
    """The row {CSS class of a line: its meaning}. True boundaries are white, so they get a dark background."""
    xs = range(LEFT, LEFT + WIDTH, 230)
    return "".join((f'<rect class="ground" x="{x}" y="{y - 11}" width="30" height="14"/>' if name == "true" else "")
                   + f'<path class="{name}" d="M{x} {y - 4}h30"/>{label_svg(x + 36, y, meaning, "start")}'
                   for x, (name, meaning) in zip(xs, meanings.items()))


def alignment_svg(title: str, feats: Tensor, alpha: Tensor, tokens: Sequence[Span], seconds: float,
                  frames: tuple[float, float], truth: Tensor | None = None) -> str:
    """An SVG of the features (T,F) under their tokens and token boundaries, and below, the firing weights alpha (L,) of
    the encoder's frames with their running sum.

    seconds: duration of the features; frames: start of the first and end of the last encoder frame, s; truth (U+1,):
    true boundaries, s, drawn dashed. Many tokens make the picture wider.
    """
    width = max(WIDTH, 12 * len(tokens))
    lines = token_labels(Panel(LEFT, 0, width, 0, seconds), tokens, 6)[1]
    image = Panel(LEFT, 38 + 13 * lines, width, 200, seconds)
    firing = Panel(LEFT, image.top + 212, width, 118, seconds)
    bottom, whole = firing.top + firing.height, (0, seconds)
    edges = [start for _, start, _ in tokens] + [end for _, _, end in tokens[-1:]]
    body = [image_svg(image, feats.T.flip(0), whole, whole), *token_labels(image, tokens, 6)[0],
            label_svg(LEFT - 8, image.top + 100, "features", "end"), *firing_svg(firing, alpha, frames),
            time_axis(firing)]
    body += [f'<path class="fire" d="M{image.x(t):.1f} {image.top - 10}V{bottom}"/>' for t in edges]
    meanings = {"fire": "boundaries of tokens", "sum": "running sum of the weights"}
    if truth is not None:
        body += [f'<path class="true" d="M{image.x(t):.1f} {image.top}v200"/>' for t in truth.tolist()]
        meanings["true"] = "true boundaries"
    return picture(title, bottom + 56, [*body, legend_svg(bottom + 44, meanings)], width)


def attention_svg(title: str, weights: Tensor, tokens: Sequence[Span], seconds: float, frames: tuple[float, float],
                  cross: bool) -> str:
    """An SVG with a panel for each attention head, brightest at its own largest weight: encoder frames across; down,
    the tokens (cross: weights (H,U,L)) or the frames (weights (H,L,L)). seconds, frames: as in alignment_svg."""
    columns = min(2, len(weights))
    width = (WIDTH - 30 * (columns - 1)) / columns
    height = min(420, max(60, 16 * len(tokens))) if cross else 320
    lines = token_labels(Panel(LEFT, 0, width, 0, seconds), tokens, 3)[1]
    pitch, body = 13 * lines + height + 64, []
    middles = [(i + 0.5) / len(tokens) if cross else (start + end) / 2 / seconds
               for i, (_, start, end) in enumerate(tokens)]
    for h, head in enumerate(weights):
        left, top = LEFT + h % columns * (width + 30), 58 + 13 * lines + h // columns * pitch
        panel = Panel(left, top, width, height, seconds)
        largest = f", up to {head.max():.2g}" if head.numel() else ""
        body += [label_svg(left, top - 13 * lines - 14, f"head {h + 1}{largest}", "start"), time_axis(panel),
                 image_svg(panel, head, frames, (0, seconds) if cross else frames), *token_labels(panel, tokens, 3)[0]]
        if h % columns == 0:
            body += [label_svg(LEFT - 8, top + height * middles[i] + 4, fit(tokens[i][0], LEFT - 12), "end")
                     for i, _ in place([10] * len(tokens), [height * m for m in middles], 1)]
    return picture(title, 30 + math.ceil(len(weights) / columns) * pitch, body)


# ---- curves.svg ----

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d")


def panel_svg(panel: Panel, series: dict[str, list[float]], log_scale: bool) -> Iterator[str]:
    """A line for each series, with its name and last value beside the panel. The panel's `seconds` are epochs here."""
    lines = {name: [(i, math.log10(v) if log_scale else v) for i, v in enumerate(values)
                    if math.isfinite(v) and (v > 0 or not log_scale)] for name, values in series.items()}
    levels = [v for line in lines.values() for _, v in line] if log_scale else [0.0, 1.0]
    low = min(levels, default=0.0)
    high = max([low + 0.1, *levels])
    y = lambda v: panel.top + panel.height * (high - v) / (high - low)
    for v in np.linspace(low, high, 5):
        yield f'<path class="grid" d="M{panel.left} {y(v):.1f}h{panel.width}"/>'
        yield label_svg(panel.left - 6, y(v) + 4, f"{10 ** v if log_scale else v:.2g}", "end")
    for i in sorted({0, int(panel.seconds) // 2, int(panel.seconds)}):
        yield label_svg(panel.x(i), panel.top + panel.height + 16, str(i + 1))
    for n, (name, line) in enumerate(lines.items()):
        points = "L".join(f"{panel.x(i):.1f} {y(v):.1f}" for i, v in line) or "0 0"
        pen, dot = f'stroke="{COLOURS[n % len(COLOURS)]}" stroke-width="2"', "h0.1" if len(line) == 1 else ""
        right, down = panel.left + panel.width, panel.top + 8 + 20 * n
        yield f'<path {pen} stroke-linecap="round" d="M{points}{dot}"/><path {pen} d="M{right + 14} {down}h16"/>'
        yield label_svg(right + 36, down + 4, f"{name} {series[name][-1]:.4g}", "start")


def column_names(history: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in history for name in row))  # an epoch without a finite step has fewer


def curves_svg(history: Sequence[dict]) -> str:
    """The loss components (logarithmic) and the accuracies (0 to 1) over the epochs, as an SVG document."""
    names, body = column_names(history), []
    for top, part, log_scale in ((40, "loss", True), (290, "accuracy", False)):
        series = {name: [row.get(name, math.nan) for row in history] for name in names if part in name}
        body += panel_svg(Panel(LEFT, top, 460, 200, max(1, len(history) - 1)), series, log_scale)
    return picture("training loss, and accuracy on dev, by epoch", 520, body, 660)
