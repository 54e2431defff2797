"""Accuracies with their 95 % confidence intervals, trivial baselines and losses, computed from predictions.

accuracy             exact match: all correct letters and no other; unreadable and unscored answers are wrong
interval             percentile bootstrap over questions; of width 0 if all answers are right or all are wrong
trivial baselines    need no model: chance, always the most frequent answer, always the longest option
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from minidoctor.evaluate.free_form import contains
from minidoctor.evaluate.records import Prediction

RESAMPLES = 10_000
OUT_OF_SCOPE = "out of scope"  # the kind of the questions whose answer contains no fact
GENERAL_NAME = "general name"  # the kind of those whose answer asks which of several conditions is meant
Interval = tuple[float, float]


@dataclass(frozen=True)
class Accuracy:
    accuracy: float | None  # None: no question with a known answer
    n: int
    interval: Interval | None


@dataclass(frozen=True)
class MethodSummary(Accuracy):
    """The accuracy of one scoring method on multiple-choice questions."""

    single_answer: Accuracy
    multiple_answers: Accuracy
    unanswered: int  # no readable letters
    unfinished: int  # ended before the reasoning did


@dataclass(frozen=True)
class ScopeSummary:
    """Refusals: the generated answers that contain the expected answer of a question out of scope or a general name."""

    refusals: Accuracy  # of the questions out of scope, by the same or another of these answers: no fact is invented
    false_refusals: Accuracy  # of the questions of all other kinds


@dataclass(frozen=True)
class Summary(MethodSummary):
    """A group of questions, such as all, a language or a benchmark. The inherited fields are those of the headline."""

    scoring: str | None  # the headline method
    trivial_baselines: dict[str, float | None]
    methods: dict[str, MethodSummary]  # the other methods
    shots: dict[str, int]  # number of few-shot examples -> questions
    too_long: int
    truncated: int  # generated answers that ended at max_new_tokens or at the end of the context
    n_generated: int
    without_answer: int
    nll: float | None  # nats per token of the correct answers
    free_form_accuracy: float | None
    n_free_form: int
    languages: dict[str, "Summary"] = field(default_factory=dict)
    kinds: dict[str, dict[str, Accuracy]] = field(default_factory=dict)  # by the rows' "kind" and language
    scope: dict[str, ScopeSummary] = field(default_factory=dict)  # by language, if there are questions out of scope
    exams: dict[str, "Summary"] = field(default_factory=dict)
    subjects: dict[str, MethodSummary] = field(default_factory=dict)  # of a benchmark, as the next two
    parts: dict[str, MethodSummary] = field(default_factory=dict)  # CMB: exam types, CMMLU: subjects
    mean_of_parts: Accuracy | None = None  # the accuracy that the benchmark publishes
    files: dict[str, "FileSummary"] = field(default_factory=dict)


@dataclass(frozen=True)
class FileSummary:
    """The questions of one file, and a summary of those that do not occur in the training questions."""

    n: int
    n_trained_on: int | None  # None: the training questions are unknown
    others: Summary


def bootstrap_interval(groups: list[tuple[int, int]]) -> Interval | None:
    """Return the 95 % percentile bootstrap of the mean of the groups' accuracies, each of (n correct, n).

    The number of correct answers among n questions drawn with replacement has a binomial distribution.
    """
    if not groups or not all(n for _, n in groups):
        return None
    rng = np.random.default_rng(0)
    means = np.mean([rng.binomial(n, correct / n, RESAMPLES) / n for correct, n in groups], axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mean_accuracy(marks: list[bool]) -> Accuracy:
    correct, n = sum(marks), len(marks)
    return Accuracy(correct / n if n else None, n, bootstrap_interval([(correct, n)]))


def summarize_method(predictions: Iterable[Prediction], method: str = "") -> MethodSummary:
    """Summarize one scoring method, by default the headline of each question."""
    pairs = [(p, p.outcomes.get(method or p.scoring or "")) for p in predictions]
    marked = [(p.multiple_answers, o) for p, o in pairs if o and o.correct is not None]

    def accuracy(*kinds: bool) -> Accuracy:
        return mean_accuracy([bool(o.correct) for multiple_answers, o in marked if multiple_answers in kinds])

    return MethodSummary(
        **vars(accuracy(False, True)),
        single_answer=accuracy(False),
        multiple_answers=accuracy(True),
        unanswered=sum(o.prediction == "" and not o.unfinished for _, o in marked),
        unfinished=sum(o.unfinished for _, o in marked),
    )


def trivial_baselines(predictions: list[Prediction]) -> dict[str, float | None]:
    """Return the accuracies of the trivial baselines on the same questions.

    Chance is a random letter or, for a question with several correct letters, a random set of at least two.
    """
    marked = [p for p in predictions if p.correct is not None]
    if not marked:
        return dict.fromkeys(("random", "most_frequent", "longest_option"))
    chance = [1 / (2**p.n_options - p.n_options - 1 if p.multiple_answers else p.n_options) for p in marked]
    return {
        "random": math.fsum(chance) / len(marked),
        "most_frequent": Counter(p.answer for p in marked).most_common(1)[0][1] / len(marked),
        "longest_option": sum(p.longest_option == p.answer for p in marked) / len(marked),
    }


def summarize(predictions: list[Prediction]) -> Summary:
    """Summarize a group of questions, without its parts."""
    done = [p for p in predictions if p.scoring]
    choice = [p for p in done if p.n_options]
    free_form = [p.correct for p in done if not p.n_options and p.correct is not None]
    losses = [p.outcomes["loss"] for p in predictions if "loss" in p.outcomes]
    generated = [p.outcomes["generate"] for p in predictions if "generate" in p.outcomes]
    n_tokens = sum(loss.n_tokens for loss in losses)
    methods = dict.fromkeys(name for p in choice for name in p.outcomes if name not in (p.scoring, "loss"))
    return Summary(
        **vars(summarize_method(choice)),
        scoring="/".join(dict.fromkeys(p.scoring or "" for p in choice)) or None,
        trivial_baselines=trivial_baselines(choice),
        methods={name: summarize_method(choice, name) for name in methods},
        shots={str(n): count for n, count in sorted(Counter(p.shots for p in choice).items())},
        too_long=sum(p.outcomes[p.scoring or ""].too_long for p in done),
        truncated=sum(outcome.truncated for outcome in generated),
        n_generated=len(generated),
        without_answer=sum(p.correct is None for p in done),
        nll=sum(loss.nll or 0.0 for loss in losses) / n_tokens if n_tokens else None,
        free_form_accuracy=sum(free_form) / len(free_form) if free_form else None,
        n_free_form=len(free_form),
    )


def group_by(predictions: list[Prediction], key: Callable[[Prediction], str]) -> dict[str, list[Prediction]]:
    """Return the predictions by their key, without those whose key is ""."""
    groups: dict[str, list[Prediction]] = {}
    for p in predictions:
        if key(p):
            groups.setdefault(key(p), []).append(p)
    return groups


def summarize_exam(predictions: list[Prediction]) -> Summary:
    keys = {"cmb": lambda p: p.metadata.get("exam_type", ""), "cmmlu": lambda p: p.topic}
    parts = group_by([p for p in predictions if p.correct is not None], keys.get(predictions[0].exam, lambda p: ""))
    counts = [(sum(bool(p.correct) for p in part), len(part)) for part in parts.values()]
    mean = sum(correct / n for correct, n in counts) / len(counts) if counts else None
    return replace(
        summarize(predictions),
        subjects={name: summarize_method(group) for name, group in group_by(predictions, lambda p: p.topic).items()},
        parts={name: summarize_method(part) for name, part in parts.items()},
        mean_of_parts=Accuracy(mean, len(counts), bootstrap_interval(counts)),
    )


def summarize_file(predictions: list[Prediction]) -> FileSummary:
    marks = [p.trained_on for p in predictions]
    n_trained_on = None if None in marks else sum(map(bool, marks))
    return FileSummary(len(predictions), n_trained_on, summarize([p for p in predictions if not p.trained_on]))


def summarize_scope(predictions: list[Prediction]) -> ScopeSummary:
    expected = {p.answer for p in predictions if p.kind in (OUT_OF_SCOPE, GENERAL_NAME)}
    marks: dict[bool, list[bool]] = {True: [], False: []}
    for p in predictions:
        if p.scoring == "generate" and p.kind != GENERAL_NAME:
            marks[p.kind == OUT_OF_SCOPE].append(any(contains(p.prediction or "", answer) for answer in expected))
    return ScopeSummary(mean_accuracy(marks[True]), mean_accuracy(marks[False]))


def full_summary(predictions: list[Prediction]) -> Summary:
    """Summarize all questions, those of each language, kind and file, and those of each benchmark with its parts."""
    languages = dict(sorted(group_by(predictions, lambda p: p.language).items()))
    kinds = dict(sorted(group_by([p for p in predictions if p.correct is not None], lambda p: p.kind).items()))
    out_of_scope = {p.language for p in kinds.get(OUT_OF_SCOPE, ())}
    return replace(
        summarize(predictions),
        languages={name: summarize(group) for name, group in languages.items()},
        kinds={
            kind: {
                name: mean_accuracy([bool(p.correct) for p in group if p.language == name])
                for name in sorted({p.language for p in group})
            }
            for kind, group in kinds.items()
        },
        scope={name: summarize_scope(languages[name]) for name in languages if name in out_of_scope},
        exams={name: summarize_exam(group) for name, group in group_by(predictions, lambda p: p.exam).items()},
        files={name: summarize_file(group) for name, group in group_by(predictions, lambda p: p.file).items()},
    )
