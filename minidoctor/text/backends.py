"""Pieces of text as token ids: what a `tokenizer.model` (SentencePiece) or a `tokenizer.json` says about text alone.

Control tokens are not found here, whatever a text looks like: `"</s>"` becomes the pieces of these four
characters. `tokenizer.py` places them.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from minidoctor.config import UserError
from minidoctor.files.json_files import read_bytes, read_object

CONTROL, USER_DEFINED = 3, 4  # types of a piece in a SentencePiece model
MARKER = r"<.+>|\[.+\]"  # what looks like a control token is treated as one, whatever its type
# Where a text stands decides whether it gets a space in front: at the very start, after a control token, or
# after other text. The names of the three ways are those of the package `tokenizers`.
START, SECTION, INSIDE = "start", "section", "inside"
SPACED: dict[str, tuple[str, ...]] = {"always": (START, SECTION), "first": (START,), "never": ()}


class Added(NamedTuple):
    """A token that is no piece of text, or was added to the vocabulary later."""

    name: str
    id: int
    special: bool  # decodes to nothing

    @property
    def control(self) -> bool:
        return self.special or bool(re.fullmatch(MARKER, self.name, re.DOTALL))


class SentencePieces:
    """The text of a `tokenizer.model`, and the words that were added to it."""

    def __init__(self, path: Path, spaced: str | None, added: list[Added]):
        try:
            model = markers_as_control(read_bytes(path))
            # Field 3 (the normalizer) {3: add_dummy_prefix} once more: of two values the last counts.
            self.processor, with_space, without = (
                sentencepiece.SentencePieceProcessor(model_proto=model + more)
                for more in (b"", bytes([3 << 3 | 2, 2, 3 << 3, 1]), bytes([3 << 3 | 2, 2, 3 << 3, 0]))
            )
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from None
        if spaced is None:  # the model's own way
            spaced = "never" if self.processor.encode("a") == without.encode("a") else "always"
        self.at = {place: with_space if place in SPACED[spaced] else without for place in (START, SECTION, INSIDE)}
        self.n_pieces: int = self.processor.vocab_size()
        self.unk_id: int | None = self.processor.unk_id()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self.processor.bos_id(), self.processor.eos_id()))
        self.starts_with_bos = True
        own = [
            Added(self.processor.id_to_piece(i), i, True) for i in range(self.n_pieces) if self.processor.IsControl(i)
        ]
        self.added = own + added
        self.words = {token.name: token.id for token in added if not token.control}
        self.word_of = {i: name for name, i in self.words.items()}
        self.size = max([self.n_pieces, *(i + 1 for i in self.words.values())])
        self.word = re.compile("(" + "|".join(map(re.escape, sorted(self.words, key=len, reverse=True))) + ")")

    def encode(self, text: str, place: str) -> list[int]:
        if not self.words:
            return self.at[place].encode(text)
        ids: list[int] = []
        for i, part in enumerate(self.word.split(text)):
            ids += [self.words[part]] if i % 2 else self.at[SECTION if i else place].encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        text, run, place = "", list[int](), START
        for i in ids:
            if i in self.word_of:
                text, run, place = text + self.at[place].decode(run) + self.word_of[i], [], SECTION
            elif i < self.n_pieces:
                run.append(i)
        return text + self.at[place].decode(run)

    def id_of(self, name: str) -> int | None:
        found = self.processor.piece_to_id(name)
        return None if found == self.unk_id and name != self.processor.id_to_piece(found) else found


class JsonPieces:
    """The text of a `tokenizer.json`, read by the optional package `tokenizers`."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise UserError(f"{path} needs one more package: pip install tokenizers") from None
        content = read_object(path)
        try:
            tokens = content.get("added_tokens") or []
            self.added = [Added(token["content"], token["id"], token["special"]) for token in tokens]
            # What is special stays text below. (Taken out of the list, the words that stay would get other ids.)
            content["added_tokens"] = [t | {"special": a.control} for t, a in zip(tokens, self.added, strict=True)]
            self.starts_with_bos = starts_with_special(content)
            # How whole batches are cut, filled up and framed is none of this file's business.
            content |= {"truncation": None, "padding": None, "post_processor": None}
            self.reader = without = Reader.from_str(json.dumps(content))
            if (spaced := spacing(content)) != "never":
                without = Reader.from_str(json.dumps(without_space(content)))
            self.reader.encode_special_tokens = without.encode_special_tokens = True
            self.reader.encode("a")  # what is damaged may show only now
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises nothing more particular, and panics beside Exception
            raise UserError(f"{path}: not a tokenizer ({error!s:.200})") from None
        self.at = {place: self.reader if place in SPACED[spaced] else without for place in (START, SECTION, INSIDE)}
        self.size = 1 + max(self.reader.get_vocab().values(), default=-1)
        self.unk_id: int | None = self.reader.token_to_id(content["model"].get("unk_token") or "")
        self.bos_id = self.eos_id = None  # this file does not say which they are

    def encode(self, text: str, place: str) -> list[int]:
        return self.at[place].encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.reader.decode(ids, skip_special_tokens=False)

    def id_of(self, name: str) -> int | None:
        return self.reader.token_to_id(name)


def starts_with_special(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a control token in front of every text."""
    step = content.get("post_processor") or {}
    for part in step.get("processors", [step]):
        if part.get("type") == "TemplateProcessing":
            return "SpecialToken" in part["single"][0]
    return False


def spacing(content: dict[str, Any]) -> str:
    """Where a tokenizer.json puts a space in front of a text: a key of `SPACED`."""
    for step in steps(content):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        if step["type"] == "Prepend" or (step["type"] == "ByteLevel" and step.get("add_prefix_space")):
            return "always"
    return "never"


def without_space(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tokenizer.json that puts none."""
    copy = json.loads(json.dumps(content))
    for step in steps(copy):
        changes: dict[str, dict[str, Any]] = {
            "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
            "ByteLevel": {"add_prefix_space": False},
            "Prepend": {"prepend": ""},
        }
        step |= changes.get(step["type"], {})
    return copy


def steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What a tokenizer.json does to a text before it is cut into pieces, in order."""
    found: list[dict[str, Any]] = []
    for key, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = content.get(key) or {"type": parts, parts: []}
        found += step.get(parts, [step])
    return found


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
                if re.fullmatch(MARKER.encode(), model[start : start + size], re.DOTALL):
                    changed[end - 1] = CONTROL
        elif key & 7 == 0:
            _, end = read_varint(model, at)
        else:
            end = at + (8 if key & 7 == 1 else 4)
        at = end
    return bytes(changed)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf integer, seven bits a byte, lowest first, and where it ends."""
    value = 0
    for place in range(10):  # no integer has more
        value |= (data[at + place] & 0x7F) << 7 * place
        if data[at + place] < 0x80:
            return value, at + place + 1
    raise IndexError("an integer without an end")
