"""What a training run tells: metrics.jsonl, the line that people read, peak memory, and how it is asked to stop."""

import json
import math
import resource
import signal
import sys
from pathlib import Path

import torch

from minidoctor.files.json_files import write_atomically
from minidoctor.step import StepMetrics


class MetricsLog:
    """`metrics.jsonl`, a row a step, and the line that people read.

    Steps are kept as tensors until `flush`, so that logging does not hold up the GPU at every step.
    """

    def __init__(self, out: Path, step: int):
        self.path = out / "metrics.jsonl"
        self.waiting: list[tuple[int, StepMetrics, float]] = []
        # After a crash the file may be ahead of the saved state: those steps will be written again.
        kept = self.path.read_bytes().splitlines(keepends=True)[:step] if step else []
        write_atomically(self.path, *kept)

    def add(self, step: int, figures: StepMetrics, seconds: float) -> None:
        self.waiting.append((step, figures, seconds))

    def flush(self) -> tuple[str, list[list[float]]]:
        """Writes what waits; returns the line of the last step and the mean expert load (L, E) since the last.

        Raises FloatingPointError at the first step whose loss or gradient is not finite; those before it are written.
        """
        rows, failure = [], None
        for step, figures, seconds in self.waiting:
            row = {"step": step, **{name: loss.item() for name, loss in figures.losses.items()}}
            row |= {"grad_norm": figures.grad_norm.item(), "lr": figures.lr}
            row |= {"tokens": figures.n_tokens, "seconds": seconds}
            if bad := [name for name, value in row.items() if not math.isfinite(value)]:
                values = ", ".join(f"{name} {row[name]:.4g}" for name in figures.losses)
                failure = f"step {step}: {', '.join(bad)} not finite ({values}); try a lower --lr"
                break
            rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if failure:
            raise FloatingPointError(failure)
        load = torch.stack([figures.expert_load for _, figures, _ in self.waiting]).mean(0)
        self.waiting.clear()
        names = [name for name in ("loss", "lm", "balance", "contrast") if name in rows[-1]]
        parts = [f"{name} {sum(row[name] for row in rows) / len(rows):.3f}" for name in names]
        speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
        parts += [f"lr {rows[-1]['lr']:.1e}", f"{speed:,.0f} tok/s", f"{peak_memory_gib():.2f} GiB"]
        if load.numel():
            parts.append(f"load {load.min():.0%}-{load.max():.0%} of {1 / load.shape[1]:.0%}")
        return f"step {rows[-1]['step'] + 1:5d}  " + "  ".join(parts), load.tolist()


def peak_memory_gib() -> float:
    """The most memory this process has held: on the GPU if there is one, else in all."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Stop:
    """Ctrl-C, or a polite kill, asks to stop after the running step; a second one stops at once."""

    asked = False

    def __enter__(self) -> "Stop":
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
