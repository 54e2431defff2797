import copy
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmark_files import ANATOMY
from paths import ROOT

from minidoctor.evaluate import evaluation, run, scoring
from minidoctor.evaluate.evaluation import evaluate
from minidoctor.evaluate.inputs import TRAINING_QUESTIONS, hash_adapter, read_training_hashes
from minidoctor.evaluate.records import read_result
from minidoctor.evaluate.summary import full_summary
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.ops.linear import join_projections
from minidoctor.questions.overlap import question_hash
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
    join_projections(adapted)  # as the program does, which rounds differently
    expected = [
        replace(p, file="one.jsonl") for p in evaluate(adapted, tokenizer, rows, show_progress=False).predictions
    ]
    expected[2:] = [replace(p, file="two.jsonl") for p in expected[2:]]
    assert read_result(out).predictions == expected
    assert result["summary"] == json.loads(json.dumps(asdict(full_summary(expected))))
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
    join_projections(model)  # as the program does, which rounds differently
    expected = evaluate(model, tokenizer, read_questions(path).rows, show_progress=False).predictions
    assert base.predictions == [replace(p, file=path.name) for p in expected]
    assert base.predictions != adapted.predictions
    assert base.protocol["adapter"] is None
    assert adapted.protocol["adapter"] == hash_adapter(adapter_dir)
    copy = shutil.copytree(adapter_dir, tmp_path / "copy")
    cached = tmp_path / "models--org--name"
    snapshot = shutil.copytree(adapter_dir, cached / "snapshots" / "0123abcd")
    write_tensors(snapshot / TRAINING_QUESTIONS, {"hashes": torch.tensor([5])})
    assert hash_adapter(cached) == hash_adapter(adapter_dir)
    assert read_training_hashes(str(cached)) == {5}
    (copy / "adapter_results.json").write_text("{}")  # not a file of the adapter
    assert hash_adapter(copy) == hash_adapter(adapter_dir)
    (copy / "adapter_model.bin").write_bytes(b"pickled")
    assert hash_adapter(copy) != hash_adapter(adapter_dir)
    (copy / "adapter_model.bin").unlink()
    tensors = {name: tensor + 1 for name, tensor in read_tensors(copy / "adapter.safetensors")}
    write_tensors(copy / "adapter.safetensors", tensors)
    assert hash_adapter(copy) != hash_adapter(adapter_dir)


@pytest.mark.parametrize(("opens_reasoning", "words"), [(True, []), (False, []), (True, ["--score", "logits"])])
def test_model_that_always_reasons_generates_unless_another_method_is_chosen(
    evaluate_program, cmmlu, tmp_path, long_base, monkeypatch, opens_reasoning, words
):
    load, out = run.load, tmp_path / "p.json"

    def load_reasoning(*arguments):
        model, tokenizer = load(*arguments)
        tokenizer.opens_reasoning = opens_reasoning
        return model, tokenizer

    monkeypatch.setattr(run, "load", load_reasoning)
    evaluate_program("--data", cmmlu, "--max-new-tokens", "2", "--out", out, *words, base=long_base)
    scoring = {p.scoring for p in read_result(out).predictions}
    assert scoring == {"generate" if opens_reasoning and not words else "logits"}


def test_all_methods_of_a_benchmark_are_in_the_result(evaluate_program, cmmlu, tmp_path, long_base):
    out = tmp_path / "p.json"
    evaluate_program("--data", cmmlu, "--score", "logits,sets,text,generate,loss", "--out", out, base=long_base)
    for p in read_result(out).predictions:
        best = max(p.scores, key=p.scores.get)
        assert (p.scoring, p.prediction, p.correct) == ("logits", best, best == p.answer)
        assert set(p.outcomes) == {"logits", "sets", "text", "text_per_character", "generate", "loss"}
        assert p.outcomes["loss"].nll > 0


def test_result_is_saved_once_a_minute(evaluate_program, tmp_path, rows_file, monkeypatch):
    monkeypatch.setattr(evaluation, "SAVE_INTERVAL", 0)
    saved = []
    monkeypatch.setattr(evaluation, "write_json", lambda path, content: saved.append(content["complete"]))
    evaluate_program("--data", rows_file(*ROWS[:2]), "--out", tmp_path / "p.json")
    assert saved == [False] * (len(saved) - 1) + [True]
    assert len(saved) > 3


def test_quantized_base_changes_the_scores_and_the_protocol(evaluate_program, tmp_path, rows_file):
    data, results = rows_file(*ROWS), {}
    for name in ("none", "nf4"):
        out = tmp_path / f"{name}.json"
        evaluate_program("--data", data, "--score", "text", "--quantize", name, "--out", out)
        results[name] = read_result(out)
    assert [results[name].protocol["dtype"] for name in results] == ["float32", "float32, nf4"]
    scores = [[p.scores for p in result.predictions] for result in results.values()]
    assert scores[0] != scores[1]
    printed = evaluate_program("--compare", *(tmp_path / f"{name}.json" for name in results))
    assert "dtype" in printed


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


def test_few_shot_examples_are_read_from_dev(evaluate_program, cmmlu, tmp_path, long_base, rows_file):
    out = tmp_path / "p.json"
    printed = evaluate_program("--data", cmmlu, "--shots", "1", "--out", out, base=long_base)
    prompt = next(iter(read_json(out)["protocol"]["first_prompts"].values()))
    assert prompt.startswith("以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n题目：痛风的主要检查是")
    assert prompt.endswith("答案是：A\n\n题目：痛风的关键检查是\nA. 尿酸\nB. 关节液\nC. 夜间咳嗽\nD. 风湿科\n答案是：")
    assert prompt in printed
    dev = tmp_path / "dev" / "anatomy.csv"
    evaluate_program("--data", dev, "--shots", "1", base=long_base, error="--dev")
    mixed = ["--data", cmmlu, rows_file(*ROWS[:2]), "--shots", "1"]  # one file's examples are not for the other
    evaluate_program(*mixed, base=long_base, error="next to .*; pass one with --dev")
    twice = evaluate_program("--data", cmmlu, cmmlu, "--limit", "1", base=long_base)
    assert twice.count("anatomy.csv: ") == 1


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
        for outcome in p["outcomes"].values():
            del outcome["unfinished"]  # as in the results of earlier versions
    result["protocol"] |= {"shots": 1, "files": [file | {"file": "x"} for file in result["protocol"]["files"]]}
    files[1].write_text(json.dumps(result))
    printed = evaluate_program("--compare", *files[:2])
    n_correct = sum(not p["correct"] for p in result["predictions"])
    assert f"only in a: {n_correct}, only in b: {3 - n_correct}" in printed
    assert "protocol: shots\n" in printed  # a renamed file with the same content is not a difference
    edited = copy.deepcopy(result)
    edited["predictions"][0]["prompt_sha256"] = "0" * 64
    edited["protocol"]["new"] = 1
    files[2].write_text(json.dumps(edited))
    assert "protocol: new, text of the prompts\n" in evaluate_program("--compare", files[1], files[2])
    files[2].unlink()
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
    assert result["protocol"]["files"][0]["sha256"] != read_json(first)["protocol"]["files"][0]["sha256"]
    monkeypatch.setattr("minidoctor.evaluate.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    words = ["--data", cmmlu, "--submission", tmp_path / "other.json"]
    evaluate_program(*words, base=long_base, error="CMB")


# --- input files ---


def test_malformed_rows_are_printed_and_stored(evaluate_program, cmmlu, tmp_path, long_base):
    cmmlu.write_text(ANATOMY + "3,痛风,尿酸,关节,夜间,呼吸,nan\n", encoding="utf-8")
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
        (["--compare", "a.json", "b.json"], "a.json: no such file"),
        (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_invalid_flags_are_rejected_in_one_line(evaluate_program, words, message, cmmlu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = words if {"--compare", "--data"} & set(words) else ["--data", cmmlu, *words]
    evaluate_program(*words, error=f"^evaluate: .*{message}.*\n$")


@pytest.mark.slow
def test_torchrun_gives_the_predictions_of_one_process(evaluate_program, tmp_path, base_dir, rows_file):
    data, outs = rows_file(*ROWS), [tmp_path / "one.json", tmp_path / "two.json"]
    evaluate_program("--data", data, "--out", outs[0])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "minidoctor.evaluate", "--base", base_dir, "--device", "cpu", "--data", data, "--out", outs[1]]
    result = subprocess.run([*launcher, *map(str, words)], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.count("not medical advice") == 1
    one, two = (read_result(out) for out in outs)
    assert two.complete
    assert [p.prediction for p in two.predictions] == [p.prediction for p in one.predictions]
    assert [p.outcomes.keys() for p in two.predictions] == [p.outcomes.keys() for p in one.predictions]


# --- outputs never replace a file ---


def test_existing_outputs_are_not_replaced(evaluate_program, tmp_path, rows_file, base_dir, adapter_dir):
    data, done = rows_file(*ROWS[:2]), tmp_path / "done.json"
    evaluate_program("--data", data, "--out", done)
    report = tmp_path / "report.json"
    report.write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "alias.json").symlink_to(report)
    paths = [data, done, report, tmp_path / "alias.json", tmp_path / "link" / "report.json"]
    paths += [tmp_path / "link" / ".." / tmp_path.name / "rows.jsonl", base_dir / "config.json"]
    paths += [adapter_dir / "adapter_config.json", adapter_dir / "adapter.safetensors"]
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        for words in (["--out", path], ["--out", path, "--resume"], ["--submission", path]):
            evaluate_program(
                "--data", data, "--adapter", adapter_dir, *words, error="exists|not a result|complete|not JSON|UTF-8"
            )
    assert {path: path.read_bytes() for path in paths} == before
    assert (tmp_path / "alias.json").is_symlink()


@pytest.mark.parametrize("alias", ["x.json", "./x.json", "link/x.json", "dangling.json", "../{name}/x.json"])
def test_out_and_submission_must_differ(evaluate_program, tmp_path, rows_file, monkeypatch, alias):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "x.json")
    words = ["--out", "x.json", "--submission", alias.format(name=tmp_path.name)]
    evaluate_program("--data", rows_file(*ROWS[:2]), *words, error="same path")
    assert not (tmp_path / "x.json").exists()


def test_symlink_of_an_unfinished_result_stays_a_link(evaluate_program, tmp_path, rows_file, monkeypatch):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    words = ["--data", rows_file(*ROWS[:2]), "--out", tmp_path / "link.json"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SCORERS", interrupted("logits", 1))
        evaluate_program(*words, error="interrupted")
    evaluate_program(*words, "--resume")
    assert (tmp_path / "link.json").is_symlink()
    assert read_result(tmp_path / "target.json").complete


# --- nothing computed is lost ---


def test_table_is_printed_although_the_result_cannot_be_written(evaluate_program, tmp_path, rows_file, monkeypatch):
    write_json, out = evaluation.write_json, tmp_path / "p.json"

    def full_disk(path, content):
        if content["summary"]["n"]:
            raise OSError("No space left on device")
        write_json(path, content)

    monkeypatch.setattr(evaluation, "write_json", full_disk)
    printed = evaluate_program("--data", rows_file(*ROWS[:2]), "--out", out, error="No space left")
    assert re.search(r"^all .* 2$", printed, re.MULTILINE)


def test_result_is_written_although_the_table_cannot_be_printed(evaluate_program, tmp_path, rows_file, monkeypatch):
    def broken_pipe(summary):
        raise BrokenPipeError("the reader of stdout has ended")

    monkeypatch.setattr(run, "format_summary", broken_pipe)
    evaluate_program("--data", rows_file(*ROWS[:2]), "--out", tmp_path / "p.json", error="stdout")
    assert read_result(tmp_path / "p.json").complete


def test_failed_submission_leaves_a_result_to_resume(evaluate_program, tmp_path, long_base, monkeypatch):
    question = {"id": 7, "question": "哪个科", "option": {"A": "风湿科", "B": "呼吸科"}}
    data, out, write_json = tmp_path / "q.json", tmp_path / "p.json", run.write_json
    data.write_text(json.dumps([question]), encoding="utf-8")

    def full_disk(path, content):
        if isinstance(content, list):
            raise OSError("No space left on device")
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", full_disk)
        words = ["--data", data, "--out", out, "--submission", tmp_path / "form.json"]
        evaluate_program(*words, base=long_base, error="No space left")
    assert read_result(out).predictions[0].prediction
    monkeypatch.setattr(evaluation, "SCORERS", interrupted("logits", 0))  # nothing may be computed again
    evaluate_program(*words, "--resume", base=long_base)
    assert read_json(tmp_path / "form.json")[0]["model_answer"] == read_result(out).predictions[0].prediction


def test_non_finite_checkpoint_ends_without_a_finished_result(evaluate_program, tmp_path, base_dir, rows_file):
    damaged, out = shutil.copytree(base_dir, tmp_path / "damaged"), tmp_path / "p.json"
    tensors = dict(read_tensors(base_dir / "model.safetensors"))
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    write_tensors(damaged / "model.safetensors", tensors, {"format": "pt"})
    for method in ("text", "generate"):
        words = ["--data", rows_file(*ROWS), "--score", method, "--out", out]
        printed = evaluate_program(*words, base=damaged, error=r"model\.layers\.1\.input_layernorm\.weight")
        assert not read_result(out).complete
        assert "0.0%" not in printed
        out.unlink()


def test_file_name_that_is_not_utf_8_survives(evaluate_program, tmp_path, rows_file, monkeypatch):
    directory = os.fsencode(tmp_path)
    data, out = (os.fsdecode(os.path.join(directory, name)) for name in (b"caf\xe9.jsonl", b"r\xe9sultat.json"))
    os.rename(rows_file(*ROWS[:2]), data)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SCORERS", interrupted("logits", 1))
        evaluate_program("--data", data, "--out", out, error="interrupted")
    evaluate_program("--data", data, "--out", out, "--resume")
    result = read_result(Path(out))
    assert result.complete
    assert {p.file for p in result.predictions} == {os.path.basename(data)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_questions_and_prompt_can_come_from_pipes(evaluate_program, tmp_path, cmmlu, long_base):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question}？\n{options}\n选：", encoding="utf-8")
    regular, piped = tmp_path / "regular.json", tmp_path / "piped.json"
    evaluate_program("--data", cmmlu, "--prompt", prompt, "--out", regular, base=long_base)
    pipes = []
    for source in (cmmlu, prompt):
        pipes.append(tmp_path / "pipes" / source.name)
        pipes[-1].parent.mkdir(exist_ok=True)
        os.mkfifo(pipes[-1])
        threading.Thread(target=pipes[-1].write_bytes, args=(source.read_bytes(),), daemon=True).start()
    evaluate_program("--data", pipes[0], "--prompt", pipes[1], "--out", piped, base=long_base)
    expected, actual = read_result(regular), read_result(piped)
    assert actual.predictions == expected.predictions
    assert actual.protocol["files"] == expected.protocol["files"]
    assert actual.protocol["files"][0]["sha256"] == hashlib.sha256(cmmlu.read_bytes()).hexdigest()


def test_resume_command_is_quoted(evaluate_program, tmp_path, rows_file, monkeypatch):
    (tmp_path / "my runs").mkdir()
    words = ["--data", rows_file(*ROWS[:2], name="a 'b'.jsonl"), "--out", tmp_path / "my runs" / "one.json"]
    monkeypatch.setattr(evaluation, "SCORERS", interrupted("logits", 0))
    for resume in ([], ["--resume"]):
        printed = evaluate_program(*words, *resume, error="interrupted")
        (command,) = re.findall(r"continue with: python -m minidoctor\.evaluate (.*)", printed)
        assert shlex.split(command)[4:] == [*map(str, words), "--resume"]


# --- questions that were trained on ---


def test_trained_questions_are_counted_per_file(evaluate_program, tmp_path, adapter_dir, rows_file):
    files = rows_file(*ROWS[:3], name="one.jsonl"), rows_file(*ROWS[3:], name="two.jsonl")
    words = ["--adapter", tmp_path / "run", "--data", *files, "--limit", "2"]
    adapter = shutil.copytree(adapter_dir, tmp_path / "run")
    printed = evaluate_program(*words, "--out", tmp_path / "unknown.json")
    assert "does not record its training questions" in printed
    assert read_json(tmp_path / "unknown.json")["summary"]["files"]["one.jsonl"]["n_trained_on"] is None
    rows = [row for file in files for row in read_questions(file).rows]
    hashes = torch.tensor([question_hash(rows[0]), question_hash(rows[2]), 12345])  # rows[2] is beyond --limit
    write_tensors(adapter / "training_questions.safetensors", {"hashes": hashes})
    printed = evaluate_program(*words, "--out", tmp_path / "p.json")
    assert "does not record" not in printed
    assert "one.jsonl: 1 of 2 questions occur in the training questions" in printed
    assert "two.jsonl: 0 of 2 questions occur in the training questions" in printed
    result = read_json(tmp_path / "p.json")
    assert [p["trained_on"] for p in result["predictions"]] == [True, False, False, False]
    one, two = (result["summary"]["files"][name] for name in ("one.jsonl", "two.jsonl"))
    assert (one["n"], one["n_trained_on"], two["n"], two["n_trained_on"]) == (2, 1, 2, 0)
    other = result["predictions"][1]["correct"]
    assert (one["others"]["accuracy"], one["others"]["n"]) == (float(other), 1)
    assert (two["others"]["n"], two["others"]["n_free_form"]) == (1, 1)
    assert "training questions" not in evaluate_program("--data", *files)  # no adapter, no note
    write_tensors(adapter / "training_questions.safetensors", {"hashes": hashes.float()})
    evaluate_program(*words, error="training_questions.safetensors: expected")


def test_files_of_the_same_name_are_counted_separately(evaluate_program, tmp_path, cmmlu, long_base):
    dev = tmp_path / "dev" / "anatomy.csv"
    evaluate_program("--data", cmmlu, dev, "--out", tmp_path / "p.json", base=long_base)
    files = read_json(tmp_path / "p.json")["summary"]["files"]
    assert {name: file["n"] for name, file in files.items()} == {str(cmmlu): 3, str(dev): 3}


def test_long_first_prompt_is_printed_in_part(evaluate_program, tmp_path, rows_file):
    text = "long " * 5000
    out = tmp_path / "predictions.json"
    printed = evaluate_program("--data", rows_file({**ROWS[0], "question": text}), "--score", "logits", "--out", out)
    assert len(printed) < 6000
    assert text.strip() not in printed
    assert "more characters" in printed
    [prompt] = read_json(out)["protocol"]["first_prompts"].values()
    assert text.strip() in prompt
