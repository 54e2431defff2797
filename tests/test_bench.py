import json
import sys

import pytest
import torch

from minidoctor import bench, peers
from minidoctor.config import AdapterConfig, TrainConfig, run
from minidoctor.losses import language_model_loss
from minidoctor.model import Model

SHAPE = {"vocab_size": 60, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 24, "max_seq_len": 64}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SMOLLM2", bench.ModelConfig(n_layers=2, **SHAPE))


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words), "--device", "cpu", "--threads", "1"])
    run(bench.main)
    return capsys.readouterr().out


def test_training_is_compared_and_printed_as_one_object(small, monkeypatch, capsys):
    words = ["train", "--layers", 2, "--seq-len", 16, "--batch-size", 2, "--rounds", 2, "--rank", 2, "--json"]
    result = json.loads(call(monkeypatch, capsys, *words))
    assert {"ratio_to_peft", "ratio_to_mixlora", "of_floor", "moe_over_lora"} <= set(result)
    assert result["ratio_to_peft"] is None or peers.installed("transformers", "peft")
    for name in ("of_floor", "moe_over_lora", "contrast_over_none"):
        of = result[name]
        assert 0 < of["least"] <= of["median"] <= of["greatest"]
    assert result["ran"]["seq_len"] == 16


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


@pytest.mark.skipif(not bench.Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_that_of_the_steps_in_a_process_of_its_own(base_dir, monkeypatch, capsys):
    words = ["memory", "--base", base_dir, "--seq-len", 16, "--batch-size", 2, "--steps", 4, "--rank", 2, "--json"]
    result = json.loads(call(monkeypatch, capsys, *words))
    assert 0.05 < result["peak_gib"]["minidoctor"] < 3


def test_a_ratio_is_that_of_single_rounds():
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "least": 1.0, "greatest": 3.0}


def test_contenders_take_turns():
    called = []
    seconds = bench.alternate(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2, torch.device("cpu")
    )
    assert called == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]  # the first round warms up


def test_the_floor_walks_back_to_the_embeddings_and_trains_nothing():
    base = Model(bench.ModelConfig(n_layers=2, **SHAPE)).requires_grad_(False)
    batch = bench.drawn_batch(60, 2, 8)
    assert len(batch.answers) == 8
    bench.frozen_step(base, batch)
    assert all(p.grad is None for p in base.parameters())


def test_our_step_shares_the_frozen_weights_and_trains_only_its_own():
    base = Model(bench.ModelConfig(n_layers=2, **SHAPE)).requires_grad_(False)
    before = {name: p.clone() for name, p in base.named_parameters()}
    step = bench.our_step(base, AdapterConfig(4, 2, 2), TrainConfig(queue_capacity=4, queue_share=2, warmup=0))
    batch = bench.drawn_batch(60, 2, 8)
    losses = [float(step(batch).losses["lm"]) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_the_peers_have_the_same_loss_at_step_0():
    pytest.importorskip("peft")
    base = Model(bench.ModelConfig(n_layers=2, **SHAPE)).requires_grad_(False)
    adapter = AdapterConfig(4, 2, 2, targets=bench.TARGETS)
    batch = bench.drawn_batch(60, 2, 8)
    hidden, _ = base.hidden(batch.tokens)
    # They shift the labels themselves and so never learn the last token of a row.
    kept = batch.answers[batch.answers % 8 != 7]
    expected = language_model_loss(hidden, base.lm_head.weight, batch.targets, kept) / len(kept)
    makers = [peers.peft_lora] + [peers.mixlora] * peers.installed("mixlora")
    for make in makers:
        step = peers.training_step(*make(base, adapter), 1e-2, 1.0)
        first = step(batch)
        torch.testing.assert_close(first, expected)
        assert step(batch) < first
