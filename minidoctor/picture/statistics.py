"""Statistics of the routing: how the load is spread over experts, and whether experts specialize.

    load entropy            entropy of the shares of top-1 choices, divided by log E: 1 for equal shares
    underused experts       those with less than a tenth of the equal share 1/E
    mutual information      of top-1 expert and topic (or language), in bits. It is above 0 by chance, so it is reported
                            next to its mean over shuffles of the topics among the questions
    mean cosine similarity  of two experts' updates B_i A_i as matrices, 0 for unrelated updates

Measured on the answer tokens of questions, per sublayer, then averaged. Questions about one condition share both its
topic and its name, so an expert that depends on the name also has information about the topic.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.batching import collate
from minidoctor.checkpoints.hugging_face import explain_non_finite
from minidoctor.config import UserError, check
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer, encode_conversation

UNDERUSED = 0.1  # of the equal share


class Top1(NamedTuple):
    """The top-1 expert of each answer token in each sublayer, and the question that the token belongs to."""

    expert_ids: Tensor  # (L, n)
    question: Tensor  # (n,), indices of rows


class LoadStatistics(NamedTuple):
    entropy: float  # mean over sublayers
    underused: int  # over all sublayers
    least: float  # smallest share of an expert in a sublayer


class LabelInformation(NamedTuple):
    bits: float
    shuffled: float


@torch.inference_mode()
def top1_experts(
    model: Model, tokenizer: Tokenizer, rows: list[Row], max_seq_len: int | None = None, batch_size: int = 32
) -> Top1:
    """Return the top-1 experts for rows with their reference answers. Raises UserError without router or answers."""
    device, limit = model.lm_head.weight.device, max_seq_len or model.config.max_seq_len
    examples = [encode_conversation(row.messages, tokenizer, limit) for row in rows]
    ids, question = [], []
    for start in range(0, len(rows), batch_size):
        batch = collate(examples[start : start + batch_size])
        hidden, routings = model.hidden(batch.tokens.to(device))
        if not routings:
            raise UserError("this adapter has one expert and no router; routing statistics need --n-experts above 1")
        if not hidden.isfinite().all():
            raise UserError(f"the hidden states are not finite: {explain_non_finite(model)}")
        top1 = torch.stack([r.expert_ids[..., 0].flatten() for r in routings]).cpu()  # (L, B*T)
        ids.append(top1[:, batch.answer_positions])
        question.append(start + batch.answer_positions // batch.tokens.shape[1])
    check(any(map(len, question)), f"no question has an answer within the first {limit} tokens")
    return Top1(torch.cat(ids, dim=1), torch.cat(question))


def expert_load(top1: Top1, n_experts: int) -> Tensor:
    """Return each expert's share of the tokens (L, E)."""
    counts = torch.stack([ids.bincount(minlength=n_experts) for ids in top1.expert_ids])  # (L, E)
    return counts.double() / len(top1.question)


def load_statistics(top1: Top1, n_experts: int) -> LoadStatistics:
    load = expert_load(top1, n_experts)  # (L, E)
    entropy = torch.special.entr(load).sum(1) / math.log(n_experts)  # (L,)
    underused = int((load < UNDERUSED / n_experts).sum())
    return LoadStatistics(entropy.mean().item(), underused, load.min().item())


def joint_distribution(top1: Top1, labels: list[str], n_experts: int) -> Tensor:
    """Return p(expert, label) over the tokens (L, E, J) for one label per question. J: labels in sorted order."""
    names = {name: j for j, name in enumerate(sorted(set(labels)))}
    label = torch.tensor([names[name] for name in labels])[top1.question]  # (n,)
    cells = top1.expert_ids * len(names) + label  # (L, n)
    counts = torch.stack([row.bincount(minlength=n_experts * len(names)) for row in cells])  # (L, E*J)
    return (counts.double() / len(label)).unflatten(1, (n_experts, len(names)))  # (L, E, J)


def mutual_information(joint: Tensor) -> Tensor:
    """Return sum_ej p(e, j) log2(p(e, j) / p(e) p(j)) in bits for each sublayer (L,)."""
    independent = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)  # (L, E, J)
    return torch.where(joint > 0, joint * (joint / independent).log2(), 0.0).sum((1, 2))


def label_information(top1: Top1, labels: list[str], n_experts: int, n_shuffles: int = 20) -> LabelInformation:
    """Return the mutual information of top-1 expert and label, and its mean over shuffles of the labels."""
    generator, shuffled = torch.Generator().manual_seed(0), 0.0
    for _ in range(n_shuffles):
        # Shuffled among questions and not among tokens, because the tokens of a question are not independent.
        order = torch.randperm(len(labels), generator=generator).tolist()
        joint = joint_distribution(top1, [labels[i] for i in order], n_experts)
        shuffled += mutual_information(joint).mean().item() / n_shuffles
    return LabelInformation(mutual_information(joint_distribution(top1, labels, n_experts)).mean().item(), shuffled)


def lift(joint: Tensor) -> Tensor:
    """Return p(label | expert) / p(label) of one sublayer (E, J), NaN for underused experts: too few tokens."""
    load = joint.sum(1, keepdim=True)  # (E, 1)
    return torch.where(load < UNDERUSED / len(load), torch.nan, joint / load / joint.sum(0))


@torch.inference_mode()
def mean_cosine_similarity(model: Model) -> float:
    """Return the mean cosine of two experts' updates over all pairs of experts and all adapted layers.

    <B_i A_i, B_j A_j> is the sum of the entries of (B_i^T B_j) * (A_i A_j^T), so no update matrix is computed.
    """
    means = []
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            a, b = layer.lora_a, layer.lora_b  # (E*R, D_in), (D_out, E*R)
            inner = (b.T @ b) * (a @ a.T)  # (E*R, E*R)
            n = len(a) // layer.rank
            inner = inner.unflatten(0, (n, -1)).unflatten(2, (n, -1)).sum((1, 3))  # (E, E)
            norm = inner.diagonal().clamp_min(1e-30).sqrt()  # (E,)
            cosine = inner / norm / norm[:, None]  # (E, E)
            means.append((cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1)))
    return torch.stack(means).mean().item()
