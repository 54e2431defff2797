"""The scaling of rotary positions in config.json, in the spellings of transformers 4 and 5."""

import json
from dataclasses import replace

import pytest
from tiny_checkpoints import ARCHITECTURES, config_json

from minidoctor.checkpoints.families import read_model_config
from minidoctor.config import ModelConfig, RopeScaling

# The meaning of config_json().
PLAIN = ModelConfig(60, 32, 2, 4, 2, 8, 48, max_seq_len=128, norm_eps=1e-6, rope_theta=1e4, tied=False)
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_SCALING = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the ModelConfig from the settings of a config.json."""

    def read(settings):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return read_model_config(tmp_path)

    return read


LINEAR = RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "scaling", "theta"),
    [
        ({}, None, 1e4),
        ({"rope_theta": 5e5, "rope_scaling": None}, None, 5e5),
        ({"rope_scaling": {}}, None, 1e4),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR, 1e4),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LINEAR, 1e4),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4}}, LINEAR, 1e4),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5}, None, 5e5),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}, LLAMA3_SCALING, 5e5),
        ({"rope_scaling": LLAMA3 | {"type": "llama3"}, "rope_theta": 5e5}, LLAMA3_SCALING, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None, 5e5),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, LINEAR, 5e5),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}, LLAMA3_SCALING, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 500000}, None, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}}, None, 5e5),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}}
            | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            LINEAR,
            5e5,
        ),
    ],
)
def test_rope_scaling_is_read_in_every_spelling(read, changes, scaling, theta):
    for kind in ARCHITECTURES:
        config = read(config_json(kind, **changes))
        assert (config.rope_scaling, config.rope_theta) == (scaling, theta), kind


def test_spelling_of_transformers_5_equals_that_of_4(read):
    old = config_json("qwen3", rope_theta=1e6, torch_dtype="bfloat16", head_dim=16)
    new = config_json(
        "qwen3", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, dtype="bfloat16", head_dim=16
    )
    new |= {"layer_types": ["full_attention"] * 2, "transformers_version": "5.2.0"}
    assert read(old) == read(new) == replace(PLAIN, rope_theta=1e6, head_dim=16, qk_norm=True)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": YARN}, "rope_scaling is of type 'yarn', supported are linear, llama3, default"),
        ({"rope_parameters": YARN}, "is of type 'yarn', supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "is of type 'dynamic', supported"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "'longrope', supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "'mrope', supported"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section .16, 24, 24."),
        ({"rope_scaling": {"type": 7, "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": 1}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": True}}, "rope_scaling"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has factor 8.0"),
        ({"rope_scaling": {"type": "default", "factor": 8.0}}, "rope_scaling has factor 8.0"),
        ({"rope_scaling": {"type": "linear"}}, "of type linear has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4', expected"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor must be"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling|factor"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 0.9}}, "attention_factor 0.9"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "of type llama3 has no low_freq_factor, high_freq"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4.0}}, "low_freq_factor=4.0 must be below"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "beta_fast": 32}}, "beta_fast 32"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": "linear"}}, "of type 'linear and llama3'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_scaling": [4.0]}, "rope_scaling is .4.0., expected an object"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_parameters is .* no other key contradicts"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"factor": 2.0}},
            "rope_parameters is .* no other key contradicts",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_theta": 0}, "rope_theta must be"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": float("inf")}, "rope_theta must be"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_unsupported_rope_is_rejected(read, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read(config_json(**changes))
