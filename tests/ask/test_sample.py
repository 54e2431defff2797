import shutil
from dataclasses import replace

import pytest
import torch

import sample
from minidoctor.checkpoints.adapters import ADAPTER, load_adapted_model, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model, save_model
from minidoctor.config import QUANTIZATIONS, TARGETS, AdapterConfig, SampleConfig
from minidoctor.files.safetensors import write_tensors
from minidoctor.generate import complete
from minidoctor.model import Model, adapter_state
from minidoctor.ops.quantized import QuantizedWeight
from minidoctor.text.stream import printable
from minidoctor.text.tokenizer import load_tokenizer

SHORT = SampleConfig(max_new_tokens=8)


def test_one_question_prints_its_greedy_answer_and_the_warning(ask, base_dir, answer):
    code, out, errors = ask("gout?", "--base", base_dir, "--max-new-tokens", 8)
    assert (code, out) == (0, printable(answer("gout?")) + "\n")
    assert errors.splitlines()[:2] == [f"{base_dir}: {load_tokenizer(base_dir).note}", sample.WARNING]
    assert "not medical advice" in sample.WARNING


@pytest.mark.parametrize("words", [[], ["gout?"], ["--raw", "gout?"]])
def test_every_answer_comes_with_the_warning(ask, base_dir, words):
    assert sample.WARNING in ask(*words, "--base", base_dir, "--max-new-tokens", 1)[2].splitlines()


def test_adapter_changes_the_answer_to_that_of_its_experts(ask, base_dir, adapter_dir, adapted, tokenizer, answer):
    _, out, _ = ask("gout?", "--base", base_dir, "--adapter", adapter_dir, "--max-new-tokens", 8)
    prompt = tokenizer.chat([{"role": "user", "content": "gout?"}])
    expected = tokenizer.decode(complete(adapted, [prompt], SHORT, tokenizer.eos_ids)[0])
    assert out == printable(expected) + "\n"
    assert expected != answer("gout?")


def test_seed_determines_a_sampled_answer(ask, base_dir):
    words = ["gout?", "--base", base_dir, "--temperature", 1, "--max-new-tokens", 20, "--seed"]
    outs = [ask(*words, seed)[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_raw_continues_a_text_without_a_chat_format(ask, base_dir, model, tokenizer):
    prompt = [tokenizer.bos_id, *tokenizer.encode("The key test")]
    for text, tokens in (("The key test", prompt), ("", prompt[:1])):
        _, out, _ = ask("--raw", text, "--base", base_dir, "--max-new-tokens", 8)
        expected = tokenizer.decode(complete(model, [tokens], SHORT, tokenizer.eos_ids)[0])
        assert out == printable(expected) + "\n"


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_quantize_answers_with_the_quantized_base(ask, base_dir, adapter_dir, tokenizer, quantize, monkeypatch):
    loaded, load = [], sample.load
    monkeypatch.setattr(sample, "load", lambda *settings: loaded.append(load(*settings)) or loaded[0])
    words = ["gout?", "--base", base_dir, "--adapter", adapter_dir, "--max-new-tokens", 8, "--quantize", quantize]
    code, out, _ = ask(*words)
    model = load_adapted_model(base_dir, adapter_dir, quantize=quantize)
    prompt = tokenizer.chat([{"role": "user", "content": "gout?"}])
    expected = tokenizer.decode(complete(model, [prompt], SHORT, tokenizer.eos_ids)[0])
    assert (code, out) == (0, printable(expected) + "\n")
    assert any(isinstance(module, QuantizedWeight) for module in loaded[0][0].modules()) == (quantize != "none")


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_int8_answer_is_the_eager_one(ask, base_dir):
    words = ["gout?", "--base", base_dir, "--max-new-tokens", 8, "--quantize", "int8"]
    eager, compiled = ask(*words), ask(*words, "--compile")
    assert eager[:2] == compiled[:2]
    assert "--compile" not in compiled[2]


def test_unknown_quantization_is_one_line(ask, base_dir):
    code, _, err = ask("gout?", "--base", base_dir, "--quantize", "int4")
    assert (code, err.count("\n"), "int4" in err) == (2, 1, True)


def test_reasoning_models_have_a_higher_default_limit_of_tokens(monkeypatch, ask, base_dir):
    limits = []
    monkeypatch.setattr(sample, "reply", lambda model, tokenizer, messages, config, _: limits.append(config) or "")
    for words in ([], ["--thinking"], ["--thinking", "--max-new-tokens", 7]):
        ask("gout?", "--base", base_dir, *words)
    assert [config.max_new_tokens for config in limits] == [SampleConfig.max_new_tokens, 2048, 7]


def test_cache_is_static_if_the_compiled_model_needs_it(monkeypatch, ask, base_dir):
    configs = []
    monkeypatch.setattr(sample, "reply", lambda model, tokenizer, messages, config, _: configs.append(config) or "")
    for static in (False, True):
        monkeypatch.setattr(sample, "compile_decoding", lambda _, static=static: static)
        ask("gout?", "--base", base_dir, "--compile")
    assert [config.static_cache for config in configs] == [False, True]


def test_compile_compiles_the_model_before_it_answers(ask, base_dir, answer, monkeypatch):
    events, reply = [], sample.reply
    monkeypatch.setattr(sample, "compile_decoding", lambda model: events.append("compile") or False)
    monkeypatch.setattr(sample, "reply", lambda *words: events.append("reply") or reply(*words))
    _, out, _ = ask("gout?", "--base", base_dir, "--compile", "--max-new-tokens", 8)
    assert events == ["compile", "reply"]
    assert out == printable(answer("gout?")) + "\n"


def test_bad_input_is_reported_in_one_line_with_exit_code_2(ask, tmp_path, base_dir, adapter_dir):
    damaged = shutil.copytree(adapter_dir, tmp_path / "damaged")
    (damaged / "adapter.safetensors").write_bytes(b"\0" * 50)
    plain_lora, adapter = tmp_path / "lora", AdapterConfig(n_experts=1, rank=2, targets=tuple(TARGETS))
    save_adapter_config(plain_lora, str(base_dir), adapter)
    write_tensors(plain_lora / ADAPTER, adapter_state(load_model(base_dir, adapter=adapter)))
    adapted = ["--adapter", adapter_dir]
    questions = ["--questions", tmp_path / "q.txt", "--out", tmp_path / "a.jsonl"]
    cases = [
        (["gout?", "--base", tmp_path / "nowhere"], "nowhere"),
        (["gout?", "--adapter", tmp_path / "none"], "adapter_config.json"),
        (["gout?", "--adapter", damaged], "adapter.safetensors"),
        (["gout?", "--device", "tpu"], "device"),
        (["gout?", "--dtype", "int8"], "dtype"),
        (["gout?", "--temperature", -1], "temperature"),
        (["gout? " * 200], "128"),
        ([" "], "empty"),
        (["--raw"], "--raw"),
        (["gout?", "--batch-size", 0], "--batch-size"),
        (["gout?", "--show-routing"], "--show-routing needs an --adapter"),
        (["gout?", "--adapter", plain_lora, "--show-routing"], "no router"),
        (["gout?", "--adapter", plain_lora, "--page", tmp_path / "page.html"], "no router"),
        (["gout?", *adapted, "--show-routing", "--layer", 2], "--layer must be between 0 and 1"),
        (["gout?", *adapted, "--layer", 1], "--layer needs --show-routing"),
        (questions[:2], "--out"),
        (questions[2:], "--questions"),
        (["--resume"], "--resume needs --questions"),
        (["gout?", "--adapter", ""], "--adapter is empty"),
        (["gout?", *adapted, "--page", ""], "--page is empty"),
        (["--questions", "", "--out", ""], "--questions is empty"),
        ([*questions, "gout?"], "QUESTION"),
        ([*questions, "--raw"], "--raw"),
        ([*questions, *adapted, "--show-routing"], "--show-routing"),
        (questions, "q.txt"),
    ]
    for words, message in cases:
        code, out, errors = ask("--base", base_dir, *words)
        assert (code, out) == (2, ""), words
        line = errors.splitlines()[-1]
        assert line.startswith("sample.py: ")
        assert message in line
        assert errors.count("\n") in (1, 3)  # after the note on the tokenizer and the warning, or before them


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_reported_in_one_line(ask, base_dir):
    code, out, errors = ask("gout?", "--base", base_dir, "--device", "cuda")
    assert (code, out) == (2, "")
    assert errors.count("\n") == 1
    assert "cuda" in errors


@pytest.mark.parametrize("difference", [-150, 500])
def test_model_with_another_vocabulary_size_is_refused_or_answers(ask, tmp_path, base_dir, config, difference):
    shutil.copy(base_dir / "tokenizer.model", tmp_path)
    save_model(Model(replace(config, vocab_size=config.vocab_size + difference)), tmp_path)
    for seed in range(3):
        words = ["痛风的关键检查？", "--base", tmp_path, "--temperature", 2, "--seed", seed]
        assert ask(*words, "--max-new-tokens", 20)[0] == (0 if difference > 0 else 2)
