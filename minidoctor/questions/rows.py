"""One question: its record, the checks of its fields, and its text as a conversation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minidoctor.config import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Row:
    """One question, read from any of the formats that README.md lists."""

    id: str  # from the file, otherwise the number of its line or entry
    messages: list[Message]  # ends with the assistant's answer, unless the benchmark does not publish it
    question: str  # without the options
    options: dict[str, str]  # letter to text; empty for a free-form question
    answer: str  # the correct letters in alphabetical order, or the text; empty if not published
    topic: str
    language: str  # "zh" if the question contains a Chinese character, otherwise "en"
    explanation: str = ""
    multiple_answers: bool = False  # several letters may be correct: by CMB's question type, otherwise by the answer
    exam: str = ""  # the benchmark: cmmlu, cmexam or cmb
    metadata: dict[str, str] = field(default_factory=dict)  # CMB: exam_type, exam_class, exam_subject, question_type


def require_text(record: Mapping[str, Any], key: str) -> str:
    """Return the text of a field. Raises UserError if it is missing, not text or blank."""
    if key not in record:
        raise UserError(f'no "{key}"')
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'"{key}" must be text, got {text!r:.40}')
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f'"{key}" contains half a character (a lone surrogate): {text!r:.40}')
    return text


def parse_id(record: Mapping[str, Any], default: str) -> str:
    return require_text(record, "id") if isinstance(record.get("id"), str) else str(record.get("id", default))


def parse_options(options: Any) -> dict[str, str]:
    """Check options by letter. Raises UserError."""
    if not isinstance(options, dict) or len(options) < 2:
        raise UserError('"options" must be an object with at least two letters')
    for letter in options:
        if not re.fullmatch("[A-Z]", letter):
            raise UserError(f"an option must have one capital letter, got {letter!r:.40}")
        require_text(options, letter)
    return options


def parse_letters(answer: str, options: dict[str, str]) -> str:
    """Return the letters of an answer, each once. Raises UserError if they are not letters of the options."""
    if not set(answer) <= set(options) or len(set(answer)) != len(answer):
        raise UserError(f'"answer" must be among the options {"".join(options)}, got {answer!r:.40}')
    return answer


def format_multiple_choice(question: str, options: dict[str, str], letters: str) -> tuple[str, str]:
    """Return prompt and answer: below the question one option per line, "C. text" for each correct letter."""
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([question, *lines]), "\n".join(f"{letter}. {options[letter]}" for letter in letters)


def conversation(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def add_explanation(row: Row) -> list[Message]:
    """Return the row's messages with its explanation below the answer."""
    *prompt, answer = row.messages
    return [*prompt, {"role": "assistant", "content": "\n".join(filter(None, [answer["content"], row.explanation]))}]


def detect_language(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"
