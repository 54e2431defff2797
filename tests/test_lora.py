"""The wide LoRA against a loop over experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidoctor.lora import LoRAExperts
from minidoctor.ops.linear import linear


def loop_over_experts(layer, x, gates):
    """Compute the definition, one expert after the other."""
    y = x @ layer.weight.T
    for e in range(gates.shape[-1]):
        rows = slice(e * layer.rank, (e + 1) * layer.rank)
        a, b = layer.lora_a[rows], layer.lora_b[:, rows]
        y = y + layer.scale * gates[..., e, None] * (x @ a.T @ b.T)
    return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_wide_lora_equals_expert_loop_with_all_gradients(dtype, tolerance):
    torch.manual_seed(0)
    layer = LoRAExperts(6, 5, n_experts=3, rank=2, alpha=4.0).to(dtype)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 7, 6, dtype=dtype, requires_grad=True)
    gates = torch.rand(2, 7, 3, dtype=dtype, requires_grad=True)
    seed = torch.randn(2, 7, 5, dtype=dtype)
    results = []
    for forward in (layer, lambda x, gates: loop_over_experts(layer, x, gates)):
        y = forward(x, gates)
        results.append([y, *torch.autograd.grad(y, [x, gates, layer.lora_a, layer.lora_b], seed)])
    for ours, plain in zip(*results, strict=True):
        # Relative to the largest value: a gradient sums over 14 positions, so its rounding scales with its size.
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


def test_experts_with_gate_zero_contribute_nothing():
    torch.manual_seed(0)
    layer = LoRAExperts(6, 5, n_experts=2, rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_b)
    x, gates = torch.randn(1, 3, 6), torch.tensor([1.0, 0.0]).expand(1, 3, 2)
    before = layer(x, gates)
    with torch.no_grad():
        layer.lora_a[2:].normal_()
    assert torch.equal(layer(x, gates), before)
    with torch.no_grad():
        layer.lora_a[:2].normal_()
    assert not torch.allclose(layer(x, gates), before)


def test_one_expert_is_plain_lora_bit_for_bit():
    torch.manual_seed(0)
    layer = LoRAExperts(16, 12, n_experts=1, rank=4, alpha=8.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 7, 16)
    assert torch.equal(layer(x, torch.ones(2, 7, 1)), layer(x))
    plain = F.linear(x, layer.weight) + (8.0 / 4) * F.linear(F.linear(x, layer.lora_a), layer.lora_b)
    torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_plain_lora_is_the_same_with_and_without_gates_bit_for_bit(dtype, bias):
    layer = LoRAExperts(16, 12, n_experts=1, rank=4, alpha=6.0, bias=bias)
    layer.weight.data = layer.weight.data.to(dtype)
    if bias:
        layer.bias.data = nn.init.normal_(layer.bias.data).to(dtype)
    nn.init.normal_(layer.lora_b)
    x, seed = torch.randn(2, 7, 16, dtype=dtype, requires_grad=True), torch.randn(2, 7, 12, dtype=dtype)
    results = []
    for gates in ([], [torch.ones(2, 7, 1)]):
        y = layer(x, *gates)
        results.append([y, *torch.autograd.grad(y, [x, layer.lora_a, layer.lora_b], seed)])
    for without, with_gates in zip(*results, strict=True):
        assert torch.equal(without, with_gates)
    if dtype == torch.float32:
        plain = F.linear(x, layer.weight, layer.bias) + 6.0 / 4 * (x @ layer.lora_a.T @ layer.lora_b.T)
        torch.testing.assert_close(results[0][0], plain)


def test_a_bias_is_added_once_and_frozen():
    layer = LoRAExperts(6, 5, n_experts=3, rank=2, alpha=4.0, bias=True)
    nn.init.normal_(layer.lora_b)
    x, gates = torch.randn(2, 7, 6), torch.rand(2, 7, 3)
    torch.testing.assert_close(layer(x, gates), loop_over_experts(layer, x, gates) + layer.bias)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert LoRAExperts(6, 5, n_experts=3, rank=2, alpha=4.0).bias is None


def test_without_gates_every_expert_has_gate_one():
    layer = LoRAExperts(6, 5, n_experts=3, rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(layer(x), loop_over_experts(layer, x, torch.ones(2, 7, 3)))


def test_initial_experts_do_not_change_the_output():
    layer = LoRAExperts(6, 5, n_experts=3, rank=2, alpha=4.0)
    x = torch.randn(2, 7, 6)
    assert torch.equal(layer(x, torch.rand(2, 7, 3)), linear(x, layer.weight))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


def test_bfloat16_layer_keeps_its_experts_in_float32():
    torch.manual_seed(0)
    layer = LoRAExperts(6, 5, n_experts=3, rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_b)
    layer.weight.data = layer.weight.data.bfloat16()
    x, gates = torch.randn(2, 7, 6), torch.rand(2, 7, 3)
    y = layer(x.bfloat16(), gates)
    assert y.dtype == torch.bfloat16
    assert layer.lora_a.dtype == torch.float32
    # Three products in bfloat16, whose rounding is 2^-9 of a value.
    plain = loop_over_experts(layer.float(), x, gates)
    assert (y.float() - plain).abs().max() < 0.03 * plain.abs().max()
