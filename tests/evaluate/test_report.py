import hashlib
import re
import shlex

import pytest

from minidoctor.evaluate import evaluation, scoring
from minidoctor.evaluate.records import read_result
from minidoctor.evaluate.report import command, format_report


def read_sections(path):
    """Return the content of each section without its indentation, after checking that all lines are indented."""
    text = path.read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.*)\n\n", text, flags=re.MULTILINE)
    lines = {title: part.rstrip("\n").split("\n") for title, part in zip(parts[::2], parts[1::2], strict=True)}
    assert all(line.startswith("    ") for part in lines.values() for line in part)
    return {title: "\n".join(line[4:] for line in part) for title, part in lines.items()}


def test_report_contains_protocol_table_prompts_and_hashes(evaluate_program, cmmlu, tmp_path, long_base, rows_file):
    own, out = rows_file({"question": "Gout?", "options": {"A": "yes", "B": "no"}, "answer": "A"}), tmp_path / "p.json"
    words = [
        "--data",
        cmmlu,
        own,
        "--dev",
        tmp_path / "dev",
        "--shots",
        "1",
        "--score",
        "logits,generate",
        "--max-new-tokens",
        "3",
    ]
    words += ["--out", out, "--report", tmp_path / "report"]
    printed = evaluate_program(*words, base=long_base)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.md"]
    sections, result = read_sections(tmp_path / "report" / "report.md"), read_result(out)
    assert shlex.split(sections["Command"])[:3] == ["python", "-m", "minidoctor.evaluate"]
    assert shlex.split(sections["Command"])[-len(words) :] == list(map(str, words))
    assert sections["Result"] in printed  # with intervals, trivial baselines and the shares of unanswered questions
    for phrase in ("95 % interval", "trivial baselines: chance", "unanswered", "unfinished", "(100.0%) generated"):
        assert phrase in sections["Result"]
    settings = dict(line.split(": ", 1) for line in sections["Protocol"].splitlines())
    assert (settings["base"], settings["shots"], settings["max_new_tokens"]) == ('"long_base"', "1", "3")
    assert settings["base_hash"] == f'"{result.protocol["base_hash"]}"'
    assert settings["subjects"] == '["anatomy"]'
    assert [line.split(": ")[0] for line in sections["Rules"].splitlines()] == list(result.protocol["rules"])
    assert sections["Rules"].startswith("headline: ")
    for exam, prompt in result.protocol["first_prompts"].items():
        assert sections[f"First prompt ({exam})"] == prompt.rstrip("\n")
    files = [line.split("  ", 1) for line in sections["SHA-256 of the files"].splitlines()]
    dev = tmp_path / "dev" / "anatomy.csv"
    assert [digest for digest, _ in files] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (cmmlu, own, dev)
    ]
    assert [text for _, text in files] == [
        "anatomy.csv (questions, 3 questions, 0 malformed)",
        "rows.jsonl (questions, 1 questions, 0 malformed)",
        "anatomy.csv (few-shot examples, 3 questions, 0 malformed)",
    ]


def test_prompt_cannot_end_its_section(evaluate_program, cmmlu, tmp_path, long_base):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("```\n## Result\n\n\x1b[2J{question}\n{options}\n```", encoding="utf-8")
    evaluate_program("--data", cmmlu, "--prompt", prompt, "--report", tmp_path / "report", base=long_base)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert re.findall("^## .*", text, re.MULTILINE).count("## Result") == 1
    assert "    ```\n    ## Result\n    \n    \\x1b[2J痛风" in text


def test_report_is_a_new_directory(evaluate_program, cmmlu, tmp_path, long_base, monkeypatch):
    monkeypatch.setattr("minidoctor.evaluate.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "old").mkdir()
    words = ["--data", cmmlu, "--report"]
    evaluate_program(*words, tmp_path / "old", base=long_base, error="--report .*old: already exists")
    evaluate_program(*words, tmp_path / "no" / "where", base=long_base, error="--report .*where: the directory")
    evaluate_program(*words, tmp_path / "x", "--out", tmp_path / "x", base=long_base, error="same path")
    evaluate_program(*words, tmp_path / "x", "--submission", tmp_path / "x", base=long_base, error="same path")
    assert list((tmp_path / "old").iterdir()) == []


def test_report_of_a_resumed_evaluation_has_the_command_without_resume(
    evaluate_program, cmmlu, tmp_path, long_base, monkeypatch
):
    words = ["--data", cmmlu, "--out", tmp_path / "it's.json", "--report", tmp_path / "my report"]

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SCORERS", {**scoring.SCORERS, "logits": stopped})
        evaluate_program(*words, base=long_base, error="interrupted")
    assert not (tmp_path / "my report").exists()
    evaluate_program(*words, "--resume", base=long_base)
    printed = read_sections(tmp_path / "my report" / "report.md")["Command"]
    assert shlex.split(printed)[-len(words) :] == list(map(str, words))


def test_several_processes_resume_with_torchrun(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--out", "my runs.json"])
    words = ["torchrun", "--nproc-per-node", "4", "-m", "minidoctor.evaluate", "--out", "my runs.json", "--resume"]
    assert shlex.split(command(4, resume=True)) == words


def test_every_setting_of_a_protocol_is_in_the_page():
    protocol = {
        "base": "b\x07",
        "rules": {"a": "b"},
        "first_prompts": {},
        "files": [],
        "dev": [],
        "train_questions": [],
    }
    page = format_report(protocol | {"limit": 3, "score": ["sets", "logits"]}, "table")
    assert page.startswith("# Evaluation of b\\x07\n")
    assert '    limit: 3\n    score: ["sets", "logits"]\n' in page
