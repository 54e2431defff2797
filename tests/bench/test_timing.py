from functools import partial

import torch

from minidoctor.bench import timing
from minidoctor.bench.timing import Ratio, alternate, ratio


def test_ratio_divides_within_rounds():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Ratio(median=2.0, least=1.0, greatest=3.0)
    assert ratio([2.0], None) is None


def test_alternate_runs_calls_in_turn_after_a_warm_up_round(monkeypatch):
    order, clock = [], iter(range(0, 1000, 2))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = {name: partial(order.append, name) for name in "ab"}
    rates = alternate(calls, {"a": 6, "b": 8}, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert rates == {"a": [3.0, 3.0], "b": [4.0, 4.0]}  # 2 seconds per call
