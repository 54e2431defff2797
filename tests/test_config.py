import re

import pytest

from minidoctor.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig, UserError

SHAPE = {
    "vocab_size": 9,
    "dim": 8,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 2,
    "ffn_dim": 8,
}


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (AdapterConfig, {"top_k": 9}, "top_k must be at least 1 and at most 8, got 9"),
        (AdapterConfig, {"top_k": 0}, "top_k must be at least 1 and at most 4, got 0"),
        (AdapterConfig, {"n_experts": 0}, "n_experts must be at least 1 and at most 4096, got 0"),
        (AdapterConfig, {"rank": -1}, "rank must be at least 1 and at most 4096, got -1"),
        (AdapterConfig, {"alpha": float("nan")}, "alpha must be above 0, got nan"),
        (AdapterConfig, {"targets": ("gate",)}, "unknown target 'gate', expected some of q_proj"),
        (AdapterConfig, {"targets": ()}, "targets must be at least one and distinct, got ()"),
        (AdapterConfig, {"targets": ("q_proj", "q_proj")}, "targets must be at least one and distinct, got ('q_proj'"),
        (AdapterConfig, {"n_experts": 1, "top_k": 3}, "top_k must be at least 1 and at most 1, got 3"),
        (TrainConfig, {"steps": 0}, "steps must be at least 1, got 0"),
        (TrainConfig, {"lr": 0.0}, "lr must be above 0, got 0.0"),
        (TrainConfig, {"accumulate": -2}, "accumulate must be at least 1, got -2"),
        (TrainConfig, {"contrast_weight": -0.1}, "contrast_weight must be at least 0, got -0.1"),
        (TrainConfig, {"balance_weight": float("nan")}, "balance_weight must be at least 0, got nan"),
        (TrainConfig, {"queue_share": 65}, "queue_share must be at most queue_capacity=64, got 65"),
        (TrainConfig, {"max_seq_len": 1}, "max_seq_len must be at least 2, got 1"),
        (TrainConfig, {"seed": -1}, "seed must be at least 0, got -1"),
        (TrainConfig, {"quantize": "int4"}, "quantize must be one of none, nf4, nf4-double, int8, got 'int4'"),
        (TrainConfig, {"quantize": "nf4", "shard": True}, "shard and quantize exclude each other"),
        (TrainConfig, {"leave_out_eval": True, "eval": ""}, "leave_out_eval needs the questions of eval"),
        (SampleConfig, {"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        (
            SampleConfig,
            {"temperature": float("inf")},
            "temperature must be at least 0 and at most 2.14748e+09, got inf",
        ),
        (SampleConfig, {"top_k": -1}, "top_k must be at least 0, got -1"),
        (SampleConfig, {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        (SampleConfig, {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        (SampleConfig, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (ModelConfig, {**SHAPE, "n_kv_heads": 3}, "n_kv_heads=3"),
        (ModelConfig, {**SHAPE, "head_dim": 3}, "head_dim must be even"),
        (ModelConfig, {**SHAPE, "norm_eps": 0.0}, "norm_eps must be above 0 and at most 1, got 0.0"),
    ],
)
def test_invalid_values_are_rejected_with_name_expectation_and_value(config, values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(**values)


@pytest.mark.parametrize("config", [SampleConfig, TrainConfig])
def test_seeds_beyond_the_generator_are_rejected(config):
    with pytest.raises(UserError, match="seed"):
        config(seed=2**64)


def test_one_expert_is_plain_lora_without_further_settings():
    assert AdapterConfig(n_experts=1).top_k == 1
    assert AdapterConfig(n_experts=1, top_k=1) == AdapterConfig(n_experts=1)
    assert AdapterConfig(n_experts=2).top_k == 2


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups"), [(8, 2, 2), (8, 3, 2), (8, 4, 1), (7, 2, 1), (4, 2, 1), (1, 1, 1)]
)
def test_two_groups_are_the_default_where_they_leave_a_choice(n_experts, top_k, n_groups):
    assert AdapterConfig(n_experts, top_k).n_groups == n_groups
    assert AdapterConfig(4, 2, n_groups=2).n_groups == 2  # as requested


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_groups": 3}, "n_experts=8 must be a multiple of n_groups=3"),
        ({"n_groups": 4, "top_k": 3}, "top_k must be at least 1 and at most 2, got 3"),
        ({"n_groups": -1}, "n_groups must be at least 1"),
    ],
)
def test_groups_that_do_not_fit_are_rejected(settings, message):
    with pytest.raises(UserError, match=message):
        AdapterConfig(**settings)


def test_the_default_run_has_all_three_losses():
    config = TrainConfig()
    assert config.balance_weight > 0
    assert config.contrast_weight > 0
