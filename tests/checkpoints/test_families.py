import json
from dataclasses import replace

import pytest
from tiny_checkpoints import ABSENT, ARCHITECTURES, config_json

from minidoctor.checkpoints.families import KEYS, config_settings, read_config, read_model_config
from minidoctor.config import ModelConfig, RopeScaling

# The meaning of config_json().
PLAIN = ModelConfig(60, 32, 2, 4, 2, 8, 48, max_seq_len=128, norm_eps=1e-6, rope_theta=1e4, tied=False)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the ModelConfig from settings, or from the text, of a config.json."""

    def read(content):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return read_model_config(tmp_path)

    return read


def published(kind, layers, dim, ffn, heads, vocab, length, **changes):
    """Return settings with the keys of a published config.json. With length None, `changes` has another one."""
    settings = config_json(kind, num_key_value_heads=ABSENT, sliding_window=ABSENT, tie_word_embeddings=ABSENT)
    settings |= {"hidden_act": "silu", "vocab_size": vocab, "num_hidden_layers": layers, "hidden_size": dim}
    settings |= {"intermediate_size": ffn, "num_attention_heads": heads, "max_position_embeddings": length}
    settings |= {"use_cache": True} | changes
    return {key: value for key, value in settings.items() if value is not ABSENT}


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_SCALING = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
# Shapes and keys of published checkpoints, and their meaning.
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
        ModelConfig(128256, 2048, 16, 32, 8, 64, 8192, 131072, 1e-5, 5e5, tied=True, rope_scaling=LLAMA3_SCALING),
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
    "Baichuan-13B-Chat": (
        published("baichuan-13b", 40, 5120, 13696, 40, 64000, ABSENT, rms_norm_eps=1e-6, tie_word_embeddings=False)
        | {"model_max_length": 4096, "_from_model_config": True, "gradient_checkpointing": False, "pad_token_id": 0},
        ModelConfig(64000, 5120, 40, 40, 40, 128, 13696, 4096, 1e-6, 1e4, tied=False, alibi=True),
    ),
    "Baichuan2-13B-Chat": (
        published("baichuan-13b", 40, 5120, 13696, 40, 125696, ABSENT, rms_norm_eps=1e-6, tie_word_embeddings=False)
        | {"model_max_length": 4096, "_from_model_config": True, "tokenizer_class": "BaichuanTokenizer"},
        ModelConfig(125696, 5120, 40, 40, 40, 128, 13696, 4096, 1e-6, 1e4, tied=False, alibi=True),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_config_gives_model_config(read, name):
    settings, expected = CHECKPOINTS[name]
    assert read(settings) == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_settings_of_published_config_read_back_equal(read, name):
    config = CHECKPOINTS[name][1]
    assert read(config_settings(config)) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 4.0, 1.5, 3.0, 64)])
@pytest.mark.parametrize("switch", [{}, {"window": 16}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}])
@pytest.mark.parametrize("tied", [True, False])
def test_written_settings_of_every_switch_and_scaling_read_back_equal(read, scaling, switch, tied):
    config = replace(PLAIN, rope_scaling=scaling, tied=tied, rope_theta=77.5, norm_eps=3e-5, **switch)
    assert read(config_settings(config)) == config


@pytest.mark.parametrize(
    "switches",
    [
        {"window": 4, "qkv_bias": True},
        {"window": 4, "qk_norm": True},
        {"qk_norm": True, "qkv_bias": True},
        {"alibi": True, "window": 4},
        {"alibi": True, "qkv_bias": True},
    ],
)
def test_config_settings_rejects_switches_that_no_family_combines(switches):
    with pytest.raises(ValueError, match="window, qkv_bias, qk_norm and alibi"):
        config_settings(replace(PLAIN, **switches))


@pytest.mark.parametrize(
    ("kind", "changes", "alibi", "normalized"),
    [
        ("baichuan", {}, False, False),
        ("baichuan2", {}, False, True),
        ("baichuan2", {"model_max_length": 4096}, False, True),  # the 7B models have both lengths
        ("baichuan2", {"vocab_size": 64000}, False, True),
        ("baichuan-13b", {}, True, False),
        ("baichuan-13b", {"max_position_embeddings": None}, True, False),
        ("baichuan-13b", {"vocab_size": 64000}, True, False),
        ("baichuan-13b", {"vocab_size": 125696}, True, True),
        ("baichuan2-13b", {}, True, True),
    ],
)
def test_architecture_length_and_vocabulary_distinguish_the_four_baichuan(tmp_path, kind, changes, alibi, normalized):
    (tmp_path / "config.json").write_text(json.dumps(config_json(kind, **changes)))
    config, family = read_config(tmp_path)
    assert config == replace(PLAIN, alibi=alibi, vocab_size=changes.get("vocab_size", 60))
    assert (family.packed, family.normalized_head) == (True, normalized)


def test_only_baichuan_is_stored_packed_or_normalized(tmp_path):
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        (tmp_path / "config.json").write_text(json.dumps(config_json(kind)))
        family = read_config(tmp_path)[1]
        assert not family.packed
        assert not family.normalized_head


@pytest.mark.parametrize("classes", [ABSENT, None, [], ["baichuanforcausallm"], ["BAICHUANForCausalLM"]])
def test_baichuan_without_a_known_architecture_is_rejected(read, classes):
    with pytest.raises(ValueError, match="architectures"):
        read(config_json("baichuan", architectures=classes))


def test_tied_normalized_head_is_rejected(read):
    with pytest.raises(ValueError, match="tie_word_embeddings is True"):
        read(config_json("baichuan2", tie_word_embeddings=True))
    assert read(config_json("baichuan", tie_word_embeddings=True)).tied


@pytest.mark.parametrize("vocab", [64000, 125696])
def test_baichuan_13b_with_the_length_of_rotary_positions_is_rejected(read, vocab):
    with pytest.raises(ValueError, match=r"max_position_embeddings.*13B.*ALiBi"):
        read(published("baichuan2", 40, 5120, 13696, 40, vocab, 4096))


def test_baichuan_without_a_length_is_rejected(read):
    for length in (ABSENT, None):
        with pytest.raises(ValueError, match="no max_position_embeddings"):
            read(config_json("baichuan", max_position_embeddings=length, model_max_length=128))
        with pytest.raises(ValueError, match="no max_position_embeddings"):
            read(config_json("baichuan2-13b", model_max_length=length))


# Expected with 64 heads and no other key: the defaults of the config classes in transformers 5.23.
FAMILY_DEFAULTS = {
    "llama": {"n_kv_heads": 64, "head_dim": 8, "max_seq_len": 2048},
    "mistral": {"n_kv_heads": 8, "head_dim": 8, "max_seq_len": 131072, "window": 4096},
    "qwen2": {"n_kv_heads": 32, "head_dim": 8, "max_seq_len": 32768, "qkv_bias": True},
    "qwen3": {"n_kv_heads": 32, "head_dim": 128, "max_seq_len": 32768, "qk_norm": True},
}


@pytest.mark.parametrize("kind", FAMILY_DEFAULTS)
def test_absent_keys_have_the_defaults_of_the_family(read, kind):
    settings = {"model_type": kind, "vocab_size": 60, "hidden_size": 512, "intermediate_size": 48}
    config = read(settings | {"num_hidden_layers": 2, "num_attention_heads": 64})
    assert config == replace(PLAIN, dim=512, n_heads=64, **FAMILY_DEFAULTS[kind])


def test_config_without_model_type_is_a_llama(read):
    assert read(config_json(model_type=ABSENT, architectures=ABSENT)) == PLAIN
    with pytest.raises(ValueError, match="architectures is"):
        read(config_json("mistral", model_type=ABSENT))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_null_key_value_heads_means_as_many_as_heads(read, kind):
    assert read(config_json(kind, num_key_value_heads=None)).n_kv_heads == 4


@pytest.mark.parametrize("value", [0, False, -1, 3, 8, "2", [2], 2.0])
def test_impossible_key_value_heads_are_rejected(read, value):
    with pytest.raises(ValueError, match=r"n_kv_heads|num_key_value_heads"):
        read(config_json(num_key_value_heads=value))


def test_sliding_window_applies_to_mistral_only(read):
    assert read(config_json("mistral", sliding_window=16)).window == 16
    assert read(config_json("mistral", sliding_window=None)).window == 0
    assert read(config_json("mistral", sliding_window=ABSENT)).window == 4096
    assert read(config_json("qwen2", sliding_window=16, max_window_layers=1, use_sliding_window=False)).window == 0
    assert read(config_json("qwen3", sliding_window=16)).window == 0
    for kind in ("llama", "baichuan", "baichuan2"):
        for value in (1, 16, True):
            with pytest.raises(ValueError, match=f"sliding_window is {value}"):
                read(config_json(kind, sliding_window=value))
    for kind in ("qwen2", "qwen3"):
        with pytest.raises(ValueError, match="use_sliding_window is True, supported is False"):
            read(config_json(kind, sliding_window=16, max_window_layers=1, use_sliding_window=True))


@pytest.mark.parametrize("window", [-1, 2.5, "16", True, [16], 2**40])
def test_impossible_window_is_rejected(read, window):
    with pytest.raises(ValueError, match="window"):
        read(config_json("mistral", sliding_window=window))


def test_layer_types_must_agree_with_sliding_window(read):
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2
    for kind in ("llama", "qwen2", "qwen3"):
        assert read(config_json(kind, layer_types=full)).window == 0
    assert read(config_json("mistral", layer_types=full)).window == 0
    assert read(config_json("mistral", sliding_window=16, layer_types=sliding)).window == 16
    assert read(config_json("mistral", sliding_window=ABSENT, layer_types=sliding)).window == 4096
    assert read(config_json(layer_types=None)) == read(config_json(layer_types=[])) == PLAIN
    for kind, window, types in (
        ("llama", None, sliding),
        ("qwen3", 16, [*full[:1], *sliding[:1]]),
        ("mistral", 16, full),
        ("mistral", ABSENT, full),
        ("mistral", None, sliding),
        ("llama", None, ["linear_attention", "full_attention"]),
    ):
        with pytest.raises(ValueError, match="layer_types is"):
            read(config_json(kind, sliding_window=window, layer_types=types))


@pytest.mark.parametrize("value", [5, True, "full_attention", {"full_attention": 1}, [["full_attention"]], [None]])
def test_malformed_layer_types_are_rejected(read, value):
    with pytest.raises(ValueError, match="layer_types is"):
        read(config_json(layer_types=value))


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
def test_unsupported_value_is_rejected_with_the_supported_ones(read, key, value):
    with pytest.raises(ValueError, match=rf"config\.json: {key} is .*supported") as rejected:
        read(config_json(**{key: value}))
    assert repr(value) in str(rejected.value)


@pytest.mark.parametrize("kind", ARCHITECTURES)
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
def test_key_that_changes_the_computation_is_rejected_in_every_family(read, kind, key, value):
    with pytest.raises(
        ValueError, match=rf"config\.json: {key} is .*not supported for {ARCHITECTURES[kind]}"
    ) as rejected:
        read(config_json(kind, **{key: value}))
    assert repr(value)[:50] in str(rejected.value)


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


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_keys_without_effect_are_accepted(read, kind):
    harmless = HARMLESS | ({"model_max_length": 128} if "13b" in kind else {})
    assert read(config_json(kind, **harmless)) == read(config_json(kind))


@pytest.mark.parametrize("key", KEYS.values())
def test_bad_value_is_rejected_under_its_key_in_the_file(read, key):
    for value in ("many", [1], {"a": 1}, -1, 10**400):
        with pytest.raises(ValueError, match=rf"config\.json: .*\b{key}\b"):
            read(config_json("mistral", **{key: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": ABSENT},
        {"hidden_size": None},
        {"hidden_size": 32.0},
        {"hidden_size": True},
        {"hidden_size": 0},
        {"hidden_size": 36},  # heads of 9 dimensions, which cannot be rotated in pairs
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
def test_impossible_shape_is_rejected(read, changes):
    with pytest.raises(ValueError, match=r"config\.json: "):
        read(config_json(**changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000, '{"model_type": "llama"}', "9" * 5000])
def test_malformed_config_is_rejected(read, text):
    with pytest.raises(ValueError, match=r"config\.json: "):
        read(text)


def test_all_missing_keys_are_listed(read):
    with pytest.raises(ValueError, match=r"no hidden_size, .*num_attention_heads, .*intermediate_size"):
        read({"model_type": "llama", "vocab_size": 60})


def test_missing_config_is_rejected_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_model_config(tmp_path)
