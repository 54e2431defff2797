import io
import json
import shutil
import sys

import pytest
import torch
from paths import SHARED

import sample
from minidoctor.ask import chat
from minidoctor.cli.main import run
from minidoctor.config import SampleConfig
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.generate import generate
from minidoctor.picture.terminal import question_start, routing_text
from minidoctor.text.stream import printable

STORIES = SHARED / "weights" / "stories260k"
GREETING = chat.GREETING + "\n"


@pytest.fixture
def fake_answer(monkeypatch, tokenizer):
    """Make every answer this text, followed by the end of the answer."""

    def fake_answer(text):
        monkeypatch.setattr(chat, "generate", lambda *_: iter([token] for token in tokenizer.encode(text)))

    return fake_answer


@pytest.fixture(scope="session")
def nan_dir(tmp_path_factory, base_dir):
    """The base with NaN in one tensor of the second layer."""
    directory = shutil.copytree(base_dir, tmp_path_factory.mktemp("nan") / "base")
    tensors = dict(read_tensors(directory / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    write_tensors(directory / "model.safetensors", tensors)
    return directory


def test_prompt_contains_the_conversation_until_reset(ask, base_dir, answer):
    typed = "gout?\nasthma?\n\n/reset\nasthma?\n/quit\nnever asked\n"
    code, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed=typed)
    first, fresh = answer("gout?"), answer("asthma?")
    second = answer("gout?", first, "asthma?")
    assert second != fresh
    first, second, fresh = map(printable, (first, second, fresh))
    assert (code, out) == (0, f"{GREETING}> {first}\n> {second}\n> > (new conversation)\n> {fresh}\n> ")


def test_greeting_has_two_example_questions_in_each_language():
    assert GREETING.count("?") == GREETING.count("？") == 2


def test_unknown_command_is_reported_briefly_and_not_asked(ask, base_dir):
    code, out, _ = ask("--base", base_dir, typed="/rest now\n/" + "x" * 2_400_000 + "\n")
    assert "'/rest'" in out
    assert "/reset and /quit" in out
    assert len(out) < 1000
    assert code == 0


def test_end_of_input_ends_a_chat(ask, base_dir, answer):
    code, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed="gout?")
    assert (code, out) == (0, f"{GREETING}> {printable(answer('gout?'))}\n> \n")


def test_question_that_does_not_fit_leaves_the_conversation_as_it_was(ask, base_dir, answer):
    typed = "gout?\n" + "gout? " * 200 + "\nasthma?\n/quit\n"
    _, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed=typed)
    assert "128" in out
    first = answer("gout?")
    assert out.endswith(f"> {printable(answer('gout?', first, 'asthma?'))}\n> ")


def test_truncate_history_drops_the_earliest_turns(tokenizer):
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"message {i} about gout"} for i in range(21)]
    kept = chat.truncate_history(messages, tokenizer, 50)
    n_dropped = len(messages) - len(kept)
    assert n_dropped > 0
    assert kept == messages[n_dropped:]
    assert kept[0]["role"] == "user"
    assert len(tokenizer.chat(kept)) <= 50 < len(tokenizer.chat(messages[n_dropped - 2 :]))
    assert chat.truncate_history(messages[:1], tokenizer, 1) == messages[:1]


def test_errors_in_the_code_keep_their_traceback(ask, base_dir, monkeypatch):
    def fail(*_):
        raise ValueError("from a student's edit")

    monkeypatch.setattr(chat, "generate", fail)
    with pytest.raises(ValueError, match="student"):
        ask("--base", base_dir, typed="gout?\n/quit\n")


@pytest.mark.parametrize("words", [["gout?"], [], ["--raw", "gout?"]])
def test_control_characters_of_an_answer_are_escaped(ask, base_dir, fake_answer, words):
    fake_answer("\x1b[2J\x07 \x9b31m\u202egout\n尿酸")
    _, out, _ = ask(*words, "--base", base_dir, typed="gout?\n")
    assert "\\x1b[2J\\x07 \\x9b31m\\u202egout\n尿酸" in out
    assert not any(char in out for char in "\x1b\x07\x9b\u202e")


def test_ctrl_c_ends_an_answer_and_not_the_chat(ask, base_dir, tokenizer, monkeypatch):
    def interrupted(*_):
        yield from ([token] for token in tokenizer.encode("uric"))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", interrupted)
    code, out, _ = ask("--base", base_dir, typed="gout?\n/quit\n")
    assert (code, out) == (0, f"{GREETING}> uric\n> ")


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the shared checkpoint stories260k")
def test_greedy_story_of_a_real_checkpoint_is_unchanged(ask):
    code, out, errors = ask("--base", STORIES, "--raw", "")
    assert code == 0
    assert out.encode() == (STORIES / "greedy.txt").read_bytes()
    assert "--max-new-tokens 256" in errors


@pytest.mark.parametrize("words", [["gout?"], [], ["--raw", "gout?"]])
def test_truncated_answer_is_reported_on_stderr(ask, base_dir, fake_answer, words):
    for limit, reported in ((8, "--max-new-tokens 8"), (1000, "context of 128")):
        _, _, errors = ask(*words, "--base", base_dir, "--max-new-tokens", limit, typed="gout?\n")
        assert reported in errors.splitlines()[-1]
    fake_answer("uric acid")
    _, _, errors = ask(*words, "--base", base_dir, typed="gout?\n")
    assert errors.splitlines()[-1] == sample.WARNING


@pytest.mark.parametrize("words", [["gout?"], [], ["--raw", "gout?"]])
@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufffd"])
def test_empty_answer_is_not_printed_as_nothing(ask, base_dir, fake_answer, words, text):
    fake_answer(text)
    assert "(empty answer)\n" in ask(*words, "--base", base_dir, typed="gout?\n")[1]
    for readable in ("A", "5", "痛", "+", "?"):
        fake_answer(text + readable)
        assert "(empty answer)" not in ask(*words, "--base", base_dir, typed="gout?\n")[1]


@pytest.mark.parametrize("temperature", [0, 1])
def test_non_finite_weights_are_reported_by_name(ask, nan_dir, temperature):
    code, out, errors = ask("gout?", "--base", nan_dir, "--temperature", temperature)
    assert (code, out) == (2, "")
    assert "model.layers.1.mlp.up_proj.weight" in errors.splitlines()[-1]
    code, out, _ = ask("--base", nan_dir, "--temperature", temperature, typed="gout?\n/quit\n")
    assert code == 0
    assert "model.layers.1.mlp.up_proj.weight" in out


def test_overflow_with_finite_weights_is_reported(ask, base_dir, monkeypatch):
    monkeypatch.setattr(chat, "generate", lambda model, *_: generate(infinite(model), *_))

    def infinite(model):
        model.lm_head.register_forward_hook(lambda _, inputs, logits: logits * torch.inf)
        return model

    code, _, errors = ask("gout?", "--base", base_dir)
    assert code == 2
    assert "--dtype float32" in errors


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_undecodable_bytes_are_replaced_and_reported(ask, base_dir, answer, encoding):
    typed = b"gout \xff?\n" + "痛风?".encode() + b"\n/quit\n"
    code, out, _ = ask("--base", base_dir, "--max-new-tokens", 8, typed=typed, encoding=encoding)
    first = answer("gout \ufffd?")
    second = answer("gout \ufffd?", first, "痛风?")  # UTF-8 where the locale has only ASCII
    assert code == 0
    assert out.count("replaced") == 1
    assert out.endswith(f"{printable(first)}\n> {printable(second)}\n> ")


def test_answer_that_the_terminal_cannot_encode_is_escaped_and_not_lost(base_dir, fake_answer, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("gout?\ngout?\n/quit\n"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--base", str(base_dir), "--device", "cpu"])
    fake_answer("尿酸")
    run(sample.main)
    sys.stdout.flush()
    assert printed.getvalue().count(json.dumps("尿酸").strip('"').encode()) == 2


@pytest.fixture
def routed(adapted, tokenizer):
    """Return the adapter's answer to a prompt, and the output: the answer and the routing from `start`."""

    def routed(prompt, start, sublayer=3, colour=False):
        tokens = [step[0] for step in generate(adapted, [prompt], SampleConfig(max_new_tokens=8), tokenizer.eos_ids)]
        text = routing_text(adapted, tokenizer, prompt + tokens, start, sublayer, colour)
        return tokenizer.decode(tokens), f"{printable(tokenizer.decode(tokens))}\n\n{text}\n"

    return routed


@pytest.fixture
def words(base_dir, adapter_dir):
    return ["--base", base_dir, "--adapter", adapter_dir, "--max-new-tokens", 8, "--show-routing"]


def test_routing_of_question_and_answer_follows_the_answer(ask, tokenizer, routed, words):
    messages = [{"role": "user", "content": "gout?"}]
    prompt, start = tokenizer.chat(messages), question_start(tokenizer, messages)
    assert tokenizer.decode(prompt[start:]) == "gout?"
    outputs = [ask("gout?", *words, *layer)[1] for layer in ([], ["--layer", 0])]
    assert outputs == [routed(prompt, start, sublayer)[1] for sublayer in (3, 1)]
    assert outputs[0] != outputs[1]


def test_routing_of_a_completed_text_includes_the_text(ask, tokenizer, routed, words):
    for text in ("The key test", ""):
        code, out, _ = ask("--raw", text, *words)
        assert (code, out) == (0, routed(tokenizer.start + tokenizer.encode(text), 1)[1])


def test_chat_shows_the_routing_of_each_last_question(ask, tokenizer, routed, words):
    code, out, _ = ask(*words, typed="gout?\nasthma?\n/quit\n")
    messages, expected = [], GREETING
    for question in ("gout?", "asthma?"):
        messages.append({"role": "user", "content": question})
        answer, text = routed(tokenizer.chat(messages), question_start(tokenizer, messages))
        messages.append({"role": "assistant", "content": answer})
        expected += "> " + text
    assert (code, out) == (0, expected + "> ")


@pytest.mark.parametrize("terminal", [True, False])
def test_routing_has_colours_only_in_a_terminal(ask, tokenizer, routed, words, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _, out, _ = ask("--raw", "gout", *words)
    assert out == routed(tokenizer.start + tokenizer.encode("gout"), 1, colour=terminal)[1]
    assert ("\x1b[" in out) == terminal
