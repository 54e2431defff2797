import dataclasses
import json
import os

import pytest
import torch

from minidoctor.batching import IGNORE
from minidoctor.config import TrainConfig, UserError
from minidoctor.evaluate.inputs import TRAINING_QUESTIONS
from minidoctor.files.safetensors import read_tensors
from minidoctor.questions.overlap import question_hash, training_hashes
from minidoctor.questions.read import read_questions
from minidoctor.text.tokenizer import encode_conversation
from minidoctor.training.data import hash_files, load_data, select_rows

EXAM = """Question,Options,Answer,Explanation
痛风的关键检查是,"A 尿酸
B 心电图",A,关节液中可见尿酸结晶
哮喘属于哪个科,"A 风湿科
B 呼吸科",B,nan
痛风属于哪个科,"A 风湿科
B 呼吸科",nan,
"""


@pytest.fixture
def exam(tmp_path):
    path = tmp_path / "exam.csv"
    path.write_text(EXAM, encoding="utf-8")
    return str(path)


def test_malformed_rows_are_skipped_and_reported_by_line(exam, capsys):
    rows, eval_rows = select_rows(TrainConfig(data=exam, eval=""))
    assert "exam.csv:6" in capsys.readouterr().out
    assert ([row.answer for row in rows], eval_rows) == (["A", "B"], [])


def test_explanations_are_learned_on_demand(exam, tokenizer):
    config = TrainConfig(data=exam, eval="", max_seq_len=1000)
    texts = []
    for explain in (False, True):
        data = load_data(dataclasses.replace(config, explain=explain), tokenizer, 1000)
        texts.append([tokenizer.decode([t for t in e.targets if t != IGNORE]) for e in data.examples])
    assert texts[0][0] == "A. 尿酸"
    assert texts[1][0] == "A. 尿酸\n关节液中可见尿酸结晶"
    assert texts[0][1] == texts[1][1] == "B. 呼吸科"


def test_questions_in_both_files_are_reported_and_skipped_on_demand(rows_file, tokenizer, capsys):
    shared = {"question": "Ｗhat is gout?", "answer": "a disease of the joints"}
    data = rows_file({"question": "what is GOUT", "answer": "uric acid"}, {"question": "Asthma?", "answer": "wheezing"})
    config = TrainConfig(data=str(data), eval=str(rows_file(shared, name="eval.jsonl")))
    both = load_data(config, tokenizer, 1000)
    assert (len(both.examples), both.eval_trained) == (2, 1)
    assert "WARNING: 1 of 2 questions" in capsys.readouterr().out
    without = load_data(dataclasses.replace(config, leave_out_eval=True), tokenizer, 1000)
    assert (len(without.examples), without.eval_trained) == (1, 0)
    out = capsys.readouterr().out
    assert "skipped: 1 of 2 questions" in out
    assert "WARNING" not in out
    only = dataclasses.replace(config, data=config.eval, leave_out_eval=True)
    with pytest.raises(UserError, match="no question is left"):
        load_data(only, tokenizer, 1000)


def test_truncated_answers_are_counted_with_the_length_that_keeps_all(rows_file, tokenizer, capsys):
    rows = [{"question": "Gout?", "answer": "uric acid " * n} for n in (1, 3, 9)]
    rows.append({"question": "Gout? " * 30, "answer": "uric acid"})
    path = rows_file(*rows)
    lengths = [len(encode_conversation(row.messages, tokenizer, 1000).tokens) for row in read_questions(path).rows]
    config = TrainConfig(data=str(path), eval="", max_seq_len=lengths[1])
    data = load_data(config, tokenizer, 1000)
    out = capsys.readouterr().out
    assert f"2 of 4 answers are truncated at --max-seq-len {lengths[1]}; {max(lengths)} would keep all" in out
    assert "skipped: 1 of 4 rows" in out
    assert [len(example.tokens) for example in data.examples] == [*lengths[:2], lengths[1]]
    whole = load_data(dataclasses.replace(config, max_seq_len=max(lengths)), tokenizer, 1000)
    assert "truncated" not in capsys.readouterr().out
    assert [len(example.tokens) for example in whole.examples] == lengths
    for short, full in zip(data.examples, whole.examples, strict=False):
        assert short.targets == full.targets[: lengths[1]]
    with pytest.raises(UserError, match="no answer begins within --max-seq-len 2"):
        load_data(dataclasses.replace(config, max_seq_len=2), tokenizer, 1000)


def test_examples_beyond_the_context_of_the_base_are_rejected(rows_file, tokenizer):
    config = TrainConfig(data=str(rows_file({"question": "Gout?", "answer": "uric acid " * 9})), eval="")
    with pytest.raises(UserError, match="lower --max-seq-len to 20"):
        load_data(config, tokenizer, 20)
    data = load_data(dataclasses.replace(config, max_seq_len=20), tokenizer, 20)
    assert len(data.examples[0].tokens) == 20


def test_a_run_stores_the_hashes_of_the_questions_it_learns(train_run, rows_file, data):
    skipped = {"question": "Gout? " * 300, "answer": "uric acid"}  # its answer begins after --max-seq-len
    chat = [{"role": "user", "content": "Fever?"}, {"role": "assistant", "content": "a symptom"},
            {"role": "user", "content": "And gout?"}, {"role": "assistant", "content": "a disease"}]  # fmt: skip
    lines = data.read_text().splitlines()
    path = rows_file(*lines, json.dumps({"messages": chat}), json.dumps(skipped), name="all.jsonl")
    out = train_run(steps=1, data=str(path), max_seq_len=100)
    (name, hashes), *rest = read_tensors(out / TRAINING_QUESTIONS)
    *rows, last = read_questions(path).rows
    expected = set().union(*(training_hashes(row) for row in rows))
    assert (name, rest, hashes.dtype) == ("hashes", [], torch.int64)
    assert hashes.tolist() == sorted(expected)
    assert question_hash(rows[0]) in expected
    assert question_hash(last) not in expected


def test_the_hash_of_files_depends_on_their_content_only(tmp_path, rows_file):
    directory = tmp_path / "questions"
    directory.mkdir()
    first, second = (rows_file({"question": q, "answer": "a"}, name=f"questions/{q}.jsonl") for q in ("p", "q"))
    before = hash_files(str(directory))
    assert hash_files(os.path.relpath(directory)) == before
    assert len({before, hash_files(str(first)), hash_files(str(second)), hash_files("")}) == 4
    second.write_text(second.read_text() + "\n")
    assert hash_files(str(directory)) != before
    with pytest.raises(UserError, match="not a regular file"):
        hash_files("/dev/null")
