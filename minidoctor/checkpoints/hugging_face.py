"""Checkpoints in and out: Hugging Face directories, strictly by name.

A directory is `config.json` with `model.safetensors`, or with shards that `model.safetensors.index.json` lists.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidoctor.checkpoints.families import Family, config_settings, read_config
from minidoctor.config import AdapterConfig, ModelConfig, UserError
from minidoctor.files.json_files import read_object, write_json
from minidoctor.files.safetensors import CODES, Entry, read_header, read_tensors, write_tensors
from minidoctor.model import Model, adapter_state, is_adapter_name


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory. Raises FileNotFoundError or ValueError."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if not index.is_file():
        if not single.exists():
            others = sorted(
                path.name for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt", ".gguf")
            )
            hint = (
                f", only {others[0]}: convert it to safetensors first (a pickled file can run code)" if others else ""
            )
            raise FileNotFoundError(f"{directory}: no model.safetensors or model.safetensors.index.json here{hint}")
        return [single]
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: weight_map must map tensor names to files")
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors") or len(name.encode(errors="replace")) > 200:
            raise UserError(f"{index}: {name!r:.60} is no safetensors file of this directory")
    return [directory / name for name in sorted(set(names.values()))]


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: AdapterConfig | None = None,
) -> Model:
    """The model of a checkpoint directory in eval mode, with new experts if an adapter is given.

    Raises FileNotFoundError or ValueError, whatever is in the directory. Nothing is allocated before every
    name, shape and offset was found to be right.
    """
    directory = Path(directory)
    config, family = read_config(directory)
    files = checkpoint_files(directory)
    headers = [(file, read_header(file)[0]) for file in files]
    check_layers(directory, headers, config)
    try:
        with torch.device("meta"):  # shapes without memory
            plain = Model(config)
    except RuntimeError as error:  # sizes whose product no tensor can have
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    stored = stored_names(plain, family)
    check_names(directory, headers, stored, config.tied)
    with torch.device("meta"):  # the weights come from the files; the experts are made here
        model = Model(config, adapter) if adapter else plain
    if config.tied:
        del stored["lm_head.weight"]
    loaded: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, dtype, device, stored):
            sizes = [shape[0] for shape in stored[name].values()]
            loaded |= zip(stored[name], tensor.split(sizes), strict=True)
    if family.normed_head:
        for rows in loaded["lm_head.weight"].split(256):  # of all at once there would be copies in float32
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    if config.tied:
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    model.load_state_dict(loaded | adapter_state(model), assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval()


Stored = dict[str, dict[str, tuple[int, ...]]]


def stored_names(model: Model, family: Family) -> Stored:
    """Each tensor's name in the files, with the names and shapes of the model's tensors that are its rows."""
    stored: Stored = {}
    for name, tensor in model.state_dict().items():
        packed = re.sub(r"[qkv]_proj\.weight$", "W_pack.weight", name) if family.packed else name
        stored.setdefault(packed, {})[name] = tuple(tensor.shape)
    return stored


def check_layers(directory: Path, files: list[tuple[Path, dict[str, Entry]]], config: ModelConfig) -> None:
    """Raises ValueError. Before a model is made: a config could ask for any number of layers."""
    names = (name.split(".") for _, entries in files for name in entries)
    found = {parts[2] for parts in names if parts[:2] == ["model", "layers"] and len(parts) > 3}
    if len(found) != config.n_layers:
        raise UserError(f"{directory}: config.json asks for {config.n_layers} layers, the files hold {len(found)}")


def check_names(directory: Path, files: list[tuple[Path, dict[str, Entry]]], stored: Stored, tied: bool) -> None:
    """Raises ValueError unless the files hold each expected tensor once, with its shape, and nothing else."""
    found: set[str] = set()
    for file, entries in files:
        if twice := found & set(entries):
            raise UserError(f"{file}: {min(twice)} stands in another file too")
        found |= set(entries)
        for name, entry in entries.items():
            if parts := list(stored.get(name, {}).values()):
                shape = (sum(part[0] for part in parts), *parts[0][1:])
                if entry.shape != shape:
                    raise UserError(f"{file}: {name} has shape {entry.shape}, config.json asks for {shape}")
            if not entry.dtype.is_floating_point:
                raise UserError(f"{file}: {name} is {CODES[entry.dtype]}, expected floating point")
    missing = set(stored) - found - ({"lm_head.weight"} if tied else set())
    # Old checkpoints also store the rotary frequencies, which follow from config.json.
    unexpected = {name for name in found - set(stored) if not name.endswith("rotary_emb.inv_freq")}
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise UserError(f"{directory}: {len(names)} tensors are {what}: {', '.join(sorted(names)[:4])}")


def save_model(model: Model, directory: str | Path, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> None:
    """Writes config.json and model.safetensors as `load_model`, or any other reader of the format, takes them.

    Without the experts. A Baichuan becomes a Llama, which it is once its matrices are taken apart.
    """
    directory, config = Path(directory), model.config
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not is_adapter_name(name)}
    if config.tied:
        del state["lm_head.weight"]
    settings = config_settings(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(directory / "config.json", settings | extra)
    write_tensors(directory / "model.safetensors", state, {"format": "pt"})


def checkpoint_hash(directory: str | Path) -> str:
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


def find_non_finite(model: nn.Module) -> str | None:
    """Return the name of the first tensor of the model that contains NaN or infinity, or None.

    Only the minimum and the maximum are computed, which NaN and infinity both reach, so nothing is copied.
    """
    for name, tensor in model.state_dict().items():
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            return name
    return None
