"""config.json: the families of open checkpoints, and what their settings mean to this decoder.

Llama, Mistral, Qwen2, Qwen3 and Baichuan are one decoder with a few switches. A setting that asks for anything
else is refused by its name; one that is not known here is harmless unless its name says otherwise.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from minidoctor.config import ModelConfig, RopeScaling, UserError
from minidoctor.files.json_files import from_json, read_object

# The key in config.json for each field of ModelConfig, and what stands for it where the file is silent
# (Llama's own defaults in the `transformers` definition).
KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tied": "tie_word_embeddings",
    "window": "sliding_window",
}
SILENT = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": 0,
}
SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_seq_len": "original_max_position_embeddings",
}


class Family(NamedTuple):
    """What a `model_type` of config.json stands for, beyond what its keys say."""

    architecture: str
    switches: Mapping[str, bool] = MappingProxyType({})  # of ModelConfig
    silent: Mapping[str, Any] = MappingProxyType({})  # where its defaults are not Llama's
    passed_over: tuple[str, ...] = ()  # keys that count only with use_sliding_window, which is refused
    packed: bool = False  # q, k and v are rows of one matrix, W_pack
    normed_head: bool = False  # the rows of the output layer are used at length 1


MISTRAL_SILENT = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
QWEN_SILENT = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
QWEN_WINDOW = ("sliding_window", "max_window_layers")
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", {}, MISTRAL_SILENT),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, QWEN_SILENT, QWEN_WINDOW),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, QWEN_SILENT | {"head_dim": 128}, QWEN_WINDOW),
    "baichuan": Family("BaiChuanForCausalLM", packed=True),
    "baichuan2": Family("BaichuanForCausalLM", packed=True, normed_head=True),
}
# What this decoder takes for granted: any other value is refused, not ignored.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
# A key that is not known here is harmless, unless its name speaks of something that changes what is computed.
MATTERS = (
    r"expert|moe|quant|multiplier|scal|bias|norm|rope|rotary|window|"
    r"alibi|position_embedding|pattern|soft_?cap|clip|chunk"
)
OFF: tuple[Any, ...] = (None, 0, 1, "", "none", "default", [], {})


def read_model_config(directory: str | Path) -> ModelConfig:
    """Raises FileNotFoundError or ValueError; a setting this decoder does not have is named, never ignored."""
    return read_config(Path(directory))[0]


def read_config(directory: Path) -> tuple[ModelConfig, Family]:
    path = directory / "config.json"
    given = read_object(path)
    try:
        family = family_of(given)
        scaling, theta = rope_of(given)
        check_settings(given, family)
        heads = given.get("num_attention_heads")
        known = SILENT | dict(family.silent) | {k: v for k, v in given.items() if v is not None} | {"rope_theta": theta}
        if "num_key_value_heads" not in family.silent or "num_key_value_heads" in given:
            groups = given.get("num_key_value_heads")
            known["num_key_value_heads"] = heads if groups is None else groups
        if "sliding_window" in family.passed_over or given.get("sliding_window", 1) is None:
            known["sliding_window"] = 0
        if known.get("head_dim") is None:
            dim = known.get("hidden_size")  # if it or the heads are no numbers, they are refused below
            known["head_dim"] = dim // heads if type(dim) is type(heads) is int and heads > 0 else 2
        if missing := [key for key in KEYS.values() if known.get(key) is None]:
            raise UserError(f"no {', '.join(missing)}")
        fields = {"qkv_bias": False, "qk_norm": False, **family.switches, "rope_scaling": scaling}
        return from_json(ModelConfig, fields | {field: known[key] for field, key in KEYS.items()}), family
    except ValueError as error:
        # In the words of the file, not in ours.
        raise UserError(
            f"{path}: " + re.sub(r"\w+", lambda word: (KEYS | SCALING_KEYS).get(word[0], word[0]), str(error))
        ) from None


def family_of(given: dict[str, Any]) -> Family:
    """By model_type and the class that the checkpoint names. Raises ValueError."""
    kind = given.get("model_type", "llama")
    supported = [name for name in FAMILIES if name != "baichuan2"]
    if not isinstance(kind, str) or kind not in supported:
        raise UserError(f"model_type is {kind!r:.60}, supported are {', '.join(supported)}")
    classes = given.get("architectures") or ([] if kind == "baichuan" else [FAMILIES[kind].architecture])
    if kind == "baichuan" and classes == [FAMILIES["baichuan2"].architecture]:
        kind = "baichuan2"  # told from the first by the spelling of its class
    family = FAMILIES[kind]
    if classes not in ([family.architecture], ["LLaMAForCausalLM"] if kind == "llama" else None):  # an old spelling
        raise UserError(f"architectures is {classes!r:.60}, supported for {kind} is {[family.architecture]}")
    if family.normed_head and given.get("tie_word_embeddings"):
        raise UserError("tie_word_embeddings is True, supported is False where the output layer is normalised")
    if family.packed and (given.get("max_position_embeddings") is None or given.get("hidden_size") == 5120):
        raise UserError("no max_position_embeddings: a Baichuan of 13B weights, whose positions are ALiBi, not rotary")
    return family


def rope_of(given: dict[str, Any]) -> tuple[RopeScaling | None, Any]:
    """The stretching of rotary positions, and their base where it stands beside it, as newer files have it."""
    rope = {"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        settings = given.get(key) or {}
        if not isinstance(settings, dict) or any(rope.get(name, value) != value for name, value in settings.items()):
            raise UserError(f"{key} is {settings!r:.80}, expected an object that no other key contradicts")
        rope |= settings
    theta = rope.pop("rope_theta", SILENT["rope_theta"])
    kinds = {str(rope.pop(key)) for key in ("rope_type", "type") if rope.get(key) is not None} or {"default"}
    known = {"linear": ["factor"], "llama3": list(SCALING_KEYS.values()), "default": []}
    if len(kinds) > 1 or not kinds <= set(known):
        raise UserError(
            f"rope_scaling is of type {' and '.join(sorted(kinds))!r:.60}, supported are {', '.join(known)}"
        )
    kind = kinds.pop()
    for key, value in rope.items():
        if key not in known[kind] and not is_off(value):
            raise UserError(f"rope_scaling has {key} {value!r:.60}, which is not supported with type {kind}")
    if kind == "default":
        return None, theta
    if missing := [key for key in known[kind] if key not in rope]:
        raise UserError(f"rope_scaling of type {kind} has no {', '.join(missing)}")
    fields = {field: rope[key] for field, key in SCALING_KEYS.items() if key in known[kind]}
    defaults = {f.name: f.default for f in dataclasses.fields(RopeScaling) if f.default is not dataclasses.MISSING}
    return from_json(RopeScaling, defaults | {"kind": kind} | fields), theta


def check_settings(given: dict[str, Any], family: Family) -> None:
    """Raises ValueError at the first key that asks for something this decoder does not compute."""
    window = given.get("sliding_window", family.silent.get("sliding_window"))
    if window and not family.passed_over and "sliding_window" not in family.silent:
        raise UserError(f"sliding_window is {window!r:.60}, which is not supported for {family.architecture}")
    read = {*KEYS.values(), "rope_scaling", "rope_parameters", *family.passed_over}
    for key, value in given.items():
        if key in FIXED:
            if value is not None and value != FIXED[key]:
                raise UserError(f"{key} is {value!r:.60}, supported is {FIXED[key]!r}")
        elif key == "layer_types":
            kind = "sliding_attention" if window and not family.passed_over else "full_attention"
            if value is not None and (not isinstance(value, list) or any(other != kind for other in value)):
                raise UserError(f"{key} is {value!r:.60}, supported is {kind} in every layer")
        elif key not in read and re.search(MATTERS, key) and not is_off(value):
            raise UserError(f"{key} is {value!r:.60}, which is not supported for {family.architecture}")


def is_off(value: Any) -> bool:
    return value is not True and value in OFF  # True == 1


def config_settings(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model whose weights are stored one by one.

    A Baichuan is then a Llama, and so is a Mistral without a window.
    """
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "mistral" if config.window else "llama"
    if (config.window and kind != "mistral") or (config.qk_norm and config.qkv_bias):
        raise UserError("no family has this combination of window, qkv_bias and qk_norm")
    settings: dict[str, Any] = {key: getattr(config, field) for field, key in KEYS.items()}
    if not config.window:
        del settings["sliding_window"]
    if scaling := config.rope_scaling:
        read = ["factor"] if scaling.kind == "linear" else list(SCALING_KEYS)
        settings["rope_scaling"] = {"rope_type": scaling.kind}
        settings["rope_scaling"] |= {SCALING_KEYS[field]: getattr(scaling, field) for field in read}
    return {"architectures": [FAMILIES[kind].architecture], "model_type": kind, **FIXED, **settings}
