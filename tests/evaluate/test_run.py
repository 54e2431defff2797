import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch

from minidoctor.evaluate import evaluation, scoring
from minidoctor.evaluate.__main__ import main
from minidoctor.evaluate.evaluation import evaluate
from minidoctor.evaluate.records import read_result
from minidoctor.evaluate.summary import full_summary
from minidoctor.questions.read import read_questions

ROWS = [
    {
        "id": "test-gout",
        "question": "Which test confirms gout?",
        "options": {"A": "uric acid in the joint fluid", "B": "a cough at night", "C": "pneumology"},
        "answer": "A",
    },
    {"question": "痛风属于哪个科？", "options": {"A": "呼吸科", "B": "风湿科", "C": "关节"}, "answer": "B"},
    {"question": "Where is asthma treated?", "answer": "pneumology"},
    {
        "question": "Which are symptoms of asthma?",
        "options": {"A": "wheezing", "B": "gout", "C": "a cough"},
        "answer": "AC",
    },
    {"question": "哮喘的典型症状是什么？", "answer": "喘息和夜间咳嗽"},
]
CMMLU = """,Question,A,B,C,D,Answer
0,痛风的关键检查是,尿酸,关节液,夜间咳嗽,风湿科,A
1,哮喘属于哪个科,风湿科,呼吸科,关节,夜间,B
2,痛风属于哪个科,夜间,关节,风湿科,呼吸科,C
"""


@pytest.fixture
def evaluate_program(program, base_dir):
    """Run the program with these words and return what it printed; with an exit code, stderr must match it."""

    def run(*words, base=base_dir, error=None):
        words = words if words[0] == "--compare" else ("--base", base, "--device", "cpu", *words)
        code, out, err = program(main, "evaluate", *words)
        assert (code != 0) == (error is not None), err
        if error:
            assert re.search(error, err), err
        return out

    return run


@pytest.fixture
def long_base(base_dir, tmp_path):
    """The base with a context for the prompts of the benchmarks, which its tokenizer encodes byte by byte."""
    directory = shutil.copytree(base_dir, tmp_path / "long_base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return directory


@pytest.fixture
def cmmlu(tmp_path):
    """test/anatomy.csv, and dev/anatomy.csv with other questions."""
    for name, text in (("test", CMMLU), ("dev", CMMLU.replace("哪个科", "什么科").replace("关键", "主要"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anatomy.csv").write_text(text, encoding="utf-8")
    return tmp_path / "test" / "anatomy.csv"


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# --- results ---


def test_result_file_contains_predictions_and_their_summary(
    evaluate_program, tmp_path, adapter_dir, adapted, tokenizer, rows_file
):
    files = rows_file(*ROWS[:2], name="one.jsonl"), rows_file(*ROWS[2:], name="two.jsonl")
    out = tmp_path / "predictions.json"
    printed = evaluate_program("--adapter", adapter_dir, "--data", *files, "--out", out)
    result = read_json(out)
    assert set(result) == {"complete", "protocol", "summary", "predictions"}
    assert result["complete"] is True
    assert {"accuracy", "n", "nll", "languages"} <= set(result["summary"])
    assert all({"accuracy", "n", "nll"} <= set(group) for group in result["summary"]["languages"].values())
    for prediction in result["predictions"]:
        assert {"id", "prediction", "answer", "correct", "scores"} <= set(prediction)
    rows = [row for file in files for row in read_questions(file).rows]
    expected = evaluate(adapted, tokenizer, rows, show_progress=False)
    assert read_result(out).predictions == expected.predictions
    assert full_summary(read_result(out).predictions) == expected.summary
    assert result["summary"] == json.loads(json.dumps(asdict(expected.summary)))
    prompt = rows[0].messages[0]["content"]
    assert next(iter(result["protocol"]["first_prompts"].values())) == prompt
    assert prompt in printed
    groups = [line.split()[0] for line in printed.splitlines() if re.match("(all|en|zh) ", line)]
    assert list(dict.fromkeys(groups)) == ["all", "en", "zh"]


def test_adapter_changes_the_predictions(evaluate_program, tmp_path, adapter_dir, model, tokenizer, rows_file):
    path, outs = rows_file(*ROWS[:3]), [tmp_path / "base.json", tmp_path / "adapter.json"]
    evaluate_program("--data", path, "--out", outs[0])
    evaluate_program("--data", path, "--out", outs[1], "--adapter", adapter_dir)
    base, adapted = (read_result(out) for out in outs)
    assert base.predictions == evaluate(model, tokenizer, read_questions(path).rows, show_progress=False).predictions
    assert base.predictions != adapted.predictions
    assert base.protocol["adapter"] is None
    assert adapted.protocol["adapter"]


def test_all_methods_of_a_benchmark_are_in_the_result(evaluate_program, cmmlu, tmp_path, long_base):
    out = tmp_path / "p.json"
    evaluate_program("--data", cmmlu, "--score", "logits,text,generate,loss", "--out", out, base=long_base)
    for p in read_result(out).predictions:
        best = max(p.scores, key=p.scores.get)
        assert (p.scoring, p.prediction, p.correct) == ("logits", best, best == p.answer)
        assert set(p.outcomes) == {"logits", "text", "text_per_character", "generate", "loss"}
        assert p.outcomes["loss"].nll > 0


def test_result_is_saved_once_a_minute(evaluate_program, tmp_path, rows_file, monkeypatch):
    monkeypatch.setattr(evaluation, "SAVE_INTERVAL", 0)
    saved = []
    monkeypatch.setattr("minidoctor.evaluate.run.write_json", lambda path, content: saved.append(content["complete"]))
    evaluate_program("--data", rows_file(*ROWS[:2]), "--out", tmp_path / "p.json")
    assert saved == [False] * (len(saved) - 1) + [True]
    assert len(saved) > 3


# --- resume ---


def interrupted(method, n):
    """Return the scorers, with one that Ctrl-C interrupts after n questions."""
    scorer = scoring.SCORERS[method]

    def stopped(*arguments):
        for number, outcome in enumerate(scorer(*arguments)):
            if number == n:
                raise KeyboardInterrupt
            yield outcome

    return {**scoring.SCORERS, method: stopped}


@pytest.mark.parametrize(("method", "n_done"), [("text", 1), ("logits", 2), ("loss", 3), ("generate", 0)])
def test_interrupted_evaluation_resumes_with_the_missing_questions(
    evaluate_program, tmp_path, rows_file, monkeypatch, method, n_done
):
    data, whole, out = rows_file(*ROWS), tmp_path / "whole.json", tmp_path / "part.json"
    words = ["--data", data, "--batch-size", "1"]
    evaluate_program(*words, "--out", whole)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SCORERS", interrupted(method, n_done))
        printed = evaluate_program(*words, "--out", out, error="interrupted")
    part = read_result(out)
    assert not part.complete
    assert "--resume" in printed
    evaluate_program(*words, "--out", out, error="--resume")
    evaluate_program(*words, "--prompt", "huatuo", "--out", out, "--resume", error="prompt 'auto'")
    assert sum(method in p.outcomes for p in part.predictions) == n_done
    asked = []
    scorer = scoring.SCORERS[method]

    def counted(model, prompter, questions):
        asked.extend(questions)
        return scorer(model, prompter, questions)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SCORERS", {**scoring.SCORERS, method: counted})
        evaluate_program(*words, "--out", out, "--resume")
    assert len(asked) == {"generate": 2, "loss": 5}.get(method, 3) - n_done
    resumed, expected = read_result(out), read_result(whole)
    assert resumed.complete
    assert resumed.protocol == expected.protocol
    for p, q in zip(resumed.predictions, expected.predictions, strict=True):
        assert p.prediction == q.prediction
        assert p.outcomes.keys() == q.outcomes.keys()
        for name, outcome in p.outcomes.items():
            # Not bit for bit: fewer questions share a longer prefix.
            torch.testing.assert_close(outcome.scores, q.outcomes[name].scores, rtol=1e-5, atol=1e-5)
            assert outcome.reply == q.outcomes[name].reply


# --- prompts ---


def test_few_shot_examples_are_read_from_dev(evaluate_program, cmmlu, tmp_path, long_base):
    out = tmp_path / "p.json"
    printed = evaluate_program("--data", cmmlu, "--shots", "1", "--out", out, base=long_base)
    prompt = next(iter(read_json(out)["protocol"]["first_prompts"].values()))
    assert prompt.startswith("以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n题目：痛风的主要检查是")
    assert prompt.endswith("答案是：A\n\n题目：痛风的关键检查是\nA. 尿酸\nB. 关节液\nC. 夜间咳嗽\nD. 风湿科\n答案是：")
    assert prompt in printed
    dev = tmp_path / "dev" / "anatomy.csv"
    evaluate_program("--data", dev, "--shots", "1", base=long_base, error="--dev")


def test_prompt_file_changes_prompts_and_their_hashes(evaluate_program, cmmlu, tmp_path, long_base):
    hashes = []
    for name, text in (("1", "{question}？\n{options}\n选："), ("2", "{question}！\n{options}\n选：")):
        prompt, out = tmp_path / f"{name}.txt", tmp_path / f"{name}.json"
        prompt.write_text(text, encoding="utf-8")
        evaluate_program("--data", cmmlu, "--prompt", prompt, "--out", out, "--raw", base=long_base)
        result = read_result(out)
        assert next(iter(result.protocol["first_prompts"].values())) == text.format(
            question="痛风的关键检查是", options="A. 尿酸\nB. 关节液\nC. 夜间咳嗽\nD. 风湿科"
        )
        hashes += [p.prompt_sha256 for p in result.predictions]
    assert len(set(hashes)) == 6


# --- comparison ---


def test_two_results_are_compared_in_pairs(evaluate_program, cmmlu, tmp_path, long_base, rows_file):
    files = [tmp_path / f"{name}.json" for name in "abc"]
    evaluate_program("--data", cmmlu, "--out", files[0], base=long_base)
    result = read_json(files[0])
    for p in result["predictions"]:
        p["correct"] = not p["correct"]
    result["protocol"] |= {"shots": 1, "files": [file | {"file": "x"} for file in result["protocol"]["files"]]}
    files[1].write_text(json.dumps(result))
    printed = evaluate_program("--compare", *files[:2])
    n_correct = sum(not p["correct"] for p in result["predictions"])
    assert f"only in a: {n_correct}, only in b: {3 - n_correct}" in printed
    assert "protocol: shots\n" in printed  # a renamed file with the same content is not a difference
    evaluate_program("--data", rows_file(*ROWS[:2]), "--out", files[2], base=long_base)
    evaluate_program("--compare", files[0], files[2], error="same questions")
    files[1].write_text(json.dumps(result | {"complete": False}))
    evaluate_program("--compare", *files[:2], error=f"{files[1]}: an unfinished")
    files[1].write_text("{}")
    evaluate_program("--compare", *files[:2], error=f"{files[1]}: not a result")


# --- CMB's submission form ---


def test_submission_contains_the_predictions_of_cmb(evaluate_program, tmp_path, long_base, cmmlu, monkeypatch):
    exam = {"exam_type": "医师考试", "exam_class": "执业医师", "question": "哪个科"}
    exam |= {"option": {"A": "风湿科", "B": "呼吸科", "C": "关节", "D": ""}}
    questions = [exam | {"id": i, "question_type": kind} for i, kind in ((7, "单项选择题"), (8, "多项选择题"))]
    data, answers, form = tmp_path / "q.json", tmp_path / "a.json", tmp_path / "form.json"
    data.write_text(json.dumps(questions, ensure_ascii=False), encoding="utf-8")
    answers.write_text(json.dumps([{"id": 7, "answer": "A"}, {"id": 8, "answer": "AB"}]), encoding="utf-8")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    printed = evaluate_program("--data", data, "--submission", form, "--out", first, base=long_base)
    predictions = read_result(first).predictions
    assert read_json(form) == [
        {"id": i, "model_answer": p.prediction} for i, p in zip((7, 8), predictions, strict=True)
    ]
    assert [p.correct for p in predictions] == [None, None]
    assert "2 questions have no known answer" in printed
    evaluate_program("--data", data, "--answers", answers, "--out", second, base=long_base)
    result = read_json(second)
    assert [p["prediction"] for p in result["predictions"]] == [p.prediction for p in predictions]
    assert (result["summary"]["n"], result["summary"]["multiple_answers"]["n"]) == (2, 1)
    assert list(result["summary"]["exams"]["cmb"]["parts"]) == ["医师考试"]
    monkeypatch.setattr("minidoctor.evaluate.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    words = ["--data", cmmlu, "--submission", tmp_path / "other.json"]
    evaluate_program(*words, base=long_base, error="CMB")


# --- input files ---


def test_malformed_rows_are_printed_and_stored(evaluate_program, cmmlu, tmp_path, long_base):
    cmmlu.write_text(CMMLU + "3,痛风,尿酸,关节,夜间,呼吸,nan\n", encoding="utf-8")
    out = tmp_path / "p.json"
    printed = evaluate_program("--data", cmmlu, "--out", out, "--limit", "2", base=long_base)
    (file,) = read_json(out)["protocol"]["files"]
    assert (file["questions"], len(file["malformed"])) == (3, 1)
    assert re.search(r"anatomy\.csv:5: .*nan", printed)
    assert "3 questions, 1 malformed" in printed
    assert len(read_json(out)["predictions"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "letters"], "score must be some of auto, logits"),
        (["--score", "loss"], "score must begin"),
        (["--score", "text,text"], "score must list each method once"),
        (["--score", "text,loss", "--raw"], "--raw"),
        (["--score", "text", "--shots", "1"], "--shots"),
        (["--shots", "-1"], "shots must be at least 0"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--limit", "-1"], "limit must be at least 0"),
        (["--limit", "1", "--submission", "s.json"], "--submission"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "p.json"], "p.json: no such file"),
        (["--out", "nowhere/p.json"], "nowhere/p.json"),
        (["--prompt", "nowhere.txt"], "nowhere.txt"),
        (["--answers", "a.json", "--data", "a.json", "b.json"], "--answers"),
        (["--compare", "a.json", "b.json"], "a.json: no such file"),
        (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_invalid_flags_are_rejected_in_one_line(evaluate_program, words, message, cmmlu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = words if {"--compare", "--data"} & set(words) else ["--data", cmmlu, *words]
    evaluate_program(*words, error=f"^evaluate: .*{message}.*\n$")
