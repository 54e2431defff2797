"""Comparison with other programs: tokenizers of real checkpoints, where they are available, and stored fixtures."""

import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from paths import FIXTURES, SHARED

from minidoctor.text.tokenizer import load_tokenizer

TOKENIZERS = SHARED / "tokenizers"
TOKENIZER_FIXTURES = FIXTURES / "tokenizers"


def mixed_strings(n):
    """Return random mixtures of Chinese, English, emoji, spaces, newlines and control characters."""
    draw = random.Random(0)
    words = ["gout", "Uric", "HbA1c", "don't", "naïve", "痛风", "尿酸", "是", "，", "。", "5mg", "2024", "é", "e\u0301"]
    emoji = ["🩺", "👩🏽\u200d⚕️", "😀", "🇨🇳", "❤️"]
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0"]
    alphabets = (words, emoji, spaces, [chr(code) for code in (*range(32), 127, 0x85, 0x200B, 0xFEFF)])

    def part():
        kind = draw.random()
        if kind < 0.1:  # any character but a surrogate
            return chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))
        return draw.choice(draw.choices(alphabets, weights=(6, 2, 4, 1))[0])

    return ["".join(part() for _ in range(draw.randrange(1, 13))) for _ in range(n)]


@pytest.mark.parametrize("name", ["llama2.model", "internlm_v7_sft.model"])
def test_tokenizer_equals_sentencepiece_for_random_texts(tmp_path, name):
    if not (TOKENIZERS / name).is_file():
        pytest.skip(f"{name} is not here")
    (tmp_path / "tokenizer.model").symlink_to(TOKENIZERS / name)
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZERS / name))
    for text in mixed_strings(10_000):
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.fixture(scope="session")
def smollm2():
    directory = Path(os.environ.get("SMOLLM2_DIR", "no such directory"))
    if not directory.is_dir():
        pytest.skip("SMOLLM2_DIR does not name the directory of SmolLM2-135M-Instruct")
    package = pytest.importorskip("tokenizers")
    reader = package.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return directory, load_tokenizer(directory), reader


def test_tokenizer_equals_the_package_tokenizers_for_random_texts(smollm2):
    _, tokenizer, reader = smollm2
    for text in mixed_strings(10_000):
        ids = reader.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reader.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be short. 请简短。"}]])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_chat_equals_the_template_of_smollm2(smollm2, n, system):
    directory, tokenizer, reader = smollm2
    jinja2 = pytest.importorskip("jinja2")
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(settings["chat_template"])
    turns = [
        {"role": role, "content": f"{text} {i} 🩺"}
        for i in range(n)
        for role, text in (("user", " What is gout?\n痛风"), ("assistant", "It is a disease.\n\nReally."))
    ]
    assert tokenizer.chat_format == "chatml"
    for messages in (system + turns[:-1], system + turns):
        asks = messages[-1]["role"] == "user"
        expected = template.render(messages=messages, add_generation_prompt=asks)
        ids = tokenizer.chat(messages)
        assert reader.decode(ids, skip_special_tokens=False) == expected
        assert ids == reader.encode(expected, add_special_tokens=False).ids


def test_special_tokens_of_smollm2_are_not_matched_in_text(smollm2):
    _, tokenizer, reader = smollm2
    for name in reader.get_added_tokens_decoder().values():
        ids = tokenizer.encode(f"a{name.content}b")
        assert not set(ids) & set(reader.get_added_tokens_decoder())
        assert tokenizer.decode(ids) == f"a{name.content}b"


@pytest.mark.parametrize("name", ["sentencepiece", "bpe"])
def test_texts_and_chats_equal_transformers(name):
    """The fixtures are stored by make_fixtures.py: output of transformers, with our own chat templates."""
    if name == "bpe":
        pytest.importorskip("tokenizers")
    expected = json.loads((TOKENIZER_FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(TOKENIZER_FIXTURES / name)
    for row in expected["texts"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["text"]
    for chat in expected["chats"]:
        assert load_tokenizer(TOKENIZER_FIXTURES / name, chat["format"]).chat(chat["messages"]) == chat["ids"]
