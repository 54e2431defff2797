"""The three losses, as functions of tensors: language model, load balance, contrastive routing.

total = lm + balance_weight * balance + contrast_weight * contrast
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidoctor.ops.cross_entropy import chunked_cross_entropy

AllReduce = Callable[[list[Tensor]], None]  # sums each tensor over the processes, in place


def language_model_loss(hidden: Tensor, head: Tensor, targets: Tensor, answer_positions: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the answer tokens, in nats.

    hidden (B, T, D), head (V, D), targets (B, T), answer_positions (n,) indices into the B*T flattened positions.
    Only those n rows are multiplied by the vocabulary matrix, the largest product of a training step of a small model.
    It is a sum, so that micro-batches with different numbers of answer tokens add up to the loss of the batch.
    """
    rows = hidden.flatten(0, 1).index_select(0, answer_positions)  # (n, D)
    return chunked_cross_entropy(rows, head, targets.flatten().index_select(0, answer_positions))


def load_balance_loss(
    probs: Tensor, expert_ids: Tensor, attention_mask: Tensor, all_reduce: AllReduce | None = None, n_groups: int = 1
) -> Tensor:
    """Return E * sum_e f_e p_e of one sublayer: 1 when all experts are used equally, at most E/K.

    With groups of experts, it is that of each group's tokens and experts, averaged by their numbers of tokens.
    probs (B, T, E), expert_ids (B, T, K), attention_mask (B, T) False on padding. f_e is the share of the K choices
    that fell on expert e, p_e its mean probability; the gradient flows through p_e. Computed per sublayer: the
    concatenation of two collapsed sublayers can look balanced. With several processes, `all_reduce` makes f that
    of the global batch, and the return values of the processes add up to the loss of the global batch.

    https://arxiv.org/abs/2101.03961, eq. 4, with f_e divided by K.
    """
    n_experts, mask = probs.shape[-1], attention_mask.unsqueeze(-1).to(probs.dtype)  # (B, T, 1)
    experts = torch.arange(n_experts, device=probs.device)  # (E,); F.one_hot would synchronize to read the largest id
    chosen = (expert_ids.unsqueeze(-1) == experts).sum(-2).to(probs.dtype)  # (B, T, E)
    counts, n_tokens = (chosen * mask).sum((0, 1)), mask.sum()  # (E,), ()
    if all_reduce:
        all_reduce([counts, n_tokens])
    f = counts / (n_tokens * expert_ids.shape[-1])  # (E,)
    p = (probs * mask).sum((0, 1)) / n_tokens  # (E,)
    # Those of group j are f / w and p / w with its share w, so its loss E/J * sum f p / w^2 enters the mean with w.
    share = f.unflatten(0, (n_groups, -1)).sum(1, keepdim=True)  # (J, 1)
    products = (f * p).unflatten(0, (n_groups, -1)) / share.clamp_min(torch.finfo(f.dtype).tiny)  # (J, E/J)
    return n_experts / n_groups * products.sum()


def contrastive_routing_loss(z: Tensor, gates: Tensor, keys: Tensor, filled: Tensor, temperature: float) -> Tensor:
    """Return the loss, in nats, that pulls a token towards the keys of its experts and away from the other keys.

    For anchors z (..., n, Z) with gates (..., n, E), keys (..., E, Q, Z) and `filled` (..., E, Q), it is the mean
    over anchors of the cross-entropy of softmax_j(z_i . key_j / temperature) against a target that gives the keys of
    expert e together the mass g_ie, spread evenly; j runs over the filled keys of all experts of the sublayer. The mass
    of an expert without keys goes to the anchor's other experts. An anchor whose experts have no keys enters the mean
    as 0, so an empty queue gives 0.

    Soft-target InfoNCE: https://arxiv.org/abs/2306.00984, eq. 4. The gradient flows through z only: into the router's
    projection, not into its expert embeddings and scale, and through x into the experts and routers below.
    """
    count = filled.sum(-1)  # (..., E)
    empty = ~filled.unsqueeze(-3)  # (..., 1, E, Q)
    mass = gates.detach() * (count > 0).unsqueeze(-2)  # (..., n, E)
    total = mass.sum(-1)  # (..., n)
    mass = mass / total.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-1)
    similarity = torch.einsum("...nz,...eqz->...neq", z, keys) / temperature  # (..., n, E, Q)
    # The lowest finite number instead of -inf: the gradient of a logsumexp over -inf alone, of a sublayer without keys,
    # would be NaN.
    lowest = torch.finfo(similarity.dtype).min
    log_normalizer = similarity.masked_fill(empty, lowest).flatten(-2).logsumexp(-1)  # (..., n)
    # The target is uniform over the keys of one expert, so their mean similarity, times the mass, is enough.
    mean = similarity.masked_fill(empty, 0).sum(-1) / count.clamp_min(1).unsqueeze(-2)  # (..., n, E)
    loss = log_normalizer - (mass * mean).sum(-1)  # (..., n)
    return torch.where(total > 0, loss, 0.0).mean()
