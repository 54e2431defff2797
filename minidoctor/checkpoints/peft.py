"""Plain LoRA as the package `peft` writes it, so that an adapter can go from one to the other.

    adapter_config.json          rank, alpha and the layers it belongs to
    adapter_model.safetensors    base_model.model.<name>.lora_A.weight (R, D_in), ...lora_B.weight (D_out, R)

With one expert ours are the same matrices under shorter names. With more there is nothing to translate to: the
gate of an expert depends on the token, so neither `peft` nor a merged weight can hold it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minidoctor.config import TARGETS, AdapterConfig, UserError
from minidoctor.files.json_files import read_object, write_json
from minidoctor.files.safetensors import write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of its settings those that are read below, and those that change nothing once an adapter is trained; any other
# must be off.
READ = ("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "target_modules", "use_rslora")
HARMLESS = (
    *("base_model_name_or_path", "task_type", "inference_mode", "lora_dropout", "auto_mapping", "revision"),
    "peft_version",
    *("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "ensure_weight_tying"),
)


def is_peft(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and "peft_type" in read_object(directory / CONFIG)


def refuse_mixture(adapter: AdapterConfig, what: str) -> None:
    """Raises ValueError."""
    if adapter.n_experts > 1:
        raise UserError(
            f"{what} needs plain LoRA (--n-experts 1), the adapter has {adapter.n_experts} experts: "
            "their gates depend on the token, so no fixed matrix equals them"
        )


def read_peft_config(directory: Path) -> AdapterConfig:
    """Raises ValueError at a setting that plain LoRA does not have."""
    path = directory / CONFIG
    given = read_object(path)
    for key, value in {"peft_type": "LORA", "bias": "none"}.items():
        if given.get(key, value) != value:
            raise UserError(f"{path}: {key} is {given[key]!r:.60}, supported is {value!r}")
    if given.get("init_lora_weights", True) not in (True, False, "gaussian"):  # the others change the base's weights
        raise UserError(f"{path}: init_lora_weights is {given['init_lora_weights']!r:.60}, which is not supported")
    for key, value in given.items():
        off = value is None or value is False or value in ("", [], {})  # 0 is a layer
        if key not in READ + HARMLESS and not off:
            raise UserError(f"{path}: {key} is {value!r:.60}, which is not supported")
    rank: Any = given.get("r")
    alpha: Any = given.get("lora_alpha")
    targets: Any = given.get("target_modules")
    if type(rank) is not int or type(alpha) not in (int, float) or not isinstance(targets, list):
        raise UserError(f"{path}: expected r and lora_alpha as numbers and target_modules as a list of names")
    targets = [str(target).rsplit(".", 1)[-1] for target in targets]  # a small model's are listed one by one
    if unknown := [target for target in targets if target not in TARGETS]:
        raise UserError(f"{path}: target_modules has {unknown[0]!r:.60}, supported are {', '.join(TARGETS)}")
    try:
        if given.get("use_rslora"):  # scales by alpha / sqrt(r)
            alpha *= max(rank, 0) ** 0.5
        return AdapterConfig(
            n_experts=1, top_k=1, rank=rank, alpha=float(alpha), targets=tuple(t for t in TARGETS if t in targets)
        )
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None


def our_name(theirs: str) -> str:
    """`"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"` -> `"model.layers.0.mlp.up_proj.lora_a"`."""
    ours = re.sub(r"\.lora_([AB])\.weight$", lambda found: ".lora_" + found[1].lower(), theirs)
    return ours.removeprefix("base_model.model.")


def their_name(ours: str) -> str:
    return "base_model.model." + ours.replace(".lora_a", ".lora_A.weight").replace(".lora_b", ".lora_B.weight")


def write_peft(
    directory: Path, base: str, adapter: AdapterConfig, state: dict[str, Tensor], notes: Mapping[str, str] | None = None
) -> None:
    """`notes` are kept beside the weights, where `peft` does not look. Raises ValueError with more than one expert."""
    refuse_mixture(adapter, "the PEFT layout")
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    theirs = {their_name(name): tensor for name, tensor in state.items()}
    write_tensors(directory / WEIGHTS, theirs, {"format": "pt", **(notes or {})})
    write_json(directory / CONFIG, settings)
