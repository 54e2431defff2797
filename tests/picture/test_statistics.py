import math
from collections import Counter

import pytest
import torch

from minidoctor.config import AdapterConfig
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model
from minidoctor.picture.statistics import (
    Top1,
    label_information,
    load_statistics,
    mean_cosine_similarity,
    mutual_information,
    shares,
    top1_experts,
)
from minidoctor.questions.json_rows import parse_row

ROWS = [
    parse_row({"question": "gout?", "answer": "uric acid in the joint", "topic": "a"}, "1"),
    parse_row({"question": "痛风的关键检查？", "answer": "尿酸", "topic": "b"}, "2"),
    parse_row({"question": "asthma, at night?", "answer": "wheezing", "topic": "a"}, "3"),
]


def test_served_is_what_each_question_alone_is_routed_to(adapted, tokenizer):
    together = top1_experts(adapted, tokenizer, ROWS, batch_size=2)
    for i, row in enumerate(ROWS):
        alone = top1_experts(adapted, tokenizer, [row])
        assert torch.equal(together.expert_ids[:, together.question == i], alone.expert_ids)
    assert len(set(together.expert_ids.flatten().tolist())) > 1
    n_answers = len(tokenizer.encode(" wheezing"))
    assert n_answers <= int((together.question == 2).sum()) <= n_answers + 1  # and the token that ends it


def test_a_model_without_a_router_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no router"):
        top1_experts(model, tokenizer, ROWS)


def test_shares_count_tokens():
    ids, labels = torch.randint(0, 3, (2, 50)), torch.randint(0, 4, (50,))
    joint = shares(labels, ids, 3)
    for layer in range(2):
        counted = Counter(zip(ids[layer].tolist(), labels.tolist(), strict=True))
        for e in range(3):
            for j in range(4):
                assert joint[layer, e, j].item() == pytest.approx(counted[e, j] / 50)


def test_mutual_information_of_the_textbook():
    # Independent: 0; a copy of a fair coin: one bit; layers are averaged.
    independent, copy = torch.full((2, 2), 0.25), torch.eye(2) / 2
    joint = torch.stack([independent, copy]).double()
    assert mutual_information(joint) == pytest.approx(0.5)


def test_shuffled_labels_show_what_is_chance():
    torch.manual_seed(0)
    question = torch.arange(200).repeat_interleave(3)
    labels = ["ab"[i % 2] for i in range(200)]
    told = Top1((question % 2)[None], question)  # the expert is the label
    found = label_information(told, labels, 2)
    assert found["bits"] == pytest.approx(1)
    assert found["shuffled"] < 0.05
    blind = Top1(torch.randint(0, 2, (1, 600)), question)
    found = label_information(blind, labels, 2)
    assert found["bits"] < 0.03
    assert 0 < found["shuffled"] < 0.03


def test_load():
    even = Top1(torch.arange(80).remainder(4)[None], torch.zeros(80, dtype=torch.long))
    assert load_statistics(even, 4) == {"entropy": pytest.approx(1), "starved": 0, "experts": 4, "least": 0.25}
    uneven = Top1(torch.tensor([[0] * 79 + [1]]), torch.zeros(80, dtype=torch.long))
    found = load_statistics(uneven, 4)
    assert found["starved"] == 3  # one share in eighty is below a tenth of a quarter
    p = 1 / 80
    assert found["entropy"] == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(4))


def test_likeness_is_the_cosine_of_written_out_updates(config):
    model = Model(config, AdapterConfig(3, 2, 2, targets=("up_proj", "down_proj")))
    expected = []
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            torch.nn.init.normal_(layer.lora_b)
            updates = torch.stack([
                (layer.lora_b[:, 2 * e : 2 * e + 2] @ layer.lora_a[2 * e : 2 * e + 2]).flatten() for e in range(3)
            ])  # fmt: skip
            expected += [torch.cosine_similarity(updates[i], updates[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_cosine_similarity(model) == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
