"""What the experts do: which tokens they serve, whether they divide the work by topic or language, how alike they are.

    load entropy            of an expert's share of first choices, over log E: 1 when all serve alike
    starved                 experts with less than a tenth of their fair share
    mutual information      of first expert and topic (or language), in bits; of so many tokens it is never 0, so it is
                            given beside what remains of it when the questions' topics are shuffled
    likeness                mean cosine of two experts' updates B_i A_i as matrices: that of outputs, for random inputs

Measured on the answer tokens of questions, layer by layer, then averaged. Questions about one condition share its topic
and its name: what an expert tells of the topic, it may tell of the name.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.batching import collate
from minidoctor.config import UserError
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer, encode_conversation


class Top1(NamedTuple):
    """The first choice of each answer token in each sublayer, and the question it belongs to."""

    expert_ids: Tensor  # (L, n)
    question: Tensor  # (n,)


@torch.inference_mode()
def top1_experts(
    model: Model, tokenizer: Tokenizer, rows: list[Row], max_seq_len: int | None = None, batch_size: int = 32
) -> Top1:
    """Asks the questions with their right answers. Raises ValueError for a model without a router."""
    device, limit = model.lm_head.weight.device, max_seq_len or model.config.max_seq_len
    examples = [encode_conversation(row.messages, tokenizer, limit) for row in rows]
    ids, question = [], []
    for start in range(0, len(rows), batch_size):
        batch = collate(examples[start : start + batch_size])
        _, routings = model.hidden(batch.tokens.to(device))
        if not routings:
            raise UserError("this adapter has no router: with one expert there is nothing to choose")
        first = torch.stack([r.expert_ids[..., 0].flatten() for r in routings]).cpu()  # (L, B*T)
        ids.append(first[:, batch.answer_positions])
        question.append(start + batch.answer_positions // batch.tokens.shape[1])
    return Top1(torch.cat(ids, dim=1), torch.cat(question))


def shares(labels: Tensor, expert_ids: Tensor, n_experts: int) -> Tensor:
    """Labels (n,) of tokens and their experts (L, n) -> their joint distribution (L, E, J), each layer's sum 1."""
    n_labels = int(labels.max()) + 1
    cells = expert_ids * n_labels + labels  # (L, n)
    counts = torch.stack([layer.bincount(minlength=n_experts * n_labels) for layer in cells])  # (L, E*J)
    return (counts.double() / len(labels)).unflatten(1, (n_experts, n_labels))  # (L, E, J)


def mutual_information(joint: Tensor) -> float:
    """sum p(e, j) log2(p(e, j) / p(e) p(j)) of (L, E, J), in bits, mean over layers."""
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)  # (L, E, J)
    return torch.where(joint > 0, joint * (joint / apart).log2(), 0.0).sum((1, 2)).mean().item()


def label_information(found: Top1, of_question: list[str], n_experts: int, n_shuffles: int = 20) -> dict[str, float]:
    """Mutual information of first expert and a label of the questions, and what shuffling the labels leaves of it."""
    names = sorted(set(of_question))
    labels = torch.tensor([names.index(name) for name in of_question])  # (questions,)
    generator, chance = torch.Generator().manual_seed(0), []
    for _ in range(n_shuffles):
        # Whole questions change their label, not single tokens: those of one question are alike whatever it is about.
        other = labels[torch.randperm(len(labels), generator=generator)]
        chance.append(mutual_information(shares(other[found.question], found.expert_ids, n_experts)))
    bits = mutual_information(shares(labels[found.question], found.expert_ids, n_experts))
    return {"bits": bits, "shuffled": sum(chance) / n_shuffles}


def expert_load(found: Top1, n_experts: int) -> Tensor:
    """Share of all tokens that go to an expert first (L, E)."""
    return shares(torch.zeros_like(found.question), found.expert_ids, n_experts).squeeze(2)  # (L, E)


def load_statistics(found: Top1, n_experts: int) -> dict[str, float]:
    load = expert_load(found, n_experts)  # (L, E)
    entropy = torch.special.entr(load).sum(1) / math.log(n_experts)  # (L,)
    starved = int((load < 0.1 / n_experts).sum())
    return {"entropy": entropy.mean().item(), "starved": starved, "experts": load.numel(), "least": load.min().item()}


@torch.inference_mode()
def mean_cosine_similarity(model: Model) -> float:
    """Mean over the adapted linears of the mean cosine of two experts' updates.

    <B_i A_i, B_j A_j> = sum of the entries of (B_i^T B_j) * (A_i A_j^T): no update is ever written out.
    """
    means = []
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            a, b = layer.lora_a, layer.lora_b  # (E*R, D_in), (D_out, E*R)
            inner = (b.T @ b) * (a @ a.T)  # (E*R, E*R)
            n = len(a) // layer.rank
            inner = inner.unflatten(0, (n, -1)).unflatten(2, (n, -1)).sum((1, 3))  # (E, E)
            length = inner.diagonal().clamp_min(1e-30).sqrt()  # (E,)
            cosine = inner / length / length[:, None]  # (E, E)
            means.append((cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1)))
    return torch.stack(means).mean().item()
