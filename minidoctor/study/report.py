"""Summary of the runs: means over seeds and paired differences with 95 % confidence intervals, as Markdown tables.

An interval is that of Student's t for the mean over seeds: of a measure, or of its difference to a baseline with the
same seed. It describes other seeds, not other questions.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import UserError
from minidoctor.files.json_files import read_object
from minidoctor.study.run import RunResult
from minidoctor.study.variants import BASELINE, LORA, STRONG_BALANCE

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond these the last, slightly too large
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


@dataclass(frozen=True)
class Estimate:
    mean: float
    interval: tuple[float, float] | None  # None for a single seed


Estimates = dict[str, Estimate]  # by measure


@dataclass(frozen=True)
class Summary:
    seeds: dict[str, int]
    measures: dict[str, Estimates]  # by variant
    differences: dict[str, dict[str, Estimates]]  # by baseline and variant


class Report(NamedTuple):
    """The report of an experiment on all of its runs."""

    summary: dict[str, Any]  # stored as JSON
    printed: str
    table: str


# Title, unit and digits of each measure in a table
MEASURES = {
    "trainable_parameters": ("trainable parameters", "", 0),
    "accuracy": ("accuracy", "%", 1),
    "free_form": ("free-form", "%", 1),
    "multiple_choice": ("multiple choice", "%", 1),
    "nll": ("loss", "nats", 3),
    "load_entropy": ("load entropy", "", 2),
    "underused_experts": ("underused experts", "", 1),
    "topic_bits": ("topic", "bits", 3),
    "routing_churn": ("routing churn", "%", 1),
    "step_seconds": ("step", "s", 3),
    "peak_memory_gib": ("peak memory", "GiB", 2),
    # Of the sequential experiment
    "first_accuracy_midway": ("first stage, after it", "%", 1),
    "first_accuracy": ("first stage, at the end", "%", 1),
    "forgetting": ("forgetting", "%", 1),
    "second_accuracy_midway": ("second stage, before it", "%", 1),
    "second_accuracy": ("second stage", "%", 1),
    "first_loss_midway": ("loss of the first stage, after it", "nats", 3),
    "first_loss": ("loss of the first stage", "nats", 3),
    "second_loss_midway": ("loss of the second stage, before it", "nats", 3),
    "second_loss": ("loss of the second stage", "nats", 3),
    "answer_bits": ("stage in answers", "bits", 2),
    "token_bits": ("stage in all tokens", "bits", 2),
    "text_loss_before": ("base's text, before", "nats", 3),
    "text_loss": ("base's text", "nats", 3),
}
QUALITY = ("accuracy", "free_form", "multiple_choice", "nll")  # measures whose differences are estimated


def read_runs(path: Path) -> list[RunResult]:
    """Read the runs of an ablation.json."""
    try:
        return [RunResult(**run) for run in read_object(path)["runs"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of the current ablation ({error})") from None


def estimate(values: list[float]) -> Estimate:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None)
    half = T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, (mean - half, mean + half))


def summarize(
    runs: list[RunResult],
    baselines: Sequence[str] = (BASELINE, STRONG_BALANCE, LORA),
    compared: Sequence[str] = QUALITY,
) -> Summary:
    """Return the estimates of every variant, and of its differences to each baseline over the seeds of both."""
    by_seed: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        by_seed.setdefault(run.variant, {})[run.seed] = run.measures
    measures = {
        name: {key: estimate([run[key] for run in values.values()]) for key in next(iter(values.values()))}
        for name, values in by_seed.items()
    }
    differences: dict[str, dict[str, Estimates]] = {}
    for baseline, (name, values) in product(baselines, by_seed.items()):
        seeds = sorted(values.keys() & by_seed.get(baseline, {}).keys())
        pairs = [(values[seed], by_seed[baseline][seed]) for seed in seeds]
        if name != baseline and pairs:
            keys = [key for key in compared if key in pairs[0][0] and key in pairs[0][1]]
            estimates = {key: estimate([a[key] - b[key] for a, b in pairs]) for key in keys}
            differences.setdefault(baseline, {})[name] = estimates
    return Summary({name: len(values) for name, values in by_seed.items()}, measures, differences)


def format_estimate(value: Estimate | None, key: str, signed: bool) -> str:
    """Format a mean with half the width of its interval, or a difference with both bounds."""
    if value is None:
        return ""
    _, unit, digits = MEASURES[key]
    scale = 100 if unit == "%" else 1
    text = f"{scale * value.mean:{'+' if signed else ','}.{digits}f}"
    low, high = (scale * bound for bound in value.interval or (0, 0))
    if signed and value.interval:
        text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return text if signed or high == low else f"{text} ±{(high - low) / 2:.{digits}f}"


def markdown_table(
    summary: Summary,
    baseline: str = BASELINE,
    measures: Sequence[str] = ("trainable_parameters", "free_form", "nll", "underused_experts"),
    differences: Sequence[str] = ("free_form", "nll"),
) -> str:
    """Return a row per variant: its number of seeds, means of `measures`, paired `differences` to the baseline."""
    titles = [", ".join(filter(None, MEASURES[key][:2])) for key in measures]
    for title, unit, _ in (MEASURES[key] for key in differences):
        titles.append(f"{title} minus `{baseline}`, {'points' if unit == '%' else unit}")
    rows = [["variant", "seeds", *titles]]
    for name, estimates in summary.measures.items():
        paired = summary.differences.get(baseline, {}).get(name, {})
        cells = [format_estimate(estimates.get(key), key, signed=False) for key in measures]
        cells += [format_estimate(paired.get(key), key, signed=True) for key in differences]
        rows.append([name, str(summary.seeds[name]), *cells])
    return align(rows)


def align(rows: list[list[str]]) -> str:
    """Return the Markdown table of a header and rows, without the columns that are empty."""
    filled = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in filled]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in zip(*filled, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def full_report(summary: Summary) -> str:
    """Return a table of all measures, and one of the differences to each baseline."""
    tables = [markdown_table(summary, measures=tuple(MEASURES), differences=())]
    return "\n\n".join(tables + [markdown_table(summary, name, (), QUALITY) for name in summary.differences])


def report_ablation(runs: list[RunResult]) -> Report:
    summary = summarize(runs)
    return Report(asdict(summary), full_report(summary), markdown_table(summary))


def committed_table(file: str, baseline: str = BASELINE) -> str:
    """Return the table of a file in results/. README.md contains it after `<!-- table: FILE minus "BASELINE" -->`."""
    return markdown_table(summarize(read_runs(Path(__file__).parent / "results" / file)), baseline)
