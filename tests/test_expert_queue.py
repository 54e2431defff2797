"""The rings against collections.deque."""

from collections import deque

import pytest
import torch

from minidoctor.expert_queue import ExpertQueue


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_queue_behaves_like_a_deque_per_layer_and_expert(limit):
    torch.manual_seed(limit)
    n_layers, n_experts, capacity = 2, 3, 4
    queue = ExpertQueue(n_layers, n_experts, capacity, 2)
    reference = [[deque(maxlen=capacity) for _ in range(n_experts)] for _ in range(n_layers)]
    for n in (5, 1, 30, 2, 0, 7, 13, 1, 40):  # empty, smaller and larger than the ring, wrapping around many times
        z, expert_ids = torch.randn(n_layers, n, 2), torch.randint(0, n_experts, (n_layers, n))
        queue.enqueue(z, expert_ids, limit)
        for layer in range(n_layers):
            for e in range(n_experts):
                vectors = [v for v, i in zip(z[layer], expert_ids[layer].tolist(), strict=True) if i == e]
                reference[layer][e].extend(vectors[-limit:])
                expected = reference[layer][e]
                assert queue.filled()[layer, e].sum() == len(expected)
                ours = queue.keys[layer, e][queue.filled()[layer, e]]
                assert sorted(ours.tolist()) == sorted(v.tolist() for v in expected)


def test_a_slot_is_overwritten_oldest_first():
    queue = ExpertQueue(1, 1, 3, 1)
    for value in range(5):
        queue.enqueue(torch.full((1, 1, 1), float(value)), torch.zeros(1, 1, dtype=torch.long), 1)
    assert queue.keys.flatten().tolist() == [3.0, 4.0, 2.0]
    assert queue.written.tolist() == [[5]]


def test_one_step_cannot_flush_a_ring():
    queue = ExpertQueue(1, 2, 4, 1)
    queue.enqueue(torch.zeros(1, 4, 1), torch.zeros(1, 4, dtype=torch.long), 4)
    queue.enqueue(torch.ones(1, 100, 1), torch.zeros(1, 100, dtype=torch.long), 1)
    assert queue.keys[0, 0].sum() == 1
    assert queue.written.tolist() == [[5, 0]]


def test_keys_are_detached():
    queue = ExpertQueue(1, 2, 4, 3)
    z = torch.randn(1, 6, 3, requires_grad=True)
    queue.enqueue(z, torch.randint(0, 2, (1, 6)), 4)
    assert not queue.keys.requires_grad


def test_the_rings_are_part_of_the_state():
    queue = ExpertQueue(1, 2, 4, 3)
    queue.enqueue(torch.randn(1, 6, 3), torch.randint(0, 2, (1, 6)), 4)
    copy = ExpertQueue(1, 2, 4, 3)
    copy.load_state_dict(queue.state_dict())
    assert set(queue.state_dict()) == {"keys", "written"}
    assert torch.equal(copy.keys, queue.keys)
    assert torch.equal(copy.filled(), queue.filled())


def test_enqueue_equals_the_loop_of_its_docstring():
    queue, n_slots, limit = ExpertQueue(2, 3, 4, 2), 4, 3
    keys, written = queue.keys.clone(), queue.written.clone()
    for n in (5, 9, 2, 17):
        z, expert_ids = torch.randn(2, n, 2), torch.randint(0, 3, (2, n))
        queue.enqueue(z, expert_ids, limit)
        for layer in range(2):
            for e in range(3):
                for vector in z[layer][expert_ids[layer] == e][-limit:]:
                    keys[layer, e, written[layer, e] % n_slots] = vector
                    written[layer, e] += 1
        assert torch.equal(queue.keys, keys)
        assert torch.equal(queue.written, written)
    assert written.min() > n_slots  # every ring wrapped around
