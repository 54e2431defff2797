import pytest
import torch
import torch.distributed as dist

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
