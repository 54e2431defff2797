from dataclasses import replace

import pytest
import torch

from minidoctor.config import UserError
from minidoctor.model import adapter_state, trainable_parameters
from minidoctor.study import run as study_run
from minidoctor.study.run import run_variant
from minidoctor.study.variants import BASELINE, LORA, QUEUE, VARIANTS, Variant


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_is_measured(name, ablation_config):
    measures = run_variant(name, 0, ablation_config).measures
    assert 0 <= measures["accuracy"] <= 1
    assert measures["accuracy"] == pytest.approx((measures["free_form"] + measures["multiple_choice"]) / 2)
    assert measures["free_form"] == measures["free_form_en"]  # the multiple-choice questions are Chinese
    assert measures["nll"] > 0
    assert ("topic_bits" in measures) == (VARIANTS[name].method == "moe")
    assert run_variant(name, 0, ablation_config).measures["nll"] == measures["nll"]
    assert run_variant(name, 1, ablation_config).measures["nll"] != measures["nll"]


def test_variants_of_one_seed_share_batches_and_initial_experts(ablation_config, monkeypatch):
    steps, train_step, weight = {BASELINE: [], QUEUE: []}, study_run.train_step, "model.layers.0.mlp.up_proj.lora_a"

    def spy(model, optimizer, queue, batches, *arguments):
        steps[QUEUE if queue else BASELINE].append((batches[0].tokens, adapter_state(model)[weight].clone()))
        return train_step(model, optimizer, queue, batches, *arguments)

    monkeypatch.setattr(study_run, "train_step", spy)
    for name in steps:
        run_variant(name, 1, ablation_config)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*steps.values(), strict=True))
    assert torch.equal(*(first for (_, first), *_ in steps.values()))
    assert not torch.equal(*(last for *_, (_, last) in steps.values()))  # the contrast changes the experts


def test_full_fine_tuning_trains_every_parameter(ablation_config, model):
    measures = run_variant("full fine-tuning", 0, ablation_config).measures
    assert measures["trainable_parameters"] == sum(p.numel() for p in model.parameters())


def test_contrast_takes_its_keys_from_queue_or_batch(ablation_config, monkeypatch):
    losses = set()
    for contrast, weight in (("", 0.0), ("batch", 0.3), ("queue", 0.3)):
        monkeypatch.setitem(VARIANTS, "contrast", Variant(contrast=contrast, contrast_weight=weight))
        losses.add(run_variant("contrast", 0, ablation_config).measures["nll"])
    assert len(losses) == 3


def test_frozen_random_router_is_not_trainable(ablation_config, monkeypatch):
    trainable, make_optimizer = [], study_run.make_optimizer

    def spy(model, *arguments):
        trainable.append(set(trainable_parameters(model)))
        return make_optimizer(model, *arguments)

    monkeypatch.setattr(study_run, "make_optimizer", spy)
    for name in ("LoRA-MoE, frozen random router", "LoRA-MoE"):
        run_variant(name, 0, ablation_config)
    frozen, trained = trainable
    assert trained - frozen == {key for key in trained if ".router." in key} != set()


def test_non_finite_loss_raises_with_variant_and_seed(ablation_config, monkeypatch):
    train_step = study_run.train_step

    def spy(*arguments):
        return train_step(*arguments)._replace(losses={"lm": torch.tensor(torch.nan)})

    monkeypatch.setattr(study_run, "train_step", spy)
    with pytest.raises(UserError, match=r"LoRA, same trainable parameters, seed 3: .*--lr"):
        run_variant(LORA, 3, ablation_config)


def test_answers_beyond_the_maximum_length_raise(ablation_config):
    with pytest.raises(UserError, match=r"rows\.jsonl.*--max-seq-len 3"):
        run_variant(LORA, 3, replace(ablation_config, max_seq_len=3))


def test_loss_only_measures_the_same_loss_without_accuracies(ablation_config):
    measures = run_variant(BASELINE, 0, ablation_config).measures
    loss_only = run_variant(BASELINE, 0, replace(ablation_config, loss_only=True)).measures
    assert loss_only["nll"] == measures["nll"]
    assert not {"accuracy", "free_form", "multiple_choice"} & loss_only.keys()


def test_evaluation_rows_are_drawn_once_from_all_parts_of_the_file(ablation_config):
    rows = study_run.evaluation_rows(replace(ablation_config, eval_rows=12))
    assert rows == study_run.evaluation_rows(replace(ablation_config, eval_rows=12))
    numbers = [int("".join(filter(str.isdigit, row.question))) for row in rows]
    assert len(set(numbers)) == 12
    assert numbers == sorted(numbers)
    assert 2 < sum(number % 2 for number in numbers) < 10  # not only every second one
    assert len(study_run.evaluation_rows(replace(ablation_config, eval_rows=0))) == 24
