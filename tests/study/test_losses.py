import torch

from minidoctor.router import Router
from minidoctor.study.losses import contrast_in_batch


def make_routings(n_rows=3, n_tokens=8, n_layers=2, n_experts=4):
    """Return routings of random inputs, and answer positions: the second half of each row."""
    routings = [Router(6, n_experts, 2, 5)(torch.randn(n_rows, n_tokens, 6)) for _ in range(n_layers)]
    return routings, torch.arange(n_rows * n_tokens).view(n_rows, n_tokens)[:, n_tokens // 2 :].flatten()


def contrast_by_loops(routings, anchors, keys, temperature):
    losses = []
    for routing in routings:
        z, gates = routing.z.flatten(0, 1), routing.gates.flatten(0, 1)
        top1 = routing.expert_ids[..., 0].flatten()
        for i in anchors:
            log_probs = torch.stack([z[i] @ z[j] / temperature for j in keys]).log_softmax(0)
            loss, mass = torch.tensor(0.0), 0.0
            for e in range(4):
                of_expert = [log_probs[k] for k, j in enumerate(keys) if top1[j] == e]
                if of_expert:
                    loss, mass = loss - gates[i, e] * torch.stack(of_expert).mean(), mass + gates[i, e].item()
            losses.append(loss / mass if mass else torch.tensor(0.0))
    return torch.stack(losses).mean()


def test_contrast_in_batch_equals_loops_over_anchors_and_other_answer_tokens():
    routings, positions = make_routings()
    for n in (5, 12):  # of 12 answer tokens; if all are anchors, half of them become keys
        anchors = positions[torch.randperm(12)][:n]
        used = anchors[:6].tolist()
        keys = [i for i in positions.tolist() if i not in used]
        loss = contrast_in_batch(routings, positions, anchors, 0.1)
        torch.testing.assert_close(loss, contrast_by_loops(routings, used, keys, 0.1))


def test_contrast_in_batch_of_a_single_answer_token_is_zero():
    routings, positions = make_routings()
    assert contrast_in_batch(routings, positions[:1], positions[:1], 0.1).item() == 0
