"""Checkpoints in and out: Hugging Face directories, strictly by name.

A directory is `config.json` with `model.safetensors`, or with shards that `model.safetensors.index.json` lists.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidoctor.config import AdapterConfig, ModelConfig, from_json
from minidoctor.files import CODES, Entry, read_header, read_object, read_tensors, write_json, write_tensors
from minidoctor.model import Model, adapter_state, is_adapter_name

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
}
SILENT = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# What this decoder takes for granted: any other value is refused, not ignored.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory. Raises FileNotFoundError or ValueError."""
    index = directory / "model.safetensors.index.json"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if not index.is_file():
        return [directory / "model.safetensors"]
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to files")
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors") or len(name) > 200:
            raise ValueError(f"{index}: {name!r:.60} is no safetensors file of this directory")
    return [directory / name for name in sorted(set(names.values()))]


def read_model_config(directory: str | Path) -> ModelConfig:
    """Raises FileNotFoundError or ValueError; a setting this decoder does not have is named, never ignored."""
    path = Path(directory) / "config.json"
    given = read_object(path)
    for key, expected in FIXED.items():
        if given.get(key, expected) != expected:
            raise ValueError(f"{path}: {key} is {given[key]!r:.60}, supported is {expected!r}")
    rope = given.get("rope_parameters") or {}  # where newer files keep what older ones have at the top
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{path}: rope_parameters is {rope!r:.60}, supported is rope_type 'default'")
    given = {key: rope[key] for key in ("rope_theta",) if key in rope} | given
    known = SILENT | {key: value for key, value in given.items() if value is not None}
    known.setdefault("num_key_value_heads", known.get("num_attention_heads"))
    if known.get("head_dim") is None and isinstance(known.get("hidden_size"), int):
        heads = known.get("num_attention_heads")
        known["head_dim"] = known["hidden_size"] // heads if isinstance(heads, int) and heads > 0 else 0
    if missing := [key for key in KEYS.values() if known.get(key) is None]:
        raise ValueError(f"{path}: no {', '.join(missing)}")
    try:
        return from_json(ModelConfig, {field: known[key] for field, key in KEYS.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: AdapterConfig | None = None,
) -> Model:
    """The model of a checkpoint directory in eval mode, with new experts if an adapter is given.

    Raises FileNotFoundError or ValueError, whatever is in the directory.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    files = checkpoint_files(directory)
    headers = [(file, read_header(file)[0]) for file in files]
    try:
        with torch.device("meta"):  # shapes without memory
            plain = Model(config)
    except RuntimeError as error:  # sizes whose product no tensor can have
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    base = plain.state_dict()
    check_names(directory, headers, base, config.tied)
    with torch.device("meta"):  # the weights come from the files; the experts are made here
        model = Model(config, adapter) if adapter else plain
    loaded: dict[str, Tensor] = {}
    for file in files:
        loaded |= {name: tensor.to(device, dtype) for name, tensor in read_tensors(file) if name in base}
    if config.tied:
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    model.load_state_dict(loaded | adapter_state(model), assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval()


def check_names(
    directory: Path,
    files: list[tuple[Path, dict[str, Entry]]],
    expected: Mapping[str, Tensor],
    tied: bool,
) -> None:
    """Raises ValueError unless the files hold each expected tensor once, with its shape, and nothing else."""
    found: set[str] = set()
    for file, entries in files:
        if twice := found & set(entries):
            raise ValueError(f"{file}: {min(twice)} stands in another file too")
        found |= set(entries)
        for name, entry in entries.items():
            if name in expected and entry.shape != tuple(expected[name].shape):
                shape = tuple(expected[name].shape)
                raise ValueError(f"{file}: {name} has shape {entry.shape}, config.json asks for {shape}")
            if not entry.dtype.is_floating_point:
                raise ValueError(f"{file}: {name} is {CODES[entry.dtype]}, expected floating point")
    missing = set(expected) - found - ({"lm_head.weight"} if tied else set())
    # Old checkpoints also store the rotary frequencies, which follow from config.json.
    unexpected = {name for name in found - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise ValueError(f"{directory}: {len(names)} tensors are {what}: {', '.join(sorted(names)[:4])}")


def save_model(model: Model, directory: str | Path, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> None:
    """Writes config.json and model.safetensors as `load_model`, or any other reader of the format, takes them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not is_adapter_name(name)}
    if model.config.tied:
        del state["lm_head.weight"]
    settings = {key: getattr(model.config, field) for field, key in KEYS.items()}
    dtype_name = str(dtype).removeprefix("torch.")
    architecture = {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype_name}
    write_json(directory / "config.json", architecture | FIXED | settings | extra)
    write_tensors(directory / "model.safetensors", state, {"format": "pt"})


def fingerprint(directory: str | Path) -> str:
    """A digest of every tensor's name, dtype and shape and of up to 4 KiB from its start, middle and end.

    Two checkpoints that differ by training differ in every tensor; reading all of a large one would take as
    long as loading it.
    """
    digest = hashlib.sha256()
    for path in checkpoint_files(Path(directory)):
        entries, _ = read_header(path)
        with path.open("rb") as file:
            for name, entry in sorted(entries.items()):
                digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
                for place in (
                    entry.begin,
                    (entry.begin + entry.end) // 2,
                    max(entry.begin, entry.end - 4096),
                ):
                    file.seek(place)
                    digest.update(file.read(min(4096, entry.end - place)))
    return digest.hexdigest()
