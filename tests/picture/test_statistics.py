import math
from collections import Counter

import pytest
import torch

from minidoctor.config import AdapterConfig, UserError
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model
from minidoctor.picture.statistics import (
    Top1,
    expert_load,
    joint_distribution,
    label_information,
    lift,
    load_statistics,
    mean_cosine_similarity,
    mutual_information,
    top1_experts,
)
from minidoctor.questions.json_rows import parse_row

ROWS = [
    parse_row({"question": "gout?", "answer": "uric acid in the joint", "topic": "a"}, "1"),
    parse_row({"question": "痛风的关键检查？", "answer": "尿酸", "topic": "b"}, "2"),
    parse_row({"question": "asthma, at night?", "answer": "wheezing", "topic": "a"}, "3"),
]


def test_top1_experts_of_a_batch_equal_those_of_single_questions(adapted, tokenizer):
    batched = top1_experts(adapted, tokenizer, ROWS, batch_size=2)
    for i, row in enumerate(ROWS):
        single = top1_experts(adapted, tokenizer, [row])
        assert torch.equal(batched.expert_ids[:, batched.question == i], single.expert_ids)
    assert len(set(batched.expert_ids.flatten().tolist())) > 1
    n_answer = len(tokenizer.encode(" wheezing"))
    assert n_answer <= int((batched.question == 2).sum()) <= n_answer + 1  # plus the token that ends the answer


def test_top1_experts_need_a_router_and_an_answer(model, adapted, tokenizer):
    with pytest.raises(UserError, match="no router"):
        top1_experts(model, tokenizer, ROWS)
    with pytest.raises(UserError, match="first 2 tokens"):
        top1_experts(adapted, tokenizer, ROWS, max_seq_len=2)


def test_top1_experts_need_finite_weights(adapted, tokenizer):
    with torch.no_grad():
        adapted.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        top1_experts(adapted, tokenizer, ROWS)


def test_joint_distribution_counts_tokens():
    question, labels = torch.randint(0, 5, (50,)), ["b", "a", "d", "a", "c"]
    top1 = Top1(torch.randint(0, 3, (2, 50)), question)
    joint, load = joint_distribution(top1, labels, 3), expert_load(top1, 3)
    for layer in range(2):
        experts = top1.expert_ids[layer].tolist()
        counts = Counter((e, labels[q]) for e, q in zip(experts, question.tolist(), strict=True))
        for e in range(3):
            assert load[layer, e].item() == pytest.approx(experts.count(e) / 50)
            for j, label in enumerate("abcd"):
                assert joint[layer, e, j].item() == pytest.approx(counts[e, label] / 50)


def test_joint_distribution_has_a_column_for_a_label_without_tokens():
    top1 = Top1(torch.tensor([[0, 1]]), torch.tensor([0, 0]))
    assert joint_distribution(top1, ["a", "b"], 2).tolist() == [[[0.5, 0], [0.5, 0]]]


def test_mutual_information_of_independence_is_0_and_of_a_copied_fair_coin_1_bit():
    joint = torch.stack([torch.full((2, 2), 0.25), torch.eye(2) / 2]).double()
    assert mutual_information(joint).tolist() == pytest.approx([0, 1])


def test_shuffled_label_information_is_chance_level():
    question = torch.arange(200).repeat_interleave(3)
    labels = ["ab"[i % 2] for i in range(200)]
    specialized = Top1((question % 2)[None], question)  # the expert equals the label
    information = label_information(specialized, labels, 2)
    assert information.bits == pytest.approx(1)
    assert 0 < information.shuffled < 0.05
    unrelated = Top1(torch.randint(0, 2, (1, 600)), question)
    information = label_information(unrelated, labels, 2)
    assert information.bits < 0.03
    assert 0 < information.shuffled < 0.03


def test_lift_is_the_ratio_of_counted_shares_and_nan_for_underused_experts():
    labels = ["a", "b", "c", "b", "a"]
    top1 = Top1(torch.randint(0, 4, (1, 400)), torch.randint(0, 5, (400,)))
    top1.expert_ids[top1.expert_ids == 3] = 2
    top1.expert_ids[0, 0] = 3  # one token of 400
    pairs = list(zip(top1.expert_ids[0].tolist(), [labels[q] for q in top1.question.tolist()], strict=True))
    values = lift(joint_distribution(top1, labels, 4)[0])  # (E, J)
    for j, label in enumerate("abc"):
        share = sum(name == label for _, name in pairs) / 400
        for e in range(3):
            of_expert = [name for expert, name in pairs if expert == e]
            assert values[e, j].item() == pytest.approx(of_expert.count(label) / len(of_expert) / share)
        assert values[3, j].isnan()


def test_load_statistics_of_equal_and_unequal_loads():
    equal = Top1(torch.arange(80).remainder(4)[None], torch.zeros(80, dtype=torch.long))
    assert load_statistics(equal, 4) == (pytest.approx(1), 0, 0.25)
    unequal = Top1(torch.tensor([[0] * 79 + [1]]), torch.zeros(80, dtype=torch.long))
    p = 1 / 80  # below a tenth of a quarter, so three experts are underused
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(4)
    assert load_statistics(unequal, 4) == (pytest.approx(entropy), 3, 0)


def test_mean_cosine_similarity_equals_that_of_the_update_matrices(config):
    model = Model(config, AdapterConfig(3, 2, 2, targets=("up_proj", "down_proj")))
    expected = []
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            torch.nn.init.normal_(layer.lora_b)
            slices = [slice(2 * e, 2 * e + 2) for e in range(3)]
            updates = [(layer.lora_b[:, rows] @ layer.lora_a[rows]).flatten() for rows in slices]
            expected += [torch.cosine_similarity(updates[i], updates[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_cosine_similarity(model) == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
