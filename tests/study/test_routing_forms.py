import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from minidoctor.batching import IGNORE, Example, collate
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import UserError
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import load_balance_loss
from minidoctor.router import Router, Routing
from minidoctor.study.routing_forms import (
    ExpertGroups,
    ReservoirQueue,
    balance_in_use,
    balanced_assignments,
    contrast_centres,
    k_means_centres,
    mean_embeddings,
    nearest_centre,
    pair_contrast,
    prompt_mask,
    sequence_routing,
)

X = IGNORE


@pytest.fixture
def batch():
    return collate([Example([5, 6, 7, 8], [X, X, 8, 9]), Example([4, 3], [3, 2]), Example([9, 8, 7], [X, 7, X])])


def planted_features(n=24):
    """Return features of length 1 around two directions, alternating."""
    directions = torch.eye(6)[torch.arange(n) % 2]
    return F.normalize(directions + 0.2 * torch.randn(n, 6), dim=-1)


def test_prompt_ends_before_the_first_answer_position(batch):
    assert prompt_mask(batch).tolist() == [
        [True, True, False, False],
        [True, True, False, False],  # a text without a prompt: all of its tokens
        [True, False, False, False],
    ]


def test_mean_embedding_is_that_of_the_prompt_minus_that_of_the_vocabulary(model, batch):
    table = model.model.embed_tokens.weight
    features = mean_embeddings(model, batch.tokens, prompt_mask(batch))
    for feature, prompt in zip(features, ([5, 6], [4, 3], [9]), strict=True):
        expected = sum(table[i] for i in prompt) / len(prompt) - table.mean(0)
        torch.testing.assert_close(feature, expected / expected.norm())


def test_routing_in_a_group_equals_a_router_of_its_experts(base_dir, adapter):
    model = load_model(base_dir, adapter=adapter)  # 4 experts
    router, x = model.model.layers[0].mlp.router, torch.randn(2, 5, 32)
    before = router(x)
    groups = ExpertGroups(model, 2)
    groups.group = torch.tensor([1, 0])
    routing = router(x)
    assert not torch.equal(routing.gates, before.gates)
    for row, first in ((0, 2), (1, 0)):
        small = Router(32, 2, 2, 4)
        small.load_state_dict(router.state_dict() | {"embeddings": router.embeddings[first : first + 2].detach()})
        expected = small(x[row : row + 1])
        experts = slice(first, first + 2)
        torch.testing.assert_close(routing.gates[row : row + 1, :, experts], expected.gates)
        torch.testing.assert_close(routing.probs[row : row + 1, :, experts], expected.probs)
        assert torch.equal(routing.expert_ids[row : row + 1] - first, expected.expert_ids)
        assert routing.gates[row].sum().item() == pytest.approx(5)


def test_one_group_changes_nothing(base_dir, adapter):
    model, tokens = load_model(base_dir, adapter=adapter), torch.tensor([[5, 6, 7]])
    before, _ = model.hidden(tokens)
    ExpertGroups(model, 1)
    torch.testing.assert_close(model.hidden(tokens)[0], before)


@pytest.mark.parametrize(("n_groups", "key"), [(3, "n_experts"), (4, "top_k")])
def test_groups_that_the_experts_do_not_fill_are_rejected(n_groups, key, base_dir, adapter):
    with pytest.raises(UserError, match=key):
        ExpertGroups(load_model(base_dir, adapter=adapter), n_groups)


def test_balance_within_groups_is_the_mean_over_their_tokens(base_dir, adapter):
    groups = ExpertGroups(model := load_model(base_dir, adapter=adapter), 2)
    groups.group, mask = torch.tensor([1, 0, 1]), torch.rand(3, 6) < 0.8
    routing = model.model.layers[0].mlp.router(torch.randn(3, 6, 32))
    expected = 0.0
    for rows, first in (([1], 0), ([0, 2], 2)):
        probs, ids = routing.probs[rows][..., first : first + 2], routing.expert_ids[rows] - first
        expected += load_balance_loss(probs, ids, mask[rows]) * mask[rows].sum() / mask.sum()
    torch.testing.assert_close(groups.balance(routing, mask), expected)
    whole = load_balance_loss(routing.probs, routing.expert_ids, mask)
    assert whole.item() != pytest.approx(expected.item())


def make_routing(logits, top_k=2):
    """Return a routing with these logits (B, T, E)."""
    top, ids = logits.topk(top_k, dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, ids, top.softmax(-1))
    return Routing(gates, logits.softmax(-1), ids, logits)


def test_balance_in_use_leaves_unused_experts_out():
    logits, mask = torch.randn(3, 20, 5), torch.rand(3, 20) < 0.8
    routing = make_routing(logits)
    torch.testing.assert_close(balance_in_use(routing, mask), load_balance_loss(*routing[1:3], mask))  # all are used
    logits[..., 4] = -3.0  # never among the two best
    routing = make_routing(logits.requires_grad_())
    without_it = make_routing(logits[..., :4])
    losses = [balance_in_use(routing, mask), *(load_balance_loss(*r[1:3], mask) for r in (without_it, routing))]
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0].item() != pytest.approx(losses[2].item())
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0][..., 4].abs().max() for loss in losses]
    assert gradients[0] < 1e-6 < 1e-4 < gradients[2]  # the whole loss pulls the unused expert into use


def test_k_means_finds_the_best_partition():
    features = F.normalize(torch.randn(9, 3), dim=-1)

    def quality(groups):
        return sum(features[[g == k for g in groups]].sum(0).norm().item() for k in (0, 1))

    best = max(itertools.product((0, 1), repeat=9), key=quality)
    centres = k_means_centres(features, 2, seed=0, n_starts=50)
    assert quality(nearest_centre(features, centres).tolist()) == pytest.approx(quality(best))
    assert not torch.equal(centres, k_means_centres(features, 2, seed=0, n_starts=1, n_rounds=0))


def test_balanced_assignments_have_equal_totals():
    scores = torch.rand(40, 3) + torch.tensor([0.3, 0.0, 0.0])  # the first group is nearest to most
    q = balanced_assignments(scores, temperature=0.1, n_rounds=100)
    torch.testing.assert_close(q.sum(1), torch.ones(40))
    torch.testing.assert_close(q.sum(0), torch.full((3,), 40 / 3), rtol=1e-3, atol=0)
    assert (scores / 0.1).softmax(-1).sum(0)[0] > 20
    # A diagonal rescaling of exp(scores / temperature): its cross-ratios are unchanged.
    ratio = q[0, 0] * q[1, 1] / (q[0, 1] * q[1, 0])
    torch.testing.assert_close(ratio.log(), (scores[0, 0] + scores[1, 1] - scores[0, 1] - scores[1, 0]) / 0.1)


def test_contrast_of_views_finds_planted_groups():
    features = planted_features()
    views = torch.stack([F.normalize(features + 0.1 * torch.randn_like(features), dim=-1) for _ in range(2)])
    untrained, trained = (contrast_centres(views, 2, seed=3, steps=steps) for steps in (0, 60))
    groups = nearest_centre(features, trained)
    assert groups.unique().tolist() == [0, 1]
    assert len(groups[::2].unique()) == len(groups[1::2].unique()) == 1
    assert not torch.equal(untrained, trained)


def test_pair_contrast_equals_a_loop_over_pairs():
    features, keys = planted_features(4), planted_features(3)
    routing, key_routing = torch.rand(4, 2, 5), torch.rand(3, 2, 5)  # of 2 sublayers with 5 experts
    total, n = 0.0, 0
    for i in range(4):
        for other, other_routing in [
            *((features[j], routing[j]) for j in range(4) if j != i),
            *zip(keys, key_routing, strict=True),
        ]:
            similar = max(0.0, (features[i] @ other).item())
            for layer in range(2):
                alike = F.cosine_similarity(routing[i, layer], other_routing[layer], dim=0)
                total, n = total + (alike - similar) ** 2, n + 1
    torch.testing.assert_close(pair_contrast(features, routing, keys, key_routing), total / n)
    alone = pair_contrast(features, routing, keys[:0], key_routing[:0])  # an empty queue
    assert alone.isfinite()
    assert alone.item() != pytest.approx((total / n).item())


def test_routing_of_a_sequence_is_the_mean_over_its_tokens():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    routings = [make_routing(torch.randn(2, 3, 4)) for _ in range(2)]
    means = sequence_routing(routings, mask)
    for layer, routing in enumerate(routings):
        torch.testing.assert_close(means[0, layer], (routing.probs[0, 0] + routing.probs[0, 1]) / 2)
        torch.testing.assert_close(means[1, layer], routing.probs[1].mean(0))


def test_reservoir_equals_algorithm_r_on_lists():
    queue, last, rng = ReservoirQueue(2, 3, 4, 1, seed=7), ExpertQueue(2, 3, 4, 1), random.Random(7)
    rings = {(layer, e): [] for layer in range(2) for e in range(3)}
    counts = dict.fromkeys(rings, 0)
    for step in range(9):
        z, top1 = torch.randn(2, 6, 1), torch.randint(3, (2, 6))
        queue.enqueue(z, top1, 2)
        last.enqueue(z, top1, 2)
        for layer, e in rings:
            for value in z[layer, top1[layer] == e, 0].tolist()[-2:]:
                ring, counts[layer, e] = rings[layer, e], counts[layer, e] + 1
                if len(ring) < 4:
                    ring.append(value)
                elif (slot := rng.randrange(counts[layer, e])) < 4:
                    ring[slot] = value
        assert torch.equal(queue.filled(), last.filled()), step
    assert not torch.equal(queue.keys, last.keys)
    for (layer, e), ring in rings.items():
        assert queue.keys[layer, e, : len(ring), 0].tolist() == pytest.approx(ring)
        assert queue.written[layer, e] == counts[layer, e]


def test_reservoir_stores_all_ages_with_the_same_probability():
    totals = torch.zeros(2)
    for seed in range(40):
        queue = ReservoirQueue(1, 1, 8, 1, seed=seed)
        for i in range(32):
            queue.enqueue(torch.tensor([[[float(i)]]]), torch.tensor([[0]]), 1)
        totals += torch.stack([(queue.keys < 16).sum(), (queue.keys >= 16).sum()])
    # 320 stored numbers, half of them expected from the first half; the standard deviation is below 9.
    assert abs(totals[0].item() - 160) < 40
