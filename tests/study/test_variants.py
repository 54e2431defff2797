import json

from paths import ROOT

from minidoctor.config import AdapterConfig
from minidoctor.study.variants import (
    BASELINE,
    LORA,
    STRONG_BALANCE,
    VARIANTS,
    AblationConfig,
    adapter_config,
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


def test_plain_lora_has_the_parameters_of_the_experts(config):
    ablation = AblationConfig(n_experts=4, rank=3)
    experts, trainable, active = (
        adapter_config(VARIANTS[name], ablation, config) for name in (BASELINE, LORA, "LoRA, same active parameters")
    )
    per_rank = n_parameters(config, AdapterConfig(1, 1, 1))
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
