import io
import sys

import pytest

import sample
from minidoctor.config import SampleConfig
from minidoctor.generate import complete


@pytest.fixture
def ask(monkeypatch, program):
    """Run sample.py with these words and this text or these bytes on stdin; return exit code, stdout and stderr."""

    def ask(*words, typed="", encoding="utf-8"):
        typed = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding=encoding))
        return program(sample.main, "sample.py", "--device", "cpu", *words)

    return ask


@pytest.fixture
def answer(model, tokenizer):
    """Return the base's greedy answer of at most 8 tokens at the end of a conversation: user, assistant, user, ..."""

    def answer(*texts):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        config = SampleConfig(max_new_tokens=8)
        return tokenizer.decode(complete(model, [tokenizer.chat(messages)], config, tokenizer.eos_ids)[0])

    return answer
