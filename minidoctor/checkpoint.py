"""Save and restore what was trained.

    adapter_config.json      the experts' configuration, the base they belong to, the chat format; written first
    adapter.safetensors      experts and routers
    training_state.safetensors   the same, with optimizer, queue, step and run: all that `--resume` needs

The training state is one file, renamed into place, so that a run killed at any moment finds weights, optimizer and
queue of the same step. No random state is stored: what a step draws is a function of the seed and the step.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidoctor.config import AdapterConfig, TrainConfig, from_json
from minidoctor.expert_queue import ExpertQueue
from minidoctor.families import read_model_config
from minidoctor.files import read_header, read_object, read_tensors, write_json, write_tensors
from minidoctor.model import Model, adapter_state, trained_weights
from minidoctor.peft_layout import WEIGHTS, is_peft, our_name, read_peft_config
from minidoctor.tokenizer import Tokenizer, load_tokenizer
from minidoctor.weights import fingerprint, load_model

CONFIG, ADAPTER, STATE = "adapter_config.json", "adapter.safetensors", "training_state.safetensors"


def save_adapter_config(out: Path, base: str, adapter: AdapterConfig, chat_format: str = "auto") -> None:
    out.mkdir(parents=True, exist_ok=True)
    description = {
        "name": Path(base).resolve().name,
        "model": dataclasses.asdict(read_model_config(base)),
        "fingerprint": fingerprint(base),
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
        raise ValueError(f"{path}: no adapter configuration ({error})") from None
    for key, before, now in trained_on:
        if before != now:
            raise ValueError(
                f"{path}: the adapter was trained on {name!r} with {key} {before!r:.60}, {base} has {now!r}"
            )
    if (found := fingerprint(base)) != expected:
        raise ValueError(
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
    if metadata.get("base_fingerprint", found := fingerprint(base)) != found:
        raise ValueError(f"{directory / WEIGHTS}: the adapter was trained on another model than {base}")


def load_into(state: dict[str, Tensor], path: Path, our_name: Callable[[str], str] | None = None) -> None:
    """Copies a file's tensors into those given, which must be the same by name, shape and dtype.

    With `our_name` it is a file of another program: it has names and a precision of its own.
    """
    rename = our_name or (lambda name: name)
    stored = read_header(path)[0]
    names = [rename(name) for name in stored]
    entries = dict(zip(names, stored.values(), strict=True))
    if len(entries) < len(names):
        raise ValueError(f"{path}: {max(names, key=names.count)} stands twice, under different names")
    if different := set(entries) ^ set(state):
        raise ValueError(f"{path}: {len(different)} tensors are missing or unexpected: {min(different)}")
    for name, entry in entries.items():
        wanted = state[name]
        same = entry.dtype == wanted.dtype or (our_name and entry.dtype.is_floating_point)
        if entry.shape != tuple(wanted.shape) or not same:
            raise ValueError(
                f"{path}: {name} is {entry.dtype} {entry.shape}, expected {wanted.dtype} {tuple(wanted.shape)}"
            )
    with torch.no_grad():
        for name, tensor in read_tensors(path):
            state[rename(name)].copy_(tensor)


def training_tensors(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, queue: ExpertQueue | None
) -> dict[str, Tensor]:
    """All tensors that training changes, each under a name of its own; the tensors themselves, no copies."""
    tensors = dict(trained)
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    if queue:
        tensors |= {f"queue.{name}": buffer for name, buffer in queue.state_dict().items()}
    return tensors


def save_training_state(out: Path, tensors: dict[str, Tensor], run: dict[str, Any]) -> None:
    """`run` is what JSON can hold: step, configuration, figures so far."""
    write_tensors(out / STATE, tensors, {"run": json.dumps(run)})


def read_run(out: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if there is nothing to resume, ValueError if it is damaged."""
    path = out / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{out}: nothing to resume, there is no {STATE}")
    _, metadata = read_header(path)
    try:
        run = json.loads(metadata["run"])
        if missing := {"step", "seconds", "tokens", "load", "eval_before", "data"} - set(run):
            raise ValueError(f"no {min(missing)}")
        return run | {
            "config": from_json(TrainConfig, run["config"]),
            "adapter": from_json(AdapterConfig, run["adapter"]),
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no training state ({error!r:.80})") from None


def save(
    out: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    queue: ExpertQueue | None,
    state: dict[str, Any],
) -> None:
    run = state | {name: dataclasses.asdict(state[name]) for name in ("config", "adapter")}
    save_training_state(out, training_tensors(trained_weights(model), optimizer, queue), run)
    write_tensors(out / ADAPTER, adapter_state(model), {"format": "pt"})


def restore(
    out: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    queue: ExpertQueue | None,
    state: dict[str, Any],
    digest: str,
) -> None:
    """Raises ValueError if the base or the data is not what the run was started with."""
    read_adapter_config(out, state["config"].base)
    if state["data"] != digest:
        raise ValueError(
            f"{state['config'].data} or {state['config'].eval} has changed since the run in {out} was started"
        )
    load_into(training_tensors(trained_weights(model), optimizer, queue), out / STATE)


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
        raise ValueError(tokenizer.note)
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
        raise ValueError(
            f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
