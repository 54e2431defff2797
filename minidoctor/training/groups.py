"""The groups of experts, learned before the training: a contrast of prompts with a queue as its memory.

A prompt is the mean of its token embeddings. Two random halves of its tokens are two views, and from each one the group
of the other is predicted. Groups are assigned so that all get equal parts of the batch and of the earlier prompts in
the queue, since otherwise one group for everything would be the easiest to predict. No labels are used.

https://arxiv.org/abs/2006.09882, sections 3.1 and 3.2, with fixed features: only the centres of the groups are trained.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.batching import IGNORE, Example, collate
from minidoctor.expert_queue import ExpertQueue
from minidoctor.model import Model
from minidoctor.ops.precision import at_least_float32

MAX_PROMPTS = 500
BATCH_SIZE, STEPS, CAPACITY, LR = 32, 200, 256, 0.05
TEMPERATURE, ASSIGNMENT_TEMPERATURE = 0.1, 0.05  # as in the reference


@torch.no_grad()
def prompt_views(model: Model, examples: list[Example], mean: Tensor, seed: int) -> Tensor:
    """Return the mean embeddings (2, n, D) of two random halves of each prompt, minus `mean` (D,), with length 1."""
    batch = collate(examples)
    prompt = (batch.targets != IGNORE).cumsum(1) == 0  # (n, T)
    half = torch.rand(prompt.shape, generator=torch.Generator().manual_seed(seed)) < 0.5  # (n, T)
    table = model.model.embed_tokens.weight
    views = []
    for mask in (prompt & half, prompt & ~half):
        sums = [at_least_float32(table[row[chosen]]).sum(0) for row, chosen in zip(batch.tokens, mask, strict=True)]
        counts = mask.sum(1, keepdim=True).to(mean.device)  # (n, 1)
        views.append(F.normalize(torch.stack(sums) - counts * mean, dim=-1))
    return torch.stack(views).cpu()


def balanced_assignments(scores: Tensor, n_rounds: int = 3) -> Tensor:
    """Return probabilities (n, J) for scores (n, J) that give every group the same total, by Sinkhorn's algorithm."""
    q = (scores / ASSIGNMENT_TEMPERATURE).softmax(dim=-1)
    for _ in range(n_rounds):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def learn_centres(views: Tensor, n_groups: int, seed: int) -> Tensor:
    """Return centres (J, D) of length 1 such that each of two views (2, n, D) predicts the other's group."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_groups, views.shape[-1], generator=generator).requires_grad_()
    optimizer, queue = torch.optim.Adam([centres], lr=LR), ExpertQueue(2, 1, CAPACITY, views.shape[-1])
    for _ in range(STEPS):
        batch = views[:, torch.randperm(views.shape[1], generator=generator)[:BATCH_SIZE]]  # (2, n, D)
        keys = queue.keys[:, 0, queue.filled()[0, 0]]  # (2, up to Q, D)
        scores = torch.cat([batch, keys], dim=1) @ F.normalize(centres, dim=-1).T  # (2, n + Q, J)
        targets = torch.stack([balanced_assignments(view) for view in scores.detach()])[:, : batch.shape[1]]
        log_probs = (scores[:, : batch.shape[1]] / TEMPERATURE).log_softmax(dim=-1)  # (2, n, J)
        loss = -(targets.flip(0) * log_probs).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(batch, torch.zeros(batch.shape[:2], dtype=torch.long), CAPACITY)
    return F.normalize(centres.detach(), dim=-1)


def learn_groups(model: Model, examples: list[Example], seed: int) -> None:
    """Learn the centres of the model's groups from the prompts of the examples. Does nothing without groups."""
    if model.groups is None:
        return
    # At random: evenly spaced rows of a file that alternates between two languages can be of one.
    examples = random.Random(seed).sample(examples, min(len(examples), MAX_PROMPTS))
    groups, table = model.groups, model.model.embed_tokens.weight.detach()
    groups.mean.copy_(table.mean(0, dtype=torch.promote_types(table.dtype, torch.float32)))
    views = prompt_views(model, examples, groups.mean, seed)
    groups.centres.copy_(learn_centres(views, len(groups.centres), seed))
