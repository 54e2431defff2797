import json

import torch
from paths import ROOT

from minidoctor.config import TARGETS, AdapterConfig
from minidoctor.router import Router
from minidoctor.study.variants import (
    BASELINE,
    LORA,
    STRONG_BALANCE,
    VARIANTS,
    AblationConfig,
    adapter_config,
    contrast_in_batch,
    n_parameters,
    train_config,
)

RESULTS = ROOT / "minidoctor" / "study" / "results"


def test_balance_is_off_on_and_ten_times_as_strong():
    config = AblationConfig()
    weights = [
        train_config(VARIANTS[name], config, 0).balance_weight for name in ("LoRA-MoE", BASELINE, STRONG_BALANCE)
    ]
    assert weights == [0, config.balance_weight, 10 * config.balance_weight]


def test_each_method_has_its_learning_rate():
    config = AblationConfig(lr=1, lora_lr=2, active_lr=3, full_lr=4)
    names = ["LoRA-MoE", LORA, "LoRA, same active parameters", "full fine-tuning"]
    assert [train_config(VARIANTS[name], config, 0).lr for name in names] == [1, 2, 3, 4]


def test_plain_lora_has_the_parameters_of_the_experts(config):
    ablation = AblationConfig(n_experts=4, rank=3)
    experts, trainable, active = (
        adapter_config(VARIANTS[name], ablation, config) for name in (BASELINE, LORA, "LoRA, same active parameters")
    )
    per_rank = n_parameters(config, AdapterConfig(1, 1, 1, targets=tuple(TARGETS)))
    assert trainable.n_experts == 1
    assert abs(n_parameters(config, trainable) - n_parameters(config, experts)) <= per_rank / 2  # the nearest rank
    assert (active.n_experts, active.rank, active.alpha) == (1, 6, 12.0)  # 2 of 4 experts of rank 3


def test_every_contrast_has_the_best_setting_of_its_search():
    accuracies = {}  # by variant, setting and seed
    for run in json.loads((RESULTS / "search.json").read_text(encoding="utf-8")):
        if "contrast_weight" in run:
            setting = run["contrast_weight"], run["contrast_temperature"]
            accuracies.setdefault(run["variant"], {}).setdefault(setting, {})[run["seed"]] = run["free_form"]
    assert len(accuracies) == 7
    committed = json.loads((RESULTS / "ablation.json").read_text(encoding="utf-8"))["variants"]
    for name, settings in accuracies.items():
        assert len(settings) >= 8
        means = {setting: sum(seeds.values()) / 3 for setting, seeds in settings.items() if len(seeds) == 3}
        chosen = committed[name]["contrast_weight"], committed[name]["contrast_temperature"]
        assert means[chosen] > max(means.values()) - 0.001  # two settings of the expert-output contrast are as good
        if name in VARIANTS:
            assert chosen == (VARIANTS[name].contrast_weight, VARIANTS[name].contrast_temperature)


def make_routings(n_rows=3, n_tokens=8, n_layers=2, n_experts=4):
    """Return routings of random inputs, and answer positions: the second half of each row."""
    routings = [Router(6, n_experts, 2, 5)(torch.randn(n_rows, n_tokens, 6)) for _ in range(n_layers)]
    return routings, torch.arange(n_rows * n_tokens).view(n_rows, n_tokens)[:, n_tokens // 2 :].flatten()


def contrast_by_loops(routings, anchors, keys, temperature):
    losses = []
    for routing in routings:
        z, gates = routing.z.flatten(0, 1), routing.gates.flatten(0, 1)
        top1 = routing.expert_ids[..., 0].flatten()
        for i in anchors:
            log_probs = torch.stack([z[i] @ z[j] / temperature for j in keys]).log_softmax(0)
            loss, mass = torch.tensor(0.0), 0.0
            for e in range(4):
                of_expert = [log_probs[k] for k, j in enumerate(keys) if top1[j] == e]
                if of_expert:
                    loss, mass = loss - gates[i, e] * torch.stack(of_expert).mean(), mass + gates[i, e].item()
            losses.append(loss / mass if mass else torch.tensor(0.0))
    return torch.stack(losses).mean()


def test_contrast_in_batch_equals_loops_over_anchors_and_other_answer_tokens():
    routings, positions = make_routings()
    for n in (5, 12):  # of 12 answer tokens; if all are anchors, half of them become keys
        anchors = positions[torch.randperm(12)][:n]
        used = anchors[:6].tolist()
        keys = [i for i in positions.tolist() if i not in used]
        loss = contrast_in_batch(routings, positions, anchors, 0.1)
        torch.testing.assert_close(loss, contrast_by_loops(routings, used, keys, 0.1))


def test_contrast_in_batch_of_a_single_answer_token_is_zero():
    routings, positions = make_routings()
    assert contrast_in_batch(routings, positions[:1], positions[:1], 0.1).item() == 0
