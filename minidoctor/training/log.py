"""The log of a run: a row of metrics.jsonl per step, and a printed line every few steps."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.config import UserError
from minidoctor.files.json_files import write_atomically
from minidoctor.step import StepMetrics

METRICS = "metrics.jsonl"


class LogEntry(NamedTuple):
    """Summary of the steps since the previous entry."""

    line: str
    expert_load: tuple[tuple[float, ...], ...]  # (L, E), mean over the steps


class MetricsLog:
    """Collects the tensors of each step until `flush`, because reading them synchronizes the CPU with the GPU."""

    def __init__(self, out: Path, step: int):
        self.path = out / METRICS
        self.pending: list[tuple[int, StepMetrics, float]] = []
        lines = self.path.read_bytes().splitlines(keepends=True) if step and self.path.is_file() else []
        # After a crash the file can be ahead of the saved state: those steps will be written again.
        lines = [line for line in lines if 0 <= step_number(line) < step]
        if len(lines) < step:
            print(f"{self.path}: contains {len(lines)} of the {step} steps done so far")
        write_atomically(self.path, *lines)

    def add(self, step: int, metrics: StepMetrics, seconds: float) -> None:
        self.pending.append((step, metrics, seconds))

    def flush(self) -> LogEntry:
        """Write the pending steps. Raises UserError at the first non-finite one, after writing those before it."""
        rows, failure = [], ""
        for step, metrics, seconds in self.pending:
            row = {"step": step, **{name: loss.item() for name, loss in metrics.losses.items()}}
            row |= {"grad_norm": metrics.grad_norm.item(), "lr": metrics.lr}
            if metrics.queue_fill is not None:
                row["queue_fill"] = metrics.queue_fill.item()
            row |= {"tokens": metrics.n_tokens, "seconds": seconds}
            if names := [name for name, value in row.items() if not math.isfinite(value)]:
                values = ", ".join(f"{name} {row[name]:.4g}" for name in metrics.losses)
                # The first step's loss and gradient precede every update.
                advice = "try a lower --lr" if step else "--lr is not the cause, try --dtype float32"
                failure = f"step {step}: {', '.join(names)} not finite ({values}); {advice}"
                break
            rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if failure:
            raise UserError(failure)
        load = torch.stack([metrics.expert_load for _, metrics, _ in self.pending]).mean(0)  # (L, E)
        self.pending.clear()
        return LogEntry(format_line(rows, load), tuple(map(tuple, load.tolist())))


def step_number(line: bytes) -> int:
    """Return the step of a row of metrics.jsonl, or -1 for a line that a crash left incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def format_line(rows: list[dict[str, float]], load: Tensor) -> str:
    """Return mean losses, queue fill, speed, peak memory, and the range of the top-1 load (L, E) for people."""
    last = rows[-1]
    names = [name for name in ("loss", "lm", "balance", "contrast") if name in last]
    parts = [f"step {last['step'] + 1:5d}"]
    parts += [f"{name} {sum(row[name] for row in rows) / len(rows):.3f}" for name in names]
    if "queue_fill" in last:
        parts.append(f"queue {100 * last['queue_fill']:.0f} % full")
    speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    parts += [f"lr {last['lr']:.1e}", f"{speed:,.0f} tok/s", f"{peak_memory_gib():.2f} GiB"]
    if load.numel():
        least, greatest = 100 * load.min().item(), 100 * load.max().item()
        parts.append(f"top-1 load {least:.0f} % to {greatest:.0f} % (uniform {100 / load.shape[1]:.3g} %)")
    return "  ".join(parts)


def peak_memory_gib() -> float:
    """Return the peak memory of this process: on the GPU if it was used, else in total."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
