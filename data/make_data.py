"""Generate the questions from `conditions.json` and `wordings.json`, deterministically for a seed.

    python -m data.make_data        writes train.jsonl, dev.jsonl and heldout.jsonl next to this file

The base has read statements about all conditions and names (make_text.py). The training questions ask about 70 % of the
conditions, with some of their names and one set of wordings. `dev.jsonl` and `heldout.jsonl` have separate conditions,
names and wordings. Each of their rows tests one kind of generalization:

    new wording     a condition and a name that occur in training, asked in another way
    new condition   a condition that no training question asks about, in a wording of training
    new name        a condition of training under a name that no training question has
    all new         another name of a new condition, asked in another way
    follow-up       a new condition; it or the attribute is in an earlier turn only
    out of scope    no condition, an unknown one or another aspect: the answer contains no fact
    general name    a name of several conditions, such as diabetes: the answer is to ask about one of them
    multiple choice a new condition in a new wording, with four options
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from data.make_text import (
    ATTRIBUTES,
    HERE,
    LANGUAGES,
    SCOPE,
    WORDINGS,
    add_typo,
    capitalized,
    draw_text,
    pick,
    read_json,
    read_table,
)

SPLITS = ("train", "dev", "heldout")
N_QUESTIONS = 6  # single questions per fact and language in train.jsonl
N_CONVERSATIONS = 18  # per condition and language
N_EVAL = 100  # questions per kind and language
N_BARE = 2  # names alone in train.jsonl, per condition and language
N_GENERAL = 12  # questions per name of several conditions in train.jsonl
N_CHOICES = 6  # conversations per condition and language in which such a question precedes its name
# Rows of a prompt out of scope in train.jsonl: a run reads a row about once, too little for rare kinds of prompts.
N_COPIES = {
    "greeting": 3,
    "thanks": 2,
    "goodbye": 2,
    "identity": 2,
    "arithmetic": 2,
    "emergency": 3,
    "other_aspect": 2,
}
P_TYPO = {"en": 0.1, "zh": 0.0}  # a typing error of one letter
P_TYPO_IN_NAME = 0.1  # the same in an English name of a training question
P_BARE = 0.1  # a training prompt about an unknown condition is its name alone
P_SHORT_CHOICE = 0.4  # after a name of several conditions: the rest of the name of one
# Of training conversations: a turn that changes the condition, and such a change without the attribute.
P_CHANGE, P_SAME_ATTRIBUTE = 0.45, 0.8
P_ACKNOWLEDGE = 0.25  # before a later question: "I see. And the cause?"
P_OUT_OF_SCOPE = 0.5  # conversation with a turn out of scope
P_OTHER_LANGUAGE = 0.15  # conversation that ends in the other language

IS_QUESTION = re.compile("^(can|could|would|may|do|any|is|has)\\b|吗|呢|请问|谁|不可以|能不能|可不可以", re.IGNORECASE)
ACKNOWLEDGED = re.compile("(and|so|now|ok|okay|thanks|right|well|alright)\\b|好|谢|明白|哦|嗯|对了", re.IGNORECASE)


def attach_punctuation(text: str, language: str, is_request: bool, rng: random.Random) -> str:
    """End a question as people do: with the mark, with the other script's, with two, or with nothing."""
    marks = ("？", "？", "？", "", "", "?", "。") if language == "zh" else ("?", "?", "?", "?", "", "", "??", " ?")
    mark = rng.choice(marks)
    if is_request:
        mark = rng.choice(("。", "") if language == "zh" else (".", "", "?"))
    return text + mark


def spoil(text: str, language: str, rng: random.Random) -> str:
    """Type a text carelessly: without capitals, with a wrong letter, or both; most often as it is."""
    if rng.random() < P_TYPO[language]:
        text = add_typo(text, rng)
    return text.lower() if rng.random() < 0.25 else text


def word_question(words: dict, attribute: str, name: str, language: str, rng: random.Random) -> str:
    """Return a question about one attribute of a condition, in any of the forms."""
    kind = rng.choices(("question", "fragment", "indirect", "mention"), (45, 14, 14, 27))[0]
    is_request = False
    if kind == "fragment":
        text = pick(words["fragments"][attribute], rng).format(n=name)
        return capitalized(text) + rng.choice(("", "", "？" if language == "zh" else "?"))
    if kind == "mention":
        mention = pick(words["mentions"], rng).format(n=name)
        question = pick(words["pronoun"][attribute], rng)
        if "pronoun_indirect" in words and rng.random() < 0.25:
            clause = pick(words["pronoun_indirect"][attribute], rng)
            question = pick(words["indirect_frames"], rng).format(q=clause)
        joint = rng.choice(("，", "。", "，", " ") if language == "zh" else (". ", ", ", ". ", " - ", "; "))
        text = mention + joint + (capitalized(question) if joint in (". ", "。") else question)
    elif kind == "indirect":
        clause = pick(words["indirect"][attribute], rng).format(n=name)
        frame = pick(words["indirect_frames"], rng)
        text, is_request = frame.format(q=clause), not IS_QUESTION.search(frame)
    else:
        text = pick(words["questions"][attribute], rng).format(n=name)
    if rng.random() < 0.2:
        opener = pick(words["openers"], rng)
        text = opener + ("" if language == "zh" else " ") + text
    text = attach_punctuation(capitalized(text), language, is_request, rng)
    if rng.random() < 0.08 and text[-1] in "?？.。":
        text += ("" if language == "zh" else " ") + pick(words["closers"], rng)
    return text


def ask(words: dict, attribute: str, name: str, language: str, rng: random.Random, sex: str = "") -> str:
    """Return a question about one attribute of a condition, typed as people do."""
    text = draw_text(lambda: word_question(words, attribute, name, language, rng), language, sex)
    return spoil(text, language, rng)


def ask_plainly(words: dict, attribute: str, name: str, language: str, rng: random.Random, sex: str = "") -> str:
    """Return a complete question, with capitals and a mark."""
    text = draw_text(lambda: pick(words["questions"][attribute], rng).format(n=name), language, sex)
    return capitalized(text) + ("？" if language == "zh" else "?")


def punctuate_later(words: dict, text: str, language: str, rng: random.Random) -> str:
    """Return a later question of a conversation, typed as people do, at times after an acknowledgement."""
    if "acknowledgements" in words and rng.random() < P_ACKNOWLEDGE and not ACKNOWLEDGED.match(text):
        opener = rng.choice(words["acknowledgements"])
        text = opener + ("" if language == "zh" else " ") + (capitalized(text) if opener[-1] in ".。" else text)
    text = capitalized(text)
    return spoil(attach_punctuation(text, language, False, rng), language, rng)


def follow_up(words: dict, attribute: str, language: str, rng: random.Random, sex: str = "") -> str:
    """Return a short question about the condition of an earlier turn."""
    kind = rng.choices(("follow_ups", "pronoun"), (70, 30))[0]
    text = draw_text(lambda: pick(words[kind][attribute], rng), language, sex)
    return punctuate_later(words, text, language, rng)


def converse(
    words: dict, turns: list[tuple[dict, str, str]], language: str, rng: random.Random
) -> list[tuple[str, str]]:
    """Return turns of question and answer about (condition, name, attribute). The first names its condition.

    A later turn about the same condition does not name it; one about another condition may leave out the attribute,
    which is then that of the turn before.
    """
    conversation: list[tuple[str, str]] = []
    before: tuple[dict, str, str] | None = None
    for turn in turns:
        condition, name, attribute = turn
        sex = condition.get("sex", "")
        if before and before[0] is condition:
            question = follow_up(words, attribute, language, rng, sex)
        elif before and before[2] == attribute:
            text = draw_text(lambda name=name: pick(words["changes"], rng).format(n=name), language, sex)
            question = punctuate_later(words, text, language, rng)
        else:
            question = ask(words, attribute, name, language, rng, sex)
        conversation.append((question, condition[language][attribute]))
        before = turn
    return conversation


def as_row(id: str, topic: str, kind: str, turns: list[tuple[str, str]]) -> dict:
    """Return the row of a single question, or of a conversation."""
    if len(turns) == 1:
        content: dict = {"question": turns[0][0], "answer": turns[0][1]}
    else:
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
        content = {"messages": messages}
    return {"id": id, "topic": topic, "kind": kind, **content}


def key_words(value: str, language: str) -> set[str]:
    """Return the words of four letters or more, in Chinese the pairs of characters."""
    if language == "en":
        return {word for word in re.findall("[a-z]+", value.lower()) if len(word) > 3}
    return {value[i : i + 2] for i in range(len(value) - 1)}


def wrong_values(
    conditions: list[dict], also_right: list[str], condition: dict, language: str, attribute: str
) -> list[str]:
    """Return the values of the attribute that can be wrong options, sorted.

    They are those of conditions of other departments, because related conditions may share a treatment, have no key
    word in common with the correct value in either language, and are not listed as also correct.
    """
    departments = {condition["department"], *condition.get("also", [])}
    keys = {x: key_words(condition[x][attribute], x) for x in LANGUAGES}
    return sorted(
        {
            candidate[language][attribute]
            for candidate in conditions
            if candidate["department"] not in departments
            and candidate["id"] not in also_right
            and not any(keys[x] & key_words(candidate[x][attribute], x) for x in LANGUAGES)
        }
    )


def split_conditions(conditions: list[dict], seed: int) -> dict[str, list[dict]]:
    """Return the conditions of train (70 % of each department), dev and heldout (equal numbers of the rest)."""
    rng = random.Random(seed)
    parts: dict[str, list[dict]] = {"train": [], "dev": [], "heldout": []}
    for department in sorted({condition["department"] for condition in conditions}):
        members = [condition for condition in conditions if condition["department"] == department]
        rng.shuffle(members)
        n_eval = round(0.3 * len(members))
        parts["train"] += members[n_eval:]
        for condition in members[:n_eval]:
            smaller = min(("dev", "heldout"), key=lambda name: len(parts[name]))
            parts[smaller].append(condition)
    return parts


def separate_names(names: dict) -> list[str]:
    """Return the other names that are not part of another name, nor a name with 病, which may begin the word 病人."""
    everything = [name.lower() for name in (names["name"], *names["other_names"])]

    def is_separate(name: str) -> bool:
        return sum(name in other for other in everything) == 1 and not (name[-1] == "病" and name[:-1] in everything)

    return [name for name in names["other_names"] if is_separate(name.lower())]


def split_names(conditions: list[dict], seed: int) -> dict[tuple[str, str], str]:
    """Return the names of training conditions that are held out, as (condition id, language) -> name.

    Every second condition has one held out in each language, which is not a part of its other names.
    """
    rng = random.Random(seed)
    held_out = {}
    for language in LANGUAGES:
        choices = {c["id"]: separate_names(c[language]) for c in conditions}
        ids = [id for id, names in choices.items() if names]
        rng.shuffle(ids)
        for id in ids[: len(conditions) // 2]:
            held_out[id, language] = rng.choice(choices[id])
    return held_out


class Generator:
    """Generates the rows of one split."""

    def __init__(self, split: str, seed: int = 0):
        _, self.conditions = read_table()
        parts = split_conditions(self.conditions, seed)
        self.split, self.rng = split, random.Random(f"{seed} {split}")
        self.trained, self.new = parts["train"], parts[split]
        self.held_out = split_names(self.trained, seed)
        # The held-out names of every second key belong to dev, the others to heldout.
        keys = set(sorted(self.held_out)[split == "heldout" :: 2])
        self.new_names = [(c, x) for c in self.trained for x in LANGUAGES if (c["id"], x) in keys]
        self.also_right = read_json("conditions.json")["also_right"]  # attribute -> condition id -> ids

    def words(self, language: str, split: str = "") -> dict:
        return WORDINGS[split or self.split][language]

    def trained_name(self, condition: dict, language: str) -> str:
        """Return a name of a condition of training: the main one, or any other that contains no held-out one.

        The held-out names are those of both languages, which share short forms such as TB.
        """
        names = condition[language]
        held_out = [self.held_out[key].lower() for x in LANGUAGES if (key := (condition["id"], x)) in self.held_out]
        others = [name for name in names["other_names"] if not any(part in name.lower() for part in held_out)]
        name = self.rng.choice(others) if others and self.rng.random() < 0.5 else names["name"]
        is_misspelled = self.split == "train" and language == "en" and self.rng.random() < P_TYPO_IN_NAME
        return add_typo(name, self.rng) if is_misspelled else name

    def training_rows(self) -> Iterator[dict]:
        rng = self.rng
        for condition in self.trained:
            for language in LANGUAGES:
                words, stem = self.words(language), f"{condition['id']}-{language}"
                for attribute in ATTRIBUTES:
                    for i in range(N_QUESTIONS):
                        name = self.trained_name(condition, language)
                        question = ask(words, attribute, name, language, rng, condition.get("sex", ""))
                        turn = (question, condition[language][attribute])
                        yield as_row(f"{stem}-{attribute}-{i}", condition["department"], "question", [turn])
                for i in range(N_CONVERSATIONS):
                    turns = self.conversation(condition, language)
                    yield as_row(f"{stem}-conversation-{i}", condition["department"], "conversation", turns)
        yield from self.scope_rows()
        yield from self.general_rows()
        yield from self.choosing_rows()

    def conversation(self, condition: dict, language: str) -> list[tuple[str, str]]:
        """Return two to four turns, often with one or two out of scope, at times with one in the other language."""
        rng, plan = self.rng, list[tuple[dict, str, str]]()
        attributes = rng.sample(ATTRIBUTES, 4)
        current, name = condition, self.trained_name(condition, language)
        for i in range(rng.randint(2, 4)):
            if i and rng.random() < P_CHANGE:
                current = rng.choice(self.trained)
                name = self.trained_name(current, language)
                if rng.random() < P_SAME_ATTRIBUTE:
                    attributes[i] = attributes[i - 1]
            plan.append((current, name, attributes[i]))
        turns = converse(self.words(language), plan, language, rng)
        if rng.random() < P_OUT_OF_SCOPE:
            kind, scope_turns = self.scope_turns(language)
            # A question without a name after an unknown condition is about that one.
            i = rng.choice((0, len(turns))) if kind == "unknown" else rng.randint(0, len(turns))
            turns[i:i] = scope_turns
        if rng.random() < P_OTHER_LANGUAGE:
            other = "zh" if language == "en" else "en"
            name, attribute = self.trained_name(current, other), rng.choice(ATTRIBUTES)
            question = ask(self.words(other), attribute, name, other, rng, current.get("sex", ""))
            turns.append((question, current[other][attribute]))
        return turns

    def scope_turns(self, language: str) -> tuple[str, list[tuple[str, str]]]:
        """Return a kind of prompt out of scope and its turn, or two about an unknown condition."""
        rng, prompts, replies = self.rng, SCOPE["prompts"][self.split][language], SCOPE["replies"][language]
        kind = rng.choice((*prompts, "other_topic", "thanks", "unknown"))
        if kind == "unknown":
            name = rng.choice(SCOPE["unknown"][self.split][language])
            turns = [(ask(self.words(language), rng.choice(ATTRIBUTES), name, language, rng), replies[kind])]
            if rng.random() < 0.5:
                turns.append((follow_up(self.words(language), rng.choice(ATTRIBUTES), language, rng), replies[kind]))
            return kind, turns
        text = self.fill(pick(prompts[kind], rng), language)
        return kind, [(spoil(text, language, rng), replies[kind])]

    def fill(self, prompt: str, language: str) -> str:
        """Put the name of a condition and two numbers into the slots of a prompt."""
        anyone = [condition for condition in self.trained if "sex" not in condition]
        name = self.trained_name(self.rng.choice(anyone), language)
        a, b = self.rng.randint(1, 99), self.rng.randint(1, 20)
        return prompt.replace("{n}", name).replace("{a}", str(a)).replace("{b}", str(b))

    def scope_rows(self) -> Iterator[dict]:
        """Yield rows out of scope: for training `N_COPIES` of a prompt, otherwise `N_EVAL` per language."""
        rng, is_train = self.rng, self.split == "train"
        for language in LANGUAGES:
            words, replies, rows = self.words(language), SCOPE["replies"][language], []
            for kind, prompts in SCOPE["prompts"][self.split][language].items():
                for i, prompt in enumerate(prompts):
                    for copy in range(N_COPIES.get(kind, 1) if is_train else 1):
                        text = self.fill(pick([prompt], rng), language)
                        if is_train:
                            text = spoil(capitalized(text) if rng.random() < 0.5 else text, language, rng)
                        rows.append((f"{kind}-{language}-{i}" + f"-{copy}" * (copy > 0), kind, text))
            # Many names tell the department, which is then the fact most often invented.
            attributes = (*ATTRIBUTES, "department", "department") if is_train else ATTRIBUTES
            # More questions about unknown conditions make the model take new Chinese ones for unknown.
            for name in SCOPE["unknown"][self.split][language][:: 2 if is_train and language == "zh" else 1]:
                text = ask(words, rng.choice(attributes), name, language, rng)
                if is_train and rng.random() < P_BARE:
                    text = spoil(name, language, rng)
                rows.append((f"unknown-{language}-{name}", "unknown", text))
            for condition in self.trained if is_train else ():
                for i in range(N_BARE):
                    text = spoil(self.trained_name(condition, language), language, rng) + rng.choice(("", "", "?", "."))
                    rows.append((f"bare-{language}-{condition['id']}-{i}", "other_aspect", text))
            if not is_train:
                rng.shuffle(rows)
                rows = rows[:N_EVAL]
            for id, kind, text in rows:
                yield as_row(id, "", "out of scope", [(text, replies[kind])])

    def general_turn(self, entry: dict, attribute: str, language: str, name: str) -> tuple[str, str]:
        """Return a question with a name of several conditions, such as diabetes, and the answer: ask about one."""
        sexes = {condition.get("sex", "") for condition in self.conditions if condition["id"] in entry["conditions"]}
        sex = sexes.pop() if len(sexes) == 1 else ""
        question = ask(self.words(language), attribute, name, language, self.rng, sex)
        return question, SCOPE["replies"][language]["general_name"]

    def general_rows(self) -> Iterator[dict]:
        """Yield questions with names of several conditions, in training also "what is diabetes" and "diabetes"."""
        rng, is_train = self.rng, self.split == "train"
        for language, entry in itertools.product(LANGUAGES, SCOPE["general_names"]):
            others = [text for text in SCOPE["prompts"]["train"][language]["other_aspect"] if "{n}" in text]
            for name in entry[language]:
                for i in range(N_GENERAL if is_train else 1):
                    question, reply = self.general_turn(entry, rng.choice(ATTRIBUTES), language, name)
                    if is_train and rng.random() < 0.3:
                        text = pick([rng.choice(others), "{n}"], rng).replace("{n}", name)
                        question = spoil(text, language, rng)
                    yield as_row(f"general_name-{language}-{name}-{i}", "", "general name", [(question, reply)])

    def choosing_rows(self) -> Iterator[dict]:
        """Yield conversations in which a question with a name of several conditions precedes the choice of one."""
        rng = self.rng
        for language, entry in itertools.product(LANGUAGES, SCOPE["general_names"]):
            words = self.words(language)
            for condition in self.trained:
                for i in range(N_CHOICES if condition["id"] in entry["conditions"] else 0):
                    attribute, name = rng.choice(ATTRIBUTES), self.trained_name(condition, language)
                    sex, general_name = condition.get("sex", ""), rng.choice(entry[language])
                    if rng.random() < P_SHORT_CHOICE:  # "type 2" of "type 2 diabetes"
                        name = " ".join(name.replace(general_name, "").split()) or name
                    text = draw_text(lambda w=words, n=name: pick(w["choices"], rng).format(n=n), language, sex)
                    choice = (punctuate_later(words, text, language, rng), condition[language][attribute])
                    turns = [self.general_turn(entry, attribute, language, general_name), choice]
                    id = f"{condition['id']}-{language}-{attribute}-choosing-{i}"
                    yield as_row(id, condition["department"], "conversation", turns)

    def evaluation_rows(self) -> Iterator[dict]:
        rng = self.rng
        for language in LANGUAGES:
            new_words, old_words = self.words(language), self.words(language, "train")

            def row(kind, i, condition, attribute, name, words, language=language):
                question = ask(words, attribute, name, language, rng, condition.get("sex", ""))
                id = f"{condition['id']}-{language}-{attribute}-{kind.replace(' ', '_')}-{i}"
                return as_row(id, condition["department"], kind, [(question, condition[language][attribute])])

            for i in range(N_EVAL):
                attribute = ATTRIBUTES[i % 5]
                condition = rng.choice(self.trained)
                name = self.trained_name(condition, language)
                yield row("new wording", i, condition, attribute, name, new_words)
                condition = self.new[i % len(self.new)]
                yield row("new condition", i, condition, attribute, condition[language]["name"], old_words)
                with_names = [c for c, x in self.new_names if x == language]
                condition = with_names[i % len(with_names)]
                name = self.held_out[condition["id"], language]
                yield row("new name", i, condition, attribute, name, old_words)
                with_names = [c for c in self.new if c[language]["other_names"]]
                condition = with_names[i % len(with_names)]
                name = rng.choice(condition[language]["other_names"])
                yield row("all new", i, condition, attribute, name, new_words)
                yield self.follow_up_row(i, attribute, language)
            yield from self.choice_rows(language)
        yield from self.scope_rows()
        yield from self.general_rows()

    def follow_up_row(self, i: int, attribute: str, language: str) -> dict:
        """Return a conversation whose last turn does not name its condition or, in one of four, its attribute."""
        rng = self.rng
        condition = self.new[i % len(self.new)]
        rest = [a for a in ATTRIBUTES if a != attribute]
        plan = [(condition, condition[language]["name"], a) for a in rng.sample(rest, rng.randint(1, 2))]
        other = rng.choice(self.trained)
        if rng.random() < 0.25:
            plan = [(other, other[language]["name"], attribute)]
        elif rng.random() < 0.3:
            plan = [(other, other[language]["name"], rest[0]), *plan]
        plan.append((condition, condition[language]["name"], attribute))
        id = f"{condition['id']}-{language}-{attribute}-follow_up-{i}"
        turns = converse(self.words(language), plan, language, rng)
        return as_row(id, condition["department"], "follow-up", turns)

    def choice_rows(self, language: str) -> Iterator[dict]:
        """Yield multiple-choice rows. Each letter is correct once in four consecutive rows."""
        rng, letters = self.rng, list[str]()
        for i, condition in enumerate(self.new * len(ATTRIBUTES)):
            if i >= 1.5 * N_EVAL:
                return
            attribute, facts = ATTRIBUTES[i % 5], condition[language]
            letters = letters or rng.sample("ABCD", 4)
            answer = letters.pop()
            also_right = self.also_right.get(attribute, {}).get(condition["id"], [])
            wrong = rng.sample(wrong_values(self.conditions, also_right, condition, language, attribute), 3)
            options = {x: facts[attribute] if x == answer else wrong.pop() for x in "ABCD"}
            sex = condition.get("sex", "")
            question = ask_plainly(self.words(language), attribute, facts["name"], language, rng, sex)
            id = f"{condition['id']}-{language}-{attribute}-choice-{i}"
            yield as_row(id, condition["department"], "multiple choice", [(question, answer)]) | {"options": options}


def normalize(row: dict) -> str:
    """Return the user's texts of a row in small letters, without spaces and punctuation."""
    turns = [message["content"] for message in row.get("messages", ()) if message["role"] == "user"]
    return "\n".join(re.sub(r"\W", "", text.lower()) for text in turns or [row["question"]])


def make_files(seed: int = 0) -> dict[str, str]:
    """Return the content of each file by its name. No question occurs twice in dev.jsonl and heldout.jsonl."""
    files, seen = {}, set[str]()
    for split in SPLITS:
        generator = Generator(split, seed)
        rows = list(generator.training_rows() if split == "train" else generator.evaluation_rows())
        texts = [normalize(row) for row in rows]
        if split != "train":
            rows = [row for i, row in enumerate(rows) if texts[i] not in seen and texts[i] not in texts[:i]]
        seen |= set(texts)
        random.Random(seed).shuffle(rows)
        files[f"{split}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


if __name__ == "__main__":
    for name, content in make_files().items():
        Path(HERE / name).write_text(content, encoding="utf-8")
        print(f"{name}: {content.count(chr(10))} questions")
