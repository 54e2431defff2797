"""Rows of JSON objects, in one of the formats of `FORMATS`, and the entries of a JSON list.

A key is rejected if other tools take it as part of the prompt or of the loss and the row's format does not support it:
without it, the row would teach something else.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minidoctor.config import UserError, check
from minidoctor.files.json_files import split_lines, unique_keys
from minidoctor.questions.rows import Row, conversation, is_blank, make_row, optional_text, parse_options, require_text

# The supported keys of a row, by the key that identifies its format. Next to a list of messages, which is complete, the
# plain keys can only repeat it.
PLAIN = {"instruction", "input", "output", "question", "option", "options", "choices", "answer"}
FORMATS = {
    "messages": {"messages", "system", *PLAIN},
    "conversations": {"conversations", "system", *PLAIN},  # ShareGPT
    "instruction": {"instruction", "input", "output", "system", "history"},  # Alpaca
    "question": {"question", "options", "answer"},
}
# Further keys of OpenAI's fine-tuning API, TRL, LLaMA-Factory and axolotl: of the prompt, of a message, of the loss.
MEANINGFUL = re.compile(
    "system|history|contexts?|passages?|documents|tools|functions|(image|video|audio)s?"
    "|tool_calls|tool_call_id|function_call|reasoning_content|thinking"
    "|chosen|rejected|kto_tag|weight|mask|loss_mask|train"
)
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
ENTRY = re.compile(r"[^\s,]")  # the first character of an entry in a JSON list, or the closing bracket


def parse_row(record: Any, default_id: str) -> Row:
    """Return the row of one JSON object. Raises UserError."""
    check(isinstance(record, dict), f"expected a JSON object, got {type(record).__name__}")
    kind = next((key for key in FORMATS if record.get(key) is not None), "question")
    check_keys(record, FORMATS[kind], f'a row with "{kind}"')
    if kind == "question":
        question, answer, options = require_text(record, "question"), require_text(record, "answer"), {}
        if "options" in record:
            options, answer = record["options"], parse_options(record["options"], answer)
        return make_row(record, default_id, question, answer, options)
    messages = [{"role": "system", "content": system}] if (system := optional_text(record, "system")) else []
    if kind == "instruction":
        question = "\n".join(filter(None, [require_text(record, "instruction"), optional_text(record, "input")]))
        messages += parse_history(record.get("history")) + conversation(question, require_text(record, "output"))
    else:
        messages += parse_messages(record[kind])
        question = [message["content"] for message in messages if message["role"] == "user"][-1]
    return make_row(record, default_id, question, messages[-1]["content"], {}, messages=messages)


def check_keys(record: Mapping[str, Any], supported: set[str], where: str) -> None:
    """Raise UserError for a key that would be lost, unless its value is null or empty."""
    for key, value in record.items():
        name = key.lower()
        lost = key not in supported and (name in PLAIN or name in FORMATS or MEANINGFUL.fullmatch(name))
        message = f'"{key}" is not supported in {where} and would be lost; remove it or put it into the text'
        check(not lost or is_blank(value) or value in ([], {}), message)


def parse_messages(messages: Any) -> list[dict[str, str]]:
    """Return a conversation that contains a user's message and ends with the assistant's. Raises UserError."""
    is_list = isinstance(messages, list) and len(messages) > 0 and all(isinstance(m, dict) for m in messages)
    check(is_list, 'the messages must be a list of {"role", "content"} or {"from", "value"}')
    parsed = []
    for message in messages:
        check_keys(message, set(), "a message")
        role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
        role = require_text(message, role_key)
        check(role in ROLES, f'"{role_key}" must be one of {", ".join(ROLES)}, got {role!r:.40}')
        parsed.append({"role": ROLES[role], "content": require_text(message, text_key)})
    complete = parsed[-1]["role"] == "assistant" and any(message["role"] == "user" for message in parsed)
    check(complete, "the messages must contain a user's and end with the assistant's")
    return parsed


def parse_history(history: Any) -> list[dict[str, str]]:
    """Return the messages of earlier turns, a list of [user, assistant]. Raises UserError."""
    turns = history or []
    are_pairs = isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    check(are_pairs, '"history" must be a list of [user, assistant]')
    texts = [[require_text({"history": text}, "history") for text in turn] for turn in turns]
    return [message for turn in texts for message in conversation(*turn)]


def parse_json_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield line and value of each entry of a JSON list. Raises UserError."""
    text = "\n".join(split_lines(text))
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    position = text.index("[") + 1
    line = 1 + text.count("\n", 0, position)
    try:
        json.loads(text)  # validates the commas: from here on only white space and commas separate the entries
        while (entry := ENTRY.search(text, position)) and entry[0] != "]":
            line += text.count("\n", position, entry.start())
            record, position = decoder.raw_decode(text, entry.start())
            yield line, record
            line += text.count("\n", entry.start(), position)
    except UserError as error:
        raise UserError(f"{path}:{line}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
