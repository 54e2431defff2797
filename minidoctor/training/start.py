"""The start of a run in its output directory: a new one or the continuation of a saved one, and never two at once."""

import contextlib
import dataclasses
import fcntl
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidoctor.checkpoints.adapters import has_adapter
from minidoctor.cli.flags import from_flags
from minidoctor.config import AdapterConfig, TrainConfig, UserError, check
from minidoctor.training.log import METRICS
from minidoctor.training.report import REPORT
from minidoctor.training.state import QUESTIONS, STATE, RunState, read_state

LOCK = "training.lock"
INPUTS = ("base", "data", "eval")  # paths; a resumed run compares the content of the files


@contextlib.contextmanager
def lock_directory(out: Path) -> Iterator[None]:
    """Create the directory and keep other runs out. Raises UserError if one is active there.

    The operating system releases the lock when the process ends, also after a crash.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is active here; wait for it or choose another --out") from None
        try:
            yield
        finally:
            if os.listdir(out) == [LOCK]:  # nothing was saved
                (out / LOCK).unlink()
                if is_new:
                    out.rmdir()


def start_or_resume(flags: dict[str, Any]) -> RunState:
    """Return the state of a new run, or with `resume` that of the run in `out`.

    Raises FileNotFoundError if there is nothing to resume, UserError if something would be overwritten.
    """
    if flags.get("resume"):
        return resume(flags)
    state = RunState(from_flags(TrainConfig, flags), from_flags(AdapterConfig, flags))
    out = Path(state.config.out)
    if (out / STATE).is_file():
        saved = read_state(out)
        if not saved.step and not saved.eval_before:
            return state  # interrupted before anything was computed
    if has_adapter(out) or any(os.path.lexists(out / name) for name in (STATE, QUESTIONS, METRICS, REPORT)):
        raise UserError(f"{out}: already contains a run or an adapter; use --resume or another --out")
    return state


def resume(flags: dict[str, Any]) -> RunState:
    """Return the saved state with the flags that may change. Raises UserError if another flag differs."""
    out = flags.get("out", TrainConfig.out)
    state = read_state(Path(out))
    # A saved path belongs to the directory in which the run was started.
    saved = {name: getattr(state.config, name) for name in INPUTS}
    paths = {name: os.path.join(state.directory, path) if path else "" for name, path in saved.items()}
    changes: dict[str, Any] = {name: path if os.path.exists(path) else saved[name] for name, path in paths.items()}
    changes |= {name: flags[name] for name in ("accumulate", "recompute", *INPUTS) if name in flags}
    changes |= {"out": out, "resume": True, "compile": flags.get("compile", False)}
    state.config, state.directory = dataclasses.replace(state.config, **changes), os.getcwd()
    settings = dataclasses.asdict(state.config) | dataclasses.asdict(state.adapter)
    for name, value in flags.items():
        check(settings[name] == value, f"--resume: {name} is {value}, the run in {out} has {settings[name]}")
    return state


def check_inputs(state: RunState, hashes: dict[str, str]) -> None:
    """Raise UserError unless base, training and evaluation data have the content that the run was started with."""
    for name in INPUTS:
        check(
            state.input_hashes.get(name) == hashes[name],
            f"--resume: {getattr(state.config, name) or '(none)'} is not the --{name} with which the run in "
            f"{state.config.out} was started; pass the path of the original as --{name}",
        )


def resume_command(out: str) -> str:
    return shlex.join(["python", "train.py", "--out", out, "--resume"])
