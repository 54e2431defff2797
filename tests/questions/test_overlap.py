"""Which questions count as the same question."""

import json
import unicodedata

import pytest

from minidoctor.questions.overlap import hash_question, question_hash, training_hashes
from minidoctor.questions.read import read_questions

SAME = [
    ("Which test?", "which TEST"),
    ("痛风的关键检查是？", "痛风的关键检查是"),
    ("哮喘属于( )。", "哮喘 属于（）"),
    ("哮喘的典型体征是____", "哮喘的典型体征是——"),
    ("HBsAg（＋）的意义", "hbsag(+)的意义"),
    ("ＨＢｓＡｇ阳性", "HBsAg阳性"),
    ("5 µg per 37 ℃", "5 μg per 37°C"),
    ("Ménière disease", unicodedata.normalize("NFD", "Ménière disease")),
    ("Which STRASSE?", "Which Straße?"),
    ("α and β", "Α AND Β"),
    ("first-line treatment", "First line treatment"),
    ("5–10 mg", "5-10 mg"),
    ("zero\u200bwidth", "zerowidth"),
]
DIFFERENT = [
    ("HBsAg(-)", "HBsAg(+)"),
    ("HBsAg(-)", "HBsAg( )"),
    ("HBsAg-, HBeAg+", "HBsAg+, HBeAg-"),
    ("potassium < 5.5", "potassium > 5.5"),
    ("potassium 5.5", "potassium 55"),
    ("5-10 mg", "510 mg"),
    ("1:2", "12"),
    ("1 2", "12"),
    ("5 %", "5"),
    ("±2", "2"),
    ("Which test?", "Which tes?"),
]


@pytest.mark.parametrize(("question", "variant"), SAME)
def test_spellings_of_one_question_have_one_hash(question, variant):
    assert question != variant
    assert hash_question(question) == hash_question(variant)


@pytest.mark.parametrize(("question", "different"), DIFFERENT)
def test_signs_and_numbers_make_another_question(question, different):
    assert hash_question(question) != hash_question(different)


CHOICE = {"question": "Which?", "options": {"A": "gout", "B": "asthma", "C": "flu"}, "answer": "B"}


def hashes(rows_file, *rows):
    return [question_hash(row) for row in read_questions(rows_file(*rows)).rows]


def test_options_are_part_of_the_question_but_their_order_is_not(rows_file):
    shuffled = {**CHOICE, "options": {"A": "Flu", "B": "gout", "C": "Asthma."}, "answer": "C"}
    replaced = {**CHOICE, "options": {"A": "gout", "B": "asthma", "C": "cold"}}
    free = {"question": "Which?", "answer": "asthma"}
    in_text = {"question": "Which?\nA. gout\nB、asthma\nC．flu", "answer": "B"}
    original, *same_or_not = hashes(rows_file, CHOICE, shuffled, in_text, replaced, free)
    assert [other == original for other in same_or_not] == [True, True, False, False]


def test_the_hash_is_the_same_on_every_machine(rows_file):
    # The first 8 bytes of SHA-256 of b"which\nasthma\nflu\ngout", computed with sha256sum.
    assert hashes(rows_file, CHOICE) == [int.from_bytes(bytes.fromhex("f884b625bdb6bd1d"), "big", signed=True)]


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_every_turn_of_a_conversation_counts_as_trained_on(rows_file):
    conversation = {"messages": turns("gout?", "uric acid", "why?", "crystals", "and then?", "pain")}
    asked = [
        {"question": "Gout", "answer": "x"},
        {"question": "why?", "answer": "x"},
        {"messages": turns("gout?", "anything", "why?", "crystals")},
        {"messages": turns("asthma?", "uric acid", "why?", "crystals")},
        {"question": "asthma?", "answer": "x"},
    ]
    (trained,) = [training_hashes(row) for row in read_questions(rows_file(conversation)).rows]
    assert [key in trained for key in hashes(rows_file, *asked)] == [True, True, True, False, False]
    (row,) = read_questions(rows_file(CHOICE)).rows
    assert training_hashes(row) == {question_hash(row)}


def test_a_benchmark_question_is_found_in_json_lines(rows_file, tmp_path):
    options = {"A": "佝偻病", "B": "坏血病"}
    record = {"question": "缺乏维生素D可引起（ ）", "option": options, "question_type": "单项选择题", "answer": "A"}
    (tmp_path / "cmb.json").write_text(json.dumps([record]), encoding="utf-8")
    (row,) = read_questions(tmp_path / "cmb.json").rows
    assert hashes(rows_file, {"question": "缺乏维生素Ｄ可引起", "options": options, "answer": "A"}) == [
        question_hash(row)
    ]
