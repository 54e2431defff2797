"""The three losses: language model, load balance, contrastive routing. Functions of tensors only.

total = lm + balance_weight * balance + contrast_weight * contrast
"""

import math
from typing import Any

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
    return SummedLoss.apply(rows, head, targets.flatten().index_select(0, answers))


class SummedLoss(torch.autograd.Function):
    """Cross-entropy of rows (n, D) against targets (n,), a part of the rows at a time.

    Logits are the largest tensors of a step: 49,152 words, 2,000 answer tokens and float32 make 0.4 GB, and the
    softmax and its gradient as much again. Here a part's gradient, softmax minus the right word, is taken while its
    logits are there: what is kept for the way back has the shape of the rows.
    """

    LOGITS = 2**24  # numbers at once, 64 MiB; half of it costs 10 % more time on 2 cores, for the products get thin

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        for_rows, for_head, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if for_rows else None  # (n, D)
        grad_head = torch.zeros_like(head) if for_head else None  # (V, D), where the base itself is trained
        loss = rows.new_zeros((), dtype=torch.float32)
        n_parts = math.ceil(len(rows) * len(head) / SummedLoss.LOGITS)
        size = math.ceil(len(rows) / max(1, n_parts))
        for start in range(0, len(rows), max(1, size)):
            piece = slice(start, start + size)
            right = targets[piece, None]  # (m, 1)
            logits = F.linear(rows[piece], head).float()  # (m, V); a softmax over many words needs float32
            norm = logits.logsumexp(-1, keepdim=True)  # (m, 1)
            loss += (norm - logits.gather(-1, right)).sum()
            if for_rows or for_head:
                change = logits.sub_(norm).exp_().scatter_add_(-1, right, torch.full_like(norm, -1.0))  # (m, V)
                change = change.to(rows.dtype)
                if grad_rows is not None:
                    torch.mm(change, head, out=grad_rows[piece])
                if grad_head is not None:
                    grad_head.addmm_(change.t(), rows[piece])
        ctx.save_for_backward(grad_rows, grad_head)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        grad_rows, grad_head = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_rows, grad_head, None


def load_balance_loss(probs: Tensor, expert_ids: Tensor, real: Tensor) -> Tensor:
    """E * sum_e f_e p_e of one layer: 1 when all experts are used alike, E when one serves all.

    probs (B, T, E), expert_ids (B, T, K), real (B, T) False on padding. f_e is the share of the K choices
    that fell on expert e, p_e its mean probability; the gradient flows through p_e. One layer at a
    time: of concatenated layers, two that are half collapsed look balanced.

    https://arxiv.org/abs/2101.03961, eq. 4, with f_e divided by K.
    """
    n_experts, weight = probs.shape[-1], real.unsqueeze(-1).float()  # (B, T, 1)
    experts = torch.arange(n_experts, device=probs.device)  # (E,); F.one_hot would look at the largest id and wait
    chosen = (expert_ids.unsqueeze(-1) == experts).sum(-2).float()  # (B, T, E)
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
