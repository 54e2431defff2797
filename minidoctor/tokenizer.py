"""Text to token ids and back: a SentencePiece model, and the chat format that its checkpoint speaks.

Text is only ever encoded as text: what a user types, or what stands in the data, never becomes a control
token. Control tokens (`<s>`, `</s>`, chat markers) are placed by id, here and nowhere else:

    <s> <|user|> What is ... ? <|assistant|> It is ... </s>
        `------- not learned -------------' `- learned --'
"""

import re
from pathlib import Path

import sentencepiece

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
MARKERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

CONTROL, USER_DEFINED = 3, 4  # types of a piece in a SentencePiece model

# U+FFFD stands for bytes that are no character (yet): the tail of one that comes in several tokens.
INCOMPLETE = "\ufffd"


class Tokenizer:
    """A SentencePiece model and its control tokens."""

    def __init__(self, path: Path):
        self.pieces, model = sentencepiece.SentencePieceProcessor(), path.read_bytes()
        try:
            self.pieces.LoadFromSerializedProto(model)
            self.pieces.LoadFromSerializedProto(markers_as_control(model))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
        self.vocab_size: int = self.pieces.vocab_size()
        self.bos_id: int | None = self.pieces.bos_id() if self.pieces.bos_id() >= 0 else None
        self.eos_ids = (self.pieces.eos_id(),) if self.pieces.eos_id() >= 0 else ()
        self.start = [] if self.bos_id is None else [self.bos_id]  # of every text
        # A checkpoint that was made for chat has the markers as control pieces; any other gets plain text.
        ids = {role: self.pieces.piece_to_id(marker) for role, marker in MARKERS.items()}
        self.markers = ids if all(self.pieces.IsControl(i) for i in ids.values()) else None

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: `"</s>"` becomes the pieces of these four characters."""
        # A surrogate is half a character, which UTF-8, and so SentencePiece, cannot hold.
        return self.pieces.encode(text.encode("utf-8", "replace").decode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """A model can have rows for more tokens than the tokenizer has; those decode to nothing."""
        return self.pieces.decode([i for i in ids if i < self.vocab_size])

    def chat_turns(self, messages: list[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """The conversation in pieces: token ids, and whether they are the assistant's own words.

        Ends with the opening of the assistant's turn when the last message is not the assistant's.
        """
        turns = [(self.start, False)]
        for message in messages:
            role, text = message["role"], message["content"]
            if self.markers:
                turns.append(([self.markers[role]], False))
            own = role == "assistant"
            ids = self.encode(text if self.markers or own else text + "\n")
            turns.append((ids + list(self.eos_ids) if own else ids, own))
        if messages[-1]["role"] != "assistant" and self.markers:
            turns.append(([self.markers["assistant"]], False))
        return turns

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [i for ids, _ in self.chat_turns(messages) for i in ids]


def markers_as_control(model: bytes) -> bytes:
    """The SentencePiece model with user-defined pieces like "<eoh>" or "[INST]" made control pieces.

    A user-defined piece is matched wherever its letters stand in a text; a control piece never is. The model is
    a protobuf message: field 1 repeats {1: piece, 2: score, 3: type}.
    """
    changed, at = bytearray(model), 0
    while at < len(model):
        key, at = read_varint(model, at)
        end = at
        if key & 7 == 2:  # bytes with their length
            length, at = read_varint(model, at)
            end = at + length
            # All of a piece that its library writes: its text, a score of 4 bytes and, if not the usual one, the type.
            if key == 1 << 3 | 2 and model[end - 2 : end] == bytes([3 << 3, USER_DEFINED]):
                size, start = read_varint(model, at + 1)
                if re.fullmatch(rb"<.+>|\[.+\]", model[start : start + size], re.DOTALL):
                    changed[end - 1] = CONTROL
        elif key & 7 == 0:
            _, end = read_varint(model, at)
        else:
            end = at + (8 if key & 7 == 1 else 4)
        at = end
    return bytes(changed)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf integer, seven bits a byte, lowest first, and where it ends."""
    value, shift = 0, 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at


class TextStream:
    """Decodes tokens as they come and gives out whole characters only."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.given = 0  # characters

    def push(self, *ids: int) -> str:
        """The text that these tokens complete, perhaps none."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        whole = text.rstrip(INCOMPLETE)
        new, self.given = whole[self.given :], max(self.given, len(whole))
        return new

    def rest(self) -> str:
        """What is left at the end, with a replacement character for each byte that never became one."""
        return self.tokenizer.decode(self.ids)[self.given :]


def printable(text: str) -> str:
    r"""Text that is safe to print: `"\x1b[2J"` becomes `"\\x1b[2J"`, so that it cannot command the terminal.

    Newline and tab stay. Also escaped are the marks that reverse the reading direction.
    """
    return "".join(c if c in "\n\t" or not is_control(c) else ascii(c)[1:-1] for c in text)


def is_control(char: str) -> bool:
    code = ord(char)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0x2028 <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xD800 <= code < 0xE000
    )


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Raises FileNotFoundError or ValueError."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    path = Path(directory) / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no tokenizer.model here")
    return Tokenizer(path)
