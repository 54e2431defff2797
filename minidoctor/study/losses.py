"""The contrastive routing loss without a queue: its keys are other answer tokens of the same batch."""

import torch
from torch import Tensor

from minidoctor.batching import Batch
from minidoctor.config import TrainConfig
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss
from minidoctor.model import Model
from minidoctor.router import Routing
from minidoctor.step import Losses, compute_losses, gather_routing


def compute_losses_in_batch(
    model: Model, batch: Batch, anchors: Tensor, queue: ExpertQueue | None, config: TrainConfig
) -> Losses:
    """Return the losses of a batch with the in-batch contrast in place of the contrast with the queue."""
    losses = compute_losses(model, batch, anchors, None, config)
    contrast = contrast_in_batch(losses.routings, batch.answer_positions, anchors, config.contrast_temperature)
    return losses._replace(terms=losses.terms | {"contrast": contrast})


def contrast_in_batch(routings: list[Routing], answer_positions: Tensor, anchors: Tensor, temperature: float) -> Tensor:
    """Contrast the anchors (n,) with all other answer positions (m,), or, if these are few, half of them."""
    anchors = anchors[: max(1, len(answer_positions) // 2)]
    z, gates, _ = gather_routing(routings, anchors)  # (L, n, Z), (L, n, E)
    keys, _, top1 = gather_routing(routings, answer_positions[~torch.isin(answer_positions, anchors)])  # (L, m, Z)
    n_layers, n_keys, routing_dim = keys.shape
    # A queue of this step only, with a slot for every key.
    queue = ExpertQueue(n_layers, gates.shape[-1], max(1, n_keys), routing_dim)
    if n_keys:
        queue.enqueue(keys.detach(), top1, n_keys)
    return contrastive_routing_loss(z, gates, queue.keys, queue.filled(), temperature)
