"""The router against its definition, token by token."""

import pytest
import torch
import torch.nn.functional as F

from minidoctor.router import Router


@pytest.fixture
def router():
    torch.manual_seed(0)
    return Router(dim=12, n_experts=5, top_k=2, routing_dim=4)


def test_routing_equals_its_definition_token_by_token(router):
    x = torch.randn(2, 3, 12)
    routing = router(x)
    for b in range(2):
        for t in range(3):
            z = router.projection @ x[b, t]
            z = z / z.norm()
            scores = torch.stack([router.scale * z @ c / c.norm() for c in router.embeddings])
            best = scores.argsort(descending=True)[:2]
            gates = torch.zeros(5)
            gates[best] = scores[best].exp() / scores[best].exp().sum()
            torch.testing.assert_close(routing.z[b, t], z)
            torch.testing.assert_close(routing.probs[b, t], scores.exp() / scores.exp().sum())
            torch.testing.assert_close(routing.gates[b, t], gates)
            assert routing.expert_ids[b, t].tolist() == best.tolist()


def test_k_gates_are_nonzero_and_sum_to_one(router):
    gates = router(torch.randn(4, 50, 12)).gates
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(4, 50))


def test_gradients_reach_all_parameters_through_the_gates(router):
    routing = router(torch.randn(4, 50, 12))
    (routing.gates * torch.randn(5)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in router.parameters())


def test_one_expert_has_gate_exactly_one():
    router = Router(dim=12, n_experts=1, top_k=1, routing_dim=4)
    assert torch.equal(router(torch.randn(2, 3, 12)).gates, torch.ones(2, 3, 1))


def test_scores_are_float32_for_a_bfloat16_model(router):
    x = torch.randn(2, 3, 12).bfloat16()
    routing = router(x)
    torch.testing.assert_close(routing.gates, router(x.float()).gates)
    assert routing.gates.dtype == torch.float32


def test_routing_ignores_the_norm_of_the_hidden_state(router):
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(router(100 * x).probs, router(x).probs)
    assert not torch.allclose(router(F.dropout(x)).probs, router(x).probs)


def test_routing_is_not_stored_on_the_module(router):
    before = set(vars(router))
    router(torch.randn(2, 3, 12))
    assert set(vars(router)) == before


def test_token_with_a_group_is_routed_as_if_there_were_no_other_experts():
    torch.manual_seed(0)
    router, x = Router(dim=12, n_experts=6, top_k=2, routing_dim=4, n_groups=2), torch.randn(2, 3, 12)
    group = torch.tensor([[0, 1, 1], [1, 0, 0]])
    routing = router(x, group)
    for g in (0, 1):
        part = Router(dim=12, n_experts=3, top_k=2, routing_dim=4)
        state = router.state_dict()
        part.load_state_dict(state | {"embeddings": state["embeddings"][3 * g : 3 * g + 3]})
        alone, is_group, others = part(x), group == g, [e for e in range(6) if e // 3 != g]
        torch.testing.assert_close(routing.gates[is_group][:, 3 * g : 3 * g + 3], alone.gates[is_group])
        torch.testing.assert_close(routing.probs[is_group][:, 3 * g : 3 * g + 3], alone.probs[is_group])
        assert torch.equal(routing.expert_ids[is_group], alone.expert_ids[is_group] + 3 * g)
        assert not routing.gates[is_group][:, others].any()
        assert not routing.probs[is_group][:, others].any()
