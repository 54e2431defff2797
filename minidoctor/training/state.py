"""Save and restore what was trained.

    adapter_config.json      the experts' configuration, the base they belong to, the chat format; written first
    adapter.safetensors      experts and routers
    training_state.safetensors   the same, with optimizer, queue, step and run: all that `--resume` needs

The training state is one file, renamed into place, so that a run killed at any moment finds weights, optimizer and
queue of the same step. No random state is stored: what a step draws is a function of the seed and the step.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidoctor.checkpoints.adapters import ADAPTER, load_into, read_adapter_config
from minidoctor.config import AdapterConfig, TrainConfig, UserError
from minidoctor.expert_queue import ExpertQueue
from minidoctor.files.json_files import from_json
from minidoctor.files.safetensors import read_header, write_tensors
from minidoctor.model import Model, adapter_state, trainable_parameters

STATE = "training_state.safetensors"


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, per parameter


def training_tensors(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, queue: ExpertQueue | None
) -> dict[str, Tensor]:
    """Return all tensors that training changes, by a unique name. The tensors themselves, not copies."""
    tensors = dict(parameters)
    state = optimizer.state_dict()["state"]  # by the parameter's index; empty before the first step
    for i, name in enumerate(parameters):
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.get(i, {}).items()}
    if queue:
        tensors |= {f"queue.{name}": buffer for name, buffer in queue.state_dict().items()}
    return tensors


def load_training_tensors(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, queue: ExpertQueue | None, step: int
) -> None:
    """Copy a saved training state into parameters, optimizer and queue. Raises UserError if it does not fit."""
    state: dict[int, dict[str, Tensor]] = {}
    if step:
        for i, p in enumerate(parameters.values()):
            state[i] = {key: torch.zeros(()) if key == "step" else torch.zeros_like(p) for key in MOMENTS}
    tensors = training_tensors(parameters, optimizer, queue)
    for i, name in enumerate(parameters):
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.get(i, {}).items()}
    load_into(tensors, path)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_training_state(out: Path, tensors: dict[str, Tensor], run: dict[str, Any]) -> None:
    """`run` is what JSON can hold: step, configuration, figures so far."""
    write_tensors(out / STATE, tensors, {"run": json.dumps(run)})


def read_state(out: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if there is nothing to resume, ValueError if it is damaged."""
    path = out / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{out}: nothing to resume, there is no {STATE}")
    _, metadata = read_header(path)
    try:
        run = json.loads(metadata["run"])
        if missing := {"step", "seconds", "tokens", "load", "eval_before", "data"} - set(run):
            raise UserError(f"no {min(missing)}")
        return run | {
            "config": from_json(TrainConfig, run["config"]),
            "adapter": from_json(AdapterConfig, run["adapter"]),
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no training state ({error!r:.80})") from None


def save(
    out: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    queue: ExpertQueue | None,
    state: dict[str, Any],
) -> None:
    run = state | {name: dataclasses.asdict(state[name]) for name in ("config", "adapter")}
    save_training_state(out, training_tensors(trainable_parameters(model), optimizer, queue), run)
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
        raise UserError(
            f"{state['config'].data} or {state['config'].eval} has changed since the run in {out} was started"
        )
    load_training_tensors(out / STATE, trainable_parameters(model), optimizer, queue, state["step"])
