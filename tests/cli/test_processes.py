import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from paths import ROOT

from minidoctor.cli.processes import Processes, start_processes
from minidoctor.config import UserError


def test_program_without_torchrun_is_one_process():
    processes = start_processes("cpu")
    assert processes == Processes(rank=0, size=1, restarts=0)
    assert processes.is_first
    assert processes.gather("value") == ["value"]
    assert [processes.any(condition) for condition in (True, False)] == [True, False]


def test_process_without_a_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "get_node_local_rank", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"process 2 .*2 found.*--nproc-per-node"):
        start_processes("cuda")


def test_process_leaves_the_group_when_it_ends(tmp_path):
    """Otherwise gloo's threads abort the process in some runs, and torchrun reports a failure of a finished run."""
    program = """
        import atexit, sys, torch.distributed as dist
        atexit.register(lambda: print("in a group:", dist.is_initialized()))  # runs after those registered later
        from minidoctor.cli.processes import start_processes
        print(start_processes("cpu"), dist.is_initialized())
        sys.exit(3)
    """
    (tmp_path / "program.py").write_text("if True:" + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone"]
    run = subprocess.run(
        [*command, tmp_path / "program.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Processes(rank=0, size=1, restarts=0) True\nin a group: False\n" in run.stdout
    assert "exitcode  : 3" in run.stderr
