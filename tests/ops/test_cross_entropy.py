"""The chunked cross-entropy against the plain form."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minidoctor.losses import language_model_loss
from minidoctor.ops import cross_entropy


@pytest.mark.parametrize("chunk_size", [2**24, 60, 1])  # one chunk, uneven chunks, one row per chunk
@pytest.mark.parametrize("trained_head", [False, True])
def test_chunked_cross_entropy_equals_the_plain_form_with_its_gradients(chunk_size, trained_head, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk_size)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    head = torch.randn(20, 8, requires_grad=trained_head)
    targets, answers = torch.randint(20, (2, 5)), torch.tensor([1, 2, 4, 5, 8, 9, 7])
    inputs = [hidden, head] if trained_head else [hidden]
    plain = F.cross_entropy(hidden.flatten(0, 1)[answers] @ head.T, targets.flatten()[answers], reduction="sum")
    ours = language_model_loss(hidden, head, targets, answers)
    torch.testing.assert_close(ours, plain)
    # Times 3: the gradient is computed in the forward pass and must be scaled in the backward pass.
    torch.testing.assert_close(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, inputs))


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation creates."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.n_elements = max(self.n_elements, tensor.numel())
        return out


def test_no_tensor_exceeds_the_chunk_size(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 6400)
    hidden, head = torch.randn(1, 500, 4, requires_grad=True), torch.randn(200, 4)
    targets = torch.randint(200, (1, 500))
    with LargestTensor() as largest:
        language_model_loss(hidden, head, targets, torch.arange(500)).backward()
    assert largest.n_elements <= 6400 < 500 * 200


def test_loss_without_answer_tokens_is_zero():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = language_model_loss(hidden, torch.randn(9, 4), torch.zeros(1, 3, dtype=torch.long), none)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
