"""Generate statements and questions from `conditions.json`, deterministically for a seed.

    python -m data.make_data        writes train.jsonl, dev.jsonl and heldout.jsonl next to this file

The base model is pretrained on `declarative_text` (make_base.py), which contains statements only. Each fact occurs in
many wordings and orders: a fact that a model has read in one form can be recited, but not extracted by a question
(https://arxiv.org/abs/2309.14316). The questions are split by condition. The base has read about all conditions, the
training questions ask about 70 % of them, `dev.jsonl` and `heldout.jsonl` about 15 % each, in separate wordings.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
ATTRIBUTES = ("department", "symptoms", "cause", "test", "treatment")

# {n} is the condition's name, {v} the value of the attribute.
STATEMENTS = {
    "en": {
        "department": (
            "{n} is treated in {v}.",
            "{n} belongs to {v}.",
            "The department for {n} is {v}.",
            "Patients with {n} are seen in {v}.",
            "{v} is the department that looks after {n}.",
            "{v} treats {n}.",
            "Department for {n}: {v}.",
            "A patient who has {n} is referred to {v}.",
            "The specialty that deals with {n} is {v}.",
            "Care of {n} is the work of {v}.",
            "For {n}, the right department is {v}.",
            "Doctors of {v} take care of {n}.",
        ),
        "symptoms": (
            "The typical symptoms of {n} are {v}.",
            "Typical symptoms of {n}: {v}.",
            "{n} typically presents with {v}.",
            "{v} are typical of {n}.",
            "Patients with {n} complain of {v}.",
            "A patient who has {n} often shows {v}.",
            "{n} makes itself known by {v}.",
            "The usual signs of {n} are {v}.",
            "Signs that point to {n} are {v}.",
            "In {n}, the clinical picture is {v}.",
            "{v} suggest {n}.",
            "For {n}, the symptoms to expect are {v}.",
        ),
        "cause": (
            "{n} is caused by {v}.",
            "The cause of {n} is {v}.",
            "Cause of {n}: {v}.",
            "{v} causes {n}.",
            "{v} leads to {n}.",
            "{n} results from {v}.",
            "{n} arises from {v}.",
            "Behind {n} lies {v}.",
            "The origin of {n} is {v}.",
            "{n} develops because of {v}.",
            "In {n}, the underlying problem is {v}.",
            "For {n}, the accepted cause is {v}.",
        ),
        "test": (
            "The key test for {n} is {v}.",
            "Key test for {n}: {v}.",
            "{n} is diagnosed by {v}.",
            "The diagnosis of {n} rests on {v}.",
            "{v} is the key test for {n}.",
            "{v} confirms {n}.",
            "Doctors confirm {n} with {v}.",
            "To diagnose {n}, doctors order {v}.",
            "When {n} is suspected, the examination to request is {v}.",
            "In {n}, the most useful investigation is {v}.",
            "The test that establishes {n} is {v}.",
            "For {n}, the examination of choice is {v}.",
        ),
        "treatment": (
            "The first-line treatment for {n} is {v}.",
            "First-line treatment for {n}: {v}.",
            "{n} is treated first with {v}.",
            "{v} is the first-line treatment for {n}.",
            "{v} is given for {n}.",
            "Patients with {n} receive {v}.",
            "The therapy of choice for {n} is {v}.",
            "Doctors manage {n} with {v}.",
            "Management of {n} begins with {v}.",
            "In {n}, the standard therapy is {v}.",
            "A patient who has {n} should get {v}.",
            "For {n}, the treatment to start with is {v}.",
        ),
        "name": (
            "{n} is called {v} in Chinese.",
            "The Chinese name of {n} is {v}.",
            "In Chinese, {n} is {v}.",
        ),
    },
    "zh": {
        "department": (
            "{n}属于{v}。",
            "{n}归{v}诊治。",
            "{n}的就诊科室是{v}。",
            "{n}的患者应到{v}就诊。",
            "{v}负责诊治{n}。",
            "{v}收治{n}。",
            "{n}的科室：{v}。",
            "得了{n}，应挂{v}。",
            "诊治{n}的专科是{v}。",
            "患有{n}的人由{v}接诊。",
            "对于{n}，对应的科室是{v}。",
            "{v}的医生治疗{n}。",
        ),
        "symptoms": (
            "{n}的典型症状是{v}。",
            "{n}的典型症状：{v}。",
            "{n}常表现为{v}。",
            "{v}是{n}的典型症状。",
            "{n}的患者常有{v}。",
            "患有{n}的人会出现{v}。",
            "{n}的主要表现是{v}。",
            "{n}的临床特点是{v}。",
            "提示{n}的体征是{v}。",
            "在{n}中，常见的症状为{v}。",
            "{v}提示{n}。",
            "对于{n}，应注意的症状是{v}。",
        ),
        "cause": (
            "{n}由{v}引起。",
            "{n}的病因是{v}。",
            "{n}的病因：{v}。",
            "{v}引起{n}。",
            "{v}导致{n}。",
            "{n}源于{v}。",
            "{n}是{v}所致。",
            "引起{n}的原因是{v}。",
            "{n}的发病基础是{v}。",
            "{n}的发生是因为{v}。",
            "在{n}中，根本的问题是{v}。",
            "对于{n}，公认的病因是{v}。",
        ),
        "test": (
            "{n}的关键检查是{v}。",
            "{n}的关键检查：{v}。",
            "{n}依靠{v}确诊。",
            "{n}的诊断主要依据{v}。",
            "{v}是{n}的关键检查。",
            "{v}可以确诊{n}。",
            "医生用{v}确诊{n}。",
            "诊断{n}应做{v}。",
            "怀疑{n}时，应安排的检查是{v}。",
            "在{n}中，最有价值的检查为{v}。",
            "确定{n}的检查是{v}。",
            "对于{n}，首选的检查是{v}。",
        ),
        "treatment": (
            "{n}的首选治疗是{v}。",
            "{n}的首选治疗：{v}。",
            "{n}首先采用{v}治疗。",
            "{v}是{n}的首选治疗。",
            "{v}用于治疗{n}。",
            "{n}的患者应接受{v}。",
            "治疗{n}的首选方法是{v}。",
            "医生用{v}治疗{n}。",
            "{n}的处理从{v}开始。",
            "在{n}中，标准的疗法为{v}。",
            "患有{n}的人应给予{v}。",
            "对于{n}，一线的治疗是{v}。",
        ),
        "name": (
            "{n}的英文名是{v}。",
            "{n}在英文中叫{v}。",
            "{n}的英文是{v}。",
        ),
    },
}

# A card consists of a condition and an aspect {a} in one of these forms, and then the fact without a sentence around
# it, which is the form of an answer.
ASPECTS = {
    "en": {
        "department": (
            "department",
            "specialty",
            "right clinic",
            "referral",
            "responsible doctors",
            "place to go",
        ),
        "symptoms": (
            "typical symptoms",
            "signs",
            "clinical picture",
            "presentation",
            "complaints",
            "symptoms",
        ),
        "cause": ("cause", "origin", "underlying problem", "reason", "source", "mechanism"),
        "test": ("key test", "diagnosis", "examination", "investigation", "confirmation", "diagnostic test"),
        "treatment": (
            "first-line treatment",
            "therapy",
            "treatment",
            "management",
            "standard therapy",
            "remedy",
        ),
        "name": ("Chinese name", "name in Chinese"),
    },
    "zh": {
        "department": ("科室", "就诊科室", "专科", "门诊", "挂号科室", "看病的地方"),
        "symptoms": ("典型症状", "症状", "表现", "体征", "临床特点", "主诉"),
        "cause": ("病因", "起因", "原因", "发病基础", "来源", "机制"),
        "test": ("关键检查", "检查", "诊断", "确诊方法", "首选检查", "诊断依据"),
        "treatment": ("首选治疗", "治疗", "疗法", "处理", "一线治疗", "治法"),
        "name": ("英文名", "英文"),
    },
}
CARDS = {
    "en": (
        "the {a} of {n}",
        "{n}, {a}",
        "on the {a} of {n}",
        "{a} in {n}",
        "{a}, {n}",
        "this is about {n} and its {a}",
        "a note on the {a} of patients with {n}",
        "a patient has {n}, here is the {a}",
        "for {n}, the {a}",
        "{n} and the {a}",
        "I have {n}, so the {a} matters",
        "the {a} that goes with {n}",
        "{n} is suspected, now the {a}",
        "here follows the {a} for {n}",
    ),
    "zh": (
        "{n}的{a}",
        "关于{n}的{a}",
        "{n}，{a}",
        "下面是{n}的{a}",
        "{a}，{n}",
        "患者得了{n}，{a}如下",
        "这里记录{n}的{a}",
        "{n}与{a}",
        "对于{n}，{a}如下",
        "我有{n}，需要知道{a}",
        "医生说明{n}的{a}",
        "怀疑{n}时，{a}",
        "有人患{n}，说说{a}",
        "后面写的是{n}的{a}",
    ),
}
SEPARATORS = {"en": (": ", ". ", " - ", "; "), "zh": ("： ", "。 ", "， ", "； ")}

# Wordings of the questions: for training, and for dev and held-out.
QUESTIONS = {
    "en": {
        "department": (
            (
                "Which department treats {n}?",
                "What department is {n} treated in?",
                "I have {n}. Which department should I go to?",
                "Which specialty does {n} belong to?",
                "Who looks after patients with {n}?",
                "Where should someone with {n} be referred?",
                "What kind of doctor sees {n}?",
                "Which clinic is right for {n}?",
                "My friend has {n}, where should she go?",
                "To which specialty is a patient with {n} sent?",
                "Which doctors take care of {n}?",
                "Where is {n} treated?",
                "What is the right department for {n}?",
                "Which unit of the hospital is responsible for {n}?",
                "With {n}, which doctor do I visit?",
            ),
            ("Which clinic should a patient with {n} visit?", "What specialty handles {n}?"),
        ),
        "symptoms": (
            (
                "What are the typical symptoms of {n}?",
                "How does {n} usually present?",
                "Which symptoms suggest {n}?",
                "What does a patient with {n} complain of?",
                "What are the signs of {n}?",
                "How can I recognize {n}?",
                "What does {n} look like?",
                "What symptoms should I expect in {n}?",
                "How do people with {n} feel?",
                "What is the clinical picture of {n}?",
                "Which signs point to {n}?",
                "What does {n} do to a patient?",
                "How is {n} noticed?",
                "Which complaints are typical of {n}?",
                "What happens to a person who has {n}?",
            ),
            ("What symptoms does {n} usually bring?", "How does {n} show itself?"),
        ),
        "cause": (
            (
                "What causes {n}?",
                "What is the cause of {n}?",
                "Why does {n} develop?",
                "What does {n} result from?",
                "What is the underlying problem in {n}?",
                "What leads to {n}?",
                "Where does {n} come from?",
                "Why do some people have {n}?",
                "What is the reason for {n}?",
                "What is behind {n}?",
                "How does {n} arise?",
                "What is {n} caused by?",
                "Why did I get {n}?",
                "What mechanism explains {n}?",
                "To what is {n} due?",
            ),
            ("What is {n} due to?", "Why do people get {n}?"),
        ),
        "test": (
            (
                "What is the key test for {n}?",
                "Which test confirms {n}?",
                "How is {n} diagnosed?",
                "Which examination should be ordered for {n}?",
                "What does the diagnosis of {n} rest on?",
                "How do doctors confirm {n}?",
                "Which test do I need if {n} is suspected?",
                "What is the best investigation in {n}?",
                "How can a doctor be sure of {n}?",
                "Which examination proves {n}?",
                "What should be done to diagnose {n}?",
                "How is the diagnosis of {n} made?",
                "What test shows {n}?",
                "What is the most useful examination for {n}?",
                "With what test is {n} found?",
            ),
            ("Which investigation is most useful when {n} is suspected?", "How can {n} be confirmed?"),
        ),
        "treatment": (
            (
                "What is the first-line treatment for {n}?",
                "How is {n} treated?",
                "Which therapy is chosen first for {n}?",
                "What should a patient with {n} receive?",
                "How do doctors manage {n}?",
                "What is the standard therapy for {n}?",
                "What is given for {n}?",
                "What helps against {n}?",
                "How can {n} be treated?",
                "What is the management of {n}?",
                "Which treatment does {n} need?",
                "What should I be given for {n}?",
                "What do doctors do first about {n}?",
                "What is the therapy of choice for {n}?",
                "What is the remedy for {n}?",
            ),
            ("What treatment should {n} be given first?", "How should {n} be managed at first?"),
        ),
    },
    "zh": {
        "department": (
            (
                "{n}应该看哪个科？",
                "{n}属于哪个科室？",
                "得了{n}应挂什么科？",
                "哪个科室诊治{n}？",
                "{n}的患者去哪个科就诊？",
                "我有{n}，该找哪个专科？",
                "{n}挂哪个号？",
                "治{n}要去哪里看病？",
                "{n}是哪科的病？",
                "患{n}该去什么门诊？",
                "什么科的医生看{n}？",
                "{n}由哪个科负责？",
                "朋友得了{n}，应当去哪个科室？",
                "{n}的就诊科室是什么？",
                "哪一科收治{n}？",
            ),
            ("患{n}的人要去什么科看病？", "{n}归哪一科管？"),
        ),
        "symptoms": (
            (
                "{n}的典型症状是什么？",
                "{n}有哪些表现？",
                "哪些症状提示{n}？",
                "{n}的患者常有什么症状？",
                "{n}的临床特点是什么？",
                "怎样识别{n}？",
                "患{n}的人会怎么样？",
                "{n}会引起哪些不适？",
                "{n}有什么体征？",
                "{n}的主要表现有哪些？",
                "出现什么症状要想到{n}？",
                "得{n}时身体有什么变化？",
                "{n}会有什么感觉？",
                "{n}常见的症状有什么？",
                "如何发现{n}？",
            ),
            ("{n}通常会出现什么症状？", "得了{n}会有什么表现？"),
        ),
        "cause": (
            (
                "{n}的病因是什么？",
                "{n}是什么引起的？",
                "为什么会得{n}？",
                "什么导致{n}？",
                "{n}的发病基础是什么？",
                "引起{n}的原因是什么？",
                "{n}是怎么发生的？",
                "{n}从何而来？",
                "什么原因造成{n}？",
                "{n}是由于什么？",
                "人怎么会得{n}？",
                "{n}的起因是什么？",
                "{n}为什么发生？",
                "{n}源于什么？",
                "{n}的发病机制是什么？",
            ),
            ("{n}是由什么造成的？", "{n}是怎么得的？"),
        ),
        "test": (
            (
                "{n}的关键检查是什么？",
                "{n}如何确诊？",
                "诊断{n}应做什么检查？",
                "怀疑{n}时首选什么检查？",
                "什么检查可以确诊{n}？",
                "{n}的诊断依据是什么？",
                "查{n}要做哪个检查？",
                "怎么知道是不是{n}？",
                "确定{n}靠什么？",
                "{n}应安排哪项检查？",
                "医生用什么方法诊断{n}？",
                "{n}最有价值的检查是什么？",
                "怎样检查{n}？",
                "哪种检查能发现{n}？",
                "{n}需要查什么？",
            ),
            ("要确定是不是{n}，该做哪项检查？", "医生靠什么检查来诊断{n}？"),
        ),
        "treatment": (
            (
                "{n}的首选治疗是什么？",
                "{n}怎么治疗？",
                "{n}的一线治疗是什么？",
                "治疗{n}首选什么方法？",
                "医生如何处理{n}？",
                "{n}的患者应接受什么治疗？",
                "{n}该怎么办？",
                "{n}首先用什么治？",
                "得{n}应采取什么措施？",
                "{n}的标准疗法是什么？",
                "什么办法能治{n}？",
                "{n}应先给予什么？",
                "怎样治好{n}？",
                "对{n}有什么疗法？",
                "{n}要如何治？",
            ),
            ("得了{n}首先该怎么治？", "对{n}应先采取哪种疗法？"),
        ),
    },
}


def read_table(path: Path = HERE / "conditions.json") -> tuple[dict[str, dict[str, str]], list[dict]]:
    """Return the departments (id -> language -> name) and the conditions, each with the name of its department."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for condition in table["conditions"]:
        for language in LANGUAGES:
            condition[language]["department"] = table["departments"][condition["department"]][language]
    return table["departments"], table["conditions"]


def capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def make_statement(condition: dict, language: str, attribute: str, rng: random.Random, cut: str) -> str:
    """Return one fact in a random wording, half of the time as a card."""
    name = condition[language]["name"]
    if attribute == "name":
        value = condition["zh" if language == "en" else "en"]["name"]
    else:
        value = condition[language][attribute]
    slots = {"n": cut + name + cut, "v": cut + value + cut}
    if rng.random() < 0.5:
        return capitalized(rng.choice(STATEMENTS[language][attribute]).format(**slots))
    aspect = rng.choice(ASPECTS[language][attribute])
    card = rng.choice(CARDS[language]).format(n=slots["n"], a=cut + aspect + cut)
    end = "." if language == "en" else "。"
    return capitalized(card) + rng.choice(SEPARATORS[language]) + slots["v"] + end


def declarative_text(conditions: list[dict], n_rounds: int, seed: int, cut: str = "") -> Iterator[str]:
    """Yield paragraphs. Each round contains each fact of each condition in each language, in random order and wording.

    A paragraph has all facts of one condition, or single facts of several, so that no fact depends on a preceding one.
    `cut` is inserted around names, values and aspects.
    """
    rng = random.Random(seed)
    for _ in range(n_rounds):
        paragraphs = []
        for language in LANGUAGES:
            facts = []
            for condition in conditions:
                sentences = [make_statement(condition, language, a, rng, cut) for a in (*ATTRIBUTES, "name")]
                rng.shuffle(sentences)
                if rng.random() < 0.5:
                    paragraphs.append((language, sentences))
                else:
                    facts += sentences
            rng.shuffle(facts)
            while facts:
                n = rng.randint(1, 6)
                paragraphs.append((language, facts[:n]))
                facts = facts[n:]
        rng.shuffle(paragraphs)
        for language, sentences in paragraphs:
            yield ("" if language == "zh" else " ").join(sentences)


def key_words(value: str, language: str) -> set[str]:
    """Return the words of four letters or more, in Chinese the pairs of characters."""
    if language == "en":
        return {word for word in re.findall("[a-z]+", value.lower()) if len(word) > 3}
    return {value[i : i + 2] for i in range(len(value) - 1)}


def wrong_values(
    conditions: list[dict], condition: dict, language: str, attribute: str, rng: random.Random
) -> list[str]:
    """Return three values of the attribute as wrong options.

    They are those of conditions of other departments, because related conditions may share a treatment, and have no
    key word in common with the correct value in either language.
    """
    values = {
        candidate[language][attribute]
        for candidate in conditions
        if candidate["department"] != condition["department"]
        and not any(key_words(candidate[x][attribute], x) & key_words(condition[x][attribute], x) for x in LANGUAGES)
    }
    return rng.sample(sorted(values), 3)


def make_questions(
    conditions: list[dict], asked: list[dict], wordings: int, n_free: int, n_choice: int, seed: int
) -> Iterator[dict]:
    """Yield `n_free` free-form and `n_choice` multiple-choice rows for each fact of `asked` in each language.

    `wordings` is 0 for those of training, 1 for those of dev and held-out. Letters are balanced: each is correct once
    in four consecutive multiple-choice rows.
    """
    rng = random.Random(seed)
    letters: list[str] = []
    for condition in asked:
        for language in LANGUAGES:
            for attribute in ATTRIBUTES:
                facts = condition[language]
                for kind, n in (("open", n_free), ("choice", n_choice)):
                    chosen = rng.sample(QUESTIONS[language][attribute][wordings], n)
                    for i, wording in enumerate(chosen):
                        question = wording.format(n=facts["name"])
                        row = {
                            "id": f"{condition['id']}-{language}-{attribute}-{kind}-{i}",
                            "topic": condition["department"],
                            "question": capitalized(question),
                            "answer": facts[attribute],
                        }
                        if kind == "choice":
                            letters = letters or rng.sample("ABCD", 4)
                            row["answer"] = letters.pop()
                            wrong = wrong_values(conditions, condition, language, attribute, rng)
                            row["options"] = {
                                letter: facts[attribute] if letter == row["answer"] else wrong.pop()
                                for letter in "ABCD"
                            }
                        yield row


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


def make_files(seed: int = 0) -> dict[str, str]:
    """Return the content of each file by its name."""
    _, conditions = read_table()
    files = {}
    for name, asked in split_conditions(conditions, seed).items():
        wordings, n_free, n_choice = (0, 6, 1) if name == "train" else (1, 2, 2)
        rows = list(make_questions(conditions, asked, wordings, n_free, n_choice, seed))
        random.Random(seed).shuffle(rows)
        files[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


if __name__ == "__main__":
    for name, content in make_files().items():
        (HERE / name).write_text(content, encoding="utf-8")
        print(f"{name}: {content.count(chr(10))} questions")
