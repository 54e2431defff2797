"""Two results on the same questions, compared in pairs: difference, bootstrap interval and exact McNemar test."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidoctor.config import check
from minidoctor.evaluate.protocol import protocol_differences
from minidoctor.evaluate.records import Prediction, read_result
from minidoctor.evaluate.summary import RESAMPLES, Interval


class Comparison(NamedTuple):
    n: int
    accuracy_a: float
    accuracy_b: float
    interval: Interval  # of accuracy_b - accuracy_a
    only_a: int  # questions that only a answers correctly
    only_b: int
    p: float


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value: the probability of so uneven a split if a and b are equally good."""
    n = only_a + only_b
    tail = term = 1  # each binomial coefficient from the previous one: math.comb of 10,000 takes seconds in total
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def compare(a: list[Prediction], b: list[Prediction]) -> Comparison:
    """Compare the headlines on the multiple-choice questions or, if there are none, on the free-form questions.

    Raises UserError if the questions are not the same.
    """

    def identity(p: Prediction) -> tuple[str, str, str]:
        return p.id, p.question_sha256, "".join(sorted(p.answer)) if p.n_options else p.answer

    same = list(map(identity, a)) == list(map(identity, b))
    check(same, "the two results are not of the same questions in the same order")
    has_choice = any(p.n_options for p in a)
    pairs = [(p.correct, q.correct) for p, q in zip(a, b, strict=True) if p.n_options or not has_choice]
    counts = Counter(pair for pair in pairs if None not in pair)
    check(bool(counts), "the two results have no question in common whose answer is known")
    n, only_a, only_b = counts.total(), counts[True, False], counts[False, True]
    both = counts[True, True]
    draws = np.random.default_rng(0).multinomial(n, [only_a / n, only_b / n, (n - only_a - only_b) / n], RESAMPLES)
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, (0.025, 0.975))
    interval = float(low), float(high)
    return Comparison(n, (both + only_a) / n, (both + only_b) / n, interval, only_a, only_b, mcnemar(only_a, only_b))


def compare_files(path_a: str, path_b: str) -> str:
    """Compare two result files, as text. Raises FileNotFoundError or UserError."""
    a, b = read_result(Path(path_a)), read_result(Path(path_b))
    for path, result in ((path_a, a), (path_b, b)):
        check(result.complete, f"{path}: an unfinished evaluation, whose questions are no random sample; use --resume")
    c = compare(a.predictions, b.predictions)
    low, high = c.interval
    differences = protocol_differences(a.protocol, b.protocol)
    if [p.prompt_sha256 for p in a.predictions] != [p.prompt_sha256 for p in b.predictions]:
        differences.append("text of the prompts")
    return (
        f"a  {path_a}: {c.accuracy_a:.1%}\nb  {path_b}: {c.accuracy_b:.1%}\n"
        f"b - a: {c.accuracy_b - c.accuracy_a:+.1%}, 95 % interval {low:+.1%} to {high:+.1%}, {c.n} questions\n"
        f"correct only in a: {c.only_a}, only in b: {c.only_b}; exact McNemar test: p = {c.p:.3g}\n"
        f"differences in the protocol: {', '.join(differences) or 'none'}"
    )
