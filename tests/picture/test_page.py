import json
import re
import shutil
import sys

import browser as chromium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from minidoctor.checkpoints.adapters import load_adapted_model
from minidoctor.config import TARGETS, AdapterConfig, ModelConfig, UserError
from minidoctor.files.safetensors import write_tensors
from minidoctor.model import Model
from minidoctor.picture import __main__ as picture
from minidoctor.picture.page import MAX_TOKENS, mean_cosines, run_numbers, thin, write_page
from minidoctor.picture.terminal import PALETTE, question_start
from minidoctor.text.tokenizer import encode_conversation
from minidoctor.training.state import STATE

QUESTION = {"role": "user", "content": "The key test for gout?"}
MESSAGES = [QUESTION, {"role": "assistant", "content": "痛风 uric acid 龘"}]  # the last character is three bytes
NAMES = ["layer 0 attention", "layer 0 feed-forward", "layer 1 attention", "layer 1 feed-forward"]
HOSTILE = "</script><script>document.title='script'</script><img src=x onerror=\"document.title='img'\"> & \u2028\u2029"
WRITTEN = [[3, 5, 0, 9]] * 4  # of 5 slots
needs_browser = pytest.mark.skipif(
    not (chromium.CHROMIUM and chromium.DRIVER), reason="needs chromium and chromedriver"
)


def unit_vectors(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(3)), dim=-1)


def test_mean_cosines_are_those_of_all_pairs():
    vectors, experts = unit_vectors(40, 6), torch.arange(40) % 5
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    for got, same in zip(mean_cosines(vectors, experts), (True, False), strict=True):
        cosines = [float(vectors[i] @ vectors[j]) for i, j in pairs if (experts[i] == experts[j]) == same]
        assert got == round(1000 * sum(cosines) / len(cosines))
    assert mean_cosines(vectors[:2], torch.tensor([0, 3]))[0] is None
    assert mean_cosines(vectors[:2], torch.tensor([3, 3]))[1] is None
    assert mean_cosines(vectors[:0], experts[:0]) == [None, None]


def metrics_row(step):
    row = {"step": step, "loss": 3 / (step + 1), "lm": 2 / (step + 1), "balance": 1.25, "contrast": 0.5, "lr": 1e-3}
    shares = [[0.1 + step / 1000, 0.2, 0.3, 0.4 - step / 1000]] * 4
    return row | ({"expert_load": shares} if step % 10 == 9 else {})


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory, adapter_dir):
    """A run with queue, losses and load, and one with an adapter only. The name of the second is hostile."""
    directory = tmp_path_factory.mktemp("runs")
    complete, bare = (shutil.copytree(adapter_dir, directory / name) for name in ("run", "<img src=x onerror=f()>"))
    queue = {"queue.keys": unit_vectors(4, 4, 5, 4), "queue.written": torch.tensor(WRITTEN)}
    write_tensors(complete / STATE, queue)
    (complete / "metrics.jsonl").write_text("".join(json.dumps(metrics_row(step)) + "\n" for step in range(40)))
    (bare / "metrics.jsonl").touch()  # as in the first steps of a run
    return complete, bare


@pytest.fixture(scope="module")
def page(tmp_path_factory, base_dir, run_dirs, tokenizer):
    path = tmp_path_factory.mktemp("page") / "page.html"
    runs = ((run, load_adapted_model(base_dir, run)) for run in run_dirs)
    write_page(path, tokenizer, MESSAGES, HOSTILE, runs)
    return path


def embedded(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


@pytest.fixture(scope="module")
def routings(base_dir, run_dirs, tokenizer):
    """The routing of the displayed tokens in each sublayer."""
    tokens = encode_conversation(MESSAGES, tokenizer, 1000).tokens
    with torch.no_grad():
        _, routings = load_adapted_model(base_dir, run_dirs[0]).hidden(torch.tensor([tokens]))
    start = question_start(tokenizer, MESSAGES[:-1])
    return [[tensor[0, start:] for tensor in routing] for routing in routings]  # gates, probs, expert_ids, z


def test_page_contains_the_tokens_and_the_routing_of_the_model(page, routings, tokenizer):
    data = embedded(page)
    sentence, run = data["sentence"], data["runs"][0]
    assert "".join(sentence["tokens"]) == "The key test for gout?<|assistant|>痛风 uric acid ◌◌龘"
    assert sentence["tokens"][sentence["answer_start"] - 1] == "<|assistant|>"
    assert (data["palette"], run["experts"], run["top_k"]) == (list(PALETTE), list("ABCD"), 2)
    assert [view["name"] for view in run["sublayers"]] == NAMES
    for view, (gates, probs, expert_ids, _) in zip(run["sublayers"], routings, strict=True):
        assert view["top1"] == expert_ids[:, 0].tolist()
        for numbers, expected in ((view["gates"], gates), (view["probs"], probs)):
            torch.testing.assert_close(torch.tensor(numbers) / 1000, expected, atol=5.1e-4, rtol=0)
    assert data["runs"][1]["sublayers"][0]["gates"] == run["sublayers"][0]["gates"]


def test_memory_is_the_pca_of_filled_keys_and_routing_vectors(page, run_dirs, routings):
    keys = unit_vectors(4, 4, 5, 4)
    for index, view in enumerate(embedded(page)["runs"][0]["sublayers"]):
        filled = [keys[index, e, : min(WRITTEN[index][e], 5)].numpy() for e in range(4)]
        z, top1 = routings[index][3].numpy(), view["top1"]
        points = np.concatenate([*filled, z])
        values, vectors = np.linalg.eigh(np.cov(points.T))
        expected = (points - points.mean(0)) @ vectors[:, [-1, -2]]
        drawn = np.array([*(point for part in view["keys"] for point in part), *view["points"]]) / 1000
        signs = np.sign((drawn * expected).sum(0))  # a component's sign is arbitrary
        np.testing.assert_allclose(drawn * signs, expected, atol=6e-4)
        np.testing.assert_allclose(np.array(view["variance"]) / 1000, values[[-1, -2]] / values.sum(), atol=6e-4)
        assert [len(part) for part in view["keys"]] == [3, 5, 0, 5]
        experts = [e for e in range(4) for _ in filled[e]]
        for (equal, different), (v, e) in zip(view["cosines"], [(points[:13], experts), (z, top1)], strict=True):
            pairs = [(i, j) for i in range(len(v)) for j in range(len(v)) if i != j]
            assert equal / 1000 == pytest.approx(np.mean([v[i] @ v[j] for i, j in pairs if e[i] == e[j]]), abs=1e-3)
            assert different / 1000 == pytest.approx(np.mean([v[i] @ v[j] for i, j in pairs if e[i] != e[j]]), abs=1e-3)


def test_losses_and_load_are_those_of_metrics_jsonl(page):
    run, bare = embedded(page)["runs"]
    assert run["steps"] == list(range(1, 41))
    assert run["losses"]["lm"] == [float(f"{2 / (step + 1):.4g}") for step in range(40)]
    assert list(run["losses"]) == ["loss", "lm", "balance", "contrast"]
    assert run["load_steps"] == [10, 20, 30, 40]
    assert run["load"][1] == [[119, 200, 300, 381]] * 4
    assert (bare["steps"], bare["losses"], bare["load"]) == ([], {}, [])
    assert [part for view in bare["sublayers"] for part in view["keys"]] == [[]] * 16


def test_thin_keeps_the_last_item_and_at_most_the_limit():
    assert thin(range(10), 10) == range(10)
    assert list(thin(range(10), 4)) == [0, 3, 6, 9]
    assert list(thin(range(11), 4)) == [1, 4, 7, 10]
    assert list(thin([], 4)) == []


def test_texts_cannot_end_the_script(page):
    html = page.read_text(encoding="utf-8")
    assert embedded(page)["sentence"]["note"] == HOSTILE
    data = html[html.index('id="data">') + 10 : html.index("</script>")]
    assert not set("<>&\u2028\u2029") & set(data)
    assert html.count("</script>") == 2
    assert "default-src data: 'unsafe-inline'" in html  # no network: neither connections nor images nor fonts


def test_long_conversation_is_cut_and_the_page_says_so(tmp_path, tokenizer, adapted, adapter_dir):
    messages = [QUESTION, {"role": "assistant", "content": "uric acid " * 100}]
    write_page(tmp_path / "page.html", tokenizer, messages, "An answer.", [(adapter_dir, adapted)])
    sentence = embedded(tmp_path / "page.html")["sentence"]
    assert len(sentence["tokens"]) == MAX_TOKENS
    assert str(MAX_TOKENS) in sentence["note"]


@pytest.mark.parametrize("n_more", [0, 1])
def test_a_conversation_that_fits_is_not_called_cut(tmp_path, tokenizer, adapted, adapter_dir, monkeypatch, n_more):
    messages = [QUESTION, {"role": "assistant", "content": "uric acid"}]
    n = len(encode_conversation(messages, tokenizer, 1000).tokens) - question_start(tokenizer, messages[:1])
    monkeypatch.setattr("minidoctor.picture.page.MAX_TOKENS", n - n_more)
    write_page(tmp_path / "page.html", tokenizer, messages, "An answer.", [(adapter_dir, adapted)])
    sentence = embedded(tmp_path / "page.html")["sentence"]
    assert len(sentence["tokens"]) == n - n_more
    assert (sentence["note"] == "An answer.") == (n_more == 0)


def test_queue_of_another_adapter_and_non_finite_weights_are_rejected(tmp_path, adapter_dir, adapted):
    run = shutil.copytree(adapter_dir, tmp_path / "run")
    write_tensors(run / STATE, {"queue.keys": unit_vectors(4, 3, 5, 4), "queue.written": torch.zeros(4, 3).long()})
    with pytest.raises(UserError, match=STATE):
        run_numbers(run, adapted, [1, 2, 3], 0)
    adapted.model.layers[1].mlp.up_proj.lora_b.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.lora_b"):
        run_numbers(adapter_dir, adapted, [1, 2, 3], 0)


def test_one_routing_dimension_has_a_second_component_of_zero(tmp_path, config):
    model = Model(config, AdapterConfig(n_experts=2, top_k=1, rank=1, targets=("up_proj",), routing_dim=1)).eval()
    view = run_numbers(tmp_path, model, [1, 2, 3], 0)["sublayers"][0]
    assert [y for _, y in view["points"]] == [0, 0, 0]


def test_two_default_runs_are_below_one_megabyte(tmp_path, tokenizer):
    """16 sublayers, 8 experts, 64 keys each, 400 steps, with as many tokens as are displayed."""
    config = ModelConfig(tokenizer.vocab_size, 16, n_layers=8, n_heads=1, n_kv_heads=1, head_dim=16, ffn_dim=16)
    model = Model(config, AdapterConfig(rank=1, targets=tuple(TARGETS))).eval()
    queue = {"queue.keys": unit_vectors(16, 8, 64, 16), "queue.written": torch.full((16, 8), 1000)}
    write_tensors(tmp_path / STATE, queue)
    load = torch.rand(400, 16, 8).softmax(-1).tolist()
    rows = [metrics_row(step) | {"expert_load": load[step]} for step in range(400)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [QUESTION, {"role": "assistant", "content": "uric acid " * 100}]
    write_page(tmp_path / "page.html", tokenizer, messages, "", [(tmp_path, model)] * 2)
    assert len(embedded(tmp_path / "page.html")["runs"][1]["sublayers"]) == 16
    assert (tmp_path / "page.html").stat().st_size < 1e6


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    yield browser
    assert browser.console() == []
    assert {url for url in browser.requested(page) if not url.startswith("data:")} == {page.as_uri()}


def text(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def assert_token_colours(browser, routing):
    """The background is the palette's colour of the top-1 expert, mixed with white by 1 - gate."""
    gates, _, expert_ids, _ = routing
    for t in (0, 3, len(gates) - 1):
        expert = expert_ids[t, 0].item()
        node = f"document.querySelectorAll('[role=option]')[{t}]"
        assert browser.run(f"{node}.lastChild.textContent") == "ABCD"[expert]
        colour = re.findall(r"[\d.]+", browser.run(f"getComputedStyle({node}).backgroundColor"))
        channels = [int(PALETTE[expert][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        expected = [gates[t, expert].item() * c + 1 - gates[t, expert].item() for c in channels]
        assert list(map(float, colour)) == pytest.approx(expected, abs=2e-3)


@needs_browser
def test_tokens_have_the_colours_of_their_experts_in_the_selected_sublayer(opened, routings):
    assert text(opened, "#sublayer-name") == NAMES[0]
    assert_token_colours(opened, routings[0])
    opened.press("#sublayer", "right")
    assert text(opened, "#sublayer-name") == NAMES[1]
    assert opened.run("document.querySelector('#sublayer').ariaValueText") == NAMES[1]
    assert routings[0][2][:, 0].tolist() != routings[1][2][:, 0].tolist()
    assert_token_colours(opened, routings[1])
    assert opened.run("document.querySelectorAll('#overview span').length") == 4 * len(routings[0][0])


@needs_browser
def test_keyboard_and_pointer_select_the_token_whose_gates_are_displayed(opened, routings):
    def gates():
        rows = "[...document.querySelectorAll('#gates tr')].slice(1)"
        return opened.run(f"{rows}.map((row) => row.cells[2].textContent)")

    def selected(condition):
        return opened.run(f"[...document.querySelectorAll('[role=option]')].findIndex((node) => node.{condition})")

    first = selected("tabIndex === 0")
    opened.press("[role=option][tabindex='0']", "right")
    opened.press("[role=option][tabindex='0']", "down")
    assert text(opened, "#sublayer-name") == NAMES[1]
    for t in (first + 1, 2):
        if t == 2:
            opened.point("[role=group] > :nth-child(3)")
        assert selected("ariaSelected === 'true'") == t
        assert gates() == [f"{gate:.2f}" for gate in routings[1][0][t].tolist()]
    opened.click("#overview [data-sublayer='3'][data-token='4']")
    assert text(opened, "#sublayer-name") == NAMES[3]
    assert gates() == [f"{gate:.2f}" for gate in routings[3][0][4].tolist()]


@needs_browser
def test_memory_and_training_are_drawn_and_a_run_without_them_says_so(opened, routings):
    def count(selector):
        return opened.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    assert (count("#memory circle"), count("#memory .vector")) == (13, len(routings[0][0]))
    assert (count("#load rect"), count("#charts svg"), count("#training-table tr")) == (16, 5, 21)
    assert "no queue" not in text(opened, "#memory-note")
    opened.press("#step", "left")
    assert text(opened, "#step-name") == "39"
    opened.point("#load", -200)  # left of the middle: a step whose load was logged at step 10 or 20
    step = int(text(opened, "#step-name"))
    assert 1 < step < 20
    shares = {True: "A 11\u00a0%, B 20\u00a0%, C 30\u00a0%, D 39\u00a0%", False: "A 12\u00a0%"}[step <= 10]
    assert shares in opened.run("document.querySelector('#load').previousSibling.textContent")
    opened.press("#run", "down")
    assert "no queue" in text(opened, "#memory-note")
    assert "no metrics.jsonl" in text(opened, "#training-note")
    assert (count("#memory circle"), count("#charts svg")) == (0, 0)


@needs_browser
def test_hostile_texts_stay_texts(opened, run_dirs):
    assert text(opened, "#sentence-note") == HOSTILE
    assert opened.run("[...document.querySelectorAll('#run option')].map((node) => node.textContent)") == [
        str(run) for run in run_dirs
    ]
    assert opened.run("[document.images.length, document.scripts.length]") == [0, 2]
    assert opened.run("document.title").startswith("minidoctor")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_narrow_screens_and_follows_the_colour_scheme(opened, scheme):
    opened.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    opened.devtools("Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1, mobile=False)
    channels = re.findall(r"\d+", opened.run("getComputedStyle(document.querySelector('#controls')).backgroundColor"))
    assert (max(map(int, channels)) < 60) == (scheme == "dark")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    opened.devtools("Emulation.clearDeviceMetricsOverride")
    opened.devtools("Emulation.setEmulatedMedia", features=[])


def test_program_writes_the_page_of_one_or_two_runs(program, base_dir, run_dirs, rows_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = {"question": "痛风?", "answer": "尿酸"}, {"question": "gout?", "answer": "uric acid", "topic": HOSTILE}
    page, words = tmp_path / "page.html", ["--base", base_dir, "--data", rows_file(*row), "--device", "cpu"]

    def draw(*more):
        return program(picture.main, "picture.py", "--run", run_dirs[0], *words, *more)

    assert draw("--page", page) == (0, f"{page}\n", "")
    data = embedded(page)
    assert [run["name"] for run in data["runs"]] == [str(run_dirs[0])]
    assert "".join(data["sentence"]["tokens"]) == "gout?<|assistant|>uric acid"
    assert HOSTILE in data["sentence"]["note"]
    assert draw("--page", page, "--compare-run", run_dirs[1])[0] == 0
    assert [run["name"] for run in embedded(page)["runs"]] == [str(run) for run in run_dirs]
    other = shutil.copytree(run_dirs[1], tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"chat_format": "plain"}))
    code, _, errors = draw("--page", page, "--compare-run", other)
    assert (code, "another chat format" in errors) == (2, True)
    for flags, message in (([], "--page"), ([tmp_path / "plots", "--compare-run", run_dirs[1]], "--compare-run")):
        code, _, errors = draw(*flags)
        assert code == 2
        assert message in errors


def test_sample_writes_the_page_of_its_answer(program, base_dir, run_dirs, tmp_path, monkeypatch):
    page, words = tmp_path / "page.html", ["--base", base_dir, "--device", "cpu", "--adapter", run_dirs[0]]
    words += ["--page", page]
    monkeypatch.setattr(sample, "reply", lambda *_: "尿酸")
    assert program(sample.main, "sample.py", *words, "gout?")[0] == 0
    assert "".join(embedded(page)["sentence"]["tokens"]) == "gout?<|assistant|> 尿酸"
    for wrong in (["--raw", "gout?"], [], ["--questions", "q.txt", "--out", "a.jsonl"]):
        code, _, errors = program(sample.main, "sample.py", *words, *wrong)
        assert code == 2
        assert "--page" in errors
