"""TODO"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash, load_model
from minidoctor.checkpoints.peft import WEIGHTS, is_peft, our_name, read_peft_config
from minidoctor.config import AdapterConfig, UserError
from minidoctor.files.json_files import from_json, read_object, write_json
from minidoctor.files.safetensors import read_header, read_tensors
from minidoctor.model import Model, adapter_state
from minidoctor.text.tokenizer import Tokenizer, load_tokenizer

CONFIG, ADAPTER = "adapter_config.json", "adapter.safetensors"
# All files of an adapter and of its training, here and in the package `peft`.
ADAPTER_FILES = (CONFIG, ADAPTER, "training_state.safetensors", WEIGHTS, "adapter_model.bin")


def has_adapter(directory: str | Path) -> bool:
    """Return whether the directory contains any file of an adapter, so that a run must not write there."""
    return any(os.path.lexists(Path(directory) / name) for name in ADAPTER_FILES)


def save_adapter_config(out: Path, base: str, adapter: AdapterConfig, chat_format: str = "auto") -> None:
    out.mkdir(parents=True, exist_ok=True)
    description = {
        "name": Path(base).resolve().name,
        "model": dataclasses.asdict(read_model_config(base)),
        "fingerprint": checkpoint_hash(base),
    }
    content = {"base": description, "adapter": dataclasses.asdict(adapter), "chat_format": chat_format}
    write_json(out / CONFIG, content)


def read_adapter_config(directory: Path, base: str | Path) -> AdapterConfig:
    """Raises FileNotFoundError, or ValueError if the adapter is damaged or belongs to another base."""
    path = directory / CONFIG
    content, present = read_object(path), dataclasses.asdict(read_model_config(base))
    try:
        adapter = from_json(AdapterConfig, content["adapter"])
        name, model, expected = (content["base"][key] for key in ("name", "model", "fingerprint"))
        trained_on = [(key, model[key], value) for key, value in present.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no adapter configuration ({error})") from None
    for key, before, now in trained_on:
        if before != now:
            raise UserError(
                f"{path}: the adapter was trained on {name!r} with {key} {before!r:.60}, {base} has {now!r}"
            )
    if (found := checkpoint_hash(base)) != expected:
        raise UserError(
            f"{path}: the adapter was trained on {name!r} (fingerprint {str(expected)[:12]}), "
            f"{base} has the same shape and other weights (fingerprint {found[:12]})"
        )
    return adapter


def load_adapted_model(
    base: str | Path,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Model:
    """The base with its trained experts, or with a plain LoRA of the package `peft`, in eval mode.

    Raises FileNotFoundError or ValueError.
    """
    directory = Path(directory)
    if is_peft(directory):
        check_peft_base(directory, base)
        model = load_model(base, dtype, device, read_peft_config(directory))
        load_into(adapter_state(model), directory / WEIGHTS, our_name)
    else:
        model = load_model(base, dtype, device, read_adapter_config(directory, base))
        load_into(adapter_state(model), directory / ADAPTER)
    return model


def check_peft_base(directory: Path, base: str | Path) -> None:
    """Raises ValueError if an adapter that was exported here belongs to another base; others do not say."""
    _, metadata = read_header(directory / WEIGHTS)
    if metadata.get("base_fingerprint", found := checkpoint_hash(base)) != found:
        raise UserError(f"{directory / WEIGHTS}: the adapter was trained on another model than {base}")


def load_into(state: dict[str, Tensor], path: Path, our_name: Callable[[str], str] | None = None) -> None:
    """Copies a file's tensors into those given, which must be the same by name, shape and dtype.

    With `our_name` it is a file of another program: it has names and a precision of its own.
    """
    rename = our_name or (lambda name: name)
    stored = read_header(path)[0]
    names = [rename(name) for name in stored]
    entries = dict(zip(names, stored.values(), strict=True))
    if len(entries) < len(names):
        raise UserError(f"{path}: {max(names, key=names.count)} stands twice, under different names")
    if different := set(entries) ^ set(state):
        raise UserError(f"{path}: {len(different)} tensors are missing or unexpected: {min(different)}")
    for name, entry in entries.items():
        wanted = state[name]
        same = entry.dtype == wanted.dtype or (our_name and entry.dtype.is_floating_point)
        if entry.shape != tuple(wanted.shape) or not same:
            raise UserError(
                f"{path}: {name} is {entry.dtype} {entry.shape}, expected {wanted.dtype} {tuple(wanted.shape)}"
            )
    with torch.no_grad():
        for name, tensor in read_tensors(path):
            state[rename(name)].copy_(tensor)


def load(
    base: str,
    adapter: str | None,
    dtype: torch.dtype,
    device: torch.device,
    chat_format: str = "auto",
    chats: bool = True,
) -> tuple[Model, Tokenizer]:
    """What the programs ask: a base, with a trained adapter or alone, and its tokenizer.

    An adapter is asked in the chat format it was trained in. Raises FileNotFoundError or ValueError, also where no
    chat format is known, unless `chats` is False.
    """
    if adapter and chat_format == "auto":
        chat_format = trained_format(Path(adapter))
    tokenizer = load_tokenizer(base, chat_format)
    if chats and not tokenizer.format:  # said before gigabytes are read
        raise UserError(tokenizer.note)
    model = load_adapted_model(base, adapter, dtype, device) if adapter else load_model(base, dtype, device)
    check_vocabulary(base, model, tokenizer)
    return model, tokenizer


def trained_format(adapter: Path) -> str:
    """The chat format that an adapter was trained in; "auto" if it does not say."""
    told = read_header(adapter / WEIGHTS)[1] if is_peft(adapter) else read_object(adapter / CONFIG)
    return str(told.get("chat_format", "auto"))


def check_vocabulary(base: str, model: Model, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer has tokens that the model has no row for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}")
