import json
import shutil
import sys
from dataclasses import asdict, replace

import pytest

from minidoctor.config import UserError
from minidoctor.files.json_files import write_json
from minidoctor.study import ablation
from minidoctor.study.ablation import ablate, input_hashes, read_run, run_path
from minidoctor.study.run import RunResult
from minidoctor.study.sequence_variants import ORACLE, SEQUENCE_VARIANTS, SequenceConfig
from minidoctor.study.variants import BASELINE, LORA, QUEUE, VARIANTS, AblationConfig


def test_repeated_ablation_runs_only_missing_runs(ablation_config, tmp_path, capsys, in_this_process):
    ablate(tmp_path, [BASELINE], 1, 1, ablation_config)
    path = run_path(tmp_path, BASELINE, 0)
    first, time = json.loads(path.read_text())["run"], path.stat().st_mtime_ns
    ablate(tmp_path, [BASELINE, QUEUE], 1, 2, ablation_config)
    assert path.stat().st_mtime_ns == time
    runs = json.loads((tmp_path / "ablation.json").read_text())["runs"]
    assert [run["variant"] for run in runs] == [BASELINE, QUEUE]
    assert runs[0] == first
    assert QUEUE in capsys.readouterr().out
    assert QUEUE in (tmp_path / "table.md").read_text()


def test_runs_with_other_settings_are_rejected(ablation_config, tmp_path, monkeypatch, in_this_process):
    ablate(tmp_path, [QUEUE], 1, 1, ablation_config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(UserError, match=r"steps.*--out"):
        ablate(tmp_path, [BASELINE], 1, 1, replace(ablation_config, steps=7))
    with monkeypatch.context() as patch:  # the same paths with other content, as after `python -m data.make_base`
        patch.setattr(ablation, "input_hashes", lambda config: {"base": "", "data": "", "eval": ""})
        with pytest.raises(UserError, match=r"base, data, eval.*--out"):
            ablate(tmp_path, [BASELINE], 1, 1, ablation_config)
    monkeypatch.setitem(VARIANTS, QUEUE, replace(VARIANTS[QUEUE], contrast_weight=0.5))
    with pytest.raises(UserError, match="contrast_weight"):
        ablate(tmp_path, [BASELINE], 1, 1, ablation_config)
    monkeypatch.delitem(VARIANTS, QUEUE)
    with pytest.raises(UserError, match=run_path(tmp_path, QUEUE, 0).name):
        ablate(tmp_path, [BASELINE], 1, 1, ablation_config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


@pytest.mark.parametrize("variants", [VARIANTS, SEQUENCE_VARIANTS])
def test_every_variant_has_a_file(variants, tmp_path):
    assert len({run_path(tmp_path, name, 0) for name in variants}) == len(variants)


def test_repeated_sequence_runs_only_missing_runs(sequence_config, tmp_path, capsys, in_this_process):
    config = replace(sequence_config, steps=1, stages=("language",))
    ablate(tmp_path, [LORA], 1, 1, config)
    path = run_path(tmp_path, LORA, 0)
    time = path.stat().st_mtime_ns
    ablate(tmp_path, [LORA, ORACLE], 1, 1, config)
    assert path.stat().st_mtime_ns == time
    content = json.loads((tmp_path / "sequence.json").read_text())
    assert [run["variant"] for run in content["runs"]] == [LORA, ORACLE]
    assert content["stages"]["language"]["seeds"][ORACLE] == 1
    assert "halfway" in (tmp_path / "table.md").read_text()
    assert "Stages by language" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"stages.*--out"):
        ablate(tmp_path, [LORA], 1, 1, replace(config, stages=("form",)))


def test_runs_of_the_other_experiment_are_rejected(ablation_config, sequence_config, tmp_path, in_this_process):
    settings = asdict(replace(ablation_config, steps=1))
    sequence = SequenceConfig(**settings | {"stages": ("language",), "text_paragraphs": 0})
    path = run_path(tmp_path, LORA, 0)
    for config, other in ((AblationConfig(**settings), sequence), (sequence, AblationConfig(**settings))):
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"run": asdict(RunResult(LORA, 0, {})), **ablation.settings(LORA, config)})
        assert read_run(path, config).variant == LORA
        with pytest.raises(UserError, match="stages"):
            read_run(path, other)


@pytest.mark.parametrize("name", ["ablation.json", "table.md"])
def test_results_that_are_not_of_the_stored_runs_are_not_replaced(name, ablation_config, tmp_path, in_this_process):
    ablate(tmp_path / "a", [BASELINE], 1, 1, ablation_config)
    existing = tmp_path / "b" / name
    existing.parent.mkdir()
    existing.write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(UserError, match=name):
        ablate(tmp_path / "b", [LORA], 1, 1, ablation_config)
    assert list((tmp_path / "b").iterdir()) == [existing]
    assert existing.read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_hashes_of_the_inputs_depend_on_their_content(ablation_config, tmp_path):
    copy = shutil.copy(ablation_config.data, tmp_path / "data.jsonl")
    config = replace(ablation_config, data=str(copy))
    hashes = [input_hashes(ablation_config), input_hashes(config)]
    assert hashes[0] == hashes[1]
    copy.write_text(copy.read_text() + '{"question": "a?", "answer": "b"}\n')
    input_hashes.cache_clear()
    assert {key for key, value in input_hashes(config).items() if value != hashes[0][key]} == {"data"}


def test_evaluation_questions_without_an_answer_are_rejected(ablation_config, tmp_path, in_this_process):
    exam = {"question": "a?", "option": {"A": "b", "B": "c"}, "exam_type": "t", "exam_class": "c", "exam_subject": "s"}
    path = tmp_path / "cmb.json"
    path.write_text(json.dumps([{**exam, "question_type": "单项选择题", "id": 1}]), encoding="utf-8")
    with pytest.raises(UserError, match=r"cmb\.json"):
        ablate(tmp_path, [BASELINE], 1, 1, replace(ablation_config, eval=str(path)))


def test_failed_run_is_reported_and_does_not_stop_the_others(ablation_config, tmp_path, capsys, in_this_process):
    diverging = replace(ablation_config, lr=1e9, steps=8)  # plain LoRA has another learning rate
    with pytest.raises(UserError, match=r"1 of 2 .*\+ balance, seed 0"):
        ablate(tmp_path, [BASELINE, LORA], 1, 1, diverging)
    assert [path.stem for path in (tmp_path / "runs").iterdir()] == ["LoRA_same_trainable_parameters-0"]
    out, err = capsys.readouterr()
    assert LORA in out
    assert "+ balance, seed 0: " in err  # and its reason
    assert len(json.loads((tmp_path / "ablation.json").read_text())["runs"]) == 1
    with pytest.raises(UserError, match="1 of 1"):
        ablate(tmp_path / "all failed", [BASELINE], 1, 1, diverging)


def test_killed_process_suggests_fewer_jobs(ablation_config, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(ablation, "run_variant", lambda *_: sys.exit(-9))
    with pytest.raises(UserError, match="--jobs"):
        ablate(tmp_path, [BASELINE], 1, 1, ablation_config)


def test_fault_of_the_code_stops_with_its_traceback(ablation_config, tmp_path, monkeypatch, capsys, in_this_process):
    def broken(name, *_):
        raise ValueError("shapes differ")

    monkeypatch.setattr(ablation, "run_variant", broken)
    with pytest.raises(UserError, match="traceback"):
        ablate(tmp_path, [BASELINE, LORA], 1, 1, ablation_config)
    err = capsys.readouterr().err
    assert err.count("ValueError: shapes differ") == 1  # the second run is not started
    assert "in broken" in err
