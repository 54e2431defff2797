"""Adapters: saved with a description of their base, and loaded onto it.

    adapter_config.json      the experts' configuration, the base that they were trained on, the chat format
    adapter.safetensors      experts and routers

A directory in the layout of the package `peft` is an adapter too. Other files of the directory are ignored.
"""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minidoctor.checkpoints import peft
from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import check_unwrapped, checkpoint_hash, load_model
from minidoctor.config import AdapterConfig, ModelConfig, UserError, check
from minidoctor.files.hub_cache import follow_snapshot
from minidoctor.files.json_files import from_json, read_object, write_json
from minidoctor.files.pytorch_bin import read_entries
from minidoctor.files.safetensors import read_tensors
from minidoctor.model import Model, adapter_state
from minidoctor.ops.int8_product import pack_int8
from minidoctor.ops.linear import join_projections
from minidoctor.text.tokenizer import Tokenizer, load_tokenizer

CONFIG, ADAPTER = "adapter_config.json", "adapter.safetensors"
# All files of an adapter and of its training, here and in the package `peft`.
ADAPTER_FILES = (CONFIG, ADAPTER, "training_state.safetensors", peft.WEIGHTS, peft.PICKLED)


def has_adapter(directory: str | Path) -> bool:
    """Return whether the directory contains any file of an adapter, so that a run must not write there."""
    return any(os.path.lexists(Path(directory) / name) for name in ADAPTER_FILES)


def save_adapter_config(
    out: Path, base: str, adapter: AdapterConfig, chat_format: str = "auto", quantize: str = "none"
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    base_fields = dataclasses.asdict(read_model_config(base))
    trained_on = {"name": Path(base).resolve().name, "model": base_fields, "checkpoint_hash": checkpoint_hash(base)}
    if quantize != "none":
        trained_on["quantize"] = quantize
    write_json(out / CONFIG, {"base": trained_on, "adapter": dataclasses.asdict(adapter), "chat_format": chat_format})


def read_adapter_config(directory: Path, base: str | Path) -> AdapterConfig:
    """Read the configuration. Raises FileNotFoundError, or UserError if it is damaged or belongs to another base."""
    path = directory / CONFIG
    content, present = read_object(path), dataclasses.asdict(read_model_config(base))
    try:
        # Adapters without the field were trained before there were groups.
        adapter, trained_on = from_json(AdapterConfig, {"n_groups": 1} | content["adapter"]), content["base"]
        # Fields of ModelConfig that were added since the training have their defaults.
        before = {key: trained_on["model"].get(key, getattr(ModelConfig, key, None)) for key in present}
        # Earlier versions wrote "fingerprint". The hash comes last, because a difference in shape explains more.
        before["checkpoint_hash"] = trained_on.get("checkpoint_hash") or trained_on["fingerprint"]
        origin = f"the adapter was trained on {trained_on['name']!r}"
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: not an adapter configuration ({error})") from None
    for key, now in (present | {"checkpoint_hash": checkpoint_hash(base)}).items():
        check(before[key] == now, f"{path}: {origin} with {key} {before[key]!r:.70}, {base} has {now!r:.70}")
    return adapter


def load_adapted_model(
    base: str | Path,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str = "none",
) -> Model:
    """Load a base with trained experts, or with a plain LoRA of the package `peft`, in eval mode.

    The base may be quantized differently than in training. Raises FileNotFoundError or UserError.
    """
    directory, base = follow_snapshot(directory), follow_snapshot(base)
    if peft.is_peft(directory):
        peft.check_base(directory, base)
        model = load_model(base, dtype, device, peft.read_peft_config(directory), quantize)
        load_into(adapter_state(model), peft.weights_file(directory), peft.from_peft_name)
    else:
        model = load_model(base, dtype, device, read_adapter_config(directory, base), quantize)
        load_into(adapter_state(model), directory / ADAPTER)
    return model


def load_into(state: dict[str, Tensor], path: Path, rename: Callable[[str], str] | None = None) -> None:
    """Copy a file's tensors into `state`, which must have the same names, shapes and dtypes. Raises UserError.

    With `rename`, for files of another program, any floating-point dtype is accepted.
    """
    entries = read_entries(path)
    names = {name: rename(name) if rename else name for name in entries}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    check(not repeated, f"{path}: {', '.join(repeated[:1])} is stored under two names")
    different = set(names.values()) ^ set(state)
    for name in sorted(different):
        check_unwrapped(path, name)
    check(not different, f"{path}: {len(different)} tensors are missing or unexpected: {min(different, default='')}")
    for stored_name, name in names.items():
        dtype, shape = entries[stored_name].dtype, entries[stored_name].shape
        matching = dtype == state[name].dtype or (rename is not None and dtype.is_floating_point)
        expected = f"expected {state[name].dtype} {tuple(state[name].shape)}"
        check(matching and shape == state[name].shape, f"{path}: {name} is {dtype} {shape}, {expected}")
    with torch.no_grad():
        for stored_name, tensor in read_tensors(path, entries=entries):
            state[names[stored_name]].copy_(tensor)


def load(
    base: str | Path,
    adapter: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    chat_format: str = "auto",
    chats: bool = True,
    thinking: bool = False,
    quantize: str = "none",
    pack_blocks: bool = True,
) -> tuple[Model, Tokenizer]:
    """Load a base, with an adapter if there is one, and its tokenizer, for inference.

    On a CPU, int8 weights are packed for fast products. Those of blocks that are compiled for batches of one must not
    be (`pack_blocks`).

    With "auto" the chat format is that of the adapter's training, or that of the base. `thinking` as in
    `load_tokenizer`. Raises FileNotFoundError or UserError, also for an unknown chat format, unless `chats` is False.
    """
    check(adapter != "", "the path of the adapter is empty")  # not the base alone, because of an empty variable
    if adapter and chat_format == "auto":
        chat_format = read_chat_format(adapter)
    tokenizer = load_tokenizer(base, chat_format, thinking)
    check(not chats or tokenizer.format is not None, tokenizer.note)  # before gigabytes are read
    if adapter:
        model, trained_on = load_adapted_model(base, adapter, dtype, device, quantize), read_quantization(adapter)
        if trained_on not in ("none", quantize):
            print(f"note: {adapter} was trained with --quantize {trained_on}, here it is {quantize}", file=sys.stderr)
    else:
        model = load_model(base, dtype, device, quantize=quantize)
    check_vocabulary(base, model, tokenizer)
    join_projections(model)
    packed = pack_int8(model if pack_blocks else model.lm_head)
    if quantize != "none" and not packed:
        note = f"each product dequantizes its {quantize} weight, so decoding is slower than without --quantize"
        print(f"note: {note}", file=sys.stderr)
    return model, tokenizer


def read_chat_format(adapter: str | Path) -> str:
    """Return the chat format that an adapter was trained in, or "auto" if it is not stored."""
    adapter = follow_snapshot(adapter)
    stored = peft.read_metadata(adapter) if peft.is_peft(adapter) else read_object(adapter / CONFIG)
    return str(stored.get("chat_format", "auto"))


def read_quantization(adapter: str | Path) -> str:
    """Return how the base was quantized in an adapter's training, "none" if that is not stored."""
    adapter = follow_snapshot(adapter)
    trained_on = {} if peft.is_peft(adapter) else read_object(adapter / CONFIG).get("base", {})
    return str(trained_on.get("quantize", "none"))


def check_vocabulary(base: str | Path, model: Model, tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizer has tokens for which the model has no embedding."""
    n, rows = tokenizer.vocab_size, model.config.vocab_size
    check(n <= rows, f"{base}: the tokenizer has {n} tokens, the model has embeddings for {rows}")
