"""The choice of the format, directories, line ends and damaged files."""

import csv
import io
import json
import os
import random
import threading

import pytest
from benchmark_files import BOM, CMB, CMEXAM, EXPECTED, NAMES, RECORDS, format_file

from minidoctor.config import UserError
from minidoctor.questions.exams import read_answers
from minidoctor.questions.read import list_question_files, read_questions

JSON_ROWS = [
    {"question": "Which acid is measured in gout?", "answer": "uric acid", "explanation": None},
    {"question": "哮喘属于？", "options": {"A": "呼吸科", "B": "风湿科"}, "answer": "A", "explanation": "肺病。"},
    {"question": "Which?", "options": {"A": "gout", "B": "asthma", "C": "flu"}, "answer": "AB"},
]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in JSON_ROWS)
TEXTS = {kind: format_file(kind, records)[0] for kind, records in RECORDS.items()} | {"json_lines": JSON_LINES}


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".json", ".jsonl", ".txt", ""])
@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("start", ["", BOM])
def test_the_content_shows_the_benchmark(write, kind, suffix, start):
    assert read_questions(write(start + TEXTS[kind], NAMES[kind] + suffix)) == (EXPECTED[kind], [])


@pytest.mark.parametrize("suffix", [".json", ".JSONL", ".txt"])
@pytest.mark.parametrize("start", ["", BOM])
def test_other_text_is_read_as_json_lines(write, suffix, start):
    rows, malformed = read_questions(write(start + JSON_LINES, "mine" + suffix))
    assert [(row.id, row.answer, row.explanation, row.exam) for row in rows] == [
        ("1", "uric acid", "", ""),
        ("2", "A", "肺病。", ""),
        ("3", "AB", "", ""),
    ]
    assert malformed == []


def with_plain_ends(row):
    """Return a row as JSON in which the line ends within cells are equal."""
    return json.dumps(vars(row), sort_keys=True).replace("\\r\\n", "\\n").replace("\\r", "\\n")


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_accepted_and_counted(write, kind, end):
    malformed_record = [] if kind == "cmb" else ["x"]
    text, lines = format_file(kind, [*RECORDS[kind], malformed_record])
    path = write(text.replace("\r\n", "\n").replace("\n", end), NAMES[kind] + ".csv")
    rows, malformed = read_questions(path)
    assert [with_plain_ends(row) for row in rows] == [with_plain_ends(row) for row in EXPECTED[kind]]
    assert [message.partition(": ")[0] for message in malformed] == [f"{path}:{lines[-1]}"]


@pytest.mark.parametrize("kind", ["cmmlu", "cmexam"])
@pytest.mark.parametrize("start", ["\n", " ", "\r\n \r\n"])
def test_white_space_before_the_header_is_skipped(write, kind, start):
    assert read_questions(write(start + TEXTS[kind], NAMES[kind] + ".csv")) == (EXPECTED[kind], [])


@pytest.mark.parametrize("kind", ["cmmlu", "cmexam"])
def test_a_truncated_csv_file_is_read_to_its_end_or_rejected(write, kind):
    draw, text = random.Random(1), TEXTS[kind]
    for cut in draw.sample(range(text.index("\n") + 2, len(text)), 40):
        path = write(text[:cut], "cut.csv")
        try:
            records = [cells for cells in csv.reader(io.StringIO(text[:cut], newline=""), strict=True) if cells][1:]
        except csv.Error:
            with pytest.raises(UserError, match=r"cut\.csv:\d+: not CSV"):
                read_questions(path)
            continue
        try:
            rows, malformed = read_questions(path)
        except UserError as error:
            assert str(error).startswith((f"{path}:2: ", f"{path}: no questions"))  # noqa: PT017
            assert len(records) <= 1
            continue
        assert len(rows) + len(malformed) == len(records)


def test_an_unclosed_quote_is_rejected(write):
    text = TEXTS["cmmlu"].replace("分泌胰岛素的细胞是", '"分泌胰岛素的细胞是')
    with pytest.raises(UserError, match=r"q\.csv:\d+: not CSV"):
        read_questions(write(text, "q.csv"))


def damage(draw, content):
    """Return bytes after an accident of a disk, an editor or a download."""
    accident, n = draw.randrange(5), len(content)
    start = draw.randrange(n)
    if accident == 0:
        return content[:start]
    if accident == 1:
        return draw.randbytes(draw.randrange(200))
    if accident == 2:
        return content.decode().encode("gbk", "replace")
    if accident == 3:
        return content[:start] + draw.randbytes(3) + content[start + 3 :]
    return content[:start] + draw.choice([b'"', b"\0", b"\\ud800", b"[", b"}", b",", b"\r"]) + content[start:]


@pytest.mark.parametrize("kind", TEXTS)
def test_damaged_bytes_are_read_or_rejected_with_the_file(write, kind):
    draw, content, n_rejected = random.Random(2), TEXTS[kind].encode(), 0
    for _ in range(60):
        path = write(damage(draw, content), "broken" + draw.choice([".csv", ".json", ".jsonl"]))
        for read in (read_questions, read_answers):
            try:
                read(path)
            except UserError as error:
                assert str(error).startswith(str(path))  # noqa: PT017
                n_rejected += 1
    assert n_rejected > 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns are ''"),
        ("a,b\n1,2\n", "columns are 'a, b'"),
        ("Question,Options\n痛风,A 嘌呤\n", "columns are 'Options, Question'"),
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ("[]", "no questions"),
        ('[{"question": "痛风"', "not JSON"),
        ('[{"question": "痛风"}] [', "not JSON"),
        ('[{"id": 1, "answer": "A", "answer": "B"}]', "'answer' occurs 2 times"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (TEXTS["cmb"].encode("gbk"), "not UTF-8"),
        (TEXTS["cmmlu"].encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_file_without_a_known_format_is_rejected(write, text, message):
    path = write(text, "q.csv")
    with pytest.raises(UserError, match=message) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:")
    assert len(str(error.value)) < 2 * len(str(path)) + 300


def test_a_missing_file_is_reported(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_questions(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_questions(write(TEXTS["cmb"], "q.json"), tmp_path / "nowhere.json")
    for text in ("", "\n \n"):
        with pytest.raises(UserError, match=r"rows\.jsonl: no questions"):
            read_questions(write(text, "rows.jsonl"))


def test_a_pipe_is_read_once_and_its_text_passed_on(tmp_path):
    pipe, texts = tmp_path / "pipe", []
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=((BOM + JSON_LINES).encode(),))
    writer.start()
    questions = read_questions(pipe, on_read=texts.append)
    writer.join()
    assert len(questions.rows) == len(JSON_ROWS)
    assert texts == [JSON_LINES.encode()]


def test_a_directory_contains_the_questions_of_its_files_in_order(write, tmp_path):
    kinds = {"B.CSV": "cmexam", "a.csv": "cmmlu", "c.json": "cmb", "d.jsonl": "json_lines", "e.Json": "cmb"}
    for name, kind in kinds.items():
        write(TEXTS[kind], f"q/{name}")
    for name in ("notes.txt", "README", "a.csv.bak", "._a.csv", ".hidden.jsonl"):
        write("not questions", f"q/{name}")
    (tmp_path / "q" / "0.csv").mkdir()
    text, lines = format_file("cmexam", [*CMEXAM, CMEXAM[0][:1]])
    path = write(text, "q/bb.csv")
    names = ["B.CSV", "a.csv", "bb.csv", "c.json", "d.jsonl", "e.Json"]
    assert list_question_files(tmp_path / "q") == [tmp_path / "q" / name for name in names]
    rows, malformed = read_questions(tmp_path / "q")
    assert rows == [row for name in names for row in read_questions(tmp_path / "q" / name).rows]
    assert malformed == [f"{path}:{lines[-1]}: not as many cells as columns"]


@pytest.mark.parametrize("name", ["notes.txt", "._x.csv"])
def test_a_directory_without_question_files_is_rejected(write, tmp_path, name):
    write(TEXTS["cmmlu"], f"q/{name}")
    with pytest.raises(FileNotFoundError, match=r"q: no \.csv, \.json, \.jsonl file"):
        read_questions(tmp_path / "q")
    assert list_question_files(tmp_path / "q" / name) == [tmp_path / "q" / name]


def test_one_file_without_questions_fails_its_directory(write, tmp_path):
    write(TEXTS["cmmlu"], "q/a.csv")
    write("a,b\n1,2\n", "q/b.CSV")
    with pytest.raises(UserError, match=r"b\.CSV: the columns are"):
        read_questions(tmp_path / "q")


@pytest.mark.parametrize(
    ("record", "exam"),
    [
        (CMB[2], "cmb"),
        ({"question": "x", "option": {"A": "1", "B": "2"}, "answer": "A"}, "cmb"),
        ({"question": "x", "options": {"A": "1", "B": "2"}, "answer": "A", "question_type": "one"}, ""),
        ({"question": "x", "answer": "y"}, ""),
        ({"question": "x", "answer": "y", "question_type": "treatment"}, ""),
    ],
)
def test_the_entries_of_a_json_list_show_cmb(write, record, exam):
    assert [row.exam for row in read_questions(write(json.dumps([record, record]), "q.json")).rows] == [exam, exam]


def test_one_entry_with_option_does_not_make_a_list_cmb(write):
    row, wrong = {"question": "痛风？", "answer": "尿酸"}, {"question": "病因？", "option": {"A": "心"}, "answer": "A"}
    text = json.dumps([row, wrong, row]).replace("}, {", "},\n\n{")
    with pytest.raises(UserError, match=r"list\.json:3: .*option"):
        read_questions(write(text, "list.json"))
    with pytest.raises(UserError, match='no "question"'):
        read_questions(write(json.dumps([{"prompt": "痛风？", "completion": "尿酸"}]), "other.json"))


def test_an_empty_path_is_not_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "notes.jsonl").write_text('{"question": "gout?", "answer": "acid"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="empty"):
        read_questions("")
    assert len(read_questions(".").rows) == 1
