"""One training step.

    tokens -> model -> hidden    -> language-model loss at the answer positions
                    -> routings  -> load balance over all tokens
                                 -> contrastive routing loss of the anchors <- keys of the expert queue
    backward -> clip -> optimizer step -> queue.enqueue(z of the anchors)

The anchors of a step are answer positions drawn at random.

Backpropagation stops at the first adapted layer. Logits are computed at answer positions only. There is no
host-device synchronization.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.batching import Batch
from minidoctor.config import TrainConfig
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import AllReduce, contrastive_routing_loss, language_model_loss, load_balance_loss
from minidoctor.model import Model, trainable_parameters
from minidoctor.router import Router, Routing


class StepMetrics(NamedTuple):
    """Measurements of one step. Tensors stay on the device, because reading one back makes the CPU wait for it."""

    losses: dict[str, Tensor]  # "loss", the weighted total, and its terms "lm", "balance" and "contrast"
    expert_load: Tensor  # (L, E), share of the anchors that have expert e as top-1; of shape (0, 0) without a router
    queue_fill: Tensor | None  # share of the queue's slots that have been written
    grad_norm: Tensor
    lr: float
    n_tokens: int  # without padding


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of a step: linear warm-up to the peak, then half a cosine down to a tenth of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Model, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, fused into one kernel where the device has it."""
    parameters = list(trainable_parameters(model).values())
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=fused)


def make_queue(model: Model, config: TrainConfig) -> ExpertQueue | None:
    """Return an empty queue for the model's routers, or None if there is no router or no weight on the contrast."""
    n_routers = sum(isinstance(module, Router) for module in model.modules())
    if not model.adapter or not n_routers or not config.contrast_weight:
        return None
    queue = ExpertQueue(n_routers, model.adapter.n_experts, config.queue_capacity, model.adapter.routing_dim)
    return queue.to(model.lm_head.weight.device)


def gather_routing(routings: list[Routing], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return z (L, n, Z), gates (L, n, E) and top-1 experts (L, n) at the flattened positions (n,)."""
    z = torch.stack([r.z.flatten(0, 1)[positions] for r in routings])  # (L, n, Z)
    gates = torch.stack([r.gates.flatten(0, 1)[positions] for r in routings])  # (L, n, E)
    top1 = torch.stack([r.expert_ids[..., 0].flatten()[positions] for r in routings])  # (L, n)
    return z, gates, top1


class Losses(NamedTuple):
    """The unweighted loss terms of one micro-batch, and z and top-1 experts of its anchors, enqueued after the step."""

    terms: dict[str, Tensor]  # "lm", summed over the answer tokens; "balance" and "contrast", means over the sublayers
    routings: list[Routing]  # for custom loss functions, such as those of the ablation
    z: Tensor | None  # (L, n, Z), detached; None without a router
    top1: Tensor | None  # (L, n)


LossFunction = Callable[[Model, Batch, Tensor, ExpertQueue | None, TrainConfig], Losses]


def compute_losses(
    model: Model,
    batch: Batch,
    anchors: Tensor,
    queue: ExpertQueue | None,
    config: TrainConfig,
    all_reduce: AllReduce | None = None,
) -> Losses:
    """Return the losses of a batch. `anchors` (n,) are the flattened positions of the tokens to be contrasted."""
    device = model.lm_head.weight.device
    batch, anchors = batch.to(device), anchors.to(device, non_blocking=True)
    hidden, routings = model.hidden(batch.tokens, recompute=config.recompute)  # (B, T, D), L routings
    head = model.lm_head.dense_weight(hidden.dtype)  # (V, D)
    terms = {"lm": language_model_loss(hidden, head, batch.targets, batch.answer_positions)}
    if not routings:
        return Losses(terms, [], None, None)
    n_groups = model.adapter.n_groups if model.adapter else 1
    balance = [load_balance_loss(r.probs, r.expert_ids, batch.attention_mask, all_reduce, n_groups) for r in routings]
    terms["balance"] = torch.stack(balance).mean()
    z, gates, top1 = gather_routing(routings, anchors)
    if queue is not None:
        terms["contrast"] = contrastive_routing_loss(z, gates, queue.keys, queue.filled(), config.contrast_temperature)
    return Losses(terms, routings, z.detach(), top1)


@torch.no_grad()
def scale_updates(model: Model, before: list[Tensor], group: Tensor, n_groups: int) -> None:
    """Scale the last update of each group's experts by J times the group's share of the anchors (n,), at most 1.

    AdamW's updates have full size for any number of gradients: a few misplaced tokens would make a group forget.
    """
    groups = torch.arange(n_groups, device=group.device)  # (J,)
    factors = ((group.unsqueeze(-1) == groups).to(before[0].dtype).mean(0) * n_groups).clamp(max=1)  # (J,)
    for (name, p), old in zip(trainable_parameters(model).items(), before, strict=True):
        if name.endswith(("router.embeddings", "lora_a")):  # (E, Z), (E*R, D_in)
            p.copy_(torch.lerp(old, p, factors.repeat_interleave(len(p) // n_groups).unsqueeze(-1)))
        elif name.endswith("lora_b"):  # (D_out, E*R)
            p.copy_(torch.lerp(old, p, factors.repeat_interleave(p.shape[1] // n_groups)))


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    queue: ExpertQueue | None,
    batches: list[Batch],
    step: int,
    config: TrainConfig,
    compute_losses: LossFunction = compute_losses,
    all_reduce: AllReduce | None = None,
) -> StepMetrics:
    """Update the trainable parameters and the queue with one batch, given as micro-batches.

    Every example has an answer token. The language-model gradient is that of the whole batch. Load balance, which is
    not a sum over tokens, and contrast are means over the micro-batches. With several processes, each is given the
    whole batch, `compute_losses` returns its share of the losses with z and top-1 of all anchors, and `all_reduce` sums
    in place over the processes (training/parallel.py).
    """
    device = model.lm_head.weight.device
    # One generator per step: its draws do not depend on earlier steps, so no random state is saved.
    rng = random.Random(config.seed * 1_000_003 + step)
    n_answers = sum(len(batch.answer_positions) for batch in batches)
    ramp = min(1.0, (step + 1) / max(1, config.contrast_warmup))
    weights = {"lm": 1.0, "balance": config.balance_weight, "contrast": config.contrast_weight * ramp}
    divisors = {"lm": n_answers, "balance": len(batches), "contrast": len(batches)}
    sums = {"loss": torch.zeros((), device=device)}
    anchor_routing: list[tuple[Tensor, Tensor]] = []

    for batch in rng.sample(batches, len(batches)):  # sorted by length; the queue prefers the keys of the last one
        n = min(len(batch.answer_positions), max(1, config.n_anchors // len(batches)))
        anchors = batch.answer_positions[rng.sample(range(len(batch.answer_positions)), n)]  # (n,)
        losses = compute_losses(model, batch, anchors, queue, config)
        terms = {name: loss / divisors[name] for name, loss in losses.terms.items()}
        total = torch.stack([weights[name] * loss for name, loss in terms.items()]).sum()
        total.backward()
        for name, loss in {"loss": total, **terms}.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
        if losses.z is not None and losses.top1 is not None:
            anchor_routing.append((losses.z, losses.top1))

    parameters = optimizer.param_groups[0]["params"]
    if all_reduce:
        all_reduce([*(p.grad for p in parameters), *sums.values()])
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.param_groups[0]["lr"] = lr = learning_rate(step, config)
    before = [p.detach().clone() for p in parameters] if model.groups else []
    optimizer.step()
    optimizer.zero_grad()

    expert_load = torch.zeros(0, 0, device=device)
    if anchor_routing and model.adapter:
        z, top1 = (torch.cat(tensors, dim=1) for tensors in zip(*anchor_routing, strict=True))  # (L, n, Z), (L, n)
        if model.groups:
            n_groups, n_experts = model.adapter.n_groups, model.adapter.n_experts
            scale_updates(model, before, top1[0] * n_groups // n_experts, n_groups)
        experts = torch.arange(model.adapter.n_experts, device=device)  # (E,)
        expert_load = (top1.unsqueeze(-1) == experts).float().mean(1)  # (L, E)
        if queue is not None:  # after the loss: a token must not find itself among the keys
            queue.enqueue(z, top1, config.queue_share)
    queue_fill = None if queue is None else queue.filled().float().mean()
    n_tokens = sum(int(batch.attention_mask.numpy().sum()) for batch in batches)  # counted on the CPU
    return StepMetrics(sums, expert_load, queue_fill, grad_norm, lr, n_tokens)
