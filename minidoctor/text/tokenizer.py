"""The tokenizer of a checkpoint: text to ids and back, control tokens, conversations.

Text is only ever encoded as text: what a user types, or what stands in the data, never becomes a control
token. Control tokens (`<s>`, `</s>`, `<|im_end|>`) are placed by id where the chat format has them, here and
nowhere else:

    <s> <|user|> What is ... ? <|assistant|> It is ... </s>
        `------- not learned -------------' `- learned --'
"""

from pathlib import Path
from typing import Any

from minidoctor.batching import IGNORE, Example
from minidoctor.config import LARGEST, UserError
from minidoctor.files.json_files import read_bytes, read_object
from minidoctor.text.backends import INSIDE, SECTION, START, Added, JsonPieces, SentencePieces, spacing
from minidoctor.text.chat_formats import CHAT_FORMATS, ChatFormat, adapt, layout, recognize


class Tokenizer:
    """A checkpoint's text, its control tokens and its chat format."""

    def __init__(
        self,
        pieces: SentencePieces | JsonPieces,
        controls: dict[str, int],
        start: list[int],
        eos_ids: list[int],
        chat_format: str | None,
        form: ChatFormat | None,
        note: str,
    ):
        self.pieces, self.start, self.chat_format, self.format = pieces, start, chat_format, form
        self.note = note  # for people: which file and which chat format, and why
        self.bos_id = controls.get("{bos}")
        end = [controls[form.end]] if form and form.end in controls else []
        self.eos_ids = tuple(dict.fromkeys(end + eos_ids))
        self.controls = controls
        # Backwards, so that "<s>" and not "{bos}" is the name that stays.
        self.names = {i: pieces.decode([i]) or name for name, i in reversed(controls.items()) if i != pieces.unk_id}
        self.shown = {token.id for token in pieces.added if token.control and not token.special}
        used = [controls[name] for name in (form.needs if form else ())]
        self.vocab_size = max([pieces.size, *(i + 1 for i in (*used, *start, *self.eos_ids))])

    def encode(self, text: str, place: str = START) -> list[int]:
        """Ids of the text alone: `"</s>"` becomes the pieces of these four characters."""
        # A surrogate is half a character, which UTF-8 cannot hold.
        ids = self.pieces.encode(text.encode("utf-8", "replace").decode("utf-8"), place)
        if self.names.keys().isdisjoint(ids):
            return ids
        # Some vocabularies have a control token among the pieces of text: then letter by letter.
        return [k for i in ids for k in (self.spelled(i) if i in self.names else [i])]

    def spelled(self, control: int) -> list[int]:
        return [i for letter in self.names[control] for i in self.pieces.encode(letter, INSIDE)]

    def decode(self, ids: list[int]) -> str:
        """Control tokens decode to nothing, and so do ids that a model has rows for and the tokenizer has not."""
        text, run = "", list[int]()
        for i in ids:
            if i in self.shown:
                text, run = text + self.pieces.decode(run) + self.names[i], []
            elif i < self.pieces.size and i not in self.names:
                run.append(i)
        return text + self.pieces.decode(run)

    def chat_turns(self, messages: list[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """The conversation in pieces: token ids, and whether they are the assistant's own words.

        Ends with the opening of the assistant's turn when the last message is not the assistant's. Raises
        ValueError if the checkpoint's chat format is not known.
        """
        if not self.format:
            raise UserError(self.note)
        turns, place = [], START
        for text, own, control in layout(messages, self.format, {*self.controls, "{bos}", "{eos}"}):
            ids = self.encode(text, place) if not control else [i for i in [self.controls.get(text)] if i is not None]
            turns.append((ids, own))
            place = SECTION if control else INSIDE
        return turns

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [i for ids, _ in self.chat_turns(messages) for i in ids]


def load_tokenizer(directory: str | Path, chat_format: str = "auto") -> Tokenizer:
    """`chat_format` names one of `chat.CHAT_FORMATS`; "auto" is the one that the checkpoint speaks.

    Raises FileNotFoundError or ValueError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    model, content = directory / "tokenizer.model", directory / "tokenizer.json"
    if not model.is_file() and not content.is_file():
        raise FileNotFoundError(f"{directory}: no tokenizer.model or tokenizer.json here")
    try:
        return make_tokenizer(model, content, read_settings(directory), chat_format)
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # JSON of another shape than anybody writes
        raise UserError(f"{directory}: the tokenizer's settings cannot be understood ({error!r:.80})") from None


def make_tokenizer(model: Path, content: Path, settings: dict[str, Any], chat_format: str) -> Tokenizer:
    pieces: SentencePieces | JsonPieces
    if model.is_file():  # before tokenizer.json: it is what the other was made from, and needs no more packages
        # The spaces are as in tokenizer.json, if it stands there too, for that is what other readers go by.
        spaced = spacing(read_object(content)) if content.is_file() else spacing_of(settings)
        pieces = SentencePieces(model, spaced, added_tokens(settings))
    else:
        pieces = JsonPieces(content)
    controls, eos_ids = control_ids(pieces, settings, model.parent)
    starts = settings.get("add_bos_token", pieces.starts_with_bos)
    start = [controls["{bos}"]] if starts and "{bos}" in controls else []
    format_name, form, why = choose_format(chat_format, settings, controls, start, model.parent)
    files = f"{model.name} (not {content.name}, which needs one more package)" if content.is_file() else model.name
    note = f"{files if model.is_file() else content.name}, {why}"
    return Tokenizer(pieces, controls, start, eos_ids, format_name, form, note)


def control_ids(
    pieces: SentencePieces | JsonPieces, settings: dict[str, Any], directory: Path
) -> tuple[dict[str, int], list[int]]:
    """Control tokens by name, "{bos}" and its like among them, and the ids that end an answer. Raises ValueError."""
    controls = {token.name: token.id for token in pieces.added if token.control}
    own: Any
    for name, key, own in (("{bos}", "bos_token", pieces.bos_id), ("{eos}", "eos_token", pieces.eos_id)):
        token = settings.get(key)
        token = token["content"] if isinstance(token, dict) else token
        if not token and own is None:  # then by number, as in config.json
            own = (as_list(settings.get(key + "_id")) or [None])[0]
        found = controls.get(token, pieces.id_of(token)) if token else own
        if found is not None:
            controls[name] = found
        elif token:
            raise UserError(f"{directory}: {key} is {token!r:.40}, which is none of its tokens")
    for name, key in (("{user}", "user_token_id"), ("{assistant}", "assistant_token_id")):
        if key in settings:
            controls[name] = settings[key]
    eos_ids = [controls[name] for name in ("{eos}",) if name in controls] + as_list(settings.get("eos_token_id"))
    if not all(
        type(i) is int and 0 <= i <= LARGEST for i in (*controls.values(), *eos_ids, *(t.id for t in pieces.added))
    ):
        raise UserError(f"{directory}: a token id must be a whole number, at least 0")
    if not all(isinstance(token.name, str) for token in pieces.added):
        raise UserError(f"{directory}: the name of a token must be text")
    return controls, eos_ids


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_settings(directory: Path) -> dict[str, Any]:
    """What the JSON files beside the vocabulary say; where two speak of the same, the later of these counts."""
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            settings |= {key: value for key, value in read_object(directory / name).items() if value is not None}
    if (directory / "added_tokens.json").is_file():
        settings["added_tokens"] = read_object(directory / "added_tokens.json")
    template = settings.get("chat_template", "")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    if (directory / "chat_template.jinja").is_file():
        template = read_bytes(directory / "chat_template.jinja").decode("utf-8", "replace")
    return settings | {"chat_template": template}


def added_tokens(settings: dict[str, Any]) -> list[Added]:
    """What was added to a SentencePiece vocabulary, which cannot say it itself."""
    tokens = {name: Added(name, i, True) for name, i in settings.get("added_tokens", {}).items()}
    for i, token in settings.get("added_tokens_decoder", {}).items():  # newer files, which say more
        number = int(i) if i.isdecimal() else -1  # refused with the other ids
        tokens[token["content"]] = Added(token["content"], number, token.get("special", True))
    return list(tokens.values())


def spacing_of(settings: dict[str, Any]) -> str | None:
    """Where a space is put in front of a text. None: the model itself knows.

    "legacy" is what the Llama tokenizer of `transformers` calls a space after each control token.
    """
    if not settings.get("add_prefix_space", True):
        return "never"
    if "legacy" in settings and not settings["legacy"]:
        return "first"
    return "always" if "add_prefix_space" in settings else None


def choose_format(
    chat_format: str, settings: dict[str, Any], controls: dict[str, int], start: list[int], directory: Path
) -> tuple[str | None, ChatFormat | None, str]:
    """The chat format's name, itself, and why it is that; None if the checkpoint's own is not known here."""
    if chat_format != "auto" and chat_format not in CHAT_FORMATS:
        raise UserError(f"chat_format must be auto, {', '.join(CHAT_FORMATS)}, got {chat_format!r}")
    found = (chat_format, "as chosen") if chat_format != "auto" else recognize(settings["chat_template"], controls)
    if not found:
        return (
            None,
            None,
            f"{directory}: its chat_template is none of {', '.join(CHAT_FORMATS)}; --chat-format chooses one",
        )
    name, why = found
    form = adapt(name, settings["chat_template"])
    if name == "plain" and not start:  # as any other text of this checkpoint
        form = form._replace(start="")
    if missing := [token for token in form.needs if token not in controls]:
        message = f"{directory}: chat format {name} ({why}) needs the token {missing[0]}, which is not there"
        if chat_format != "auto":
            raise UserError(message)
        return None, None, f"{message}; --chat-format chooses another"
    return name, form, f"chat format {name} ({why})"


def encode_conversation(messages: list[dict[str, str]], tokenizer: Tokenizer, max_seq_len: int) -> Example:
    """The conversation as tokens, with targets on the assistant's words and the token that ends them."""
    tokens: list[int] = []
    targets: list[int] = []
    for ids, own in tokenizer.chat_turns(messages):
        tokens += ids
        targets += ids if own else [IGNORE] * len(ids)
    return Example(tokens[:-1][:max_seq_len], targets[1:][:max_seq_len])
