"""Save and restore what a run has computed.

    adapter_config.json             configuration of the experts, hash of their base, chat format
    adapter.safetensors             experts and routers
    training_questions.safetensors  hashes of the questions that are learned, for evaluations of the adapter
    training_state.safetensors      experts, routers, optimizer, queue and the run's record: all that --resume needs

The training state is one file that is renamed into place. A run that is killed at any moment therefore finds
parameters, optimizer and queue of the same step. No random state is saved: the draws of a step are a function of the
seed and the step.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.checkpoints.adapters import ADAPTER, load_into
from minidoctor.config import AdapterConfig, TrainConfig, UserError
from minidoctor.evaluate.summary import Summary
from minidoctor.expert_queue import ExpertQueue
from minidoctor.files.json_files import from_json
from minidoctor.files.safetensors import read_header, write_tensors
from minidoctor.model import Model, adapter_state, trainable_parameters
from minidoctor.training.log import ExpertLoad

STATE = "training_state.safetensors"


@dataclass
class RunState:
    """The record of a run. It is stored as JSON in the metadata of the training state."""

    config: TrainConfig
    adapter: AdapterConfig
    step: int = 0  # steps done
    seconds: float = 0.0  # spent in them
    tokens: int = 0  # processed in them, without padding
    expert_load: ExpertLoad = ()  # mean over the steps of the last printed line
    eval_before: Summary | None = None
    input_hashes: dict[str, str] = field(default_factory=dict)  # of base, data and eval; empty before the first save
    directory: str = field(default_factory=os.getcwd)  # of the program; relative paths of `config` belong to it


class Components(NamedTuple):
    """The objects that a training step changes."""

    model: Model
    optimizer: torch.optim.Optimizer
    queue: ExpertQueue | None


def state_tensors(components: Components, moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a training state by name, without copying. `moments` is AdamW's state by parameter."""
    parameters = trainable_parameters(components.model)
    tensors = adapter_state(components.model)
    for i, name in enumerate(parameters):
        tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.get(i, {}).items()}
    if components.queue:
        tensors |= {f"queue.{name}": buffer for name, buffer in components.queue.state_dict().items()}
    return tensors


def save(components: Components, state: RunState) -> None:
    """Write the training state, then the adapter. Raises OSError."""
    out = Path(state.config.out)
    tensors = state_tensors(components, components.optimizer.state_dict()["state"])
    write_tensors(out / STATE, tensors, {"run": json.dumps(dataclasses.asdict(state))})
    write_tensors(out / ADAPTER, adapter_state(components.model), {"format": "pt"})


def restore(components: Components, state: RunState) -> None:
    """Copy the saved tensors into model, optimizer and queue. Raises UserError if they do not fit."""
    moments = {}
    for i, p in enumerate(trainable_parameters(components.model).values()):
        if state.step:  # before the first step AdamW has no state
            zeros = torch.zeros_like(p)
            moments[i] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    load_into(state_tensors(components, moments), Path(state.config.out) / STATE)
    groups = components.optimizer.state_dict()["param_groups"]
    components.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def read_state(out: Path) -> RunState:
    """Read the record of a saved run. Raises FileNotFoundError if there is none, UserError if it is damaged."""
    path = out / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{out}: no run to resume, {STATE} is missing")
    _, metadata = read_header(path)
    try:
        run = json.loads(metadata["run"])
        run["adapter"] = {"n_groups": 1} | run[
            "adapter"
        ]  # runs without the field were started before there were groups
        state: RunState = from_json(RunState, run)
        return state
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a training state of this version ({error!r:.80})") from None
