"""Checkpoints in the layout of Hugging Face, read and written strictly by tensor name.

A directory contains `config.json` and `model.safetensors` or `pytorch_model.bin`, or shards of either format that an
index lists, `model.safetensors.index.json` or `pytorch_model.bin.index.json`.
"""

import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidoctor.checkpoints.families import Family, config_settings, read_config
from minidoctor.config import AdapterConfig, UserError, check, check_quantization
from minidoctor.files.hub_cache import find_partial_download, follow_snapshot
from minidoctor.files.json_files import read_object, write_json
from minidoctor.files.pytorch_bin import read_entries
from minidoctor.files.safetensors import CODES, Entry, read_tensors, write_tensors
from minidoctor.model import Model, is_adapter_name
from minidoctor.ops.linear import Linear


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its file and its header entry."""

    file: Path
    entry: Entry


# Names and shapes of the model's tensors that each stored tensor contains: three for W_pack, otherwise one.
Layout = dict[str, dict[str, tuple[int, ...]]]
# Parts that a wrapper of the saved model has added to the names.
EMBEDDING = "model.embed_tokens.weight"
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel or FSDP", "base_model.": "peft"}
CHUNK = 2**22  # bytes that are compared at a time
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference


def checkpoint_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory, or else its .bin files. Raises FileNotFoundError or UserError.

    A single file is preferred to an index, as in transformers: shards next to it are left from an earlier save.
    """
    for name in SINGLE_FILES:
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file() or (os.path.lexists(single) and not os.path.lexists(index)):
            return [single]  # if it is a dangling symlink, reading reports it
        if os.path.lexists(index):
            return read_index(index, single.suffix)
    expected = " or ".join(SINGLE_FILES)
    raise FileNotFoundError(f"{directory}: no {expected}, or index of shards, here{describe_weights(directory)}")


def read_index(index: Path, suffix: str) -> list[Path]:
    names: Any = read_object(index).get("weight_map")
    mapping = isinstance(names, dict) and len(names) > 0 and all(isinstance(name, str) for name in names.values())
    check(mapping, f"{index}: weight_map must map tensor names to files")
    for name in names.values():
        local = Path(name).name == name and name.endswith(suffix)
        check(local, f"{index}: {name!r:.60} is not a {suffix} file of this directory")
    return [index.with_name(name) for name in sorted(set(names.values()))]


def describe_weights(directory: Path) -> str:
    """Return a hint about the weights of a directory without a supported file, or an empty string."""
    if partial := find_partial_download(directory):
        return f"; the download of {partial} was interrupted, run it again"
    files = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt", ".gguf"))
    return f", only {files[0]}: convert it to safetensors first" if files else ""


def note_unused(directory: Path, used: Path) -> None:
    """Print that a directory has .bin files next to the safetensors that are used."""
    unused = [path.name for path in sorted(directory.glob("*_model*.bin"))] if used.suffix == ".safetensors" else []
    if unused:
        print(f"note: {directory} has {used.name} and {unused[0]}; safetensors are used", file=sys.stderr)


def check_unwrapped(file: Path, name: str) -> None:
    for part, wrapper in WRAPPERS.items():
        check(part not in name, f"{file}: {name:.200} was saved from within {wrapper}; remove {part!r} from the names")


def read_stored(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors of all files by name, from the headers only. Raises FileNotFoundError or UserError."""
    stored: dict[str, StoredTensor] = {}
    for file in checkpoint_files(directory):
        for name, entry in read_entries(file).items():
            check_unwrapped(file, name)
            if name in stored:
                raise UserError(f"{file}: {name} is also in {stored[name].file.name}")
            check(entry.dtype.is_floating_point, f"{file}: {name} is {CODES[entry.dtype]}, expected floating point")
            stored[name] = StoredTensor(file, entry)
    return stored


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: AdapterConfig | None = None,
    quantize: str = "none",
) -> Model:
    """Load a checkpoint in eval mode, with newly initialized experts if an adapter is given.

    `quantize` is one of QUANTIZATIONS. NF4 and int8 are used for the linear layers of the blocks, each quantized when
    it has been read, int8 also for the output layer. Embeddings and norms have the `dtype`.

    Raises FileNotFoundError or UserError for any content of the directory. No weight is allocated before all names,
    shapes and offsets are checked.
    """
    directory = follow_snapshot(directory)
    check_quantization(quantize)
    config, family = read_config(directory)
    stored = read_stored(directory)
    note_unused(directory, checkpoint_files(directory)[0])
    head, embedding = stored.get("lm_head.weight"), stored.get(EMBEDDING)
    if config.tied and head and embedding and not equal_content(head, embedding):
        config = replace(config, tied=False)  # as in transformers 5
    try:
        with torch.device("meta"):  # shapes without memory
            plain = Model(config)
    except RuntimeError as error:  # sizes whose product no tensor can have
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    layout = stored_layout(plain, family)
    check_names(directory, stored, layout, config.tied)
    with torch.device("meta"):  # except for the experts, which are initialized here
        model = Model(config, adapter) if adapter else plain
    if config.tied:
        del layout["lm_head.weight"]
    loaded: dict[str, Tensor] = {}
    # Allocated before they are read: small tensors between temporary ones would fragment the memory.
    forms = {name: layer.quantize(quantize, dtype, device) for name, layer in quantized_layers(model, quantize).items()}
    quantized_head = "lm_head.weight" in forms
    if config.tied and quantized_head:
        forms[EMBEDDING] = forms.pop("lm_head.weight")
    exact = forms.keys() - ({"lm_head.weight"} if family.normalized_head else set())
    for key, weight in read_weights(stored, layout, exact, dtype, device):
        if key == "lm_head.weight" and family.normalized_head:
            for rows in weight.split(256):  # at once they would need copies in float32
                rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
        if key in forms:
            forms[key].store(weight)
        if key not in forms or key == EMBEDDING:
            loaded[key] = weight.to(dtype)
    if config.tied and not quantized_head:
        loaded["lm_head.weight"] = loaded[EMBEDDING]
    # With the experts and the quantized weights, which are not on the device "meta".
    model.load_state_dict({name: x for name, x in model.state_dict().items() if not x.is_meta} | loaded, assign=True)
    if config.tied and not quantized_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval()


def read_weights(
    stored: dict[str, StoredTensor],
    layout: Layout,
    exact: Collection[str],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the layout one by one in `dtype`, those in `exact` as they are stored."""
    for file in {tensor.file: None for tensor in stored.values()}:
        entries = {name: tensor.entry for name, tensor in stored.items() if tensor.file == file and name in layout}
        unchanged = {name: entry for name, entry in entries.items() if not layout[name].keys().isdisjoint(exact)}
        rest = {name: entry for name, entry in entries.items() if name not in unchanged}
        for name, tensor in chain(
            read_tensors(file, None, device, entries=unchanged), read_tensors(file, dtype, device, entries=rest)
        ):
            yield from zip(layout[name], tensor.split([shape[0] for shape in layout[name].values()]), strict=True)


def quantized_layers(model: Model, quantize: str) -> dict[str, Linear]:
    """Return the linear layers that are quantized, by the names of their weights: int8 includes the output layer."""
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    if quantize != "int8":
        del layers["lm_head.weight"]
    return {} if quantize == "none" else layers


def equal_content(first: StoredTensor, second: StoredTensor) -> bool:
    """Compare two stored tensors bit by bit, without having either in memory."""
    if first.entry[:2] != second.entry[:2]:  # dtype and shape
        return False
    with first.file.open("rb") as a, second.file.open("rb") as b:
        a.seek(first.entry.begin)
        b.seek(second.entry.begin)
        sizes = [min(CHUNK, first.entry.end - start) for start in range(first.entry.begin, first.entry.end, CHUNK)]
        return all(a.read(size) == b.read(size) for size in sizes)


def stored_layout(model: Model, family: Family) -> Layout:
    layout: Layout = {}
    for name, tensor in model.state_dict().items():
        stored_name = re.sub(r"[qkv]_proj\.weight$", "W_pack.weight", name) if family.packed else name
        layout.setdefault(stored_name, {})[name] = tuple(tensor.shape)
    return layout


def check_names(directory: Path, stored: dict[str, StoredTensor], layout: Layout, tied: bool) -> None:
    """Raise UserError unless the files contain each expected tensor with its shape, and no other."""
    for name, shapes in layout.items():
        if name in stored:
            first, *_ = shapes.values()
            shape = (sum(shape[0] for shape in shapes.values()), *first[1:])
            file, entry = stored[name]
            check(entry.shape == shape, f"{file}: {name} has shape {entry.shape}, config.json requests {shape}")
    missing = layout.keys() - stored.keys() - ({"lm_head.weight"} if tied else set())
    # Old checkpoints also contain the rotary frequencies, which follow from config.json.
    unexpected = {name for name in stored.keys() - layout.keys() if not name.endswith("rotary_emb.inv_freq")}
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        check(not names, f"{directory}: {len(names)} tensors are {kind}: {', '.join(sorted(names)[:4])}")


def save_model(model: Model, directory: str | Path, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> None:
    """Write config.json, with the `extra` keys, and model.safetensors, without experts.

    A Baichuan with rotary positions becomes a Llama: its q, k and v are written separately. Raises UserError as
    `check_finite`.
    """
    directory, config = Path(directory), model.config
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not is_adapter_name(name)}
    is_quantized = any(".quantized." in name for name in state)
    check(not is_quantized, f"{directory}: not written, the model is quantized; load it with its stored weights")
    if config.tied:
        del state["lm_head.weight"]
    if config.alibi:  # Baichuan-13B
        for name in [name for name in state if "q_proj" in name]:
            parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            state[name.replace("q_proj", "W_pack")] = torch.cat(parts)
    settings = config_settings(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    check_finite(state, directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", settings | extra)
    write_tensors(directory / "model.safetensors", state, {"format": "pt"})


def checkpoint_hash(directory: str | Path) -> str:
    """Return a SHA-256 of every tensor's name, dtype and shape and of up to 4 KiB at its start, middle and end.

    Checkpoints that differ by training differ in every tensor. Hashing a large one as a whole would take as long as
    loading it.
    """
    digest = hashlib.sha256()
    for path in checkpoint_files(follow_snapshot(directory)):
        entries = read_entries(path)
        with path.open("rb") as file:
            for name, entry in sorted(entries.items()):
                digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
                for start in (entry.begin, (entry.begin + entry.end) // 2, max(entry.begin, entry.end - 4096)):
                    file.seek(start)
                    digest.update(file.read(min(4096, entry.end - start)))
    return digest.hexdigest()


def find_non_finite(model: nn.Module | Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor of a model or state that contains NaN or infinity, or None."""
    for name, tensor in (model.state_dict() if isinstance(model, nn.Module) else model).items():
        # NaN and infinity both show in the minimum or the maximum, which need no copy of the tensor.
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            return name
    return None


def explain_non_finite(model: nn.Module) -> str:
    """Return why a model computes numbers that are not finite: a tensor that contains one, or else an overflow."""
    name = find_non_finite(model)
    return f"{name} contains NaN or infinity" if name else "an overflow; try --dtype float32"


def check_finite(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Raise UserError, before anything is written, if a tensor contains NaN or infinity, also from an overflow."""
    if name := find_non_finite(tensors):
        reason = f"{name} contains NaN or infinity in {tensors[name].dtype}"
        raise UserError(f"{directory}: not written, {reason}; check base and adapter, or use --dtype float32")
