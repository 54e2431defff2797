"""The table of conditions, the generated text and questions, and the shipped files."""

import itertools
import json
import random
import re
from collections import Counter, defaultdict

import pytest
from sentencepiece import SentencePieceProcessor

from data.make_data import (
    ACKNOWLEDGED,
    N_BARE,
    N_COPIES,
    SPLITS,
    WORDINGS,
    Generator,
    converse,
    follow_up,
    make_files,
    split_conditions,
)
from data.make_text import (
    ATTRIBUTES,
    HERE,
    LANGUAGES,
    PEOPLE,
    SCOPE,
    Writer,
    add_typo,
    declarative_text,
    draw_text,
    read_json,
    read_table,
)
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.questions.overlap import normalize_question, question_hash, training_hashes
from minidoctor.questions.read import read_questions
from minidoctor.text.tokenizer import load_tokenizer

DEPARTMENTS, CONDITIONS = read_table()
BY_ID = {condition["id"]: condition for condition in CONDITIONS}
ROWS = {name: read_questions(HERE / f"{name}.jsonl").rows for name in SPLITS}
GENERATORS = {name: Generator(name) for name in SPLITS}
EVALUATIONS = ("dev", "heldout")
N_ROUNDS = 6  # of the text of the base: each contains each fact at least once
KINDS = {"new wording", "new condition", "new name", "all new", "follow-up", "multiple choice"}  # about one condition


@pytest.fixture(scope="module")
def text():
    return "\n".join(declarative_text(CONDITIONS, N_ROUNDS, seed=0))


def condition_names(condition, language):
    return [condition[language]["name"], *condition[language]["other_names"]]


def user_texts(row):
    return [message["content"] for message in row.messages if message["role"] == "user"]


def parse_id(row):
    """Return condition, language and attribute of a row about a condition."""
    id, language, attribute, *_ = row.id.split("-")
    return BY_ID[id], language, attribute


def split_ids(name):
    return {condition["id"] for condition in split_conditions(CONDITIONS, seed=0)[name]}


def expand(template):
    """Return all texts of a template with alternatives."""
    parts = [part.strip("[]").split("|") for part in re.split(r"(?=\[)|(?<=\])", template)]
    return {" ".join("".join(choice).split()) for choice in itertools.product(*parts)}


def wordings(split, language):
    for key, value in WORDINGS[split][language].items():
        for attribute, texts in value.items() if isinstance(value, dict) else [("", value)]:
            yield from ((key, attribute, normalize_question(text)) for t in texts for text in expand(t))


def test_the_table_is_complete_and_its_values_are_distinct():
    assert len(CONDITIONS) >= 260
    assert len(DEPARTMENTS) >= 12
    assert len(BY_ID) == len(CONDITIONS)
    for language in LANGUAGES:
        for key in ("symptoms", "cause", "test", "treatment"):
            values = [condition[language][key] for condition in CONDITIONS]
            assert len(set(values)) == len(CONDITIONS), (language, key)
            assert all(value.strip() == value and value for value in values)
    for condition in CONDITIONS:
        assert condition["en"]["symptoms"].count(" and ") == condition["zh"]["symptoms"].count("和") == 1


def test_a_name_means_one_condition():
    for language in LANGUAGES:
        names = [name.lower() for condition in CONDITIONS for name in condition_names(condition, language)]
        assert len(names) > 2 * len(CONDITIONS)
        assert [name for name, n in Counter(names).items() if n > 1] == []
        unknown = [name.lower() for split in SPLITS for name in SCOPE["unknown"][split][language]]
        general = [name.lower() for entry in SCOPE["general_names"] for name in entry[language]]
        assert len(general) == len(set(general)) > 25
        assert not set(unknown) & set(names)
        assert not set(general) & {*unknown, *names}


def test_make_files_reproduces_the_shipped_questions_byte_for_byte():
    for name, content in make_files(seed=0).items():
        assert (HERE / name).read_bytes() == content.encode()


def test_conditions_are_split_70_15_15():
    ids = {name: split_ids(name) for name in SPLITS}
    assert sum(map(len, ids.values())) == len(CONDITIONS) == len(set.union(*ids.values()))
    assert len(ids["train"]) / len(CONDITIONS) == pytest.approx(0.7, abs=0.02)
    assert abs(len(ids["dev"]) - len(ids["heldout"])) <= 1
    trained = {parse_id(row)[0]["id"] for row in ROWS["train"] if row.kind in ("question", "conversation")}
    assert trained == ids["train"]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_each_kind_asks_about_its_conditions_under_its_names(name):
    other = Generator({"dev": "heldout", "heldout": "dev"}[name])
    held_out = dict(GENERATORS[name].held_out)
    here = {(condition["id"], language) for condition, language in GENERATORS[name].new_names}
    assert here | {(condition["id"], language) for condition, language in other.new_names} == set(held_out)
    assert {row.kind for row in ROWS[name]} == {*KINDS, "out of scope", "general name"}
    for row in ROWS[name]:
        if row.kind not in KINDS:
            continue
        condition, language, attribute = parse_id(row)
        is_trained = row.kind in ("new wording", "new name")
        assert condition["id"] in split_ids("train" if is_trained else name), row.id
        assert row.options or row.answer == condition[language][attribute]
        if row.kind == "new name":
            assert (condition["id"], language) in here


def test_a_held_out_name_never_occurs_in_train(monkeypatch):
    chosen, used = Generator.trained_name, defaultdict(set)

    def record(generator, condition, language):
        name = chosen(generator, condition, language)
        used[condition["id"]].add(name.lower())
        return name

    monkeypatch.setattr(Generator, "trained_name", record)
    texts = defaultdict(list)  # of a condition, in both languages
    for row in Generator("train").training_rows():
        messages = row.get("messages", ({"role": "user", "content": row.get("question")},))
        texts[row["id"].split("-")[0]] += [x["content"] for x in messages if x["role"] == "user"]
    for (id, language), name in GENERATORS["train"].held_out.items():
        assert name in BY_ID[id][language]["other_names"]
        assert not [other for other in used[id] if name.lower() in other], (id, name)
        # In Chinese text a wording and another name can contain it by chance, as 了解下 and 腰痛 contain 下腰痛.
        if name.isascii():
            pattern = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", re.IGNORECASE)
            assert not [text for text in texts[id] if pattern.search(text)], (id, name)
    assert sum(map(len, texts.values())) > 10_000


def test_nobody_has_a_condition_of_the_other_sex():
    opposite = {"male": "female", "female": "male"}
    n_people = Counter()
    for row in itertools.chain(*ROWS.values()):
        if row.kind not in {*KINDS, "question"}:  # the id of a conversation does not tell its last condition
            continue
        condition, language, _ = parse_id(row)
        if sex := condition.get("sex"):
            people = {x for x in opposite if re.search(PEOPLE[language][x], row.question, re.IGNORECASE)}
            assert opposite[sex] not in people, row.question
            n_people[sex] += len(people)
    assert min(n_people["male"], n_people["female"]) > 10


def test_draw_text_leaves_out_people_of_the_other_sex():
    texts = ["my father has it", "My Wife has it", "my friend has it"]
    for sex, expected in (("", texts), ("female", texts[1:]), ("male", texts[::2])):
        rng = random.Random(0)
        assert {draw_text(lambda rng=rng: rng.choice(texts), "en", sex) for _ in range(100)} == {*expected}
    assert draw_text(iter(["我爸得了", "我妈得了"]).__next__, "zh", "female") == "我妈得了"


def test_wordings_of_the_splits_differ():
    for language in LANGUAGES:
        sets = {split: {w for w in wordings(split, language) if w[0] not in ("openers", "closers")} for split in SPLITS}
        assert all(len(texts) > 100 for texts in sets.values())
        # A clause may be indirect in one split and a question in another: the texts are compared, not their keys.
        texts = {split: {text for _, _, text in found} for split, found in sets.items()}
        assert not texts["train"] & texts["dev"]
        assert not texts["train"] & texts["heldout"]
        assert not texts["dev"] & texts["heldout"]


def test_no_evaluation_question_is_trained_on():
    trained = set().union(*map(training_hashes, ROWS["train"]))
    assert all(question_hash(row) in trained for row in ROWS["train"])
    for name in EVALUATIONS:
        assert not any(question_hash(row) in trained for row in ROWS[name])
        assert len({question_hash(row) for row in ROWS[name]}) == len(ROWS[name])


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_follow_up_needs_the_turn_before(name):
    rows = [row for row in ROWS[name] if row.kind == "follow-up"]
    changes = {x: {text for key, _, text in wordings(name, x) if key == "changes"} for x in LANGUAGES}
    n_named = n_changes = 0
    for row in rows:
        condition, language, _ = parse_id(row)
        *earlier, last = (text.lower() for text in user_texts(row))
        assert earlier
        names = [name.lower() for name in condition_names(condition, language) if name.lower() in last]
        if names:  # then the question leaves out the attribute
            n_named += 1
            n_changes += normalize_question(last.replace(max(names, key=len), "{n}")) in changes[language]
    assert 0 < n_named < len(rows) / 2
    assert n_changes > 0.8 * n_named  # the others have a typing error


def test_the_page_states_the_numbers_of_rows():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    for name, rows in ROWS.items():
        assert f"| `{name}.jsonl` | {len(rows):,} questions" in page


def test_rare_kinds_of_prompts_occur_several_times_in_training():
    counts = Counter(row.id.split("-")[0] for row in ROWS["train"] if row.kind == "out of scope")
    for kind, n in N_COPIES.items():
        assert counts[kind] == n * sum(len(SCOPE["prompts"]["train"][language][kind]) for language in LANGUAGES)
    questions = Counter(normalize_question(row.question) for row in ROWS["train"] if row.kind == "out of scope")
    assert min(questions[text] for text in ("hello", "你好")) > 5
    assert counts["bare"] == N_BARE * len(split_ids("train")) * len(LANGUAGES)
    for language in LANGUAGES:
        n_bare = sum(questions[normalize_question(name)] > 0 for name in SCOPE["unknown"]["train"][language])
        assert 0.03 < n_bare / len(SCOPE["unknown"]["train"][language]) < 0.12


def test_a_quarter_of_later_questions_follow_an_acknowledgement():
    rng = random.Random(0)
    words = {"acknowledgements": ["ok,", "I see."], "follow_ups": {"cause": ["why"]}, "pronoun": {"cause": ["why"]}}
    texts = [follow_up(words, "cause", "en", rng).lower() for _ in range(1000)]
    openers = Counter(opener for text in texts for opener in ("ok, ", "i see. ") if text.startswith(opener))
    assert 80 < openers["ok, "] < 170
    assert 80 < openers["i see. "] < 170
    assert not ACKNOWLEDGED.match("nowhere")
    words["follow_ups"]["cause"] = words["pronoun"]["cause"] = ["and why", "好的，为什么"]
    texts = [follow_up(words, "cause", "en", rng).lower() for _ in range(1000)]
    assert not [text for text in texts if text.startswith(("ok, ", "i see. "))]
    words = {"follow_ups": {"cause": ["why"]}, "pronoun": {"cause": ["why"]}}
    texts = [follow_up(words, "cause", "en", rng).lower() for _ in range(1000)]
    assert not [text for text in texts if text.startswith(("ok, ", "i see. "))]


def test_a_change_of_the_condition_may_follow_an_acknowledgement():
    words = WORDINGS["train"]["en"] | {"acknowledgements": ["I see."], "changes": ["what about {n}"]}
    turns = [(BY_ID[id], name, "cause") for id, name in (("gout", "gout"), ("asthma", "asthma"))]
    changes = [converse(words, turns, "en", random.Random(seed))[1] for seed in range(200)]
    assert {answer for _, answer in changes} == {BY_ID["asthma"]["en"]["cause"]}
    assert 20 < sum(question.lower().startswith("i see. what about") for question, _ in changes) < 80


def test_a_tenth_of_the_english_names_of_training_is_misspelled():
    influenza = BY_ID["influenza"]
    for split, language, shares in (("train", "en", (0.03, 0.1)), ("train", "zh", (0, 0)), ("dev", "en", (0, 0))):
        generator, names = Generator(split), condition_names(influenza, language)
        n_wrong = sum(generator.trained_name(influenza, language) not in names for _ in range(1000))
        assert shares[0] <= n_wrong / 1000 <= shares[1]


def test_the_tokenizer_of_the_base_has_a_piece_for_each_character_of_an_answer():
    tokenizer = SentencePieceProcessor(model_file=str(HERE / "base" / "tokenizer.model"))
    answers = {row.answer for rows in ROWS.values() for row in rows}
    assert len(answers) > 2000
    assert not [answer for answer in answers if any(map(tokenizer.is_byte, tokenizer.encode(answer)))]


def test_a_general_name_is_answered_with_the_request_to_ask_about_one_condition():
    for split in SPLITS:
        rows = {row.id: row for row in ROWS[split] if row.kind == "general name"}
        for language, entry in itertools.product(LANGUAGES, SCOPE["general_names"]):
            assert len(entry["conditions"]) > 1
            assert {*entry["conditions"]} <= {*BY_ID}
            for name in entry[language]:
                row = rows[f"general_name-{language}-{name}-0"]
                assert row.answer == SCOPE["replies"][language]["general_name"]
                # English has typing errors, and training also asks "what is it".
                assert language == "en" or split == "train" or name.lower() in row.question.lower()


def test_a_kind_can_be_chosen_after_a_general_name():
    rows, is_short = [row for row in ROWS["train"] if re.search(r"-choosing-\d+$", row.id)], []
    for row in rows:
        condition, language, attribute = parse_id(row)
        assert row.messages[1]["content"] == SCOPE["replies"][language]["general_name"]
        assert row.answer == condition[language][attribute]
        if language == "zh":
            *_, last = (text.lower() for text in user_texts(row))
            is_short.append(not any(name.lower() in last for name in condition_names(condition, language)))
    assert 0.05 < sum(is_short) / len(is_short) < 0.4  # the rest of a name, as "type 2"
    chosen = {parse_id(row)[0]["id"] for row in rows}
    assert chosen == {id for entry in SCOPE["general_names"] for id in entry["conditions"]} & split_ids("train")


def test_answers_out_of_scope_contain_no_fact():
    values = {c[x][a].lower() for c in CONDITIONS for x in LANGUAGES for a in ATTRIBUTES if a != "department"}
    replies = {reply for language in LANGUAGES for reply in SCOPE["replies"][language].values()}
    assert not [value for value in values for reply in replies if value in reply.lower()]
    for rows in ROWS.values():
        assert {row.answer for row in rows if row.kind in ("out of scope", "general name")} <= replies


def test_unknown_conditions_of_the_evaluations_are_in_no_other_text(text):
    train = text.lower() + "\n".join(q for row in ROWS["train"] for q in user_texts(row)).lower()
    for name in EVALUATIONS:
        for language in LANGUAGES:
            found = [n for n in SCOPE["unknown"][name][language] if n.lower() in train]
            assert len(found) <= 0.1 * len(SCOPE["unknown"][name][language]), found  # as a part of another name


@pytest.mark.parametrize("name", EVALUATIONS)
def test_letters_are_balanced_and_wrong_options_are_wrong(name):
    rows = [row for row in ROWS[name] if row.options]
    for language in LANGUAGES:
        counts = Counter(row.answer for row in rows if row.language == language)
        assert max(counts.values()) - min(counts.values()) <= 1
    also_right = read_json("conditions.json")["also_right"]
    for row in rows:
        condition, language, attribute = parse_id(row)
        correct, values = condition[language][attribute], set(row.options.values())
        assert row.options[row.answer] == correct
        assert len(values) == 4
        for value in values - {correct}:
            sources = [c for c in CONDITIONS if c[language][attribute] == value]
            departments = {c["department"] for c in sources}
            assert departments
            assert not departments & {condition["department"], *condition.get("also", [])}
            assert not [c for c in sources if c["id"] in also_right.get(attribute, {}).get(condition["id"], [])]


def test_each_fact_occurs_in_each_round_and_each_name_at_times(text):
    lower, missing = text.lower(), 0
    for condition in CONDITIONS:
        for language in LANGUAGES:
            assert all(lower.count(condition[language][attribute].lower()) >= N_ROUNDS for attribute in ATTRIBUTES)
            missing += sum(name.lower() not in lower for name in condition_names(condition, language))
    assert missing < 40  # of 2,200; others occur in later rounds


def remove_values(text):
    """Remove the names and values of the table, which may contain any character."""
    values = {condition["zh"][key] for condition in CONDITIONS for key in ATTRIBUTES}
    values |= {name for condition in CONDITIONS for name in condition_names(condition, "zh")}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "")
    return text


def test_the_text_of_the_base_contains_no_question(text):
    assert "?" not in text
    words = "what|which|who|whom|whose|how|why|where|when (?:is|do|does|should)|can|could|should|do|does|did|is|are"
    assert not re.search(rf"(^|[.:;-] )({words})\b", text, re.IGNORECASE | re.MULTILINE)
    assert not re.search("[？吗呢]|什么|哪|怎么|怎样|如何|为何|谁|几", remove_values(text[:300_000]))


def test_the_text_gives_no_condition_to_the_other_sex():
    opposite, n_people = {"male": "female", "female": "male"}, Counter()
    conditions = [condition for condition in CONDITIONS if "sex" in condition]
    for language in LANGUAGES:
        writer = Writer(conditions, language, random.Random(0))
        for condition in conditions * 20:
            text = " ".join(writer.paragraph(writer.facts(condition), ["N"], "N", condition["sex"]))
            found = {x for x in opposite if re.search(PEOPLE[language][x], remove_values(text), re.IGNORECASE)}
            assert opposite[condition["sex"]] not in found, text
            n_people[condition["sex"]] += len(found)
    assert min(n_people.values()) > 10


def test_unknown_names_are_no_variant_of_a_known_one():
    writers = {language: Writer(CONDITIONS, language, random.Random(0)) for language in LANGUAGES}
    for language, name in (("en", "acute gout"), ("en", "gastric"), ("zh", "急性痛风"), ("zh", "痛")):
        assert writers[language].may_be_known(name), name
    for language, name in (("en", "goutitis"), ("en", "konzo"), ("zh", "烟雾病"), ("zh", "陶轮工手")):
        assert not writers[language].may_be_known(name), name
    for language, writer in writers.items():
        listed = {name.lower() for name in SCOPE["unknown"]["train"][language]}
        made = {writer.unknown_name().lower() for _ in range(300)} - listed
        assert len(made) > 50
        assert not [name for name in made if writer.may_be_known(name)]


def test_half_of_the_paragraphs_end_as_an_answer_does():
    paragraphs = list(declarative_text(CONDITIONS, 1, seed=0, cut="\t"))
    ends = Counter(paragraph[-1] for paragraph in paragraphs)
    full_stops = ends["."] + ends["。"]
    assert 0.45 < full_stops / len(paragraphs) < 0.55
    assert ends["\t"] > 0.6 * (len(paragraphs) - full_stops)  # the others end with a value


def test_the_seed_determines_the_text():
    first = list(declarative_text(CONDITIONS, 1, seed=0))
    assert first == list(declarative_text(CONDITIONS, 1, seed=0))
    assert first != list(declarative_text(CONDITIONS, 1, seed=1))


def test_a_typo_changes_one_letter_inside_a_word():
    rng = random.Random(0)
    for _ in range(200):
        typed = add_typo("Graves disease", rng)
        assert abs(len(typed) - len("Graves disease")) <= 1
        assert typed[0] == "G"
        assert typed[-1] == "e"
    assert len({add_typo("Graves disease", rng) for _ in range(100)}) > 20
    assert add_typo("gout 痛风", rng) == "gout 痛风"


def test_the_shipped_base_is_small_and_loads():
    base = HERE / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 12_000_000
    assert {path.name for path in base.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
    assert load_tokenizer(base).vocab_size == load_model(base).config.vocab_size


@pytest.mark.parametrize("name", SPLITS)
def test_the_shipped_questions_have_both_languages_and_all_departments(name):
    assert {row.language for row in ROWS[name]} == set(LANGUAGES)
    assert {row.topic for row in ROWS[name]} - {""} >= set(DEPARTMENTS) - {"dentistry"}
