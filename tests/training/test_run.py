import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT
from tqdm import tqdm

import train as program_file
from minidoctor import step as step_file
from minidoctor.checkpoints.adapters import ADAPTER, CONFIG, load_adapted_model
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import QUANTIZATIONS, UserError
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import adapter_state
from minidoctor.training import run
from minidoctor.training.log import METRICS
from minidoctor.training.report import REPORT
from minidoctor.training.start import start_or_resume
from minidoctor.training.state import STATE, RunState, read_state


def metrics_rows(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, ON_GPU])])
def test_ten_steps_equal_five_resumed_for_five_bit_for_bit(
    train_run, tmp_path, signal_in_step, read_run, device, quantize
):
    whole = train_run(out=str(tmp_path / "whole"), device=device, quantize=quantize)
    with signal_in_step(4):
        resumed = train_run(out=str(tmp_path / "resumed"), device=device, quantize=quantize)
    assert read_state(resumed).step == 5
    assert not (resumed / REPORT).exists()
    run.train(start_or_resume({"out": str(resumed), "resume": True}))
    assert read_run(resumed) == read_run(whole)
    assert json.loads((resumed / REPORT).read_text())["steps"] == 10


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_adapter(make_config, adapter, tmp_path):
    config = make_config(steps=60, save_every=1, log_every=1)
    settings = dataclasses.asdict(config) | dataclasses.asdict(adapter) | {"targets": ",".join(adapter.targets)}
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "out" if value is not False
    ]

    def start(out, *more):
        command = [sys.executable, "train.py", "--out", str(out), *more]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # products this small lose time with a second one
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=quiet, stderr=quiet)

    assert start(tmp_path / "whole", *flags).wait() == 0
    draw, out = random.Random(0), tmp_path / "killed"
    process = start(out, *flags)
    for step in (0, 1, 15, 30):
        while not (out / STATE).exists() or read_state(out).step < step:  # readable at any moment
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(draw.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert read_state(out).step < 60
        process = start(out, "--resume")
    assert process.wait() == 0
    load_adapted_model(config.base, out)
    assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_a_non_finite_loss_stops_the_run_and_is_never_saved(train_run, tmp_path, monkeypatch):
    lm_loss, calls = step_file.language_model_loss, itertools.count()

    def overflows_in_step_six(*args):
        return lm_loss(*args) * (torch.inf if next(calls) == 6 else 1.0)

    monkeypatch.setattr(step_file, "language_model_loss", overflows_in_step_six)
    with pytest.raises(UserError, match=r"step 6: loss, lm, grad_norm .*lower --lr"):
        train_run(steps=50, log_every=4, save_every=4)
    out = tmp_path / "run"
    assert read_state(out).step == 4
    assert all(tensor.isfinite().all() for _, tensor in read_tensors(out / STATE))
    assert [row["step"] for row in metrics_rows(out)] == list(range(6))


@pytest.mark.parametrize("quantize", QUANTIZATIONS[1:])
def test_quantized_base_is_reported_recorded_and_learned_on(train_run, base_dir, tmp_path, capsys, quantize):
    frozen = sum(p.numel() for p in load_model(base_dir).parameters())
    adapters, reports = [], []
    for name in ("none", quantize):
        out = train_run(out=str(tmp_path / name), quantize=name, steps=40)
        assert json.loads((out / CONFIG).read_text())["base"].get("quantize", "none") == name
        rows = metrics_rows(out)
        assert rows[-1]["lm"] < 0.9 * rows[0]["lm"]
        adapters.append((out / ADAPTER).read_bytes())
        reports.append(capsys.readouterr().out)
    assert adapters[0] != adapters[1]
    assert f"frozen parameters are quantized to {quantize}" in reports[1]
    counts = [int(re.search(r": ([\d,]+) frozen and", report)[1].replace(",", "")) for report in reports]
    head = load_model(base_dir).lm_head.weight.numel()
    assert counts == [frozen, frozen + head * (quantize == "int8")]  # int8 copies the tied output layer
    model = load_adapted_model(base_dir, tmp_path / quantize, quantize="none")
    assert model(torch.ones(1, 3, dtype=torch.long))[0].isfinite().all()


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_non_finite_base_is_rejected_by_tensor_name_before_training(train_run, base_dir, tmp_path, value, quantize):
    base = shutil.copytree(base_dir, tmp_path / "base")
    tensors = dict(read_tensors(base / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    write_tensors(base / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.") as raised:
        train_run(base=str(base), quantize=quantize)
    assert "--lr" not in str(raised.value)
    assert not (tmp_path / "run" / STATE).exists()


def test_training_learns_and_logs_every_step(train_run, data):
    out = train_run(steps=60, eval=str(data), batch_size=8)
    report = json.loads((out / REPORT).read_text())
    assert report["eval_after"]["nll"] < 0.5 * report["eval_before"]["nll"]
    for summary in (report["eval_before"], report["eval_after"]):
        assert {"accuracy", "n", "nll", "languages"} <= set(summary)
        assert set(summary["languages"]) == {"en", "zh"}
        assert summary["n"] == sum(part["n"] for part in summary["languages"].values()) == 6
    assert report["tokens_per_second"] > 0
    assert report["eval_trained"] == 24
    load = torch.tensor(report["expert_load"])
    assert load.shape == (4, 4)  # attention and feed-forward of two layers
    torch.testing.assert_close(load.sum(1), torch.ones(4), rtol=0, atol=1e-3)  # stored with 4 digits
    rows = metrics_rows(out)
    assert [row["step"] for row in rows] == list(range(60))
    fill = [row["queue_fill"] for row in rows]
    assert 0 < fill[0] < fill[-1] <= 1
    assert rows[0]["contrast"] == 0 < rows[-1]["contrast"]  # an empty queue, and a filled one


def test_the_seed_determines_the_adapter(train_run, tmp_path):
    runs = (("a", 0), ("b", 0), ("c", 1))
    adapters = [(train_run(out=str(tmp_path / out), seed=seed, steps=3) / ADAPTER).read_bytes() for out, seed in runs]
    assert adapters[0] == adapters[1] != adapters[2]


def test_frozen_weights_stay_unchanged_and_every_trainable_one_changes(train_run, base_dir):
    before = load_model(base_dir).state_dict()
    model = load_adapted_model(base_dir, train_run(steps=3))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.abs().max() > 0 for tensor in adapter_state(model).values())


def test_plain_lora_trains_without_router_or_queue_and_resumes(
    make_config, tmp_path, program, signal_in_step, read_run
):
    shared = make_config()
    flags = [f"--{name}={getattr(shared, name)}" for name in ("base", "data", "lr", "warmup", "device")]
    flags += [
        f"--eval={shared.data}",
        "--batch-size=4",
        "--steps=6",
        "--save-every=4",
        "--log-every=2",
        "--n-experts=1",
    ]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert program(program_file.main, "train.py", f"--out={whole}", *flags)[0] == 0
    with signal_in_step(3):
        assert program(program_file.main, "train.py", f"--out={resumed}", *flags)[0] == 0
    assert read_state(resumed).step == 4
    assert program(program_file.main, "train.py", f"--out={resumed}", "--resume", "--n-experts=1")[0] == 0
    assert read_run(resumed) == read_run(whole)
    tensors = dict(read_tensors(whole / ADAPTER))
    assert {name.split(".")[-1] for name in tensors} == {"lora_a", "lora_b"}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert not any(name.startswith("queue.") for name, _ in read_tensors(whole / STATE))
    for row in metrics_rows(whole):
        assert not {"balance", "contrast", "queue_fill"} & set(row)
        assert row["loss"] == row["lm"]
    report = json.loads((whole / REPORT).read_text())
    assert report["expert_load"] == []
    assert report["adapter"]["top_k"] == 1
    assert report["eval_after"]["nll"] < report["eval_before"]["nll"]


def test_out_of_memory_ends_in_advice_and_the_run_continues_from_its_last_save(
    train_run, read_run, tmp_path, monkeypatch
):
    real, calls = run.train_step, itertools.count()

    def runs_out_in_step_seven(*args):
        if next(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_step", runs_out_in_step_seven)
        with pytest.raises(MemoryError, match=r"step 7 .*Tried to allocate 2\.00 GiB.*--recompute.*--resume"):
            train_run()
    out = tmp_path / "run"
    assert read_state(out).step == 5
    run.train(start_or_resume({"out": str(out), "resume": True, "recompute": True}))
    assert read_run(out) == read_run(train_run(out=str(tmp_path / "whole")))


def test_other_failures_are_not_mistaken_for_out_of_memory(train_run, monkeypatch):
    def fails(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(run, "train_step", fails)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train_run()


def test_a_value_error_in_the_router_keeps_its_traceback(make_config, program, monkeypatch):
    def fails(*args):
        raise ValueError("a fault in the router")

    config = make_config()
    flags = [f"--{name}={getattr(config, name)}" for name in ("base", "data", "eval", "out", "device")]
    code, _, err = program(program_file.main, "train.py", *flags, "--rank=0")
    assert (code, err.count("\n")) == (2, 1)
    assert "rank" in err
    monkeypatch.setattr("minidoctor.router.Router.forward", fails)
    with pytest.raises(ValueError, match="a fault in the router"):
        program(program_file.main, "train.py", *flags)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_saves_before_it_prints_to_a_closed_terminal(number, train_run, tmp_path, signal_in_step, monkeypatch):
    def write(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tqdm, "write", write)
    with signal_in_step(2, number), pytest.raises(OSError, match="Input/output"):
        train_run(log_every=100)
    assert read_state(tmp_path / "run").step == 3


def test_blocks_are_compiled_between_evaluation_and_first_step(train_run, data, monkeypatch):
    calls = []
    evaluate_rows, step = run.evaluate_rows, run.train_step
    monkeypatch.setattr(run, "compile_blocks", lambda blocks: calls.append("compile"))
    monkeypatch.setattr(run, "evaluate_rows", lambda *args: (calls.append("evaluate"), evaluate_rows(*args))[1])
    monkeypatch.setattr(run, "train_step", lambda *args: (calls.append("step"), step(*args))[1])
    train_run(steps=2, eval=str(data), compile=True)
    assert calls == ["evaluate", "compile", "step", "step", "evaluate"]


def test_an_interrupted_first_evaluation_leaves_a_hint_and_blocks_no_retry(
    make_config, adapter, data, monkeypatch, capsys, read_run
):
    def interrupted(*args):
        raise KeyboardInterrupt

    config = make_config(steps=3, eval=str(data))
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | dataclasses.asdict(adapter)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(run, "evaluate_rows", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.train(start_or_resume(flags))
        assert f"train.py --out {config.out} --resume" in capsys.readouterr().out
    run.train(start_or_resume({"out": config.out, "resume": True}))
    resumed = read_run(Path(config.out))
    assert resumed[2][-1]["step"] == 2
    again = dataclasses.replace(config, out=config.out + "-again")
    run.train(RunState(again, adapter))
    assert read_run(Path(again.out)) == resumed


def test_the_start_reports_epochs_and_memory_of_the_real_batches(train_run, rows_file, capsys):
    rows = [{"question": f"What is {word}?", "answer": "gout"} for word in ("gout", "asthma", "fever")]
    data, printed = str(rows_file(*rows)), {}
    for batch_size in (3, 3000):
        train_run(data=data, steps=6, batch_size=batch_size, out=f"{data}-{batch_size}")
        printed[batch_size] = capsys.readouterr().out.splitlines()
        assert f"{data}: 3 examples in batches of 3, 6.0 epochs" in printed[batch_size]
    memory = [next(line for line in lines if "memory of a step" in line) for lines in printed.values()]
    assert memory[0] == memory[1]


def test_the_memory_is_that_of_one_process_in_a_micro_batch(train_run, monkeypatch):
    n_rows, describe = [], run.describe

    def record(model, queue, config, n_tokens, n_answers):
        n_rows.append(n_tokens)
        return {"frozen weights": 0}

    monkeypatch.setattr(run, "estimate", record)
    monkeypatch.setattr(run, "describe", lambda *args: "".join(describe(*args[:-1], n) for n in (1, 2, 3)))
    train_run(steps=1, batch_size=4, accumulate=1)
    train_run(steps=1, batch_size=4, accumulate=2)
    longest = n_rows[0] // 4
    assert n_rows == [longest * n for n in (4, 2, 2, 2, 1, 1)]


def test_the_start_reports_a_warm_up_longer_than_the_run_and_the_size_of_the_queue(train_run, tmp_path, capsys):
    train_run(steps=3, warmup=3, contrast_warmup=4)
    out = capsys.readouterr().out
    assert "--contrast-warmup 4 is longer than the run" in out
    assert "--warmup 3" not in out
    assert "expert queue: 1 KiB" in out  # 4 sublayers, 4 experts, 4 slots of 4 float32, and 16 counters: 1,152 bytes
    train_run(steps=3, warmup=4, contrast_warmup=4, contrast_weight=0.0, out=str(tmp_path / "without"))
    out = capsys.readouterr().out
    assert "--warmup 4 is longer than the run" in out
    assert "--contrast-warmup" not in out
    assert "expert queue" not in out
