import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from paths import ROOT

import sample
from minidoctor.ask import chat
from minidoctor.ask.chat import fitting
from minidoctor.checkpoints.adapters import ADAPTER, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model, save_model
from minidoctor.config import AdapterConfig, SampleConfig
from minidoctor.files.safetensors import write_tensors
from minidoctor.generate import complete, generate
from minidoctor.model import Model, adapter_state
from minidoctor.picture.terminal import question_start, routing_text
from minidoctor.text.stream import printable
from minidoctor.text.tokenizer import load_tokenizer

STORIES = ROOT.parent / "shared" / "weights" / "stories260k"
SHORT = SampleConfig(max_new_tokens=8)


@pytest.fixture
def ask(monkeypatch, program):
    """Runs sample.py with these words and this typed in; returns exit code, stdout and stderr."""

    def ask(*words, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return program(sample.main, "sample.py", "--device", "cpu", *words)

    return ask


@pytest.fixture
def answer(model, tokenizer):
    """What the base answers at the end of a conversation: user, assistant, user, ..."""

    def answer(*texts):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return complete(model, tokenizer, [tokenizer.chat(messages)], SHORT)[0]

    return answer


def shown(text):
    return printable(text) + "\n"


def test_one_question_gets_its_greedy_answer_and_a_warning(ask, base_dir, answer):
    code, out, err = ask("gout?", "--base", base_dir, "--max-new-tokens", 8)
    assert (code, out) == (0, shown(answer("gout?")))
    assert err.splitlines() == [f"{base_dir}: {load_tokenizer(base_dir).note}", sample.WARNING]


def test_an_adapter_answers_with_its_experts(ask, base_dir, adapter_dir, adapted, tokenizer, answer):
    _, out, _ = ask("gout?", "--base", base_dir, "--adapter", adapter_dir, "--max-new-tokens", 8)
    prompt = tokenizer.chat([{"role": "user", "content": "gout?"}])
    assert out == shown(complete(adapted, tokenizer, [prompt], SHORT)[0])
    assert out != shown(answer("gout?"))


def test_the_same_seed_answers_the_same(ask, base_dir):
    words = ["gout?", "--base", base_dir, "--temperature", 1, "--max-new-tokens", 20, "--seed"]
    outs = [ask(*words, seed)[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_raw_goes_on_with_a_text(ask, base_dir, model, tokenizer):
    prompt = [tokenizer.bos_id, *tokenizer.encode("The key test")]
    for text, tokens in (("The key test", prompt), ("", prompt[:1])):
        _, out, err = ask("--raw", text, "--base", base_dir, "--max-new-tokens", 8)
        assert out == shown(complete(model, tokenizer, [tokens], SHORT)[0])
        assert err == ""


def test_a_chat_is_asked_with_what_was_said_until_it_is_reset(ask, base_dir, answer):
    typed = "gout?\nasthma?\n\n/reset\nasthma?\n/quit\nnever asked\n"
    code, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed=typed)
    first = answer("gout?")
    second, alone = answer("gout?", first, "asthma?"), answer("asthma?")
    assert second != alone
    greeting, rest = out.split("\n", 1)
    assert "/reset" in greeting
    assert rest == f"> {shown(first)}> {shown(second)}> > (forgotten)\n> {shown(alone)}> "
    assert code == 0


def test_an_unknown_command_is_named_and_not_asked(ask, base_dir):
    code, out, _ = ask("--base", base_dir, typed="/rest now\n")
    assert "no such command: /rest; there are /reset and /quit\n> \n" in out
    assert code == 0


def test_the_end_of_the_input_ends_a_chat(ask, base_dir, answer):
    code, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed="gout?")
    assert out.endswith(f"> {shown(answer('gout?'))}> \n")
    assert code == 0


def test_a_question_too_long_for_the_context_is_refused_and_forgotten(ask, base_dir, answer):
    typed = "gout? " * 200 + "\nasthma?\n/quit\n"
    code, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed=typed)
    assert "tokens, the model reads at most 128" in out
    assert out.endswith(f"> {shown(answer('asthma?'))}> ")
    assert code == 0


def test_a_long_chat_forgets_its_oldest_messages(tokenizer):
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"message {i} about gout"} for i in range(21)]
    kept, dropped = fitting(messages, tokenizer, 100)
    assert kept == messages[dropped:]
    assert kept[0]["role"] == "user"
    assert len(tokenizer.chat(kept)) <= 50 < len(tokenizer.chat(messages[dropped - 2 :]))
    assert fitting(messages[:1], tokenizer, 1) == (messages[:1], 0)


@pytest.mark.parametrize("words", [["gout?"], [], ["--raw", "gout?"]])
def test_control_characters_that_the_model_writes_do_not_reach_the_terminal(
    ask, base_dir, tokenizer, monkeypatch, words
):
    evil = "\x1b[2J\x07 \x9b31m\u202egout\n尿酸"
    monkeypatch.setattr(chat, "generate", lambda *_: iter([token] for token in tokenizer.encode(evil)))
    _, out, _ = ask(*words, "--base", base_dir, typed="gout?\n")
    assert "\\x1b[2J\\x07 \\x9b31m\\u202egout\n尿酸" in out
    assert not any(char in out for char in "\x1b\x07\x9b\u202e")


def test_ctrl_c_ends_an_answer_and_not_the_chat(ask, base_dir, tokenizer, monkeypatch):
    def interrupted(*_):
        yield from ([token] for token in tokenizer.encode("uric"))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", interrupted)
    code, out, _ = ask("--base", base_dir, typed="gout?\n/quit\n")
    assert out.endswith("> uric\n> ")
    assert code == 0


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the shared checkpoint stories260k")
def test_the_greedy_story_of_a_real_checkpoint_is_told_byte_for_byte(ask):
    code, out, _ = ask("--base", STORIES, "--raw", "")
    assert code == 0
    assert out.encode() == (STORIES / "greedy.txt").read_bytes()


def damaged(adapter_dir, directory):
    shutil.copytree(adapter_dir, directory)
    (directory / "adapter.safetensors").write_bytes(b"\0" * 50)
    return directory


def test_bad_input_ends_in_one_line_on_stderr_and_exit_code_2(ask, tmp_path, base_dir, adapter_dir):
    base = ["--base", base_dir]
    cases = [
        (["gout?", "--base", tmp_path / "nowhere"], "nowhere"),
        (["gout?", *base, "--adapter", tmp_path / "none"], "adapter_config.json: no such file"),
        (["gout?", *base, "--adapter", damaged(adapter_dir, tmp_path / "bad")], "adapter.safetensors"),
        (["gout?", *base, "--device", "tpu"], "device must be"),
        (["gout?", *base, "--dtype", "int8"], "dtype must be"),
        (["gout?", *base, "--temperature", -1], "temperature must be at least 0, got -1.0"),
        (["gout? " * 200, *base], "the model reads at most 128"),
        ([" ", *base], "the question is empty"),
        (["--raw", *base], "--raw needs a text"),
    ]
    for words, message in cases:
        code, out, err = ask(*words)
        assert (code, out) == (2, ""), words
        _, warning, after = err.partition(sample.WARNING + "\n")
        line = after if warning else err
        assert line.startswith("sample.py: ")
        assert message in line
        assert line.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_line_and_exit_code_2(base_dir):
    words = [sys.executable, "sample.py", "gout?", "--base", str(base_dir), "--device", "cuda"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sample.py: device cuda is not there")


@pytest.mark.parametrize("difference", [-150, 500])
def test_a_tokenizer_of_another_size_than_the_model_is_no_crash(ask, tmp_path, base_dir, config, difference):
    shutil.copy(base_dir / "tokenizer.model", tmp_path)
    save_model(Model(replace(config, vocab_size=config.vocab_size + difference)), tmp_path)
    for seed in range(3):
        words = ["痛风的关键检查？", "--base", tmp_path, "--temperature", 2, "--seed", seed]
        assert ask(*words, "--max-new-tokens", 20)[0] in (0, 2)


def test_a_file_of_questions_is_answered_in_its_order(ask, base_dir, answer, tmp_path):
    asked = ["gout?", "痛风的关键检查是什么？", "a cough at night, what is it?", "哮喘", "Asthma?"]
    lines = [asked[0], "", asked[1], json.dumps({"question": asked[2], "answer": "?"}), *asked[3:]]
    questions, out = tmp_path / "q.txt", tmp_path / "a.jsonl"
    questions.write_text("\n".join(lines), encoding="utf-8")
    words = ["--base", base_dir, "--max-new-tokens", 8, "--questions", questions]
    code, printed, err = ask(*words, "--out", out, "--batch-size", 2)
    assert (code, printed) == (0, f"5 answers: {out}\n")
    assert sample.WARNING in err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    # In batches, sorted by length, and yet to each question the answer that it gets alone.
    assert rows == [{"question": question, "answer": answer(question)} for question in asked]
    assert ask(*words, "--out", out)[0] == 2  # nothing is written over
    assert ask(*words, "--out", tmp_path / "b.jsonl", "--batch-size", 5)[0] == 0
    assert (tmp_path / "b.jsonl").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("", [], "no questions"),
        ('gout?\n{"question": 3}', [], 'q.txt:2: "question" must be text'),
        ("{gout", [], "q.txt:1: not JSON"),
        ("gout? " * 200, [], "q.txt:1: "),
        ("gout?", ["a question"], "no QUESTION and no --raw"),
        ("gout?", ["--raw"], "no QUESTION and no --raw"),
        ("gout?", ["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_a_bad_file_of_questions_is_refused_before_the_first_answer(ask, base_dir, tmp_path, text, words, message):
    questions, out = tmp_path / "q.txt", tmp_path / "a.jsonl"
    questions.write_text(text, encoding="utf-8")
    code, _, err = ask("--base", base_dir, "--questions", questions, "--out", out, *words)
    assert code == 2
    assert message in err
    assert not out.exists()


def test_questions_and_out_belong_together(ask, base_dir, tmp_path):
    for words in (["--questions", tmp_path / "q.txt"], ["--out", tmp_path / "a.jsonl"]):
        code, _, err = ask("--base", base_dir, *words)
        assert (code, "belong together" in err) == (2, True)


@pytest.fixture
def routed(adapted, tokenizer):
    """What the adapter answers to these tokens, and below it the routing from `start` on."""

    def routed(prompt, start, sublayer=3, colour=False):
        tokens = [step[0] for step in generate(adapted, [prompt], SHORT, tokenizer.eos_ids)]
        text = routing_text(adapted, tokenizer, prompt + tokens, start, sublayer, colour)
        return tokenizer.decode(tokens), shown(tokenizer.decode(tokens)) + "\n" + text + "\n"

    return routed


@pytest.fixture
def words(base_dir, adapter_dir):
    return ["--base", base_dir, "--adapter", adapter_dir, "--max-new-tokens", 8, "--show-routing"]


def test_the_routing_of_question_and_answer_stands_below_the_answer(ask, tokenizer, routed, words):
    messages = [{"role": "user", "content": "gout?"}]
    prompt, start = tokenizer.chat(messages), question_start(tokenizer, messages)
    assert tokenizer.decode(prompt[start:]) == "gout?"
    for more, sublayer in (([], 3), (["--layer", 0], 1)):
        code, out, _ = ask("gout?", *words, *more)
        assert (code, out) == (0, routed(prompt, start, sublayer)[1])


def test_a_raw_text_is_shown_with_what_follows_it(ask, tokenizer, routed, words):
    for text in ("The key test", ""):
        code, out, _ = ask("--raw", text, *words)
        assert (code, out) == (0, routed(tokenizer.start + tokenizer.encode(text), 1)[1])


def test_a_chat_shows_its_last_question_routed_with_what_was_said(ask, tokenizer, routed, words):
    code, out, _ = ask(*words, typed="gout?\nasthma?\n/quit\n")
    messages, expected = [], ""
    for question in ("gout?", "asthma?"):
        messages.append({"role": "user", "content": question})
        answer, text = routed(tokenizer.chat(messages), question_start(tokenizer, messages))
        messages.append({"role": "assistant", "content": answer})
        expected += "> " + text
    assert (code, out.split("\n", 1)[1]) == (0, expected + "> ")


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals(ask, tokenizer, routed, words, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _, out, _ = ask("--raw", "gout", *words)
    assert out == routed(tokenizer.start + tokenizer.encode("gout"), 1, colour=terminal)[1]
    assert ("\x1b[" in out) == terminal


def test_a_routing_that_cannot_be_shown_is_refused_in_one_line(ask, base_dir, adapter_dir, tmp_path):
    plain = AdapterConfig(n_experts=1, top_k=1, rank=2)
    save_adapter_config(tmp_path, str(base_dir), plain)
    write_tensors(tmp_path / ADAPTER, adapter_state(load_model(base_dir, adapter=plain)))
    base, adapter = ["--base", base_dir], ["--adapter", adapter_dir]
    cases = [
        (["gout?", *base, "--show-routing"], "--show-routing needs an --adapter"),
        (["gout?", *base, "--adapter", tmp_path, "--show-routing"], "no router: that needs an adapter with more than"),
        (["gout?", *base, *adapter, "--show-routing", "--layer", 2], "--layer must be between 0 and 1, got 2"),
        (["gout?", *base, *adapter, "--layer", 1], "--layer is the one that --show-routing shows"),
        (
            [*base, *adapter, "--show-routing", "--questions", "q.txt", "--out", "a"],
            "those to --questions go to a file",
        ),
    ]
    for words, message in cases:
        code, out, err = ask(*words)
        assert (code, out) == (2, ""), words
        assert message in err
        assert err.startswith("sample.py: ")
        assert err.count("\n") == 1


def test_compile_compiles_the_model_that_is_asked(ask, base_dir, answer, monkeypatch):
    compiled = []
    monkeypatch.setattr(sample, "compile_blocks", compiled.append)
    _, out, _ = ask("gout?", "--base", base_dir, "--compile", "--max-new-tokens", 8)
    assert len(compiled) == 1
    assert out == shown(answer("gout?"))
