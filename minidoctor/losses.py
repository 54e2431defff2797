"""The three losses: language model, load balance, contrastive routing. Functions of tensors only.

total = lm + balance_weight * balance + contrast_weight * contrast
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def language_model_loss(hidden: Tensor, head: Tensor, targets: Tensor, answers: Tensor) -> Tensor:
    """Summed negative log-likelihood of the answer tokens, in nats.

    hidden (B, T, D), head (V, D), targets (B, T), answers (n,) indices into the flattened positions. Only those
    n rows meet the vocabulary matrix, in training the largest product of a small model. A sum, so that the parts
    of a batch add up whatever they hold.
    """
    rows = hidden.flatten(0, 1).index_select(0, answers)  # (n, D)
    logits = F.linear(rows, head).float()  # (n, V); a softmax over many words needs float32
    return F.cross_entropy(logits, targets.flatten()[answers], reduction="sum")


def load_balance_loss(probs: Tensor, expert_ids: Tensor, real: Tensor) -> Tensor:
    """E * sum_e f_e p_e of one layer: 1 when all experts are used alike, E when one serves all.

    probs (B, T, E), expert_ids (B, T, K), real (B, T) False on padding. f_e is the share of the K choices
    that fell on expert e, p_e its mean probability; the gradient flows through p_e. One layer at a
    time: of concatenated layers, two that are half collapsed look balanced.

    https://arxiv.org/abs/2101.03961, eq. 4, with f_e divided by K.
    """
    n_experts, weight = probs.shape[-1], real.unsqueeze(-1).float()  # (B, T, 1)
    chosen = F.one_hot(expert_ids, n_experts).sum(-2).float()  # (B, T, E)
    f = (chosen * weight).sum((0, 1)) / (weight.sum() * expert_ids.shape[-1])  # (E,)
    p = (probs * weight).sum((0, 1)) / weight.sum()  # (E,)
    return n_experts * (f * p).sum()


def contrastive_routing_loss(z: Tensor, gates: Tensor, keys: Tensor, filled: Tensor, temperature: float) -> Tensor:
    """A token should look like what its experts have served before, and unlike what the others served.

    For anchors z (..., n, Z) with gates (..., n, E) and remembered keys (..., E, C, Z), `filled` (..., E, C):
    the cross-entropy, mean over anchors, of softmax_j(z_i . key_j / temperature) against the target that gives
    the keys of expert e together the mass g_ie, spread evenly. Experts without keys hand their mass to
    the anchor's other experts; an anchor whose experts have none counts 0, and so does an empty queue.

    Soft-target InfoNCE: https://arxiv.org/abs/2306.00984, eq. 4. The gradient reaches the router through z.
    """
    count = filled.sum(-1)  # (..., E)
    empty = ~filled.unsqueeze(-3)  # (..., 1, E, C)
    mass = gates.detach() * (count > 0).unsqueeze(-2)  # (..., n, E)
    total = mass.sum(-1)  # (..., n)
    mass = mass / total.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-1)
    similarity = torch.einsum("...nz,...ecz->...nec", z, keys) / temperature  # (..., n, E, C)
    # The lowest number and not -inf, whose gradient would be NaN where a layer has no key at all.
    lowest = torch.finfo(similarity.dtype).min
    normalizer = similarity.masked_fill(empty, lowest).flatten(-2).logsumexp(-1)  # (..., n)
    # The target's keys come in groups of equal weight: the mean over an expert's keys, times its mass.
    mean = similarity.masked_fill(empty, 0).sum(-1) / count.clamp_min(1).unsqueeze(-2)  # (..., n, E)
    loss = normalizer - (mass * mean).sum(-1)  # (..., n)
    return torch.where(total > 0, loss, 0.0).mean()
