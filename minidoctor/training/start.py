"""The start of a run in its output directory: a new one or the continuation of a saved one, and never two at once."""

import dataclasses
import fcntl
import os
from pathlib import Path
from typing import Any, TextIO

from minidoctor.checkpoints.adapters import has_adapter
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.cli.flags import from_flags
from minidoctor.cli.processes import Processes, launch_command
from minidoctor.config import AdapterConfig, TrainConfig, UserError, check
from minidoctor.evaluate.inputs import TRAINING_QUESTIONS
from minidoctor.training.data import hash_files
from minidoctor.training.log import METRICS
from minidoctor.training.report import REPORT
from minidoctor.training.state import STATE, RunState, read_state

AUTOMATIC = {"dtype": "auto", "n_groups": 0}  # values that are resolved at the start of a run
INPUTS = ("base", "data", "eval")  # paths; a resumed run compares the content of the files


def lock_directory(out: Path, processes: Processes = Processes()) -> TextIO:  # noqa: B008  # frozen
    """Create the directory and keep other runs out until the returned file is closed, at the latest with the process.

    The first process locks it for all.

    Raises UserError if another run is active there.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "training.lock").open("w")
    if not processes.is_first:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another run is active here; choose another --out") from None
    return file


def start_or_resume(flags: dict[str, Any], processes: Processes = Processes()) -> RunState:  # noqa: B008  # frozen
    """Return the state of a new run, or with `resume` that of the run in `out`.

    Processes that torchrun has restarted resume their run without the flag.

    Raises FileNotFoundError if there is nothing to resume, UserError if something would be overwritten.
    """
    restarted = processes.restarts > 0 and (Path(flags.get("out", TrainConfig.out)) / STATE).is_file()
    processes.gather(None)  # nobody may write before all have looked
    if flags.get("resume") or restarted:
        return resume(flags | {"resume": True})
    state = RunState(from_flags(TrainConfig, flags), from_flags(AdapterConfig, flags))
    out = Path(state.config.out)
    if (out / STATE).is_file():
        saved = read_state(out)
        if not saved.step and not saved.eval_before:
            return state  # interrupted before a step was saved
    if has_adapter(out) or any(os.path.lexists(out / name) for name in (TRAINING_QUESTIONS, METRICS, REPORT)):
        raise UserError(f"{out}: already contains a run or an adapter; use --resume or another --out")
    return state


def resume(flags: dict[str, Any]) -> RunState:
    """Return the saved state with the flags that may change. Raises UserError if another flag differs."""
    out = flags.get("out", TrainConfig.out)
    state = read_state(Path(out))
    changes = {name: flags[name] for name in ("accumulate", "recompute", "shard", *INPUTS) if name in flags}
    changes |= {"out": out, "resume": True, "compile": flags.get("compile", False)}
    for name in INPUTS:  # a saved path belongs to the directory in which the run was started
        path = getattr(state.config, name)
        original = os.path.join(state.directory, path) if path else ""
        changes.setdefault(name, original if os.path.exists(original) else path)
    state.config, state.directory = dataclasses.replace(state.config, **changes), os.getcwd()
    settings = dataclasses.asdict(state.config) | dataclasses.asdict(state.adapter)
    for name, value in flags.items():
        same = settings[name] == value or AUTOMATIC.get(name) == value
        check(same, f"--resume: {name} is {value}, the run in {out} has {settings[name]}")
    return state


def hash_inputs(state: RunState) -> None:
    """Store the hashes of base, training and evaluation data. Raises UserError if a resumed run has other ones."""
    config, saved = state.config, state.input_hashes
    state.input_hashes = {"base": checkpoint_hash(config.base), "data": hash_files(config.data)}
    state.input_hashes["eval"] = hash_files(config.eval) if config.eval else ""
    for name in saved:
        check(
            saved[name] == state.input_hashes.get(name),
            f"--resume: {getattr(config, name) or '(none)'} is not the --{name} with which the run in {config.out} was "
            f"started; pass the path of the original as --{name}",
        )


def resume_command(config: TrainConfig, n_processes: int) -> str:
    words = ["train.py", "--out", config.out, "--resume", *["--compile"] * config.compile]
    return launch_command(words, n_processes)
