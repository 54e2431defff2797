import torch

from minidoctor.bench.timing import Ratio, alternate, ratio


def test_ratio_divides_within_rounds():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Ratio(median=2.0, least=1.0, greatest=3.0)
    assert ratio([2.0], None) is None


def test_alternate_runs_calls_in_turn_after_a_warm_up_round():
    order = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]
