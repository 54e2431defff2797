import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from paths import ROOT

from data.make_text import read_table
from minidoctor.batching import IGNORE
from minidoctor.checkpoints.adapters import load_adapted_model
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import UserError
from minidoctor.questions.json_rows import parse_row
from minidoctor.questions.read import read_questions
from minidoctor.step import make_queue, train_step
from minidoctor.study import sequence
from minidoctor.study.sequence import (
    declarative_examples,
    encode_pairs,
    measure,
    run_sequence,
    stage_bits,
    stage_function,
    train_stage,
)
from minidoctor.study.sequence_variants import MOE, ORACLE, SEQUENCE_VARIANTS, SPLITS, SequenceConfig
from minidoctor.study.variants import BASELINE, LORA, QUEUE, adapter_config, train_config

LANGUAGE = {"stages": ("language",), "text_paragraphs": 0}


def make_row(question, answer, **fields):
    return parse_row({"question": question, "answer": answer, **fields}, "1")


@pytest.fixture
def pairs(sequence_config, tokenizer):
    return encode_pairs(read_questions(sequence_config.data).rows, tokenizer, sequence_config)


def test_stages_by_language_and_form():
    zh, en = make_row("痛风？", "尿酸"), make_row("Gout?", "uric acid", kind="new name")
    refusal = make_row("Weather?", "I do not know.", kind="out of scope")
    turns = [{"role": role, "content": "痛风"} for role in ("user", "assistant") * 2]
    conversation = parse_row({"messages": turns}, "2")
    rows = [zh, en, refusal, conversation]
    assert [stage_function("language", rows)(row) for row in rows] == [0, 1, 1, 0]
    assert [stage_function("form", rows)(row) for row in rows] == [0, 0, 1, 1]
    turns[0]["content"] = "Gout?"
    both = parse_row({"messages": turns}, "3")
    assert both.language == "zh"
    assert stage_function("language", rows)(both) is None  # in neither stage, or the stages overlap


def test_departments_are_split_into_halves_of_about_equal_size():
    counts = {"d": 5, "a": 3, "c": 4, "b": 6}
    rows = [make_row(f"{i}?", "x", topic=topic) for topic, n in counts.items() for i in range(n)]
    stage = stage_function("department", [*rows, make_row("?", "x")])
    assert {topic: stage(make_row("?", "x", topic=topic)) for topic in "abcd"} == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert stage(make_row("?", "x")) is stage(make_row("?", "x", topic="other")) is None


def test_shipped_questions_have_two_stages_in_every_split():
    rows = read_questions(str(ROOT / "data" / "train.jsonl")).rows
    for split in SPLITS:
        stage = stage_function(split, rows)
        sizes = Counter(stage(row) for row in rows)
        n = sizes[0] + sizes[1]  # the others have no department, or are in both languages
        assert n > len(rows) / 2, split
        assert min(sizes[0], sizes[1]) > 0.3 * n, split


def test_multiple_choice_and_truncated_prompts_are_left_out(pairs, sequence_config, tokenizer):
    rows = read_questions(sequence_config.data).rows
    assert 0 < len(pairs) < len(rows)
    assert {row.id for row, _ in pairs} == {row.id for row in rows if not row.options}
    assert encode_pairs(rows, tokenizer, replace(sequence_config, max_seq_len=3)) == []


def test_measures_equal_those_of_single_examples(base_dir, adapter_dir, pairs, sequence_config):
    model = load_adapted_model(base_dir, adapter_dir)
    examples = [example for _, example in pairs]
    for i, example in enumerate(examples[:3]):  # three that the model answers
        tokens = torch.tensor(example.tokens)
        greedy = model(tokens[None])[0][0].argmax(-1).tolist()
        targets = [g if t != IGNORE else IGNORE for g, t in zip(greedy, example.targets, strict=True)]
        examples[i] = example._replace(targets=targets)
    measured = measure(model, examples, 0)
    correct, losses, experts = 0, [], []
    for tokens, targets in sorted(examples, key=lambda example: len(example.tokens)):
        logits, routings = model(torch.tensor([tokens]))
        positions = [t for t, target in enumerate(targets) if target != IGNORE]
        correct += all(logits[0, t].argmax() == targets[t] for t in positions)
        losses += [-logits[0, t].log_softmax(-1)[targets[t]].item() for t in positions]
        experts += [[r.expert_ids[0, t, 0].item() for r in routings] for t in positions]
    assert 3 <= correct < len(examples)
    assert measured.accuracy == correct / len(examples)
    assert measured.loss == pytest.approx(sum(losses) / len(losses))
    assert measured.expert_ids[:, measured.is_answer].T.tolist() == experts
    assert measured.expert_ids.shape[1] == sum(len(example.tokens) for example in examples)


def test_information_about_the_stage_is_one_bit_for_disjoint_experts():
    first, second = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]), torch.tensor([[2, 2, 3, 3], [0, 1, 2, 3]])
    assert stage_bits(first[:1], second[:1], 4) == pytest.approx(1)
    assert stage_bits(first[1:], second[1:], 4) == pytest.approx(0)
    assert stage_bits(first, second, 4) == pytest.approx(0.5)  # mean over the sublayers


def test_text_is_that_of_the_base(sequence_config, tokenizer):
    examples = declarative_examples(tokenizer, replace(sequence_config, text_paragraphs=5))
    assert len(examples) == 5
    text = "".join(tokenizer.decode(example.tokens) for example in examples)
    names = [condition[language]["name"] for condition in read_table()[1] for language in ("en", "zh")]
    assert any(name in text for name in names)
    for tokens, targets in examples:
        assert tokens[1:] == targets[:-1]
    assert declarative_examples(tokenizer, replace(sequence_config, text_paragraphs=0)) == []


def test_every_variant_runs_and_differs_from_the_others(sequence_config):
    config, results = replace(sequence_config, **LANGUAGE), {}
    for name, variant in SEQUENCE_VARIANTS.items():
        measures = run_sequence(name, 0, config).measures
        results[name] = measures["language_first_loss"], measures["language_second_loss"]
        forgetting = measures["language_first_accuracy_midway"] - measures["language_first_accuracy"]
        assert measures["language_forgetting"] == forgetting
        assert ("language_answer_bits" in measures) == (variant.method == "moe")
    assert len(set(results.values())) == len(SEQUENCE_VARIANTS)


def test_oracle_gives_each_stage_its_experts(sequence_config, pairs):
    def entropy(counts):
        shares = [n / counts.total() for n in counts.values()]
        return -sum(share * math.log2(share) for share in shares)

    answers, tokens = Counter(), Counter()
    for row, example in pairs:
        answers[row.language] += sum(target != IGNORE for target in example.targets)
        tokens[row.language] += len(example.tokens)
    oracle, experts = (run_sequence(name, 0, replace(sequence_config, **LANGUAGE)).measures for name in (ORACLE, MOE))
    assert oracle["language_answer_bits"] == pytest.approx(entropy(answers))
    assert oracle["language_token_bits"] == pytest.approx(entropy(tokens))
    assert experts["language_answer_bits"] < 0.9 * entropy(answers)


def test_runs_of_one_seed_share_batches_and_repeat(sequence_config, monkeypatch):
    batches, config = {}, replace(sequence_config, stages=("language", "mixed"), text_paragraphs=2)

    def spy(model, optimizer, queue, micro_batches, step, train):
        batches.setdefault(model.adapter, []).append(micro_batches[0].tokens)
        return train_step(model, optimizer, queue, micro_batches, step, train)

    monkeypatch.setattr(sequence, "train_step", spy)
    first, second = (run_sequence(name, 1, config).measures for name in (LORA, BASELINE))
    plain, experts = batches.values()
    assert len(plain) == len(experts) == 4 * config.steps  # two stages, and both mixed
    assert all(torch.equal(a, b) for a, b in zip(plain, experts, strict=True))
    assert first["language_text_loss_before"] == second["language_text_loss_before"] == first["mixed_text_loss_before"]
    assert first["language_text_loss"] != first["language_text_loss_before"]
    assert "mixed_forgetting" not in first
    again = run_sequence(LORA, 1, replace(config, stages=("mixed",))).measures  # the splits do not depend on each other
    assert again["mixed_first_loss"] == first["mixed_first_loss"]
    assert run_sequence(LORA, 2, config).measures["language_first_loss"] != first["language_first_loss"]
    assert not any("mixed" in key for key in run_sequence(ORACLE, 1, config).measures)


def test_each_stage_trains_on_its_questions(sequence_config, monkeypatch):
    stages = []

    def spy(model, queue, examples, train, stage):
        stages.append((stage, examples, train.steps))
        return [0.0]

    monkeypatch.setattr(sequence, "train_stage", spy)
    run_sequence(LORA, 0, replace(sequence_config, stages=("language", "mixed"), text_paragraphs=0))
    (_, zh, n), (_, en, _), (_, both, twice) = stages
    assert [stage for stage, *_ in stages] == [0, 1, 0]
    assert (both, twice) == (zh + en, 2 * n)
    assert not any(example in en for example in zh)


def test_queue_remembers_earlier_stages(base_dir, pairs, sequence_config):
    variant, examples = SEQUENCE_VARIANTS[QUEUE], [example for _, example in pairs]
    model = load_model(base_dir, adapter=adapter_config(variant, sequence_config, load_model(base_dir).config))
    config = train_config(variant, sequence_config, 0)
    queue, written = make_queue(model, config), [0]
    for stage in (0, 1):
        train_stage(model, queue, examples, config, stage)
        written.append(int(queue.written.sum()))
    assert all(a < b for a, b in pairwise(written))


def test_missing_stage_raises_with_file_and_split(sequence_config, rows_file):
    path = str(rows_file({"question": "gout?", "answer": "uric acid"}, name="english.jsonl"))
    with pytest.raises(UserError, match=r"english\.jsonl.*language.*--stages"):
        run_sequence(LORA, 0, replace(sequence_config, data=path))


@pytest.mark.parametrize(
    ("change", "key"), [({"stages": ("year",)}, "'year'"), ({"loss_only": True}, "loss_only"), ({"steps": 0}, "steps")]
)
def test_invalid_settings_are_rejected(change, key):
    with pytest.raises(UserError, match=key):
        SequenceConfig(**change)
