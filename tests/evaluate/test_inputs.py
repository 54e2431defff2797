import hashlib
import json

import pytest
from benchmark_files import ANATOMY

from minidoctor.evaluate.records import read_result
from minidoctor.questions.exams import SUBJECT_LISTS, SUBJECTS

LISTS = {name: subjects.split() for name, subjects in SUBJECT_LISTS.items()}
CMB = [
    {"id": i, "question": question, "option": {"A": "风湿科", "B": "呼吸科"}, "answer": answer, "exam_type": "医师考试"}
    for i, question, answer in ((1, "痛风属于", "A"), (2, "哮喘属于", "B"))
]
CMEXAM = """Question,Options,Answer,Explanation
痛风属于,"A 风湿科
B 呼吸科",A,nan
肺炎属于,"A 风湿科
B 呼吸科",B,nan
哮喘属于,"A 呼吸科
B 风湿科",A,nan
"""


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def all_subjects(tmp_path):
    """A directory with a file of CMMLU for each medical subject, one of which is not medical."""
    directory = tmp_path / "cmmlu"
    directory.mkdir()
    for subject in (*SUBJECTS, "agronomy"):
        (directory / f"{subject}.csv").write_text(ANATOMY, encoding="utf-8")
    return directory


# --- subjects of CMMLU ---


def test_published_lists_have_5_and_7_medical_subjects():
    assert {name: len(subjects) for name, subjects in LISTS.items()} == {"apollo": 7, "meditron": 5}
    for subjects in LISTS.values():
        assert set(subjects) < set(SUBJECTS)
    assert set(LISTS["apollo"]) ^ set(LISTS["meditron"]) == {
        "nutrition", "professional_medicine", "traditional_chinese_medicine", "virology"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["all", *LISTS])
def test_subjects_are_selected_and_printed(evaluate_program, all_subjects, write, tmp_path, long_base, name):
    exam, out = write("cmexam.csv", CMEXAM), tmp_path / "p.json"
    words = ["--data", all_subjects, exam, "--subjects", name, "--limit", "1", "--out", out]
    printed = evaluate_program(*words, base=long_base)
    expected = sorted(LISTS.get(name, (*SUBJECTS, "agronomy")))
    assert f"{len(expected)} subjects of CMMLU ({name}): {', '.join(expected)}\n" in printed
    result = read_result(out)
    assert result.protocol["subjects"] == expected
    assert [p.topic for p in result.predictions] == [*expected, ""]  # other benchmarks stay
    assert [file["file"] for file in result.protocol["files"]] == [*(f"{s}.csv" for s in expected), "cmexam.csv"]


def test_subject_without_a_file_is_rejected(evaluate_program, all_subjects, long_base, write):
    (all_subjects / "virology.csv").unlink()
    words = ["--data", all_subjects, "--limit", "1"]
    evaluate_program(*words, "--subjects", "apollo", base=long_base, error="--subjects apollo: .*virology")
    assert "5 subjects" in evaluate_program(*words, "--subjects", "meditron", base=long_base)
    assert "subjects" not in evaluate_program("--data", write("cmexam.csv", CMEXAM), base=long_base)


# --- training questions ---


def test_questions_of_a_training_file_are_counted_and_left_out(evaluate_program, write, tmp_path, long_base):
    """The part of CMExam that does not occur in CMB-train: the order of the options does not matter."""
    exam, train, out = write("cmexam.csv", CMEXAM), write("CMB-train.json", CMB), tmp_path / "p.json"
    printed = evaluate_program("--data", exam, "--train-questions", train, "--out", out, base=long_base)
    assert "cmexam.csv: 2 of 3 questions occur in the training questions\n" in printed
    assert "CMB-train.json: 2 questions, 0 malformed" in printed
    result = read_result(out)
    assert [p.trained_on for p in result.predictions] == [True, False, True]
    assert result.protocol["train_questions"][0]["sha256"] == hashlib.sha256(train.read_bytes()).hexdigest()
    summary = json.loads(out.read_text())["summary"]
    file = summary["files"]["cmexam.csv"]
    assert (summary["n"], file["n"], file["n_trained_on"], file["others"]["n"]) == (3, 3, 2, 1)
    assert file["others"]["accuracy"] == float(result.predictions[1].correct)
    assert "training questions" not in evaluate_program("--data", exam, base=long_base)


def test_training_file_is_added_to_the_questions_of_the_adapter(evaluate_program, tmp_path, adapter_dir, rows_file):
    rows = [
        {"question": f"{word}?", "options": {"A": "yes", "B": "no"}, "answer": "A"} for word in ("gout", "flu", "flu 2")
    ]
    data, train, out = rows_file(*rows), rows_file(rows[1], name="train.jsonl"), tmp_path / "p.json"
    words = ["--data", data, "--train-questions", train, "--adapter", adapter_dir, "--out", out]
    printed = evaluate_program(*words)
    assert [p.trained_on for p in read_result(out).predictions] == [False, True, False]
    assert "does not record" not in printed


# --- answers of CMB ---


def test_answers_are_joined_to_the_one_file_of_cmb(evaluate_program, write, tmp_path, long_base, cmmlu):
    """One command evaluates CMB's test questions, CMExam and CMMLU."""
    questions = write("cmb.json", [{key: r[key] for key in ("id", "question", "option")} for r in CMB])
    answers = write("answers.json", [{"id": r["id"], "answer": r["answer"]} for r in CMB])
    exam, outs = write("cmexam.csv", CMEXAM), [tmp_path / "a.json", tmp_path / "b.json"]
    data = ["--data", questions, exam, cmmlu]
    evaluate_program(*data, "--out", outs[0], base=long_base)
    printed = evaluate_program(*data, "--answers", answers, "--out", outs[1], base=long_base)
    without, joined = (read_result(out) for out in outs)
    assert [p.answer for p in without.predictions] == ["", "", "A", "B", "A", "A", "B", "C"]
    assert [p.answer for p in joined.predictions] == ["A", "B", "A", "B", "A", "A", "B", "C"]
    assert "belong to no question" not in printed
    hashes = [[file["sha256"] for file in result.protocol["files"]] for result in (without, joined)]
    assert hashes[1][0] == hashlib.sha256(questions.read_bytes() + answers.read_bytes()).hexdigest()
    assert hashes[0][0] != hashes[1][0]
    assert hashes[0][1:] == hashes[1][1:] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (exam, cmmlu)]
    for files in ([exam], [questions, write("second.json", CMB)]):
        evaluate_program("--data", *files, "--answers", answers, base=long_base, error="--answers .* one")
