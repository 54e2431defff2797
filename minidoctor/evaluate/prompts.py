"""How a multiple-choice question is put: the prompts that the benchmarks publish, and one's own.

    以下是关于解剖学的单项选择题，请直接给出正确答案的选项。     head: once, and the same for all of a subject
    题目：女性生殖腺是 ... 答案是：A                             solved questions, if there are shots
    题目：听觉中枢位于 ... 答案是：                               item: ends where the answer begins

The text goes to the model in the checkpoint's chat format as one message of the user's, or raw.
"""

import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minidoctor.batching import IGNORE, Example
from minidoctor.config import LARGEST, UserError
from minidoctor.files.json_files import read_bytes
from minidoctor.questions.rows import Row, conversation
from minidoctor.text.backends import INSIDE
from minidoctor.text.tokenizer import Tokenizer, encode_conversation


class Prompt(NamedTuple):
    item: str
    head: str = ""
    bare: str | None = None  # the item of a question that does not have all that `item` asks for
    option: str = "{letter}. {text}"
    shot: str = "{item}{answer}\n\n"  # with shots the question itself is put as this, up to the answer


PROMPTS = {
    # As data.py writes multiple choice in training.
    "own": Prompt("{question}\n{options}", shot="{item}\n{answer}\n\n"),
    # https://github.com/FreedomIntelligence/CMB, workers/base.py. There an option of one character is left out,
    # here it stays. Shots as its README draws them, the letter alone, and the first ones, not some drawn at random.
    "cmb": Prompt(
        "以下是中国{exam_type}中{exam_class}考试的一道{question_type}，不需要做任何分析和解释，直接输出答案选项。\n"
        "{question}\n{options}",
        bare="以下是一道{question_type}，不需要做任何分析和解释，直接输出答案选项。\n{question}\n{options}",
        shot="问：{item}\n答：{answer}\n",
    ),
    # https://github.com/haonan-li/CMMLU, src/mp_utils.py. Of too many shots the longest goes there, here the last.
    "cmmlu": Prompt(
        "题目：{question}\n{options}\n答案是：",
        head="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
    ),
    # https://github.com/williamliujl/CMExam, src/preprocess/prompt_templates.py: there "答案: " is what the model
    # has to write first, here it is the end of the prompt, so that the letter comes next. It has no form with shots.
    "cmexam": Prompt(
        "问题: {question}, \n 选项: {options}\n答案:", option="{letter} {text}", shot="{item} {answer}\n\n"
    ),
    # https://github.com/FreedomIntelligence/HuatuoGPT-II, evaluation/eval_qa.py; its dialogue is --chat-format huatuo
    "huatuo": Prompt(
        "请回答下面选择题。\n[{question_type}]{question}\n{options}",
        bare="请回答下面选择题。\n{question}\n{options}",
        shot="{item}\n{answer}\n\n",
    ),
}
# As CMMLU's prompts call its medical subjects: https://github.com/haonan-li/CMMLU, src/categories.py
SUBJECTS = {
    "anatomy": "解剖学",
    "clinical_knowledge": "临床知识",
    "college_medicine": "大学医学",
    "genetics": "遗传学",
    "nutrition": "营养学",
    "professional_medicine": "专业医学",
    "traditional_chinese_medicine": "中医中药",
    "virology": "病毒学",
}
SLOTS = ("question", "options", "subject", "exam_type", "exam_class", "exam_subject", "question_type")
SLOT = re.compile(r"\{(\w+)\}")


class Question(NamedTuple):
    """A row as it is put to the model."""

    row: Row
    text: str
    tokens: list[int]
    head: str  # the start that other questions of its kind share
    shots: int  # solved questions in it: as many as were asked for, or as fit


def choose_prompt(name: str, row: Row) -> Prompt:
    """Raises FileNotFoundError or ValueError if there is none of that name."""
    return named_prompt(row.exam or "own" if name == "auto" else name)


@cache
def named_prompt(name: str) -> Prompt:
    return PROMPTS[name] if name in PROMPTS else read_prompt(Path(name))


def read_prompt(path: Path) -> Prompt:
    """A prompt of one's own: a text with {question} and {options}; what stands above a line "---" is the head."""
    if not path.is_file():
        raise FileNotFoundError(f"prompt {path}: neither {', '.join(PROMPTS)} nor a file")
    try:
        text = read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    head, line, item = text.rpartition("\n---\n")
    found = set(SLOT.findall(text))
    if wrong := ({"question", "options"} - set(SLOT.findall(item))) or (found - set(SLOTS)):
        known = ", ".join(SLOTS[2:])
        raise UserError(f"{path}: needs {{question}} and {{options}}, may have {known}: see {', '.join(sorted(wrong))}")
    # The solved questions' letters stand where the question's own is scored: see Asker.answer_tokens.
    space = "\n" if item.endswith("}") else " " if item[-1].isascii() and not item[-1].isspace() else ""
    return Prompt(item, head + "\n" if line else "", shot="{item}" + space + "{answer}\n\n")


def slots_of(row: Row, prompt: Prompt) -> dict[str, str]:
    """What the row can say of each slot."""
    options = [prompt.option.format(letter=letter, text=text) for letter, text in row.options.items()]
    own = {"question": row.question, "options": "\n".join(options), **row.metadata}
    known = {"question_type": "选择题"} if row.exam == "cmb" else {}  # never what the answer shows
    subject = SUBJECTS.get(row.topic, row.topic)
    return known | ({"subject": subject} if subject else {}) | own


def fill(template: str, slots: dict[str, str]) -> str:
    """Once through the template, so that braces in a question stay what they are. Raises KeyError."""
    return SLOT.sub(lambda slot: slots[slot[1]], template)


def item_of(row: Row, prompt: Prompt) -> str:
    """The question alone, up to its answer. Raises ValueError if the prompt asks for what the row does not say."""
    slots = slots_of(row, prompt)
    for item in filter(None, (prompt.item, prompt.bare)):
        if set(SLOT.findall(item)) <= set(slots):
            return fill(item, slots)
    missing = set(SLOT.findall(prompt.item)) - set(slots)
    raise UserError(f"question {row.id} has no {min(missing)}, which the prompt asks for")


def compose(row: Row, prompt: Prompt, shots: list[Row], raw: bool = False) -> tuple[str, str]:
    """The prompt in two parts: head with the solved questions, and the question.

    Raw, it ends as if there were shots: the letter must not stand right behind the last option.
    """
    missing = set(SLOT.findall(prompt.head)) - set(slots_of(row, prompt))
    if missing:
        raise UserError(f"question {row.id} has no {min(missing)}, which the prompt asks for")
    head = fill(prompt.head, slots_of(row, prompt))
    if not shots and not raw:
        return head, item_of(row, prompt)
    solved = [prompt.shot.replace("{answer}", shot.answer).replace("{item}", item_of(shot, prompt)) for shot in shots]
    asked = prompt.shot.partition("{answer}")[0].rstrip(" ").replace("{item}", item_of(row, prompt))
    return head + "".join(solved), asked


class Asker:
    """Puts questions to a model in its chat format, or raw."""

    def __init__(self, tokenizer: Tokenizer, raw: bool):
        self.tokenizer, self.raw = tokenizer, raw

    def tokens(self, text: str) -> list[int]:
        if self.raw:
            return self.tokenizer.start + self.tokenizer.encode(text)
        return self.tokenizer.chat([{"role": "user", "content": text}])

    def answer_tokens(self, text: str, answer: str) -> list[int]:
        """Of an answer as it would be written after this prompt: "A" in a chat or after 答案是：, " A" after Answer:"""
        if self.raw:
            space = " " if text and text[-1].isascii() and not text[-1].isspace() else ""
            return self.tokenizer.encode(space + answer, INSIDE)
        turns = self.tokenizer.chat_turns([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
        return next(ids for ids, own in turns if own)  # without the token that ends it

    def example(self, question: str, answer: str) -> Example:
        """The bare question answered by this text, the targets on the answer."""
        if not self.raw:
            return encode_conversation(conversation(question, answer), self.tokenizer, LARGEST)
        prompt, ids = self.tokens(question), self.answer_tokens(question, answer)
        return Example((prompt + ids)[:-1], [IGNORE] * (len(prompt) - 1) + ids)

    def put(self, row: Row, name: str, shots: list[Row], limit: int) -> Question:
        """With fewer shots where the prompt would be longer than `limit` tokens; an open question bare.

        Raises FileNotFoundError or ValueError if the prompt cannot be used.
        """
        if not row.options:
            tokens = self.tokens(row.question) if self.raw else self.tokenizer.chat(row.messages[:-1])
            return Question(row, row.question, tokens, "", 0)
        prompt = choose_prompt(name, row)
        while True:
            head, item = compose(row, prompt, shots, self.raw)
            tokens = self.tokens(head + item)
            if len(tokens) < limit or not shots:
                return Question(row, head + item, tokens, head, len(shots))
            shots = shots[:-1]

    def letters(self, text: str, tokens: list[int], options: list[str]) -> tuple[list[int], list[list[int]]]:
        """The prompt up to where the options' letters part, and each letter's tokens from there on.

        One token each, unless the vocabulary spells some of them. Raises ValueError if two are the same.
        """
        written = [self.answer_tokens(text, letter) for letter in options]
        if len(set(map(tuple, written))) < len(options):
            raise UserError(f"the tokenizer writes two of the letters {', '.join(options)} alike: score text")
        # What all have in common, such as a space that is a token of its own, belongs to the prompt.
        same = 0
        while all(len(ids) > same + 1 and ids[same] == written[0][same] for ids in written):
            same += 1
        end = 0  # and what follows every letter is no part of it: the space behind an answer in llama2's format
        while all(len(ids) > same + end + 1 and ids[-1 - end] == written[0][-1 - end] for ids in written):
            end += 1
        return tokens + written[0][:same], [ids[same : len(ids) - end] for ids in written]


def choose_shots(row: Row, pool: list[Row], n: int) -> list[Row]:
    """The first n solved questions of the same subject, in CMB of the same exam; of any, if there are none of it."""

    def kind(of: Row) -> tuple[str | None, ...]:
        return (of.metadata.get("exam_type"), of.metadata.get("exam_class")) if of.exam == "cmb" else (of.topic,)

    def first(same: bool) -> list[Row]:
        solved = (shot for shot in pool if shot.options and shot.answer and shot.question != row.question)
        return list(islice((shot for shot in solved if not same or kind(shot) == kind(row)), n))

    return first(same=True) or first(same=False)
