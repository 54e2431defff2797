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
from minidoctor.model import Model, trainable_parameters
from minidoctor.step import Losses, compute_losses


def compute_share(
    model: Model, batch: Batch, anchors: Tensor, queue: ExpertQueue | None, config: TrainConfig, processes: Processes
) -> Losses:
    """Return this process's share of the losses, and z and top-1 experts of all anchors.

    With functools.partial(compute_share, processes=...) it takes the place of step.compute_losses.
    """
    share, local_anchors, is_local = take_share(batch, anchors, processes.rank, processes.size)
    losses = compute_losses(model, share, local_anchors, queue, config, processes.all_reduce)
    if losses.z is None or losses.top1 is None:
        return losses
    n_local, terms = int(is_local.sum()), dict(losses.terms)
    if "contrast" in terms:  # the mean over local anchors becomes their part of the mean over all
        terms["contrast"] = terms["contrast"] * (n_local / len(anchors))
    z = losses.z.new_zeros(len(losses.z), len(anchors), losses.z.shape[-1])  # (L, n, Z)
    top1 = losses.top1.new_zeros(len(losses.top1), len(anchors))  # (L, n)
    columns = is_local.nonzero().squeeze(1).to(z.device)  # (n_local,)
    z[:, columns], top1[:, columns] = losses.z[:, :n_local], losses.top1[:, :n_local]
    for tensor in (z, top1):
        processes.all_reduce([tensor])  # exact: every entry is 0 in all processes but one
    return Losses(terms, losses.routings, z, top1)


def take_share(batch: Batch, anchors: Tensor, rank: int, size: int) -> tuple[Batch, Tensor, Tensor]:
    """Return rows rank, rank + size, ... of a batch, positions of its anchors, and which of all anchors they are (n,).

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
    local_anchors = (row // size * length + column)[is_local]
    if not len(local_anchors):
        local_anchors = torch.zeros(1, dtype=torch.long)  # a mean needs one; it is multiplied by 0
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
    if model.groups:
        model.groups.to(device)
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
