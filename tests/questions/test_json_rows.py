import json

import pytest

from minidoctor.config import UserError
from minidoctor.questions.json_rows import parse_json_list, parse_row
from minidoctor.questions.read import read_questions

CHOICE = {"question": "Which?", "options": {"A": "gout", "B": "asthma", "C": "flu"}, "answer": "B"}
SYSTEM = {"role": "system", "content": "Short."}


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def share_gpt(*texts):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def test_a_question_and_its_answer():
    row = parse_row({"question": "gout?", "answer": "uric acid", "topic": "test"}, "1")
    assert row.messages == turns("gout?", "uric acid")
    assert (row.id, row.question, row.answer, row.options) == ("1", "gout?", "uric acid", {})
    assert (row.topic, row.language, row.exam) == ("test", "en", "")


@pytest.mark.parametrize("answer", ["AB", "BA", " BA "])
def test_the_order_of_the_correct_letters_does_not_matter(answer):
    row = parse_row({**CHOICE, "answer": answer}, "1")
    assert (row.answer, row.multiple_answers) == ("AB", True)
    assert row.messages == turns("Which?\nA. gout\nB. asthma\nC. flu", "A. gout\nB. asthma")


def test_options_in_another_order_than_the_alphabet_have_a_sorted_answer():
    row = parse_row({**CHOICE, "options": {"C": "flu", "A": "gout", "B": "asthma"}, "answer": "CA"}, "1")
    assert row.answer == "AC"
    assert row.messages == turns("Which?\nC. flu\nA. gout\nB. asthma", "A. gout\nC. flu")


CONVERSATIONS = [
    ({"messages": turns("gout?", "uric acid", "why?", "crystals")}, turns("gout?", "uric acid", "why?", "crystals")),
    ({"messages": [SYSTEM, *turns("why?", "crystals")]}, [SYSTEM, *turns("why?", "crystals")]),
    ({"messages": turns("why?", "crystals"), "system": "Short."}, [SYSTEM, *turns("why?", "crystals")]),
    ({"messages": turns("why?", "crystals"), "answer": "crystals"}, turns("why?", "crystals")),
    ({"conversations": share_gpt("gout?", "x", "why?", "crystals")}, turns("gout?", "x", "why?", "crystals")),
    (
        {"conversations": [{"from": "system", "value": "Short."}, *share_gpt("why?", "crystals")]},
        [SYSTEM, *turns("why?", "crystals")],
    ),
    ({"conversations": share_gpt("why?", "crystals"), "system": "Short."}, [SYSTEM, *turns("why?", "crystals")]),
    ({"conversations": turns("why?", "crystals")}, turns("why?", "crystals")),
    ({"instruction": "why?", "output": "crystals"}, turns("why?", "crystals")),
    ({"instruction": "why?", "input": "", "output": "crystals"}, turns("why?", "crystals")),
    ({"instruction": "why?", "input": " ", "output": "crystals"}, turns("why?", "crystals")),
    ({"instruction": "why?", "input": None, "output": "crystals", "system": None}, turns("why?", "crystals")),
    ({"instruction": "Explain.", "input": "why?", "output": "crystals"}, turns("Explain.\nwhy?", "crystals")),
    (
        {"instruction": "why?", "output": "crystals", "system": "Short.", "history": [["gout?", "uric acid"]]},
        [SYSTEM, *turns("gout?", "uric acid", "why?", "crystals")],
    ),
    (
        {"instruction": "why?", "output": "crystals", "history": [["a", "b"], ["c", "d"]]},
        turns("a", "b", "c", "d", "why?", "crystals"),
    ),
    ({"instruction": "why?", "output": "crystals", "system": "", "history": []}, turns("why?", "crystals")),
    ({"messages": None, "question": "why?", "answer": "crystals"}, turns("why?", "crystals")),
]


@pytest.mark.parametrize(("record", "messages"), CONVERSATIONS)
def test_each_format_becomes_a_conversation(record, messages):
    row = parse_row(record, "1")
    assert row.messages == messages
    assert (row.question, row.answer) == (messages[-2]["content"], "crystals")


def test_null_and_blank_optional_fields_are_missing():
    record = {"question": "x", "answer": "y"}
    optional = {"topic": None, "explanation": None, "id": None, "context": None, "history": [], "system": " "}
    assert parse_row(record | optional, "1") == parse_row(record, "1")
    assert parse_row(record | {"topic": "", "explanation": " "}, "1") == parse_row(record, "1")


def test_keys_without_a_meaning_are_ignored():
    record = {"question": "x", "answer": "y"}
    assert parse_row(record | {"source": "web", "difficulty": 3, "year": [2020]}, "1") == parse_row(record, "1")


ALPACA = {"instruction": "x", "output": "y"}
PLAIN = {"question": "x", "answer": "y"}
MESSAGES = {"messages": turns("x", "y")}
UNSUPPORTED = [
    *[(base, key, "text") for base in (PLAIN, ALPACA, MESSAGES) for key in ("context", "Context", "passages")],
    *[(base, key, ["a.png"]) for base in (PLAIN, ALPACA, MESSAGES) for key in ("image", "images", "videos", "audios")],
    *[(base, key, "y") for base in (PLAIN, ALPACA, MESSAGES) for key in ("chosen", "rejected", "tools", "functions")],
    *[(base, key, value) for base in (PLAIN, ALPACA, MESSAGES) for key, value in (("weight", 0), ("mask", False))],
    *[(base, "loss_mask", [0, 1]) for base in (PLAIN, ALPACA, MESSAGES)],
    *[(PLAIN, key, "text") for key in ("system", "input", "output", "choices", "option")],
    (PLAIN, "history", [["a", "b"]]),
    (MESSAGES, "history", [["a", "b"]]),
    (MESSAGES, "conversations", share_gpt("x", "y")),
    *[(ALPACA, key, value) for key, value in (("options", {"A": "x", "B": "y"}), ("question", "x"), ("answer", "y"))],
]


@pytest.mark.parametrize(("base", "key", "value"), UNSUPPORTED)
def test_a_key_that_would_be_lost_is_rejected(base, key, value):
    parse_row(base, "1")
    with pytest.raises(UserError, match=f'"{key}" is not supported'):
        parse_row({**base, key: value}, "1")


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0), ("train", False), ("tool_calls", [{"id": 1}]), ("reasoning_content", "hm")]
)
def test_a_key_of_a_message_that_would_be_lost_is_rejected(key, value):
    user, assistant = turns("x", "y")
    parse_row({"messages": [user, {**assistant, key: None}]}, "1")
    for messages in ([user, {**assistant, key: value}], [{**user, key: value}, assistant]):
        with pytest.raises(UserError, match=f'"{key}" is not supported in a message'):
            parse_row({"messages": messages}, "1")


BAD_LINES = [
    ("{", "not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ("7", "expected a JSON object, got int"),
    ("NaN", "expected a JSON object, got float"),
    ("[" * 100_000, "recursion"),
    ("9" * 5000, "integer"),
    ('{"question": "x", "question": "z", "answer": "y"}', "'question' occurs 2 times"),
    ('{"question": "x", "options": {"A": "1", "B": "2", "A": "3"}, "answer": "A"}', "'A' occurs 2 times"),
    ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' occurs 2 times"),
    ({}, 'no "question"'),
    ({"answer": "x"}, 'no "question"'),
    ({"question": "x"}, 'no "answer"'),
    ({"question": "x", "answer": "\u200b\u2060"}, '"answer" must be text'),
    ({"question": "x", "answer": 5}, '"answer" must be text, got 5'),
    ({"question": "x", "answer": "y", "topic": 3}, '"topic" must be text, got 3'),
    ({**CHOICE, "options": None}, "options"),
    ({**CHOICE, "answer": "D"}, "ABC, got 'D'"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": "hi"}, "messages must be a list"),
    ({"messages": ["hi"]}, "messages must be a list"),
    ({"messages": [{"role": "user"}]}, 'no "content"'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "got 'robot'"),
    ({"messages": turns("hello")}, "end with the assistant's"),
    ({"messages": turns("hello", "\u200b")}, '"content" must be text'),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "contain a user's"),
    ({"conversations": [{"from": "human", "value": 3}]}, '"value" must be text, got 3'),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "got 'tool'"),
    ({"instruction": "x"}, 'no "output"'),
    ({"instruction": "x", "input": 5, "output": "y"}, '"input" must be text, got 5'),
    ({"instruction": "x", "output": "y", "history": "text"}, '"history" must be a list'),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, '"history" must be a list'),
    ({"instruction": "x", "output": "y", "history": [["a", 5]]}, '"history" must be text, got 5'),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_malformed_line_is_reported_with_file_and_line(rows_file, line, message):
    path = rows_file(PLAIN, "", line, PLAIN)
    with pytest.raises(UserError, match=message) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert len(str(error.value)) < len(str(path)) + 200


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c"], ids=ascii)
def test_only_line_ends_end_a_json_line(write, separator):
    row = {"question": f"a{separator}b", "answer": "y"}
    text = json.dumps(row, ensure_ascii=False)
    assert (separator in text) == (separator >= "\u0085")  # JSON escapes control characters
    path = write(f"{text}\n{json.dumps(PLAIN)}", "rows.jsonl")
    assert [row.question for row in read_questions(path).rows] == [f"a{separator}b", "x"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_ends_a_json_line(write, end):
    lines = [json.dumps(PLAIN), "", json.dumps(CHOICE), ""]
    assert [row.id for row in read_questions(write(end.join(lines), "rows.jsonl")).rows] == ["1", "3"]
    path = write(end.join([*lines, "{"]), "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl:5: not JSON"):
        read_questions(path)


LISTED = [PLAIN, CHOICE, ALPACA, MESSAGES, {"conversations": share_gpt("x", "y")}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_json_list_contains_the_rows_of_json_lines(rows_file, write, indent, name):
    expected = read_questions(rows_file(*LISTED))
    assert len(expected.rows) == len(LISTED)
    assert read_questions(write(json.dumps(LISTED, indent=indent), name)) == expected
    for record in LISTED:  # each format is recognized without the others
        (row,) = read_questions(write(json.dumps([record], indent=indent), name)).rows
        assert [row] == read_questions(rows_file(record)).rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_malformed_entry_of_a_json_list_is_reported_with_its_line(write, end):
    text = json.dumps([PLAIN, {"question": "x"}, CHOICE], indent=1).replace("\n", end)
    with pytest.raises(UserError, match=r'rows\.json:6: no "answer"'):
        read_questions(write(text, "rows.json"))
    text = f'[{{"question": "x", "answer": "y"}},{end}{{"question": "x", "answer": "y", "answer": "z"}}]'
    with pytest.raises(UserError, match=r"rows\.json:2: .*'answer' occurs 2 times"):
        read_questions(write(text, "rows.json"))


def test_a_json_list_yields_each_entry_with_its_line(tmp_path):
    entries = [{"a": [1, {"b": "]"}]}, "x,]", 5, None, [[]], {}]
    compact, indented = json.dumps(entries), json.dumps(entries, indent=2)
    assert list(parse_json_list(tmp_path, compact)) == [(1, entry) for entry in entries]
    lines = indented.split("\n")
    starts = [i for i, line in enumerate(lines, start=1) if line.startswith("  ") and line[2] not in " }]"]
    assert list(parse_json_list(tmp_path, indented)) == list(zip(starts, entries, strict=True))
