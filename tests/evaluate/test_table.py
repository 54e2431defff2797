import itertools
import re
from dataclasses import replace

import pytest
from random_predictions import EXAM_TYPES, TOPICS, make_prediction, n_correct_of, random_predictions

from minidoctor.evaluate.free_form import RULE
from minidoctor.evaluate.records import Outcome
from minidoctor.evaluate.summary import full_summary, summarize
from minidoctor.evaluate.table import format_summary

SUBROWS = ("", "one correct letter", "several correct letters")


def rows_of_group(text, name):
    """Return the lines of the table from that of a group to the next."""
    lines = [line for line in text.splitlines() if "trivial baselines" not in line]
    from_group = itertools.dropwhile(lambda line: line[:32].strip() != name, lines)
    return list(itertools.takewhile(lambda line: line[:32].strip() in (name, *SUBROWS), from_group))


def cells(line):
    return [cell for cell in line[32:].split() if cell != "-"]


def expected_cells(method, accuracy, n=None):
    low, high = accuracy.interval or (0, 0)
    interval = [f"{100 * bound:.1f}%" for bound in (low, high)] if low < high else []
    counts = [getattr(accuracy, name, 0) for name in ("unanswered", "unfinished")]
    shares = [word for k in counts if k for word in (str(k), f"({100 * k / accuracy.n:.1f}%)")]
    return [method, f"{100 * accuracy.accuracy:.1f}%", *interval, str(n or accuracy.n), *shares]


def check_group(text, name, group):
    expected = []
    if group.n:
        expected.append(expected_cells(group.scoring, group))
        if group.multiple_answers.n:
            expected.append(expected_cells(group.scoring, group.single_answer))
            expected.append(expected_cells(group.scoring, group.multiple_answers))
        expected += [expected_cells(method, accuracy) for method, accuracy in group.methods.items()]
    if group.n_free_form:
        expected.append(["free-form", f"{100 * group.free_form_accuracy:.1f}%", str(group.n_free_form)])
    if group.nll is not None:
        expected.append(["loss", f"{group.nll:.3f}", "nats", "per", "token"])
    assert [cells(line) for line in rows_of_group(text, name)] == expected


@pytest.mark.parametrize("seed", range(4))
def test_table_contains_every_number_of_the_summary(seed):
    predictions = random_predictions(seed, 300)
    for i, p in enumerate(predictions):  # a method that some questions do not have
        if p.exam == "cmexam":
            outcomes = {name: outcome for name, outcome in p.outcomes.items() if name != "generate"}
            predictions[i] = replace(p, outcomes=outcomes)
    summary = full_summary(predictions)
    text = format_summary(summary)
    check_group(text, "all", summary)
    for name in ("zh", "en"):
        check_group(text, name, summary.languages[name])
    for name, exam in summary.exams.items():
        check_group(text, name, exam)
        for part, accuracy in exam.parts.items():
            assert cells(rows_of_group(text, part)[0]) == expected_cells(exam.scoring, accuracy)
    means = [cells(line) for line in text.splitlines() if "mean of these" in line]
    exams = [exam for exam in summary.exams.values() if exam.parts]
    assert means == [expected_cells(exam.scoring, exam.mean_of_parts, exam.n) for exam in exams]
    shots = ", ".join(f"{n} in {count} questions" for n, count in summary.shots.items())
    assert f"few-shot examples in the prompt: {shots}" in text
    names = {"random": "chance", "most_frequent": "always the most frequent answer"}
    for key, name in (names | {"longest_option": "always the longest option"}).items():
        assert f"{name} {100 * summary.trivial_baselines[key]:.1f}%" in text
    assert min(summary.too_long, summary.without_answer, summary.unanswered) > 0
    assert re.search(rf"^{summary.too_long} .*context", text, re.MULTILINE)
    assert f"free-form: {RULE}" in text
    assert re.search(rf"^{summary.without_answer} .*no known answer", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120


def test_table_reports_kinds_and_refusals():
    fields = {"scoring": "generate", "exam": "", "language": "en", "n_options": 0, "longest_option": ""}
    known = Outcome(reply="flu", prediction="flu", correct=False)
    refusal = Outcome(reply="Hello.", prediction="Hello.", correct=True)
    predictions = [make_prediction(known, answer="gout", kind="new name", **fields) for _ in range(4)]
    predictions.append(make_prediction(refusal, answer="Hello.", kind="out of scope", **fields))
    lines = {line[:32].strip(): line.split()[-2:] for line in format_summary(full_summary(predictions)).splitlines()}
    assert lines["new name, en"] == ["0.0%", "4"]
    assert lines["out of scope, en"] == lines["no fact if out of scope, en"] == ["100.0%", "1"]
    assert lines["false refusals, en"] == ["0.0%", "4"]


def test_table_has_no_line_without_content():
    text = format_summary(full_summary(n_correct_of(20, 11)))
    lines = text.splitlines()
    assert [line[:32].strip() for line in lines if "baselines" not in line] == ["", "all", EXAM_TYPES[0]]
    assert lines[-2].startswith("  trivial baselines: ")
    absent = ("few-shot", "correct letter", "mean of", "free-form", "loss", "context", "known answer", "None", "nan%")
    assert not [phrase for phrase in absent if phrase in text]


@pytest.mark.parametrize("predictions", [[], [make_prediction()]])
def test_table_of_nothing_is_its_header(predictions):
    assert len(format_summary(full_summary(predictions)).splitlines()) == 1


def test_table_reports_truncated_answers():
    outcomes = {"generate": Outcome(reply="B and", correct=False, truncated=True)}
    predictions = [replace(p, outcomes=p.outcomes | outcomes) for p in n_correct_of(3, 2)]
    predictions += [make_prediction(Outcome(reply="A", correct=True, prediction="A"), scoring="generate")]
    summary = full_summary(predictions)
    assert (summary.truncated, summary.n_generated) == (3, 4)
    assert "3 of 4 (75.0%) generated answers ended at --max-new-tokens" in format_summary(summary)
    assert "--max-new-tokens" not in format_summary(full_summary(n_correct_of(3, 2)))


def test_table_reports_questions_that_were_trained_on():
    predictions = [replace(p, file="a.csv", trained_on=i < 6) for i, p in enumerate(n_correct_of(20, 10))]
    predictions += [replace(p, file="b.csv", trained_on=False) for p in n_correct_of(5, 1)]
    predictions += n_correct_of(4, 3, file="c.jsonl", trained_on=True)
    predictions += n_correct_of(5, 2, file="c.jsonl", trained_on=False, n_options=0, scoring="generate")
    summary = full_summary(predictions)
    assert [(name, f.n, f.n_trained_on) for name, f in summary.files.items()] == [
        ("a.csv", 20, 6), ("b.csv", 5, 0), ("c.jsonl", 9, 4)
    ]  # fmt: skip
    assert summary.files["a.csv"].others == summarize(predictions[6:20])
    assert summary.files["c.jsonl"].others.free_form_accuracy == 0.4
    lines = format_summary(summary).splitlines()
    i = lines.index("a.csv: 6 of 20 questions occur in the training questions")
    assert cells(lines[i + 1]) == expected_cells("logits", summary.files["a.csv"].others)
    assert lines[i + 2] == "b.csv: 0 of 5 questions occur in the training questions"
    assert lines[i + 3] == "c.jsonl: 4 of 9 questions occur in the training questions"
    assert cells(lines[i + 4]) == ["free-form", "40.0%", "5"]
    unknown = full_summary([replace(p, trained_on=None) for p in predictions])
    assert unknown.files["a.csv"].n_trained_on is None
    assert "training questions" not in format_summary(unknown)


def test_widest_table_fits_into_120_columns():
    fields = {"exam": "cmmlu", "multiple_answers": True}
    predictions = n_correct_of(5000, 5000, topic=TOPICS[2], **fields) + n_correct_of(5000, 0, topic=TOPICS[1], **fields)
    per_character = {"text_per_character": Outcome(correct=True)}
    for i, p in enumerate(predictions):
        headline = Outcome(prediction="A" if p.correct else "", correct=p.correct)
        predictions[i] = replace(p, outcomes={"logits": headline} | per_character)
    lines = format_summary(full_summary(predictions)).splitlines()
    assert max(map(len, lines)) <= 120
    assert all(len(line) == len(line.rstrip()) for line in lines)
    column = lines[0].index("accuracy") + len("accuracy")
    assert {line[column - 1] for line in lines[1:] if "%" in line and "baselines" not in line} == {"%"}
