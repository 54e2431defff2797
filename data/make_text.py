"""The text that the base is pretrained on: statements generated from `conditions.json`, and no question.

Each fact occurs in many wordings and orders: a fact that a model has read in one form can be recited, but not extracted
by a question (https://arxiv.org/abs/2309.14316). The words that people use around a question occur in statements, such
as "Now I know how gout is treated: ...". A condition occurs under each of its names, sometimes with a typing error, and
a paragraph often continues as a conversation does: without the name, or with the same fact of another condition. Of
conditions that the table does not have, the text says that nothing is known.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
ATTRIBUTES = ("department", "symptoms", "cause", "test", "treatment")
P_MAIN_NAME = 0.3  # the rest is shared by the other names
P_TYPO = 0.1  # of a name or a wording, in English
P_LOWER = 0.2  # a name or a wording without capitals, as people type it
P_NO_END = 0.5  # a paragraph without its last full stop, as an answer ends
END = {"en": ".", "zh": "。"}
# Words of a question or a request. An English clause in a statement may begin with one of them: "I know how ...".
QUESTION_WORDS = {
    "en": re.compile(
        r"\b(what|which|who|whom|whose|how|why|where|when|can|could|should|would|will|may|do|does|did|is|are|any|please"
        r"|tell|got|need|want)\b|\?",
        re.IGNORECASE,
    ),
    "zh": re.compile("[？?吗呢啥咋嘛吧谁几请何]|还是|不(?=$|，)|什么|哪|怎|是不是|能不能|多少|要不要|有没有"),
}

# Words of a mention that name a man or a woman, who cannot have a condition of the other sex.
PEOPLE = {
    "en": {
        "male": r"\b(he|him|his|himself|((step|grand)?(father|son))|grand(pa|dad)|grandad|dad|husband|bro|brother|uncle"
        r"|nephew|man|gentleman|guy|lad|boy|boyfriend|bf)\b",
        "female": r"\b(she|her|herself|((step|grand)?(mother|daughter))|grandma|gran|nan|mom|mum|wife|sister|aunt"
        r"|niece|woman|lady|girl|girlfriend|gf)\b",
    },
    "zh": {
        "male": "爸|父|爷|爹|公|叔|舅|弟|哥|男|他|儿子|丈夫|老头",
        "female": "妈|母|奶|婆|姨|婶|姑|姥姥|娘|姐|妹|女|她|妻|媳妇|老太|闺蜜|生完孩子",
    },
}


def read_json(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


TEXT = read_json("statements.json")
GENERAL = read_json("general.json")
SCOPE = read_json("scope.json")
WORDINGS = read_json("wordings.json")


def read_table() -> tuple[dict[str, dict[str, str]], list[dict]]:
    """Return the departments (id -> language -> name) and the conditions, each with the name of its department."""
    table = read_json("conditions.json")
    for condition in table["conditions"]:
        for language in LANGUAGES:
            condition[language]["department"] = table["departments"][condition["department"]][language]
    return table["departments"], table["conditions"]


def capitalized(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def pick(templates: list[str], rng: random.Random) -> str:
    """Return one of the templates, with one of each group of alternatives: "[how|ways] to treat {n}"."""
    text = re.sub(r"\[([^]]*)\]", lambda group: rng.choice(group[1].split("|")), rng.choice(templates))
    return re.sub("  +", " ", text).strip()


def draw_text(make: Callable[[], str], language: str, sex: str) -> str:
    """Return the first text without a man if only women have the condition, or without a woman in the reverse case."""
    opposite = {"female": "male", "male": "female"}.get(sex)
    while True:
        text = make()
        if not opposite or not re.search(PEOPLE[language][opposite], text, re.IGNORECASE):
            return text


def add_typo(text: str, rng: random.Random) -> str:
    """Return the text with one letter left out, doubled, swapped or replaced, in a word of five or more."""
    words = list(re.finditer("[A-Za-z]{5,}", text))
    if not words:
        return text
    word = rng.choice(words)
    i = rng.randrange(word.start() + 1, word.end() - 2)
    changed = rng.choice(("", 2 * text[i], text[i + 1] + text[i], rng.choice("aeiourstnl")))
    return text[:i] + changed + text[i + (2 if len(changed) == 2 and changed[0] != changed[1] else 1) :]


def recombine(names: list[str], language: str, rng: random.Random) -> str:
    """Return parts of two names, put together, which most likely name nothing."""
    first, second = rng.sample(names, 2)
    if language == "zh":
        return first[: rng.randint(1, 3)] + second[-rng.randint(2, 4) :]
    if rng.random() < 0.4:
        return " ".join([*first.split()[: rng.randint(1, 2)], second.split()[-1]])
    word = rng.choice(first.split())[: rng.randint(3, 6)].lower() + second.split()[-1][-rng.randint(4, 8) :].lower()
    return f"{rng.choice(names).split()[0]} {word}" if rng.random() < 0.4 else word


def declarative_wordings(language: str) -> dict[str, dict[str, list[str]]]:
    """Return the wordings of training that may stand in a statement: kind -> attribute -> templates."""
    words, found = WORDINGS["train"][language], dict[str, dict[str, list[str]]]()
    for kind in ("indirect", "pronoun_indirect", "fragments", "follow_ups", "mentions", "changes"):
        for attribute, templates in words[kind].items() if isinstance(words[kind], dict) else [("", words[kind])]:
            if language == "zh" or "indirect" not in kind:
                templates = [text.removesuffix("呢") for text in templates]
                templates = [text for text in templates if not QUESTION_WORDS[language].search(text)]
            found.setdefault(kind, {})[attribute] = templates
    return found


def names_and_values(conditions: list[dict]) -> list[str]:
    """Return all names and values of the conditions, in both languages."""
    sides = [condition[language] for condition in conditions for language in LANGUAGES]
    return [text for x in sides for text in (x["name"], *x["other_names"], *(x[a] for a in ATTRIBUTES))]


class Writer:
    """Writes sentences and paragraphs of one language. `cut` is inserted around names and values."""

    def __init__(self, conditions: list[dict], language: str, rng: random.Random, cut: str = ""):
        self.conditions, self.language, self.rng, self.cut = conditions, language, rng, cut
        self.text, self.wordings = TEXT[language], declarative_wordings(language)
        self.names = [name for c in conditions for name in (c[language]["name"], *c[language]["other_names"])]
        self.known = [name.lower() for name in self.names]

    def fill(self, template: str, **slots: str) -> str:
        """Return the sentence of a template, at times typed carelessly, with its slots filled."""
        if self.language == "en" and self.rng.random() < P_TYPO:
            template = add_typo(template, self.rng)
        if self.rng.random() < P_LOWER:
            template = template.lower()
        else:
            template = capitalized(template)
            slots = {key: capitalized(x) if template.startswith(f"{{{key}}}") else x for key, x in slots.items()}
        return template.format(**{key: self.cut + slot + self.cut for key, slot in slots.items()})

    def end(self, heading: str, value: str) -> str:
        return heading + self.rng.choice(self.text["separators"]) + self.cut + value + self.cut + END[self.language]

    def choose_name(self, condition: dict) -> str:
        """Return one of a condition's names as people type it."""
        rng, names = self.rng, condition[self.language]
        others = names["other_names"]
        name = rng.choice(others) if others and rng.random() > P_MAIN_NAME else names["name"]
        if self.language == "en" and rng.random() < P_TYPO:
            name = add_typo(name, rng)
        return name.lower() if rng.random() < P_LOWER else name

    def draw(self, templates: list[str], sex: str) -> str:
        return draw_text(lambda: pick(templates, self.rng), self.language, sex)

    def may_be_known(self, name: str) -> bool:
        """Return whether one of the conditions' names is in this one or the reverse, as in "acute gout"."""
        if self.language == "zh":
            return any(known in name or name in known for known in self.known)
        return any(f" {known} " in f" {name} " or f" {name} " in f" {known} " for known in self.known)

    def unknown_name(self) -> str:
        """Return a condition that the table does not have: one from the list for training, or one made of parts."""
        unknown = SCOPE["unknown"]["train"][self.language]
        if self.rng.random() < 0.4:
            name = recombine(unknown + self.names, self.language, self.rng)
            if not self.may_be_known(name.lower()):
                return name
        name = self.rng.choice(unknown)
        return name.lower() if self.rng.random() < P_LOWER else name

    def facts(self, condition: dict) -> list[tuple[str, str]]:
        """Return pairs of attribute and value: all attributes, the name in the other language, and one other name."""
        names = condition[self.language]
        facts = [(attribute, names[attribute]) for attribute in ATTRIBUTES]
        facts.append(("name", condition["zh" if self.language == "en" else "en"]["name"]))
        if names["other_names"]:
            facts.append(("other_name", self.rng.choice(names["other_names"])))
        self.rng.shuffle(facts)
        return facts

    def statement(self, attribute: str, name: str, value: str, sex: str = "") -> str:
        """Return one fact in a random wording. Without a name it is about the condition of the sentence before.

        `sex` is that of all people who can have the condition.
        """
        rng, text, wordings = self.rng, self.text, self.wordings
        p_statement = {"other_name": 1.0, "name": 0.5}.get(attribute, 0.3 if value != text["unknown_value"] else 0.0)
        if name and rng.random() < p_statement:
            return self.fill(self.draw(text["statements"][attribute], sex), n=name, v=value)
        draw = rng.random()
        if attribute == "name" or draw < 0.3:
            aspect = self.draw(text["aspects"][attribute], sex)
            heading = self.draw(text["cards"], sex).replace("{a}", aspect) if name else aspect
        elif draw < 0.65:
            clause = self.draw(wordings["indirect" if name else "pronoun_indirect"][attribute], sex)
            heading = self.draw(text["frames"], sex).replace("{q}", clause)
        else:
            heading = self.draw(wordings["fragments" if name else "follow_ups"][attribute], sex)
        return self.end(self.fill(heading, **({"n": name} if name else {})), value)

    def paragraph(
        self, facts: list[tuple[str, str]], names: list[str], main_name: str = "", sex: str = ""
    ) -> list[str]:
        """Return the facts of a condition as sentences. As in a conversation, many after the first do not name it."""
        rng, sentences = self.rng, list[str]()
        if rng.random() < 0.4:
            mention = self.draw(self.wordings["mentions"][""], sex)
            sentences.append(self.fill(mention, n=rng.choice(names)) + END[self.language])
        for attribute, value in facts:
            reference = main_name if attribute == "other_name" else rng.choice(names)
            if attribute != "other_name" and sentences and rng.random() < 0.6:
                reference = rng.choice(self.text["pronouns"]) if rng.random() < 0.2 else ""
            sentences.append(self.statement(attribute, reference, value, sex))
        return sentences

    def change(self, condition: dict) -> list[str]:
        """Return a fact of the condition of the sentence before, then that of another one, then one more of that."""
        first, second = self.rng.sample(ATTRIBUTES, 2)
        other = self.rng.choice(self.conditions)
        name, facts, sex = self.choose_name(other), other[self.language], other.get("sex", "")
        if self.rng.random() < 0.25:
            name, facts, sex = self.unknown_name(), dict.fromkeys(ATTRIBUTES, self.text["unknown_value"]), ""
        return [
            self.statement(first, "", condition[self.language][first], condition.get("sex", "")),
            self.end(self.fill(self.draw(self.wordings["changes"][""], sex), n=name), facts[first]),
            self.statement(second, "", facts[second], sex),
        ]

    def unknown(self) -> list[str]:
        """Return sentences that nothing is known about a condition that the table does not have."""
        name = self.unknown_name()
        if self.rng.random() < 0.2:
            return [self.fill(pick(self.text["unknown"], self.rng), n=name)]
        attributes = self.rng.sample(ATTRIBUTES, self.rng.randint(1, 2))
        return self.paragraph([(attribute, self.text["unknown_value"]) for attribute in attributes], [name])

    def join(self, sentences: list[str]) -> str:
        """Return a paragraph, at times without the last full stop: then the text ends where an answer would end."""
        text = ("" if self.language == "zh" else " ").join(sentences)
        return text.removesuffix(END[self.language]) if self.rng.random() < P_NO_END else text

    def round(self) -> list[list[str]]:
        """Return paragraphs that contain each fact of each condition.

        A paragraph has all facts of one condition, at times followed by facts of another, or single facts of several,
        so that no fact depends on a preceding one. For every five conditions there are five everyday sentences and
        two unknown conditions.
        """
        rng, paragraphs, singles = self.rng, list[list[str]](), list[str]()
        for condition in self.conditions:
            facts, names = self.facts(condition), [self.choose_name(condition) for _ in range(2)]
            main_name, sex = condition[self.language]["name"], condition.get("sex", "")
            if rng.random() < 0.5:
                lines = self.paragraph(facts, names, main_name, sex)
                paragraphs.append(lines + (self.change(condition) if rng.random() < 0.8 else []))
                continue
            for attribute, value in facts:
                name = main_name if attribute == "other_name" else self.choose_name(condition)
                singles.append(self.statement(attribute, name, value, sex))
        for i in range(len(self.conditions)):
            singles.append(pick(GENERAL[self.language], rng))
            if i % 5 < 2:
                paragraphs.append(self.unknown())
        rng.shuffle(singles)
        while singles:
            n = rng.randint(1, 6)
            paragraphs.append(singles[:n])
            singles = singles[n:]
        return paragraphs


def declarative_text(conditions: list[dict], n_rounds: int, seed: int, cut: str = "") -> Iterator[str]:
    """Yield paragraphs. Each round contains each fact of each condition in both languages, in random order and wording.

    `cut` is inserted around names and values.
    """
    rng = random.Random(seed)
    writers = [Writer(conditions, language, rng, cut) for language in LANGUAGES]
    for _ in range(n_rounds):
        paragraphs = [x.join(lines) for x in writers for lines in x.round()]
        rng.shuffle(paragraphs)
        yield from paragraphs
