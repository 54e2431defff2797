"""The router: scores E experts for each token, keeps the K best and computes their gates.

    z        = normalize(P x)                   routing vector of a token, in R^Z
    logits_e = s * z . normalize(c_e)           c_e: embedding of expert e, s: learned scale
    gates    = softmax over the K largest logits, 0 elsewhere

Scoring in a low-dimensional normalized space keeps the hidden states from collapsing around the expert embeddings:
https://arxiv.org/abs/2204.09179, section 3. Softmax over the K survivors:
https://arxiv.org/abs/2401.04088, section 2.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidoctor.ops.precision import at_least_float32


class Routing(NamedTuple):
    """The decision of one router for each token.

    It is returned with the output and never stored on the module: activation checkpointing runs a module twice, and
    a stored routing would be that of the wrong pass.
    """

    gates: Tensor  # (B, T, E), K of them nonzero, sum 1
    probs: Tensor  # (B, T, E), softmax over all E experts
    expert_ids: Tensor  # (B, T, K), most probable expert first
    z: Tensor  # (B, T, Z), of length 1


class Router(nn.Module):
    """Learned projection, expert embeddings and scale of one sublayer.

    Computed in float32 for every dtype of the model: in bfloat16 the scores of two experts would often be equal and
    the choice between them arbitrary.
    """

    def __init__(self, dim: int, n_experts: int, top_k: int, routing_dim: int):
        super().__init__()
        self.top_k = top_k
        # Created on the CPU for the reason given in lora.py.
        self.projection = nn.Parameter(torch.empty(routing_dim, dim, device="cpu"))  # (Z, D)
        self.embeddings = nn.Parameter(torch.empty(n_experts, routing_dim, device="cpu"))  # (E, Z)
        # The cosine of two random vectors in R^Z has standard deviation Z^-0.5. Scaled by 2 Z^0.5, the logits have
        # standard deviation 2: neither a uniform nor a hard choice.
        self.scale = nn.Parameter(torch.tensor(2.0 * routing_dim**0.5, device="cpu"))
        nn.init.normal_(self.projection, std=dim**-0.5)
        nn.init.orthogonal_(self.embeddings)  # no expert is favoured at the start while E <= Z

    def forward(self, x: Tensor) -> Routing:
        """(B, T, D) -> Routing."""
        z = F.normalize(F.linear(at_least_float32(x), self.projection), dim=-1)  # (B, T, Z)
        logits = self.scale * F.linear(z, F.normalize(self.embeddings, dim=-1))  # (B, T, E)
        top_logits, expert_ids = logits.topk(self.top_k, dim=-1)  # (B, T, K)
        gates = torch.zeros_like(logits).scatter(-1, expert_ids, top_logits.softmax(dim=-1))  # (B, T, E)
        return Routing(gates, logits.softmax(dim=-1), expert_ids, z)
