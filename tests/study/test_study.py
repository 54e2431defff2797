import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from paths import ROOT

from minidoctor.config import AdapterConfig
from minidoctor.model import Model, adapter_state, trainable_parameters
from minidoctor.study import __main__ as study
from minidoctor.study import run as trial
from minidoctor.study.__main__ import path_of
from minidoctor.study.report import markdown, mean_of, summary_of, table
from minidoctor.study.run import BASELINE, STRONGER, VARIANTS, StudyConfig, adapter_of, run_one

QUEUE = "+ balance + contrast with the queue"


@pytest.fixture
def settings(base_dir, rows_file):
    rows = [
        {"question": f"gout {i}?", "answer": "uric acid", "topic": "ab"[i % 4 // 2]} if i % 2 else
        {"question": f"痛风 {i}？", "answer": "B", "options": {"A": "哮喘", "B": "尿酸"}, "topic": "c"}
        for i in range(24)
    ]  # fmt: skip
    path = str(rows_file(*rows))
    sizes = {"n_experts": 4, "rank": 2, "queue_capacity": 8, "targets": ("up_proj", "down_proj")}
    return StudyConfig(base=str(base_dir), data=path, eval=path, steps=4, batch_size=4, eval_rows=8, **sizes)


@pytest.fixture
def in_this_process(monkeypatch):
    """A process that imports torch takes seconds; one test has them."""
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_is_measured(name, settings):
    found = run_one(name, 0, settings)
    assert 0 <= found["right"] <= 1
    assert found["right"] == pytest.approx((found["open"] + found["choice"]) / 2)
    assert found["nll"] > 0
    assert ("topic_bits" in found) == (VARIANTS[name].experts and not VARIANTS[name].rank_like)
    assert run_one(name, 0, settings)["nll"] == found["nll"]  # the same seed, the same adapter


def test_variants_of_one_seed_see_the_same_batches_and_start_from_the_same_experts(settings, monkeypatch):
    seen, original, upper = {BASELINE: [], QUEUE: []}, trial.train_step, "model.layers.0.mlp.up_proj.lora_a"

    def spy(model, optimizer, queue, parts, *others):
        seen[QUEUE if queue else BASELINE].append((parts[0].tokens, adapter_state(model)[upper].clone()))
        return original(model, optimizer, queue, parts, *others)

    monkeypatch.setattr(trial, "train_step", spy)
    for name in seen:
        run_one(name, 1, settings)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*seen.values(), strict=True))
    assert torch.equal(*(steps[0][1] for steps in seen.values()))
    assert not torch.equal(*(steps[-1][1] for steps in seen.values()))  # and the contrast does something


def test_a_router_as_drawn_is_not_trained(settings, monkeypatch):
    trained, original = [], trial.make_optimizer

    def spy(model, *others):
        trained.append(set(trainable_parameters(model)))
        return original(model, *others)

    monkeypatch.setattr(trial, "make_optimizer", spy)
    for name in ("LoRA-MoE, router as drawn", "LoRA-MoE"):
        run_one(name, 0, settings)
    drawn, usual = trained
    assert usual - drawn == {key for key in usual if ".router." in key} != set()


def test_balance_is_off_on_or_ten_times(settings):
    weights = [
        trial.train_config(VARIANTS[name], settings, 0).balance_weight for name in ("LoRA-MoE", BASELINE, STRONGER)
    ]
    assert weights == [0, settings.balance_weight, 10 * settings.balance_weight]


def test_plain_lora_has_as_many_weights(config):
    settings = StudyConfig(n_experts=4, rank=3)
    n = {
        name: sum(
            p.numel() for p in adapter_state(Model(config, adapter_of(VARIANTS[name], settings, config))).values()
        )
        for name in ("LoRA, same trained weights", BASELINE)
    }
    one = sum(p.numel() for p in adapter_state(Model(config, AdapterConfig(1, 1, 1))).values())
    assert abs(n["LoRA, same trained weights"] - n[BASELINE]) <= one / 2
    active = adapter_of(VARIANTS["LoRA, same active weights"], settings, config)
    assert (active.n_experts, active.rank, active.alpha) == (1, 6, 12.0)


def test_the_interval_is_students():
    # Five values of mean 3 and standard deviation sqrt(2.5): 3 +- 2.776 sqrt(2.5 / 5)
    found = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3
    assert found["interval"] == pytest.approx([3 - 2.776 * math.sqrt(0.5), 3 + 2.776 * math.sqrt(0.5)])
    assert mean_of([0.5]) == {"mean": 0.5, "interval": None}


def made_runs():
    generator = torch.Generator().manual_seed(0)
    runs = []
    for seed in range(4):
        luck = torch.rand((), generator=generator).item()
        for name, gain in ((BASELINE, 0.0), (QUEUE, 0.02), ("LoRA, same trained weights", -0.1)):
            value = 0.4 + 0.1 * luck + gain
            runs.append({"variant": name, "seed": seed, "right": value, "nll": 1.0, "trained_weights": 10,
                         "step_seconds": 1.0, "peak_memory_gib": 1.0})  # fmt: skip
    return runs


def test_differences_are_taken_seed_by_seed():
    found = summary_of(made_runs())
    difference = found["differences"][BASELINE][QUEUE]["right"]
    assert difference["mean"] == pytest.approx(0.02)
    assert difference["interval"] == pytest.approx([0.02, 0.02])  # the seeds' luck cancels
    low, high = found["measures"][QUEUE]["right"]["interval"]
    assert high - low > 0.01
    assert "2.0 ±0.0" in table(found)
    titles, _, *rows = (line.split(" | ") for line in markdown(found).splitlines())
    assert all(len(row) == len(titles) for row in rows)


def test_a_study_goes_on_with_what_is_missing(settings, tmp_path, capsys, program):
    first = study.study(tmp_path / "s", [BASELINE], 1, 1, settings)
    stamp = path_of(tmp_path / "s", BASELINE, 0).stat().st_mtime_ns
    both = study.study(tmp_path / "s", [BASELINE, QUEUE], 1, 1, settings)
    assert path_of(tmp_path / "s", BASELINE, 0).stat().st_mtime_ns == stamp
    assert both["runs"][0] == first["runs"][0]
    assert json.loads((tmp_path / "s" / "study.json").read_text())["runs"] == both["runs"]
    assert QUEUE in capsys.readouterr().out
    words = ["--out", tmp_path / "s", "--base", settings.base, "--data", settings.data, "--eval", settings.eval]
    code, _, err = program(study.main, "study", *words, "--steps", 7)
    assert code == 2
    assert "a run with other settings" in err


def test_words_of_a_careless_user(program, tmp_path):
    for words, said in (
        (["--variants", "no such"], "no variant 'no such'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--seeds", "-1"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ):
        code, _, err = program(study.main, "study", "--out", tmp_path / "s", *words)
        assert code == 2
        assert said in err


def test_loss_alone_is_that_of_the_step_and_is_what_the_tables_show(settings, capsys, tmp_path, in_this_process):
    config = replace(settings, loss_only=True)
    found = study.study(tmp_path / "s", [BASELINE, QUEUE], 1, 1, config)
    base, other = found["runs"]
    assert "right" not in base
    assert base["nll"] == pytest.approx(run_one(BASELINE, 0, settings)["nll"], rel=1e-4)
    assert markdown(found).endswith(f"{other['nll'] - base['nll']:+.3f} |")  # one seed: no interval
    assert f"{other['nll'] - base['nll']:+.3f}" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_ends_no_other(settings, tmp_path, in_this_process):
    broken = replace(settings, lr=1e9, steps=8)  # not that of plain LoRA
    names = [BASELINE, "LoRA, same trained weights"]
    with pytest.raises(ValueError, match=r"1 of 2 runs failed, the others are kept: \+ balance, seed 0: .*not finite"):
        study.study(tmp_path / "s", names, 1, 1, broken)
    assert [path.stem for path in (tmp_path / "s" / "runs").iterdir()] == ["LoRA_same_trained_weights-0"]


def test_runs_of_a_variant_that_has_changed_are_refused(settings, tmp_path, monkeypatch, in_this_process):
    study.study(tmp_path / "s", [QUEUE], 1, 1, settings)
    monkeypatch.setitem(VARIANTS, QUEUE, replace(VARIANTS[QUEUE], weight=0.5))
    with pytest.raises(ValueError, match=r"other settings \(weight\)"):
        study.study(tmp_path / "s", [QUEUE], 1, 1, settings)
    monkeypatch.delitem(VARIANTS, QUEUE)
    with pytest.raises(ValueError, match="no run of a variant that there is"):
        study.study(tmp_path / "s", [BASELINE], 1, 1, settings)


def numbers_of(value):
    """All numbers of a study as the README writes them: shares in percent with one digit, nats with three."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()), set())
    if isinstance(value, list):
        return set().union(*map(numbers_of, value), set())
    if isinstance(value, int):
        return {str(value)}
    return {f"{abs(100 * value):.1f}", f"{abs(value):.3f}"} if isinstance(value, float) else set()


def stored(name):
    return json.loads((ROOT / "minidoctor" / "study" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def weights_needed(studies, name, share):
    """Trained weights for so many right open answers, by straight lines over their logarithm between the ranks."""
    points = [[of["measures"][name][key]["mean"] for key in ("trained_weights", "open")] for of in studies]
    for (fewer, low), (more, high) in pairwise(points):
        if low <= share <= high:
            return round(fewer * (more / fewer) ** ((share - low) / (high - low)), -4)
    raise AssertionError(f"{share} is not between {points}")


def test_the_readme_says_what_the_studies_found():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## Does contrast help\?\n(.*?)\n## ", readme, re.DOTALL)[1]
    small, large, low, high = map(stored, ("study", "study_smollm2", "study_rank1", "study_rank4"))
    for found in (small, low, high):
        assert summary_of(found["runs"]) == {key: found[key] for key in ("seeds", "measures", "differences")}
    assert markdown(small) in section
    # The level of the intervals, experts in all sublayers, what an interval may hold, a share to be reached
    known = {"95", "64", "0", "70"}
    for found in (small, large, low, high):
        known |= numbers_of([found["config"], found["measures"], found["differences"], found["seeds"]])
    for name in (BASELINE, "LoRA, same trained weights"):
        known.add(f"{weights_needed((low, small, high), name, 0.7):,.0f}")
    text = re.sub(r"<[^>]*>|`[^`]*`|\([^)]*\.(?:png|json|py)\)|arXiv \S+|https?://\S+|\|.*\|", "", section)
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])", text):
        assert number.rstrip(",") in known, number


def test_each_form_was_studied_with_the_best_setting_of_its_search():
    settings = {}
    for run in stored("study_search"):
        if "weight" in run:
            of_form = settings.setdefault(run["variant"], {})
            of_form.setdefault((run["weight"], run["temperature"]), {})[run["seed"]] = run["open"]
    assert len(settings) == 7
    variants = stored("study")["variants"]
    for name, tried in settings.items():
        assert len(tried) >= 8
        means = {of: sum(seeds.values()) / 3 for of, seeds in tried.items() if len(seeds) == 3}
        chosen = variants[name]["weight"], variants[name]["temperature"]
        assert means[chosen] > max(means.values()) - 0.001  # of outputs, two are alike
        if name in VARIANTS:
            assert chosen == (VARIANTS[name].weight, VARIANTS[name].temperature)
