"""Tables of the sequential experiment: per split the measures, and how much of the oracle's gain a variant has."""

from dataclasses import asdict, replace
from pathlib import Path

from minidoctor.study.report import (
    MEASURES,
    Estimate,
    Report,
    Summary,
    align,
    format_estimate,
    markdown_table,
    read_runs,
    summarize,
)
from minidoctor.study.run import RunResult
from minidoctor.study.sequence_variants import GROUPS_QUEUE, ORACLE, SPLITS
from minidoctor.study.variants import BASELINE, LORA

HALFWAY = "halfway from LoRA to the oracle"
BASELINES = (BASELINE, ORACLE, HALFWAY)  # besides plain LoRA
# The columns of the table of comparisons
COMPARISONS = (
    ("first_accuracy", LORA),
    ("first_accuracy", HALFWAY),
    ("second_accuracy", BASELINE),
    ("accuracy", LORA),
    ("accuracy", BASELINE),
)
COMPARED = ("first_accuracy", "accuracy", "second_accuracy", "forgetting", "first_loss", "second_loss", "text_loss")
SHOWN = (
    "first_accuracy_midway",
    "first_accuracy",
    "second_accuracy",
    "accuracy",
    "answer_bits",
    "token_bits",
    "text_loss",
)


def split_runs(runs: list[RunResult], split: str) -> list[RunResult]:
    """Return the runs with the measures of one split, and per seed the mean of plain LoRA and oracle as a variant.

    A paired difference to that mean above 0 means that more than half of the gap is closed.
    """
    measures = [
        {key.removeprefix(f"{split}_"): value for key, value in run.measures.items() if key.startswith(f"{split}_")}
        for run in runs
    ]
    results = [replace(run, measures=values) for run, values in zip(runs, measures, strict=True) if values]
    low, high = ({run.seed: run.measures for run in results if run.variant == name} for name in (LORA, ORACLE))
    for seed in sorted(low.keys() & high.keys()):
        means = {key: (low[seed][key] + high[seed][key]) / 2 for key in COMPARED if key in low[seed]}
        results.append(RunResult(HALFWAY, seed, means))
    return results


def summarize_split(runs: list[RunResult], split: str) -> Summary:
    return summarize(split_runs(runs, split), (LORA, *BASELINES), COMPARED)


def closed_gap(summary: Summary, name: str) -> str:
    """Return the gain over plain LoRA as a percentage of the oracle's, in the first stage at the end.

    "" if the oracle has no gain that is larger than the differences between seeds.
    """
    none = Estimate(0.0, None)
    gains = {
        variant: values.get("first_accuracy", none) for variant, values in summary.differences.get(LORA, {}).items()
    }
    gain, whole = gains.get(name, none), gains.get(ORACLE, none)
    low = whole.interval[0] if whole.interval else whole.mean
    return f"{100 * gain.mean / whole.mean:.0f}" if low > 0 and gain is not none else ""


def comparison_table(summary: Summary) -> str:
    """Return the differences between pairs of variants, and how much of the oracle's gain each variant has."""
    titles = [f"{MEASURES[key][0]} minus `{name}`, points" for key, name in COMPARISONS]
    rows = [["variant", *titles, "gap closed, %"]]
    for variant in (name for name in summary.measures if name != HALFWAY):
        paired = [summary.differences.get(name, {}).get(variant, {}).get(key) for key, name in COMPARISONS]
        cells = [format_estimate(value, "accuracy", signed=True) for value in paired]
        rows.append([variant, *cells, closed_gap(summary, variant)])
    return align(rows)


def split_tables(summary: Summary) -> list[str]:
    """Return the table of the measures of a split and, of more than one variant, that of the comparisons."""
    shown = replace(summary, measures={n: values for n, values in summary.measures.items() if n != HALFWAY})
    tables = [markdown_table(shown, LORA, SHOWN, ())]
    return [*tables, comparison_table(summary)] if summary.differences else tables


def report_sequence(runs: list[RunResult]) -> Report:
    """Return the report. The printed tables have all measures and differences."""
    summaries = {split: summarize_split(runs, split) for split in SPLITS if split_runs(runs, split)}
    printed, table = [], []
    for split, summary in summaries.items():
        table += [f"Stages by {split}:", *split_tables(summary)]
        printed += [f"Stages by {split}:", markdown_table(summary, LORA, tuple(MEASURES), ())]
        printed += [markdown_table(summary, name, (), COMPARED) for name in summary.differences]
        printed += split_tables(summary)[1:]
    stored = {"stages": {split: asdict(summary) for split, summary in summaries.items()}}
    return Report(stored, "\n\n".join(printed), "\n\n".join(table))


def committed_runs(file: str) -> list[RunResult]:
    return read_runs(Path(__file__).parent / "results" / file)


def committed_split(file: str, split: str) -> str:
    """Return the tables of a split from a file in results/, which README.md contains after a mark.

    The mark is `<!-- split: FILE by "SPLIT" -->`.
    """
    return "\n\n".join(split_tables(summarize_split(committed_runs(file), split)))


def committed_overview() -> str:
    """Return the table of the stages by language that the first README.md contains."""
    runs = committed_runs("sequence.json")
    language, mixed = (summarize_split(runs, split).measures for split in ("language", "mixed"))
    rows = [["answers right, %", "Chinese, after it", "Chinese, at the end", "English, at the end", "both at once"]]
    for name in (LORA, BASELINE, GROUPS_QUEUE, ORACLE):
        keys = ("first_accuracy_midway", "first_accuracy", "second_accuracy")
        estimates = [*(language[name].get(key) for key in keys), mixed.get(name, {}).get("accuracy")]
        rows.append([name, *(format_estimate(value, "accuracy", signed=False) for value in estimates)])
    return align(rows)
