"""Peak memory, each implementation in a separate process, on Linux.

On a CPU it is the peak of the process's resident memory, on a GPU that of PyTorch's allocations. Building the model
is not included.
"""

import ctypes
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from minidoctor.config import UserError

CLEAR_PEAK = Path("/proc/self/clear_refs")
Build = Callable[[], Callable[[], Any]]  # returns the call whose memory is measured


def peak_memory(builds: Mapping[str, Build], n_calls: int) -> dict[str, list[float]]:
    """Return the peak memory until each call in GiB, by implementation, or nothing on a system other than Linux.

    The builds are sent to the processes, so they must be functions of a module or partials of them.
    """
    if not CLEAR_PEAK.exists():
        return {}
    peaks: dict[str, list[float]] = {}
    for name, build in builds.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                peaks[name] = pool.submit(measure_peaks, build, n_calls, torch.get_num_threads()).result()
            except BrokenProcessPool:
                raise UserError(f"{name}: process killed, perhaps for lack of memory; use a smaller batch") from None
    return peaks


def measure_peaks(build: Build, n_calls: int, n_threads: int) -> list[float]:
    torch.set_num_threads(n_threads)
    call = build()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, such as weights before their quantization
        CLEAR_PEAK.write_text("5")  # proc(5): resets the peak to the current value
    peaks = []
    for _ in range(n_calls):
        call()
        peaks.append(peak_gib())
    return peaks


def peak_gib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
