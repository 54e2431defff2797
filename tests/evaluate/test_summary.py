import itertools
import json
import math
import random

import numpy as np
import pytest

from minidoctor.evaluate.predictions import prediction_of
from minidoctor.evaluate.prompts import Question
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.summary import compare, full_summary, interval, mcnemar, table
from minidoctor.questions.rows import Row

TYPES = ("医师考试", "护理考试", "药师考试")
SUBJECTS = ("anatomy", "virology", "traditional_chinese_medicine")


def random_prediction(draw, id, exam="cmb", skill=0.6, several=None, **more):
    """One row of a result file: of a benchmark, or with exam "" a question of one's own."""
    letters = "ABCDE"[: draw.choice((4, 5))]
    several = draw.random() < 0.3 if several is None else several
    answer = "".join(sorted(draw.sample(letters, draw.randint(1, 3)))) if several else draw.choice(letters)
    if draw.random() < 0.1:
        answer = ""  # kept by the benchmark

    def outcome(skill):
        wrong = draw.choice([*letters, "AB", "CD", ""])
        prediction = answer if answer and draw.random() < skill else wrong
        return {"prediction": prediction, "correct": prediction == answer if answer else None, "scores": {}}

    part = {"cmb": {"exam_type": draw.choice(TYPES)}, "cmmlu": {"subject": draw.choice(SUBJECTS)}}.get(exam, {})
    scoring = "logits" if exam else "text"
    others = {"logits", "text", "generate"} - {scoring}
    also = {way: outcome(skill / 2) for way in sorted(others) if draw.random() < 0.8}
    row = {
        "id": id,
        "scoring": scoring,
        "answer": answer,
        **outcome(skill),
        "also": also,
        "exam": exam,
        "subject": "",
        "language": draw.choice(("zh", "zh", "en")),
        "several": several,
        "n_options": len(letters),
        "longest": draw.choice(letters),
        "shots": draw.choice((0, 0, 5)),
        **part,
    }
    if draw.random() < 0.1:
        row |= {"prediction": "", "correct": False if answer else None, "too_long": True}
    if answer and draw.random() < 0.8:
        row |= {"nll": draw.uniform(0.1, 9), "n_tokens": draw.randint(0, 6)}
    return row | more


def open_prediction(draw, id):
    return random_prediction(draw, id, "", several=False) | {
        "scoring": "generate",
        "answer": "uric acid",
        "prediction": "It is uric acid.",
        "correct": draw.random() < 0.5,
        "also": {},
        "n_options": 0,
        "longest": "",
    }


def random_predictions(seed, n=200):
    """Of all kinds, some not done because the run was stopped."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        kind = draw.choice(("cmb", "cmb", "cmmlu", "cmexam", "", "open"))
        rows.append(open_prediction(draw, str(i)) if kind == "open" else random_prediction(draw, str(i), kind))
        if draw.random() < 0.1:
            rows[-1] |= {"scoring": None, "prediction": None, "correct": None, "also": {}}
    return rows


def test_the_rows_of_these_tests_are_those_that_answers_writes():
    question = Question(Row("1", [], "痛风?", {"A": "嘌呤", "B": "糖"}, "A", "", "zh"), "痛风?", [], "", 0)
    outcome = {"prediction": "A", "correct": True, "scores": {}, "too_long": True}
    found = {"logits": outcome, "text": outcome, "loss": {"nll": 1.0, "n_tokens": 2}}
    real = prediction_of(question, EvalConfig(score=("logits", "text", "loss")), found)
    ours = set().union(*random_predictions(0)) - {"exam_type"}
    assert ours <= set(real)
    assert full_summary([real])["also"]["text"]["n"] == full_summary([real])["n"] == 1


def plain_figures(outcomes):
    """Share of right ones, and how many there are, of (row, outcome) whose answer is known."""
    right = n = 0
    for _, found in outcomes:
        if found["correct"] is not None:
            n += 1
            right += found["correct"] is True
    return (right / n if n else None, n)


def check_way(of, outcomes):
    """One way of scoring: against the (row, outcome) of every question that has it."""

    def seen(figures):
        return (figures["accuracy"], figures["n"])

    assert seen(of) == plain_figures(outcomes)
    assert seen(of["single"]) == plain_figures([(p, found) for p, found in outcomes if p["several"] is False])
    assert seen(of["several"]) == plain_figures([(p, found) for p, found in outcomes if p["several"] is True])
    unread = [p for p, found in outcomes if p["answer"] and found["prediction"] == ""]
    assert of["unanswered"] == len(unread)
    for figures in (of, of["single"], of["several"]):
        if figures["n"] == 0:
            assert figures["interval"] is None
        else:
            low, high = figures["interval"]
            assert 0 <= low <= figures["accuracy"] <= high <= 1


def guesses(p):
    """All that can be answered to a question."""
    letters = "ABCDE"[: p["n_options"]]
    sizes = range(1, len(letters) + 1) if p["several"] else [1]
    return ["".join(chosen) for size in sizes for chosen in itertools.combinations(letters, size)]


def check_floors(of, choice):
    known = [p for p in choice if p["answer"]]
    if not known:
        assert of == {"random": None, "most_frequent": None, "longest_option": None}
        return
    answers = [p["answer"] for p in known]
    chance = [guesses(p).count(p["answer"]) / len(guesses(p)) for p in known]
    assert of["random"] == pytest.approx(np.mean(chance), rel=1e-12)
    assert of["most_frequent"] == max(answers.count(answer) for answer in answers) / len(answers)
    assert of["longest_option"] == pytest.approx(np.mean([p["longest"] == p["answer"] for p in known]), rel=1e-12)


def check_summary(of, rows):
    """Every figure of some rows, computed again one after the other."""
    done = [p for p in rows if p["scoring"] is not None]
    choice = [p for p in done if p["n_options"] > 0]
    written = [p for p in done if p["n_options"] == 0]
    check_way(of, [(p, p) for p in choice])
    check_floors(of["floors"], choice)
    headlines = [p["scoring"] for p in choice]
    assert of["scoring"] == ("/".join(sorted(set(headlines), key=headlines.index)) if choice else None)
    assert set(of["also"]) == {way for p in choice for way in p["also"]}
    for way, figures in of["also"].items():
        check_way(figures, [(p, p["also"][way]) for p in choice if way in p["also"]])
    assert of["too_long"] == len([p for p in done if "too_long" in p])
    assert of["without_answer"] == len([p for p in done if p["answer"] == ""])
    assert of["shots"] == {str(n): k for n in (0, 5) if (k := len([p for p in choice if p["shots"] == n]))}
    assert (of["open_accuracy"], of["n_open"]) == plain_figures([(p, p) for p in written])
    nats, tokens = 0.0, 0
    for p in rows:
        nats, tokens = nats + p.get("nll", 0.0) * (p.get("n_tokens", 0) > 0), tokens + p.get("n_tokens", 0)
    assert of["nll"] == (pytest.approx(nats / tokens) if tokens else None)


@pytest.mark.parametrize(("seed", "n"), [(0, 200), (1, 200), (2, 60), (3, 7), (4, 1)])
def test_every_figure_can_be_had_from_the_rows(seed, n):
    rows = random_predictions(seed, n)
    summary = full_summary(rows)
    check_summary(summary, rows)
    assert list(summary["languages"]) == sorted({p["language"] for p in rows})
    for language, of in summary["languages"].items():
        check_summary(of, [p for p in rows if p["language"] == language])
    assert set(summary["exams"]) == {p["exam"] for p in rows} - {""}
    for exam, of in summary["exams"].items():
        of_exam = [p for p in rows if p["exam"] == exam]
        check_summary(of, of_exam)
        key = {"cmb": "exam_type", "cmmlu": "subject", "cmexam": None}[exam]
        known = [p for p in of_exam if key and p["scoring"] and p["answer"]]
        assert set(of["parts"]) == {p[key] for p in known}
        for name, part in of["parts"].items():
            check_way(part, [(p, p) for p in known if p[key] == name])
        shares = [part["accuracy"] for part in of["parts"].values()]
        mean = of["mean_of_parts"]
        assert mean["n"] == len(shares)
        assert mean["accuracy"] == (pytest.approx(sum(shares) / len(shares)) if shares else None)
        assert (mean["interval"] is None) == (not shares)


def test_the_summary_is_a_function_of_what_the_file_holds():
    rows = random_predictions(5)
    summary = full_summary(rows)
    assert full_summary(json.loads(json.dumps(rows, ensure_ascii=False))) == summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def marked(n, right, **more):
    """n questions with four options, the first of them answered rightly."""
    common = {"several": False, "exam": "cmb", "exam_type": TYPES[0], "language": "zh", "n_options": 4}
    common |= {"id": "1", "scoring": "logits", "answer": "A", "longest": "A", "also": {}, "subject": "", "shots": 0}
    common |= more
    return [common | {"prediction": "AB"[i >= right], "correct": i < right} for i in range(n)]


UNEVEN = [(200, 190), (20, 4), (50, 25)]  # questions of a part, and how many were right


def uneven_parts():
    return [p for name, (n, right) in zip(TYPES, UNEVEN, strict=True) for p in marked(n, right, exam_type=name)]


def test_the_mean_of_parts_counts_each_part_alike_and_the_micro_mean_each_question():
    of = full_summary(uneven_parts())["exams"]["cmb"]
    assert of["accuracy"] == pytest.approx((190 + 4 + 25) / 270)
    assert of["mean_of_parts"]["accuracy"] == pytest.approx((190 / 200 + 4 / 20 + 25 / 50) / 3)
    assert of["mean_of_parts"]["n"] == 3


def test_a_part_whose_answers_are_unknown_does_not_count_in_the_mean():
    rows = uneven_parts() + [p | {"answer": "", "correct": None} for p in marked(9, 0, exam_type="医技考试")]
    of = full_summary(rows)["exams"]["cmb"]
    assert set(of["parts"]) == set(TYPES)
    assert of["mean_of_parts"] == full_summary(uneven_parts())["exams"]["cmb"]["mean_of_parts"]
    assert of["without_answer"] == 9


RESAMPLES = 20_000


def resampled(rows):
    """The shares of right ones among rows drawn with replacement."""
    draws = np.random.default_rng(7).integers(len(rows), size=(RESAMPLES, len(rows)))
    return np.array([p["correct"] for p in rows], dtype=float)[draws].mean(axis=1)


def bounds(shares):
    return np.quantile(shares, (0.025, 0.975))


@pytest.mark.parametrize(("n", "right"), [(200, 120), (200, 190), (200, 2), (30, 20), (5, 2)])
def test_the_interval_is_that_of_resampling_the_questions(n, right):
    # Both are quantiles of finitely many draws that lie 1 / n apart: they may differ by one such step. An interval of
    # 90 % is narrower by 0.31 standard errors on each side, which for n = 200, right = 120 is more.
    rows = marked(n, right)
    ours, plain = full_summary(rows)["interval"], bounds(resampled(rows))
    assert np.abs(ours - plain).max() < 1.01 / n
    if n == 200 and right == 120:
        assert np.abs(np.quantile(resampled(rows), (0.05, 0.95)) - plain).min() > 1.01 / n


def test_the_interval_of_the_mean_of_parts_is_that_of_resampling_within_each_part():
    # The grid of the means is fine, so that only chance is left: the standard deviation of such a quantile is about
    # 0.02 (20,000 draws) to 0.03 (10,000) standard errors of the mean, hence a seventh of one.
    rows = uneven_parts()
    parts = [[p for p in rows if p["exam_type"] == name] for name in TYPES]
    standard_error = math.sqrt(sum(right * (n - right) / n**3 for n, right in UNEVEN)) / 3
    tolerance = standard_error / 7
    draws = np.random.default_rng(8)
    shares = []
    for part in parts:
        correct = np.array([p["correct"] for p in part], dtype=float)
        shares.append(correct[draws.integers(len(part), size=(RESAMPLES, len(part)))].mean(axis=1))
    plain = bounds(np.mean(shares, axis=0))
    ours = full_summary(rows)["exams"]["cmb"]["mean_of_parts"]["interval"]
    assert np.abs(ours - plain).max() < tolerance
    # What it is not: an interval of all questions alike, of the parts as if they were drawn, of the same draw for
    # all parts, or of each part's bounds averaged.
    mean = np.mean([right / n for n, right in UNEVEN])
    all_alike = bounds(resampled(rows)) - full_summary(rows)["accuracy"] + mean
    of_parts = np.array([right / n for n, right in UNEVEN])[draws.integers(3, size=(RESAMPLES, 3))].mean(axis=1)
    averaged = np.mean([bounds(share) for share in shares], axis=0)
    for wrong in (all_alike, bounds(of_parts), averaged, np.quantile(np.mean(shares, axis=0), (0.05, 0.95))):
        assert np.abs(wrong - plain).max() > 1.5 * tolerance


def test_intervals_at_the_ends():
    assert interval([]) is None
    assert interval([(0, 0)]) is None
    assert interval([(3, 4), (0, 0)]) is None
    assert interval([(9, 9)]) == interval([(1, 1)]) == [1.0, 1.0]
    assert interval([(0, 9)]) == interval([(0, 1)]) == [0.0, 0.0]
    assert interval([(9, 9), (0, 3)]) == [0.5, 0.5]
    assert interval([(5, 9)]) == interval([(5, 9)])


def test_no_rows_at_all():
    summary = full_summary([])
    check_summary(summary, [])
    assert (summary["accuracy"], summary["interval"], summary["nll"], summary["languages"]) == (None, None, None, {})
    assert len(table(summary).splitlines()) == 1


def test_nothing_done_yet():
    rows = [p | {"scoring": None, "prediction": None, "correct": None} for p in marked(4, 2)]
    summary = full_summary(rows)
    check_summary(summary, rows)
    assert summary["exams"]["cmb"]["mean_of_parts"] == {"accuracy": None, "n": 0, "interval": None}
    assert len(table(summary).splitlines()) == 1


@pytest.mark.parametrize(("n", "right"), [(1, 1), (1, 0), (25, 25), (25, 0)])
def test_all_right_all_wrong_and_a_single_question(n, right):
    rows = marked(n, right)
    summary = full_summary(rows)
    check_summary(summary, rows)
    share = right / n
    assert (summary["accuracy"], summary["interval"]) == (share, [share, share])
    assert summary["floors"] == {"random": 0.25, "most_frequent": 1.0, "longest_option": 1.0}
    assert f"{share:.1%}" in table(summary)


def test_chance_for_several_letters_is_one_of_all_sets():
    single, several = marked(1, 1), marked(1, 1, several=True, answer="ABC")
    assert full_summary(single)["floors"]["random"] == 1 / 4
    assert full_summary(several)["floors"]["random"] == 1 / 15
    assert full_summary(single + several)["floors"]["random"] == pytest.approx((1 / 4 + 1 / 15) / 2)


def test_mcnemar_counts_all_ways_in_which_the_differences_could_have_fallen():
    for n in range(13):
        # Each of the n questions on which a and b differ falls to the one or the other.
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
    # At this size the normal approximation with continuity correction is good to a thousandth.
    p = mcnemar(5000, 4800)
    assert p == pytest.approx(math.erfc((200 - 1) / math.sqrt(9800) / math.sqrt(2)), rel=2e-3)
    assert mcnemar(2000, 0) == 0  # 2^-1999 is no double


def pair_of_results(seed=0, n=300):
    """Two systems of which the second has the first one's answers, a little better."""
    draw = random.Random(seed)
    a = [random_prediction(draw, str(i), "cmb", 0.5) for i in range(n)]
    b = []
    for p in a:
        better = p["answer"] and draw.random() < 0.3
        worse = p["answer"] and draw.random() < 0.05
        b.append(p | {"correct": True} if better else p | {"correct": False} if worse else dict(p))
    return a, b


def test_compare_counts_the_pairs():
    a, b = pair_of_results()
    of = compare(a, b)
    known = [(p["correct"], q["correct"]) for p, q in zip(a, b, strict=True) if p["answer"]]
    assert of["n"] == len(known) < len(a)
    assert of["only_a"] == known.count((True, False)) > 0
    assert of["only_b"] == known.count((False, True)) > of["only_a"]
    assert of["a"] == full_summary(a)["accuracy"]
    assert of["b"] == full_summary(b)["accuracy"]
    assert of["difference"] == pytest.approx(of["b"] - of["a"])
    assert of["p"] == mcnemar(of["only_a"], of["only_b"]) < 0.05


def test_compare_turned_round():
    a, b = pair_of_results()
    there, back = compare(a, b), compare(b, a)
    assert (there["a"], there["b"], there["p"]) == (back["b"], back["a"], back["p"])
    assert there["difference"] == -back["difference"]
    low, high = there["interval"]
    assert np.abs(np.array([-high, -low]) - back["interval"]).max() < 1.01 / there["n"]


def test_the_interval_of_a_difference_is_that_of_resampling_the_pairs():
    # Within one step of 1 / n, as above. The interval of two independent results would be much wider.
    a, b = pair_of_results()
    known = np.array([(p["correct"], q["correct"]) for p, q in zip(a, b, strict=True) if p["answer"]], dtype=float)
    n = len(known)
    draws = np.random.default_rng(9)
    drawn = known[draws.integers(n, size=(RESAMPLES, n))].mean(axis=1)  # (resamples, 2)
    plain = bounds(drawn[:, 1] - drawn[:, 0])
    assert np.abs(compare(a, b)["interval"] - plain).max() < 1.01 / n
    apart = bounds(drawn[:, 1] - draws.permutation(drawn[:, 0]))
    assert np.abs(apart - plain).min() > 3 / n


def test_two_equal_results_do_not_differ():
    a, _ = pair_of_results()
    of = compare(a, a)
    assert (of["difference"], of["interval"], of["only_a"], of["only_b"], of["p"]) == (0, [0, 0], 0, 0, 1)


def test_a_question_that_one_of_them_has_not_done_does_not_count():
    a, b = marked(4, 3), marked(4, 1)
    b[0] |= {"scoring": None, "prediction": None, "correct": None}
    of = compare(a, b)
    assert (of["n"], of["a"], of["b"], of["only_a"], of["only_b"]) == (3, 2 / 3, 0, 2, 0)


def test_results_of_other_questions_are_refused():
    a, b = pair_of_results()
    others = [b[1:], a + b[:1], [], b[::-1], [*b[:-1], b[-1] | {"id": "x"}], [*b[:-1], b[-1] | {"answer": "ABCDE"}]]
    for other in others:
        with pytest.raises(ValueError, match="not of the same questions in the same order"):
            compare(a, other)
    unknown = [p | {"answer": "", "correct": None} for p in a]
    for results in ((unknown, unknown), ([], [])):
        with pytest.raises(ValueError, match="no question in common whose answer is known"):
            compare(*results)


BELOW = ("", "one right letter", "several right letters")


def rows_named(text, name):
    """Of a table: the lines under a name, up to the next."""
    lines = [line for line in text.splitlines() if not line.startswith("  floors: ")]
    found = list(itertools.dropwhile(lambda line: line[:32].strip() != name, lines))
    return list(itertools.takewhile(lambda line: line[:32].strip() in (name, *BELOW), found))


def words(of, way):
    """What the line of some figures has to say, from left to right."""
    low, high = of["interval"]
    between = [f"{100 * bound:.1f}%" for bound in (low, high)] if low < high else []
    unanswered = [str(n) for n in [of.get("unanswered", 0)] if n]
    return [way, f"{100 * of['accuracy']:.1f}%", *between, str(of["n"]), *unanswered]


def said(line):
    return [word for word in line[32:].split() if word != "-"]


def check_group(text, name, of):
    lines = rows_named(text, name)
    expected = []
    if of["n"]:
        expected.append(words(of, of["scoring"]))
        if of["several"]["n"]:
            expected += [words(of["single"], of["scoring"]), words(of["several"], of["scoring"])]
        expected += [words(figures, way) for way, figures in of["also"].items() if figures["n"]]
    if of["n_open"]:
        expected.append(["open,", "contains", f"{100 * of['open_accuracy']:.1f}%", str(of["n_open"])])
    if of["nll"] is not None:
        expected.append(["loss", f"{of['nll']:.3f}", "nats", "per", "token"])
    assert [said(line) for line in lines] == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_table_says_what_the_summary_says(seed):
    rows = random_predictions(seed, 300)
    for p in rows:  # a way that some do not have
        if p["exam"] == "cmexam":
            p["also"].pop("generate", None)
    summary = full_summary(rows)
    text = table(summary)
    check_group(text, "all", summary)
    for name in ("zh", "en"):
        check_group(text, name, summary["languages"][name])
    for exam, of in summary["exams"].items():
        check_group(text, exam, of)
        for name, part in of["parts"].items():
            assert said(rows_named(text, name)[0]) == words(part, of["scoring"])
    means = [said(line) for line in text.splitlines() if "mean of these" in line]
    parted = [of for of in summary["exams"].values() if of["parts"]]
    # Beside the mean of the parts stands how many questions they have together.
    assert means == [words(of["mean_of_parts"] | {"n": of["n"]}, of["scoring"]) for of in parted]
    told = ", ".join(f"{n} in {count} questions" for n, count in summary["shots"].items())
    assert f"solved questions in the prompt: {told}" in text
    chance = {"chance": "random", "always the most frequent answer": "most_frequent"}
    for name, key in (chance | {"always the longest option": "longest_option"}).items():
        assert f"{name} {100 * summary['floors'][key]:.1f}%" in text
    assert f"{summary['too_long']} questions are longer than the model's context: unanswered" in text
    assert f"{summary['without_answer']} questions have no known answer" in text
    assert min(summary["too_long"], summary["without_answer"], summary["unanswered"]) > 0
    assert max(map(len, text.splitlines())) <= 120


def test_the_table_has_no_line_for_what_is_not_there():
    text = table(full_summary(marked(20, 11)))
    lines = text.splitlines()
    assert [line[:32].strip() for line in lines if "floors" not in line] == ["", "all", TYPES[0]]
    assert lines[-2].startswith("  floors: ")
    for phrase in (
        "solved questions",
        "right letter",
        "mean of these",
        "open",
        "loss",
        "context",
        "known answer",
        "None",
        "nan%",
    ):
        assert phrase not in text


def test_the_widest_table_still_fits():
    rows = marked(5000, 5000, exam="cmmlu", subject=SUBJECTS[2], several=True)
    rows += [p | {"prediction": ""} for p in marked(5000, 0, exam="cmmlu", subject=SUBJECTS[1], several=True)]
    for p in rows:
        p["also"] = {"text_per_character": {"prediction": "", "correct": True}}
    lines = table(full_summary(rows)).splitlines()
    assert max(map(len, lines)) <= 120
    assert all(len(line) == len(line.rstrip()) for line in lines)
    assert " ".join(lines[0].split()) == "scored by right 95 % interval n unanswered"
    column = lines[0].index("right") + len("right")
    assert {line[column - 1] for line in lines[1:] if "%" in line and "floors" not in line} == {"%"}


def test_open_questions_do_not_count_beside_multiple_choice():
    def row(number, n_options, correct):
        return {"id": str(number), "answer": "A", "n_options": n_options, "correct": correct}

    a = [row(i, 4, i != 0) for i in range(10)] + [row(i, 0, False) for i in range(10, 20)]
    b = [row(i, 4, True) for i in range(10)] + [row(i, 0, True) for i in range(10, 20)]
    assert (compare(a, b)["n"], compare(a, b)["a"], compare(a, b)["b"]) == (10, 0.9, 1.0)
    assert (compare(a[10:], b[10:])["n"], compare(a[10:], b[10:])["difference"]) == (10, 1.0)


def test_questions_of_the_same_name_and_answer_with_another_text_are_others():
    a = [{"id": "1", "answer": "A", "n_options": 4, "correct": True, "question_sha256": "x"}]
    with pytest.raises(ValueError, match="not of the same questions"):
        compare(a, [a[0] | {"question_sha256": "y"}])
