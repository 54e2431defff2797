import pytest
import torch
from torch.nn import init

from minidoctor.bench import baselines as peers
from minidoctor.bench.implementations import (
    SHAPES,
    LoopExperts,
    drawn_batch,
    frozen_step,
    loop_over_experts,
    our_step,
    twin,
)
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.lora import LoRAExperts
from minidoctor.losses import language_model_loss
from minidoctor.model import Model

SHAPE = ModelConfig(60, 16, 2, 2, 1, 8, 24, 64)
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def frozen():
    torch.manual_seed(0)
    return Model(SHAPE).requires_grad_(False)


def test_the_floor_walks_back_to_the_embeddings_and_trains_nothing():
    base = frozen()
    batch = drawn_batch(60, 2, 8)
    assert len(batch.answer_positions) == 8
    frozen_step(base, batch)
    assert all(p.grad is None for p in base.parameters())


def test_our_step_shares_the_frozen_weights_and_trains_only_its_own():
    base = frozen()
    before = {name: p.clone() for name, p in base.named_parameters()}
    step = our_step(base, AdapterConfig(4, 2, 2), TrainConfig(queue_capacity=4, queue_share=2, warmup=0))
    batch = drawn_batch(60, 2, 8)
    losses = [float(step(batch).losses["lm"]) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_the_peers_have_the_same_loss_at_step_0():
    pytest.importorskip("peft")
    base = frozen()
    adapter = AdapterConfig(4, 2, 2, targets=FEED_FORWARD)
    batch = drawn_batch(60, 2, 8)
    hidden, _ = base.hidden(batch.tokens)
    # They shift the labels themselves and so never learn the last token of a row.
    kept = batch.answer_positions[batch.answer_positions % 8 != 7]
    expected = language_model_loss(hidden, base.lm_head.weight, batch.targets, kept) / len(kept)
    makers = [peers.peft_lora] + [peers.mixlora] * peers.installed("mixlora")
    for make in makers:
        step = peers.training_step(*make(base, adapter), 1e-2, 1.0)
        first = step(batch)
        torch.testing.assert_close(first, expected)
        assert step(batch) < first


def test_the_loop_over_experts_computes_what_the_wide_experts_do():
    model = twin(frozen(), AdapterConfig(4, 2, 2, targets=("v_proj", *FEED_FORWARD)))
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            init.normal_(layer.lora_b, std=0.1)
    batch = drawn_batch(60, 2, 8)
    results = []
    for _ in range(2):
        model.zero_grad()
        hidden, _ = model.hidden(batch.tokens)
        language_model_loss(hidden, model.lm_head.weight, batch.targets, batch.answer_positions).backward()
        results.append((hidden, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
        loop_over_experts(model)
    assert sum(isinstance(layer, LoopExperts) for layer in model.modules()) == 2 * 4
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize(("name", "millions"), [("smollm2", 135), ("qwen3-0.6b", 596), ("qwen3-4b", 4022)])
def test_shapes_have_the_weights_that_their_names_say(name, millions):
    with torch.device("meta"):
        model = Model(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.005)
