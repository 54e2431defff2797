"""Quantized weights against bitsandbytes and against loops over blocks and rows."""

import pytest
import torch
import torch.nn.functional as F
from paths import FIXTURES, ROOT
from torch.autograd.graph import saved_tensors_hooks

from minidoctor.files.safetensors import read_tensors
from minidoctor.ops import quantized
from minidoctor.ops.linear import Linear, join, joined_product
from minidoctor.ops.quantized import BLOCK, CHUNK, FORMS, LEVELS

KINDS = ("nf4", "nf4-double", "int8")


def quantize(weight, kind):
    form = FORMS[kind](weight.shape)
    form.store(weight)
    return form


def quantize_layer(layer, kind):
    weight = layer.weight
    layer.quantize(kind, weight.dtype, weight.device).store(weight)


def real_weights():
    """Matrices of the shipped base model."""
    tensors = read_tensors(ROOT / "data" / "base" / "model.safetensors")
    return [tensor.float() for name, tensor in tensors if name.endswith("_proj.weight")][:8]


def boundary_weights():
    """Values at the bounds between two levels and next to them, in blocks with scale 1."""
    bounds = (LEVELS[1:] + LEVELS[:-1]) / 2
    values = [bounds, torch.nextafter(bounds, torch.tensor(9.0)), torch.nextafter(bounds, torch.tensor(-9.0))]
    return F.pad(torch.cat(values), (0, BLOCK - 3 * len(bounds)), value=1.0).repeat(2, 1)


def plain_nf4(weight):
    """Return the nearest level of each weight times the scale of its block, one block at a time."""
    blocks = []
    for block in weight.flatten().split(BLOCK):
        scale = block.abs().max()
        nearest = (block[:, None] / scale - LEVELS).abs().argmin(1)
        blocks.append(LEVELS[nearest] * scale)
    return torch.cat(blocks).view(weight.shape)


def plain_int8(weight):
    rows = [(row / (row.abs().max() / 127)).round() * (row.abs().max() / 127) for row in weight]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_codes_and_scales_equal_those_of_bitsandbytes(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in (torch.randn(96, 256), torch.randn(33, 320) ** 3, boundary_weights(), *real_weights()):
        codes, state = functional.quantize_4bit(weight.to(kind), blocksize=BLOCK, quant_type="nf4")
        ours = quantize(weight.to(kind), "nf4")
        assert torch.equal(ours.codes.flatten(), codes.flatten())
        assert torch.equal(ours.scales, state.absmax)
        assert torch.equal(ours.dequantize(torch.float32), functional.dequantize_4bit(codes, state).float()) or (
            kind != torch.float32
        )


def test_nf4_codes_and_scales_equal_the_stored_ones_of_bitsandbytes():
    stored = dict(read_tensors(FIXTURES / "nf4.safetensors"))
    ours = quantize(stored["weight"], "nf4")
    assert torch.equal(ours.codes.flatten(), stored["codes"])
    assert torch.equal(ours.scales, stored["scales"])


def test_nf4_is_the_nearest_level_times_the_scale_of_the_block():
    for weight in (torch.randn(96, 128), *real_weights()[:2]):
        torch.testing.assert_close(quantize(weight, "nf4").dequantize(torch.float32), plain_nf4(weight))


def test_int8_is_the_nearest_multiple_of_the_scale_of_the_row():
    for weight in (torch.randn(50, 30), *real_weights()[:2]):
        torch.testing.assert_close(quantize(weight, "int8").dequantize(torch.float32), plain_int8(weight))


def test_double_quantization_changes_the_scales_by_at_most_half_a_step():
    weight = torch.randn(512, 200)
    plain, double = quantize(weight, "nf4"), quantize(weight, "nf4-double")
    assert torch.equal(plain.codes, double.codes)
    error = double.block_scales() - plain.scales
    steps = double.scales.expand(-1, 256).flatten()[: len(error)]
    assert error.abs().max() > 0
    assert (error.abs() <= steps / 2 + 1e-6).all()
    n_bytes = {w: sum(x.nbytes for x in w.state_dict().values()) / weight.numel() for w in (plain, double)}
    assert n_bytes[plain] == 0.5625
    assert n_bytes[double] < 0.52


@pytest.mark.parametrize("kind", KINDS)
def test_large_weight_is_quantized_in_chunks_with_the_same_result(kind, monkeypatch):
    weight = torch.randn(24, 160)
    assert weight.numel() < CHUNK
    whole = quantize(weight, kind).state_dict()
    monkeypatch.setattr(quantized, "CHUNK", 1000)
    parts = quantize(weight, kind).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 64), (5, 13), (1, 1)])
def test_zeros_and_partial_blocks_are_kept(kind, shape):
    weight = torch.randn(shape)
    weight[0] = 0
    result = quantize(weight, kind).dequantize(torch.float32)
    assert result.shape == shape
    assert result[0].abs().max() <= (0 if kind == "int8" else weight.abs().max())
    assert (result - weight).abs().max() <= 0.2 * weight.abs().max()
    assert torch.equal(quantize(torch.zeros(shape), kind).dequantize(torch.float32), torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_product_and_gradient_are_those_of_the_dequantized_weight(kind, dtype):
    bias = dtype != torch.bfloat16  # added after rounding, in F.linear before
    layer, x, seed = Linear(64, 10, bias), torch.randn(2, 7, 64, dtype=dtype), torch.randn(2, 7, 10, dtype=dtype)
    quantize_layer(layer.to(dtype), kind)
    dense = layer.dense_weight(dtype)
    results = []
    for product in (layer, lambda x: F.linear(x, dense, layer.bias)):
        rows = x.clone().requires_grad_()
        y = product(rows)
        results.append((y, torch.autograd.grad(y, rows, seed)[0]))
    torch.testing.assert_close(results[0], results[1])
    assert layer.weight.shape == (0, 64)
    assert not torch.equal(dense, torch.zeros_like(dense))


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_saved_for_the_backward_pass(kind):
    weight, x, saved = quantize(torch.randn(10, 64), kind), torch.randn(3, 64, requires_grad=True), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda _: None):
        weight(x)
    assert saved == []


def make_layers(kind, d_in=64, bias=True):
    layers = [Linear(d_in, d_out, bias).requires_grad_(False) for d_out in (32, 16, 16)]
    for layer in layers:
        if kind:
            quantize_layer(layer, kind)
    return layers


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_joined_product_equals_the_products_of_the_layers(kind, bias):
    layers, x = make_layers(kind, bias=bias), torch.randn(2, 5, 64)
    expected = [layer(x) for layer in layers]
    assert joined_product(layers, x) is None
    join(layers)
    products = joined_product(layers, x)
    torch.testing.assert_close(products, expected)
    torch.testing.assert_close([layer(x) for layer in layers], expected)
    with torch.enable_grad():
        assert joined_product(layers, x) is None


@torch.no_grad()
def test_joined_weights_are_views_of_one_matrix():
    layers = make_layers(None)
    weights = [layer.weight.clone() for layer in layers]
    join(layers)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert storages == {layers[0].joined.untyped_storage().data_ptr()}
    assert layers[0].joined.untyped_storage().nbytes() == 4 * 64 * 64
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, weight)
        assert isinstance(layer.weight, torch.nn.Parameter)
        assert not layer.weight.requires_grad


@torch.no_grad()
def test_converted_layers_are_no_longer_joined():
    layers, x = make_layers(None), torch.randn(2, 64)
    expected = [layer(x) for layer in layers]
    join(layers)
    layers[0].double()
    assert joined_product(layers, x.double()) is None
    torch.testing.assert_close(layers[0](x.double()).float(), expected[0])


@pytest.mark.parametrize(("kind", "d_in"), [("nf4-double", 64), ("nf4", 30)])
def test_weights_whose_blocks_continue_in_the_next_layer_are_not_joined(kind, d_in):
    layers = make_layers(kind, d_in)
    before = [layer.dense_weight(torch.float32) for layer in layers]
    join(layers)
    assert all(layer.rows is None for layer in layers)
    assert all(torch.equal(layer.dense_weight(torch.float32), w) for layer, w in zip(layers, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_product_equals_the_eager_one(kind):
    layer, x = Linear(64, 16).requires_grad_(False), torch.randn(3, 64, requires_grad=True)
    quantize_layer(layer, kind)
    expected = layer(x)
    compiled = torch.compile(layer, dynamic=True)(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(expected.sum(), x))


@torch.no_grad()
def test_compiled_int8_product_of_one_row_equals_the_eager_one():
    layer = Linear(64, 16).requires_grad_(False)
    quantize_layer(layer, "int8")
    compiled = torch.compile(layer, dynamic=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 1, 64, dtype=dtype)
        layer.to(dtype)
        y = compiled(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, layer(x))
