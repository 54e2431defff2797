import torch

from minidoctor.batching import Batch
from minidoctor.router import Router
from minidoctor.study.run import contrast_in_batch


def setting(n_rows=3, n_tokens=8, n_layers=2, n_experts=4):
    """Routings of random inputs, and a batch whose second half of each row is answer."""
    torch.manual_seed(0)
    routings = [Router(6, n_experts, 2, 5)(torch.randn(n_rows, n_tokens, 6)) for _ in range(n_layers)]
    tokens = torch.zeros(n_rows, n_tokens, dtype=torch.long)
    places = torch.arange(n_rows * n_tokens).view(n_rows, n_tokens)
    return routings, Batch(tokens, tokens, tokens == 0, places[:, n_tokens // 2 :].flatten())


def plain(routings, ids, others):
    expected = []
    for routing in routings:
        z, gates = routing.z.flatten(0, 1), routing.gates.flatten(0, 1)
        first = routing.expert_ids[..., 0].flatten()
        for i in ids:
            logs = torch.stack([z[i] @ z[j] / 0.1 for j in others]).log_softmax(0)
            loss, mass = torch.tensor(0.0), 0.0
            for e in range(4):
                of_expert = [logs[k] for k, j in enumerate(others) if first[j] == e]
                if of_expert:
                    loss, mass = loss - gates[i, e] * torch.stack(of_expert).mean(), mass + gates[i, e].item()
            expected.append(loss / mass if mass else torch.tensor(0.0))
    return torch.stack(expected).mean()


def test_in_the_batch_each_anchor_meets_all_other_answer_tokens():
    routings, batch = setting()
    for n in (5, 12):  # of 12 answer tokens; where all are anchors, half of them are keys
        anchors = batch.answer_positions[torch.randperm(12)][:n]
        used = anchors[:6].tolist()
        others = [i for i in batch.answer_positions.tolist() if i not in used]
        found = contrast_in_batch(batch, routings, anchors, 0.1)
        torch.testing.assert_close(found, plain(routings, used, others))


def test_a_single_answer_token_has_nothing_to_meet():
    routings, batch = setting()
    one = batch._replace(answers=batch.answer_positions[:1])
    assert contrast_in_batch(one, routings, one.answers, 0.1).item() == 0
