import sys
from itertools import pairwise

import pytest
import torch

from minidoctor.config import AdapterConfig
from minidoctor.model import Model
from minidoctor.picture.statistics import Top1
from minidoctor.picture.terminal import PALETTE, RoutedText
from minidoctor.questions.json_rows import parse_row

matplotlib = pytest.importorskip("matplotlib")
plots = pytest.importorskip("minidoctor.picture.plots")

METRICS = [{"step": i, "loss": 3.0 / (i + 1), "lm": 2.5 / (i + 1), "balance": 1.1, "contrast": 6.0} for i in range(80)]
FORMULAS = ["$5 to $10", r"$\frac{a$", "50 % of $", "gout_{x}^2"]


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context(plots.STYLE):
        yield


def texts(axes):
    return [text.get_text() for text in axes.texts]


def row_names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def topic_rows(*topics):
    return [parse_row({"question": "gout?", "answer": "x", "topic": topic}, str(i)) for i, topic in enumerate(topics)]


@pytest.fixture
def random_top1():
    """The top-1 experts of 2 tokens of each of 60 questions, in 4 sublayers with 4 experts."""
    return Top1(torch.randint(0, 4, (4, 120)), torch.arange(60).repeat_interleave(2))


def test_loss_figure_shows_the_logged_values_and_their_moving_average():
    axes = plots.loss_figure(METRICS).axes
    assert [part.get_yscale() for part in axes] == ["log", "log", "linear", "linear"]
    for part, name in zip(axes, ("loss", "lm", "balance", "contrast"), strict=True):
        assert part.get_title() == name
        steps, mean = part.lines
        assert list(steps.get_xdata()) == list(range(1, 81))
        assert list(steps.get_ydata()) == [row[name] for row in METRICS]
        assert mean.get_ydata()[0] == METRICS[0][name]
        assert mean.get_ydata()[50] == pytest.approx((METRICS[49][name] + METRICS[50][name]) / 2)
    ticks = {label.get_text() for label in axes[0].get_yticklabels()}
    assert {"0.05", "0.1", "1", "2"} <= ticks
    without_router = [{"step": row["step"], "loss": row["loss"], "lm": row["lm"]} for row in METRICS]
    assert len(plots.loss_figure(without_router).axes) == 2


def test_load_figure_shows_the_counted_shares(adapted, random_top1):
    axes = plots.load_figure(random_top1, adapted).axes[0]
    shares = [[ids.count(e) / len(ids) for e in range(4)] for ids in random_top1.expert_ids.tolist()]
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), torch.tensor(shares).double())
    assert row_names(axes) == [f"layer {i} {kind}" for i in (0, 1) for kind in ("attention", "feed-forward")]
    assert texts(axes) == [f"{share:.0%}" for row in shares for share in row]


def test_cells_of_many_experts_have_no_values(config, random_top1):
    model = Model(config, AdapterConfig(n_experts=20, top_k=2, rank=2, targets=("q_proj", "up_proj")))
    axes = plots.load_figure(random_top1, model).axes[0]
    assert texts(axes) == []
    assert [label.get_text() for label in axes.get_xticklabels()] == list("ACEGIKMOQS")


def test_topics_figure_shows_the_sublayer_with_most_information(adapted, random_top1):
    random_top1.expert_ids[2] = torch.where(random_top1.question % 2 == 0, 3, 1)  # the topic determines the expert
    figure = plots.topics_figure(random_top1, topic_rows(*"ab" * 30), adapted)
    title = figure.get_suptitle()
    assert "layer 1 attention" in title
    assert "1.00 bits about the topic (0.0" in title
    assert "language" not in title  # all questions are in English
    assert texts(figure.axes[0]) == ["", "0.0", "", "2.0", "", "2.0", "", "0.0"]
    assert plots.topics_figure(random_top1, topic_rows(*"a" * 60), adapted) is None


def test_topic_names_are_literal_text(adapted, random_top1, tmp_path, capsys):
    figure = plots.topics_figure(random_top1, topic_rows(*FORMULAS * 15), adapted)
    paths = plots.save(figure, tmp_path, "topics")  # a formula would raise or change the text
    assert [path.name for path in paths] == ["topics.png", "topics.svg"]
    assert row_names(figure.axes[0]) == sorted(FORMULAS)
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())
    assert capsys.readouterr().out == ""


def test_topic_without_glyphs_is_numbered_and_printed(adapted, random_top1, monkeypatch, capsys):
    rows = topic_rows(*["gout", "痛风\n\x1b[2J", "asthma"] * 20)
    monkeypatch.setattr(plots, "GLYPHS", {*range(128)})
    figure = plots.topics_figure(random_top1, rows, adapted)
    assert row_names(figure.axes[0]) == ["asthma", "gout", "3"]
    assert capsys.readouterr().out == "topics: topic 3 is 痛风 \\x1b[2J\n"
    monkeypatch.setattr(plots, "GLYPHS", {*range(128), *map(ord, "痛风")})
    figure = plots.topics_figure(random_top1, rows, adapted)
    assert row_names(figure.axes[0]) == ["asthma", "gout", "痛风 \\x1b[2J"]
    assert capsys.readouterr().out == ""


def test_long_topic_names_are_shortened_and_many_topics_limited(adapted, random_top1, monkeypatch, capsys):
    monkeypatch.setattr(plots, "MAX_LABELS", 2)
    question = random_top1._replace(question=torch.tensor([0] * 50 + [1] * 20 + [2] * 50))
    figure = plots.topics_figure(question, topic_rows("c" * 100, "b", "a"), adapted)
    assert row_names(figure.axes[0]) == ["a", "c" * 19 + "…"]
    assert "2 topics with most tokens, of 3" in capsys.readouterr().err


def test_fonts_include_latin_and_all_are_installed():
    assert plots.has_glyphs("gout é $ μ\n")
    assert not plots.has_glyphs("gout \U0010fffe")
    assert {*plots.STYLE["font.family"]} <= {*plots.fontManager.get_font_names()}


def test_sentence_boxes_have_the_colour_and_letter_of_their_expert(config, capsys):
    model = Model(config, AdapterConfig(n_experts=10, top_k=2, rank=2, targets=("up_proj",)))
    words = ["What", " is", " $gout$?", " ", "\\n", "é", "W" * 20] * 6
    sentence = [RoutedText(word, (i % 10, 9) if word == "é" else (i % 10,)) for i, word in enumerate(words)]
    missing = [RoutedText("\U0010fffe", (0,))]
    figure = plots.sentence_figure({"en": sentence, "zh": missing}, model, 1)
    axes = figure.axes[0]
    title, *written = texts(axes)
    assert "layer 1 feed-forward" in title
    assert written == [f"{text.strip()}\n{','.join('ABCDEFGHIJ'[e] for e in experts)}" for text, experts in sentence]
    boxes = list(axes.patches)
    colours = [matplotlib.colors.to_hex(box.get_facecolor()) for box in boxes]
    assert colours == [PALETTE[experts[-1] % 8] for _, experts in sentence]
    for box, text in zip(boxes, axes.texts[1:], strict=True):
        assert box.get_x() < text.get_position()[0] < box.get_x() + box.get_width()
        assert not text.get_parse_math()
    assert max(box.get_x() + box.get_width() for box in boxes) <= plots.COLUMNS
    for a, b in pairwise(boxes):  # to the right, or on a new line
        assert b.get_x() >= a.get_x() + a.get_width() or b.get_y() > a.get_y()
    assert len({box.get_y() for box in boxes}) > 2
    assert "no zh sentence" in capsys.readouterr().err
    assert plots.sentence_figure({"zh": missing}, model, 1) is None


def test_boxes_are_as_wide_as_their_text(adapted, monkeypatch):
    """Text in a fixed pitch, Chinese characters two columns wide."""
    monkeypatch.setattr(plots, "has_glyphs", lambda text: True)
    axes = plots.sentence_figure({"zh": [RoutedText("痛风", (0,)), RoutedText("gout", (1,))]}, adapted, 0).axes[0]
    chinese, latin = axes.patches
    assert chinese.get_width() == latin.get_width()


def test_equal_figures_are_saved_as_equal_files(adapted, random_top1, tmp_path):
    contents = []
    for _ in range(2):
        paths = plots.save(plots.load_figure(random_top1, adapted), tmp_path, "load")
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]


def test_plots_do_not_import_pyplot():
    assert "matplotlib.pyplot" not in sys.modules
