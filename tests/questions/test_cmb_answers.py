"""The second file of CMB, which has the answers to the test questions."""

import json

import pytest
from benchmark_files import BOM, CMB, EXPECTED, INTERNAL, ONE, SEVERAL, format_file

from minidoctor.config import UserError
from minidoctor.questions.exams import read_answers
from minidoctor.questions.read import read_questions


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


def answer_record(record):
    return without(record, "question", "option")


def test_answers_are_joined_by_id_in_any_order(write):
    records = [*CMB[:2], {**CMB[2], "id": "z"}]
    questions = write(json.dumps([without(record, "answer", "explanation", *INTERNAL) for record in records]), "q.json")
    unanswered = read_questions(questions).rows
    assert [(row.answer, len(row.messages), row.metadata) for row in unanswered] == [
        ("", 1, ONE),
        ("", 1, SEVERAL),
        ("", 1, ONE),
    ]
    whole = read_questions(write(json.dumps(records), "whole.json"))
    assert whole.rows[:2] == EXPECTED["cmb"][:2]
    for order in (records, records[::-1]):
        answers = write(json.dumps([answer_record(record) for record in order]), "a.json")
        assert read_questions(questions, answers) == whole


def test_questions_without_a_published_answer_stay_without(write):
    questions = write(json.dumps([without(record, "answer") for record in CMB]), "q.json")
    answers = write(json.dumps([answer_record(CMB[1])]), "a.json")
    rows, malformed = read_questions(questions, answers)
    assert ([row.answer for row in rows], malformed) == (["", "ABD", ""], [])


def test_answers_that_belong_to_no_question_are_counted(write):
    questions = write(json.dumps([without(CMB[1], "answer")] * 2), "q.json")
    answers = write(json.dumps([{"id": 98, "answer": "A"}, answer_record(CMB[1]), {"id": 99, "answer": "B"}]), "a.json")
    rows, (message,) = read_questions(questions, answers)
    assert [row.answer for row in rows] == ["ABD", "ABD"]
    assert message.startswith(f"{answers}: 2 of 3 answers")
    json_lines = write(json.dumps({"id": 12, "question": "x", "answer": "y"}), "q.jsonl")
    assert read_questions(json_lines, answers) == read_questions(json_lines)  # answers are for CMB only


@pytest.mark.parametrize("key", ["exam_type", "exam_class", "exam_subject", "question_type", "answer"])
def test_a_file_of_answers_that_contradicts_the_questions_is_reported(write, key):
    questions = write(json.dumps(CMB), "q.json")
    answers = write(json.dumps([{**answer_record(CMB[0]), key: "A"}, answer_record(CMB[1])]), "a.json")
    rows, malformed = read_questions(questions, answers)
    assert [row.id for row in rows] == ["12", "row-3"]
    assert len(malformed) == 2
    assert malformed[0].startswith(f"{questions}:1: {key} is {CMB[0][key]!r}")
    assert malformed[1].startswith(f"{answers}: 1 of 2 answers")


@pytest.mark.parametrize("order", ["ABD", "BDA", "DAB"])
def test_a_file_of_answers_may_order_the_letters_differently(write, order):
    questions = write(json.dumps([CMB[1]]), "q.json")
    answers = write(json.dumps([{**answer_record(CMB[1]), "answer": order}]), "a.json")
    assert read_questions(questions, answers) == ([EXPECTED["cmb"][1]], [])


def test_a_file_of_answers_is_not_a_file_of_questions(write):
    with pytest.raises(UserError, match=r"a\.json:1: .*--answers"):
        read_questions(write(json.dumps([answer_record(record) for record in CMB[:2]]), "a.json"))


@pytest.mark.parametrize("record", [{"answer": "A"}, {"id": 1}, {"id": 1, "answer": 3}, "A", ["A"]])
def test_a_malformed_answer_is_reported_with_file_and_line(write, record):
    text, lines = format_file("cmb", [answer_record(CMB[0]), record])
    answers = write(text, "a.json")
    with pytest.raises(UserError, match=f"{answers}:{lines[1]}: expected"):
        read_questions(write(json.dumps(CMB), "q.json"), answers)


def test_a_file_of_answers_is_a_list_in_utf_8_with_one_answer_per_question(write):
    text = json.dumps([answer_record(CMB[0])], ensure_ascii=False)
    assert (
        read_answers(write(BOM + text, "a.json"))
        == read_answers(write(text, "a.json"))
        == {"11": answer_record(CMB[0])}
    )
    for content, message in (
        (text.encode("gbk"), r"a\.json:1: not UTF-8"),
        ('{"answers": []}', r"a\.json: expected a JSON list"),
        ('[{"id": 1, "answer": "A"},\n{"id": 1, "answer": "B"}]', r"a\.json:2: a second answer for question 1"),
        ('[{"id": 1, "answer": "A"},\n{"id": 2, "answer": "A", "answer": "B"}]', r"a\.json:2: .*'answer' occurs 2"),
    ):
        with pytest.raises(UserError, match=message):
            read_answers(write(content, "a.json"))
