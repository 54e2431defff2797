import json
import shutil
import sys
import xml.etree.ElementTree as ET

import pytest

from minidoctor.checkpoints.adapters import ADAPTER, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import TARGETS, AdapterConfig
from minidoctor.files.safetensors import write_tensors
from minidoctor.model import adapter_state
from minidoctor.picture import __main__ as picture
from minidoctor.questions.json_rows import parse_row

ROWS = [
    {"question": "gout?", "answer": "A", "options": {"A": "uric acid", "B": "a cough"}, "topic": "joints"},
    {"question": "The key test for gout?", "answer": "uric acid in the joint fluid", "topic": "joints"},
    {"question": "痛风的关键检查？", "answer": "关节液中的尿酸", "topic": "joints"},
    {"question": "asthma, at night?", "answer": "wheezing and a cough", "topic": r"$\frac{lungs$"},
]
METRICS = [{"step": i, "loss": 3.0 / (i + 1), "lm": 2.5 / (i + 1), "balance": 1.1} for i in range(5)]


@pytest.fixture
def run_dir(tmp_path, adapter_dir):
    directory = shutil.copytree(adapter_dir, tmp_path / "run")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    return directory


@pytest.fixture
def draw(program, tmp_path, base_dir, run_dir, rows_file):
    """Run the program into tmp_path/pictures and return exit code, stdout and stderr."""

    def draw(*words, rows=ROWS):
        defaults = ["--run", run_dir, "--base", base_dir, "--data", rows_file(*rows), "--device", "cpu"]
        return program(picture.main, "picture.py", tmp_path / "pictures", *defaults, *words)

    return draw


@pytest.fixture
def plots():
    return pytest.importorskip("minidoctor.picture.plots")


def test_program_writes_and_lists_all_plots(plots, draw, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "GLYPHS", {*range(128)})
    out = tmp_path / "pictures"
    out.mkdir()
    (out / "notes.txt").write_text("a note")
    (out / "load.png").write_text("an earlier plot")
    code, printed, errors = draw()
    names = ["loss", "load", "topics", "sentence"]
    assert (code, printed) == (0, "".join(f"{out / name}.png  {out / name}.svg\n" for name in names))
    assert errors.count("\n") == 1
    assert "no zh sentence" in errors
    files = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {*files, "notes.txt"}
    assert (out / "notes.txt").read_text() == "a note"
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("svg")


def test_layer_selects_the_sublayer_of_the_sentence_plot(plots, draw, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda *_: [])
    monkeypatch.setattr(
        plots, "sentence_figure", lambda sentences, model, sublayer: drawn.append((sentences, sublayer))
    )
    assert draw()[0] == draw("--layer", 0)[0] == 0
    (last, last_sublayer), (first, first_sublayer) = drawn
    assert (last_sublayer, first_sublayer) == (3, 1)
    assert last["en"] != first["en"]
    assert [text.text for text in last["en"]] == [text.text for text in first["en"]]


def test_example_is_the_first_question_preferably_free_form(adapted, tokenizer):
    rows = [parse_row(row, str(i)) for i, row in enumerate(ROWS)]
    assert [picture.example(rows, language) for language in ("en", "zh")] == rows[1:3]
    assert picture.example(rows[:1], "en") == rows[0]
    assert picture.example(rows[:1], "zh") is None
    texts = picture.routed_example(adapted, tokenizer, rows[1], 3)
    displayed = "".join(text.text for text in texts).replace(" ", "")
    assert displayed == "Thekeytestforgout?<|assistant|>uricacidinthejointfluid"


def test_bad_input_is_reported_in_one_line_before_anything_is_written(plots, draw, base_dir, run_dir, tmp_path):
    plain_lora = tmp_path / "lora"
    adapter = AdapterConfig(n_experts=1, rank=2, targets=tuple(TARGETS))
    save_adapter_config(plain_lora, str(base_dir), adapter)
    write_tensors(plain_lora / ADAPTER, adapter_state(load_model(base_dir, adapter=adapter)))
    shutil.copy(run_dir / "metrics.jsonl", plain_lora)
    cases = [
        (["--run", tmp_path / "nowhere"], "nowhere/metrics.jsonl"),
        (["--run", plain_lora], "no router"),
        (["--layer", 2], "--layer"),
        (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
    ]
    metrics = {
        "": "no steps",
        "{}": '"step" and "loss"',
        "[]": '"step" and "loss"',
        '{"step": 0, "loss": 1, "lm": "x"}': "metrics.jsonl:1: lm",
        '{"step": 0, "loss": NaN}': "metrics.jsonl:1: loss",
        '{"step": 0, "loss": 1, "loss": 2}': "metrics.jsonl:1: key 'loss'",
        "{": "metrics.jsonl:1: not JSON",
    }
    for i, (content, message) in enumerate(metrics.items()):
        broken = shutil.copytree(run_dir, tmp_path / f"broken{i}")
        (broken / "metrics.jsonl").write_text(content)
        cases.append((["--run", broken], message))
    for words, message in cases:
        code, out, errors = draw(*words)
        assert (code, out) == (2, ""), words
        assert message in errors
        assert errors.startswith("picture.py: ")
        assert errors.count("\n") == 1
    assert not (tmp_path / "pictures").exists()


def test_a_plot_that_fails_does_not_lose_the_plots_before_it(plots, draw, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("from a student's edit")

    monkeypatch.setattr(plots, "topics_figure", fail)
    with pytest.raises(RuntimeError):
        draw()
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"loss.png", "loss.svg", "load.png", "load.svg"}


def test_missing_matplotlib_is_reported_with_the_install_command(draw, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, errors = draw()
    assert (code, out) == (2, "")
    assert "matplotlib" in errors
    assert 'pip install -e ".[pictures]"' in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "pictures").exists()
