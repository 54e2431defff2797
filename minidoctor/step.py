"""One training step.

    tokens -> model -> hidden, routings -> lm loss on the answer positions only
                            |-> load balance      |-> contrastive routing loss <- expert queue
    backward -> clip -> optimizer step -> queue.enqueue(routings)

Work is done only where it is needed: nothing frozen has a gradient, nothing below the first adapted layer is walked
back, and the vocabulary matrix meets the answer positions alone. Nothing waits for the GPU to say a number.
"""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from minidoctor.config import TrainConfig
from minidoctor.data import Batch, Example, collate
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss, language_model_loss, load_balance_loss
from minidoctor.metrics import Figures
from minidoctor.model import Model, trained_weights
from minidoctor.router import Router, Routing


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then half a cosine down to a tenth of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Model, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is not frozen, updated by one fused kernel where the device has one."""
    trained = list(trained_weights(model).values())
    fused = trained[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=fused
    )
    # Made here and not by the first step, so that a saved state can be copied into it at any step.
    for p in trained:
        step = torch.zeros((), device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def of_tokens(routings: list[Routing], places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z (L, n, Z), gates (L, n, E) and first choices (L, n) of the tokens at some flattened positions (n,)."""
    z, gates, expert_ids = (
        torch.stack([tensor.flatten(0, 1)[places] for tensor in tensors])
        for tensors in zip(*((r.z, r.gates, r.expert_ids[..., 0]) for r in routings), strict=True)
    )
    return z, gates, expert_ids


Auxiliary = Callable[[Batch, list[Routing], Tensor], Tensor]


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    queue: ExpertQueue | None,
    parts: list[Batch],
    step: int,
    config: TrainConfig,
    more: Auxiliary | None = None,
) -> Figures:
    """One optimizer step on a batch given in parts; the language-model gradient is that of the whole batch.

    (Load balance and contrast are not sums over tokens: with several parts they are means over the parts.) `more` is a
    loss that is being studied: of the batch, the routings and the anchors, weighted like the contrast.
    """
    device = model.lm_head.weight.device
    # A generator for each step: what it draws does not depend on what ran before, so nothing need be saved.
    rng = random.Random(config.seed * 1_000_003 + step)
    n_answers = sum(len(batch.answers) for batch in parts)
    warm = min(1.0, (step + 1) / max(1, config.contrast_warmup))
    weights = {"lm": 1.0, "balance": config.balance_weight, "contrast": config.contrast_weight * warm}
    weights["more"] = weights["contrast"]
    losses = {"loss": torch.zeros((), device=device)}
    served: list[tuple[Tensor, Tensor]] = []  # routing vectors and first choices of the anchors

    for batch in parts:
        n = min(len(batch.answers), max(1, config.n_anchors // len(parts)))
        anchors = batch.answers[rng.sample(range(len(batch.answers)), n)].to(device, non_blocking=True)  # (n,)
        batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
        hidden, routings = model.hidden(batch.tokens, recompute=config.recompute)  # (B, T, D), L routings
        lm = language_model_loss(hidden, model.lm_head.weight, batch.targets, batch.answers)
        new = {"lm": lm / n_answers}
        if routings:
            balance = [load_balance_loss(r.probs, r.expert_ids, batch.real) for r in routings]
            new["balance"] = torch.stack(balance).mean() / len(parts)
            z, gates, expert_ids = of_tokens(routings, anchors)  # (L, n, Z), (L, n, E), (L, n)
            served.append((z.detach(), expert_ids))
            if queue:
                contrast = contrastive_routing_loss(z, gates, queue.keys, queue.filled(), config.contrast_temperature)
                new["contrast"] = contrast / len(parts)
            if more:
                new["more"] = more(batch, routings, anchors) / len(parts)
        total = torch.stack([weights[name] * loss for name, loss in new.items()]).sum()
        total.backward()
        for name, loss in {"loss": total, **new}.items():
            losses[name] = losses.get(name, 0.0) + loss.detach()

    trained = optimizer.param_groups[0]["params"]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
    lr = learning_rate(step, config)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    load = torch.zeros(0, 0, device=device)
    if served and model.adapter:
        z, expert_ids = (torch.cat(tensors, dim=1) for tensors in zip(*served, strict=True))
        experts = torch.arange(model.adapter.n_experts, device=device)  # (E,)
        load = (expert_ids.unsqueeze(-1) == experts).float().mean(1)  # (L, E)
        if queue:  # only now: a token must not meet itself among the keys
            queue.enqueue(z, expert_ids, config.queue_share)
    n_tokens = sum(int(batch.real.numpy().sum()) for batch in parts)  # they were made on the CPU
    return Figures(losses, load, grad_norm, lr, n_tokens)


def parts_of(examples: list[Example], n: int) -> list[Batch]:
    """A batch in at most n parts, the last perhaps smaller; like lengths together, so that little is padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    size = math.ceil(len(ordered) / n)
    return [collate(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def make_queue(model: Model, config: TrainConfig) -> ExpertQueue | None:
    """None where there is nothing to contrast: one expert, or no weight on the loss."""
    adapter = model.adapter
    if not adapter or adapter.n_experts == 1 or not config.contrast_weight:
        return None
    n_layers = sum(isinstance(module, Router) for module in model.modules())
    queue = ExpertQueue(n_layers, adapter.n_experts, config.queue_capacity, adapter.routing_dim)
    return queue.to(model.lm_head.weight.device)
