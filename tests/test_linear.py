import pytest
import torch
import torch.nn.functional as F

from minidoctor.linear import FEW, Linear, product


@pytest.mark.parametrize("n", [1, 2, 3, 8, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_rows_are_multiplied_as_many_are(n, bias, dtype):
    layer = Linear(40, 24, bias).to(dtype)
    x = torch.randn(n, 1, 40, dtype=dtype)
    # Both paths are tried: the sum over 40 products is made in another order.
    assert (x.numel() > FEW) == (n == 300)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("n", [1, 5])
def test_gradients_reach_the_rows_and_the_weight(n):
    weight, x, seed = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (n, 4), (n, 6)))
    found = []
    for function in (product, F.linear):
        inputs = [x.float().requires_grad_(), weight.float().requires_grad_()]
        found.append(torch.autograd.grad(function(*inputs), inputs, seed.float()))
    torch.testing.assert_close(found[0], found[1])


def test_rows_that_do_not_lie_side_by_side():
    weight, x = torch.randn(6, 4), torch.randn(4, 3).T
    torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    torch.testing.assert_close(product(x[::2], weight), F.linear(x[::2], weight))
