import json
from dataclasses import replace

import pytest

from minidoctor.checkpoints.families import KEYS, config_settings, read_config, read_model_config
from minidoctor.config import ModelConfig, RopeScaling

ABSENT = object()
KINDS = {  # model_type and architectures
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "baichuan": ("baichuan", "BaiChuanForCausalLM"),
    "baichuan2": ("baichuan", "BaichuanForCausalLM"),
}


def settings(kind="llama", **changes):
    """A small config.json of a family."""
    model_type, architecture = KINDS[kind]
    given = {"model_type": model_type, "architectures": [architecture], "vocab_size": 60, "hidden_size": 32}
    given |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    given |= {"max_position_embeddings": 128, "sliding_window": None} | changes
    return {key: value for key, value in given.items() if value is not ABSENT}


# What `settings()` means.
PLAIN = ModelConfig(60, 32, 2, 4, 2, 8, 48, max_seq_len=128, norm_eps=1e-6, rope_theta=1e4, tied=False)


@pytest.fixture
def read(tmp_path):
    """The ModelConfig of a config.json with these settings, or of this text."""

    def read(given):
        (tmp_path / "config.json").write_text(given if isinstance(given, str) else json.dumps(given))
        return read_model_config(tmp_path)

    return read


def published(kind, layers, dim, ffn, heads, vocab, length, **more):
    model_type, architecture = KINDS[kind]
    given = {"model_type": model_type, "architectures": [architecture], "hidden_act": "silu", "vocab_size": vocab}
    given |= {"num_hidden_layers": layers, "hidden_size": dim, "intermediate_size": ffn, "num_attention_heads": heads}
    return given | {"max_position_embeddings": length, "use_cache": True} | more


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_MEANS = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
# The shapes of published checkpoints with the keys that their config.json have, and what they mean.
CHECKPOINTS = {
    "Llama-2-7b": (
        published("llama", 32, 4096, 11008, 32, 32000, 4096, num_key_value_heads=32, rms_norm_eps=1e-5)
        | {"rope_scaling": None, "pretraining_tp": 1, "tie_word_embeddings": False, "torch_dtype": "float16"},
        ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 4096, 1e-5, 1e4, tied=False),
    ),
    "Llama-3.2-1B": (
        published("llama", 16, 2048, 8192, 32, 128256, 131072, num_key_value_heads=8, rms_norm_eps=1e-5, head_dim=64)
        | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": True}
        | {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "eos_token_id": [128001, 128008]},
        ModelConfig(128256, 2048, 16, 32, 8, 64, 8192, 131072, 1e-5, 5e5, tied=True, rope_scaling=LLAMA3_MEANS),
    ),
    "SmolLM2-135M": (
        published("llama", 30, 576, 1536, 9, 49152, 8192, num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000)
        | {"is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True, "pad_token_id": None},
        ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192, 1e-5, 1e5, tied=True),
    ),
    "Mistral-7B-v0.1": (
        published("mistral", 32, 4096, 14336, 32, 32000, 32768, num_key_value_heads=8, rms_norm_eps=1e-5)
        | {"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
        ModelConfig(32000, 4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e4, tied=False, window=4096),
    ),
    "Mistral-7B-v0.3": (
        published("mistral", 32, 4096, 14336, 32, 32768, 32768, num_key_value_heads=8, rms_norm_eps=1e-5)
        | {"rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
        ModelConfig(32768, 4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, tied=False, window=0),
    ),
    "Qwen2.5-0.5B": (
        published("qwen2", 24, 896, 4864, 14, 151936, 32768, num_key_value_heads=2, rms_norm_eps=1e-6)
        | {"rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24}
        | {"tie_word_embeddings": True, "use_mrope": False},
        ModelConfig(151936, 896, 24, 14, 2, 64, 4864, 32768, 1e-6, 1e6, tied=True, qkv_bias=True),
    ),
    "Qwen3-0.6B": (
        published("qwen3", 28, 1024, 3072, 16, 151936, 40960, num_key_value_heads=8, rms_norm_eps=1e-6, head_dim=128)
        | {"rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}
        | {"tie_word_embeddings": True, "attention_bias": False, "rope_scaling": None},
        ModelConfig(151936, 1024, 28, 16, 8, 128, 3072, 40960, 1e-6, 1e6, tied=True, qk_norm=True),
    ),
    "Baichuan-7B": (
        published("baichuan", 32, 4096, 11008, 32, 64000, 4096, rms_norm_eps=1e-6, tie_word_embeddings=False)
        | {"auto_map": {"AutoConfig": "configuration_baichuan.BaiChuanConfig"}},
        ModelConfig(64000, 4096, 32, 32, 32, 128, 11008, 4096, 1e-6, 1e4, tied=False),
    ),
    "Baichuan2-7B": (
        published("baichuan2", 32, 4096, 11008, 32, 125696, 4096, rms_norm_eps=1e-6, tie_word_embeddings=False)
        | {"model_max_length": 4096, "_from_model_config": True, "tokenizer_class": "BaichuanTokenizer"},
        ModelConfig(125696, 4096, 32, 32, 32, 128, 11008, 4096, 1e-6, 1e4, tied=False),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_checkpoint_is_understood(read, name):
    given, expected = CHECKPOINTS[name]
    assert read(given) == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_written_of_a_model_is_read_back_as_it_was(read, name):
    config = CHECKPOINTS[name][1]
    assert read(config_settings(config)) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 4.0, 1.5, 3.0, 64)])
@pytest.mark.parametrize("switch", [{}, {"window": 16}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}])
@pytest.mark.parametrize("tied", [True, False])
def test_every_switch_with_every_scaling_is_read_back_as_it_was(read, scaling, switch, tied):
    config = replace(PLAIN, rope_scaling=scaling, tied=tied, rope_theta=77.5, norm_eps=3e-5, **switch)
    assert read(config_settings(config)) == config


@pytest.mark.parametrize(
    "switches", [{"window": 4, "qkv_bias": True}, {"window": 4, "qk_norm": True}, {"qk_norm": True, "qkv_bias": True}]
)
def test_switches_that_no_family_has_together_are_not_written(switches):
    with pytest.raises(ValueError, match="no family has this combination"):
        config_settings(replace(PLAIN, **switches))


def test_the_two_baichuan_of_7b_are_told_apart_by_the_spelling_of_their_class(tmp_path):
    for kind, normed in (("baichuan", False), ("baichuan2", True)):
        (tmp_path / "config.json").write_text(json.dumps(settings(kind)))
        config, family = read_config(tmp_path)
        assert config == PLAIN
        assert (family.packed, family.normed_head) == (True, normed)
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        (tmp_path / "config.json").write_text(json.dumps(settings(kind)))
        family = read_config(tmp_path)[1]
        assert not family.packed
        assert not family.normed_head


@pytest.mark.parametrize("classes", [ABSENT, None, [], ["baichuanforcausallm"], ["BAICHUANForCausalLM"]])
def test_a_baichuan_that_does_not_say_which_of_the_two_it_is_is_refused(read, classes):
    with pytest.raises(ValueError, match="architectures"):
        read(settings("baichuan", architectures=classes))


def test_a_normalised_head_that_is_also_the_embedding_is_refused(read):
    with pytest.raises(ValueError, match="tie_word_embeddings is True"):
        read(settings("baichuan2", tie_word_embeddings=True))
    assert read(settings("baichuan", tie_word_embeddings=True)).tied


@pytest.mark.parametrize("vocab", [64000, 125696])
@pytest.mark.parametrize("length", ["model_max_length", "max_position_embeddings"])
def test_a_baichuan_of_13b_weights_is_refused_for_its_positions(read, vocab, length):
    given = published("baichuan2", 40, 5120, 13696, 40, vocab, 4096)
    del given["max_position_embeddings"]
    with pytest.raises(ValueError, match=r"13B.*ALiBi"):
        read(given | {length: 4096})


def test_a_small_baichuan_without_a_length_of_rotary_positions_is_refused(read):
    for length in (ABSENT, None):
        with pytest.raises(ValueError, match="no max_position_embeddings"):
            read(settings("baichuan", max_position_embeddings=length, model_max_length=128))


# With 64 heads. Defaults of the config classes of https://github.com/huggingface/transformers, version 5.23.
SILENT = {
    "llama": {"n_kv_heads": 64, "head_dim": 8, "max_seq_len": 2048},
    "mistral": {"n_kv_heads": 8, "head_dim": 8, "max_seq_len": 131072, "window": 4096},
    "qwen2": {"n_kv_heads": 32, "head_dim": 8, "max_seq_len": 32768, "qkv_bias": True},
    "qwen3": {"n_kv_heads": 32, "head_dim": 128, "max_seq_len": 32768, "qk_norm": True},
}


@pytest.mark.parametrize("kind", SILENT)
def test_what_config_json_leaves_out_has_the_familys_defaults(read, kind):
    given = {"model_type": kind, "vocab_size": 60, "hidden_size": 512, "intermediate_size": 48}
    config = read(given | {"num_hidden_layers": 2, "num_attention_heads": 64})
    assert config == replace(PLAIN, dim=512, n_heads=64, **SILENT[kind])


def test_a_config_without_a_model_type_is_a_llama(read):
    assert read(settings(model_type=ABSENT, architectures=ABSENT)) == PLAIN
    with pytest.raises(ValueError, match="architectures is"):
        read(settings("mistral", model_type=ABSENT))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_key_value_heads_as_heads_where_the_file_says_null(read, kind):
    assert read(settings(kind, num_key_value_heads=None)).n_kv_heads == 4


@pytest.mark.parametrize("value", [0, False, -1, 3, 8, "2", [2], 2.0])
def test_key_value_heads_that_cannot_be_are_refused(read, value):
    with pytest.raises(ValueError, match=r"n_kv_heads|num_key_value_heads"):
        read(settings(num_key_value_heads=value))


def test_a_window_is_mistrals_alone(read):
    assert read(settings("mistral", sliding_window=16)).window == 16
    assert read(settings("mistral", sliding_window=None)).window == 0
    assert read(settings("mistral", sliding_window=ABSENT)).window == 4096
    assert read(settings("qwen2", sliding_window=16, max_window_layers=1, use_sliding_window=False)).window == 0
    assert read(settings("qwen3", sliding_window=16)).window == 0
    for kind in ("llama", "baichuan", "baichuan2"):
        for value in (1, 16, True):
            with pytest.raises(ValueError, match=f"sliding_window is {value}"):
                read(settings(kind, sliding_window=value))
    for kind in ("qwen2", "qwen3"):
        with pytest.raises(ValueError, match="use_sliding_window is True, supported is False"):
            read(settings(kind, sliding_window=16, max_window_layers=1, use_sliding_window=True))


@pytest.mark.parametrize("window", [-1, 2.5, "16", True, [16], 2**40])
def test_a_window_that_cannot_be_is_refused(read, window):
    with pytest.raises(ValueError, match="window"):
        read(settings("mistral", sliding_window=window))


def test_layer_types_must_say_what_the_other_keys_say(read):
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2
    for kind in ("llama", "qwen2", "qwen3"):
        assert read(settings(kind, layer_types=full)).window == 0
    assert read(settings("mistral", layer_types=full)).window == 0
    assert read(settings("mistral", sliding_window=16, layer_types=sliding)).window == 16
    assert read(settings("mistral", sliding_window=ABSENT, layer_types=sliding)).window == 4096
    assert read(settings(layer_types=None)) == read(settings(layer_types=[])) == PLAIN
    for kind, window, types in (
        ("llama", None, sliding),
        ("qwen3", 16, [*full[:1], *sliding[:1]]),
        ("mistral", 16, full),
        ("mistral", ABSENT, full),
        ("mistral", None, sliding),
        ("llama", None, ["linear_attention", "full_attention"]),
    ):
        with pytest.raises(ValueError, match="layer_types is"):
            read(settings(kind, sliding_window=window, layer_types=types))


@pytest.mark.parametrize("value", [5, True, "full_attention", {"full_attention": 1}, [["full_attention"]], [None]])
def test_layer_types_that_are_no_list_of_kinds_are_refused(read, value):
    with pytest.raises(ValueError, match="layer_types is"):
        read(settings(layer_types=value))


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
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}, LLAMA3_MEANS, 5e5),
        ({"rope_scaling": LLAMA3 | {"type": "llama3"}, "rope_theta": 5e5}, LLAMA3_MEANS, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None, 5e5),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, LINEAR, 5e5),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}, LLAMA3_MEANS, 5e5),
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
def test_scaled_rotary_positions_in_every_spelling(read, changes, scaling, theta):
    for kind in KINDS:
        config = read(settings(kind, **changes))
        assert (config.rope_scaling, config.rope_theta) == (scaling, theta), kind


def test_a_config_in_the_newest_spelling_is_that_in_the_old_one(read):
    old = settings("qwen3", rope_theta=1e6, torch_dtype="bfloat16", head_dim=16)
    new = settings("qwen3", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, dtype="bfloat16", head_dim=16)
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
def test_rotary_positions_of_another_kind_are_refused(read, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read(settings(**changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma2"),
        ("model_type", "qwen3_moe"),
        ("model_type", "mixtral"),
        ("model_type", None),
        ("model_type", ["llama"]),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", ["LlamaForCausalLM", "LlamaForCausalLM"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", 5),
        ("architectures", True),
        ("architectures", {"LlamaForCausalLM": 1}),
        ("hidden_act", "gelu"),
        ("hidden_act", "relu"),
        ("hidden_act", ["silu"]),
        ("attention_bias", True),
        ("mlp_bias", True),
    ],
    ids=str,
)
def test_a_setting_out_of_a_closed_list_is_refused_with_that_list(read, key, value):
    with pytest.raises(ValueError, match=rf"config\.json: {key} is .*supported") as refused:
        read(settings(**{key: value}))
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("num_experts_per_tok", 2),
        ("n_routed_experts", 64),
        ("moe_intermediate_size", 768),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization", "int8"),
        ("attn_logit_softcapping", 50.0),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.0625),
        ("scale_embeddings", True),
        ("qk_layernorm", True),
        ("use_qk_norm", True),
        ("qkv_bias", True),
        ("lm_head_bias", True),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("no_rope_layers", [0, 1]),
        ("position_embedding_type", "relative_key"),
        ("alibi", True),
        ("sliding_window_pattern", 6),
    ],
)
def test_a_key_that_changes_what_is_computed_is_refused_in_every_family(read, kind, key, value):
    with pytest.raises(ValueError, match=rf"config\.json: {key} is .*not supported for {KINDS[kind][1]}") as refused:
        read(settings(kind, **{key: value}))
    assert repr(value)[:50] in str(refused.value)


HARMLESS = {
    "use_cache": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
    "transformers_version": "4.43.0",
    "torch_dtype": "bfloat16",
    "dtype": "float16",
    "auto_map": {"AutoConfig": "configuration.Config"},
    "tokenizer_class": "Tokenizer",
    "pretraining_tp": 1,
    "_name_or_path": "somewhere",
    "z_loss_weight": 0,
    "model_max_length": 4096,
    "max_sequence_length": 2048,
    "is_llama_config": True,
    "rope_interleaved": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "num_experts": 0,
    "logits_scaling": 1.0,
    "alibi": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": None,
    "use_sliding_window": False,
    "task_specific_params": {"a": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_without_a_meaning_here_are_accepted(read, kind):
    assert read(settings(kind, **HARMLESS)) == read(settings(kind))


@pytest.mark.parametrize("key", KEYS.values())
def test_a_value_of_the_wrong_type_is_refused_under_the_name_it_has_in_the_file(read, key):
    for value in ("many", [1], {"a": 1}, -1, 10**400):
        with pytest.raises(ValueError, match=rf"config\.json: .*\b{key}\b"):
            read(settings("mistral", **{key: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": ABSENT},
        {"hidden_size": None},
        {"hidden_size": 32.0},
        {"hidden_size": True},
        {"hidden_size": 0},
        {"hidden_size": 36},  # heads of 9, which make no pairs
        {"head_dim": 7},
        {"head_dim": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 4.0, "hidden_size": 10**400},
        {"num_hidden_layers": 10**6},
        {"vocab_size": 10**30},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 0},
        {"tie_word_embeddings": 1},
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(read, changes):
    with pytest.raises(ValueError, match=r"config\.json: "):
        read(settings(**changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000, '{"model_type": "llama"}', "9" * 5000])
def test_a_config_that_is_no_config_is_refused(read, text):
    with pytest.raises(ValueError, match=r"config\.json: "):
        read(text)


def test_every_missing_key_is_named(read):
    with pytest.raises(ValueError, match=r"no hidden_size, .*num_attention_heads, .*intermediate_size"):
        read({"model_type": "llama", "vocab_size": 60})


def test_a_missing_config_is_refused_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_model_config(tmp_path)
