"""The expert memory queue: for each layer and expert, the last routing vectors of tokens it was first choice for.

A ring of C slots for each layer and expert: the n-th vector written goes to slot n % C, and a slot is filled
once n has passed it. The contrastive loss compares tokens with what is remembered here, so its cost and its memory
are fixed by L, E and C, whatever the batch and the sequence length.

A queue of past representations as contrast: https://arxiv.org/abs/1911.05722, section 3.2. Theirs is one queue of
negatives; here the expert whose ring a key lies in says for whom it is a positive.
"""

import torch
from torch import Tensor, nn


class ExpertQueue(nn.Module):
    """Nothing is learned; buffers, so that device moves and checkpoints take the memory along."""

    keys: Tensor
    written: Tensor

    def __init__(self, n_layers: int, n_experts: int, capacity: int, routing_dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(n_layers, n_experts, capacity, routing_dim))  # (L, E, C, Z)
        self.register_buffer("written", torch.zeros(n_layers, n_experts, dtype=torch.long))  # (L, E)

    def filled(self) -> Tensor:
        """(L, E, C), True where a key has been written."""
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)  # (C,)
        return slots < self.written.unsqueeze(-1)  # (L, E, C)

    @torch.no_grad()
    def enqueue(self, z: Tensor, expert_ids: Tensor, share: int) -> None:
        """Remember z (L, n, Z) for the experts (L, n), of each expert at most the last `share` <= C of them.

        Fixed shapes and no loop: a boolean index would make the CPU wait for the GPU.
        """
        capacity, n = self.keys.shape[2], z.shape[1]
        share = min(share, capacity, n)
        experts = torch.arange(self.keys.shape[1], device=z.device)  # (E,)
        mine = expert_ids.unsqueeze(1) == experts[:, None]  # (L, E, n)
        order = torch.where(mine, torch.arange(1, n + 1, device=z.device), 0)  # (L, E, n), 0: not mine
        order, tokens = order.topk(share, dim=-1)  # (L, E, share), latest first, then those not mine
        valid = order > 0
        # The latest of the v valid ones is written last: slots written + v-1, ..., written + 0. Those not
        # mine take the slots after them, each expert's slots are distinct, and put back what was there.
        count = valid.sum(-1, keepdim=True)  # (L, E, 1)
        place = torch.arange(share, device=z.device)  # (share,)
        slots = (self.written.unsqueeze(-1) + torch.where(valid, count - 1 - place, place)) % capacity
        index = slots.unsqueeze(-1).expand(-1, -1, -1, z.shape[-1])  # (L, E, share, Z)
        layers = torch.arange(len(z), device=z.device)[:, None, None]  # (L, 1, 1)
        new = torch.where(valid.unsqueeze(-1), z[layers, tokens].float(), self.keys.gather(2, index))
        self.keys.scatter_(2, index, new)  # (L, E, C, Z)
        self.written += count.squeeze(-1)  # (L, E)
