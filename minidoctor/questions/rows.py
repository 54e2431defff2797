"""One question: its record, the checks of its fields, and its text as a conversation."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minidoctor.config import check

INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # Unicode categories of white space, control and zero-width characters


@dataclass(frozen=True)
class Row:
    """One question, read from any of the formats that README.md lists."""

    id: str  # from the file, otherwise the number of its line or entry
    messages: list[dict[str, str]]  # ends with the assistant's answer, unless the benchmark does not publish it
    question: str  # without the options
    options: dict[str, str]  # letter to text; empty for a free-form question
    answer: str  # the correct letters in alphabetical order, or the text; empty if not published
    topic: str
    language: str  # "zh" if the question contains a Chinese character, otherwise "en"
    kind: str = ""  # such as "new name": accuracies are also reported by kind
    explanation: str = ""
    multiple_answers: bool = False  # several letters may be correct: by CMB's question type, otherwise by the answer
    exam: str = ""  # the benchmark: cmmlu, cmexam or cmb
    metadata: dict[str, str] = field(default_factory=dict)  # CMB: exam_type, exam_class, exam_subject, question_type


def is_blank(value: Any) -> bool:
    """Return whether a value is null or text without a visible character."""
    return value is None or (isinstance(value, str) and all(unicodedata.category(c) in INVISIBLE for c in value))


def require_text(record: Mapping[str, Any], key: str) -> str:
    """Return the text of a field. Raises UserError if it is missing, not text or blank."""
    check(key in record, f'no "{key}"')
    text = record[key]
    check(isinstance(text, str) and not is_blank(text), f'"{key}" must be text, got {text!r:.40}')
    complete = text.isascii() or not re.search("[\ud800-\udfff]", text)
    check(complete, f'"{key}" contains half a character (a lone surrogate): {text!r:.40}')
    return text


def optional_text(record: Mapping[str, Any], key: str) -> str:
    """Return the text of a field, or "" if it is missing, null or blank. Raises UserError if it is not text."""
    return "" if is_blank(record.get(key)) else require_text(record, key)


def parse_options(options: Any, answer: str) -> str:
    """Check the options and return the letters of the answer in alphabetical order: "BA" and "AB" are one set.

    Raises UserError unless the options have one capital letter each and the answer consists of some of them.
    """
    check(isinstance(options, dict) and len(options) > 1, '"options" must be an object with at least two letters')
    for letter in options:
        check(bool(re.fullmatch("[A-Z]", letter)), f"an option must have one capital letter, got {letter!r:.40}")
        require_text(options, letter)
    letters = "".join(sorted(answer.strip()))
    among = set(letters) <= set(options) and len(set(letters)) == len(letters)
    check(among, f'"answer" must be among the options {"".join(options)}, got {answer!r:.40}')
    return letters


def format_multiple_choice(question: str, options: dict[str, str], letters: str) -> tuple[str, str]:
    """Return prompt and answer: below the question one option per line, "C. text" for each correct letter."""
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([question, *lines]), "\n".join(f"{letter}. {options[letter]}" for letter in letters)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_row(
    record: Mapping[str, Any], default_id: str, question: str, answer: str, options: dict[str, str], **fields: Any
) -> Row:
    """Return the row of a record with optional "id", "topic", "kind" and "explanation". `fields` replace any value."""
    messages = conversation(*(format_multiple_choice(question, options, answer) if options else (question, answer)))
    values: dict[str, Any] = {
        "id": str(record["id"]) if isinstance(record.get("id"), int) else optional_text(record, "id") or default_id,
        "messages": messages if answer else messages[:1],
        "topic": optional_text(record, "topic"),
        "kind": optional_text(record, "kind"),
        "language": "zh" if re.search("[\u4e00-\u9fff]", question) else "en",
        "explanation": optional_text(record, "explanation"),
        "multiple_answers": bool(options) and len(answer) > 1,
    }
    return Row(question=question, options=options, answer=answer, **values | fields)


def add_explanation(row: Row) -> list[dict[str, str]]:
    """Return the row's messages with its explanation below the answer."""
    *prompt, answer = row.messages
    return [*prompt, {"role": "assistant", "content": "\n".join(filter(None, [answer["content"], row.explanation]))}]
