import json
import os
from pathlib import Path

import pytest
import torch

import sample
from minidoctor.ask import chat, question_file
from minidoctor.ask.question_file import answer_batch, read_question_file
from minidoctor.config import SampleConfig, UserError

QUESTIONS = ["gout?", "痛风的关键检查是什么？", "a cough at night, again?", "哮喘", "Asthma?"]


@pytest.fixture
def question_path(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text("\n".join(QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def answer_file(ask, base_dir, question_path, tmp_path):
    """Answer the questions into tmp_path/a.jsonl, in answers of at most 8 tokens."""

    def answer_file(*words, out=tmp_path / "a.jsonl"):
        flags = ["--questions", question_path, "--out", out, "--batch-size", 2, "--max-new-tokens", 8]
        return ask("--base", base_dir, *flags, *words)

    return answer_file


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_answers_are_those_of_single_questions_in_the_order_of_the_file(answer_file, answer, question_path, tmp_path):
    lines = [QUESTIONS[0], "", QUESTIONS[1], json.dumps({"question": QUESTIONS[2], "answer": "?"}), *QUESTIONS[3:]]
    question_path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "a.jsonl"
    code, printed, errors = answer_file()
    assert (code, printed) == (0, "")
    assert errors.endswith(f"5 answers: {out}\n")
    assert sample.WARNING in errors
    rows = read_rows(out)
    assert [(row["question"], row["answer"]) for row in rows] == [(q, answer(q)) for q in QUESTIONS]
    assert answer_file("--batch-size", 5, out=tmp_path / "b.jsonl")[0] == 0
    assert (tmp_path / "b.jsonl").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("key", ["options", "system", "history", "messages"])
def test_a_key_that_would_be_lost_is_rejected(answer_file, question_path, key):
    question_path.write_text(json.dumps({"question": "Which test?", key: {"A": "x"}}), encoding="utf-8")
    code, _, errors = answer_file()
    assert (code, f'q.txt:1: "{key}" is not supported' in errors) == (2, True)


def test_truncated_answers_are_marked_and_counted(answer_file, tmp_path, monkeypatch):
    _, _, errors = answer_file()
    assert all(row["truncated"] is True for row in read_rows(tmp_path / "a.jsonl"))
    assert "5 answers ended at --max-new-tokens" in errors
    assert "0 are empty" in errors
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    assert "1 of the 1 new answers ended at --max-new-tokens" in answer_file("--resume")[2]
    monkeypatch.setattr(chat, "generate", lambda _, prompts, *rest: iter([[9] * len(prompts)]))
    _, _, errors = answer_file(out=tmp_path / "b.jsonl")
    assert [set(row) for row in read_rows(tmp_path / "b.jsonl")] == [{"question", "answer"}] * 5
    assert "0 answers ended at" in errors


def test_empty_answers_are_counted(answer_file, monkeypatch):
    monkeypatch.setattr(chat, "generate", lambda *_: iter([]))
    assert "5 are empty" in answer_file()[2]


@pytest.mark.parametrize(
    ("steps", "answers", "n_steps"),
    [
        ([[1, 4], [None, 5], [None, 6]], [[1], [4, 5, 6]], 2),  # the first answer is complete before the second
        ([[1, 4], [2, None], [3, None]], [[1, 2, 3], [4]], 3),  # the second is held back until then
    ],
)
def test_answer_is_yielded_when_it_and_those_before_it_are_complete(
    monkeypatch, model, tokenizer, steps, answers, n_steps
):
    taken = []
    monkeypatch.setattr(chat, "generate", lambda *_: (taken.append(step) or step for step in steps))
    batch = answer_batch(model, tokenizer, [[0], [0]], SampleConfig())
    assert next(batch) == answers[0]
    assert len(taken) == n_steps
    assert list(batch) == answers[1:]


def stop_after(monkeypatch, n_rows):
    """Interrupt the program before it writes row n_rows + 1. Return a function that removes the interruption."""
    append, rows = question_file.append, []

    def interrupting(out, text):
        if text and len(rows) == n_rows:
            raise KeyboardInterrupt
        append(out, text)
        rows.extend([text] * bool(text))

    monkeypatch.setattr(question_file, "append", interrupting)
    return lambda: monkeypatch.setattr(question_file, "append", append)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("n_rows", [0, 2, 3])
def test_resumed_answers_equal_those_of_an_uninterrupted_run(answer_file, tmp_path, monkeypatch, n_rows, temperature):
    assert answer_file("--temperature", temperature, out=tmp_path / "whole.jsonl")[0] == 0
    out = tmp_path / "a.jsonl"
    undo = stop_after(monkeypatch, n_rows)
    code, _, errors = answer_file("--temperature", temperature)
    assert (code, "--resume" in errors) == (130, True)
    assert len(read_rows(out)) == n_rows
    undo()
    if n_rows:
        code, _, errors = answer_file("--temperature", temperature)
        assert (code, "--resume" in errors) == (2, True)
        with out.open("ab") as file:  # as after a kill while the next row was written, here within a character
            file.write({2: b'{"question": "a co', 3: '{"question": "哮'.encode()[:-1]}[n_rows])
    code, _, errors = answer_file("--temperature", temperature, *(["--resume"] if n_rows else []))
    assert code == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    monkeypatch.setattr(chat, "generate", lambda *_: pytest.fail("nothing is left to generate"))
    assert answer_file("--temperature", temperature, "--resume")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        "notes",
        "notes\n",
        '{"question": "asthma?", "answer": ""}\n',
        '{"question": "gout?", "answer": ""}\nnotes',
        '{"question": "gout?", "answer": ""}\n' * 2,
        "".join(json.dumps({"question": q, "answer": ""}, ensure_ascii=False) + "\n" for q in [*QUESTIONS, "more?"]),
        "".join(json.dumps({"question": q, "answer": ""}, ensure_ascii=False) + "\n" for q in QUESTIONS) + "notes",
    ],
)
def test_existing_file_is_never_replaced(answer_file, tmp_path, content):
    out = tmp_path / "a.jsonl"
    out.write_text(content, encoding="utf-8")
    for words in ([], ["--resume"]):
        code, _, errors = answer_file(*words)
        assert (code, "a.jsonl" in errors) == (2, True)
        assert out.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("as_json", [True, False])
def test_questions_as_their_own_output_are_refused(answer_file, question_path, as_json, end):
    lines = [json.dumps({"question": text}, ensure_ascii=False) if as_json else text for text in QUESTIONS]
    question_path.write_text("\n".join(lines) + end, encoding="utf-8")
    before = question_path.read_bytes()
    for words in ([], ["--resume"]):
        assert answer_file(*words, out=question_path)[0] == 2
        assert question_path.read_bytes() == before


def test_empty_file_does_not_block_a_retry(answer_file, tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert answer_file()[0] == 0
    assert len(read_rows(tmp_path / "a.jsonl")) == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_reported_with_the_name_of_the_file(answer_file):
    code, _, errors = answer_file(out="/dev/full")
    assert code == 1
    assert "/dev/full" in errors
    assert "No space left" in errors


def test_output_that_cannot_be_opened_is_reported_before_the_first_answer(answer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "generate", lambda *_: pytest.fail("an answer was generated"))
    for out in (tmp_path, tmp_path / "none" / "a.jsonl"):
        code, _, errors = answer_file(out=out)
        assert (code, str(out) in errors) == (2, True)


def test_questions_end_only_at_line_ends(tmp_path):
    path = tmp_path / "q.txt"
    text = "a\u0085b\u2028c\x0cd\x1ce\r\n\rf\n" + '{"question": "g\u2028h"}\n'
    path.write_bytes(text.encode())
    questions = read_question_file(path)
    assert [question.text for question in questions] == ["a\u0085b\u2028c\x0cd\x1ce", "f", "g\u2028h"]
    assert [question.location for question in questions] == [f"{path}:{number}" for number in (1, 3, 4)]


def test_questions_can_come_from_a_pipe():
    read, write = os.pipe()
    os.write(write, b"gout?\nasthma?\n")
    os.close(write)
    assert [question.text for question in read_question_file(Path(f"/dev/fd/{read}"))] == ["gout?", "asthma?"]
    os.close(read)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no questions"),
        ('gout?\n{"question": 3}', 'q.txt:2: "question"'),
        ("{gout", "q.txt:1: not JSON"),
        ('{"question": "a", "question": "b"}', "q.txt:1: key 'question'"),
        ('[{"question": "a"}]', "q.txt:1: a JSON list"),
        ("[\n", "q.txt:1: a JSON list"),
        ("gout?\0", "UTF-16"),
    ],
)
def test_malformed_question_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "q.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_question_file(path)


def test_question_that_does_not_fit_is_refused_before_the_first_answer(answer_file, question_path, tmp_path):
    question_path.write_text("gout?\n" + "gout? " * 200, encoding="utf-8")
    code, _, errors = answer_file()
    assert (code, "q.txt:2: " in errors) == (2, True)
    assert not (tmp_path / "a.jsonl").exists()


def test_non_finite_weights_are_reported_by_name(answer_file, monkeypatch, tmp_path, model, tokenizer):
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.inf
    monkeypatch.setattr(sample, "load", lambda *_, **__: (model, tokenizer))
    code, _, errors = answer_file()
    assert (code, "model.layers.0.self_attn.o_proj.weight" in errors) == (2, True)
    assert (tmp_path / "a.jsonl").read_bytes() == b""
