"""Forms of routing that the sequential experiment compares with the token routing of the method.

    groups of experts   the prompt chooses a group of experts, and each token chooses within it
    group centres       from unlabelled prompts, by k-means or by contrast with balanced assignments
    pair contrast       sequences with similar prompts are routed alike, and others apart
    reservoir queue     a uniform sample of all vectors so far, instead of the last ones
    balance             within each group, or only among the experts in use

A prompt is represented by the mean of its token embeddings. They are frozen, so no training moves the representation.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.batching import IGNORE, Batch
from minidoctor.config import check
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import load_balance_loss
from minidoctor.model import Model
from minidoctor.picture.statistics import UNDERUSED
from minidoctor.router import Router, Routing


def prompt_mask(batch: Batch) -> Tensor:
    """Return (B, T), True before the first answer position, or on all tokens of a text without a prompt."""
    prompt = (batch.targets != IGNORE).cumsum(1) == 0  # (B, T)
    return torch.where(prompt[:, :1], prompt, batch.attention_mask)


def mean_embeddings(model: Model, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean embedding (B, D) of the tokens in the mask, minus that of the vocabulary, with length 1."""
    table = model.model.embed_tokens.weight.detach()  # (V, D)
    mean = torch.einsum("btd,bt->bd", table[tokens], mask.to(table.dtype)) / mask.sum(1, keepdim=True).clamp_min(1)
    # Without the common part, prompts in one language have cosines near 0.6 and in two languages near -0.5.
    return F.normalize(mean - table.mean(0), dim=-1)


class ExpertGroups:
    """Hooks on the routers of a model that restrict the choice of each token to the group of its sequence.

    Group g of n has the experts g*E/n ... (g+1)*E/n - 1.
    """

    def __init__(self, model: Model, n_groups: int):
        assert model.adapter
        n_experts, top_k = model.adapter.n_experts, model.adapter.top_k
        check(n_experts % n_groups == 0, f"n_experts must be a multiple of the {n_groups} groups, got {n_experts}")
        self.size = n_experts // n_groups
        check(top_k <= self.size, f"top_k must be at most {self.size}, the size of a group, got {top_k}")
        self.n_groups, self.group = n_groups, torch.zeros(1, dtype=torch.long)  # (B,), or (1,) for the whole batch
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self.restrict)

    def restrict(self, router: Router, inputs: Any, routing: Routing) -> Routing:
        """Return the routing that the router would compute if it had only the experts of the group."""
        experts = torch.arange(routing.probs.shape[-1])  # (E,)
        allowed = (experts // self.size == self.group[:, None]).unsqueeze(1)  # (B, 1, E)
        info = torch.finfo(routing.probs.dtype)
        # A log-probability is the logit minus a constant, which changes neither the order nor the softmax.
        logits = routing.probs.clamp_min(info.tiny).log().masked_fill(~allowed, info.min)  # (B, T, E)
        top_logits, expert_ids = logits.topk(router.top_k, dim=-1)  # (B, T, K)
        gates = torch.zeros_like(logits).scatter(-1, expert_ids, top_logits.softmax(dim=-1))  # (B, T, E)
        return Routing(gates, logits.softmax(dim=-1), expert_ids, routing.z)

    def balance(self, routing: Routing, attention_mask: Tensor) -> Tensor:
        """Return the load-balance loss within each group, averaged over the groups by their number of tokens."""
        group, total = self.group.expand(len(attention_mask)), torch.zeros(())
        for g in group.unique().tolist():
            rows, first = group == g, g * self.size
            probs = routing.probs[rows][..., first : first + self.size]
            mask = attention_mask[rows]
            total = total + mask.sum() * load_balance_loss(probs, routing.expert_ids[rows] - first, mask)
        return total / attention_mask.sum()


def balance_in_use(routing: Routing, attention_mask: Tensor) -> Tensor:
    """Return the load-balance loss among the experts with at least a tenth of the equal share of the choices.

    An unused expert neither enters it nor is pulled into use: it stays free for other data.
    """
    probs, ids = routing.probs[attention_mask], routing.expert_ids[attention_mask]  # (N, E), (N, K)
    f = ids.flatten().bincount(minlength=probs.shape[-1]) / ids.numel()  # (E,)
    used = f >= UNDERUSED / len(f)
    f, p = f * used, probs * used
    p = (p / p.sum(-1, keepdim=True)).mean(0)  # (E,), of a softmax over the experts in use
    return used.sum() * (f / f.sum() * p).sum()


def nearest_centre(features: Tensor, centres: Tensor) -> Tensor:
    """Return the index (n,) of the centre (G, D) with the largest cosine."""
    return (features @ centres.T).argmax(-1)


def k_means_centres(features: Tensor, n_groups: int, seed: int, n_starts: int = 10, n_rounds: int = 30) -> Tensor:
    """Return the centres (G, D) of spherical k-means on features (n, D): the best of several random starts."""
    generator, best, centres = torch.Generator().manual_seed(seed), -1.0, features[:n_groups]
    for _ in range(n_starts):
        current = features[torch.randperm(len(features), generator=generator)[:n_groups]]  # (G, D)
        for _ in range(n_rounds):
            sums = torch.zeros_like(current).index_add(0, nearest_centre(features, current), features)
            current = F.normalize(sums, dim=-1)
        quality = (features @ current.T).amax(-1).mean().item()
        if quality > best:
            best, centres = quality, current
    return centres


def balanced_assignments(scores: Tensor, temperature: float = 0.05, n_rounds: int = 3) -> Tensor:
    """Return probabilities (n, G) of the groups that give every group the same total, by Sinkhorn's algorithm.

    https://arxiv.org/abs/2006.09882, section 3.1.
    """
    q = (scores / temperature).softmax(dim=-1)
    for _ in range(n_rounds):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def contrast_centres(views: Tensor, n_groups: int, seed: int, steps: int = 200, capacity: int = 256) -> Tensor:
    """Return centres (G, D) such that each of two views (2, n, D) of a prompt predicts the assignment of the other.

    The assignments are balanced over a batch and the earlier prompts in a queue, as in
    https://arxiv.org/abs/2006.09882, eq. 2, with frozen features: only the centres are trained.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_groups, views.shape[-1], generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([centres], lr=0.05)
    queue = ExpertQueue(2, 1, capacity, views.shape[-1])
    for _ in range(steps):
        batch = views[:, torch.randperm(views.shape[1], generator=generator)[:32]]  # (2, n, D)
        keys = queue.keys[:, 0, queue.filled()[0, 0]]  # (2, up to Q, D)
        scores = torch.cat([batch, keys], dim=1) @ F.normalize(centres, dim=-1).T  # (2, n + Q, G)
        targets = torch.stack([balanced_assignments(view) for view in scores.detach()])[:, : batch.shape[1]]
        log_probs = (scores[:, : batch.shape[1]] / 0.1).log_softmax(dim=-1)  # (2, n, G)
        loss = -(targets.flip(0) * log_probs).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(batch, torch.zeros(batch.shape[:2], dtype=torch.long), capacity)
    return F.normalize(centres.detach(), dim=-1)


def sequence_routing(routings: list[Routing], attention_mask: Tensor) -> Tensor:
    """Return the mean routing probabilities (B, L, E) over the tokens of each sequence."""
    mask = attention_mask[..., None].to(routings[0].probs.dtype)  # (B, T, 1)
    return torch.stack([(r.probs * mask).sum(1) / mask.sum(1) for r in routings], dim=1)


def pair_contrast(features: Tensor, routing: Tensor, key_features: Tensor, key_routing: Tensor) -> Tensor:
    """Return the squared difference between two similarities, averaged over pairs of sequences and over sublayers.

    One is the cosine of the prompts' features (B, D), at least 0; the other is the cosine of the sequences' routing
    (B, L, E). The pairs are those within the batch, and those with remembered sequences (M, D), (M, L, E).
    """
    similar = (features @ torch.cat([features, key_features]).T).clamp_min(0)  # (B, B + M)
    keys = F.normalize(torch.cat([routing, key_routing]), dim=-1)  # (B + M, L, E)
    alike = torch.einsum("ble,mle->lbm", F.normalize(routing, dim=-1), keys)  # (L, B, B + M)
    distinct = ~torch.eye(*similar.shape, dtype=torch.bool)
    return (alike - similar).square()[:, distinct].mean()


class ReservoirQueue(ExpertQueue):
    """A queue whose rings are reservoirs: every vector enqueued so far is stored with the same probability.

    Algorithm R: https://doi.org/10.1145/3147.3165.
    """

    def __init__(self, n_sublayers: int, n_experts: int, capacity: int, routing_dim: int, seed: int):
        super().__init__(n_sublayers, n_experts, capacity, routing_dim)
        self.rng = random.Random(seed)

    @torch.no_grad()
    def enqueue(self, z: Tensor, top1: Tensor, limit: int) -> None:
        capacity = self.keys.shape[2]
        for layer, expert in torch.cartesian_prod(*map(torch.arange, self.written.shape)).tolist():
            for vector in z[layer, top1[layer] == expert][-limit:]:
                number = int(self.written[layer, expert])
                slot = number if number < capacity else self.rng.randrange(number + 1)
                if slot < capacity:
                    self.keys[layer, expert, slot] = vector
                self.written[layer, expert] += 1
