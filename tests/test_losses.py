"""The losses against double loops and counting."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss, language_model_loss, load_balance_loss


def random_contrast(dtype=torch.float32):
    """Return inputs of two sublayers, 5 anchors, 4 experts of which one has no key, rings of 6."""
    torch.manual_seed(0)
    z = F.normalize(torch.randn(2, 5, 3, dtype=dtype), dim=-1)
    gates = torch.rand(2, 5, 4, dtype=dtype) * (torch.rand(2, 5, 4) > 0.5)
    gates[:, 0] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # only the expert without keys
    gates[:, 1] = torch.tensor([0.5, 0.0, 0.0, 0.5])  # half of the mass on it
    keys = F.normalize(torch.randn(2, 4, 6, 3, dtype=dtype), dim=-1)
    filled = torch.arange(6) < torch.tensor([[6, 2, 1, 0], [3, 6, 4, 0]])[..., None]
    return z, gates, keys, filled


def double_loop(z, gates, keys, filled, temperature):
    losses = []
    for layer in range(len(z)):
        for i in range(z.shape[1]):
            similarity, target = [], []
            for e in range(keys.shape[1]):
                n = int(filled[layer, e].sum())
                for c in range(n):
                    similarity.append(z[layer, i] @ keys[layer, e, c] / temperature)
                    target.append(gates[layer, i, e] / n)
            if sum(target) == 0:
                losses.append(torch.tensor(0.0, dtype=z.dtype))
                continue
            log_probs = torch.stack(similarity).log_softmax(0)
            losses.append(-(torch.stack(target) / sum(target) * log_probs).sum())
    return torch.stack(losses).mean()


def test_contrastive_loss_equals_a_double_loop():
    args = random_contrast()
    torch.testing.assert_close(contrastive_routing_loss(*args, 0.1), double_loop(*args, 0.1))


def test_contrastive_loss_passes_gradcheck_and_reaches_only_z():
    z, gates, keys, filled = random_contrast(torch.float64)
    z.requires_grad_(), gates.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: contrastive_routing_loss(z, gates.detach(), keys, filled, 0.1), z)
    contrastive_routing_loss(z, gates, keys, filled, 0.1).backward()
    assert gates.grad is None
    assert (z.grad[:, 0] == 0).all()  # without keys the gradient is 0 and not NaN


def test_contrastive_loss_is_log_of_the_number_of_keys_when_all_are_equal():
    keys = F.normalize(torch.ones(2, 4, 3), dim=-1)
    loss = contrastive_routing_loss(
        torch.randn(5, 3), torch.tensor([1.0, 0.0]).expand(5, 2), keys, torch.ones(2, 4, dtype=bool), 0.07
    )
    torch.testing.assert_close(loss, torch.tensor(math.log(8)))


def test_empty_queue_gives_exactly_zero_and_no_gradient():
    z, gates, keys, _ = random_contrast()
    z.requires_grad_()
    loss = contrastive_routing_loss(z, gates, keys, torch.zeros(2, 4, 6, dtype=bool), 0.1)
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


def test_the_gradient_pulls_a_token_towards_the_keys_of_its_expert():
    """A step against the gradient increases the similarity with the keys of its expert."""
    keys = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # (E, Q, Z)
    z = F.normalize(torch.ones(1, 2), dim=-1).requires_grad_()
    gates = torch.tensor([[1.0, 0.0]])
    contrastive_routing_loss(z, gates, keys, torch.ones(2, 1, dtype=bool), 0.5).backward()
    assert z.grad[0, 0] < 0 < z.grad[0, 1]


def test_balance_is_one_when_even_and_e_when_collapsed():
    even = torch.arange(4).expand(2, 3, 4)[..., :1] * 0 + torch.arange(4).repeat(6)[:6].view(2, 3, 1) % 2
    probs = torch.full((2, 3, 2), 0.5)
    mask = torch.ones(2, 3, dtype=bool)
    torch.testing.assert_close(load_balance_loss(probs, even, mask), torch.tensor(1.0))
    probs = torch.tensor([1.0, 0.0, 0.0]).expand(2, 3, 3)
    collapsed = torch.zeros(2, 3, 1, dtype=torch.long)
    torch.testing.assert_close(load_balance_loss(probs, collapsed, mask), torch.tensor(3.0))


def test_balance_equals_counting_without_padding():
    torch.manual_seed(0)
    probs = torch.randn(2, 6, 4).softmax(-1)
    expert_ids = probs.topk(2).indices
    mask = torch.rand(2, 6) > 0.4
    f, p, n = [0.0] * 4, [0.0] * 4, int(mask.sum())
    for b, t in mask.nonzero().tolist():
        for e in range(4):
            f[e] += (e in expert_ids[b, t].tolist()) / (2 * n)
            p[e] += probs[b, t, e].item() / n
    expected = 4 * sum(x * y for x, y in zip(f, p, strict=True))
    torch.testing.assert_close(load_balance_loss(probs, expert_ids, mask), torch.tensor(expected))
    probs[~mask], expert_ids[~mask] = 0.9, 0
    torch.testing.assert_close(load_balance_loss(probs, expert_ids, mask), torch.tensor(expected))


@pytest.mark.parametrize("groups", [[0, 1, 1], [0, 0, 0]])  # the second without tokens of one group
def test_balance_with_groups_is_the_mean_of_those_of_each_group(groups):
    torch.manual_seed(0)
    group = torch.tensor(groups).repeat(2, 4)  # (B, T)
    part = torch.randn(2, 12, 3).softmax(-1)
    ids, mask = part.topk(2).indices + 3 * group.unsqueeze(-1), torch.rand(2, 12) > 0.3
    is_first = (group == 0).unsqueeze(-1)
    probs = torch.cat([part * is_first, part * ~is_first], dim=-1)  # (B, T, 6)
    expected = 0.0
    for g in set(groups):
        chosen = mask & (group == g)
        expected += chosen.sum() / mask.sum() * load_balance_loss(part, ids - 3 * g, chosen)
    torch.testing.assert_close(load_balance_loss(probs, ids, mask, n_groups=2), expected)
    assert not torch.allclose(load_balance_loss(probs, ids, mask), expected)


def test_language_model_loss_equals_cross_entropy_on_all_positions():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
    targets = torch.randint(0, 11, (2, 5))
    targets[torch.rand(2, 5) > 0.5] = -100
    answers = (targets.flatten() != -100).nonzero().squeeze(1)
    expected = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(language_model_loss(hidden, head, targets, answers), expected)


class Allocated(TorchDispatchMode):
    """Count the bytes of every tensor that an operation creates: an upper bound of the peak, without noise."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.n_bytes += tensor.numel() * tensor.element_size()
        return result


def test_contrast_and_queue_take_the_same_memory_for_1k_4k_and_16k_tokens():
    """Forward, backward into the routing vectors of the anchors, and the enqueue."""
    costs = []
    for n_tokens in (1024, 4096, 16384):
        torch.manual_seed(0)
        queue = ExpertQueue(n_sublayers=1, n_experts=8, capacity=64, routing_dim=16)
        z = F.normalize(torch.randn(n_tokens, 16), dim=-1)
        gates = torch.rand(n_tokens, 8).softmax(-1)
        rows = torch.tensor(random.Random(0).sample(range(n_tokens), 128))
        with Allocated() as allocated:
            anchors = z[rows].unsqueeze(0).requires_grad_()
            loss = contrastive_routing_loss(anchors, gates[rows].unsqueeze(0), queue.keys, queue.filled(), 0.1)
            loss.backward()
            queue.enqueue(anchors.detach(), gates[rows].argmax(-1).unsqueeze(0), 8)
        costs.append(allocated.n_bytes)
    assert costs[0] > 128 * 8 * 64 * 4  # at least one similarity per anchor and key
    assert costs[0] == costs[1] == costs[2]
