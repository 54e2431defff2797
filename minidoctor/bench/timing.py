"""Alternating measurement: every implementation runs once per round, and ratios are taken within a round.

Shared machines slow down and recover within seconds, so times of two separate processes cannot be compared.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ratio:
    median: float
    least: float
    greatest: float


Rounds = dict[str, list[float]]  # a value per round, by implementation
Result = dict[
    str, float | str | dict[str, float] | Ratio | dict[str, Ratio | None] | None
]  # the values by their key in the output


def ratio(a: list[float], b: list[float] | None) -> Ratio | None:
    """Return a / b, divided round by round, or None without b: the baseline is not installed."""
    quotients = [x / y for x, y in zip(a, b, strict=True)] if b else []
    return Ratio(statistics.median(quotients), min(quotients), max(quotients)) if quotients else None


def medians(rounds: Rounds) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in rounds.items()}


def alternate(
    calls: Mapping[str, Callable[[], Any]], counts: Mapping[str, float], n_rounds: int, device: torch.device
) -> Rounds:
    """Return the count of each call, such as its tokens, per second in each round, after a warm-up round."""
    rates: Rounds = {name: [] for name in calls}
    for round_number in range(n_rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if round_number:
                rates[name].append(counts[name] / (time.perf_counter() - start))
    return rates
