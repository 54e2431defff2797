import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from random_predictions import n_correct_of, random_prediction

from minidoctor.config import UserError
from minidoctor.evaluate.compare import compare, mcnemar
from minidoctor.evaluate.summary import full_summary

RESAMPLES = 20_000


def bounds(shares):
    return np.quantile(shares, (0.025, 0.975))


# --- McNemar's test ---


def test_mcnemar_counts_all_splits_that_are_at_least_as_uneven():
    for n in range(13):
        # Each of the n questions on which a and b differ is correct in one of them.
        splits = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=n)]
        for only_a in range(n + 1):
            uneven = abs(only_a - (n - only_a))
            expected = sum(split >= uneven for split in splits) / len(splits)
            assert mcnemar(only_a, n - only_a) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_is_symmetric_and_a_probability():
    for a, b in itertools.product((0, 1, 2, 5, 17, 40, 301), repeat=2):
        assert 0 < mcnemar(a, b) == mcnemar(b, a) <= 1
    assert mcnemar(7, 7) == mcnemar(0, 0) == 1


def test_mcnemar_of_large_counts():
    # The normal approximation with continuity correction has a relative error of about 1e-3 for these counts.
    p = mcnemar(5000, 4800)
    assert p == pytest.approx(math.erfc((200 - 1) / math.sqrt(9800) / math.sqrt(2)), rel=2e-3)
    assert mcnemar(2000, 0) == 0  # 2^-1999 underflows


# --- paired comparison ---


def two_results(seed=0, n=300):
    """Return two results; the second has the answers of the first with some corrected and fewer spoiled."""
    rng = random.Random(seed)
    a = [random_prediction(rng, str(i), "cmb", 0.5) for i in range(n)]
    b = []
    for p in a:
        better = p.answer and rng.random() < 0.3
        worse = p.answer and rng.random() < 0.05
        b.append(replace(p, correct=True if better else False if worse else p.correct))
    return a, b


def test_compare_counts_the_pairs():
    a, b = two_results()
    c = compare(a, b)
    pairs = [(p.correct, q.correct) for p, q in zip(a, b, strict=True) if p.answer]
    assert c.n == len(pairs) < len(a)
    assert c.only_a == pairs.count((True, False)) > 0
    assert c.only_b == pairs.count((False, True)) > c.only_a
    assert c.accuracy_a == full_summary(a).accuracy
    assert c.accuracy_b == sum(q for _, q in pairs) / len(pairs)
    assert c.p == mcnemar(c.only_a, c.only_b) < 0.05


def test_compare_is_antisymmetric():
    a, b = two_results()
    forward, backward = compare(a, b), compare(b, a)
    assert (forward.accuracy_a, forward.accuracy_b, forward.p) == (backward.accuracy_b, backward.accuracy_a, backward.p)
    low, high = forward.interval
    assert np.abs(np.array([-high, -low]) - backward.interval).max() < 1.01 / forward.n


def test_interval_of_the_difference_equals_that_of_resampled_pairs():
    # Within one step of 1 / n, as for a single accuracy. The interval of independent results would be wider.
    a, b = two_results()
    pairs = np.array([(p.correct, q.correct) for p, q in zip(a, b, strict=True) if p.answer], dtype=float)
    n = len(pairs)
    rng = np.random.default_rng(9)
    means = pairs[rng.integers(n, size=(RESAMPLES, n))].mean(axis=1)  # (resamples, 2)
    expected = bounds(means[:, 1] - means[:, 0])
    assert np.abs(compare(a, b).interval - expected).max() < 1.01 / n
    independent = bounds(means[:, 1] - rng.permutation(means[:, 0]))
    assert np.abs(independent - expected).min() > 3 / n


def test_equal_results_do_not_differ():
    a, _ = two_results()
    c = compare(a, a)
    assert (c.accuracy_b - c.accuracy_a, c.interval, c.only_a, c.only_b, c.p) == (0, (0, 0), 0, 0, 1)


def test_order_of_the_correct_letters_does_not_matter():
    a = n_correct_of(3, 3, answer="AB", multiple_answers=True)
    b = n_correct_of(3, 1, answer="BA", multiple_answers=True)
    assert compare(a, b).n == 3
    free_form = [n_correct_of(1, 1, answer=answer, n_options=0) for answer in ("AB", "BA")]
    with pytest.raises(UserError, match="same questions"):
        compare(*free_form)


def test_question_without_a_prediction_is_not_compared():
    a, b = n_correct_of(4, 3), n_correct_of(4, 1)
    b[0] = replace(b[0], scoring=None, prediction=None, correct=None)
    c = compare(a, b)
    assert (c.n, c.accuracy_a, c.accuracy_b, c.only_a, c.only_b) == (3, 2 / 3, 0, 2, 0)


def test_results_of_different_questions_are_rejected():
    a, b = two_results()
    different = [b[1:], a + b[:1], [], b[::-1], [*b[:-1], replace(b[-1], id="x")]]
    different += [[*b[:-1], replace(b[-1], answer="ABCDE")], [*b[:-1], replace(b[-1], question_sha256="y")]]
    for predictions in different:
        with pytest.raises(UserError, match="same questions"):
            compare(a, predictions)
    unknown = [replace(p, answer="", correct=None) for p in a]
    for results in ((unknown, unknown), ([], [])):
        with pytest.raises(UserError, match="no question in common"):
            compare(*results)


def test_free_form_questions_are_compared_only_without_multiple_choice():
    choice, free_form = n_correct_of(10, 9), n_correct_of(10, 0, n_options=0, answer="gout")
    other_choice, other_free_form = n_correct_of(10, 10), n_correct_of(10, 10, n_options=0, answer="gout")
    both = compare(choice + free_form, other_choice + other_free_form)
    assert (both.n, both.accuracy_a, both.accuracy_b) == (10, 0.9, 1.0)
    only_free_form = compare(free_form, other_free_form)
    assert (only_free_form.n, only_free_form.accuracy_b - only_free_form.accuracy_a) == (10, 1.0)
