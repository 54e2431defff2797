"""The families of open checkpoints: config.json to ModelConfig and back.

Llama, Mistral, Qwen2, Qwen3 and Baichuan are one decoder with a few switches. A setting that this decoder does not
compute is rejected by its key. An unknown key is ignored, unless its name suggests that it changes the computation.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import ModelConfig, RopeScaling, UserError, check
from minidoctor.files.hub_cache import follow_snapshot
from minidoctor.files.json_files import from_json, read_object

# The fields of ModelConfig and RopeScaling and their keys in config.json.
KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "tied": "tie_word_embeddings", "window": "sliding_window",
}  # fmt: skip
SCALING_KEYS = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
SCALING_KEYS |= {"original_seq_len": "original_max_position_embeddings"}
# Values of absent keys: those of LlamaConfig in transformers 5.23, and below those of the other families.
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
DEFAULTS |= {"tie_word_embeddings": False, "sliding_window": 0}
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
QWEN_WINDOW = ("sliding_window", "max_window_layers")


class Family(NamedTuple):
    """The meaning of a `model_type` beyond the values of the keys."""

    architecture: str
    switches: dict[str, bool]  # fields of ModelConfig
    defaults: dict[str, Any]  # that differ from Llama's
    ignored: tuple[str, ...] = ()  # keys that apply only with use_sliding_window, which is rejected
    packed: bool = False  # q, k and v are rows of one matrix, W_pack
    normalized_head: bool = False  # the rows of the output layer are scaled to length 1


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}, {}),
    "mistral": Family("MistralForCausalLM", {}, MISTRAL_DEFAULTS),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, QWEN_DEFAULTS, QWEN_WINDOW),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, QWEN_DEFAULTS | {"head_dim": 128}, QWEN_WINDOW),
    "baichuan": Family("BaiChuanForCausalLM", {}, {}, packed=True),
    "baichuan2": Family("BaichuanForCausalLM", {}, {}, packed=True, normalized_head=True),
    "baichuan-13b": Family("BaichuanForCausalLM", {"alibi": True}, {}, packed=True),
    "baichuan2-13b": Family("BaichuanForCausalLM", {"alibi": True}, {}, packed=True, normalized_head=True),
}
# Settings with a single supported value.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
# An unknown key that contains one of these words must be switched off.
SIGNIFICANT = (
    r"expert|moe|quant|multiplier|scal|bias|norm|rope|rotary|window|"
    r"alibi|position_embedding|pattern|soft_?cap|clip|chunk"
)
OFF: tuple[Any, ...] = (None, 0, 1, "", "none", "default", [], {})


def read_model_config(directory: str | Path) -> ModelConfig:
    """Read config.json. Raises FileNotFoundError, or UserError that names the key of an unsupported setting."""
    return read_config(Path(directory))[0]


def read_config(directory: Path) -> tuple[ModelConfig, Family]:
    """Read config.json and the family, which determines how the weights are stored. Raises as `read_model_config`."""
    path = follow_snapshot(directory) / "config.json"
    settings = read_object(path)
    try:
        family = find_family(settings)
        scaling, theta = read_rope(settings)
        check_settings(settings, family)
        values = fill_defaults(settings, family) | {"rope_theta": theta}
        missing = [key for key in KEYS.values() if values.get(key) is None]
        check(not missing, f"no {', '.join(missing)}")
        fields = {"qkv_bias": False, "qk_norm": False, "alibi": False, **family.switches, "rope_scaling": scaling}
        return from_json(ModelConfig, fields | {field: values[key] for field, key in KEYS.items()}), family
    except UserError as error:
        words = str(error).replace("=", " ").split()
        keys = [f"{field} is {key}" for field, key in (KEYS | SCALING_KEYS).items() if field != key and field in words]
        raise UserError(f"{path}: {error}" + (f" (in the file {', '.join(keys)})" if keys else "")) from None


def find_family(settings: dict[str, Any]) -> Family:
    """Return the family of a model_type and an architecture. Raises UserError."""
    kind = settings.get("model_type", "llama")
    supported = [name for name in FAMILIES if name == "baichuan" or not name.startswith("baichuan")]
    check(kind in supported, f"model_type is {kind!r:.60}, supported are {', '.join(supported)}")
    classes = settings.get("architectures") or ([] if kind == "baichuan" else [FAMILIES[kind].architecture])
    if kind == "baichuan" and classes == [FAMILIES["baichuan2"].architecture]:
        kind = find_baichuan(settings)
    family = FAMILIES[kind]
    spellings = [[family.architecture]] + ([["LLaMAForCausalLM"]] if kind == "llama" else [])  # the second is older
    check(classes in spellings, f"architectures is {classes!r:.60}, supported for {kind} is {spellings[0]}")
    untied = not (family.normalized_head and settings.get("tie_word_embeddings"))
    check(untied, "tie_word_embeddings is True, supported is False with a normalized output layer")
    wide = family.packed and not family.switches and settings.get("hidden_size") == 5120
    check(not wide, "max_position_embeddings must be absent: Baichuan-13B has ALiBi, not rotary positions")
    return family


def find_baichuan(settings: dict[str, Any]) -> str:
    """Return the family of a BaichuanForCausalLM, the class of all but Baichuan-7B, whose name has a capital C."""
    alibi = settings.get("max_position_embeddings") is None and settings.get("model_max_length") is not None
    # The 13B models of both versions have the same keys. Version 2 has twice the vocabulary, and its configuration
    # class also writes z_loss_weight.
    second = not alibi or settings.get("vocab_size") == 125696 or "z_loss_weight" in settings
    return ("baichuan2" if second else "baichuan") + ("-13b" if alibi else "")


def fill_defaults(settings: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the settings with the family's values for absent keys."""
    heads, dim = settings.get("num_attention_heads"), settings.get("hidden_size")
    values = {**DEFAULTS, "num_key_value_heads": heads, **family.defaults}
    values |= {key: value for key, value in settings.items() if value is not None}
    if family.packed:
        length = settings.get("model_max_length" if family.switches.get("alibi") else "max_position_embeddings")
        values["max_position_embeddings"] = length
    for key, value in {"num_key_value_heads": heads, "sliding_window": 0}.items():
        if settings.get(key, ...) is None or key in family.ignored:  # of these two, null is a value
            values[key] = value
    if "head_dim" not in values:  # 2 if the two are not numbers, which is reported later under their keys
        values["head_dim"] = dim // heads if type(dim) is type(heads) is int and heads > 0 else 2
    return values


def read_rope(settings: dict[str, Any]) -> tuple[RopeScaling | None, Any]:
    """Return scaling and theta of the rotary positions, in the spelling of transformers 4 or 5. Raises UserError."""
    rope = {"rope_theta": settings["rope_theta"]} if settings.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        value = settings.get(key) or {}
        consistent = isinstance(value, dict) and all(rope.get(name, item) == item for name, item in value.items())
        check(consistent, f"{key} is {value!r:.80}, expected an object that no other key contradicts")
        rope |= value
    theta = rope.pop("rope_theta", DEFAULTS["rope_theta"])
    kinds = {str(rope.pop(key)) for key in ("rope_type", "type") if rope.get(key) is not None} or {"default"}
    supported = {"linear": ["factor"], "llama3": list(SCALING_KEYS.values()), "default": []}
    kind = " and ".join(sorted(kinds))
    check(kind in supported, f"rope_scaling is of type {kind!r:.60}, supported are {', '.join(supported)}")
    for key, value in rope.items():
        allowed = key in supported[kind] or is_off(value)
        check(allowed, f"rope_scaling has {key} {value!r:.60}, which is not supported with type {kind}")
    if kind == "default":
        return None, theta
    missing = [key for key in supported[kind] if key not in rope]
    check(not missing, f"rope_scaling of type {kind} has no {', '.join(missing)}")
    fields = {field: rope[key] for field, key in SCALING_KEYS.items() if key in supported[kind]}
    return from_json(RopeScaling, dataclasses.asdict(RopeScaling(kind, factor=1)) | fields), theta


def check_settings(settings: dict[str, Any], family: Family) -> None:
    """Raise UserError at the first key that requests a computation that this decoder does not have."""
    window = settings.get("sliding_window", family.defaults.get("sliding_window"))
    windowed = "sliding_window" in (*family.ignored, *family.defaults)
    check(windowed or not window, f"sliding_window is {window!r:.60}, which is not supported for {family.architecture}")
    read = {*KEYS.values(), "rope_scaling", "rope_parameters", *family.ignored}
    for key, value in settings.items():
        if key in FIXED:
            check(value in (None, FIXED[key]), f"{key} is {value!r:.60}, supported is {FIXED[key]!r}")
        elif key == "layer_types":
            kind = "sliding_attention" if window and not family.ignored else "full_attention"
            uniform = value is None or (isinstance(value, list) and all(item == kind for item in value))
            check(uniform, f"{key} is {value!r:.60}, supported is {kind} in every layer")
        elif key not in read and re.search(SIGNIFICANT, key):
            check(is_off(value), f"{key} is {value!r:.60}, which is not supported for {family.architecture}")


def is_off(value: Any) -> bool:
    return value is not True and value in OFF  # True == 1


def config_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json for a model whose q, k and v are stored separately.

    A Baichuan is then a Llama, and so is a Mistral without a window. Only a model with ALiBi is still a Baichuan,
    with q, k and v in one matrix.
    """
    switches = {"qwen3": config.qk_norm, "qwen2": config.qkv_bias, "mistral": config.window > 0}
    switches["baichuan-13b"] = config.alibi
    kind, *others = [name for name, switch in switches.items() if switch] or ["llama"]
    check(not others, "no family has this combination of window, qkv_bias, qk_norm and alibi")
    settings: dict[str, Any] = {key: getattr(config, field) for field, key in KEYS.items()}
    if not config.window:
        del settings["sliding_window"]
    if scaling := config.rope_scaling:
        fields = ["factor"] if scaling.kind == "linear" else list(SCALING_KEYS)
        settings["rope_scaling"] = {"rope_type": scaling.kind}
        settings["rope_scaling"] |= {SCALING_KEYS[field]: getattr(scaling, field) for field in fields}
    if config.alibi:
        settings["model_max_length"] = settings.pop("max_position_embeddings")
    model_type = "baichuan" if config.alibi else kind
    return {"architectures": [FAMILIES[kind].architecture], "model_type": model_type, **FIXED, **settings}
