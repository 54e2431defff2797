import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from random_predictions import EXAM_TYPES, make_prediction, n_correct_of, random_predictions

from minidoctor.config import UserError
from minidoctor.evaluate.records import Outcome, Prediction
from minidoctor.evaluate.summary import Accuracy, Summary, bootstrap_interval, full_summary
from minidoctor.files.json_files import from_json


def plain_accuracy(outcomes):
    """Return the share of correct ones, and the number of those whose answer is known."""
    marks = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    return (marks.count(True) / len(marks) if marks else None, len(marks))


def check_method(summary, pairs):
    """Compare with the (prediction, outcome) of every question that has an outcome of the method."""

    def outcomes(multiple_answers):
        return [outcome for p, outcome in pairs if p.multiple_answers is multiple_answers]

    assert (summary.accuracy, summary.n) == plain_accuracy([outcome for _, outcome in pairs])
    single, multiple = summary.single_answer, summary.multiple_answers
    assert (single.accuracy, single.n) == plain_accuracy(outcomes(False))
    assert (multiple.accuracy, multiple.n) == plain_accuracy(outcomes(True))
    unanswered = [outcome for p, outcome in pairs if p.answer and outcome.prediction == ""]
    assert summary.unfinished == len([outcome for outcome in unanswered if outcome.unfinished])
    assert summary.unanswered == len(unanswered) - summary.unfinished
    for accuracy in (summary, single, multiple):
        if accuracy.n == 0:
            assert accuracy.interval is None
        else:
            low, high = accuracy.interval
            assert 0 <= low <= accuracy.accuracy <= high <= 1


def possible_answers(p):
    letters = "ABCDE"[: p.n_options]
    sizes = range(2, len(letters) + 1) if p.multiple_answers else [1]
    return ["".join(chosen) for size in sizes for chosen in itertools.combinations(letters, size)]


def check_trivial_baselines(baselines, choice):
    marked = [p for p in choice if p.answer]
    if not marked:
        assert baselines == {"random": None, "most_frequent": None, "longest_option": None}
        return
    answers = [p.answer for p in marked]
    chance = [possible_answers(p).count(p.answer) / len(possible_answers(p)) for p in marked]
    assert baselines["random"] == pytest.approx(np.mean(chance), rel=1e-12)
    assert baselines["most_frequent"] == max(answers.count(answer) for answer in answers) / len(answers)
    longest = np.mean([p.longest_option == p.answer for p in marked])
    assert baselines["longest_option"] == pytest.approx(longest, rel=1e-12)


def check_summary(summary, predictions):
    """Compute every number of a group of questions again."""
    done = [p for p in predictions if p.scoring is not None]
    choice = [p for p in done if p.n_options > 0]
    free_form = [p for p in done if p.n_options == 0]
    check_method(summary, [(p, p.outcomes[p.scoring]) for p in choice])
    check_trivial_baselines(summary.trivial_baselines, choice)
    headlines = [p.scoring for p in choice]
    assert summary.scoring == ("/".join(sorted(set(headlines), key=headlines.index)) if choice else None)
    assert set(summary.methods) == {m for p in choice for m in p.outcomes if m not in ("loss", p.scoring)}
    for method, accuracy in summary.methods.items():
        check_method(accuracy, [(p, p.outcomes[method]) for p in choice if method in p.outcomes])
    assert summary.too_long == len([p for p in done if p.outcomes[p.scoring].too_long])
    assert summary.without_answer == len([p for p in done if p.answer == ""])
    assert summary.shots == {str(n): k for n in (0, 5) if (k := len([p for p in choice if p.shots == n]))}
    free_form_outcomes = [p.outcomes[p.scoring] for p in free_form]
    assert (summary.free_form_accuracy, summary.n_free_form) == plain_accuracy(free_form_outcomes)
    losses = [p.outcomes["loss"] for p in predictions if "loss" in p.outcomes]
    n_tokens = sum(loss.n_tokens for loss in losses)
    assert summary.nll == (pytest.approx(sum(loss.nll for loss in losses) / n_tokens) if n_tokens else None)


@pytest.mark.parametrize(("seed", "n"), [(0, 200), (1, 200), (2, 60), (3, 7), (4, 1)])
def test_every_number_follows_from_the_predictions(seed, n):
    predictions = random_predictions(seed, n)
    summary = full_summary(predictions)
    check_summary(summary, predictions)
    assert list(summary.languages) == sorted({p.language for p in predictions})
    for language, group in summary.languages.items():
        check_summary(group, [p for p in predictions if p.language == language])
    assert set(summary.exams) == {p.exam for p in predictions} - {""}
    for name, exam in summary.exams.items():
        of_exam = [p for p in predictions if p.exam == name]
        check_summary(exam, of_exam)
        part_name = {"cmb": lambda p: p.metadata["exam_type"], "cmmlu": lambda p: p.topic}.get(name)
        marked = [p for p in of_exam if part_name and p.scoring and p.answer]
        assert set(exam.parts) == {part_name(p) for p in marked}
        for part, accuracy in exam.parts.items():
            check_method(accuracy, [(p, p.outcomes[p.scoring]) for p in marked if part_name(p) == part])
        shares = [accuracy.accuracy for accuracy in exam.parts.values()]
        mean = exam.mean_of_parts
        assert mean.n == len(shares)
        assert mean.accuracy == (pytest.approx(sum(shares) / len(shares)) if shares else None)
        assert (mean.interval is None) == (not shares)


def free_form(answer, reply, kind, language="en"):
    outcome = Outcome(reply=reply, prediction=reply, correct=reply == answer)
    return make_prediction(
        outcome, scoring="generate", answer=answer, kind=kind, language=language, exam="", n_options=0
    )


def test_accuracies_by_kind_and_language():
    predictions = [free_form("gout", "gout", "new name"), free_form("gout", "flu", "new name")]
    predictions += [free_form("flu", "flu", "new name", "zh"), free_form("flu", "flu", "")]
    predictions += [make_prediction(kind="new name"), *n_correct_of(3, 1, kind="choice")]
    kinds = full_summary(predictions).kinds
    shares = {(kind, name): (a.accuracy, a.n) for kind, group in kinds.items() for name, a in group.items()}
    assert shares == {("new name", "en"): (0.5, 2), ("new name", "zh"): (1.0, 1), ("choice", "zh"): (1 / 3, 3)}


def test_a_refusal_is_the_expected_answer_of_any_question_out_of_scope():
    unknown, hello = "I do not know this.", "Hello."
    predictions = [free_form(unknown, hello, "out of scope"), free_form(hello, "gout", "out of scope")]
    predictions += [free_form("gout", unknown, "new name"), free_form("gout", "gout", ""), free_form("gout", "flu", "")]
    predictions += [free_form("gout", "gout", "", "zh"), *n_correct_of(3, 1, language="en")]
    summary = full_summary(predictions)
    assert list(summary.scope) == ["en"]
    assert (summary.scope["en"].refusals.accuracy, summary.scope["en"].refusals.n) == (1 / 2, 2)
    assert (summary.scope["en"].false_refusals.accuracy, summary.scope["en"].false_refusals.n) == (1 / 3, 3)
    assert summary.kinds["out of scope"]["en"].accuracy == 0


def test_a_question_back_is_a_false_refusal_only_where_one_condition_is_named():
    which = "Which kind?"
    predictions = [free_form("Hello.", "gout", "out of scope"), free_form(which, which, "general name")]
    predictions += [free_form("gout", which, "new name"), free_form("gout", "gout", "new name")]
    scope = full_summary(predictions).scope["en"]
    assert (scope.false_refusals.accuracy, scope.false_refusals.n) == (1 / 2, 2)
    assert (scope.refusals.accuracy, scope.refusals.n) == (0, 1)


def test_predictions_and_summary_survive_json():
    predictions = random_predictions(5)
    summary = full_summary(predictions)
    stored = json.loads(json.dumps([asdict(p) for p in predictions], ensure_ascii=False))
    assert [from_json(Prediction, content) for content in stored] == predictions
    assert from_json(Summary, json.loads(json.dumps(asdict(summary), allow_nan=False))) == summary


@pytest.mark.parametrize(
    "change", [{"id": 1}, {"shots": None}, {"outcomes": {"text": []}}, {"unknown": 1}, {"exam": []}]
)
def test_malformed_predictions_are_rejected(change):
    (prediction,) = n_correct_of(1, 1)
    assert from_json(Prediction, asdict(prediction)) == prediction
    with pytest.raises(UserError):
        from_json(Prediction, asdict(prediction) | change)


# --- means over the parts of a benchmark ---


PART_SIZES = ((200, 190), (20, 4), (50, 25))  # questions, correct answers


def uneven_parts():
    parts = zip(EXAM_TYPES, PART_SIZES, strict=True)
    return [p for name, (n, n_correct) in parts for p in n_correct_of(n, n_correct, metadata={"exam_type": name})]


def test_mean_of_parts_weights_parts_equally_and_accuracy_weights_questions():
    exam = full_summary(uneven_parts()).exams["cmb"]
    assert exam.accuracy == pytest.approx((190 + 4 + 25) / 270)
    assert exam.mean_of_parts.accuracy == pytest.approx((190 / 200 + 4 / 20 + 25 / 50) / 3)
    assert exam.mean_of_parts.n == 3


def test_part_without_known_answers_is_not_in_the_mean():
    unknown = Outcome(prediction="A")
    others = [
        replace(p, answer="", correct=None, outcomes={"logits": unknown})
        for p in n_correct_of(9, 0, metadata={"exam_type": "医技考试"})
    ]
    exam = full_summary(uneven_parts() + others).exams["cmb"]
    assert set(exam.parts) == set(EXAM_TYPES)
    assert exam.mean_of_parts == full_summary(uneven_parts()).exams["cmb"].mean_of_parts
    assert exam.without_answer == 9


# --- bootstrap intervals ---


RESAMPLES = 20_000


def resample(predictions):
    """Return the accuracies of questions drawn with replacement."""
    draws = np.random.default_rng(7).integers(len(predictions), size=(RESAMPLES, len(predictions)))
    return np.array([p.correct for p in predictions], dtype=float)[draws].mean(axis=1)


def bounds(shares):
    return np.quantile(shares, (0.025, 0.975))


@pytest.mark.parametrize(("n", "n_correct"), [(200, 120), (200, 190), (200, 2), (30, 20), (5, 2)])
def test_interval_equals_that_of_resampled_questions(n, n_correct):
    # Both are quantiles of finitely many draws at distances of 1 / n, so they may differ by one such step. A 90 %
    # interval is narrower by 0.31 standard errors on each side, which is more for n = 200, n_correct = 120.
    predictions = n_correct_of(n, n_correct)
    actual, expected = full_summary(predictions).interval, bounds(resample(predictions))
    assert np.abs(actual - expected).max() < 1.01 / n
    if n == 200 and n_correct == 120:
        assert np.abs(np.quantile(resample(predictions), (0.05, 0.95)) - expected).min() > 1.01 / n


def test_interval_of_the_mean_of_parts_equals_that_of_resampling_within_each_part():
    # The means have small steps, so only the draws differ: the standard deviation of such a quantile is about 0.02
    # (20,000 draws) to 0.03 (10,000) standard errors of the mean. The tolerance is a seventh of a standard error.
    predictions = uneven_parts()
    parts = [[p for p in predictions if p.metadata["exam_type"] == name] for name in EXAM_TYPES]
    standard_error = math.sqrt(sum(k * (n - k) / n**3 for n, k in PART_SIZES)) / 3
    tolerance = standard_error / 7
    rng = np.random.default_rng(8)
    shares = []
    for part in parts:
        correct = np.array([p.correct for p in part], dtype=float)
        shares.append(correct[rng.integers(len(part), size=(RESAMPLES, len(part)))].mean(axis=1))
    expected = bounds(np.mean(shares, axis=0))
    actual = full_summary(predictions).exams["cmb"].mean_of_parts.interval
    assert np.abs(actual - expected).max() < tolerance
    # Other definitions differ: all questions together, parts drawn at random, bounds averaged, 90 %.
    mean = np.mean([k / n for n, k in PART_SIZES])
    together = bounds(resample(predictions)) - full_summary(predictions).accuracy + mean
    random_parts = np.array([k / n for n, k in PART_SIZES])[rng.integers(3, size=(RESAMPLES, 3))].mean(axis=1)
    averaged = np.mean([bounds(share) for share in shares], axis=0)
    narrower = np.quantile(np.mean(shares, axis=0), (0.05, 0.95))
    for wrong in (together, bounds(random_parts), averaged, narrower):
        assert np.abs(wrong - expected).max() > 1.5 * tolerance


def test_interval_without_variance_has_width_0():
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([(0, 0)]) is None
    assert bootstrap_interval([(3, 4), (0, 0)]) is None
    assert bootstrap_interval([(9, 9)]) == bootstrap_interval([(1, 1)]) == (1.0, 1.0)
    assert bootstrap_interval([(0, 9)]) == bootstrap_interval([(0, 1)]) == (0.0, 0.0)
    assert bootstrap_interval([(9, 9), (0, 3)]) == (0.5, 0.5)
    assert bootstrap_interval([(5, 9)]) == bootstrap_interval([(5, 9)])


# --- special cases ---


def test_summary_without_predictions():
    summary = full_summary([])
    check_summary(summary, [])
    assert (summary.accuracy, summary.interval, summary.nll, summary.languages) == (None, None, None, {})


def test_summary_of_questions_that_are_not_done():
    predictions = [replace(p, scoring=None, prediction=None, correct=None, outcomes={}) for p in n_correct_of(4, 2)]
    summary = full_summary(predictions)
    check_summary(summary, predictions)
    assert summary.exams["cmb"].mean_of_parts == Accuracy(None, 0, None)


@pytest.mark.parametrize(("n", "n_correct"), [(1, 1), (1, 0), (25, 25), (25, 0)])
def test_summary_of_equal_marks(n, n_correct):
    predictions = n_correct_of(n, n_correct)
    summary = full_summary(predictions)
    check_summary(summary, predictions)
    share = n_correct / n
    assert (summary.accuracy, summary.interval) == (share, (share, share))
    assert summary.trivial_baselines == {"random": 0.25, "most_frequent": 1.0, "longest_option": 1.0}


def test_chance_for_multiple_answers_is_one_of_all_sets_of_at_least_two():
    single, multiple = n_correct_of(1, 1), n_correct_of(1, 1, multiple_answers=True, answer="ABC")
    assert full_summary(single).trivial_baselines["random"] == 1 / 4
    assert full_summary(multiple).trivial_baselines["random"] == 1 / 11  # AB, AC, AD, BC, BD, CD and five larger ones
    assert full_summary(single + multiple).trivial_baselines["random"] == pytest.approx((1 / 4 + 1 / 11) / 2)
