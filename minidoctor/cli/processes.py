"""The processes of one run: those that `torchrun` started, or a single one that communicates with nobody."""

import atexit
import os
import shlex
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minidoctor.config import UserError


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    size: int = 1
    restarts: int = 0  # how often torchrun has started all of them again after a failure

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place. All have one dtype and travel as one tensor."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, condition: bool) -> bool:
        """Return whether the condition holds in any process. With a tensor on the CPU, so that no GPU is waited for."""
        if self.size > 1:
            count = torch.tensor(int(condition))
            dist.all_reduce(count)
            condition = bool(count)
        return condition

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank. Also a barrier."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def launch_command(words: list[str], n_processes: int) -> str:
    """Return the shell command that starts a Python program on this machine, in several processes with torchrun."""
    launcher = ["python"] if n_processes == 1 else ["torchrun", "--nproc-per-node", str(n_processes)]
    return shlex.join([*launcher, *words])


def start_processes(device_name: str) -> Processes:
    """Join the processes that torchrun started. All but the first print nothing. Raises UserError."""
    if not dist.is_torchelastic_launched():
        return Processes()
    uses_gpu = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    if uses_gpu:
        local_rank, n_gpus = dist.get_node_local_rank(), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(f"process {local_rank} of this machine has no GPU ({n_gpus} found); lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives the processes: without a prefix, restarted ones find the addresses of the dead.
    store = dist.PrefixStore(f"restart-{restarts}", store)
    # gloo exchanges flags on the CPU, so that no GPU is waited for.
    backend = "cpu:gloo,cuda:nccl" if uses_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # Otherwise the threads of gloo abort one finished program in four: "terminate called without an active exception".
    atexit.register(dist.destroy_process_group)
    processes = Processes(rank, size, restarts)
    if not processes.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    return processes
