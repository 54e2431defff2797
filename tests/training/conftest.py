"""Runs of a tiny model, and runs that a signal stops."""

import contextlib
import json
import signal
from pathlib import Path

import pytest

from minidoctor.checkpoints.adapters import ADAPTER
from minidoctor.files.safetensors import read_tensors
from minidoctor.training.log import METRICS, MetricsLog
from minidoctor.training.run import train
from minidoctor.training.state import STATE, RunState


@pytest.fixture
def train_run(make_config, adapter):
    """Train with these changes of the tiny configuration and return the output directory."""

    def train_run(**changes):
        config = make_config(**changes)
        train(RunState(config, adapter))
        return Path(config.out)

    return train_run


@pytest.fixture
def signal_in_step(monkeypatch):
    """Send a signal to this process in a step of the runs within the context."""

    @contextlib.contextmanager
    def signal_in_step(step, number=signal.SIGINT):
        add = MetricsLog.add

        def add_and_signal(log, current, metrics, seconds):
            add(log, current, metrics, seconds)
            if current == step:
                signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "add", add_and_signal)
            yield

    return signal_in_step


@pytest.fixture
def read_run():
    """Return everything that a run saves except its duration: adapter, training state and metrics."""

    def read_run(out):
        rows = [json.loads(line) | {"seconds": 0} for line in (out / METRICS).read_text().splitlines()]
        tensors = {name: tensor.tolist() for name, tensor in read_tensors(out / STATE)}
        return (out / ADAPTER).read_bytes(), tensors, rows

    return read_run
