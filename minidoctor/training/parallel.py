"""Data-parallel training with torch.distributed: `torchrun --nproc-per-node N train.py ...`.

Every process builds the same global batch, draws the same anchors and computes its rows of the batch. Each loss is the
process's share of the loss of the global batch, so that sums over the processes give exactly the step of one process:

    language model   summed over answer tokens, divided by those of the global batch
    load balance     f and the number of tokens are those of the global batch (per-process balance works against
                     specialization: https://arxiv.org/abs/2505.22323)
    contrast         divided by the anchors of the global batch; all anchors are compared with the same keys
    queue            all processes enqueue the same vectors in the same order, so that all rings are equal

Gradients are summed once per step, after the last micro-batch.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minidoctor.batching import IGNORE, Batch
from minidoctor.config import TrainConfig, UserError
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss, language_model_loss, load_balance_loss
from minidoctor.model import Model
from minidoctor.step import Losses, gather_routing


@dataclass(frozen=True)
class Processes:
    """The processes of a run. A run without torchrun has one, which communicates with nobody."""

    rank: int = 0
    size: int = 1
    restarts: int = 0  # how often torchrun has started them again

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, condition: bool) -> bool:
        """Return whether the condition holds in any process. The tensor is on the CPU, so no GPU is waited for."""
        if self.size == 1:
            return condition
        count = torch.tensor(int(condition))
        dist.all_reduce(count)
        return bool(count)

    def barrier(self) -> None:
        if self.size > 1:
            self.any(False)

    def compute_losses(
        self, model: Model, batch: Batch, anchors: Tensor, queue: ExpertQueue | None, config: TrainConfig
    ) -> Losses:
        """Return this process's share of the losses, and z and top-1 experts of all anchors."""
        device = model.lm_head.weight.device
        batch, anchors, is_local = take_share(batch, anchors, self.rank, self.size)
        batch, anchors, is_local = batch.to(device), anchors.to(device), is_local.to(device)
        hidden, routings = model.hidden(batch.tokens, recompute=config.recompute)  # (B, T, D), L routings
        terms = {"lm": language_model_loss(hidden, model.lm_head.weight, batch.targets, batch.answer_positions)}
        if not routings:
            return Losses(terms, [], None, None)
        balance = [load_balance_loss(r.probs, r.expert_ids, batch.attention_mask, self.all_reduce) for r in routings]
        terms["balance"] = torch.stack(balance).mean()
        z, gates, top1 = gather_routing(routings, anchors)
        if queue:
            # Anchors of other processes get gates of 0 and contribute 0 to the mean over all anchors.
            gates = gates * is_local.unsqueeze(-1)  # (L, n, E)
            keys, filled = queue.keys, queue.filled()
            terms["contrast"] = contrastive_routing_loss(z, gates, keys, filled, config.contrast_temperature)
        z, top1 = z.detach() * is_local.unsqueeze(-1), top1 * is_local  # (L, n, Z), (L, n)
        for tensor in (z, top1):
            self.all_reduce([tensor])  # exact: every entry is 0 in all processes but one
        return Losses(terms, routings, z, top1)


def take_share(batch: Batch, anchors: Tensor, rank: int, size: int) -> tuple[Batch, Tensor, Tensor]:
    """Return rows rank, rank + size, ... of a batch, the anchors' positions in it, and which anchors it contains (n,).

    A process without rows gets one without answer tokens, which contributes 0 to every loss.
    """
    rows = torch.arange(len(batch.tokens))[rank::size]
    if len(rows):
        tokens, targets, mask = batch.tokens[rows], batch.targets[rows], batch.attention_mask[rows]
    else:
        tokens, targets, mask = (
            batch.tokens[:1],
            torch.full_like(batch.targets[:1], IGNORE),
            batch.attention_mask[:1] & False,
        )
    length = max(1, int(mask.sum(1).max()))
    tokens, targets, mask = tokens[:, :length], targets[:, :length], mask[:, :length]
    answer_positions = (targets.flatten() != IGNORE).nonzero().squeeze(1)
    row, column = anchors // batch.tokens.shape[1], anchors % batch.tokens.shape[1]
    is_local = row % size == rank
    local_anchors = torch.where(is_local, row // size * length + column, 0)
    return Batch(tokens, targets, mask, answer_positions), local_anchors, is_local


def start_processes(device: torch.device) -> Processes:
    """Join the processes that torchrun started, or return the single one. Raises UserError if the launch is wrong."""
    if not dist.is_torchelastic_launched():
        return Processes()
    if device.type == "cuda":
        local_rank, n_gpus = dist.get_node_local_rank(), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(f"process {local_rank} of this machine has no GPU: {n_gpus} found; lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
    # gloo for tensors on the CPU, so that flags are exchanged without waiting for a GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Processes(dist.get_rank(), dist.get_world_size(), restarts)
