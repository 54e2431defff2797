"""The expert memory queue: for each sublayer and expert, the last Q routing vectors of tokens whose top-1 it was.

Each sublayer and expert has a ring of Q slots. The n-th vector is written to slot n % Q, and a slot is filled once
n has passed it. The contrastive loss compares tokens with these keys, so its compute and its memory are fixed by L, E
and Q, for every batch size and sequence length.

A queue of past representations for contrastive learning: https://arxiv.org/abs/1911.05722, section 3.2. MoCo has one
queue of negatives. Here each key belongs to an expert, which decides for whom it is a positive.
"""

import torch
from torch import Tensor, nn


class ExpertQueue(nn.Module):
    """The rings as buffers, so that they move between devices and into checkpoints. Nothing in it is trained."""

    keys: Tensor  # (L, E, Q, Z)
    written: Tensor  # (L, E), vectors written so far

    def __init__(self, n_layers: int, n_experts: int, capacity: int, routing_dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(n_layers, n_experts, capacity, routing_dim))
        self.register_buffer("written", torch.zeros(n_layers, n_experts, dtype=torch.long))

    def filled(self) -> Tensor:
        """Return (L, E, Q), True where a key has been written."""
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)  # (Q,)
        return slots < self.written.unsqueeze(-1)  # (L, E, Q)

    @torch.no_grad()
    def enqueue(self, z: Tensor, expert_ids: Tensor, limit: int) -> None:
        """Append z (L, n, Z) to the rings of expert_ids (L, n), at most the last `limit` <= Q of each expert.

        The result is that of this loop:

            for l in range(L):
                for e in range(E):
                    for vector in z[l][expert_ids[l] == e][-limit:]:
                        keys[l, e, written[l, e] % Q] = vector
                        written[l, e] += 1

        It is computed with fixed shapes, because a boolean index makes the CPU wait for the GPU.
        """
        capacity, n = self.keys.shape[2], z.shape[1]
        limit = min(limit, capacity, n)
        experts = torch.arange(self.keys.shape[1], device=z.device)  # (E,)
        is_top1 = expert_ids.unsqueeze(1) == experts[:, None]  # (L, E, n)
        order = torch.where(is_top1, torch.arange(1, n + 1, device=z.device), 0)  # (L, E, n), 0: another expert's
        order, tokens = order.topk(limit, dim=-1)  # (L, E, limit), the latest first, then those of other experts
        valid = order > 0
        count = valid.sum(-1, keepdim=True)  # (L, E, 1)
        # The v valid tokens go to slots written ... written + v - 1 in order of arrival. The remaining entries point
        # at the following slots and rewrite their old contents, so the scatter has a fixed shape and no index occurs
        # twice.
        offset = torch.arange(limit, device=z.device)  # (limit,)
        slots = (self.written.unsqueeze(-1) + torch.where(valid, count - 1 - offset, offset)) % capacity
        index = slots.unsqueeze(-1).expand(-1, -1, -1, z.shape[-1])  # (L, E, limit, Z)
        layers = torch.arange(len(z), device=z.device)[:, None, None]  # (L, 1, 1)
        vectors = torch.where(valid.unsqueeze(-1), z[layers, tokens].to(self.keys.dtype), self.keys.gather(2, index))
        self.keys.scatter_(2, index, vectors)  # (L, E, Q, Z)
        self.written += count.squeeze(-1)  # (L, E)
