"""JSON lines to seeded batches of (tokens, targets).

Each line is a question with its answer, in one of the forms that `Row` lists. `targets[t]` is the token that
follows `tokens[t]`, or -100 wherever nothing is to be learned: on the prompt, the chat markers and the padding.

Which rows stand in which batch is a function of the seed and the step alone, so going on with a run at
step n needs no other record of the place in the data.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidoctor.config import UserError


@dataclass(frozen=True)
class Row:
    """One question. Written as one JSON object a line:

    {"question": "...", "answer": "..."}
    {"question": "...", "options": {"A": "...", "B": "..."}, "answer": "A"}     ("AB": both are right)
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}

    optionally with "topic" and "explanation". `exams.py` makes them of the benchmarks' files as well.
    """

    id: str  # the row's own, or its line number
    messages: list[dict[str, str]]  # ends with the assistant's answer, if that is known
    question: str  # without the options
    options: dict[str, str]  # empty for an open question
    answer: str  # the letters, or the text; empty where a benchmark keeps it to itself
    topic: str
    language: str  # "zh" if the question has a Chinese character, else "en"
    explanation: str = ""
    several: bool = False  # several letters are right: as the benchmark says, or else as its answer shows
    exam: str = ""  # the benchmark: cmmlu, cmexam or cmb
    about: dict[str, str] = field(default_factory=dict)  # what CMB says: exam_type, exam_class, question_type


def read_rows(path: str | Path) -> list[Row]:
    """Raises FileNotFoundError or ValueError, the latter with file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(parse_row(parse_json(line), str(number)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: {error}") from None
    if not rows:
        raise UserError(f"{path}: no rows, expected one JSON object a line")
    return rows


def parse_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON ({error})") from None


def parse_row(row: Any, id: str) -> Row:
    """Raises ValueError."""
    if not isinstance(row, dict):
        raise UserError(f"expected a JSON object, got {type(row).__name__}")
    options: dict[str, str] = {}
    if "messages" in row:
        messages = parse_messages(row["messages"])
        question = [message["content"] for message in messages if message["role"] == "user"][-1]
        answer = messages[-1]["content"]
    elif "instruction" in row:
        more = text_of(row, "input") if row.get("input") else ""
        question = "\n".join(filter(None, [text_of(row, "instruction"), more]))
        answer = text_of(row, "output")
        messages = conversation(question, answer)
    else:
        question, answer = text_of(row, "question"), text_of(row, "answer")
        if "option" in row and "options" not in row:
            raise UserError('"option" is CMB\'s, in a JSON list; here it is "options"')
        messages = conversation(question, answer)
        if "options" in row:
            options = parse_options(row["options"], answer)
            messages = conversation(*multiple_choice(question, options, answer))
    return Row(
        id=text_of(row, "id") if isinstance(row.get("id"), str) else str(row.get("id", id)),
        messages=messages,
        question=question,
        options=options,
        answer=answer,
        topic=text_of(row, "topic") if "topic" in row else "",
        language=language_of(question),
        explanation=text_of(row, "explanation") if row.get("explanation") else "",
        several=bool(options) and len(answer) > 1,
    )


def text_of(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise UserError(f'no "{key}"')
    if not isinstance(row[key], str) or not row[key].strip():
        raise UserError(f'"{key}" must be text, got {row[key]!r:.40}')
    if not row[key].isascii() and re.search("[\ud800-\udfff]", row[key]):
        raise UserError(f'"{key}" holds half a character (a lone surrogate): {row[key]!r:.40}')
    return row[key]


def parse_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError('"messages" must be a list of {"role", "content"}')
    parsed = [{"role": text_of(m, "role"), "content": text_of(m, "content")} for m in messages]
    for message in parsed:
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(f"a role is system, user or assistant, got {message['role']!r:.40}")
    if parsed[-1]["role"] != "assistant" or not any(message["role"] == "user" for message in parsed):
        raise UserError("the messages must hold a user's and end with the assistant's")
    return parsed


def parse_options(options: Any, answer: str) -> dict[str, str]:
    if not isinstance(options, dict) or len(options) < 2:
        raise UserError('"options" must be an object with at least two letters')
    for letter in options:
        if not re.fullmatch("[A-Z]", letter):
            raise UserError(f"an option is named by one capital letter, got {letter!r:.40}")
        text_of(options, letter)
    if not set(answer) <= set(options) or len(set(answer)) != len(answer):
        raise UserError(f'"answer" must be among the options {"".join(options)}, got {answer!r:.40}')
    return options


def multiple_choice(question: str, options: dict[str, str], answer: str) -> tuple[str, str]:
    """Prompt and answer of a multiple-choice question: the options a line each, "C. text" for an answer."""
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([question, *lines]), "\n".join(f"{letter}. {options[letter]}" for letter in answer)


def explained(row: Row) -> list[dict[str, str]]:
    """The row's messages, its explanation below the answer."""
    *asked, answer = row.messages
    return [*asked, {"role": "assistant", "content": "\n".join(filter(None, [answer["content"], row.explanation]))}]


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def language_of(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"
