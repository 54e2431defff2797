import json
import math
from dataclasses import replace

import pytest

from minidoctor.study.report import estimate
from minidoctor.study.run import RunResult
from minidoctor.study.sequence_report import (
    HALFWAY,
    closed_gap,
    report_sequence,
    split_runs,
    split_tables,
    summarize_split,
)
from minidoctor.study.sequence_variants import GROUPS, ORACLE
from minidoctor.study.variants import BASELINE, LORA

ACCURACY = {LORA: (0.0, 0.1, 0.2), ORACLE: (0.6, 0.9, 0.9), GROUPS: (0.4, 0.7, 0.7)}  # by seed


@pytest.fixture
def runs():
    return [
        RunResult(name, seed, {"language_first_accuracy": value, "language_accuracy": value, "form_accuracy": 0.5})
        for name, values in ACCURACY.items()
        for seed, value in enumerate(values)
    ]


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_split_has_its_measures_and_the_midpoint_of_each_seed(runs):
    results = split_runs(runs, "language")
    assert results[0] == RunResult(LORA, 0, {"first_accuracy": 0.0, "accuracy": 0.0})
    middle = [run.measures["accuracy"] for run in results if run.variant == HALFWAY]
    assert middle == pytest.approx([0.3, 0.5, 0.55])
    assert split_runs(runs, "department") == []
    without_oracle = [run for run in runs if run.variant != ORACLE]
    assert HALFWAY not in {run.variant for run in split_runs(without_oracle, "language")}


def test_differences_are_paired_with_lora_oracle_and_midpoint(runs):
    differences = summarize_split(runs, "language").differences
    for name, expected in ((LORA, (0.4, 0.6, 0.5)), (ORACLE, (-0.2, -0.2, -0.2)), (HALFWAY, (0.1, 0.2, 0.15))):
        result, by_hand = differences[name][GROUPS]["accuracy"], estimate(list(expected))
        assert (result.mean, *result.interval) == pytest.approx((by_hand.mean, *by_hand.interval))
    # Student's t with two degrees of freedom: 0.15 +- 4.303 * 0.05 / sqrt(3), so more than half of the gap is closed
    low = differences[HALFWAY][GROUPS]["accuracy"].interval[0]
    assert low == pytest.approx(0.15 - 4.303 * 0.05 / math.sqrt(3))


def test_closed_gap_is_the_gain_divided_by_that_of_the_oracle(runs):
    summary = summarize_split(runs, "language")
    assert [closed_gap(summary, name) for name in (LORA, ORACLE, GROUPS)] == ["", "100", "71"]  # 0.5 / 0.7
    assert closed_gap(summarize_split([run for run in runs if run.variant != ORACLE], "language"), GROUPS) == ""
    equal = [replace(run, measures={"form_first_accuracy": 0.5 + 0.1 * (run.seed % 2)}) for run in runs if run.seed]
    noise = [replace(run, measures={"form_first_accuracy": 0.6}) for run in runs if run.seed == 0]
    assert closed_gap(summarize_split(equal + noise, "form"), GROUPS) == ""  # the oracle gains nothing


def test_tables_have_every_variant_and_comparison(runs):
    balance = [replace(run, variant=BASELINE) for run in runs if run.variant == LORA]
    main, comparisons = split_tables(summarize_split(runs + balance, "language"))
    assert [cells(line)[0] for line in main.splitlines()[2:]] == [LORA, ORACLE, GROUPS, BASELINE]
    header, _, *rows = (cells(line) for line in comparisons.splitlines())
    row = dict(zip(header, rows[2], strict=True))
    assert row["variant"] == GROUPS
    assert row[f"first stage, at the end minus `{LORA}`, points"].startswith("+50.0 (")
    assert row[f"first stage, at the end minus `{HALFWAY}`, points"].startswith("+15.0 (+2.6 to +27.4")
    assert row["gap closed, %"] == "71"
    assert f"accuracy minus `{BASELINE}`, points" in header
    assert len(split_tables(summarize_split(runs[:3], "language"))) == 1  # nothing to compare with


def test_report_has_the_splits_of_the_runs(runs):
    report = report_sequence([run for run in runs if run.variant != ORACLE])
    assert list(report.summary["stages"]) == ["language", "form"]
    assert report.table.count("Stages by ") == report.printed.count("Stages by ") == 2
    stored = json.loads(json.dumps(report.summary))["stages"]["language"]
    assert stored["measures"][LORA]["accuracy"]["mean"] == pytest.approx(0.1)
    assert stored["seeds"] == {LORA: 3, GROUPS: 3}
