"""The published files of the benchmarks, where they were fetched, compared with a plain reader."""

import csv
import json
import random

import pytest
from paths import SHARED

from minidoctor.config import UserError
from minidoctor.questions.exams import read_answers
from minidoctor.questions.read import read_questions

DATA = SHARED / "data"


def needs(name):
    return pytest.mark.skipif(not (DATA / name).exists(), reason=f"{name} was not fetched")


def dict_rows(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@needs("cmmlu_med")
def test_all_of_cmmlu_med():
    rows, malformed = read_questions(DATA / "cmmlu_med" / "test")
    assert (len(rows), malformed, len({row.topic for row in rows})) == (1709, [], 8)
    expected = [
        (path.stem, f"{path.stem}-{i}", cells["Question"].strip(), {x: cells[x] for x in "ABCD"}, cells["Answer"])
        for path in sorted((DATA / "cmmlu_med" / "test").glob("*.csv"))
        for i, cells in enumerate(dict_rows(path))
    ]
    assert [(row.topic, row.id, row.question, row.options, row.answer) for row in rows] == expected
    assert {(row.exam, row.multiple_answers, row.explanation) for row in rows} == {("cmmlu", False, "")}


@needs("cmexam/val.csv")
def test_all_of_cmexam_val():
    path = DATA / "cmexam" / "val.csv"
    rows, malformed = read_questions(path)
    assert (len(rows), len(malformed)) == (6810, 1)
    assert malformed[0].startswith(f"{path}:26678: ")
    assert "'nan'" in malformed[0]
    assert sum(row.multiple_answers for row in rows) == sum(len(row.answer) > 1 for row in rows) == 210
    records = dict_rows(path)
    assert {f"val-{i}" for i, cells in enumerate(records) if cells["Answer"] != "nan"} == {row.id for row in rows}
    for row in rows:
        cells = records[int(row.id.removeprefix("val-"))]
        assert row.question == cells["Question"].strip()
        assert row.answer == "".join(sorted(cells["Answer"].strip()))
        lines = [line[0] + line[2:].strip() for line in cells["Options"].split("\n") if line]
        assert [x + text.strip() for x, text in row.options.items()] == lines
        assert row.explanation == ("" if cells["Explanation"] == "nan" else cells["Explanation"].strip())


@needs("cmb/CMB-sample.json")
def test_all_of_the_cmb_sample_with_its_answers_in_one_file_or_two(write):
    path = DATA / "cmb" / "CMB-sample.json"
    rows, malformed = read_questions(path)
    records = json.loads(path.read_text(encoding="utf-8"))
    assert (len(rows), malformed) == (len(records), []) == (190, [])
    for row, record in zip(rows, records, strict=True):
        assert (row.question, row.answer) == (record["question"].strip(), record["answer"])
        assert row.options == {letter: text for letter, text in record["option"].items() if text}
    records = [{"id": i, **record} for i, record in enumerate(records)]
    questions = write(
        json.dumps([{key: record[key] for key in record if key != "answer"} for record in records]), "q.json"
    )
    assert {row.answer for row in read_questions(questions).rows} == {""}
    random.Random(0).shuffle(records)
    joined, malformed = read_questions(
        questions,
        write(json.dumps([{key: r[key] for key in r.keys() - {"question", "option"}} for r in records]), "a.json"),
    )
    assert malformed == []
    assert [vars(row) | {"id": ""} for row in joined] == [vars(row) | {"id": ""} for row in rows]


@needs("cmb/CMB-test-choice-answer-first300.json")
def test_the_published_file_of_answers_of_cmb(write):
    path = DATA / "cmb" / "CMB-test-choice-answer-first300.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    assert read_answers(path) == {str(record["id"]): record for record in records}
    option = {letter: f"选项{letter}" for letter in "ABCDE"}
    questions = [{"id": record["id"], "question": f"题 {record['id']}", "option": option} for record in records]
    rows, malformed = read_questions(write(json.dumps(questions), "q.json"), path)
    assert malformed == []
    assert [(row.answer, row.topic, row.multiple_answers) for row in rows] == [
        ("".join(sorted(r["answer"])), r["exam_subject"], r["question_type"] != "单项选择题") for r in records
    ]
    with pytest.raises(UserError, match="--answers"):
        read_questions(path)
