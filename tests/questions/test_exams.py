import csv
import json
import random

import pytest
from benchmark_files import (
    BOM,
    CMB,
    CMEXAM,
    CMMLU,
    EXPECTED,
    HEADERS,
    NAMES,
    RECORDS,
    format_csv,
    format_file,
)

from minidoctor.config import UserError
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import conversation, format_multiple_choice


def replace_cells(kind, **values):
    """Return the first record of a CSV format with other cells."""
    return [values.get(name, cell) for name, cell in zip(HEADERS[kind], RECORDS[kind][0], strict=True)]


@pytest.mark.parametrize("answer", ["BA", "AB", "CBA", "ACB"])
def test_the_order_of_the_correct_letters_does_not_matter(write, answer):
    files = {
        "cmmlu": format_csv(HEADERS["cmmlu"], [replace_cells("cmmlu", Answer=answer)]),
        "cmexam": format_csv(HEADERS["cmexam"], [replace_cells("cmexam", Answer=answer)]),
        "cmb": json.dumps([{**CMB[1], "answer": answer}]),
    }
    for kind, text in files.items():
        (row,) = read_questions(write(text, kind)).rows
        assert (row.answer, row.multiple_answers) == ("".join(sorted(answer)), True)
        assert row.messages == conversation(*format_multiple_choice(row.question, row.options, row.answer))


def test_options_in_another_order_than_the_alphabet_have_a_sorted_answer(write):
    reversed_option = dict(reversed(CMB[1]["option"].items()))
    files = [
        format_csv(HEADERS["cmexam"], [["哪些？", "B 糖\nA 嘌呤\nC 铁", "CBA", ""]]),
        format_csv(["Answer", "D", "C", "B", "A", "Question"], [["CBA", "四", "三", "二", "一", "哪些？"]]),
        json.dumps([{**CMB[1], "option": reversed_option, "answer": "CBA"}]),
    ]
    assert [read_questions(write(text, "q.csv")).rows[0].answer for text in files] == ["ABC"] * 3


def test_the_question_type_of_cmb_decides_on_multiple_answers(write):
    records = [
        {**CMB[1], "answer": "A"},
        {**CMB[1], "answer": ""},
        {**CMB[0], "answer": ""},
        {**CMB[0], "answer": "AB"},
    ]
    rows = read_questions(write(json.dumps(records), "q.json")).rows
    assert [(row.answer, row.multiple_answers) for row in rows] == [("A", True), ("", True), ("", False), ("AB", False)]
    assert [len(row.messages) for row in rows] == [2, 1, 1, 2]


def test_a_csv_file_may_have_further_options(write):
    header = [*HEADERS["cmmlu"][:-1], "E", "F", "Answer"]
    records = [[*CMMLU[0][:-1], "五叶", "六叶", "E"], [*CMMLU[1][:-1], "", " ", "B"], [*CMMLU[2][:-1], "五", "", "F"]]
    rows, malformed = read_questions(write(format_csv(header, records), "anatomy.csv"))
    assert [(list(row.options), row.answer) for row in rows] == [(list("ABCDEF"), "E"), (list("ABCD"), "B")]
    assert rows[0].messages[0]["content"].endswith("D. 四叶\nE. 五叶\nF. 六叶")
    assert len(malformed) == 1
    assert "'F'" in malformed[0]


@pytest.mark.parametrize("column", ["Explanation", "explanation"])
@pytest.mark.parametrize("kind", ["cmmlu", "cmexam"])
def test_an_explanation_column_is_read_in_every_csv_format(write, kind, column):
    header = [*(name for name in HEADERS[kind] if name != "Explanation"), column]
    records = [[*RECORDS[kind][i][: len(header) - 1], text] for i, text in enumerate([" 因为。", "nan", ""])]
    rows, malformed = read_questions(write(format_csv(header, records), "q.csv"))
    assert ([row.explanation for row in rows], malformed) == (["因为。", "", ""], [])


def test_an_explanation_is_read_from_the_questions_or_the_answers_of_cmb(write):
    questions = write(json.dumps([{**CMB[1], "explanation": None}, CMB[0]]), "q.json")
    answers = write(json.dumps([{"id": 12, "answer": "ABD", "explanation": "代谢亢进。"}]), "a.json")
    assert [row.explanation for row in read_questions(questions, answers).rows] == ["代谢亢进。", CMB[0]["explanation"]]


@pytest.mark.parametrize(
    ("kind", "key"), [("cmmlu", "Context"), ("cmexam", "image"), ("cmb", "context"), ("cmb", "images")]
)
def test_a_key_that_would_be_lost_is_rejected(write, kind, key):
    if kind == "cmb":
        text = json.dumps([CMB[0], {**CMB[1], key: "x"}, {**CMB[2], key: ""}])
    else:
        cells = [[*record, value] for record, value in zip(RECORDS[kind][:3], ["", "x", " "], strict=True)]
        text = format_csv([*HEADERS[kind], key], cells)
    rows, malformed = read_questions(write(text, "q.csv"))
    assert (len(rows), len(malformed)) == (2, 1)
    assert f'"{key.lower()}" is not supported' in malformed[0]


def test_a_column_that_occurs_twice_is_rejected(write):
    header = [*HEADERS["cmmlu"], "C"]
    path = write(format_csv(header, [[*CMMLU[0], "七叶"]]), "q.csv")
    with pytest.raises(UserError, match=r"q\.csv:1: .*'C' occurs 2 times"):
        read_questions(path)
    unnamed = ["", *HEADERS["cmmlu"]]
    assert len(read_questions(write(format_csv(unnamed, [["", *CMMLU[0]]]), "q.csv")).rows) == 1


def test_cells_may_be_long(write):
    limit = csv.field_size_limit()
    long = "长" * (limit + 1)
    path = write(format_csv(HEADERS["cmexam"], [replace_cells("cmexam", Question=long), CMEXAM[1]]), "q.csv")
    assert [row.question for row in read_questions(path).rows] == [long, CMEXAM[1][0]]
    assert csv.field_size_limit() == limit
    with pytest.raises(UserError, match="not CSV"):
        read_questions(write(format_csv(HEADERS["cmexam"], CMEXAM) + '"', "q.csv"))
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u000c", "\u001c"], ids=ascii)
def test_only_line_ends_end_an_option_of_cmexam(write, separator):
    text = format_csv(HEADERS["cmexam"], [replace_cells("cmexam", Options=f"A 佝{separator}偻病\nB 坏血病")])
    rows, malformed = read_questions(write(text, "q.csv"))
    assert (rows[0].options, malformed) == ({"A": f"佝{separator}偻病", "B": "坏血病"}, [])


MALFORMED = {
    "cmmlu": [
        (CMMLU[0][:-1], "not as many cells as columns"),
        ([*CMMLU[0], "A"], "not as many cells as columns"),
        (replace_cells("cmmlu", Question=" "), '"Question"'),
        (replace_cells("cmmlu", B=""), '"B"'),
        (replace_cells("cmmlu", D=""), '"D"'),
        (replace_cells("cmmlu", Answer=""), '"Answer"'),
        (replace_cells("cmmlu", Answer="E"), "ABCD, got 'E'"),
        (replace_cells("cmmlu", Answer="CC"), "got 'CC'"),
        (replace_cells("cmmlu", Answer="三叶"), "got '三叶'"),
    ],
    "cmexam": [
        (CMEXAM[0][:2], "not as many cells as columns"),
        (replace_cells("cmexam", Question=""), '"Question"'),
        (replace_cells("cmexam", Options="A 佝偻病\n坏血病"), "'坏血病'"),
        (replace_cells("cmexam", Options="A 佝偻病\nA 坏血病"), "'A 坏血病'"),
        (replace_cells("cmexam", Options="A 佝偻病\nB"), "'B'"),
        (replace_cells("cmexam", Options="A 佝偻病"), "two letters"),
        (replace_cells("cmexam", Options=""), "two letters"),
        (replace_cells("cmexam", Answer="nan"), "ABCD, got 'nan'"),
        (replace_cells("cmexam", Answer=""), '"Answer"'),
        (replace_cells("cmexam", Answer="A,B"), "got 'A,B'"),
    ],
    "cmb": [
        ("痛风", "got str"),
        (None, "got NoneType"),
        ({"id": 11, "answer": "D"}, "--answers"),
        ({"id": 11}, 'no "option"'),
        ({**CMB[0], "question": 7}, '"question" must be text, got 7'),
        ({**CMB[0], "option": ["心", "脑"]}, 'no "option"'),
        ({**CMB[0], "option": {"A": "心", "B": None}}, '"B" must be text, got None'),
        ({**CMB[0], "option": {"A": "心", "乙": "脑"}}, "'乙'"),
        ({**CMB[0], "option": {"A": "心", "D": ""}}, "two letters"),
        ({**CMB[0], "answer": "E"}, "ABCD, got 'E'"),
        ({**CMB[0], "answer": "DD"}, "got 'DD'"),
        ({**CMB[0], "answer": ["D"]}, "got ['D']"),
        ({**CMB[0], "exam_type": 3}, '"exam_type" must be text, got 3'),
        ({**CMB[0], "question": "半\ud83d"}, "surrogate"),
        ({**CMB[0], "id": "\ud83d"}, "surrogate"),
    ],
}


def format_record(kind, record):
    """Return `format_file` with escaped surrogates, which UTF-8 cannot encode."""
    text, lines = format_file(kind, record)
    return "".join(ascii(c)[1:-1] if "\ud800" <= c <= "\udfff" else c for c in text), lines


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [(kind, record, message) for kind, cases in MALFORMED.items() for record, message in cases],
    ids=[f"{kind}-{message}" for kind, cases in MALFORMED.items() for _, message in cases],
)
def test_a_malformed_record_is_skipped_and_reported_with_file_and_line(write, kind, record, message):
    records = [*RECORDS[kind][:2], record, *RECORDS[kind][2:]]
    text, lines = format_record(kind, records)
    path = write(text, NAMES[kind] + ".csv")
    rows, malformed = read_questions(path)
    assert len(malformed) == 1
    assert malformed[0].startswith(f"{path}:{lines[2]}: ")
    assert message in malformed[0]
    assert len(malformed[0]) < len(str(path)) + 200
    assert [(row.question, row.answer) for row in rows] == [(row.question, row.answer) for row in EXPECTED[kind]]


@pytest.mark.parametrize(("kind", "record"), [(kind, cases[0][0]) for kind, cases in MALFORMED.items()])
def test_a_file_without_a_question_is_rejected_with_its_first_malformed_record(write, kind, record):
    path = write(format_file(kind, [record, record])[0], "q.json")
    with pytest.raises(UserError) as error:
        read_questions(path)
    (reported,) = read_questions(write(format_file(kind, [record, RECORDS[kind][0]])[0], "q.json")).malformed
    assert str(error.value) == reported
    with pytest.raises(UserError, match=r"q\.json: no questions$"):
        read_questions(write(format_file(kind, [])[0], "q.json"))


def damage_cells(draw, kind):
    """Return a random record after an accident, and whether it is still a question."""
    cells, header, accident = list(draw.choice(RECORDS[kind])), HEADERS[kind], draw.randrange(8)
    column = {name: i for i, name in enumerate(header)}
    if accident == 0:
        del cells[draw.randrange(len(cells))]
    elif accident == 1:
        cells[column["Answer"]] = draw.choice(["", " ", "nan", "F", "a", "AA", "A B", "1", "Ａ"])
    elif accident == 2:
        cells[column["Question"]] = draw.choice(["", " ", "\n", "\u200b"])
    elif accident == 3 and kind == "cmexam":
        lines = cells[column["Options"]].split("\n")
        i, j = draw.sample(range(len(lines)), 2)
        lines[i] = draw.choice([lines[j], lines[i][1:], lines[i][0], "?", "a" + lines[i][1:]])
        cells[column["Options"]] = "\n".join(lines)
    elif accident == 3:
        cells[column[draw.choice("ABCD")]] = draw.choice(["", "  "])
    elif accident == 4:
        cells[column["Answer"]] = "DCBA"
    return cells, accident > 3


def damage_record(draw):
    record, accident = dict(draw.choice(CMB)), draw.randrange(9)
    if accident == 0:
        del record[draw.choice(["question", "option"])]
    elif accident == 1:
        record["answer"] = draw.choice(["nan", "F", "a", "AA", "A,B", 7, ["A"], True])
    elif accident == 2:
        record["question"] = draw.choice(["", " ", None, 5, [], {}])
    elif accident == 3:
        options = [None, [], {}, "A. 心", {"A": "心"}, {"A": "心", "B": 1}, {"甲": "心", "乙": "脑"}]
        record["option"] = draw.choice(options)
    elif accident == 4:
        record = draw.choice([None, 7, "痛风", [], [record], True, {}])
    elif accident == 5:
        del record["answer"]  # as in the published test questions
    elif accident == 6:
        record["answer"] = "DCBA"
    return record, accident > 4


@pytest.mark.parametrize("kind", RECORDS)
def test_each_record_of_a_damaged_file_is_read_or_reported(write, kind):
    draw = random.Random(0)
    for trial in range(40):
        damage = [
            damage_record(draw) if kind == "cmb" else damage_cells(draw, kind) for _ in range(draw.randint(1, 12))
        ]
        text, lines = format_file(kind, [record for record, _ in damage], draw.choice(["", BOM]))
        path = write(text, f"{trial}.txt")
        question, answer = ("question", "answer") if kind == "cmb" else map(HEADERS[kind].index, ("Question", "Answer"))
        expected = [record for record, is_question in damage if is_question]
        if not expected:
            with pytest.raises(UserError, match=f"{path}:{lines[0]}: "):
                read_questions(path)
            continue
        rows, malformed = read_questions(path)
        assert [row.question for row in rows] == [record[question] for record in expected]
        answers = [record.get(answer, "") if kind == "cmb" else record[answer] for record in expected]
        assert [row.answer for row in rows] == ["".join(sorted(answer)) for answer in answers]
        places = [f"{path}:{line}" for line, (_, is_question) in zip(lines, damage, strict=True) if not is_question]
        assert [message.partition(": ")[0] for message in malformed] == places
