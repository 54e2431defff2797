import pytest
import torch
from torch.nn import init

from minidoctor.bench import baselines
from minidoctor.bench.implementations import (
    LoopExperts,
    loop_over_experts,
    make_base,
    make_frozen_step,
    make_step,
    random_batch,
    share_weights,
)
from minidoctor.bench.options import FEED_FORWARD, SHAPES, BenchConfig
from minidoctor.config import QUANTIZATIONS, TARGETS, AdapterConfig, ModelConfig, TrainConfig
from minidoctor.lora import LoRAExperts
from minidoctor.losses import language_model_loss
from minidoctor.model import Model
from minidoctor.ops.linear import join_projections

SHAPE = ModelConfig(60, 16, 2, 2, 1, 8, 24, 64)


@pytest.fixture
def base():
    return Model(SHAPE).requires_grad_(False)


def test_frozen_step_backpropagates_to_the_embeddings_and_trains_nothing(base, monkeypatch):
    batch, gradients = random_batch(60, 2, 8), []
    block = type(base.model.layers[0])
    monkeypatch.setattr(block, "forward", spy_on_input_gradient(block.forward, gradients))
    make_frozen_step(base)(batch)
    assert [gradient.shape for gradient in gradients] == [(2, 8, 16)] * 2  # of the inputs of both blocks
    assert all(p.grad is None for p in base.parameters())


def spy_on_input_gradient(forward, gradients):
    def spy(block, x, *arguments):
        x.register_hook(gradients.append)
        return forward(block, x, *arguments)

    return spy


def test_make_step_trains_the_adapter_and_leaves_the_base_unchanged(base):
    before = {name: p.clone() for name, p in base.named_parameters()}
    step = make_step(
        base, AdapterConfig(4, 2, 2, targets=tuple(TARGETS)), TrainConfig(queue_capacity=4, queue_share=2, warmup=0)
    )
    batch = random_batch(60, 2, 8)
    assert len(batch.answer_positions) == 8  # half of the tokens
    losses = [float(step(batch).losses["lm"]) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_loop_over_experts_equals_wide_experts(base):
    model = share_weights(base, AdapterConfig(4, 2, 2, targets=("v_proj", *FEED_FORWARD)))
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            init.normal_(layer.lora_b, std=0.1)
    batch = random_batch(60, 2, 8)
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
def test_shapes_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = Model(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize("name", ["peft_lora", "mixlora"])
def test_baseline_step_starts_at_the_loss_of_the_base(name, base):
    pytest.importorskip("transformers")
    pytest.importorskip(name.split("_")[0])
    batch = random_batch(60, 2, 8)
    hidden, _ = base.hidden(batch.tokens)
    # transformers shifts labels by one position and does not learn the last token of a row.
    positions = batch.answer_positions[batch.answer_positions % 8 != 7]
    expected = language_model_loss(hidden, base.lm_head.weight, batch.targets, positions) / len(positions)
    adapter = AdapterConfig(4, 2, 2, targets=FEED_FORWARD)
    step = baselines.make_step(*getattr(baselines, name)(base, adapter), TrainConfig(lr=1e-2))
    first = step(batch)
    torch.testing.assert_close(first, expected)
    assert step(batch) < first


def test_qlora_step_trains_on_a_base_in_nf4(base):
    pytest.importorskip("transformers"), pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    adapter, batch = AdapterConfig(1, 1, 2, targets=FEED_FORWARD), random_batch(60, 2, 8)
    losses = []
    for nf4 in (False, True):
        model, trainable = baselines.peft_lora(base, adapter, nf4)
        step = baselines.make_step(model, trainable, TrainConfig(lr=1e-2))
        losses.append([float(step(batch)) for _ in range(3)])
        assert {p.dtype for p in model.base_model.model.model.layers.parameters() if not p.requires_grad} == (
            {torch.uint8, torch.float32} if nf4 else {torch.float32}
        )
    assert losses[1][0] != losses[0][0]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.05)  # NF4 has 16 levels
    assert losses[1][2] < losses[1][0]


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_shared_model_has_the_quantized_and_joined_weights_of_its_base(quantize, monkeypatch):
    monkeypatch.setitem(SHAPES, "smollm2", ModelConfig(60, 64, 1, 4, 2, 16, 96))
    base = make_base(BenchConfig(quantize=quantize, device="cpu"))
    join_projections(base)
    model, tokens = share_weights(base, AdapterConfig(4, 2, 2, targets=FEED_FORWARD)), torch.randint(60, (2, 8))
    layers = [m.model.layers[0].mlp.up_proj for m in (base, model)]
    assert layers[0].quantized is layers[1].quantized
    assert layers[0].joined is layers[1].joined
    assert (base.lm_head.quantized is not None) == (quantize == "int8")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], base(tokens)[0])


@pytest.mark.parametrize("switch", [{}, {"qk_norm": True}, {"qkv_bias": True}, {"window": 3}])
def test_transformers_model_computes_the_same_logits(switch):
    pytest.importorskip("transformers")
    model = Model(ModelConfig(60, 16, 2, 2, 1, 8, 24, 64, **switch)).requires_grad_(False)
    tokens = torch.randint(60, (2, 8))
    torch.testing.assert_close(baselines.transformers_model(model).eval()(tokens).logits, model(tokens)[0])
