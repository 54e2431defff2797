"""The tokenizer of a checkpoint: text to ids and back, special tokens and conversations.

Text is always encoded as text: user input and data never become special tokens (`<s>`, `</s>`, `<|im_end|>`). These
are placed by id, in this file only, at the positions that the chat format defines:

    <s> <|user|> What is ... ? <|assistant|> It is ... </s>
    `----------- no loss --------------------' `-- loss ----'
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidoctor.batching import IGNORE, Example
from minidoctor.config import LARGEST, UserError, check
from minidoctor.files.hub_cache import follow_snapshot
from minidoctor.files.json_files import read_object, read_text
from minidoctor.text.backends import INSIDE, SECTION, START, AddedToken, Backend, load_backend
from minidoctor.text.chat_formats import CHAT_FORMATS, REASONING_TOKENS, ChatFormat, adapt, recognize, render
from minidoctor.text.reasoning import TAGS

SETTINGS = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")


@dataclass
class Tokenizer:
    """A backend with the special tokens and the chat format of its checkpoint."""

    backend: Backend
    special_tokens: dict[str, int]  # by name, with "{bos}" and the other names of chat_formats.py
    start: list[int]  # precedes every text outside a chat
    eos_ids: tuple[int, ...]  # each of them ends an answer
    chat_format: str | None
    format: ChatFormat | None
    note: str  # the file and the chat format in use, and the reason

    def __post_init__(self) -> None:
        backend, special_tokens, format = self.backend, self.special_tokens, self.format
        self.bos_id = special_tokens.get("{bos}")
        end = [special_tokens[format.end]] if format and format.end in special_tokens else []
        self.eos_ids = tuple(dict.fromkeys([*end, *self.eos_ids]))
        # In reverse, so that the name is "<s>" and not "{bos}".
        names = {i: name for name, i in reversed(special_tokens.items()) if i != backend.unk_id}
        self.names = {i: backend.decode([i]) or name for i, name in names.items()}
        self.displayed = {i: name for name, i in backend.words.items()}
        displayed = [token for token in backend.added if token.displayed or token.content in TAGS]
        self.displayed |= {token.id: self.names[token.id] for token in displayed if token.special}
        self.opens_reasoning = format is not None and format.generation_prompt.rstrip().endswith("<think>")
        self.byte_ids = {backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        # Ids that only end an answer need no row in the model: it can never generate them.
        markup = "".join(part for part in format or () if isinstance(part, str))
        used = [i for name, i in special_tokens.items() if name in markup and name.startswith("{")]
        used += [special_tokens[name] for name in (format.needs if format else ())]
        self.vocab_size = max([backend.size, *(i + 1 for i in used + self.start)])

    def encode(self, text: str, position: str = START) -> list[int]:
        """Encode text without special tokens: `"</s>"` becomes the tokens of these four characters."""
        # UTF-8 cannot represent a lone surrogate.
        ids = self.backend.encode(text.encode("utf-8", "replace").decode("utf-8"), position)
        if self.names.keys().isdisjoint(ids):
            return ids
        # Some vocabularies have a special token among their pieces of text: its characters are encoded one by one.
        parts = [[self.backend.encode(c, INSIDE) for c in self.names[i]] if i in self.names else [[i]] for i in ids]
        return [i for part in parts for letters in part for i in letters]

    def decode(self, ids: list[int]) -> str:
        """Decode text. Special tokens and ids that are not in the vocabulary decode to nothing."""
        text, run, position = "", list[int](), START
        for i in ids:
            if i in self.displayed:
                text, run, position = text + self.backend.decode(run, position) + self.displayed[i], [], SECTION
            elif self.has_text(i):
                run.append(i)
        return text + self.backend.decode(run, position)

    def has_text(self, i: int) -> bool:
        """Return False for ids that decode to nothing: special tokens and ids that are not in the vocabulary."""
        return i in self.displayed or (i < self.backend.size and i not in self.names)

    def chat_turns(self, messages: list[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """Encode a conversation as segments: token ids, and True for those of the assistant, which are trained.

        Without an answer at the end, the last segment is the generation prompt. Raises UserError if the chat format
        is unknown.
        """
        if not self.format:
            raise UserError(self.note)
        turns, position = [], START
        for text, assistant, special in render(messages, self.format, {*self.special_tokens, "{bos}", "{eos}"}):
            special_ids = [self.special_tokens[text]] if text in self.special_tokens else []
            turns.append((special_ids if special else self.encode(text, position), assistant))
            position = SECTION if special else INSIDE
        return turns

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [i for ids, _ in self.chat_turns(messages) for i in ids]


def encode_conversation(messages: list[dict[str, str]], tokenizer: Tokenizer, max_seq_len: int) -> Example:
    """Tokenize a conversation, with targets on the assistant's answers and the tokens that end them."""
    tokens: list[int] = []
    targets: list[int] = []
    for ids, assistant in tokenizer.chat_turns(messages):
        tokens += ids
        targets += ids if assistant else [IGNORE] * len(ids)
    return Example(tokens[:-1][:max_seq_len], targets[1:][:max_seq_len])


def load_tokenizer(directory: str | Path, chat_format: str = "auto", thinking: bool = False) -> Tokenizer:
    """Load a checkpoint's tokenizer, with a format of CHAT_FORMATS or "auto" for the one it was trained in.

    With `thinking`, the model may reason before it answers. Raises FileNotFoundError or UserError.
    """
    directory = follow_snapshot(directory)
    formats = ["auto", *CHAT_FORMATS]
    check(chat_format in formats, f"chat_format must be one of {', '.join(formats)}, got {chat_format!r}")
    try:
        settings = read_settings(directory)
        backend, file = load_backend(directory, configured_scheme(settings), added_tokens(settings))
        special_tokens, eos_ids = special_token_ids(backend, settings, directory)
        starts = settings.get("add_bos_token", backend.starts_with_bos)
        start = [special_tokens["{bos}"]] if starts and "{bos}" in special_tokens else []
        template = settings["chat_template"]
        name, format, reason = choose_format(chat_format, template, thinking, special_tokens, directory)
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # JSON of an unexpected structure
        raise UserError(f"{directory}: unexpected tokenizer settings ({error!r:.80})") from error
    if format and name == "plain" and not start:  # as any other text of this checkpoint
        format = format._replace(start="")
    return Tokenizer(backend, special_tokens, start, tuple(eos_ids), name, format, f"{file}, {reason}")


def special_token_ids(backend: Backend, settings: dict[str, Any], directory: Path) -> tuple[dict[str, int], list[int]]:
    """Return the special tokens, with "{bos}" and the other names of chat_formats.py, and the ids that end an answer.

    End tokens beyond the model's vocabulary are left out, because they can never be generated.
    """
    special_tokens = {token.content: token.id for token in backend.added if token.special}
    starts, ends = (as_list(settings.get(key)) for key in ("bos_token_id", "eos_token_id"))
    check(all(map(is_id, ends)), f"{directory}: eos_token_id must be token ids, got {ends!r:.60}")
    ends = [i for i in ends if i < settings["n_rows"]]
    for key, default, ids in (("bos", backend.bos_id, starts), ("eos", backend.eos_id, ends)):
        token = settings.get(f"{key}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token:
            default = special_tokens.get(token, backend.token_to_id(token))
            check(default is not None, f"{directory}: {key}_token {token!r:.40} is not in the vocabulary")
        elif default is None and ids:  # by id, as in config.json
            default = ids[0]
        if default is not None:
            special_tokens[f"{{{key}}}"] = default
    for key in ("user", "assistant"):
        if f"{key}_token_id" in settings:
            special_tokens[f"{{{key}}}"] = settings[f"{key}_token_id"]
    all_ids = (*special_tokens.values(), *(token.id for token in backend.added))
    check(all(map(is_id, all_ids)), f"{directory}: a token id must be an integer of at least 0")
    check(all(isinstance(token.content, str) for token in backend.added), f"{directory}: a token must be text")
    ends = [special_tokens.get("{eos}", LARGEST), *ends]
    return special_tokens, [i for i in ends if i < settings["n_rows"]]


def is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the settings next to the vocabulary. A key of several files has its value in the last one of SETTINGS."""
    files = {name: read_object(directory / name) for name in SETTINGS if os.path.lexists(directory / name)}
    settings = {key: value for content in files.values() for key, value in content.items() if value is not None}
    n_rows = files.get("config.json", {}).get("vocab_size")
    settings["n_rows"] = n_rows if is_id(n_rows) else LARGEST  # rows of the model's embedding
    if os.path.lexists(directory / "added_tokens.json"):
        settings["added_tokens"] = read_object(directory / "added_tokens.json")
    template = settings.get("chat_template", "")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    if os.path.lexists(directory / "chat_template.jinja"):
        template = read_text(directory / "chat_template.jinja")
    return settings | {"chat_template": template}


def added_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """Return the tokens that were added to a SentencePiece vocabulary, which are not stored in its file."""
    tokens = {name: AddedToken(name, i, displayed=False) for name, i in settings.get("added_tokens", {}).items()}
    for i, token in settings.get("added_tokens_decoder", {}).items():  # of newer files, in more detail
        number = int(i) if i.isdecimal() else -1  # which is rejected with all other ids
        tokens[token["content"]] = AddedToken(token["content"], number, not token.get("special", True))
    return list(tokens.values())


def configured_scheme(settings: dict[str, Any]) -> str | None:
    """Return the key of PREPEND_SCHEMES in the settings, or None to keep the one of the SentencePiece model.

    With `legacy`, the Llama tokenizer of `transformers` also prepends a space after every special token.
    """
    if not settings.get("add_prefix_space", True):
        return "never"
    if "legacy" in settings and not settings["legacy"]:
        return "first"
    return "always" if "add_prefix_space" in settings else None


def choose_format(
    chat_format: str, template: str, thinking: bool, special_tokens: dict[str, int], directory: Path
) -> tuple[str | None, ChatFormat | None, str]:
    """Return the name of the chat format, the format, and the reason. The first two are None if it is unknown."""
    given = chat_format, "that of the adapter or --chat-format"
    chosen = given if chat_format != "auto" else recognize(template, special_tokens)
    if not chosen:
        formats = ", ".join(CHAT_FORMATS)
        return None, None, f"{directory}: its chat_template is none of {formats}; choose one with --chat-format"
    name, reason = chosen
    format = adapt(CHAT_FORMATS[name], template, thinking)
    if missing := [token for token in format.needs if token not in special_tokens]:
        message = f"{directory}: chat format {name} ({reason}) needs the token {missing[0]}, which the vocabulary lacks"
        check(chat_format == "auto", message)
        return None, None, f"{message}; choose another with --chat-format"
    thinks = ", thinking" if format.max_new_tokens == REASONING_TOKENS else ""
    return name, format, f"chat format {name}{thinks} ({reason})"
