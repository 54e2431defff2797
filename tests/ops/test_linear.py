import pytest
import torch
import torch.nn.functional as F

from minidoctor.ops.linear import FEW_ROWS, N_PARTS, Linear, linear


@pytest.mark.parametrize("n", [1, 2, 3, 8, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("d_out", [N_PARTS, 3 * N_PARTS, 25])  # in parts of one row and of three, and in one part
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_rows_are_multiplied_as_many_are(n, d_out, bias, dtype):
    layer = Linear(40, d_out, bias).to(dtype)
    x = torch.randn(n, 1, 40, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_few_rows_take_another_way_than_many(monkeypatch):
    ways = []
    monkeypatch.setattr(F, "linear", lambda x, *_: ways.append(len(x)))
    for n in (1, FEW_ROWS, FEW_ROWS + 1):
        linear(torch.randn(n, 4), torch.randn(N_PARTS, 4))
    assert ways == [FEW_ROWS + 1]


@pytest.mark.parametrize("n", [1, 5])
def test_gradients_reach_the_rows_and_the_weight(n):
    weight, x, seed = (torch.randn(s, dtype=torch.float64) for s in ((32, 4), (n, 4), (n, 32)))
    found = []
    for function in (product, F.linear):
        inputs = [x.float().requires_grad_(), weight.float().requires_grad_()]
        found.append(torch.autograd.grad(function(*inputs), inputs, seed.float()))
    torch.testing.assert_close(found[0], found[1])


def test_rows_that_do_not_lie_side_by_side():
    weight, x = torch.randn(32, 4), torch.randn(4, 3).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x[::2], weight), F.linear(x[::2], weight))
