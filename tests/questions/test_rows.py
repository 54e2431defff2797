import pytest

from minidoctor.config import UserError
from minidoctor.questions.rows import (
    add_explanation,
    conversation,
    make_row,
    optional_text,
    parse_options,
    require_text,
)

OPTIONS = {"A": "gout", "B": "asthma", "C": "flu"}
BLANK = ["", " ", "\t\n", "\u3000", "\u200b", "\u200b\u200d\ufeff", "\u2060 \u00ad", "\u2028", "\x00"]


@pytest.mark.parametrize("text", BLANK, ids=ascii)
def test_text_without_a_visible_character_is_blank(text):
    with pytest.raises(UserError, match='"answer" must be text'):
        require_text({"answer": text}, "answer")
    assert optional_text({"topic": text}, "topic") == ""
    assert require_text({"answer": f"{text}是"}, "answer") == f"{text}是"


@pytest.mark.parametrize("value", [5, True, ["x"], {"x": 1}])
def test_a_field_must_be_text(value):
    for get in (require_text, optional_text):
        with pytest.raises(UserError, match='"topic" must be text'):
            get({"topic": value}, "topic")


def test_optional_text_may_be_missing_or_null():
    assert optional_text({}, "topic") == optional_text({"topic": None}, "topic") == ""
    assert optional_text({"topic": " x"}, "topic") == " x"
    for record, message in (({}, 'no "topic"'), ({"topic": None}, '"topic" must be text, got None')):
        with pytest.raises(UserError, match=message):
            require_text(record, "topic")


def test_a_lone_surrogate_is_rejected():
    with pytest.raises(UserError, match="surrogate"):
        require_text({"answer": "half \ud83d"}, "answer")
    assert require_text({"answer": "whole \U0001f600"}, "answer")


@pytest.mark.parametrize(("answer", "letters"), [("B", "B"), ("BA", "AB"), ("AB", "AB"), (" CAB ", "ABC"), ("", "")])
@pytest.mark.parametrize("options", [OPTIONS, dict(reversed(OPTIONS.items()))])
def test_letters_are_a_set_in_alphabetical_order(answer, letters, options):
    assert parse_options(options, answer) == letters


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        (None, "A", "options"),
        (["gout", "flu"], "A", "options"),
        ({"B": "gout"}, "B", "two letters"),
        ({"A": "gout", "b": "flu"}, "A", "'b'"),
        ({"A": "gout", "AB": "flu"}, "A", "'AB'"),
        ({"A": "gout", "B": 1}, "A", '"B" must be text, got 1'),
        ({"A": "gout", "B": "\u200b"}, "A", '"B" must be text'),
        (OPTIONS, "D", "ABC, got 'D'"),
        (OPTIONS, "AA", "got 'AA'"),
        (OPTIONS, "A,B", "got 'A,B'"),
        (OPTIONS, "asthma", "got 'asthma'"),
    ],
)
def test_malformed_options_and_answers_are_rejected(options, answer, message):
    with pytest.raises(UserError, match=message):
        parse_options(options, answer)


def test_a_multiple_choice_row_asks_with_its_options_and_answers_with_letter_and_text():
    row = make_row({}, "1", "Which?", "AC", OPTIONS)
    assert row.messages == conversation("Which?\nA. gout\nB. asthma\nC. flu", "A. gout\nC. flu")
    assert (row.question, row.options, row.answer, row.multiple_answers) == ("Which?", OPTIONS, "AC", True)
    assert not make_row({}, "1", "Which?", "C", OPTIONS).multiple_answers
    assert make_row({}, "1", "Which?", "", OPTIONS).messages == row.messages[:1]


@pytest.mark.parametrize("id", [None, "", " ", "missing"])
def test_the_default_id_replaces_a_blank_one(id):
    record = {} if id == "missing" else {"id": id}
    assert make_row(record, "7", "x", "y", {}).id == "7"
    assert [make_row({"id": id}, "7", "x", "y", {}).id for id in (3, "a")] == ["3", "a"]


def test_the_language_is_that_of_the_question():
    assert [make_row({}, "1", question, "痛风", {}).language for question in ("gout?", "痛风?")] == ["en", "zh"]


def test_the_kind_is_optional_text():
    assert [make_row(record, "1", "x", "y", {}).kind for record in ({}, {"kind": "new name"})] == ["", "new name"]
    with pytest.raises(UserError, match='"kind"'):
        make_row({"kind": 1}, "1", "x", "y", {})


def test_an_explanation_follows_the_answer():
    row = make_row({"explanation": "Because."}, "1", "Which?", "B", OPTIONS)
    assert add_explanation(row) == [row.messages[0], {"role": "assistant", "content": "B. asthma\nBecause."}]
    row = make_row({"explanation": None}, "1", "Which?", "B", OPTIONS)
    assert add_explanation(row) == row.messages
