"""Bytes of tensors, counted as they are made and let go: what the contrast holds at its peak, the same on any machine.

Beneath autograd every operation passes `LiveBytes`, on the way there and on the way back. What one allocates and frees
inside itself is not seen: `python -m minidoctor.bench memory` measures the process.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss

TOKENS = (1024, 4096, 16384, 65536)  # answer tokens of the batches that are looked at


class LiveBytes(TorchDispatchMode):
    """Counts the memory of each result once, however many views of it there are, until nobody holds it any more."""

    def __init__(self, *held: Tensor):
        """`held`: tensors made before, which are to count as well."""
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0
        self.look(held)

    def look(self, results: Any) -> None:
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.sizes:  # of an empty tensor it is 0
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.look(results)
        return results


def contrast_bytes(keys: Tensor, filled: Tensor, n_anchors: int) -> int:
    """Peak of the loss and its way back for one layer's keys (E, C, Z), filled (E, C), these among it."""
    n_experts, _, routing_dim = keys.shape
    z = torch.ones(n_anchors, routing_dim, requires_grad=True)  # (n, Z)
    gates = torch.full((n_anchors, n_experts), 1 / n_experts)  # (n, E)
    with LiveBytes(keys, filled, z, gates) as live:
        contrastive_routing_loss(z, gates, keys, filled, temperature=0.1).backward()
    return live.peak


def contrast_bytes_by_tokens(
    n_tokens: Sequence[int], adapter: AdapterConfig, config: TrainConfig
) -> tuple[list[int], list[int]]:
    """Peaks for batches of so many answer tokens: with what the queue remembers of them, and with all of them as keys.

    The tokens are shared evenly among the experts, so that all places among the keys are filled. Without that the
    second is larger: all experts have as many places as the busiest.
    """
    peaks: tuple[list[int], list[int]] = ([], [])
    for n in n_tokens:
        z = torch.ones(1, n, adapter.routing_dim)  # (L, N, Z) of one layer
        experts = torch.arange(n).remainder(adapter.n_experts)[None]  # (L, N)
        for found, capacity in zip(peaks, (config.queue_capacity, -(-n // adapter.n_experts)), strict=True):
            queue = ExpertQueue(1, adapter.n_experts, capacity, adapter.routing_dim)
            queue.enqueue(z, experts, limit=capacity)
            found.append(contrast_bytes(queue.keys[0], queue.filled()[0], config.n_anchors))
    return peaks
