import dataclasses
import json
import sys

import pytest
import torch

from minidoctor.bench import __main__ as bench
from minidoctor.bench import baselines as peers
from minidoctor.bench import implementations as contenders
from minidoctor.bench.implementations import SHAPES, drawn_batch
from minidoctor.bench.memory import FORGET
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.model import Model

SHAPE = ModelConfig(60, 16, 2, 2, 1, 8, 24, 64)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SHAPES, "smollm2", SHAPE)
    monkeypatch.setitem(SHAPES, "qwen3-4b", dataclasses.replace(SHAPE, qk_norm=True))


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words), "--device", "cpu", "--threads", "1"])
    run(bench.main)
    return capsys.readouterr().out


def test_compiled_contenders_run_beside_those_that_are_not(small, monkeypatch, capsys):
    compiled = []  # what compiling does is tested with the model; here, what is compiled
    monkeypatch.setattr(contenders, "compile_blocks", compiled.append)
    words = ["--layers", 2, "--rounds", 1, "--rank", 2, "--compile", "--json"]
    training, writing = ["train", "--seq-len", 16, "--batch-size", 2], ["sample", "--new-tokens", 3]
    for of_what, n in ((training, 4), (writing, 1)):  # contrast, none, plain LoRA, frozen
        result = json.loads(call(monkeypatch, capsys, *of_what, *words))
        assert result["compiled_over_not"]["median"] > 0
        assert {"minidoctor, not compiled", "batch 1, not compiled"} & set(result["speed"])
        assert len(compiled) == n
        compiled.clear()


def test_training_is_compared_and_printed_as_one_object(small, monkeypatch, capsys):
    words = ["train", "--layers", 2, "--seq-len", 16, "--batch-size", 2, "--rounds", 2, "--rank", 2, "--json"]
    result = json.loads(call(monkeypatch, capsys, *words))
    assert {"ratio_to_peft", "ratio_to_mixlora", "of_floor", "moe_over_lora"} <= set(result)
    assert result["ratio_to_peft"] is None or peers.installed("transformers", "peft")
    for name in ("of_floor", "moe_over_lora", "contrast_over_none", "over_a_loop", "mfu"):
        of = result[name]
        assert 0 < of["least"] <= of["median"] <= of["greatest"]
    assert result["ran"]["seq_len"] == 16


def test_the_code_of_the_gpu_tables_runs_in_bfloat16_without_peers_for_another_family(small, monkeypatch, capsys):
    words = ["--shape", "qwen3-4b", "--layers", 2, "--dtype", "bfloat16", "--rounds", 1, "--json"]
    words_of_training = ["train", *words, "--seq-len", 16, "--batch-size", 2, "--recompute"]
    result = json.loads(call(monkeypatch, capsys, *words_of_training))
    assert result["ratio_to_peft"] is None
    assert result["mfu"]["median"] > 0
    result = json.loads(call(monkeypatch, capsys, "sample", *words, "--new-tokens", 3))
    assert result["dtype"] == "torch.bfloat16"
    assert result["ratio_to_transformers"] is None


def test_questions_of_a_file_are_timed_by_their_answer_tokens(base_dir, rows_file, monkeypatch, capsys):
    rows = [{"question": "gout?", "answer": "uric acid " * (1 + i % 5)} for i in range(40)]
    words = ["train", "--base", base_dir, "--data", rows_file(*rows), "--batch-size", 4, "--rounds", 1, "--rank", 2]
    assert "unit: answer tokens per second" in call(monkeypatch, capsys, *words)
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, "train", "--data", rows_file(*rows))
    assert "needs the --base" in capsys.readouterr().err


def test_sampling_and_loading_are_measured(base_dir, monkeypatch, capsys):
    result = json.loads(
        call(monkeypatch, capsys, "sample", "--base", base_dir, "--new-tokens", 3, "--rounds", 2, "--json")
    )
    assert {"ratio_to_transformers", "of_floor"} <= set(result)
    assert result["weights_gb"] > 0
    assert "first token" in call(monkeypatch, capsys, "load", "--base", base_dir, "--rounds", 1)


@pytest.mark.skipif(not FORGET.exists(), reason="Linux only")
def test_peak_memory_is_that_of_the_steps_in_a_process_of_its_own(base_dir, monkeypatch, capsys):
    words = ["memory", "--base", base_dir, "--seq-len", 16, "--batch-size", 2, "--steps", 4, "--rank", 2, "--json"]
    result = json.loads(call(monkeypatch, capsys, *words))
    assert 0.05 < result["peak_gib"]["minidoctor"] < 3
    contrast = result["contrast_mib_by_tokens"]
    assert len(set(contrast["with the queue"].values())) == 1  # flat
    assert contrast["within the batch"]["65536"] > 50 * contrast["within the batch"]["1024"]


def test_operations_of_a_step_are_those_of_its_products():
    config, adapter = SHAPE, AdapterConfig(4, 2, 2, targets=bench.TARGETS)
    base = Model(config).requires_grad_(False)
    row = drawn_batch(config.vocab_size, 1, 16)
    found = bench.operations(contenders.our_step(base, adapter, TrainConfig(contrast_weight=0)), row)
    d, f, t, n = config.dim, config.ffn_dim, 16, len(row.answers)
    attention, mlp = 2 * d * 16 + 2 * d * 8, 3 * d * f  # two heads and one key head of 8
    wide = 3 * (d + f) * 8  # A and B of four experts of rank 2
    # Forward, and back to what each product read; experts and the head (kept small) have weights' gradients as well.
    frozen = 2 * t * 2 * (2 * (attention + mlp))
    experts = 2 * t * 2 * (3 * wide)
    head = 2 * n * d * config.vocab_size * 2
    # Nothing goes back below the first feed-forward; routers are the rest, a few percent.
    assert 0.85 * (frozen + experts + head) < found < 1.1 * (frozen + experts + head)


def test_a_ratio_is_that_of_single_rounds():
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "least": 1.0, "greatest": 3.0}


def test_contenders_take_turns():
    called = []
    seconds = bench.alternate(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2, torch.device("cpu")
    )
    assert called == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]  # the first round warms up
