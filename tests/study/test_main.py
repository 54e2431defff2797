import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from paths import ROOT

from minidoctor.study import __main__ as study
from minidoctor.study.sequence_variants import GROUPS, ORACLE, SEQUENCE_VARIANTS, SPLITS
from minidoctor.study.variants import BASELINE, LORA, QUEUE, VARIANTS, AblationConfig


def flags(config):
    """Return the command-line flags of a configuration, except the switches."""
    values = {key: ",".join(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    values = {f"--{key.replace('_', '-')}": value for key, value in values.items() if not isinstance(value, bool)}
    return [word for item in values.items() for word in item]


@pytest.mark.slow
def test_program_runs_in_separate_processes(ablation_config, tmp_path):
    words = ["-m", "minidoctor.study", "--out", tmp_path, "--seeds", 1, "--variants", BASELINE, *flags(ablation_config)]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert BASELINE in done.stdout
    assert len(json.loads((tmp_path / "ablation.json").read_text())["runs"]) == 1


def test_file_names_that_are_not_utf8_are_stored(ablation_config, tmp_path, program, in_this_process):
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    name.write_bytes(Path(ablation_config.data).read_bytes())
    config = replace(ablation_config, data=str(name), loss_only=True)
    for _ in range(2):  # and the second call accepts the settings of the first
        words = ["--out", tmp_path / "out", "--variants", BASELINE, "--seeds", 1, "--loss-only", *flags(config)]
        assert program(study.main, "study", *words)[0] == 0
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["config"]["data"] == str(name)


def test_quick_selects_few_steps_and_questions(monkeypatch, program):
    calls = []
    monkeypatch.setattr(study, "ablate", lambda *arguments: calls.append(arguments))
    program(study.main, "study", "--quick")
    program(study.main, "study", "--quick", "--steps", 3, "--seeds", 1, "--variants", f"{BASELINE}; {LORA}")
    program(study.main, "study")
    (out, names, n_seeds, _, config), (_, some, one, _, changed), (_, everything, five, _, full) = calls
    assert (str(out), n_seeds, one, five) == ("study_quick", 2, 1, 5)
    assert (names, some, everything) == ([LORA, BASELINE, QUEUE], [BASELINE, LORA], list(VARIANTS))
    assert (config.steps, changed.steps, full.steps) == (12, 3, 100)
    assert (config.eval_rows, full.eval_rows) == (40, 0)


def test_sequence_selects_its_settings_and_variants(monkeypatch, program):
    calls = []
    monkeypatch.setattr(study, "ablate", lambda *arguments: calls.append(arguments))
    program(study.main, "study", "--sequence")
    program(study.main, "study", "--sequence", "--quick", "--stages", "form")
    program(study.main, "study", "--sequence", "--variants", GROUPS, "--seeds", 1)
    program(study.main, "study")
    (out, names, five, _, full), (quick_out, some, one, _, quick), (_, chosen, n, _, _), (*_, plain) = calls
    assert (str(out), str(quick_out)) == ("study_sequence", "study_sequence_quick")
    assert (names, chosen) == (list(SEQUENCE_VARIANTS), [GROUPS])
    assert {LORA, ORACLE} <= set(some) <= set(SEQUENCE_VARIANTS)
    assert (five, one, n) == (5, 1, 1)
    assert (full.steps, full.balance_weight, full.stages) == (100, 0.1, SPLITS)
    assert quick.steps < 10
    assert quick.stages == ("form",)
    assert (type(plain), plain.balance_weight) == (AblationConfig, 0.03)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--variants", "no such"], "'no such'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--seeds", "-1"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--top-k", "9"], "top_k"),
        (["--stages", "form"], "--sequence"),
        (["--sequence", "--stages", "year"], "'year'"),
        (["--sequence", "--variants", "full fine-tuning"], "full fine-tuning"),
    ],
)
def test_invalid_flags_end_in_one_line(words, key, program, tmp_path):
    code, _, err = program(study.main, "study", "--out", tmp_path / "out", *words)
    assert (code, err.count("\n"), key in err) == (2, 1, True), err
    assert not (tmp_path / "out").exists()
