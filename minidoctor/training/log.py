"""The log of a run: a row of metrics.jsonl per step, and a printed line every few steps."""

import json
import math
import resource
import sys
from pathlib import Path

import torch

from minidoctor.config import UserError
from minidoctor.files.json_files import write_atomically
from minidoctor.step import StepMetrics

METRICS = "metrics.jsonl"
ExpertLoad = tuple[tuple[float, ...], ...]  # (L, E), share of the anchors whose top-1 each expert is


def step_of(line: bytes) -> float:
    """Return the step of a row, infinity if the row is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class MetricsLog:
    """Collects the tensors of each step until `flush`, because reading them synchronizes the CPU with the GPU."""

    def __init__(self, out: Path, step: int):
        self.path = out / METRICS
        self.pending: list[tuple[int, StepMetrics, float]] = []
        lines = self.path.read_bytes().splitlines(keepends=True) if step and self.path.is_file() else []
        # A crash can leave rows of steps that were not saved, the last one incomplete: they will be written again.
        lines = [line for line in lines if line.endswith(b"\n") and step_of(line) < step]
        if len(lines) < step:
            print(f"{self.path}: contains {len(lines)} of the {step} steps done so far")
        write_atomically(self.path, *lines)

    def add(self, step: int, metrics: StepMetrics, seconds: float) -> None:
        self.pending.append((step, metrics, seconds))

    def flush(self) -> tuple[str, ExpertLoad]:
        """Write the pending steps. Return a line that summarizes them and their mean expert load.

        Raises UserError at the first step with a non-finite loss or gradient; the steps before it are written.
        """
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
        load = torch.stack([metrics.expert_load for _, metrics, _ in self.pending]).mean(0)  # (L, E)
        expert_load = tuple(tuple(round(share, 4) for share in sublayer) for sublayer in load.tolist())
        lines = [json.dumps(row) for row in rows]
        if expert_load and not failure:
            lines[-1] = json.dumps({**rows[-1], "expert_load": expert_load})  # the mean since the last printed line
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        if failure:
            raise UserError(failure)
        self.pending.clear()
        return format_line(rows, expert_load), expert_load


def format_line(rows: list[dict[str, float]], expert_load: ExpertLoad) -> str:
    """Return mean losses, queue fill, speed, peak memory, and the range of the experts' load as one line."""
    last = rows[-1]
    names = [name for name in ("loss", "lm", "balance", "contrast") if name in last]
    parts = [f"step {last['step'] + 1:5d}", *(f"{name} {sum(r[name] for r in rows) / len(rows):.3f}" for name in names)]
    if "queue_fill" in last:
        parts.append(f"queue {100 * last['queue_fill']:.0f} % full")
    speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    parts += [f"lr {last['lr']:.1e}", f"{speed:,.0f} tok/s", f"{peak_memory_gib():.2f} GiB"]
    if shares := [100 * share for sublayer in expert_load for share in sublayer]:
        uniform = 100 / len(expert_load[0])
        parts.append(f"top-1 load {min(shares):.0f} % to {max(shares):.0f} % (uniform {uniform:.3g} %)")
    return "  ".join(parts)


def peak_memory_gib() -> float:
    """Return the peak memory of this process: on the GPU if it was used, else in total."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
