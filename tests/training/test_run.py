import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT

import train as program_file
from minidoctor import step as the_step
from minidoctor.checkpoints.adapters import ADAPTER, load_adapted_model
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.files.safetensors import read_tensors
from minidoctor.model import adapter_state
from minidoctor.questions.rows import add_explanation
from minidoctor.training import run as train
from minidoctor.training.state import STATE, read_state

ADAPTER_CONFIG = AdapterConfig(n_experts=4, top_k=2, rank=2, alpha=4.0, routing_dim=4)


def contents(out):
    """Everything that a run leaves, except how long it took."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tensors = {name: tensor.tolist() for name, tensor in read_tensors(out / STATE)}
    return (out / ADAPTER).read_bytes(), tensors, [{**row, "seconds": 0} for row in rows]


def test_ten_steps_equal_five_resumed_for_five_bit_for_bit(make_config, tmp_path, monkeypatch):
    train.train(make_config(out=str(tmp_path / "whole")), ADAPTER_CONFIG, {})
    config = make_config(out=str(tmp_path / "parts"))

    def stop_at_five(log, step, figures, seconds):
        log.waiting.append((step, figures, seconds))
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.MetricsLog, "add", stop_at_five)
        train.train(config, ADAPTER_CONFIG, {})
    assert read_state(tmp_path / "parts")["step"] == 5
    assert not (tmp_path / "parts" / "report.json").exists()
    given = {"out": config.out, "resume": True}
    train.train(*train.start_or_resume(given))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "report.json").read_text())["steps"] == 10


def test_killed_at_any_moment_a_run_resumes_to_the_same_adapter(make_config, tmp_path):
    config = make_config(steps=60, save_every=1, log_every=1)
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**dataclasses.asdict(config), **dataclasses.asdict(ADAPTER_CONFIG)}.items()
        if name not in ("targets", "out") and value is not False
    ]

    def start(out, *more):
        command = [sys.executable, "train.py", "--out", str(out), *more]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # products this small only wait for a second one
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=quiet, stderr=quiet)

    assert start(tmp_path / "whole", *flags).wait() == 0
    rng, out = random.Random(0), tmp_path / "killed"
    process = start(out, *flags)
    for wanted in (1, 15, 30):
        while not (out / STATE).exists() or read_state(out)["step"] < wanted:  # readable at any moment
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert read_state(out)["step"] < 60
        load_adapted_model(config.base, out)
        process = start(out, "--resume")
    assert process.wait() == 0
    assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_resume_refuses_what_the_run_was_not_started_with(make_config, tmp_path, data):
    config = make_config(steps=2)
    train.train(config, ADAPTER_CONFIG, {})
    with pytest.raises(ValueError, match=r"lr is 0\.5, the run in .* was started with 0\.01"):
        train.start_or_resume({"out": config.out, "resume": True, "lr": 0.5})
    with pytest.raises(ValueError, match="holds a run already"):
        train.start_or_resume({"out": config.out})
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train.start_or_resume({"out": str(tmp_path / "nowhere"), "resume": True})
    data.write_text(data.read_text() + '{"question": "new", "answer": "row"}\n')
    with pytest.raises(ValueError, match="has changed since"):
        train.train(*train.start_or_resume({"out": config.out, "resume": True}))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(make_config, monkeypatch):
    config = make_config(steps=50, log_every=4, save_every=4)
    lm_loss, calls = the_step.language_model_loss, itertools.count()

    def overflows_at_step_six(*args):
        return lm_loss(*args) * (torch.inf if next(calls) == 6 else 1.0)

    monkeypatch.setattr(the_step, "language_model_loss", overflows_at_step_six)
    with pytest.raises(FloatingPointError, match=r"step 6: loss, lm, grad_norm not finite \(loss inf, lm inf"):
        train.train(config, ADAPTER_CONFIG, {})
    out = Path(config.out)
    assert read_state(out)["step"] == 4
    assert all(tensor.isfinite().all() for _, tensor in read_tensors(out / STATE))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6  # the steps before it


def test_training_learns_and_reports_both_evaluations(make_config, data):
    config = make_config(steps=60, eval=str(data), batch_size=8)
    train.train(config, ADAPTER_CONFIG, {})
    out = Path(config.out)
    report = json.loads((out / "report.json").read_text())
    assert report["eval_after"]["nll"] < 0.5 * report["eval_before"]["nll"]
    for summary in (report["eval_before"], report["eval_after"]):
        assert {"accuracy", "n", "nll", "languages"} <= set(summary)
        assert set(summary["languages"]) == {"en", "zh"}
        assert summary["n"] == sum(part["n"] for part in summary["languages"].values()) == 6
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(60))
    assert report["tokens_per_second"] > 0
    loads = torch.tensor(report["expert_load"])
    assert loads.shape == (4, 4)  # attention and feed-forward of two layers
    torch.testing.assert_close(loads.sum(1), torch.ones(4))


def test_same_seed_same_adapter_and_another_seed_another(make_config, tmp_path):
    adapters = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = make_config(out=str(tmp_path / name), seed=seed, steps=3)
        train.train(config, ADAPTER_CONFIG, {})
        adapters.append((tmp_path / name / ADAPTER).read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


def test_frozen_weights_stay_as_they_are(make_config):
    config = make_config(steps=3)
    before = load_model(config.base).state_dict()
    train.train(config, ADAPTER_CONFIG, {})
    model = load_adapted_model(config.base, config.out)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.abs().max() > 0 for tensor in adapter_state(model).values())


def test_plain_lora_trains_without_router_top_k_or_routing_losses_and_resumes(make_config, tmp_path, monkeypatch, data):
    shared = make_config(eval=str(data), log_every=4)
    flags = [f"--{name}={getattr(shared, name)}" for name in ("base", "data", "eval", "lr", "warmup", "device")]
    flags += ["--batch-size=4", "--steps=6", "--save-every=4", "--log-every=2", "--n-experts=1", "--rank=2"]

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        program_file.main()

    def stop_at_four(log, step, figures, seconds):
        log.waiting.append((step, figures, seconds))
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(f"--out={whole}", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train.MetricsLog, "add", stop_at_four)
        start(f"--out={parts}", *flags)
    assert read_state(parts)["step"] == 4
    start(f"--out={parts}", "--resume", "--n-experts=1")
    assert contents(parts) == contents(whole)
    tensors = dict(read_tensors(whole / ADAPTER))
    assert {name.split(".")[-1] for name in tensors} == {"lora_a", "lora_b"}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert not any(name.startswith("queue.") for name, _ in read_tensors(whole / STATE))
    for line in (whole / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert not {"balance", "contrast"} & set(row)
        assert row["loss"] == row["lm"]
    report = json.loads((whole / "report.json").read_text())
    assert report["expert_load"] == []
    assert report["adapter"]["top_k"] == 1
    assert report["eval_after"]["nll"] < report["eval_before"]["nll"]


def test_plain_lora_with_two_experts_for_a_token_is_refused():
    with pytest.raises(ValueError, match="top_k must be between 1 and n_experts=1, got 2"):
        train.start_or_resume({"n_experts": 1, "top_k": 2})


EXAM = """Question,Options,Answer,Explanation
痛风的关键检查是,"A 尿酸
B 心电图",A,关节液中可见尿酸结晶
哮喘属于哪个科,"A 风湿科
B 呼吸科",B,nan
痛风属于哪个科,"A 风湿科
B 呼吸科",nan,
"""


def test_a_benchmarks_file_is_learned_from_with_or_without_its_explanation(tmp_path, tokenizer, capsys):
    path = tmp_path / "exam.csv"
    path.write_text(EXAM, encoding="utf-8")
    rows, tested, seen = train.read_data(TrainConfig(data=str(path), eval=""))
    assert "exam.csv:6: " in capsys.readouterr().out
    assert ([row.answer for row in rows], tested, seen) == (["A", "B"], [], 0)
    assert rows[0].messages[0]["content"] == "痛风的关键检查是\nA. 尿酸\nB. 心电图"
    assert [row.messages[1]["content"] for row in rows] == ["A. 尿酸", "B. 呼吸科"]
    assert [add_explanation(row)[1]["content"] for row in rows] == ["A. 尿酸\n关节液中可见尿酸结晶", "B. 呼吸科"]


def test_questions_that_stand_in_both_files_are_said_and_left_out_on_demand(tmp_path, rows_file, capsys):
    path = tmp_path / "exam.csv"
    path.write_text(EXAM, encoding="utf-8")
    other = {"question": "高血压属于哪个科？", "answer": "心内科"}
    data = rows_file({"question": "哮喘 属于哪个科？", "answer": "呼吸科"}, other)
    config = TrainConfig(data=str(data), eval=str(path))
    rows, tested, seen = train.read_data(config)
    assert (len(rows), len(tested), seen) == (2, 2, 1)
    assert "WARNING: 1 of 2 questions" in capsys.readouterr().out
    rows, tested, seen = train.read_data(dataclasses.replace(config, leave_out_eval=True))
    assert ([row.question for row in rows], len(tested), seen) == ([other["question"]], 2, 0)
    printed = capsys.readouterr().out
    assert "left out: 1 of 2" in printed
    assert "WARNING" not in printed
    with pytest.raises(ValueError, match="no question to learn from"):
        train.read_data(TrainConfig(data=str(path), eval=str(path), leave_out_eval=True))


def test_a_run_on_a_benchmark_reports_accuracy_and_loss_and_learns_explanations(make_config, tmp_path):
    path = tmp_path / "exam.csv"
    path.write_text(EXAM, encoding="utf-8")
    losses = {}
    for explain in (False, True):
        out = tmp_path / str(explain)
        config = make_config(data=str(path), eval=str(path), out=str(out), steps=2, explain=explain, max_seq_len=100)
        train.train(config, ADAPTER_CONFIG, {})
        report = json.loads((out / "report.json").read_text())
        assert report["eval_seen"] == 2
        for part in (report["eval_before"], report["eval_after"]):
            assert (part["scoring"], part["n"], set(part["languages"])) == ("logits", 2, {"zh"})
            assert part["nll"] > 0
        losses[explain] = [json.loads(line)["lm"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[False] != losses[True]


def test_out_of_memory_ends_with_advice_and_a_state_to_go_on_from(make_config, monkeypatch, tmp_path, data):
    config = make_config(save_every=100)
    real, calls = train.train_step, itertools.count()

    def runs_out_at_step_four(*args):
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", runs_out_at_step_four)
        with pytest.raises(MemoryError, match=r"step 4, .*can be resumed; lower --batch-size .*Tried to allocate"):
            train.train(config, ADAPTER_CONFIG, {})
    assert read_state(Path(config.out))["step"] == 4
    assert len((Path(config.out) / "metrics.jsonl").read_text().splitlines()) == 4
    # With the activations computed again, as advised: the same adapter as without the failure, bit for bit.
    train.train(*train.start_or_resume({"out": config.out, "resume": True, "recompute": True}))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train.train(whole, ADAPTER_CONFIG, {})
    first, second = (dict(read_tensors(Path(one.out) / ADAPTER)) for one in (config, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_failure_is_not_taken_for_a_lack_of_memory(make_config, monkeypatch):
    def fails(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train.train(make_config(), ADAPTER_CONFIG, {})


def test_blocks_are_compiled_for_the_steps_alone_and_a_resumed_run_chooses_anew(make_config, monkeypatch, data):
    happened = []
    monkeypatch.setattr(train, "compile_blocks", lambda model: happened.append("compiled"))
    evaluate, step = train.evaluate, train.train_step
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: (happened.append("evaluated"), evaluate(*a, **k))[1])
    monkeypatch.setattr(train, "train_step", lambda *a: (happened.append("step"), step(*a))[1])
    config = make_config(steps=2, eval=str(data), compile=True)
    train.train(config, ADAPTER_CONFIG, {})
    assert happened == ["evaluated", "compiled", "step", "step", "evaluated"]
    given = {"out": config.out, "resume": True}
    assert train.start_or_resume(given)[0].compile is False
    assert train.start_or_resume({**given, "compile": True})[0].compile is True
