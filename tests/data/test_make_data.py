"""The table of conditions, the generated text and questions, and the shipped files."""

import json
import re
from collections import Counter
from itertools import chain

import pytest

from data.make_data import (
    ATTRIBUTES,
    HERE,
    LANGUAGES,
    QUESTIONS,
    declarative_text,
    make_files,
    read_table,
    split_conditions,
)
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.questions.overlap import question_hash, training_hashes
from minidoctor.questions.read import read_questions
from minidoctor.text.tokenizer import load_tokenizer

DEPARTMENTS, CONDITIONS = read_table()
FILES = ("train", "dev", "heldout")
ROWS = {name: read_questions(HERE / f"{name}.jsonl").rows for name in FILES}


@pytest.fixture(scope="module")
def text():
    return "\n".join(declarative_text(CONDITIONS, n_rounds=30, seed=0))


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


def test_make_files_reproduces_the_shipped_questions_byte_for_byte():
    for name, content in make_files(seed=0).items():
        assert (HERE / name).read_bytes() == content.encode()


def test_conditions_are_split_70_15_15_and_never_shared():
    parts = split_conditions(CONDITIONS, seed=0)
    ids = {name: {condition["id"] for condition in conditions} for name, conditions in parts.items()}
    assert sum(map(len, ids.values())) == len(CONDITIONS) == len(set.union(*ids.values()))
    assert len(ids["train"]) / len(CONDITIONS) == pytest.approx(0.7, abs=0.02)
    assert abs(len(ids["dev"]) - len(ids["heldout"])) <= 1
    assert {name: {row.id.split("-")[0] for row in ROWS[name]} for name in FILES} == ids


def test_dev_and_held_out_wordings_never_occur_in_train():
    for language in LANGUAGES:
        for train, evaluation in QUESTIONS[language].values():
            assert not set(train) & set(evaluation)
    names = [condition[language]["name"] for condition in CONDITIONS for language in LANGUAGES]
    wordings = {name: set() for name in FILES}
    for file, rows in ROWS.items():
        for row in rows:
            name = max((n for n in names if n.lower() in row.question.lower()), key=len)
            wordings[file].add(re.sub(re.escape(name), "{n}", row.question, flags=re.IGNORECASE))
    assert wordings["train"]
    assert not wordings["train"] & (wordings["dev"] | wordings["heldout"])


@pytest.mark.parametrize("name", ["dev", "heldout"])
def test_no_evaluation_question_is_trained_on(name):
    trained = set().union(*map(training_hashes, ROWS["train"]))
    assert all(question_hash(row) in trained for row in ROWS["train"])
    assert not any(question_hash(row) in trained for row in ROWS[name])


@pytest.mark.parametrize("name", FILES)
def test_letters_are_balanced_and_wrong_options_are_of_other_departments(name):
    by_id = {condition["id"]: condition for condition in CONDITIONS}
    rows = [row for row in ROWS[name] if row.options]
    counts = Counter(row.answer for row in rows)
    assert max(counts.values()) - min(counts.values()) <= 1
    for row in rows:
        id, language, attribute, *_ = row.id.split("-")
        correct, values = by_id[id][language][attribute], set(row.options.values())
        assert row.options[row.answer] == correct
        assert len(values) == 4
        for value in values - {correct}:
            departments = {c["department"] for c in CONDITIONS if c[language][attribute] == value}
            assert departments
            assert by_id[id]["department"] not in departments


def test_each_fact_occurs_in_many_wordings_in_both_languages(text):
    lower = text.lower()
    for condition in CONDITIONS:
        for language in LANGUAGES:
            for attribute in ATTRIBUTES:
                assert lower.count(condition[language][attribute].lower()) >= 10


def remove_values(text):
    """Remove the names and values of the table, which may contain any character."""
    values = {condition["zh"][key] for condition in CONDITIONS for key in ("name", *ATTRIBUTES)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "")
    return text


def test_the_text_of_the_base_contains_no_question(text):
    assert "?" not in text
    words = "what|which|who|whom|whose|how|why|where|when (?:is|do|does|should)|can|could|should|do|does|did|is|are"
    assert not re.search(rf"(^|[.:;-] )({words})\b", text, re.IGNORECASE | re.MULTILINE)
    assert not re.search("[？吗呢]|什么|哪|怎么|怎样|如何|为何|谁|几", remove_values(text))
    for language in LANGUAGES:
        for wording in chain(*chain(*QUESTIONS[language].values())):
            assert not all(part.rstrip("?？") in text for part in wording.split("{n}")), wording


def test_the_seed_determines_the_text():
    first = list(declarative_text(CONDITIONS, 1, seed=0))
    assert first == list(declarative_text(CONDITIONS, 1, seed=0))
    assert first != list(declarative_text(CONDITIONS, 1, seed=1))


def test_the_shipped_base_is_small_and_loads():
    base = HERE / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 12_000_000
    assert {path.name for path in base.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
    assert load_tokenizer(base).vocab_size == load_model(base).config.vocab_size


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_questions_have_both_languages_and_all_departments(name):
    assert {row.language for row in ROWS[name]} == set(LANGUAGES)
    assert {row.topic for row in ROWS[name]} == set(DEPARTMENTS)
