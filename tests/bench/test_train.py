from dataclasses import replace

import pytest

from minidoctor.batching import IGNORE
from minidoctor.bench import train
from minidoctor.bench.implementations import make_step, random_batch
from minidoctor.bench.options import FEED_FORWARD, BenchConfig
from minidoctor.bench.train import bench_train, count_operations, question_batches, training_steps
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig, UserError
from minidoctor.model import Model


def test_count_operations_equals_products_of_forward_and_backward():
    config, adapter = ModelConfig(60, 16, 2, 2, 1, 8, 24, 64), AdapterConfig(4, 2, 2, targets=FEED_FORWARD)
    batch = random_batch(config.vocab_size, 1, 16)
    counted = count_operations(make_step(Model(config), adapter, TrainConfig(contrast_weight=0)), batch)
    t, d, f, v, n = 16, config.dim, config.ffn_dim, config.vocab_size, len(batch.answer_positions)
    attention, feed_forward = d * 16 + 2 * d * 8 + 16 * d, 3 * d * f  # q, k and v, o: 2 query heads, 1 key head of 8
    experts, router = 3 * (d + f) * 8, d * 16 + 16 * 4  # A and B of 4 experts of rank 2 in 3 layers; P and c_e
    # A product costs 2 operations per token and weight. The backward pass needs as many for the gradient of its input,
    # and for trainable weights as many again for theirs.
    per_layer = 2 * t * (2 * (attention + feed_forward) + 3 * (experts + router))
    # Backpropagation stops at the first feed-forward: no gradients in its attention and of its input, which is
    # multiplied by W and A of gate_proj and up_proj and by P.
    not_computed = 2 * t * (attention + 2 * (d * f + d * 8) + d * 16)
    assert counted == 2 * per_layer - not_computed + 2 * 2 * n * d * v  # twice the output layer, on answers only


def test_training_steps_differ_in_contrast_experts_and_compilation(monkeypatch):
    settings = []
    monkeypatch.setattr(train, "make_step", lambda base, adapter, config, loop=False: (adapter, config, loop))
    monkeypatch.setattr(train, "make_frozen_step", lambda base, compiled: settings.append(compiled))
    monkeypatch.setattr(train.baselines, "installed", lambda *packages: False)
    steps = {name: build() for name, build in training_steps(None, BenchConfig(compile=True, rank=4)).items()}
    assert settings == [True]
    assert {name: step[0].n_experts for name, step in steps.items() if step} == {
        "minidoctor": 8,
        "minidoctor, no contrast": 8,
        "minidoctor, plain LoRA": 1,
        "minidoctor, loop over experts": 8,
        "minidoctor, not compiled": 8,
    }
    assert all(step[0].rank == 4 and step[0].targets == FEED_FORWARD for step in steps.values() if step)
    assert [name for name, step in steps.items() if step and not step[1].contrast_weight] == ["minidoctor, no contrast"]
    assert [name for name, step in steps.items() if step and step[2]] == ["minidoctor, loop over experts"]
    eager = [name for name, step in steps.items() if step and not step[1].compile]
    assert eager == ["minidoctor, loop over experts", "minidoctor, not compiled"]


@pytest.fixture
def question_config(base_dir, rows_file):
    rows = [{"question": "gout?", "answer": "uric acid " * (1 + i % 8)} for i in range(32)]
    return BenchConfig(base=str(base_dir), data=str(rows_file(*rows)), rounds=1)


def test_question_batches_are_sorted_by_length_or_shuffled(question_config):
    by_length, shuffled = question_batches(question_config)
    for batches in (by_length, shuffled):
        assert [len(batch.tokens) for batch in batches] == [4] * 8
    n_padding = [sum(int((~b.attention_mask).sum()) for b in batches) for batches in (by_length, shuffled)]
    assert n_padding[0] == 0 < n_padding[1]


def test_questions_without_an_answer_within_the_length_are_skipped(question_config, rows_file, capsys):
    rows = [{"question": "gout? " * (50 if i % 2 else 1), "answer": "uric acid"} for i in range(64)]
    batches = question_batches(replace(question_config, data=str(rows_file(*rows)), seq_len=40))
    assert all((batch.targets != IGNORE).any(1).all() for part in batches for batch in part)
    assert "32 questions without an answer within --seq-len skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match="has 0 questions, expected 32"):
        question_batches(replace(question_config, seq_len=4))


def test_only_baselines_get_shuffled_questions(question_config, monkeypatch):
    names = ["minidoctor, no contrast", "minidoctor, plain LoRA", "minidoctor, loop over experts", "frozen model"]
    padding = {name: [] for name in ["minidoctor", *names, "peft", "qlora", "mixlora"]}
    steps = {
        name: lambda values=values: lambda batch: values.append(int((~batch.attention_mask).sum()))
        for name, values in padding.items()
    }
    monkeypatch.setattr(train, "training_memory", lambda config, n: {})
    monkeypatch.setattr(train, "training_steps", lambda base, config: steps)
    bench_train(question_config)
    assert all(len(values) == 2 * 8 for values in padding.values())  # 8 batches in the warm-up and in the round
    assert [name for name, values in padding.items() if sum(values)] == ["peft", "qlora", "mixlora"]
