"""Products of packed int8 weights against those of the dequantized weights, and the bound of their difference."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch import nn

from minidoctor.ops.compiled import compile_blocks
from minidoctor.ops.int8_product import ENGINES, PackedInt8Weight, pack_int8
from minidoctor.ops.linear import Linear, join, joined_product
from minidoctor.ops.quantized import Int8Weight

AVAILABLE = set(ENGINES) & set(torch.backends.quantized.supported_engines)
needs_fbgemm = pytest.mark.skipif("fbgemm" not in AVAILABLE, reason="needs fbgemm")


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Let an engine be the only one. That of ARM also computes on other machines."""
    if request.param not in AVAILABLE:
        pytest.skip(f"needs {request.param}")
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", [request.param])
    return request.param


def quantized_layer(d_out, d_in, bias=False):
    layer = Linear(d_in, d_out, bias).requires_grad_(False)
    weight = layer.weight
    layer.quantize("int8", torch.float32, "cpu").store(weight)
    return layer


def outlier_rows(n):
    """Rows whose largest element is a thousand times the others, as in the feed-forward layers of transformers."""
    x = torch.randn(n, 96)
    x[:, 5] = 1000 * torch.randn(n)
    return x


@pytest.mark.parametrize("digit", [None, 63], ids=["largest", "63"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_product_is_within_the_stated_bound(engine, n, digit):
    layer, x = quantized_layer(40, 96), outlier_rows(n)
    dense, plain = layer.dense_weight(torch.float32), layer(x)
    if digit:
        layer.quantized = PackedInt8Weight(layer.quantized, engine, digit)
    else:
        assert pack_int8(layer)
        assert layer.quantized.engine == engine
        digit = layer.quantized.digit
    largest = x.abs().amax(1, keepdim=True)
    bound = largest * dense.abs().sum(1) / (4 * digit**2) + 1e-6 * (x.abs() @ dense.abs().T)  # with float32 rounding
    packed = layer(x)
    assert not torch.equal(packed, plain)
    assert packed.shape == plain.shape
    assert ((packed - plain).abs() <= bound).all()
    one_digit = (x / largest * digit).round() / digit * largest
    assert ((F.linear(one_digit, dense) - plain).abs() > bound).any()


SATURATION = """
import torch
from minidoctor.ops.compiled import compile_blocks
from minidoctor.ops.int8_product import pack_int8
from minidoctor.ops.linear import Linear
layer, x = Linear(64, 16, False), 1 + torch.rand(3, 64)
layer.quantize("int8", torch.float32, "cpu").store(1 + torch.rand(16, 64))
plain = layer(x)
pack_int8(layer)
print(layer.quantized.digit)
torch.testing.assert_close(layer(x), plain, rtol=1e-3, atol=1e-3)
"""


@needs_fbgemm
@pytest.mark.slow
def test_smaller_digits_are_used_where_products_saturate():
    """Without the instructions of AVX-512, fbgemm sums pairs of products in 16 bits."""
    environment = os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    command = [sys.executable, "-c", SATURATION]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "63\n"), done.stderr


def test_product_of_a_row_does_not_depend_on_the_other_rows(engine):
    layer, x = quantized_layer(40, 96), outlier_rows(6)
    pack_int8(layer)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))
    assert torch.equal(layer(x.view(2, 3, 96)), layer(x).view(2, 3, 40))


def test_product_keeps_dtype_zeros_and_non_finite_rows(engine):
    layer = quantized_layer(40, 96)
    pack_int8(layer)
    assert layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(layer(torch.zeros(2, 96)), torch.zeros(2, 40))
    x = torch.randn(3, 96)
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    assert layer(x).isfinite().all(1).tolist() == [False, False, True]


def test_packed_weight_has_the_values_and_the_gradient_of_the_plain_one_and_no_second_copy(engine):
    layer, x, seed = quantized_layer(40, 96), torch.randn(3, 96), torch.randn(3, 40)
    plain, results = layer.quantized, []
    for pack in (False, True):
        if pack:
            assert pack_int8(layer)
            assert isinstance(layer.quantized, PackedInt8Weight)
        rows = x.clone().requires_grad_()
        y = layer(rows)
        results.append([layer.dense_weight(torch.float32), y, torch.autograd.grad(y, rows, seed)[0]])
    assert plain.codes.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weight_is_dequantized_without_an_engine(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["onednn"])
    layer, x = quantized_layer(40, 96), torch.randn(1, 96)
    expected = layer(x)
    assert not pack_int8(layer)
    assert type(layer.quantized) is Int8Weight
    assert torch.equal(layer(x), expected)
    assert not pack_int8(nn.Linear(3, 3))


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_joined_weight_is_packed_once(engine, bias):
    layers, x = [quantized_layer(d_out, 64, bias) for d_out in (32, 16, 16)], torch.randn(2, 64)
    expected = [layer(x) for layer in layers]
    join(layers)
    assert pack_int8(nn.ModuleList(layers))
    assert len({layer.quantized for layer in layers}) == 1
    torch.testing.assert_close(joined_product(layers, x), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close([layer(x) for layer in layers], expected, atol=1e-3, rtol=0)


def test_compilation_skips_packed_weights_with_a_note(engine, capsys):
    blocks = nn.ModuleList([quantized_layer(16, 64)])
    compile_blocks(blocks)
    assert capsys.readouterr().err == ""
    assert blocks[0]._compiled_call_impl is not None
    blocks = nn.ModuleList([quantized_layer(16, 64)])
    pack_int8(blocks)
    compile_blocks(blocks)
    assert "--compile" in capsys.readouterr().err
    assert blocks[0]._compiled_call_impl is None
