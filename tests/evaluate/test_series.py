"""The commands of the page for the HuatuoGPT series, each run on a tiny checkpoint in the published layout."""

import json
import re
import shlex

import pytest
from benchmark_files import ANATOMY, CMB, CMEXAM, HEADERS, format_csv
from paths import ROOT
from published_layouts import write_layout

from minidoctor.evaluate.__main__ import main
from minidoctor.evaluate.records import read_result
from minidoctor.questions.exams import SUBJECTS

PAGE = (ROOT / "minidoctor" / "evaluate" / "README.md").read_text(encoding="utf-8")


def read_commands():
    """Return the words of each command in the section on the series, by the name of its checkpoint."""
    (section,) = re.findall(r"^## The HuatuoGPT series\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assignment, *lines = block.splitlines()
    variable, data = assignment.split("=", 1)
    commands = [shlex.split(line.replace(f"${variable}", *shlex.split(data))) for line in lines]
    return {words[words.index("--base") + 1]: words for words in commands}


COMMANDS = read_commands()


@pytest.fixture
def benchmark_directory(tmp_path, monkeypatch):
    """A working directory with small files under the names in the commands."""
    monkeypatch.chdir(tmp_path)
    questions = [
        {key: value for key, value in record.items() if key != "answer"} | {"id": i} for i, record in enumerate(CMB)
    ]
    answers = [{"id": i, "answer": record["answer"]} for i, record in enumerate(CMB)]
    (tmp_path / "CMB-test-choice-question-merge.json").write_text(json.dumps(questions))
    (tmp_path / "CMB-test-choice-answer.json").write_text(json.dumps(answers))
    (tmp_path / "CMB-train.json").write_text(json.dumps(CMB))
    for directory in ("CMExam", "cmmlu", "cmmlu/test"):
        (tmp_path / directory).mkdir()
    (tmp_path / "CMExam" / "test.csv").write_text(format_csv(HEADERS["cmexam"], CMEXAM), encoding="utf-8")
    for subject in SUBJECTS:
        (tmp_path / "cmmlu" / "test" / f"{subject}.csv").write_text(ANATOMY, encoding="utf-8")
    return tmp_path


def test_page_has_a_command_for_each_of_four_checkpoints():
    assert list(COMMANDS) == ["HuatuoGPT2-7B", "HuatuoGPT2-13B", "HuatuoGPT-o1-7B", "HuatuoGPT-o1-8B"]
    assert all(words[:3] == ["python", "-m", "minidoctor.evaluate"] for words in COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_of_the_page_runs_on_a_checkpoint_of_that_layout(
    name, benchmark_directory, program, train_sentencepiece
):
    reasons = "o1" in name
    if reasons:
        pytest.importorskip("tokenizers")
    write_layout(benchmark_directory / name, name, train_sentencepiece())
    words = COMMANDS[name]
    code, printed, error = program(main, "evaluate", *words[3:], "--device", "cpu", "--limit", "1")
    assert code == 0, error
    result = read_result(benchmark_directory / words[words.index("--out") + 1])
    assert result.complete
    assert [p.exam for p in result.predictions] == ["cmb", "cmexam"] + ["cmmlu"] * 7
    assert {p.scoring for p in result.predictions} == {"generate"}
    assert all(p.outcomes["generate"].reply is not None and p.correct is not None for p in result.predictions)
    protocol = result.protocol
    assert protocol["chat_format"] == {"o1-7B": "chatml", "o1-8B": "llama3.1"}.get(name[-5:], "huatuo")
    assert (protocol["thinking"], protocol["max_new_tokens"]) == (reasons, 2048 if reasons else 768)
    start = "Please answer the following multiple-choice question:\n" if reasons else "请回答下面选择题。\n"
    assert all(prompt.startswith(start) for prompt in protocol["first_prompts"].values())
    assert "7 subjects of CMMLU (apollo)" in printed
    report = benchmark_directory / words[words.index("--report") + 1] / "report.md"
    assert shlex.join(words) in report.read_text(encoding="utf-8")
