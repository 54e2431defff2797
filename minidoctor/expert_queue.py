"""The expert memory queue: for each sublayer and expert, the last Q routing vectors that were enqueued for it.

Each sublayer and expert has a ring of Q slots. The vectors are numbered from 0 in order of writing; number i goes to
slot i % Q. The contrastive loss compares the anchors of a step with these keys, so its compute and its memory are
fixed by L, E, Q, Z and the number of anchors, for every batch size and sequence length.

A queue of past representations for contrastive learning: https://arxiv.org/abs/1911.05722, section 3.2. MoCo has one
queue of negatives and a momentum encoder. Here each key belongs to an expert, and is a positive for the tokens routed
to that expert; it is the vector that the router computed at its step.
"""

import torch
from torch import Tensor, nn


class ExpertQueue(nn.Module):
    """The rings as buffers, so that they move between devices and into checkpoints. Nothing in it is trained."""

    keys: Tensor  # (L, E, Q, Z)
    written: Tensor  # (L, E), vectors written so far

    def __init__(self, n_sublayers: int, n_experts: int, capacity: int, routing_dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(n_sublayers, n_experts, capacity, routing_dim))
        self.register_buffer("written", torch.zeros(n_sublayers, n_experts, dtype=torch.long))

    def filled(self) -> Tensor:
        """Return (L, E, Q), True where a key has been written."""
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)  # (Q,)
        return slots < self.written.unsqueeze(-1)  # (L, E, Q)

    @torch.no_grad()
    def enqueue(self, z: Tensor, top1: Tensor, limit: int) -> None:
        """Append z (L, n, Z) to the rings of its top-1 experts (L, n), at most the last `limit` <= Q of each expert.

        The result is that of this loop:

            for l in range(L):
                for e in range(E):
                    for vector in z[l][top1[l] == e][-limit:]:
                        keys[l, e, written[l, e] % Q] = vector
                        written[l, e] += 1

        It is computed with fixed shapes, because a boolean index makes the CPU wait for the GPU.
        """
        capacity, n = self.keys.shape[2], z.shape[1]
        limit = min(limit, capacity, n)
        experts = torch.arange(self.keys.shape[1], device=z.device)  # (E,)
        is_top1 = top1.unsqueeze(1) == experts[:, None]  # (L, E, n)
        number = is_top1 * torch.arange(1, n + 1, device=z.device)  # (L, E, n), 0: another expert's token
        largest, tokens = number.topk(limit, dim=-1)  # (L, E, limit): the expert's last tokens, last first, then others
        valid = largest > 0
        count = valid.sum(-1, keepdim=True)  # (L, E, 1), v below
        # The v valid tokens go to slots written ... written + v - 1, the last token to the last of them. The remaining
        # entries point at the following slots and rewrite their old contents, so the scatter has a fixed shape and no
        # index occurs twice. With limit 3, written 5 and the expert's tokens 2 and 7: token 7 -> slot 6, token 2 ->
        # slot 5, the third entry rewrites slot 7.
        offset = torch.arange(limit, device=z.device)  # (limit,)
        slots = (self.written.unsqueeze(-1) + torch.where(valid, count - 1 - offset, offset)) % capacity
        index = slots.unsqueeze(-1).expand(-1, -1, -1, z.shape[-1])  # (L, E, limit, Z)
        layers = torch.arange(len(z), device=z.device)[:, None, None]  # (L, 1, 1)
        vectors = torch.where(valid.unsqueeze(-1), z[layers, tokens].to(self.keys.dtype), self.keys.gather(2, index))
        self.keys.scatter_(2, index, vectors)  # (L, E, Q, Z)
        self.written += count.squeeze(-1)  # (L, E)
