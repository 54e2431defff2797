"""Tokenizer backends: text as ids of a `tokenizer.model` (SentencePiece) or a `tokenizer.json`, and back.

Special tokens are never matched in text: `"</s>"` is encoded as these four characters. tokenizer.py places special
tokens by id.
"""

import copy
import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from minidoctor.config import UserError, check
from minidoctor.files.json_files import read_bytes, read_object

CONTROL, USER_DEFINED = b"\3", b"\4"  # types of a piece in sentencepiece_model.proto
ADD_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3])  # protobuf: normalizer_spec (field 3), add_dummy_prefix (field 3)
TIKTOKEN = rb"[A-Za-z0-9+/]+=* \d+\s"  # its first line: a token in base64 and its rank
MARKER = r"<.+>|\[.+\]"  # tokens like these are treated as special, regardless of their type
# The position of a text decides if a space is prepended to it: at the very start, after a special token, or after
# other text. The three schemes are those of Metaspace in the package `tokenizers`.
START, SECTION, INSIDE = "start", "section", "inside"
PREPEND_SCHEMES: dict[str, tuple[str, ...]] = {"always": (START, SECTION), "first": (START,), "never": ()}
# How to turn the prepended space off in the steps of a tokenizer.json that can add one.
WITHOUT_SPACE: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
    "Prepend": {"prepend": ""},
}


class AddedToken(NamedTuple):
    """A special token, or a word that was added to the vocabulary later."""

    content: str
    id: int
    displayed: bool  # False: decoded to nothing

    @property
    def special(self) -> bool:
        return not self.displayed or bool(re.fullmatch(MARKER, self.content, re.DOTALL))


def match_any(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for `re.split` that keeps the names, the longest where several match."""
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")


class SentencePieceBackend:
    """A `tokenizer.model`, with the words that were added to its vocabulary."""

    starts_with_bos = True

    def __init__(self, path: Path, scheme: str | None, added: list[AddedToken]):
        try:
            model = markers_as_control(read_bytes(path))
            # Of two values of a protobuf field the last counts, so appended bytes override the stored value.
            self.processor, with_space, without = (
                sentencepiece.SentencePieceProcessor(model_proto=model + override)
                for override in (b"", ADD_DUMMY_PREFIX + b"\1", ADD_DUMMY_PREFIX + b"\0")
            )
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from None
        if scheme is None:  # as stored in the model
            scheme = "never" if self.processor.encode("a") == without.encode("a") else "always"
        self.at = {p: with_space if p in PREPEND_SCHEMES[scheme] else without for p in (START, SECTION, INSIDE)}
        self.n_pieces: int = self.processor.vocab_size()
        self.unk_id: int | None = self.processor.unk_id()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self.processor.bos_id(), self.processor.eos_id()))
        control = filter(self.processor.is_control, range(self.n_pieces))
        self.added = [AddedToken(self.processor.id_to_piece(i), i, displayed=False) for i in control] + added
        self.words = {token.content: token.id for token in added if not token.special}
        self.word = match_any(self.words)
        self.size = max([self.n_pieces, *(i + 1 for i in self.words.values())])

    def encode(self, text: str, position: str) -> list[int]:
        if not self.words:
            return self.at[position].encode(text)
        ids: list[int] = []
        for i, part in enumerate(self.word.split(text)):
            ids += [self.words[part]] if i % 2 else self.at[SECTION if i else position].encode(part)
        return ids

    def decode(self, ids: list[int], position: str = START) -> str:
        return self.at[position].decode([i for i in ids if i < self.n_pieces])

    def token_to_id(self, token: str) -> int | None:
        i = self.processor.piece_to_id(token)
        return None if i == self.unk_id and token != self.processor.id_to_piece(i) else i


class JsonBackend:
    """A `tokenizer.json`, read by the optional package `tokenizers`, which also encodes and decodes added words."""

    bos_id = eos_id = None  # stored in tokenizer_config.json only

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise UserError(f"{path} needs one more package: pip install tokenizers") from None
        content, self.words = read_object(path), dict[str, int]()
        try:
            tokens = content.get("added_tokens") or []
            self.added = [AddedToken(token["content"], token["id"], not token["special"]) for token in tokens]
            # Marked as special, tokens are not matched in text. Removed from the list, they would change other ids.
            content["added_tokens"] = [t | {"special": a.special} for t, a in zip(tokens, self.added, strict=True)]
            self.starts_with_bos = starts_with_special(content)
            # Truncation, padding and templates are for batches of texts.
            content |= {"truncation": None, "padding": None, "post_processor": None}
            content_without, scheme = without_space(content)
            self.reader = Reader.from_str(json.dumps(content))
            without = self.reader if scheme == "never" else Reader.from_str(json.dumps(content_without))
            self.at = {p: self.reader if p in PREPEND_SCHEMES[scheme] else without for p in (START, SECTION, INSIDE)}
            self.reader.encode_special_tokens = without.encode_special_tokens = True
            self.reader.encode("a")  # some damage shows only here
            self.size = 1 + max(self.reader.get_vocab().values(), default=-1)
            self.unk_id: int | None = self.reader.token_to_id(content["model"].get("unk_token") or "")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises plain Exception, and panics that are not even that
            raise UserError(f"{path}: not a tokenizer ({error!s:.200})") from None

    def encode(self, text: str, position: str) -> list[int]:
        return self.at[position].encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], position: str = START) -> str:
        return self.reader.decode(ids, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self.reader.token_to_id(token)


Backend = SentencePieceBackend | JsonBackend


def load_backend(directory: Path, scheme: str | None, added: list[AddedToken]) -> tuple[Backend, str]:
    """Return the backend and a note about its file: tokenizer.model if possible, because it needs no other package.

    `scheme` and the added tokens are for tokenizer.model, which does not contain them.
    """
    model, content = directory / "tokenizer.model", directory / "tokenizer.json"
    has_model, has_content = os.path.lexists(model), os.path.lexists(content)
    if not has_model and not has_content:
        raise FileNotFoundError(f"{directory}: no tokenizer.model or tokenizer.json here")
    note = ""
    if has_model and re.match(TIKTOKEN, read_bytes(model)):
        check(has_content, f"{model}: a tiktoken vocabulary, which can be read from a tokenizer.json only")
        has_model, note = False, f" ({model.name} is a tiktoken vocabulary)"
    if not has_model:
        return JsonBackend(content), content.name + note
    if has_content:
        _, scheme = without_space(read_object(content))  # other programs take the spaces from this file
        note = f" (not {content.name}, which needs one more package)"
    return SentencePieceBackend(model, scheme, added), model.name + note


def starts_with_special(content: dict[str, Any]) -> bool:
    """Return True if a tokenizer.json prepends a special token to every text."""
    step = content.get("post_processor") or {}
    templates = [s["single"] for s in step.get("processors", [step]) if s.get("type") == "TemplateProcessing"]
    return bool(templates) and "SpecialToken" in templates[0][0]


def without_space(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return a copy of a tokenizer.json that prepends no space, and the prepend scheme of the original."""
    content, scheme = dict(content), "never"
    for key, sequence in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        content[key] = copy.deepcopy(content.get(key))
        parent = content[key] or {sequence: []}
        for step in parent.get(sequence, [parent]):
            if step["type"] in WITHOUT_SPACE and scheme == "never":
                adds_space = step.get("add_prefix_space", step["type"] != "ByteLevel")
                scheme = step.get("prepend_scheme") or ("always" if adds_space else "never")
            step |= WITHOUT_SPACE.get(step["type"], {})
    return content, scheme


def markers_as_control(model: bytes) -> bytes:
    """Return a SentencePiece model with user-defined pieces like "<eoh>" or "[INST]" changed to control pieces.

    SentencePiece matches user-defined pieces anywhere in a text, and control pieces never. In the protobuf message of
    the model, field 1 repeats {1: piece, 2: score, 3: type}. Only the last byte of a type is changed.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if re.fullmatch(MARKER, piece, re.DOTALL):
            fields = b"\x0a" + varint(len(piece.encode())) + piece.encode()
            fields += b"\x15" + struct.pack("<f", processor.get_score(i)) + b"\x18"
            message = b"\x0a" + varint(len(fields) + 1) + fields
            model = model.replace(message + USER_DEFINED, message + CONTROL, 1)
    return model


def varint(n: int) -> bytes:
    """Return a protobuf integer below 2**14: 7 bits per byte, the lowest first."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])
