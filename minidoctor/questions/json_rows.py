"""Rows of JSON lines, in one of the formats of `FORMATS`, and JSON lists with the line of each entry."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidoctor.config import UserError
from minidoctor.files.json_files import parse_json, read_lines, split_lines, unique_keys
from minidoctor.questions.rows import (
    Message,
    Row,
    conversation,
    detect_language,
    format_multiple_choice,
    parse_id,
    parse_letters,
    parse_options,
    require_text,
)

ENTRY = re.compile(r"[^\s,]")  # the first character of an entry, or the closing bracket


def read_rows(path: str | Path) -> list[Row]:
    """Read JSON lines. Raises FileNotFoundError, or UserError with file and line."""
    path = Path(path)
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                rows.append(parse_row(parse_json(line), str(number)))
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    if not rows:
        raise UserError(f"{path}: no rows, expected one JSON object per line")
    return rows


def parse_row(record: Any, default_id: str) -> Row:
    """Return the row of one JSON object. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    options: dict[str, str] = {}
    if "messages" in record:
        messages = parse_messages(record["messages"])
        question = [message["content"] for message in messages if message["role"] == "user"][-1]
        answer = messages[-1]["content"]
    elif "instruction" in record:
        context = require_text(record, "input") if record.get("input") else ""
        question = "\n".join(filter(None, [require_text(record, "instruction"), context]))
        answer = require_text(record, "output")
        messages = conversation(question, answer)
    else:
        question, answer = require_text(record, "question"), require_text(record, "answer")
        if "option" in record and "options" not in record:
            raise UserError('"option" is the key of CMB in a JSON list; here it is "options"')
        messages = conversation(question, answer)
        if "options" in record:
            options = parse_options(record["options"])
            answer = parse_letters(answer, options)
            messages = conversation(*format_multiple_choice(question, options, answer))
    return Row(
        id=parse_id(record, default_id),
        messages=messages,
        question=question,
        options=options,
        answer=answer,
        topic=require_text(record, "topic") if "topic" in record else "",
        language=detect_language(question),
        explanation=require_text(record, "explanation") if record.get("explanation") else "",
        multiple_answers=bool(options) and len(answer) > 1,
    )


def parse_messages(messages: Any) -> list[Message]:
    """Return a conversation that contains a user's message and ends with the assistant's. Raises UserError."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError('"messages" must be a list of {"role", "content"}')
    parsed = [{"role": require_text(m, "role"), "content": require_text(m, "content")} for m in messages]
    for message in parsed:
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(f"a role must be system, user or assistant, got {message['role']!r:.40}")
    if parsed[-1]["role"] != "assistant" or not any(message["role"] == "user" for message in parsed):
        raise UserError("the messages must contain a user's and end with the assistant's")
    return parsed


def parse_json_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield line and value of each entry of a JSON list. Raises UserError."""
    text = "\n".join(split_lines(text))
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    try:
        json.loads(text)  # validates the commas: from here on only white space and commas separate the entries
        position = text.index("[") + 1
        line = 1 + text.count("\n", 0, position)
        while (entry := ENTRY.search(text, position)) and entry[0] != "]":
            line += text.count("\n", position, entry.start())
            record, position = decoder.raw_decode(text, entry.start())
            yield line, record
            line += text.count("\n", entry.start(), position)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
