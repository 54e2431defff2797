import math

import pytest
import torch
import torch.nn.functional as F

from minidoctor.config import AdapterConfig
from minidoctor.data import Batch
from minidoctor.forms import Balanced, ByLabel, ByQuestion, InBatch, Outputs, balanced, contrastive_expert_loss, parted
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model
from minidoctor.router import Router


def setting(n_rows=3, n_tokens=8, n_layers=2, n_experts=4):
    """Routings of random inputs, and a batch whose second half of each row is answer."""
    torch.manual_seed(0)
    routers = [Router(6, n_experts, 2, 5) for _ in range(n_layers)]
    routings = [router(torch.randn(n_rows, n_tokens, 6)) for router in routers]
    tokens = torch.zeros(n_rows, n_tokens, dtype=torch.long)
    places = torch.arange(n_rows * n_tokens).view(n_rows, n_tokens)
    batch = Batch(tokens, tokens, tokens == 0, places[:, n_tokens // 2 :].flatten())
    return routers, routings, batch


def plain_contrast(anchors, keys, alike, temperature):
    """Mean over anchors of -sum_j target_j log softmax_j, the target even over the keys that are alike."""
    losses = []
    for i, z in enumerate(anchors):
        logs = torch.stack([z @ key / temperature for key in keys]).log_softmax(0)
        positive = [logs[j] for j in range(len(keys)) if alike(i, j)]
        losses.append(-torch.stack(positive).mean() if positive else torch.tensor(0.0))
    return torch.stack(losses).mean()


def test_in_the_batch_each_token_meets_all_others_but_the_anchors():
    _, routings, batch = setting()
    anchors = batch.answers[torch.randperm(len(batch.answers))]
    found = InBatch(0.1)(batch, routings, anchors)
    half = anchors[: len(anchors) // 2].tolist()
    others = [i for i in batch.answers.tolist() if i not in half]
    expected = []
    for routing in routings:
        z, gates = routing.z.flatten(0, 1), routing.gates.flatten(0, 1)
        first = routing.expert_ids[..., 0].flatten()
        for i in half:
            logs = torch.stack([z[i] @ z[j] / 0.1 for j in others]).log_softmax(0)
            loss, mass = torch.tensor(0.0), 0.0
            for e in range(4):
                of_expert = [logs[k] for k, j in enumerate(others) if first[j] == e]
                if of_expert:
                    loss, mass = loss - gates[i, e] * torch.stack(of_expert).mean(), mass + gates[i, e].item()
            expected.append(loss / mass if mass else torch.tensor(0.0))
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_with_enough_answers_all_anchors_are_used_and_with_one_nothing_breaks():
    _, routings, batch = setting()
    anchors, others = parted(batch, batch.answers[:5])
    assert (anchors.tolist(), len(others)) == (batch.answers[:5].tolist(), 7)
    one = batch._replace(answers=batch.answers[:1])
    for form in (InBatch(0.1), ByQuestion(0.1)):
        assert form(one, routings, one.answers).item() == 0


def test_by_question_those_of_one_question_are_alike():
    _, routings, batch = setting()
    anchors = batch.answers[torch.randperm(len(batch.answers))]
    half = anchors[: len(anchors) // 2].tolist()
    others = [i for i in batch.answers.tolist() if i not in half]
    expected = [
        plain_contrast([z[i] for i in half], [z[j] for j in others], lambda i, j: half[i] // 8 == others[j] // 8, 0.1)
        for z in (routing.z.flatten(0, 1) for routing in routings)
    ]
    torch.testing.assert_close(ByQuestion(0.1)(batch, routings, anchors), torch.stack(expected).mean())


def test_by_topic_the_keys_are_of_earlier_steps_and_alike_by_topic():
    routers, routings, batch = setting()
    form = ByLabel(0.1, n_layers=2, n_labels=3, capacity=50, routing_dim=5, share=50)
    topics = [2, 0, 2]
    form.of_row = torch.tensor(topics)
    anchors = batch.answers
    assert form(batch, routings, anchors).item() == 0  # nothing is remembered yet
    again = [router(torch.randn(3, 8, 6)) for router in routers]
    found = form(batch, again, anchors)
    ids = anchors.tolist()
    expected = [
        plain_contrast(
            [new.z.flatten(0, 1)[i] for i in ids],
            [old.z.flatten(0, 1)[j] for j in ids],
            lambda i, j: topics[ids[i] // 8] == topics[ids[j] // 8],
            0.1,
        )
        for new, old in zip(again, routings, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected).mean())
    found.backward()  # and the queue has gone on meanwhile


def test_balanced_choices_give_every_expert_its_share():
    torch.manual_seed(0)
    probs = (3 * torch.randn(2, 40, 4) + torch.tensor([4.0, 0, 0, 0])).softmax(-1)
    assert probs.mean(1)[:, 0].min() > 0.5
    even = balanced(probs, n_rounds=50)
    torch.testing.assert_close(even.sum(-1), torch.ones(2, 40))
    torch.testing.assert_close(even.mean(1), torch.full((2, 4), 0.25), atol=1e-3, rtol=0)
    # Rows and columns are scaled, nothing else: the cross ratios stay.
    cross = [p[:, 0, 0] * p[:, 1, 1] / p[:, 0, 1] / p[:, 1, 0] for p in (probs, even)]
    torch.testing.assert_close(cross[0], cross[1])


def test_balanced_contrast_reaches_the_router():
    routers, routings, batch = setting()
    form = Balanced(0.1, 2, 4, 20, 5, 20)
    form(batch, routings, batch.answers)
    form(batch, [router(torch.randn(3, 8, 6)) for router in routers], batch.answers).backward()
    assert all(router.projection.grad.abs().max() > 0 for router in routers)


def test_contrast_of_outputs_equals_a_loop_over_written_out_outputs():
    torch.manual_seed(0)
    n, n_experts, rank = 5, 4, 3
    hidden, b = torch.randn(n, n_experts, rank), torch.randn(7, n_experts * rank)
    gates = torch.zeros(n, n_experts)
    for i in range(n):
        chosen = torch.randperm(n_experts)[:2]
        gates[i, chosen] = torch.tensor([0.7, 0.3])
    expected = []
    for i in range(n):
        outputs = [b[:, e * rank : (e + 1) * rank] @ hidden[i, e] for e in range(n_experts)]
        s = [[F.cosine_similarity(p, q, dim=0).item() / 0.2 for q in outputs] for p in outputs]
        chosen = [e for e in range(n_experts) if gates[i, e] > 0]
        total = weight = 0.0
        for p in chosen:
            for q in chosen:
                if p != q:
                    negative = sum(math.exp(s[p][k]) for k in range(n_experts) if k not in chosen)
                    g = (gates[i, p] * gates[i, q]).item()
                    total -= g * math.log(math.exp(s[p][q]) / (math.exp(s[p][q]) + negative))
                    weight += g
        expected.append(total / weight)
    found = contrastive_expert_loss(hidden, b, gates, 0.2).item()
    assert found == pytest.approx(sum(expected) / n, rel=1e-4)


def test_contrast_of_outputs_is_finite_at_step_0_and_reads_the_layers_of_the_sublayers(config):
    model = Model(config, AdapterConfig(4, 2, 2))
    form = Outputs(model, 0.1)
    tokens = torch.randint(0, config.vocab_size, (2, 6))
    _, routings = model.hidden(tokens)
    batch = Batch(tokens, tokens, tokens >= 0, torch.arange(12))
    form(batch, routings, torch.arange(12)).backward()
    grads = [layer.lora_b.grad for layer in model.modules() if isinstance(layer, LoRAExperts)]
    assert len(form.layers) == 4  # o_proj and down_proj of two layers
    assert any(grad is not None for grad in grads)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
