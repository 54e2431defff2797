import json
import shutil
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from importlib import import_module
from itertools import pairwise

import pytest
import torch

from minidoctor.checkpoints.adapters import ADAPTER, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import AdapterConfig
from minidoctor.files.safetensors import write_tensors
from minidoctor.model import adapter_state
from minidoctor.picture import __main__ as picture
from minidoctor.picture.statistics import Top1, top1_experts
from minidoctor.picture.terminal import BACKGROUNDS, RoutedText
from minidoctor.questions.json_rows import parse_row

ROWS = [
    {"question": "gout?", "answer": "A", "options": {"A": "uric acid", "B": "a cough"}, "topic": "joints"},
    {"question": "The key test for gout?", "answer": "uric acid in the joint fluid", "topic": "joints"},
    {"question": "痛风的关键检查？", "answer": "关节液中的尿酸", "topic": "joints"},
    {"question": "asthma, at night?", "answer": "wheezing and a cough", "topic": "lungs"},
    {"question": "哮喘的典型症状？", "answer": "喘息", "topic": "lungs"},
]
METRICS = [{"step": i, "loss": 3.0 / (i + 1), "lm": 2.5 / (i + 1), "balance": 1.1, "contrast": 6.0} for i in range(80)]


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    return import_module("minidoctor.picture.plots")


@pytest.fixture
def run_dir(tmp_path, adapter_dir):
    directory = shutil.copytree(adapter_dir, tmp_path / "run")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    return directory


@pytest.fixture
def draw(monkeypatch, program, tmp_path, base_dir, run_dir, rows_file):
    """Runs the program into tmp_path/pictures; returns exit code, stdout and stderr."""
    monkeypatch.setattr(picture, "TOKENS", (1024, 2048))

    def draw(*words, rows=ROWS):
        defaults = ["--run", run_dir, "--base", base_dir, "--data", rows_file(*rows), "--device", "cpu"]
        return program(picture.main, "picture.py", tmp_path / "pictures", *defaults, *words)

    return draw


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_all_pictures_are_written_and_said(figures, draw, tmp_path, monkeypatch):
    font = figures.font_for("gout")
    monkeypatch.setattr(figures, "font_for", lambda text: font if text.isascii() else None)
    out = tmp_path / "pictures"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "load.png").write_text("old")
    code, said, err = draw()
    names = ["loss", "load", "topics", "sentence", "memory"]
    assert (code, said) == (0, "".join(f"{out / name}.png  {out / name}.svg\n" for name in names))
    assert err == "sentence: nothing in Chinese, no font of this machine has its characters\n"
    kinds = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert {path.name for path in out.iterdir()} == {*kinds, "notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_same_picture_is_the_same_file(figures, tmp_path):
    from matplotlib import rc_context

    contents = []
    for _ in range(2):
        with rc_context(figures.STYLE):
            paths = figures.save(figures.load_figure(torch.full((1, 4), 0.25), ["layer 0"]), tmp_path, "load")
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]


def test_drawing_leaves_pyplot_alone(figures, draw):
    """It would choose a window and keep every figure."""
    before = set(sys.modules)
    assert draw("--layer", 0, rows=ROWS[1:2])[0] == 0
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_losses_are_drawn_as_logged_and_averaged(figures):
    axes = figures.loss_figure(METRICS).axes
    assert [part.get_yscale() for part in axes] == ["log", "log", "linear", "linear"]
    for part, name in zip(axes, ("loss", "lm", "balance", "contrast"), strict=True):
        steps, mean = part.lines
        assert list(steps.get_xdata()) == list(range(1, 81))
        assert list(steps.get_ydata()) == [row[name] for row in METRICS]
        assert mean.get_ydata()[0] == METRICS[0][name]
        assert mean.get_ydata()[50] == pytest.approx((METRICS[49][name] + METRICS[50][name]) / 2)
    marks = [label.get_text() for label in (*axes[0].get_yticklabels(), *axes[0].get_yticklabels(minor=True))]
    assert {"0.05", "0.1", "1", "2"} <= set(marks)
    assert not any("10^" in mark for mark in marks)
    without = [{"step": row["step"], "loss": row["loss"], "lm": row["lm"]} for row in METRICS]
    assert len(figures.loss_figure(without).axes) == 2


def test_the_load_is_drawn_layer_by_layer(figures, adapted, tokenizer):
    found = top1_experts(adapted, tokenizer, [parse_row(row, str(i)) for i, row in enumerate(ROWS)])
    load = picture.expert_load(found, 4)
    names = ["layer 0 attention", "layer 0 feed-forward", "layer 1 attention", "layer 1 feed-forward"]
    axes = figures.load_figure(load, names).axes[0]
    counted = [[ids.count(e) / len(ids) for e in range(4)] for ids in found.expert_ids.tolist()]
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), torch.tensor(counted).double())
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert texts(axes) == [f"{share:.0%}" for line in counted for share in line]
    assert len({tuple(line) for line in counted}) > 1


def test_lift_is_what_counting_gives():
    torch.manual_seed(0)
    labels = ["a", "b", "c", "b", "a"]
    found = Top1(torch.randint(0, 4, (1, 400)), torch.randint(0, 5, (400,)))
    found.expert_ids[found.expert_ids == 3] = 2
    found.expert_ids[0, 0] = 3  # one token alone: too few
    pairs = Counter(zip(found.expert_ids[0].tolist(), [labels[q] for q in found.question.tolist()], strict=True))
    lift = picture.lift(found, labels, 4)  # (J, E)
    for j, label in enumerate("abc"):
        of_label = sum(n for (_, name), n in pairs.items() if name == label)
        for e in range(3):
            of_expert = sum(n for (expert, _), n in pairs.items() if expert == e)
            assert lift[j, e].item() == pytest.approx((pairs[e, label] / of_expert) / (of_label / 400))
        assert lift[j, 3].isnan()


def test_the_sublayer_that_tells_most_is_drawn(figures, adapted, monkeypatch):
    rows = [parse_row({"question": "gout?", "answer": "x", "topic": "ab"[i % 2]}, str(i)) for i in range(60)]
    question = torch.arange(60).repeat_interleave(2)
    blind = torch.randint(0, 4, (4, 120))
    blind[2] = torch.where(question % 2 == 0, 3, 1)  # the topic itself
    found = Top1(blind, question)
    assert picture.most_telling(found, [row.topic for row in rows], 4) == 2
    figure = picture.topics_picture(found, rows, adapted)
    title = figure.get_suptitle()
    assert title.startswith("The first expert in layer 1 attention tells\n1.00 bits about the topic (0.0")
    assert "language" not in title  # there is one
    assert texts(figure.axes[0]) == ["", "0.0", "", "2.0", "", "2.0", "", "0.0"]
    one = [parse_row({"question": "gout?", "answer": "x"}, str(i)) for i in range(60)]
    assert picture.topics_picture(found, one, adapted) is None


def test_the_sentences_are_the_first_open_questions_of_each_language(adapted, tokenizer):
    rows = [parse_row(row, str(i)) for i, row in enumerate(ROWS)]
    assert [picture.example(rows, language) for language in ("en", "zh")] == rows[1:3]
    assert picture.example(rows[:1], "en") == rows[0]
    assert picture.example(rows[:1], "zh") is None
    pieces = picture.sentence(adapted, tokenizer, rows[1], 3)
    shown = "".join(piece.text for piece in pieces).replace(" ", "")
    assert shown == "Thekeytestforgout?<|assistant|>uricacidinthejointfluid"


def test_boxes_have_the_colour_and_letter_of_their_expert_and_stay_in_the_picture(figures):
    from matplotlib.colors import to_hex

    words = ["What", " is", " $gout$?", " ", "\\n", "龘", "W" * 20] * 6
    pieces = [RoutedText(word, (i % 10, 9) if word == "龘" else (i % 10,)) for i, word in enumerate(words)]
    font = figures.font_for("gout")
    axes = figures.sentence_figure([(pieces, font)], 10, "title").axes[0]
    title, *written = texts(axes)
    boxes = [patch for patch in axes.patches if patch.get_width()]
    assert title == "title"
    expected = []
    for text, experts in pieces:
        expected += [(text.strip(), experts[-1]), *(("ABCDEFGHIJ"[e], e) for e in experts)]
    assert written == [text for text, _ in expected]
    assert [to_hex(box.get_facecolor()) for box in boxes] == [figures.PALETTE[e % 8] for _, e in expected]
    for box, text in zip(boxes, axes.texts[1:], strict=True):
        assert box.get_x() < text.get_position()[0] < box.get_x() + box.get_width()
        assert text.get_color() == figures.readable_on(box.get_facecolor())
    assert not any(text.get_parse_math() for text in axes.texts[1:])  # "$gout$" is no formula
    words = [box for box in boxes if box.get_height() > 15]
    assert max(box.get_x() + box.get_width() for box in words) <= 72 * figures.WIDTH
    for a, b in pairwise(words):  # one beside the other, or a new line
        assert b.get_x() >= a.get_x() + a.get_width() or b.get_y() > a.get_y()
    assert len({box.get_y() for box in words}) > 2


def test_a_font_is_taken_only_if_it_has_all_the_characters(figures, monkeypatch):
    assert "DejaVuSans" in figures.font_for("gout é $").get_file()
    assert figures.font_for("gout \U0010fffe") is None
    asked = []

    class Nothing:
        def __init__(self, path):
            asked.append(path)
            raise RuntimeError("damaged")

    monkeypatch.setattr(figures, "FT2Font", Nothing)
    assert figures.font_for("gout") is None
    assert len(asked) > 1
    assert not any("LastResort" in path for path in asked)


def test_ink_is_the_more_legible_one(figures):
    inks = {colour: figures.readable_on(colour) for colour in ("black", "white", "#0072b2", "#f0e442", "0.5")}
    assert list(inks.values()) == ["white", "black", "white", "black", "black"]
    assert len(set(figures.PALETTE)) == len(BACKGROUNDS)


def test_memory_is_drawn_in_mib(figures):
    axes = figures.memory_figure({"up": [2**20, 2**22], "flat": [2**19, 2**19]}, (1024, 4096), "title").axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 4], [0.5, 0.5]]
    assert texts(axes) == ["up", "4 MiB", "flat", "0.5 MiB"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "4k"]


def plain_lora(base_dir, directory):
    adapter = AdapterConfig(n_experts=1, top_k=1, rank=2)
    save_adapter_config(directory, str(base_dir), adapter)
    write_tensors(directory / ADAPTER, adapter_state(load_model(base_dir, adapter=adapter)))


def test_what_cannot_be_drawn_is_said_in_one_line_and_nothing_is_written(
    figures, draw, base_dir, run_dir, tmp_path, monkeypatch
):
    lora = tmp_path / "lora"
    plain_lora(base_dir, lora)
    shutil.copy(run_dir / "metrics.jsonl", lora)
    cases = [
        (["--run", tmp_path / "nowhere"], "nowhere/metrics.jsonl: no such file"),
        (["--run", lora], "no router: that needs an adapter with more than one expert"),
        (["--layer", 2], "--layer must be between 0 and 1, got 2"),
        (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
    ]
    for content, message in (("", "no steps yet"), ("{}", '"step" and "loss"'), ("{", "metrics.jsonl:1: not JSON")):
        broken = shutil.copytree(run_dir, tmp_path / f"broken{len(cases)}")
        (broken / "metrics.jsonl").write_text(content)
        cases.append((["--run", broken], message))
    for words, message in cases:
        code, out, err = draw(*words)
        assert (code, out) == (2, ""), words
        assert message in err
        assert err.startswith("picture.py: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "pictures").exists()


def test_without_matplotlib_one_line_says_how_to_get_it(draw, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = draw()
    assert (code, out) == (2, "")
    assert err == 'picture.py: pictures need one more package, matplotlib: pip install -e ".[pictures]"\n'
    assert not (tmp_path / "pictures").exists()
