"""The pictures that picture.py makes, drawn from numbers. Needs matplotlib; nothing else here does.

StepMetrics are made directly and not by pyplot, which would remember them and choose a window for them. Colour maps
(cividis, PuOr) and palette are for the colour-blind as well, and letters and numbers say the same.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from minidoctor.files.json_files import write_atomically
from minidoctor.picture.terminal import RoutedText, letter

WIDTH = 9.0  # inches; a README is about 900 pixels wide, so that a point is 1.4 of them
# Okabe and Ito, https://jfly.uni-koeln.de/color/; in the order of routing_view.BACKGROUNDS.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#000000")
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "minidoctor",  # names inside an SVG are drawn from it: the same picture, the same file
}
PARTS = {
    "loss": ("loss (weighted sum of the others)", "nats"),
    "lm": ("lm: language model", "nats per answer token"),
    "balance": ("balance (1: all experts are used alike)", "no unit"),
    "contrast": ("contrast", "nats per anchor"),
}
MOST_NUMBERS = 16  # legible ones side by side


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def loss_figure(rows: list[dict[str, float]]) -> Figure:
    names = [name for name in PARTS if name in rows[-1]]
    n_lines = (len(names) + 1) // 2
    figure = new_figure(0.4 + 2.4 * n_lines)
    width = max(1, len(rows) // 40)
    for place, name in enumerate(names, start=1):
        title, unit = PARTS[name]
        steps, values = zip(*((row["step"] + 1, row[name]) for row in rows if name in row), strict=True)
        axes = figure.add_subplot(n_lines, 2, place)
        axes.plot(steps, values, color="0.7", linewidth=1)
        means = [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]
        axes.plot(steps, means, color=PALETTE[4], linewidth=2)
        axes.set(title=title, ylabel=unit)
        if name in ("loss", "lm") and min(values) > 0:
            logarithmic(axes)
        if place > len(names) - 2:
            axes.set_xlabel(f"step (blue: mean of {width})" if width > 1 else "step")
    return figure


def logarithmic(axes: Axes) -> None:
    """0.5, 1, 2, 5 and not powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def heat(axes: Axes, values: Tensor, texts: list[list[str]], rows: list[str], **settings: Any) -> Any:
    """(rows, E) as a table of colours, with numbers in it where they have room; NaN is grey."""
    axes.set_facecolor("0.85")
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", **settings)
    colours = ScalarMappable(image.norm, image.cmap)
    for y, line in enumerate(texts if values.shape[1] <= MOST_NUMBERS else []):
        for x, text in enumerate(line):
            colour = readable_on(colours.to_rgba(values[y, x].item())) if text else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def mark_experts(axes: Axes, labels: list[str]) -> None:
    apart = math.ceil(len(labels) / MOST_NUMBERS)
    axes.set_xticks(range(0, len(labels), apart), labels[::apart])


def readable_on(colour: Any) -> str:
    """Black or white, whichever has more contrast: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"  # there both have the same contrast, 4.6


def load_figure(load: Tensor, names: list[str]) -> Figure:
    """load (L, E), each row's sum 1."""
    n_experts = load.shape[1]
    figure = new_figure(1.2 + 0.32 * len(names))
    axes = figure.add_subplot()
    texts = [[f"{share:.0%}" for share in row] for row in load.tolist()]
    image = heat(axes, load, texts, names, cmap="cividis", vmin=0)
    mark_experts(axes, [letter(e, n_experts) for e in range(n_experts)])
    axes.set(xlabel="expert", title="Share of answer tokens whose first choice an expert is")
    bar = figure.colorbar(image, format=lambda share, _: f"{share:.0%}")
    bar.set_label(f"share of tokens (fair: {1 / n_experts:.1%})")
    return figure


def topics_figure(tables: dict[str, tuple[list[str], Tensor]], load: Tensor, title: str) -> Figure:
    """For each kind of label its names and how much more often than on average an expert's tokens have it (J, E).

    load (E,): the experts' shares of all tokens.
    """
    heights, n_experts = [len(names) for names, _ in tables.values()], len(load)
    figure = new_figure(1.9 + 0.27 * sum(heights))
    grid = figure.subplots(len(tables), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, (names, lift)) in zip(grid, tables.items(), strict=True):
        texts = [["" if value.isnan() else f"{value:.1f}" for value in row] for row in lift]
        shades = lift.log2().clamp(-2, 2)  # of NaN it stays NaN
        image = heat(axes, shades, texts, names, cmap="PuOr_r", vmin=-2, vmax=2)
        axes.set_ylabel(kind)
    mark_experts(grid[-1], [f"{letter(e, n_experts)}\n{share:.0%}" for e, share in enumerate(load.tolist())])
    grid[-1].set_xlabel("expert, and its share of all answer tokens (grey: less than a tenth of its fair share)")
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=list(grid), ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "1", "2", "4 or more"])
    bar.set_label("share of the expert's tokens / share of all tokens")
    return figure


def memory_figure(peaks: dict[str, list[int]], n_tokens: Sequence[int], title: str) -> Figure:
    """Bytes for batches of so many tokens, by what is written beside the line: the upper one first."""
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    looks = ((PALETTE[5], "o", "right"), (PALETTE[4], "s", "left"))
    for (text, values), (colour, marker, side) in zip(peaks.items(), looks, strict=True):
        mib = [value / 2**20 for value in values]
        axes.plot(n_tokens, mib, color=colour, marker=marker, linewidth=2)
        axes.annotate(text, (n_tokens[1], mib[1]), (0, 10), textcoords="offset points", ha=side, color=colour)
        axes.annotate(f"{mib[-1]:.3g} MiB", (n_tokens[-1], mib[-1]), (8, 0), textcoords="offset points", va="center")
    axes.set_xscale("log", base=2)
    logarithmic(axes)
    axes.set_xticks(n_tokens, [f"{n // 1024}k" for n in n_tokens])
    axes.set(xlabel="answer tokens in the batch", ylabel="peak memory (MiB a sublayer)", title=title)
    axes.margins(x=0.12, y=0.15)
    return figure


def font_for(text: str) -> FontProperties | None:
    """A font of this machine that has all the characters, matplotlib's own before others; None if there is none."""

    def rank(entry: Any) -> tuple[bool, int, str, str]:
        weight = entry.weight if isinstance(entry.weight, int) else 400
        return entry.style != "normal", abs(weight - 400), entry.name, entry.fname

    # One font has a box with a question mark for every character there is.
    others = [entry.fname for entry in sorted(fontManager.ttflist, key=rank) if "Last Resort" not in entry.name]
    for path in dict.fromkeys([findfont("DejaVu Sans"), *others]):
        try:
            font = FT2Font(path)
            if all(font.get_char_index(ord(char)) for char in set(text) if not char.isspace()):
                return FontProperties(fname=path)
        except (OSError, RuntimeError):  # listed and no longer there, or of a kind that cannot be drawn
            continue
    return None


def laid_out(pieces: list[RoutedText], font: FontProperties, width: float) -> list[tuple[int, float, float]]:
    """Line, left edge and width in points of each piece's box: broken where a line of this width is full."""
    boxes, line, x = [], 0, 0.0
    for text, experts in pieces:
        shown = text.strip().replace("$", "S")  # between two of those it would be read as a formula
        wide = TextPath((0, 0), shown, size=12, prop=font).get_extents().width if shown else 0.0
        wide = max(wide, 6.5 * len(experts)) + 6
        x += 6 if text[:1].isspace() else 0  # a new word
        if x and x + wide > width:
            line, x = line + 1, 0.0
        boxes.append((line, x, wide))
        x += wide + 2
    return boxes


def sentence_figure(sentences: list[tuple[list[RoutedText], FontProperties]], n_experts: int, title: str) -> Figure:
    """Every token in a box with the colour of its expert and, below it, the letter."""
    margin, line_height, apart = 12.0, 40.0, 14.0  # points; `apart`: two sentences
    placed = [laid_out(pieces, font, 72 * WIDTH - 2 * margin) for pieces, font in sentences]
    height = 36.0 + sum(line_height * (boxes[-1][0] + 1) + apart for boxes in placed)
    figure = Figure(figsize=(WIDTH, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 72 * WIDTH), ylim=(height, 0))
    axes.axis("off")
    axes.text(margin, 20, title, va="center", fontsize=11)

    def box(x: float, y: float, wide: float, tall: float, expert: int, text: str, **settings: Any) -> None:
        colour = PALETTE[expert % len(PALETTE)]
        axes.add_patch(Rectangle((x, y), wide, tall, facecolor=colour, linewidth=0))
        where = {"ha": "center", "va": "center", "color": readable_on(colour), "parse_math": False}
        axes.text(x + wide / 2, y + tall / 2, text, **where, **settings)

    y = 36.0
    for (pieces, font), boxes in zip(sentences, placed, strict=True):
        for (text, experts), (line, x, wide) in zip(pieces, boxes, strict=True):
            left, top, each = margin + x, y + line_height * line, wide / len(experts)
            box(left, top, wide, 19, experts[-1], text.strip(), fontproperties=font, fontsize=12)
            for i, expert in enumerate(experts):
                box(left + i * each, top + 19, each, 13, expert, letter(expert, n_experts), fontsize=9)
        y += line_height * (boxes[-1][0] + 1) + apart
    return figure


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()  # renamed into place when whole, as everything
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        paths.append(out / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    return paths
