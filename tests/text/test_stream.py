"""Tests of streaming: TextStream is compared with decoding all tokens again for every new one."""

import random
import unicodedata

import pytest
from paths import FIXTURES

from minidoctor.text.backends import JsonBackend
from minidoctor.text.stream import CONTEXT, INCOMPLETE, TextStream, printable
from minidoctor.text.tokenizer import load_tokenizer

TEXT = "What is gout?\n痛风的关键检查是关节液中的尿酸。 鼻🩺 👩🏽\u200d⚕️ café  \ufffd!  "


class PlainStream:
    """The definition: decode all tokens, and return the characters that were not returned before."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text, self.n_sent = tokenizer, [], "", 0

    def push(self, token):
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids)
        complete = self.text.rstrip(INCOMPLETE)
        chunk, self.n_sent = complete[self.n_sent :], max(self.n_sent, len(complete))
        return chunk

    def rest(self):
        return self.text[self.n_sent :]


def byte_fallback_file(directory, scheme):
    """Save a tokenizer.json as in Llama 2: a character that is not in the vocabulary is encoded as its bytes."""
    package = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "痛", "风", "<think>"])}
    model = package.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    reader = package.Tokenizer(model)
    reader.pre_tokenizer = package.pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    decoders = package.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    reader.decoder = decoders.Sequence(steps)
    reader.add_special_tokens(["<unk>", "<s>", "</s>"])
    reader.add_tokens(["<think>"])
    reader.save(str(directory / "tokenizer.json"))


@pytest.fixture(params=["trained", "sentencepiece", "bpe", "always", "first"])
def tokenizers(request, tokenizer, tmp_path):
    """Tokenizers of both backends: SentencePiece twice, byte-level BPE, and BPE with byte fallback twice."""
    if request.param == "trained":
        return tokenizer
    if request.param == "sentencepiece":
        return load_tokenizer(FIXTURES / "tokenizers" / "sentencepiece")
    if request.param == "bpe":
        pytest.importorskip("tokenizers")
        return load_tokenizer(FIXTURES / "tokenizers" / "bpe")
    byte_fallback_file(tmp_path, request.param)
    return load_tokenizer(tmp_path)


def assert_same_chunks(tokenizer, ids):
    stream, plain = TextStream(tokenizer), PlainStream(tokenizer)
    for token in ids:
        assert stream.push(token) == plain.push(token)
        assert stream.incomplete == plain.text.endswith(INCOMPLETE)
    assert stream.rest() == plain.rest()


def test_stream_equals_decoding_all_tokens_of_random_texts(tokenizers):
    draw = random.Random(0)
    for _ in range(20):
        text = "".join(draw.choices(TEXT, k=draw.randrange(120)))
        assert_same_chunks(tokenizers, tokenizers.encode(text))


@pytest.mark.parametrize("share_of_bytes", [0.0, 0.2, 0.7])
def test_stream_equals_decoding_all_random_tokens(tokenizers, share_of_bytes):
    draw = random.Random(0)
    bytes_ids = sorted(i for i in tokenizers.byte_ids if i is not None) or [5]
    for _ in range(30):
        ids = [
            draw.choice(bytes_ids) if draw.random() < share_of_bytes else draw.randrange(tokenizers.vocab_size + 3)
            for _ in range(120)
        ]
        assert_same_chunks(tokenizers, ids)


def test_stream_equals_decoding_around_spaces_and_special_tokens(tokenizers):
    draw = random.Random(0)
    spaces = [i for i in range(tokenizers.vocab_size) if tokenizers.decode([i]).strip(" ") == ""]
    letters = tokenizers.encode("gout a\nb")
    for _ in range(10):
        run = draw.choices(spaces, k=2 * CONTEXT + draw.randrange(CONTEXT))
        assert_same_chunks(tokenizers, run + letters + run + draw.choices([*spaces, *letters], k=100))


def test_stream_equals_decoding_where_a_late_byte_makes_a_long_sequence_invalid(tokenizers):
    ids = tokenizers.encode("🩺" * CONTEXT)  # 4 bytes each: every CONTEXT tokens end with a character
    for byte in (0x0A, 0xFF):
        byte_id = tokenizers.backend.token_to_id(f"<0x{byte:02X}>")
        assert_same_chunks(tokenizers, [*ids, *([] if byte_id is None else [byte_id]), *tokenizers.encode("gout")])


def test_stream_equals_decoding_where_text_depends_on_far_tokens(tmp_path):
    package = pytest.importorskip("tokenizers")
    reader = package.Tokenizer(package.models.WordLevel({"a": 0, "b": 1, "▁c": 9}, unk_token="b"))
    replaced = [package.decoders.Replace(*rule) for rule in ((package.Regex("aa"), "é"), ("▁", " "))]
    reader.decoder = package.decoders.Sequence([package.decoders.Fuse(), *replaced, package.decoders.Strip(" ", 1, 0)])
    reader.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([9, 1, 0, 0, 0, 9]) == "cbéa c"
    assert_same_chunks(tokenizer, [1] + [0] * 8 * CONTEXT)  # pairs
    assert_same_chunks(tokenizer, [1] + [5] * 4 * CONTEXT + [9])  # a space after ids that are not in the vocabulary


def sequences(tokenizer):
    """Token sequences by kind, whose text is complete rarely or never, except that of "text"."""
    rare, invalid = tokenizer.encode("龘鼻🩺"), tokenizer.backend.token_to_id("<0xFF>")
    hidden = [i for i in tokenizer.names if i not in tokenizer.displayed]
    return {
        "text": tokenizer.encode("gout is a 痛风 "),
        "characters of several tokens": rare,
        "beginnings of characters": tokenizer.encode("龘")[:-1],
        "replacement characters": tokenizer.encode(INCOMPLETE),
        "invalid bytes": rare[:1] if invalid is None else [invalid],
        "special tokens": [*hidden, tokenizer.vocab_size],
    }


def test_stream_equals_decoding_sequences_of_incomplete_characters(tokenizers):
    draw, kinds = random.Random(0), list(sequences(tokenizers).values())
    for _ in range(30):
        runs = [draw.choice(kinds) * draw.randrange(1, 2 * CONTEXT) for _ in range(4)]
        assert_same_chunks(tokenizers, [i for run in runs for i in run[: draw.randrange(4 * CONTEXT)]])


def test_stream_returns_all_text_in_the_end(tokenizers):
    for run in sequences(tokenizers).values():
        stream, ids = TextStream(tokenizers), 8 * CONTEXT * run
        assert "".join(map(stream.push, ids)) + stream.rest() == tokenizers.decode(ids)


def test_each_push_decodes_a_bounded_number_of_tokens(tokenizers, monkeypatch):
    lengths, decode, runs = [], tokenizers.decode, sequences(tokenizers)
    monkeypatch.setattr(tokenizers, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    if isinstance(tokenizers.backend, JsonBackend) and None not in tokenizers.byte_ids:
        del runs["invalid bytes"]  # byte fallback of a tokenizer.json decodes adjacent bytes together
    for kind, run in runs.items():
        stream, lengths[:] = TextStream(tokenizers), []
        for token in 20 * CONTEXT * run:
            stream.push(token)
        assert (0 if kind == "special tokens" else CONTEXT) <= max(lengths) <= 4 * CONTEXT, kind


@pytest.mark.parametrize(
    "text", ["What is the key test for gout?", "痛风的关键检查是什么？", "🩺👩🏽\u200d⚕️, \u00e9 and e\u0301"]
)
def test_stream_returns_characters_as_soon_as_they_are_complete(tokenizer, text):
    stream, ids, streamed = TextStream(tokenizer), tokenizer.encode(text), ""
    for i, token in enumerate(ids):
        streamed += stream.push(token)
        assert streamed == tokenizer.decode(ids[: i + 1]).rstrip(INCOMPLETE)
    assert (streamed, stream.rest()) == (text, "")


def test_stream_joins_the_bytes_of_a_character(tokenizer):
    ids = tokenizer.encode("鼻🩺")  # neither character is in the vocabulary
    assert len(ids) >= 3 + 4
    stream = TextStream(tokenizer)
    assert [chunk for chunk in map(stream.push, ids) if chunk] == ["鼻", "🩺"]


def test_rest_has_a_replacement_character_for_each_byte(tokenizer):
    stream, ids = TextStream(tokenizer), tokenizer.encode("ok 🩺")[:-1]
    assert "".join(map(stream.push, ids)) == "ok "
    assert stream.rest() == "\ufffd" * 3


def test_printable_escapes_control_sequences():
    assert printable("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert printable("\x07\r\x7f\x9b") == "\\x07\\r\\x7f\\x9b"
    assert printable("gout \u202e evil") == "gout \\u202e evil"
    assert printable("痛风 🩺\n\tcafé") == "痛风 🩺\n\tcafé"


def test_printable_escapes_exactly_controls_separators_surrogates_and_bidi_overrides():
    reversing = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    for code in range(0x110000):
        char = chr(code)
        category, bidirectional = unicodedata.category(char), unicodedata.bidirectional(char)
        unsafe = category in ("Cc", "Cs", "Zl", "Zp") or bidirectional in reversing
        assert (printable(char) != char) == (unsafe and char not in "\n\t"), hex(code)
