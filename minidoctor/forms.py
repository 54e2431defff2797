"""Forms of the contrast that the study compares with the one of losses.py. Those that lose are deleted.

Each is called with the batch, the routings and the anchors (n,), flattened positions of answer tokens, and returns a
loss to be weighted like the contrast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.data import Batch
from minidoctor.expert_queue import ExpertQueue
from minidoctor.lora import LoRAExperts
from minidoctor.losses import contrastive_routing_loss
from minidoctor.model import Model
from minidoctor.router import Routing


def at(routings: list[Routing], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z (L, n, Z), gates (L, n, E), first choices (L, n) and probs (L, n, E) of some tokens."""
    z, gates, ids, probs = (
        torch.stack([tensor.flatten(0, 1)[anchors] for tensor in tensors])
        for tensors in zip(*((r.z, r.gates, r.expert_ids[..., 0], r.probs) for r in routings), strict=True)
    )
    return z, gates, ids, probs


def rings(z: Tensor, labels: Tensor, n_labels: int) -> ExpertQueue:
    """A queue of this moment alone: all of z (L, n, Z), in the ring of its label (L, n)."""
    n_layers, _, routing_dim = z.shape
    most = max(
        1, int(F.one_hot(labels, n_labels).sum(1).max()) if labels.numel() else 0
    )  # rings as large as the fullest
    queue = ExpertQueue(n_layers, n_labels, most, routing_dim).to(z.device)
    queue.enqueue(z.detach(), labels, most)
    return queue


def parted(batch: Batch, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """The anchors and all other answer tokens of the batch, which they meet; where there are few, half are anchors."""
    anchors = anchors[: max(1, len(batch.answers) // 2)]
    return anchors, batch.answers[~torch.isin(batch.answers, anchors)]


class InBatch:
    """The design's contrast without a memory: the anchors against all other answer tokens of the batch."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, batch: Batch, routings: list[Routing], anchors: Tensor) -> Tensor:
        anchors, others = parted(batch, anchors)
        z, gates, _, _ = at(routings, anchors)
        keys, _, ids, _ = at(routings, others)
        queue = rings(keys, ids, gates.shape[-1])
        return contrastive_routing_loss(z, gates, queue.keys, queue.filled(), self.temperature)


class ByLabel:
    """Supervised contrast (https://arxiv.org/abs/2004.11362): tokens of one topic should be routed alike.

    The same loss, with a topic where the design has the router's own choice, and a ring for each topic.
    """

    def __init__(self, temperature: float, n_layers: int, n_labels: int, capacity: int, routing_dim: int, share: int):
        self.temperature, self.n_labels, self.share = temperature, n_labels, share
        self.queue = ExpertQueue(n_layers, n_labels, capacity, routing_dim)
        self.of_row = torch.zeros(0, dtype=torch.long)  # the topic of each question of the batch

    def __call__(self, batch: Batch, routings: list[Routing], anchors: Tensor) -> Tensor:
        z, _, _, _ = at(routings, anchors)
        labels = self.of_row[anchors // batch.tokens.shape[1]].expand(len(z), -1)  # (L, n)
        mass = F.one_hot(labels, self.n_labels).float()  # (L, n, J)
        # A copy, for the queue goes on before the way back is walked.
        loss = contrastive_routing_loss(z, mass, self.queue.keys.clone(), self.queue.filled(), self.temperature)
        self.queue.enqueue(z.detach(), labels, self.share)
        return loss


class ByQuestion:
    """Tokens of one question should be routed alike, within the batch."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, batch: Batch, routings: list[Routing], anchors: Tensor) -> Tensor:
        anchors, others = parted(batch, anchors)
        z, _, _, _ = at(routings, anchors)
        keys, _, _, _ = at(routings, others)
        n_rows, n_tokens = batch.tokens.shape
        queue = rings(keys, (others // n_tokens).expand(len(z), -1), n_rows)
        mass = F.one_hot(anchors // n_tokens, n_rows).float().expand(len(z), -1, -1)  # (L, n, B)
        return contrastive_routing_loss(z, mass, queue.keys, queue.filled(), self.temperature)


def balanced(probs: Tensor, n_rounds: int = 3) -> Tensor:
    """Probabilities (..., n, E) changed as little as needed for every expert to get n / E tokens' worth of them.

    Sinkhorn's rounds, as for the codes of https://arxiv.org/abs/2006.09882, section 3.1.
    """
    for _ in range(n_rounds):
        probs = probs / probs.sum(-2, keepdim=True)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


class Balanced:
    """The design's contrast with labels that cannot feed on themselves: the router's choice, balanced over the anchors.

    An expert that is chosen more than its share loses its least certain tokens to the next best: the target is not
    what the router already does.
    """

    def __init__(self, temperature: float, n_layers: int, n_experts: int, capacity: int, routing_dim: int, share: int):
        self.temperature, self.share = temperature, share
        self.queue = ExpertQueue(n_layers, n_experts, capacity, routing_dim)

    def __call__(self, batch: Batch, routings: list[Routing], anchors: Tensor) -> Tensor:
        z, _, _, probs = at(routings, anchors)
        mass = balanced(probs.detach().square())  # (L, n, E); squared: as peaked as the gates of the best two
        # A copy, for the queue goes on before the way back is walked.
        loss = contrastive_routing_loss(z, mass, self.queue.keys.clone(), self.queue.filled(), self.temperature)
        self.queue.enqueue(z.detach(), mass.argmax(-1), self.share)
        return loss


def contrastive_expert_loss(
    hidden: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    temperature: float,
    remembered: Tensor | None = None,
    filled: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """A token's chosen experts should put out what is alike, and unlike what those not chosen would.

    hidden (n, E, R) = A_e x, lora_b (D_out, E*R), gates (n, E). With s_ij the cosine of experts' outputs B_i A_i x:
    - sum_{i != j chosen} g_i g_j log( e^{s_ij/t} / (e^{s_ij/t} + sum_{k not chosen} e^{s_ik/t}) ) / sum g_i g_j

    Outputs are compared in rank space, <B_i h_i, B_j h_j> = h_i^T (B_i^T B_j) h_j: no (n, E, D) tensor. The pairs are
    weighted by the gates, or the router would learn nothing of it; eps keeps the cosine's gradient finite while B is
    near 0. https://arxiv.org/abs/2505.17553, section 3.

    remembered (E, C, R), filled (E, C): what each expert's A gave for tokens that it served earlier; the outputs that
    the experts not chosen put out then join those that they would put out now.
    """
    n_experts, rank = hidden.shape[-2:]
    gram = (lora_b.T @ lora_b).view(n_experts, rank, n_experts, rank)
    inner = torch.einsum("nir,irjs,njs->nij", hidden, gram, hidden)  # (n, E, E)
    length = (inner.diagonal(dim1=-2, dim2=-1).clamp_min(0) + eps**2).sqrt()  # (n, E)
    s = inner / (length.unsqueeze(-1) * length.unsqueeze(-2)) / temperature  # (n, E, E)
    chosen = gates > 0
    others = s.masked_fill(chosen.unsqueeze(-2), -1e9).logsumexp(-1, keepdim=True)  # (n, E, 1)
    if remembered is not None:
        assert filled is not None
        fixed = gram.detach()
        own = fixed.diagonal(dim1=0, dim2=2)  # (R, R, E)
        key_length = (torch.einsum("ecr,rse,ecs->ec", remembered, own, remembered).clamp_min(0) + eps**2).sqrt()
        inner = torch.einsum("nir,irjs,jcs->nijc", hidden, gram, remembered)  # (n, E, E, C)
        s_then = inner / (length[:, :, None, None] * key_length) / temperature  # (n, E, E, C)
        met = filled & ~chosen.unsqueeze(-1)  # (n, E, C)
        then = s_then.masked_fill(~met.unsqueeze(1), -1e9).flatten(2).logsumexp(-1, keepdim=True)  # (n, E, 1)
        others = torch.logaddexp(others, then)
    loss = torch.logaddexp(s, others) - s  # (n, E, E)
    pairs = gates.unsqueeze(-1) * gates.unsqueeze(-2)  # (n, E, E)
    pairs = pairs * ~torch.eye(n_experts, dtype=torch.bool, device=gates.device)
    return ((pairs * loss).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1e-9)).mean()


class Outputs:
    """`contrastive_expert_loss` of the last adapted linear of each sublayer, whose input a hook keeps."""

    def __init__(self, model: Model, temperature: float, capacity: int = 0, share: int = 0):
        self.temperature, self.share = temperature, share
        names = ("o_proj", "down_proj")
        self.layers = [m for name, m in model.named_modules() if name.endswith(names) and isinstance(m, LoRAExperts)]
        self.queues = [ExpertQueue(1, x.lora_a.shape[0] // x.rank, capacity, x.rank) for x in self.layers * bool(share)]
        self.inputs: dict[LoRAExperts, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda layer, given: self.inputs.__setitem__(layer, given[0]))

    def __call__(self, batch: Batch, routings: list[Routing], anchors: Tensor) -> Tensor:
        losses = []
        for i, (layer, routing) in enumerate(zip(self.layers, routings, strict=True)):
            x = self.inputs.pop(layer).flatten(0, 1)[anchors].detach()  # (n, D_in)
            hidden = F.linear(x, layer.lora_a).unflatten(-1, (-1, layer.rank))  # (n, E, R)
            gates = routing.gates.flatten(0, 1)[anchors]  # (n, E)
            memory = (self.queues[i].keys[0].clone(), self.queues[i].filled()[0]) if self.queues else ()
            losses.append(contrastive_expert_loss(hidden, layer.lora_b, gates, self.temperature, *memory))
            if self.queues:
                ids = routing.expert_ids[..., 0].flatten()[anchors]  # (n,)
                served = hidden.detach()[torch.arange(len(ids)), ids]  # (n, R)
                self.queues[i].enqueue(served[None], ids[None], self.share)
        return torch.stack(losses).mean()
