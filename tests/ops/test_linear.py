"""The few-row product against F.linear."""

import pytest
import torch
import torch.nn.functional as F

from minidoctor.ops.linear import FEW_ROWS, N_PARTS, Linear, linear


@pytest.mark.parametrize("n", [1, 2, 3, 8, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("d_out", [N_PARTS, 3 * N_PARTS, 25])  # parts of one row, parts of three rows, a single part
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_equals_f_linear_for_every_number_of_rows(n, d_out, bias, dtype):
    layer = Linear(40, d_out, bias).to(dtype)
    x = torch.randn(n, 1, 40, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_only_many_rows_use_f_linear(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "linear", lambda x, *_: calls.append(len(x)))
    for n in (1, FEW_ROWS, FEW_ROWS + 1):
        linear(torch.randn(n, 4), torch.randn(N_PARTS, 4))
    assert calls == [FEW_ROWS + 1]


@pytest.mark.parametrize("n", [1, 5])
def test_gradients_reach_the_rows_and_the_weight(n):
    weight, x, seed = (torch.randn(s, dtype=torch.float64) for s in ((32, 4), (n, 4), (n, 32)))
    gradients = []
    for function in (linear, F.linear):
        inputs = [x.float().requires_grad_(), weight.float().requires_grad_()]
        gradients.append(torch.autograd.grad(function(*inputs), inputs, seed.float()))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_rows_may_be_strided():
    weight, x = torch.randn(32, 4), torch.randn(4, 3).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x[::2], weight), F.linear(x[::2], weight))
