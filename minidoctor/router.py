"""The router: scores E experts for each token, keeps the K best and computes their gates.

    z        = normalize(P x)                   routing vector of a token, in R^Z
    logits_e = s * z . normalize(c_e)           c_e: embedding of expert e, s: learned scale
    gates    = softmax over the K largest logits of the token's group, 0 elsewhere

    votes_t  = sum over s <= t of (embedding_s - mean) . centre_j      of the tokens so far, for each group j of experts
    group_t  = the group with the largest sum

Frozen embeddings vote, so no training moves a prompt to another group. The groups share P and s only: a model that
learns English next keeps nearly all of its Chinese answers (study/README.md).

Scoring in a low-dimensional normalized space keeps the hidden states from collapsing around the expert embeddings:
https://arxiv.org/abs/2204.09179, section 3. Softmax over the K survivors:
https://arxiv.org/abs/2401.04088, section 2.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidoctor.config import TARGETS, AdapterConfig
from minidoctor.lora import LoRAExperts
from minidoctor.ops.linear import Linear, joined_product
from minidoctor.ops.precision import at_least_float32


class PromptGroups(nn.Module):
    """The votes of tokens for groups of experts. Nothing here is trained together with the experts."""

    centres: Tensor  # (J, D), learned before the training from prompts without labels: training/groups.py
    mean: Tensor  # (D,), of the embeddings of the vocabulary

    def __init__(self, dim: int, n_groups: int):
        super().__init__()
        self.register_buffer("centres", torch.randn(n_groups, dim, device="cpu"))
        self.register_buffer("mean", torch.zeros(dim, device="cpu"))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, J)."""
        return F.linear(at_least_float32(embeddings) - self.mean, self.centres)


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

    def __init__(self, dim: int, n_experts: int, top_k: int, routing_dim: int, n_groups: int = 1):
        super().__init__()
        self.top_k, self.n_groups = top_k, n_groups
        # Created on the CPU for the reason given in lora.py.
        self.projection = nn.Parameter(torch.empty(routing_dim, dim, device="cpu"))  # (Z, D)
        self.embeddings = nn.Parameter(torch.empty(n_experts, routing_dim, device="cpu"))  # (E, Z)
        # The cosine of two random vectors in R^Z has standard deviation Z^-0.5. Scaled by 2 Z^0.5, the logits have
        # standard deviation 2: neither a uniform nor a hard choice.
        self.scale = nn.Parameter(torch.tensor(2.0 * routing_dim**0.5, device="cpu"))
        nn.init.normal_(self.projection, std=dim**-0.5)
        nn.init.orthogonal_(self.embeddings)  # no expert is favoured at the start while E <= Z

    def forward(self, x: Tensor, group: Tensor | None = None) -> Routing:
        """(B, T, D) and group (B, T) -> Routing. A token chooses from the experts of its group, or from all."""
        z = F.normalize(F.linear(at_least_float32(x), self.projection), dim=-1)  # (B, T, Z)
        logits = self.scale * F.linear(z, F.normalize(self.embeddings, dim=-1))  # (B, T, E)
        if group is not None:
            groups = torch.arange(len(self.embeddings), device=x.device) * self.n_groups // len(self.embeddings)  # (E,)
            logits = logits.masked_fill(groups != group.unsqueeze(-1), torch.finfo(logits.dtype).min)
        top_logits, expert_ids = logits.topk(self.top_k, dim=-1)  # (B, T, K)
        gates = torch.zeros_like(logits).scatter(-1, expert_ids, top_logits.softmax(dim=-1))  # (B, T, E)
        return Routing(gates, logits.softmax(dim=-1), expert_ids, z)


def make_router(dim: int, sublayer: str, adapter: AdapterConfig | None) -> Router | None:
    """Return the router shared by a sublayer's adapted linear layers; None for plain LoRA or if none is adapted."""
    if adapter and adapter.n_experts > 1 and any(TARGETS[target] == sublayer for target in adapter.targets):
        return Router(dim, adapter.n_experts, adapter.top_k, adapter.routing_dim, adapter.n_groups)
    return None


def project(layer: Linear, x: Tensor, routing: Routing | None) -> Tensor:
    """Apply a linear layer, with the gates of the routing if it has experts."""
    return layer(x, routing.gates) if isinstance(layer, LoRAExperts) and routing else layer(x)


def project_all(layers: list[Linear], x: Tensor, routing: Routing | None) -> list[Tensor]:
    """Apply linear layers to the same input, with one frozen product if they are joined."""
    products = joined_product(layers, x)  # (B, T, D_out) of each layer
    if products is None:
        return [project(layer, x, routing) for layer in layers]
    gates, pairs = routing.gates if routing else None, zip(layers, products, strict=True)
    return [layer(x, gates, y) if isinstance(layer, LoRAExperts) else y for layer, y in pairs]
