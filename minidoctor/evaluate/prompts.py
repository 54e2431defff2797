"""Prompts of multiple-choice questions: those that the benchmarks publish, and the user's.

    以下是关于解剖学的单项选择题，请直接给出正确答案的选项。     head: once per prompt, the same for all of a subject
    题目：女性生殖腺是 ... 答案是：A                             few-shot examples
    题目：听觉中枢位于 ... 答案是：                               item: ends where the answer begins

The model gets the text as one user message in the checkpoint's chat format, or as raw text to complete.
"""

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minidoctor.batching import IGNORE, Example
from minidoctor.config import LARGEST, UserError
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.files.json_files import read_text
from minidoctor.questions.exams import SUBJECTS
from minidoctor.questions.rows import Row, conversation
from minidoctor.text.backends import INSIDE
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import Tokenizer, encode_conversation


class Prompt(NamedTuple):
    """Templates with slots in braces."""

    item: str
    head: str = ""
    bare: str | None = None  # the item of a question that lacks a value for a slot of `item`
    option: str = "{letter}. {text}"
    shot: str = "{item}\n{answer}\n\n"  # with few-shot examples the question itself is this, up to the answer


PROMPTS = {
    # Multiple choice as questions/rows.py formats it for training.
    "own": Prompt("{question}\n{options}"),
    # https://github.com/FreedomIntelligence/CMB, workers/base.py. We keep options of one character, which it drops.
    # Few-shot examples as in its README, with the letter as the answer; the first ones instead of random ones.
    "cmb": Prompt(
        "以下是中国{exam_type}中{exam_class}考试的一道{question_type}，不需要做任何分析和解释，直接输出答案选项。\n"
        "{question}\n{options}",
        bare="以下是一道{question_type}，不需要做任何分析和解释，直接输出答案选项。\n{question}\n{options}",
        shot="问：{item}\n答：{answer}\n",
    ),
    # https://github.com/haonan-li/CMMLU, src/mp_utils.py; of too many examples it drops the longest, we the last.
    "cmmlu": Prompt(
        "题目：{question}\n{options}\n答案是：",
        head="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        shot="{item}{answer}\n\n",
    ),
    # https://github.com/williamliujl/CMExam, src/preprocess/prompt_templates.py. There the model has to generate
    # "答案: " first, here the prompt ends with it, so that the letter comes next. It has no few-shot form.
    "cmexam": Prompt(
        "问题: {question}, \n 选项: {options}\n答案:", option="{letter} {text}", shot="{item} {answer}\n\n"
    ),
    # https://github.com/FreedomIntelligence/HuatuoGPT-II, evaluation/eval_qa.py; its dialogue is --chat-format huatuo
    "huatuo": Prompt(
        "请回答下面选择题。\n[{question_type}]{question}\n{options}",
        bare="请回答下面选择题。\n{question}\n{options}",
    ),
    # https://github.com/FreedomIntelligence/HuatuoGPT-o1, evaluation/eval.py, in English for every language.
    "huatuo-o1": Prompt("Please answer the following multiple-choice question:\n{question}\n{options}"),
}
SLOTS = ("question", "options", "subject", "exam_type", "exam_class", "exam_subject", "question_type")
SLOT = re.compile(r"\{(\w+)\}")


class PromptedQuestion(NamedTuple):
    """A row with the prompt that asks it."""

    row: Row
    text: str
    tokens: list[int]
    head: str  # the beginning that it shares with other questions
    shots: int  # few-shot examples in the prompt: as many as requested, or as fit
    file: str = ""
    trained_on: bool | None = None


def load_prompt(name: str) -> Prompt:
    """Return a published prompt, or the user's: a file with {question} and {options}, its head above a line "---".

    Raises FileNotFoundError or UserError.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    path = Path(name)
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"prompt {path}: neither {', '.join(PROMPTS)} nor a file")
    text = read_text(path, pipe=True).replace("\r\n", "\n").removesuffix("\n")
    head, line, item = text.rpartition("\n---\n")
    if wrong := ({"question", "options"} - set(SLOT.findall(item))) or (set(SLOT.findall(text)) - set(SLOTS)):
        optional, wrong_slots = ", ".join(SLOTS[2:]), ", ".join(sorted(wrong))
        raise UserError(f"{path}: must contain {{question}} and {{options}}, may contain {optional}: see {wrong_slots}")
    # Between item and answer comes the character after which the answer is scored: see Prompter.answer_tokens.
    space = "\n" if item.endswith("}") else " " if item[-1].isascii() and not item[-1].isspace() else ""
    return Prompt(item, head + "\n" if line else "", shot="{item}" + space + "{answer}\n\n")


def slot_values(row: Row, prompt: Prompt) -> dict[str, str]:
    options = [prompt.option.format(letter=letter, text=text) for letter, text in row.options.items()]
    values = {"question_type": "选择题"} if row.exam == "cmb" else {}  # without the type, which the answer would reveal
    if row.topic:
        values["subject"] = SUBJECTS.get(row.topic, row.topic)
    return values | {"question": row.question, "options": "\n".join(options), **row.metadata}


def fill(row: Row, prompt: Prompt, *templates: str) -> str:
    """Fill the first template whose slots the row has values for. Raises UserError if there is none.

    One pass over the template, so that braces within a question stay as they are.
    """
    values = slot_values(row, prompt)
    for template in templates:
        if set(SLOT.findall(template)) <= set(values):
            return SLOT.sub(lambda slot: values[slot[1]], template)
    missing = min(set(SLOT.findall(templates[0])) - set(values))
    raise UserError(f"question {row.id} has no {missing}, which the prompt requires")


def compose(row: Row, prompt: Prompt, shots: list[Row], raw: bool = False) -> tuple[str, str]:
    """Return the prompt in two parts: the head with the few-shot examples, and the question.

    A raw prompt ends as if there were examples: the letter must not follow the last option directly.
    """

    def item(question: Row) -> str:
        return fill(question, prompt, *filter(None, (prompt.item, prompt.bare)))

    head, last = fill(row, prompt, prompt.head), item(row)
    for shot in shots:
        head += prompt.shot.replace("{answer}", "".join(sorted(shot.answer))).replace("{item}", item(shot))
    if shots or raw:
        last = prompt.shot.partition("{answer}")[0].rstrip(" ").replace("{item}", last)
    return head, last


def common_prefix_len(sequences: list[list[int]]) -> int:
    first, last = min(sequences), max(sequences)  # in sorted order these two differ earliest
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def answer_example(prompt: list[int], answer: list[int]) -> Example:
    return Example((prompt + answer)[:-1], [IGNORE] * (len(prompt) - 1) + answer)


class Prompter:
    """Formats questions as prompts, in the chat format or raw, and answers as they would follow them."""

    def __init__(self, tokenizer: Tokenizer, config: EvalConfig):
        self.tokenizer, self.config = tokenizer, config
        self.prompt = None if config.prompt == "auto" else load_prompt(config.prompt)
        format = tokenizer.format if tokenizer.format and not config.raw else CHAT_FORMATS["plain"]
        self.max_new_tokens = config.max_new_tokens or format.max_new_tokens
        self.opens_reasoning = tokenizer.opens_reasoning and not config.raw  # a prompt ends within the reasoning

    def tokens(self, text: str) -> list[int]:
        if self.config.raw:
            return self.tokenizer.start + self.tokenizer.encode(text)
        return self.tokenizer.chat([{"role": "user", "content": text}])

    def example(self, question: str, answer: str) -> Example:
        """Return the bare question followed by an answer, with the targets on the answer and, in a chat, on its end.

        Raw text has a space between a half-width character and the answer: " A" after "Answer:", "A" after "答案是："
        """
        if not self.config.raw:
            return encode_conversation(conversation(question, answer), self.tokenizer, LARGEST)
        space = " " if question and question[-1].isascii() and not question[-1].isspace() else ""
        return answer_example(self.tokens(question), self.tokenizer.encode(space + answer, INSIDE))

    def prompt_question(self, row: Row, shots: list[Row], limit: int) -> PromptedQuestion:
        """Return the row's prompt, with fewer examples if it would exceed `limit` tokens; a free-form question bare.

        Raises UserError if the row lacks a value that the prompt requires.
        """
        if not row.options:
            messages = row.messages[:-1]
            if not self.config.raw:
                return PromptedQuestion(row, row.question, self.tokenizer.chat(messages), "", 0)
            text = "\n".join(message["content"] for message in messages)  # all turns of a conversation
            return PromptedQuestion(row, text, self.tokens(text), "", 0)
        prompt = self.prompt or PROMPTS[row.exam or "own"]
        while True:
            head, item = compose(row, prompt, shots, self.config.raw)
            tokens = self.tokens(head + item)
            if len(tokens) < limit or not shots:
                return PromptedQuestion(row, head + item, tokens, head, len(shots))
            shots = shots[:-1]

    def letter_examples(self, question: PromptedQuestion) -> dict[str, Example]:
        """Return the prompt followed by each option's letter, with the targets where the letters differ.

        That is one token per letter, unless the vocabulary spells some in several. Raises UserError if two are equal.
        """
        letters = list(question.row.options)
        spelled = [[i for i in self.example(question.text[-1:], x).targets if i != IGNORE] for x in letters]
        if len(set(map(tuple, spelled))) < len(letters):
            raise UserError(f"the tokenizer has equal tokens for two of the letters {', '.join(letters)}: score text")
        # A common beginning, such as a space that is a separate token, belongs to the prompt. A common end, such as the
        # end of the turn, is not scored.
        longest = min(map(len, spelled)) - 1
        same = min(longest, common_prefix_len(spelled))
        end = min(longest - same, common_prefix_len([ids[::-1] for ids in spelled]))
        prompt = question.tokens + spelled[0][:same]
        scored = (answer_example(prompt, ids[same : len(ids) - end]) for ids in spelled)
        return dict(zip(letters, scored, strict=True))


def choose_shots(row: Row, pool: Sequence[Row], n: int) -> list[Row]:
    """Return the first n questions of the pool on the same subject (CMB: exam), or the first n if there are none."""

    def kind(question: Row) -> tuple[str | None, ...]:
        about = question.metadata
        return (about.get("exam_type"), about.get("exam_class")) if question.exam == "cmb" else (question.topic,)

    def usable(shot: Row) -> bool:
        return bool(shot.options and shot.answer) and shot.question != row.question

    same = (shot for shot in pool if kind(shot) == kind(row) and usable(shot))
    return list(islice(same, n)) or list(islice(filter(usable, pool), n))
