"""Data-parallel training with torch.distributed: `torchrun --nproc-per-node N train.py ...`.

Every process builds the same global batch, draws the same anchors and computes its rows of the batch. Each loss is the
process's share of the loss of the global batch, so that sums over the processes give exactly the step of one process:

    language model   summed over answer tokens, divided by those of the global batch
    load balance     f and the number of tokens are those of the global batch (per-process balance works against
                     specialization: https://arxiv.org/abs/2505.22323)
    contrast         divided by the anchors of the global batch; all anchors are compared with the same keys
    queue            all processes enqueue the same vectors in the same order, so that all rings are equal

Gradients are summed once per step, after the last micro-batch. With --shard, the frozen weights are sharded.
"""

import torch
from torch import Tensor

from minidoctor.batching import IGNORE, Batch
from minidoctor.cli.processes import Processes
from minidoctor.config import TrainConfig
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss, language_model_loss, load_balance_loss
from minidoctor.model import Model, trainable_parameters
from minidoctor.step import Losses, gather_routing


def compute_share(
    model: Model, batch: Batch, anchors: Tensor, queue: ExpertQueue | None, config: TrainConfig, processes: Processes
) -> Losses:
    """Return this process's share of the losses, and z and top-1 experts of all anchors.

    With functools.partial(compute_share, processes=...) it takes the place of step.compute_losses.
    """
    device = model.lm_head.weight.device
    batch, anchors, is_local = take_share(batch, anchors, processes.rank, processes.size)
    batch, anchors, is_local = batch.to(device), anchors.to(device), is_local.to(device)
    hidden, routings = model.hidden(batch.tokens, recompute=config.recompute)  # (B, T, D), L routings
    terms = {"lm": language_model_loss(hidden, model.lm_head.weight, batch.targets, batch.answer_positions)}
    if not routings:
        return Losses(terms, [], None, None)
    balance = [load_balance_loss(r.probs, r.expert_ids, batch.attention_mask, processes.all_reduce) for r in routings]
    terms["balance"] = torch.stack(balance).mean()
    z, gates, top1 = gather_routing(routings, anchors)
    if queue is not None:
        # Anchors of other processes get gates of 0 and contribute 0 to the mean over all anchors.
        gates = gates * is_local.unsqueeze(-1)  # (L, n, E)
        keys, filled = queue.keys, queue.filled()
        terms["contrast"] = contrastive_routing_loss(z, gates, keys, filled, config.contrast_temperature)
    z, top1 = z.detach() * is_local.unsqueeze(-1), top1 * is_local  # (L, n, Z), (L, n)
    for tensor in (z, top1):
        processes.all_reduce([tensor])  # exact: every entry is 0 in all processes but one
    return Losses(terms, routings, z, top1)


def take_share(batch: Batch, anchors: Tensor, rank: int, size: int) -> tuple[Batch, Tensor, Tensor]:
    """Return rows rank, rank + size, ... of a batch, the anchors' positions in it, and which anchors it contains (n,).

    A process without rows gets one without answer tokens, which contributes 0 to every loss.
    """
    rows = torch.arange(len(batch.tokens))[rank::size]
    is_empty = len(rows) == 0
    rows = torch.zeros(1, dtype=torch.long) if is_empty else rows
    tokens, targets, mask = batch.tokens[rows], batch.targets[rows], batch.attention_mask[rows]
    if is_empty:
        targets, mask = torch.full_like(targets, IGNORE), torch.zeros_like(mask)
    length = max(1, int(mask.sum(1).max()))
    tokens, targets, mask = tokens[:, :length], targets[:, :length], mask[:, :length]
    answer_positions = (targets.flatten() != IGNORE).nonzero().squeeze(1)
    row, column = anchors // batch.tokens.shape[1], anchors % batch.tokens.shape[1]
    is_local = row % size == rank
    local_anchors = torch.where(is_local, row // size * length + column, 0)
    return Batch(tokens, targets, mask, answer_positions), local_anchors, is_local


def shard_base(model: Model, device: torch.device, processes: Processes) -> None:
    """Move the model to the device, its frozen weights sharded over the processes with FSDP2.

    Each block gathers its weights when it is used. Experts and routers stay replicated: they are small, and their
    gradients are summed by `Processes.all_reduce`. From now on every forward pass is a collective operation.
    """
    # Imported here, because it takes half a second that other runs need not spend.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (processes.size,))
    adapter = set(trainable_parameters(model).values())
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    # Embedding and output layer stay gathered after the forward pass, because the loss needs them.
    fully_shard(model, mesh=mesh, ignored_params=adapter, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    with torch.no_grad():  # buffers first allocated in inference mode, as by an evaluation, could not be trained with
        model.hidden(torch.zeros(1, 1, dtype=torch.long, device=device))
    reshard(model)


def reshard(model: Model) -> None:
    """Drop the weights that an evaluation has left gathered, in all processes alike. Does nothing without shards.

    The first process saves, which reshards its weights, and the processes must agree on what the next step gathers.
    """
    for module in model.modules():
        if drop := getattr(module, "reshard", None):  # a method that fully_shard adds
            drop()
