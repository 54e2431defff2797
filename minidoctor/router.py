"""The router: scores E experts for each token, keeps K of them and says how to mix their outputs.

    z = normalize(P x)          the routing vector of a token, in R^Z
    logits_e = s * z . normalize(c_e)
    gates = softmax over the K largest logits, 0 elsewhere

Scoring in few normalised dimensions keeps token states from collapsing around the expert embeddings c_e:
https://arxiv.org/abs/2204.09179, section 3. Softmax over the survivors only: https://arxiv.org/abs/2401.04088,
section 2.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decided. Returned beside the output, never stored: state kept on a module goes stale
    when activation checkpointing runs the module a second time."""

    gates: Tensor  # (B, T, E), K of them nonzero, sum 1
    probs: Tensor  # (B, T, E), softmax over all experts
    expert_ids: Tensor  # (B, T, K), best first
    z: Tensor  # (B, T, Z), length 1


class Router(nn.Module):
    """Learned projection, expert embeddings and scale. Float32 whatever the model's dtype: in bfloat16 two
    experts' scores would often be equal and the choice between them arbitrary."""

    def __init__(self, dim: int, n_experts: int, top_k: int, routing_dim: int):
        super().__init__()
        self.top_k = top_k
        # On the CPU for the reason given in lora.py.
        self.projection = nn.Parameter(torch.empty(routing_dim, dim, device="cpu"))
        self.embeddings = nn.Parameter(torch.empty(n_experts, routing_dim, device="cpu"))
        # A cosine of two random vectors in R^Z has standard deviation Z^-0.5. Times 2 Z^0.5 the logits have
        # standard deviation 2: neither uniform nor a hard choice.
        self.scale = nn.Parameter(torch.tensor(2.0 * routing_dim**0.5, device="cpu"))
        nn.init.normal_(self.projection, std=dim**-0.5)
        nn.init.orthogonal_(self.embeddings)  # no two experts start alike while E <= Z

    def forward(self, x: Tensor) -> Routing:
        """(B, T, D) -> Routing."""
        z = F.normalize(F.linear(x.float(), self.projection), dim=-1)  # (B, T, Z)
        logits = self.scale * F.linear(z, F.normalize(self.embeddings, dim=-1))  # (B, T, E)
        kept, expert_ids = logits.topk(self.top_k, dim=-1)  # (B, T, K)
        gates = torch.zeros_like(logits).scatter(-1, expert_ids, kept.softmax(dim=-1))  # (B, T, E)
        return Routing(gates, logits.softmax(dim=-1), expert_ids, z)
