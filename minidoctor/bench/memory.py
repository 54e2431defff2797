"""Peak memory of training steps, each implementation in a separate process, on Linux.

On a CPU it is the peak of the process's resident memory, on a GPU that of PyTorch's allocations. Building the model
is not included.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch

from minidoctor.bench import baselines
from minidoctor.bench.implementations import make_base, make_step, random_batch
from minidoctor.bench.options import BenchConfig
from minidoctor.bench.timing import Result, ratio
from minidoctor.config import UserError, check

CLEAR_PEAK = Path("/proc/self/clear_refs")


def bench_memory(config: BenchConfig) -> Result:
    """Measure the peak memory of each implementation once. It hardly varies, so the ratio is that of a single round."""
    check(CLEAR_PEAK.exists(), "the peak memory of a process is measured on Linux only")
    names = ["minidoctor", *["peft"] * baselines.installed("transformers", "peft")]
    peaks: dict[str, tuple[float, float]] = {}
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                peaks[name] = pool.submit(measure_peaks, name, config).result()
            except BrokenProcessPool:
                raise UserError(f"{name}: process killed, perhaps for lack of memory; lower --batch-size") from None
    return {
        "peak_gib": {name: peak for name, (peak, _) in peaks.items()},
        "peak_gib_after_steps": {name: last for name, (_, last) in peaks.items()},
        "ratio_to_peft": ratio([peaks["minidoctor"][0]], [peaks["peft"][0]] if "peft" in peaks else None),
    }


def measure_peaks(name: str, config: BenchConfig) -> tuple[float, float]:
    """Return the peak memory of the first three training steps and of all, in GiB."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    base, plain_lora = make_base(config), replace(config.experts, n_experts=1, top_k=1)
    batch = random_batch(base.config.vocab_size, config.batch_size, config.seq_len)
    if name == "peft":
        step = baselines.make_step(*baselines.peft_lora(base, plain_lora), config.train)
    else:
        step = make_step(base, config.experts, config.train)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_PEAK.write_text("5")  # proc(5): resets the peak to the current value
    peaks = []
    for _ in range(config.steps):
        step(batch)
        peaks.append(peak_gib())
    return peaks[2], peaks[-1]


def peak_gib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
