"""Plain LoRA in the layout of the package `peft`, read and written.

    adapter_config.json          rank, alpha and the adapted layers
    adapter_model.safetensors    base_model.model.<name>.lora_A.weight (R, D_in), ...lora_B.weight (D_out, R)
    adapter_model.bin            the same as a file of torch.save, which is read and not written

An adapter with one expert consists of the same matrices under shorter names. A mixture has no such layout: the gate
of an expert depends on the token, so neither `peft` nor a merged weight can represent it.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minidoctor.checkpoints.hugging_face import check_finite, checkpoint_hash, describe_weights, note_unused
from minidoctor.config import TARGETS, AdapterConfig, UserError, check
from minidoctor.files.json_files import read_object, write_json
from minidoctor.files.safetensors import read_header, write_tensors

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the weights of the base
}
READ = {*SUPPORTED, "r", "lora_alpha", "target_modules", "use_rslora", "base_model_name_or_path"}
# Settings without an effect on a trained adapter. Any that is not listed here must be switched off.
HARMLESS = {"task_type", "inference_mode", "lora_dropout", "auto_mapping", "revision", "peft_version"}
HARMLESS |= {"megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "ensure_weight_tying"}


def is_peft(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and "peft_type" in read_object(directory / CONFIG)


def check_plain_lora(adapter: AdapterConfig) -> None:
    n, reason = adapter.n_experts, "their gates depend on the token, so no fixed matrix equals them"
    check(n == 1, f"only plain LoRA (--n-experts 1) can be exported, the adapter has {n} experts: {reason}")


def read_peft_config(directory: Path) -> AdapterConfig:
    """Read adapter_config.json. Raises UserError that names the first setting that plain LoRA does not have."""
    path = directory / CONFIG
    settings = read_object(path)
    for key, values in SUPPORTED.items():
        value = settings.get(key, values[0])
        check(value in values, f"{path}: {key} is {value!r:.60}, supported is {values[0]!r}")
    for key, value in settings.items():
        off = value is None or value is False or value in ("", [], {})  # 0 is a layer
        check(off or key in READ | HARMLESS, f"{path}: {key} is {value!r:.60}, which is not supported")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    modules: Any = settings.get("target_modules")
    numbers = type(rank) is int and type(alpha) in (int, float) and isinstance(modules, list)
    check(numbers, f"{path}: expected r and lora_alpha as numbers and target_modules as a list of names")
    targets = [str(module).rsplit(".", 1)[-1] for module in modules]  # small models have their full names listed
    unknown = [target for target in targets if target not in TARGETS]
    check(not unknown, f"{path}: target_modules has {unknown[:1]!r:.60}, supported are {', '.join(TARGETS)}")
    try:
        if settings.get("use_rslora"):  # scaled by alpha / sqrt(r)
            alpha *= max(rank, 0) ** 0.5
        targets = [target for target in TARGETS if target in targets]
        return AdapterConfig(n_experts=1, rank=rank, alpha=float(alpha), targets=tuple(targets))
    except (UserError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None


def read_metadata(directory: Path) -> dict[str, str]:
    """Return the metadata of the weights, which `peft` ignores. Raises FileNotFoundError or UserError."""
    path = weights_file(directory)
    return {} if path.name == PICKLED else read_header(path)[1]


def weights_file(directory: Path) -> Path:
    for path in (directory / WEIGHTS, directory / PICKLED):
        if os.path.lexists(path):
            return path
    raise FileNotFoundError(f"{directory}: no {WEIGHTS} or {PICKLED} here{describe_weights(directory)}")


def check_base(directory: Path, base: Path) -> None:
    """Raise UserError if an adapter that was exported here was trained on another base.

    An adapter of `peft` only has the name or the path of its base. If that differs, a note is printed.
    """
    metadata, name = read_metadata(directory), read_object(directory / CONFIG).get("base_model_name_or_path")
    note_unused(directory, weights_file(directory))
    if trained_on := metadata.get("base_checkpoint_hash", metadata.get("base_fingerprint")):
        same = trained_on == checkpoint_hash(base)
        check(same, f"{directory / WEIGHTS}: the adapter was trained on another model than {base}")
    elif isinstance(name, str) and name:
        path = base.resolve()
        parts = path.as_posix().replace("--", "/").split("/")  # models--org--name in the hub's cache is org/name
        if Path(name) != path and (Path(name).is_absolute() or Path(name).name not in parts):
            print(f"note: {directory} was trained on {name:.200} and is loaded onto {base}", file=sys.stderr)


def from_peft_name(name: str) -> str:
    """`"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"` -> `"model.layers.0.mlp.up_proj.lora_a"`."""
    name = re.sub(r"\.lora_([AB])\.weight$", lambda match: ".lora_" + match[1].lower(), name)
    return name.removeprefix("base_model.model.")


def to_peft_name(name: str) -> str:
    return "base_model.model." + name.replace(".lora_a", ".lora_A.weight").replace(".lora_b", ".lora_B.weight")


def write_peft(
    directory: Path, base: str, adapter: AdapterConfig, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a plain-LoRA adapter. `metadata` is stored with the weights, where `peft` ignores it.

    Raises UserError as `check_finite`, and if the adapter has several experts.
    """
    check_plain_lora(adapter)
    check_finite(state, directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    settings |= {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": list(adapter.targets)}
    settings |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    tensors = {to_peft_name(name): tensor for name, tensor in state.items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt", **metadata})
    write_json(directory / CONFIG, settings)
