"""From single answers to figures: accuracies with their intervals, the floors, tables, and two results compared.

All figures are computed from the rows of a result file alone, so that each can be checked from it.

    accuracy    exact match: all the right letters and no other; what could not be read or scored is wrong
    interval    95 %, percentile bootstrap over questions; it has no width where all are right or all are wrong
    floors      what needs no model: chance, always the most frequent answer, always the longest option
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from minidoctor.config import UserError

Prediction = dict[str, Any]
RESAMPLES = 10_000
PART_OF = {"cmb": "exam_type", "cmmlu": "subject"}  # what a benchmark's published figure is the mean over


def interval(groups: list[tuple[int, int]]) -> list[float] | None:
    """95 % percentile bootstrap of the mean of the groups' accuracies, each of (right, n) questions.

    To draw n questions with replacement and count the right ones is to draw from a binomial distribution.
    """
    if not groups or not all(n for _, n in groups):
        return None
    rng = np.random.default_rng(0)
    means = np.mean([rng.binomial(n, right / n, RESAMPLES) / n for right, n in groups], axis=0)
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def figures(marks: list[bool]) -> dict[str, Any]:
    right, n = sum(marks), len(marks)
    return {"accuracy": right / n if n else None, "n": n, "interval": interval([(right, n)])}


def of_way(predictions: list[Prediction], way: str | None) -> dict[str, Any]:
    """The figures of one way of scoring, the headline if None, over questions whose answer is known."""
    scored = [(p, p if way is None else p["also"].get(way)) for p in predictions]
    marked = [(p, found) for p, found in scored if found and found["correct"] is not None]
    return {
        **figures([found["correct"] for _, found in marked]),
        "single": figures([found["correct"] for p, found in marked if not p["several"]]),
        "several": figures([found["correct"] for p, found in marked if p["several"]]),
        "unanswered": sum(found["prediction"] == "" for _, found in marked),
    }


def floors(predictions: list[Prediction]) -> dict[str, float | None]:
    """What can be had without a model, on the same questions.

    Chance is a random letter, for a question with several right ones a random set of letters that is not empty.
    """
    marked = [p for p in predictions if p["correct"] is not None]
    if not marked:
        return dict.fromkeys(("random", "most_frequent", "longest_option"))
    chance = [1 / (2 ** p["n_options"] - 1 if p["several"] else p["n_options"]) for p in marked]
    return {
        "random": math.fsum(chance) / len(marked),
        "most_frequent": Counter(p["answer"] for p in marked).most_common(1)[0][1] / len(marked),
        "longest_option": sum(p["longest"] == p["answer"] for p in marked) / len(marked),
    }


def summarize(predictions: list[Prediction]) -> dict[str, Any]:
    """The figures of some questions: the headline, and below "also" the other ways."""
    done = [p for p in predictions if p["scoring"]]
    choice = [p for p in done if p["n_options"]]
    written = [p for p in done if not p["n_options"] and p["correct"] is not None]
    losses = [p for p in predictions if p.get("n_tokens")]
    ways = dict.fromkeys(way for p in choice for way in p["also"])
    return {
        "scoring": "/".join(dict.fromkeys(p["scoring"] for p in choice)) or None,
        **of_way(choice, None),
        "floors": floors(choice),
        "also": {way: of_way(choice, way) for way in ways},
        "shots": {str(n): count for n, count in sorted(Counter(p["shots"] for p in choice).items())},
        "too_long": sum(p.get("too_long", False) for p in done),
        "without_answer": sum(p["correct"] is None for p in done),
        "nll": sum(p["nll"] for p in losses) / sum(p["n_tokens"] for p in losses) if losses else None,
        "open_accuracy": sum(p["correct"] for p in written) / len(written) if written else None,
        "n_open": len(written),
    }


def split(predictions: list[Prediction], key: Callable[[Prediction], str]) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {}
    for p in predictions:
        groups.setdefault(key(p), []).append(p)
    return groups


def full_summary(predictions: list[Prediction]) -> dict[str, Any]:
    """`summarize` of all, of each language, and of each benchmark with its parts and their mean."""
    summary = summarize(predictions)
    languages = split(predictions, lambda p: p["language"])
    summary["languages"] = {language: summarize(languages[language]) for language in sorted(languages)}
    summary["exams"] = {}
    for exam, rows in split([p for p in predictions if p["exam"]], lambda p: p["exam"]).items():
        of_exam = summarize(rows)
        marked = [p for p in rows if p["correct"] is not None and p.get(PART_OF.get(exam, ""))]
        of_part = split(marked, part_name)
        parts = {name: of_way(part, None) for name, part in of_part.items()}
        counts = [(sum(p["correct"] for p in part), len(part)) for part in of_part.values()]
        mean = sum(right / n for right, n in counts) / len(counts) if counts else None
        of_exam["subjects"] = {name: of_way(part, None) for name, part in split(rows, lambda p: p["subject"]).items()}
        of_exam["parts"] = parts
        of_exam["mean_of_parts"] = {"accuracy": mean, "n": len(counts), "interval": interval(counts)}
        summary["exams"][exam] = of_exam
    return summary


def part_name(p: Prediction) -> str:
    return str(p[PART_OF[p["exam"]]])


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def line(name: str, scoring: str, of: dict[str, Any]) -> str:
    low, high = of["interval"] or (0.0, 0.0)
    between = f"{low:.1%} - {high:.1%}" if low < high else ""
    unanswered = of.get("unanswered") or ""
    return f"{name:32}{scoring:20}{percent(of['accuracy']):>8}  {between:17}{of['n']:>6}{unanswered:>12}".rstrip()


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    titles = f"{'':32}{'scored by':20}{'right':>8}  {'95 % interval':17}{'n':>6}{'unanswered':>12}"
    lines = [titles]

    def group(name: str, of: dict[str, Any], with_floors: bool) -> None:
        if of["n"]:
            lines.append(line(name, of["scoring"], of))
            if of["several"]["n"]:
                lines.append(line("  one right letter", of["scoring"], of["single"]))
                lines.append(line("  several right letters", of["scoring"], of["several"]))
            lines.extend(line("", way, also) for way, also in of["also"].items())
        if of["n_open"]:
            lines.append(f"{name:32}{'open, contains':20}{percent(of['open_accuracy']):>8}  {'':17}{of['n_open']:>6}")
        if of["nll"] is not None:
            lines.append(f"{'' if of['n'] or of['n_open'] else name:32}{'loss':20}{of['nll']:>8.3f}  nats per token")
        if of["n"] and with_floors:
            names = {"random": "chance", "most_frequent": "always the most frequent answer"}
            names["longest_option"] = "always the longest option"
            lines.append(
                "  floors: " + ", ".join(f"{text} {percent(of['floors'][key])}" for key, text in names.items())
            )

    group("all", summary, with_floors=True)
    for name, of in summary["languages"].items():
        if len(summary["languages"]) > 1:
            group(name, of, with_floors=False)
    for name, of in summary["exams"].items():
        if len(summary["exams"]) > 1 or summary["n"] != of["n"]:
            group(name, of, with_floors=True)
        lines += [line(f"  {part}", of["scoring"], figure) for part, figure in of["parts"].items()]
        if len(of["parts"]) > 1:
            lines.append(
                line("  mean of these", of["scoring"], of["mean_of_parts"] | {"n": summary["exams"][name]["n"]})
            )
    if len(summary["shots"]) > 1:
        told = ", ".join(f"{n} in {count} questions" for n, count in summary["shots"].items())
        lines.append(f"solved questions in the prompt: {told}")
    if summary["too_long"]:
        lines.append(f"{summary['too_long']} questions are longer than the model's context: unanswered")
    if summary["without_answer"]:
        lines.append(f"{summary['without_answer']} questions have no known answer: predicted, not counted")
    return "\n".join(lines)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test: how likely so uneven a split is if a and b are equally good."""
    n = only_a + only_b
    tail = term = 1  # each binomial coefficient from the one before: math.comb of 10,000 takes seconds in all
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def compare(a: list[Prediction], b: list[Prediction]) -> dict[str, Any]:
    """The headlines of two results on the same questions, paired: of multiple choice, if there is any.

    Raises ValueError if the questions are not the same.
    """
    same = ("id", "question_sha256", "answer")
    if [[p.get(key) for key in same] for p in a] != [[p.get(key) for key in same] for p in b]:
        raise UserError("the two results are not of the same questions in the same order")
    choice = any(p["n_options"] for p in a)
    pairs = [(p["correct"], q["correct"]) for p, q in zip(a, b, strict=True) if p["n_options"] or not choice]
    marked = [(bool(p), bool(q)) for p, q in pairs if p is not None and q is not None]
    if not marked:
        raise UserError("the two results have no question in common whose answer is known")
    n, count = len(marked), Counter(marked)
    only_a, only_b = count[True, False], count[False, True]
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, [only_a / n, only_b / n, (n - only_a - only_b) / n], RESAMPLES)
    bounds = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, (0.025, 0.975))
    return {
        "n": n,
        "a": sum(p for p, _ in marked) / n,
        "b": sum(q for _, q in marked) / n,
        "difference": (only_b - only_a) / n,
        "interval": [float(bound) for bound in bounds],
        "only_a": only_a,
        "only_b": only_b,
        "p": mcnemar(only_a, only_b),
    }
