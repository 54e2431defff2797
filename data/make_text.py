"""The text that the base is pretrained on: statements generated from `conditions.json`, and no question.

Each fact occurs in many wordings and orders: a fact that a model has read in one form can be recited, but not extracted
by a question (https://arxiv.org/abs/2309.14316). A condition occurs under each of its names, sometimes with a typing
error, and later sentences of a paragraph refer to it by a pronoun. Everyday sentences have the words that people use
around a question. Some statements say of conditions that the table does not have that nothing is known about them.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
ATTRIBUTES = ("department", "symptoms", "cause", "test", "treatment")
P_MAIN_NAME = 0.5  # the rest is shared by the other names
P_TYPO = 0.05  # of a name, in English
P_LOWER = 0.1  # a name without capitals, as people type it


def read_json(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


TEXT = read_json("statements.json")
GENERAL = read_json("general.json")
SCOPE = read_json("scope.json")


def read_table() -> tuple[dict[str, dict[str, str]], list[dict]]:
    """Return the departments (id -> language -> name) and the conditions, each with the name of its department."""
    table = read_json("conditions.json")
    for condition in table["conditions"]:
        for language in LANGUAGES:
            condition[language]["department"] = table["departments"][condition["department"]][language]
    return table["departments"], table["conditions"]


def capitalized(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def add_typo(text: str, rng: random.Random) -> str:
    """Return the text with one letter left out, doubled, swapped or replaced, in a word of five or more."""
    words = list(re.finditer("[A-Za-z]{5,}", text))
    if not words:
        return text
    word = rng.choice(words)
    i = rng.randrange(word.start() + 1, word.end() - 2)
    changed = rng.choice(("", 2 * text[i], text[i + 1] + text[i], rng.choice("aeiourstnl")))
    return text[:i] + changed + text[i + (2 if len(changed) == 2 and changed[0] != changed[1] else 1) :]


def choose_name(names: dict, language: str, rng: random.Random) -> str:
    """Return one of a condition's names as people type it."""
    others = names["other_names"]
    name = rng.choice(others) if others and rng.random() > P_MAIN_NAME else names["name"]
    if language == "en" and rng.random() < P_TYPO:
        name = add_typo(name, rng)
    return name.lower() if rng.random() < P_LOWER else name


def make_statement(language: str, attribute: str, name: str, value: str, rng: random.Random, cut: str) -> str:
    """Return one fact in a random wording, half of the time as a card: aspect, condition and value.

    Without a name it is a card of aspect and value, for a paragraph about one condition.
    """
    text = TEXT[language]
    slots = {"n": cut + name + cut, "v": cut + value + cut}
    if attribute == "other_name" or (name and rng.random() < 0.5):
        kind = "clauses" if attribute in text["clauses"] and rng.random() < 0.4 else "statements"
        return capitalized(rng.choice(text[kind][attribute]).format(**slots))
    aspect = cut + rng.choice(text["aspects"][attribute]) + cut
    card = rng.choice(text["cards"]).format(n=slots["n"], a=aspect) if name else aspect
    return capitalized(card) + rng.choice(text["separators"]) + slots["v"] + ("." if language == "en" else "。")


def make_facts(condition: dict, language: str, rng: random.Random) -> list[tuple[str, str]]:
    """Return pairs of attribute and value: all attributes, the name in the other language, and one other name."""
    names = condition[language]
    facts = [(attribute, names[attribute]) for attribute in ATTRIBUTES]
    facts.append(("name", condition["zh" if language == "en" else "en"]["name"]))
    if names["other_names"]:
        facts.append(("other_name", rng.choice(names["other_names"])))
    rng.shuffle(facts)
    return facts


def make_paragraph(condition: dict, language: str, rng: random.Random, cut: str) -> list[str]:
    """Return all facts of a condition as sentences. After the first, most refer to it by a pronoun or not at all."""
    name, sentences = choose_name(condition[language], language, rng), list[str]()
    for attribute, value in make_facts(condition, language, rng):
        reference = name
        if attribute == "other_name":
            reference = condition[language]["name"]
        elif sentences and rng.random() < 0.6:
            reference = rng.choice(("", *TEXT[language]["pronouns"]))
        sentences.append(make_statement(language, attribute, reference, value, rng, cut))
    return sentences


def recombine(names: list[str], language: str, rng: random.Random) -> str:
    """Return a name that is a part of one name joined with a part of another, and most likely names nothing."""
    first, second = rng.sample(names, 2)
    if language == "en":
        return " ".join([*first.split()[: rng.randint(1, 2)], second.split()[-1]])
    return first[: rng.randint(1, 3)] + second[-rng.randint(2, 4) :]


def make_unknown(known: set[str], names: list[str], language: str, rng: random.Random, cut: str) -> str:
    """Return a statement that nothing is known about a condition that the table does not have."""
    unknown = SCOPE["unknown"]["train"][language]
    name = rng.choice(unknown)
    if rng.random() < 0.4:
        name = recombine(unknown + names, language, rng)
        if name.lower() in known:
            name = rng.choice(unknown)
    name = name.lower() if rng.random() < P_LOWER else name
    if rng.random() < 0.3:
        return capitalized(rng.choice(TEXT[language]["unknown"]).format(n=cut + name + cut))
    return make_statement(language, rng.choice(ATTRIBUTES), name, TEXT[language]["unknown_value"], rng, cut)


def declarative_text(conditions: list[dict], n_rounds: int, seed: int, cut: str = "") -> Iterator[str]:
    """Yield paragraphs. Each round contains each fact of each condition in each language, in random order and wording.

    A paragraph has all facts of one condition, or single facts of several, so that no fact depends on a preceding one.
    For every two conditions there is one statement about an unknown one and one everyday sentence. `cut` is inserted
    around names, values and aspects.
    """
    rng = random.Random(seed)
    names = {x: [n for c in conditions for n in (c[x]["name"], *c[x]["other_names"])] for x in LANGUAGES}
    known = {name.lower() for language in LANGUAGES for name in names[language]}
    for _ in range(n_rounds):
        paragraphs = []
        for language in LANGUAGES:
            sentences: list[str] = []
            for condition in conditions:
                if rng.random() < 0.5:
                    paragraphs.append((language, make_paragraph(condition, language, rng, cut)))
                    continue
                for attribute, value in make_facts(condition, language, rng):
                    main = attribute in ("name", "other_name")
                    name = condition[language]["name"] if main else choose_name(condition[language], language, rng)
                    sentences.append(make_statement(language, attribute, name, value, rng, cut))
            for _ in range(len(conditions) // 2):
                sentences.append(make_unknown(known, names[language], language, rng, cut))
                sentences.append(rng.choice(GENERAL[language]))
            rng.shuffle(sentences)
            while sentences:
                n = rng.randint(1, 6)
                paragraphs.append((language, sentences[:n]))
                sentences = sentences[n:]
        rng.shuffle(paragraphs)
        for language, lines in paragraphs:
            yield ("" if language == "zh" else " ").join(lines)
