"""The table, and what is made of it."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from data.make_data import ATTRIBUTES, HERE, LANGUAGES, QUESTIONS, declarative_text, make, read_table, split
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.questions.json_rows import read_rows
from minidoctor.text.tokenizer import load_tokenizer

DEPARTMENTS, CONDITIONS = read_table()
TEXT = list(declarative_text(CONDITIONS, n_rounds=30, seed=0))


def rows_of(name):
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_table_is_complete_and_its_values_are_distinct():
    assert len(CONDITIONS) >= 150
    assert len(DEPARTMENTS) >= 12
    for language in LANGUAGES:
        for key in ("name", "symptoms", "cause", "test", "treatment"):
            values = [condition[language][key] for condition in CONDITIONS]
            assert len(set(values)) == len(CONDITIONS), (language, key)
            assert all(value.strip() == value and value for value in values)
    for condition in CONDITIONS:
        assert condition["en"]["symptoms"].count(" and ") == condition["zh"]["symptoms"].count("和") == 1


def test_the_committed_questions_are_those_the_generator_makes():
    for name, content in make(seed=0).items():
        assert (HERE / name).read_text(encoding="utf-8") == content


def test_conditions_are_split_70_15_15_and_never_shared():
    parts = split(CONDITIONS, seed=0)
    names = {part: {condition["id"] for condition in own} for part, own in parts.items()}
    assert sum(map(len, names.values())) == len(CONDITIONS) == len(set.union(*names.values()))
    assert len(names["train"]) / len(CONDITIONS) == pytest.approx(0.7, abs=0.02)
    assert abs(len(names["dev"]) - len(names["heldout"])) <= 1
    for part in names:
        assert {row["id"].split("-")[0] for row in rows_of(part)} == names[part]


def test_dev_and_held_out_wordings_never_occur_in_train():
    for language in LANGUAGES:
        for train, later in QUESTIONS[language].values():
            assert not set(train) & set(later)
    names = [condition[language]["name"] for condition in CONDITIONS for language in LANGUAGES]

    def wordings(part):
        found = set()
        for row in rows_of(part):
            name = max((n for n in names if n.lower() in row["question"].lower()), key=len)
            found.add(re.sub(re.escape(name), "{n}", row["question"], flags=re.IGNORECASE))
        return found

    assert not wordings("train") & (wordings("dev") | wordings("heldout"))


def test_letters_are_balanced_and_every_wrong_option_is_another_departments():
    by_id = {condition["id"]: condition for condition in CONDITIONS}
    for part in ("train", "dev", "heldout"):
        rows = [row for row in rows_of(part) if "options" in row]
        counts = Counter(row["answer"] for row in rows)
        assert max(counts.values()) - min(counts.values()) <= 1
        for row in rows:
            name, language, attribute, *_ = row["id"].split("-")
            condition, values = by_id[name], list(row["options"].values())
            assert row["options"][row["answer"]] == condition[language][attribute]
            assert len(set(values)) == 4
            for value in set(values) - {condition[language][attribute]}:
                owners = [c for c in CONDITIONS if c[language][attribute] == value]
                assert owners
                assert all(owner["department"] != condition["department"] for owner in owners)


def test_every_fact_is_told_in_many_wordings_in_both_languages():
    text = "\n".join(TEXT).lower()
    for condition in CONDITIONS:
        for language in LANGUAGES:
            for attribute in ATTRIBUTES:
                assert text.count(condition[language][attribute].lower()) >= 10


def test_the_base_has_read_no_question_and_no_question_form():
    text = "\n".join(TEXT)
    assert "?" not in text
    words = "what|which|who|whom|whose|how|why|where|when (?:is|do|does|should)|can|could|should|do|does|did|is|are"
    opening = rf"(^|[.:;-] )({words})\b"
    assert not re.search(opening, text, re.IGNORECASE | re.MULTILINE)
    assert not re.search("[？吗呢]|什么|哪|怎么|怎样|如何|为何|谁|几", remove_values(text))
    for part in ("train", "dev", "heldout"):
        for row in rows_of(part):
            assert row["question"].rstrip("?？") not in text


def remove_values(text):
    """The text without the names and values of the table, which may hold any character."""
    values = {condition["zh"][key] for condition in CONDITIONS for key in ("name", *ATTRIBUTES)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "")
    return text


def test_the_text_is_the_same_for_the_same_seed_only():
    again = list(declarative_text(CONDITIONS, 1, seed=0))
    assert again == list(declarative_text(CONDITIONS, 1, seed=0))
    assert again != list(declarative_text(CONDITIONS, 1, seed=1))


def test_the_shipped_base_is_small_and_loads():
    base = HERE / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 12_000_000
    assert {path.name for path in base.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
    assert load_tokenizer(base).vocab_size == load_model(base).config.vocab_size


@pytest.mark.parametrize("name", ["train", "dev", "heldout"])
def test_the_shipped_questions_are_readable_rows(name):
    rows = read_rows(Path(HERE) / f"{name}.jsonl")
    assert {row.language for row in rows} == {"en", "zh"}
    assert {row.topic for row in rows} == set(DEPARTMENTS)
