"""Tables of the sequential experiment: per split the measures, and how much of the oracle's gain a variant has."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from minidoctor.study.report import MEASURES, Report, Summary, align, markdown_table, read_runs, summarize
from minidoctor.study.run import RunResult
from minidoctor.study.sequence_variants import ORACLE, SPLITS
from minidoctor.study.variants import BASELINE, LORA

HALFWAY = "halfway from LoRA to the oracle"
BASELINES = (BASELINE, ORACLE, HALFWAY)  # besides plain LoRA
GAINS = ("first_accuracy", "accuracy")  # accuracies in which plain LoRA and the oracle differ
COMPARED = (*GAINS, "second_accuracy", "forgetting", "first_loss", "second_loss", "text_loss")
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


def gap_table(summary: Summary, measures: Sequence[str] = GAINS) -> str:
    """Return the share of the gap between plain LoRA and the oracle that each variant closes, or "" without a gap."""
    gains = summary.differences.get(LORA, {})
    measures = [key for key in measures if key in gains.get(ORACLE, {})]
    if not any(gains[ORACLE][key].mean for key in measures):
        return ""
    rows = [["variant", *(f"gap closed: {MEASURES[key][0]}, %" for key in measures)]]
    for name in (name for name in gains if name != HALFWAY):
        gaps = [(gains[name][key].mean, gains[ORACLE][key].mean) for key in measures]
        rows.append([name, *(f"{100 * closed / gap:.0f}" if gap else "" for closed, gap in gaps)])
    return align(rows)


def split_tables(summary: Summary) -> list[str]:
    """Return the table of a split with the differences to plain LoRA, the other differences, and the closed gaps."""
    tables = [markdown_table(summary, LORA, SHOWN, GAINS)]
    tables += [markdown_table(summary, name, (), GAINS) for name in BASELINES if name in summary.differences]
    return [*tables, *filter(None, [gap_table(summary)])]


def report_sequence(runs: list[RunResult]) -> Report:
    """Return the report. The printed tables have all measures and differences."""
    summaries = {split: summarize_split(runs, split) for split in SPLITS if split_runs(runs, split)}
    printed, table = [], []
    for split, summary in summaries.items():
        table += [f"Stages by {split}:", *split_tables(summary)]
        printed += [f"Stages by {split}:", markdown_table(summary, LORA, tuple(MEASURES), ())]
        printed += [markdown_table(summary, name, (), COMPARED) for name in summary.differences]
        printed += filter(None, [gap_table(summary)])
    stored = {"stages": {split: asdict(summary) for split, summary in summaries.items()}}
    return Report(stored, "\n\n".join(printed), "\n\n".join(table))


def committed_split(file: str, split: str) -> str:
    """Return the tables of a split from a file in results/. README.md contains them after its mark."""
    return "\n\n".join(split_tables(summarize_split(read_runs(Path(__file__).parent / "results" / file), split)))
