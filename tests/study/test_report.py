import json
import math
import random
from dataclasses import asdict

import pytest
from paths import ROOT

from minidoctor.config import UserError
from minidoctor.study.report import (
    Estimate,
    committed_table,
    estimate,
    full_report,
    markdown_table,
    read_runs,
    summarize,
)
from minidoctor.study.run import RunResult
from minidoctor.study.variants import BASELINE, LORA, QUEUE

RESULTS = ROOT / "minidoctor" / "study" / "results"


@pytest.fixture
def runs():
    """Runs whose measures depend strongly on the seed and differ by a constant between variants."""
    rng, runs = random.Random(0), []
    for seed in range(4):
        luck = rng.random()
        for name, gain in ((BASELINE, 0.0), (QUEUE, 0.02), (LORA, -0.1)):
            measures = {"accuracy": 0.4 + 0.1 * luck + gain, "nll": 1.0 - gain, "trainable_parameters": 1234}
            runs.append(RunResult(name, seed, measures))
    return runs


def test_interval_is_students_t():
    # Five values of mean 3 and standard deviation sqrt(2.5): 3 +- 2.776 sqrt(2.5 / 5)
    result = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert result.mean == 3
    assert result.interval == pytest.approx((3 - 2.776 * math.sqrt(0.5), 3 + 2.776 * math.sqrt(0.5)))
    assert estimate([0.5]) == Estimate(0.5, None)


def test_differences_are_paired_by_seed(runs):
    summary = summarize(runs)
    difference = summary.differences[BASELINE][QUEUE]["accuracy"]
    assert difference.mean == pytest.approx(0.02)
    assert difference.interval == pytest.approx((0.02, 0.02))  # the effect of the seed cancels
    low, high = summary.measures[QUEUE]["accuracy"].interval
    assert high - low > 0.01
    without_seed_0 = [run for run in runs if run.variant != BASELINE or run.seed]
    assert summarize(without_seed_0).differences[BASELINE][QUEUE]["accuracy"].mean == pytest.approx(0.02)


def test_markdown_table_contains_means_and_paired_differences(runs):
    header, rule, *rows = markdown_table(summarize(runs)).splitlines()
    titles = [title.strip() for title in header.split("|")[1:-1]]
    assert titles == ["variant", "seeds", "trainable parameters", "loss, nats", f"loss minus `{BASELINE}`, nats"]
    assert set(rule) == {"|", "-", " "}
    cells = [cell.strip() for cell in rows[1].split("|")[1:-1]]
    assert cells == [QUEUE, "4", "1,234", "0.980", "-0.020 (-0.020 to -0.020)"]
    single = markdown_table(summarize([run for run in runs if run.seed == 0])).splitlines()[3]
    assert single.split("|")[-2].strip() == "-0.020"  # no interval


def test_full_report_has_a_table_of_differences_per_baseline(runs):
    tables = full_report(summarize(runs)).split("\n\n")
    assert len(tables) == 3
    assert "±" in tables[0]
    for name, table in zip((BASELINE, LORA), tables[1:], strict=True):
        assert f"minus `{name}`" in table
    assert "+2.0 (+2.0 to +2.0)" in tables[1]


@pytest.mark.parametrize("name", ["ablation", "current_base", "rank1", "rank4", "smollm2"])
def test_committed_summaries_equal_those_of_their_runs(name):
    path = RESULTS / f"{name}.json"
    content, summary = json.loads(path.read_text(encoding="utf-8")), asdict(summarize(read_runs(path)))
    assert json.loads(json.dumps(summary)) == {key: content[key] for key in summary}
    assert committed_table(path.name).count("\n") == len(content["variants"]) + 1


def test_read_runs_rejects_other_files(tmp_path):
    (tmp_path / "a.json").write_text('{"runs": [{"variant": "+ balance", "seed": 0, "open": 0.7}]}')
    with pytest.raises(UserError, match=r"a\.json"):
        read_runs(tmp_path / "a.json")
