"""Checkpoints in and out: safetensors files and Hugging Face directories, strictly by name.

A safetensors file is 8 bytes with the header's length N, N bytes of JSON {"name": {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {text: text}}, and the tensors, packed, in row-major order.
Nothing in it can be executed. Everything is checked against the file's size before memory is taken.

A directory is `config.json` with `model.safetensors`, or with shards that `model.safetensors.index.json` lists.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidoctor.config import AdapterConfig, ModelConfig, from_json
from minidoctor.model import Model, adapter_state, is_adapter_name

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library

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


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Under a temporary name first: whoever reads `path` finds the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error.strerror}); what was there before is unchanged") from None


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or length > LARGEST_HEADER:
            raise ValueError(f"{path}: truncated or no safetensors file: header of {length} bytes, file of {size}")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map text to text")
    entries = {name: parse_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    taken = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < taken:
            raise ValueError(f"{path}: tensors overlap")
        taken = entry.end
    return entries, metadata


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def parse_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> Entry:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"{path}: {name}: expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{path}: {name}: dtype {code!r:.40} is not supported, only {', '.join(DTYPES)}")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"{path}: {name}: bad shape or data_offsets")
    if math.prod(max(n, 1) for n in shape) > 2**60:  # also of an empty tensor: torch multiplies the rest
        raise ValueError(f"{path}: {name}: bad shape or data_offsets")
    begin, end = (data_start + offset for offset in offsets)
    if end > size:
        raise ValueError(f"{path}: truncated: {name} ends at byte {end}, the file at {size}")
    if end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"{path}: {name}: {end - begin} bytes cannot hold {code} of shape {tuple(shape)}")
    return Entry(DTYPES[code], tuple(shape), begin, end)


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time. Raises as `read_header`."""
    entries, _ = read_header(path)
    with path.open("rb") as file:
        for name, entry in entries.items():
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            file.seek(entry.begin)
            file.readinto(tensor.flatten().view(torch.uint8).numpy().data)  # into its memory: no second copy
            yield name, tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Raises OSError, leaving what was there before."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest dtype first, as the format's own library does, so that every tensor is aligned to its dtype.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    flats = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data for _, tensor in ordered)
    write_atomically(path, struct.pack("<Q", len(text)), text, *flats)


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
