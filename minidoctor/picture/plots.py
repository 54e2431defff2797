"""The plots of `python -m minidoctor.picture`. The only file of the package that imports matplotlib.

Figures are made directly and not with pyplot, which keeps them and opens windows. The colour maps (cividis, PuOr) are
for colour-blind readers too, and each cell also contains its value.
"""

import io
import math
import sys
import unicodedata
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator
from torch import Tensor

from minidoctor.files.json_files import write_atomically
from minidoctor.model import Model
from minidoctor.picture import statistics
from minidoctor.picture.statistics import Top1
from minidoctor.picture.terminal import PALETTE, RoutedText, letter, sublayer_names
from minidoctor.questions.rows import Row
from minidoctor.text.stream import printable

# matplotlib draws each character in the first font that has it. Only installed fonts, because it warns of others.
FONTS = "Noto Sans CJK SC,Noto Sans CJK JP,Noto Sans SC,Source Han Sans SC,WenQuanYi Zen Hei,WenQuanYi Micro Hei,"
FONTS += "Droid Sans Fallback,PingFang SC,Hiragino Sans GB,Heiti TC,Arial Unicode MS,Microsoft YaHei,SimHei"
CHINESE = [name for name in FONTS.split(",") if name in fontManager.get_font_names()]
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans", *CHINESE],
    "text.parse_math": False,  # a topic such as "$5 to $10" is text, not a formula
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "minidoctor",  # fixes the random names in an SVG, so that equal plots are equal files
}
GLYPHS = {code for name in STYLE["font.family"] for code in get_font(findfont(name)).get_charmap()}
WIDTH = 9.0  # inches
COLUMNS = 100  # of the fixed-pitch sentence plot
MAX_LABELS = 60  # rows of the topics plot: those with most tokens


def loss_figure(rows: list[dict[str, float]]) -> Figure:
    """Plot the losses of metrics.jsonl per step, with a moving average."""
    names, n = [name for name in ("loss", "lm", "balance", "contrast") if name in rows[-1]], max(1, len(rows) // 40)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.4 * math.ceil(len(names) / 2)), layout="constrained")
    for index, name in enumerate(names, start=1):
        steps, values = zip(*((row["step"] + 1, row[name]) for row in rows if name in row), strict=True)
        windows = [values[max(0, i - n + 1) : i + 1] for i in range(len(values))]
        axes = figure.add_subplot(math.ceil(len(names) / 2), 2, index)
        axes.plot(steps, values, color="0.7", linewidth=1)
        axes.plot(steps, [sum(window) / len(window) for window in windows], color=PALETTE[4], linewidth=2)
        unit = "1: equal load" if name == "balance" else "nats"
        axes.set(title=name, ylabel=unit, xlabel=f"step (blue: mean of {n})")
        if name in ("loss", "lm") and min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    return figure


def heat_figure(
    tables: dict[str, tuple[list[str], Tensor]], experts: list[str], cell: str, title: str, unit: str, **colours: Any
) -> Figure:
    """Draw tables, each with row names and values (J, E), as coloured cells. `cell` formats a value; NaN is grey."""
    heights, step = [len(names) for names, _ in tables.values()], math.ceil(len(experts) / 16)
    figure = Figure(figsize=(WIDTH, 1.6 + 0.3 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(tables), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, (names, values)) in zip(grid, tables.items(), strict=True):
        axes.set(facecolor="0.85", ylabel=kind)
        image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", **colours)
        for y, row in enumerate(values.tolist() if step == 1 else []):  # more experts leave no space for values
            for x, value in enumerate(row):
                light = sum(image.cmap(image.norm(value))[:3]) > 1.3  # red + green + blue, each at most 1
                text = "" if math.isnan(value) else cell.format(x=value)
                axes.text(x, y, text, ha="center", va="center", color="black" if light else "white")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(0, len(experts), step), experts[::step])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    grid[-1].set_xlabel("expert")
    figure.suptitle(title)
    bar = figure.colorbar(image, ax=list(grid), format=cell, label=unit)
    if "norm" in colours:
        bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["1/4 or less", "1/2", "1", "2", "4 or more"], minor=False)
        bar.minorticks_off()
    return figure


def load_figure(top1: Top1, model: Model) -> Figure:
    """Plot the share of tokens whose top-1 each expert is, per sublayer."""
    assert model.adapter
    n_experts = model.adapter.n_experts
    experts = [letter(e, n_experts) for e in range(n_experts)]
    tables = {"sublayer": (sublayer_names(model), statistics.expert_load(top1, n_experts))}  # (L, E)
    title, unit = "Share of answer tokens whose top-1 each expert is", f"share of tokens (equal: {1 / n_experts:.1%})"
    return heat_figure(tables, experts, "{x:.0%}", title, unit, cmap="cividis", vmin=0)


def topics_figure(top1: Top1, rows: list[Row], model: Model) -> Figure | None:
    """Plot how much more often than average each expert's tokens have a topic and a language.

    For the sublayer with most information about the topics, or about the languages if there is only one topic. Return
    None if there is only one language too.
    """
    assert model.adapter
    n_experts = model.adapter.n_experts
    labels = {"topic": [row.topic or "(none)" for row in rows], "language": [row.language for row in rows]}
    labels = {kind: names for kind, names in labels.items() if len(set(names)) > 1}
    if not labels:
        return None
    joint = statistics.joint_distribution(top1, next(iter(labels.values())), n_experts)  # (L, E, J)
    best = int(statistics.mutual_information(joint).argmax())
    top1 = top1._replace(expert_ids=top1.expert_ids[best : best + 1])  # (1, n)
    tables, notes = {}, []
    for kind, names in labels.items():
        bits, shuffled = statistics.label_information(top1, names, n_experts)
        notes.append(f"{bits:.2f} bits about the {kind} ({shuffled:.2f} with {kind}s shuffled)")
        joint = statistics.joint_distribution(top1, names, n_experts)[0]  # (E, J)
        chosen = joint.sum(0).argsort(descending=True, stable=True)[:MAX_LABELS].sort().values
        shown = [sorted(set(names))[j] for j in chosen]
        tables[kind] = (drawable_names(kind, shown), statistics.lift(joint).T[chosen])  # (J, E)
        if len(chosen) < joint.shape[1]:
            print(f"topics: the {MAX_LABELS} {kind}s with most tokens, of {joint.shape[1]}", file=sys.stderr)
    load = statistics.expert_load(top1, n_experts)[0].tolist()
    experts = [f"{letter(e, n_experts)}\n{share:.0%}" for e, share in enumerate(load)]
    title = f"Information of the top-1 expert in {sublayer_names(model)[best]}:\n{', '.join(notes)}"
    unit = "share of the expert's tokens / share of all tokens (grey: underused)"
    norm = LogNorm(1 / 4, 4, clip=True)
    return heat_figure(tables, experts, "{x:.1f}", title, unit, cmap="PuOr_r", norm=norm)


def has_glyphs(text: str) -> bool:
    return all(ord(char) in GLYPHS for char in text if not char.isspace())


def drawable_names(kind: str, names: list[str]) -> list[str]:
    """Return the names, shortened to 20 characters, and the number of a name without glyphs, which is printed."""
    shown = []
    for i, name in enumerate(names, start=1):
        name = " ".join(printable(name).split())
        short = name if len(name) <= 20 else name[:19] + "…"
        if not has_glyphs(short):
            print(f"topics: {kind} {i} is {name}")
            short = str(i)
        shown.append(short)
    return shown


def sentence_figure(sentences: dict[str, list[RoutedText]], model: Model, sublayer: int) -> Figure | None:
    """Draw each text in a box with the colour of its expert and the expert's letter below, in fixed-pitch columns.

    `sentences` are texts by language. Those with a character that has no glyph are reported and left out.
    """
    assert model.adapter
    boxes, line = [], 1
    for language, texts in sentences.items():
        if not has_glyphs("".join(text for text, _ in texts)):
            print(f"sentence: no {language} sentence, no installed font has all its characters", file=sys.stderr)
            continue
        column = 1
        for text, experts in texts:
            letters = ",".join(letter(e, model.adapter.n_experts) for e in experts)
            n_wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)  # two columns each
            width = 1 + max(len(text.strip()) + n_wide, len(letters))
            column += text[:1].isspace()  # between words
            if column + width > COLUMNS:
                line, column = line + 1, 1
            boxes.append((column, line, width, f"{text.strip()}\n{letters}", PALETTE[experts[-1] % len(PALETTE)]))
            column += width
        line += 2
    figure = Figure(figsize=(WIDTH, 0.42 * line))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(line, 0))
    axes.axis("off")
    axes.text(1, 0.5, f"Top-1 expert of each token, {sublayer_names(model)[sublayer]}", va="center")
    pitch = {"ha": "center", "va": "center", "fontfamily": ["DejaVu Sans Mono", *CHINESE]}
    for column, y, width, text, colour in boxes:
        axes.add_patch(Rectangle((column, y), width - 0.2, 0.9, color=colour))
        axes.text(column + width / 2 - 0.1, y + 0.45, text, **pitch)
    return figure if boxes else None


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write the figure as PNG and SVG and return their paths."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        paths.append(out / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    return paths
