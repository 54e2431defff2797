"""Tokenizers are made here, small enough that what comes out can be said in advance.

tokenizer.json is written by the package `tokenizers`; where that is missing these tests are skipped.
"""

import json
import sys

import pytest
import sentencepiece

from minidoctor.text.backends import (
    CONTROL,
    INSIDE,
    SECTION,
    START,
    USER_DEFINED,
    Added,
    SentencePieces,
    markers_as_control,
    read_varint,
    spacing,
    steps,
    without_space,
)
from minidoctor.text.tokenizer import load_tokenizer

PLACES = (START, SECTION, INSIDE)
SPACE = "▁"  # how a piece of SentencePiece writes it
LETTERS = "abcdefghijklmnopqrstuvwxyzA1"


@pytest.fixture
def model_file(tmp_path, make_tokenizer):
    """Writes a SentencePiece model as its library trains it."""

    def write(**settings):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(make_tokenizer(**settings).pieces.processor.serialized_model_proto())
        return path

    return write


@pytest.fixture
def package():
    return pytest.importorskip("tokenizers")


@pytest.fixture
def load(tmp_path):
    """A checkpoint's directory with a tokenizer.json and its settings, loaded."""

    def write_and_load(reader, **settings):
        content = reader if isinstance(reader, str) else reader.to_str()
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return load_tokenizer(tmp_path)

    return write_and_load


@pytest.fixture
def bytes_reader(package):
    """Byte-level BPE as GPT-2, Qwen and Llama 3 have it: an id for each byte, two merges, then what is added."""

    def make(special=("<s>", "</s>"), words=(), **settings):
        alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
        vocab = {piece: i for i, piece in enumerate([*alphabet, "go", "gou"])}
        reader = package.Tokenizer(package.models.BPE(vocab=vocab, merges=[("g", "o"), ("go", "u")]))
        reader.pre_tokenizer = package.pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | settings)
        reader.decoder = package.decoders.ByteLevel()
        reader.add_special_tokens(list(special))
        reader.add_tokens(list(words))
        return reader

    return make


@pytest.fixture
def spaced_reader(package):
    """BPE with byte fallback as Llama 2 and Mistral have it, without merges; `way` is how it puts the first space."""

    def make(way):
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *LETTERS]
        vocab = {name: i for i, name in enumerate(names)}
        model = package.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        reader = package.Tokenizer(model)
        replace = package.normalizers.Replace(" ", SPACE)
        if way == "Prepend":
            reader.normalizer = package.normalizers.Sequence([package.normalizers.Prepend(SPACE), replace])
        else:
            reader.pre_tokenizer = package.pre_tokenizers.Metaspace(SPACE, prepend_scheme=way, split=False)
        decoders = [package.decoders.Replace(SPACE, " "), package.decoders.ByteFallback(), package.decoders.Fuse()]
        reader.decoder = package.decoders.Sequence(
            decoders if way == "never" else [*decoders, package.decoders.Strip(" ", 1, 0)]
        )
        reader.add_special_tokens(["<unk>", "<s>", "</s>"])
        return reader

    return make


def spelling(pieces, text, place):
    """The pieces as one text, which does not depend on where they were cut."""
    return "".join(map(pieces.processor.id_to_piece, pieces.encode(text, place)))


# SentencePiece


@pytest.mark.parametrize(
    ("spaced", "places"),
    [("always", (START, SECTION)), ("first", (START,)), ("never", ())],
)
@pytest.mark.parametrize("in_model", [True, False])
def test_a_space_is_put_in_front_where_the_checkpoint_says(model_file, spaced, places, in_model):
    pieces = SentencePieces(model_file(add_dummy_prefix=in_model), spaced, [])
    for place in PLACES:
        assert spelling(pieces, "gout", place) == (SPACE + "gout" if place in places else "gout"), place


@pytest.mark.parametrize(("in_model", "places"), [(True, (START, SECTION)), (False, ())])
def test_without_a_setting_the_model_itself_says_where_a_space_is_put(model_file, in_model, places):
    pieces = SentencePieces(model_file(add_dummy_prefix=in_model), None, [])
    for place in PLACES:
        assert spelling(pieces, "gout", place) == (SPACE + "gout" if place in places else "gout"), place


@pytest.mark.parametrize("spaced", ["always", "first", "never"])
@pytest.mark.parametrize("in_model", [True, False])
def test_a_space_that_was_typed_is_kept_and_one_that_was_put_is_not(model_file, spaced, in_model):
    path = model_file(add_dummy_prefix=in_model, remove_extra_whitespaces=False)
    pieces = SentencePieces(path, spaced, [])
    for text in ("gout", " gout", "  gout", "gout "):
        assert pieces.decode(pieces.encode(text, START)) == text


def test_an_added_word_is_one_token_and_decodes_to_itself(model_file):
    path = model_file()
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    pieces = SentencePieces(path, "always", [Added("HbA1c", size, False), Added("HbA1c test", size + 1, False)])
    before, after = (pieces.encode(text, START) for text in ("the", "is"))
    assert pieces.encode("the HbA1c is", START)[: len(before)] == before
    assert pieces.encode("HbA1c test", START) == [size + 1]  # the longer of two
    assert pieces.encode("HbA1cHbA1c", INSIDE) == [size, size]
    assert pieces.encode("HbA1cis", START) == [size, *after]  # a section of its own after the word
    assert pieces.encode("isHbA1c", INSIDE)[0] != after[0]
    assert pieces.decode([size]) == "HbA1c"


@pytest.mark.parametrize("spaced", ["always", "first", "never"])
def test_the_spaces_around_an_added_word_come_back(model_file, spaced):
    path = model_file(remove_extra_whitespaces=False)
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    pieces = SentencePieces(path, spaced, [Added("HbA1c", size, False)])
    for text in ("HbA1c", " HbA1c ", "the HbA1c is", "theHbA1cis", "the  HbA1c\nis"):
        assert pieces.decode(pieces.encode(text, START)) == text


def test_an_added_control_token_is_not_found_in_text(model_file):
    path = model_file()
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    added = [Added("<|call|>", size, False), Added("[TOOL]", size + 1, False), Added("END", size + 2, True)]
    pieces = SentencePieces(path, "always", added)
    for token in added:
        assert token.control
        ids = pieces.encode(token.name, INSIDE)
        assert token.id not in ids
        assert pieces.processor.decode(ids) == token.name


def test_only_what_looks_like_a_marker_is_a_control_token_by_its_name():
    assert [Added(name, 0, False).control for name in ("<|x|>", "[INST]", "<a\nb>")] == [True] * 3
    assert [Added(name, 0, False).control for name in ("HbA1c", "<", "<>", "[]", "a<b>", "<b>a", "  ")] == [False] * 7
    assert Added("HbA1c", 0, True).control


def test_ids_of_names_and_of_no_name(model_file):
    path = model_file()
    pieces, processor = SentencePieces(path, None, []), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert pieces.id_of("</s>") == processor.eos_id() == pieces.eos_id
    assert pieces.id_of("<unk>") == processor.unk_id() == pieces.unk_id
    assert pieces.id_of("no piece of it") is None
    assert pieces.size == processor.vocab_size()


def test_no_id_for_a_start_or_end_that_the_model_has_not(model_file):
    pieces = SentencePieces(model_file(bos_id=-1, eos_id=-1), None, [])
    assert (pieces.bos_id, pieces.eos_id) == (None, None)


def piece_message(text, kind):
    """{1: text, 2: score 0, 3: type} as field 1 of a SentencePiece model; the usual type is not written."""
    body = bytes([1 << 3 | 2, len(text)]) + text + bytes([2 << 3 | 5, 0, 0, 0, 0])
    body += bytes([3 << 3, kind]) if kind else b""
    return bytes([1 << 3 | 2, len(body)]) + body


def test_markers_that_an_author_defined_become_control_pieces_and_nothing_else_changes():
    def model(marker_kind):
        pieces = [("<eoh>", marker_kind), ("[INST]", marker_kind), ("<问>".encode(), marker_kind)]
        pieces += [("gout", USER_DEFINED), ("<s>", CONTROL), ("<x>", None), ("<0x0A>", 6), ("a<b>", USER_DEFINED)]
        messages = [piece_message(t if isinstance(t, bytes) else t.encode(), kind) for t, kind in pieces]
        # A trainer's settings with the same bytes in them, a varint, 8 bytes and 4: not pieces.
        other = piece_message(b"<eoh>", USER_DEFINED)
        return (
            b"".join(messages)
            + bytes([2 << 3 | 2, len(other)])
            + other
            + bytes([10 << 3, 0x96, 1])
            + (bytes([11 << 3 | 1, *range(8)]) + bytes([12 << 3 | 5, *range(4)]))
        )

    assert markers_as_control(model(USER_DEFINED)) == model(CONTROL)
    assert markers_as_control(model(CONTROL)) == model(CONTROL)


def test_a_varint_holds_seven_bits_a_byte_lowest_first():
    assert read_varint(bytes([0]), 0) == (0, 1)
    assert read_varint(bytes([0x7F, 9]), 0) == (127, 1)
    assert read_varint(bytes([9, 0x96, 0x01]), 1) == (0x16 + (1 << 7), 3)
    with pytest.raises(IndexError):
        read_varint(bytes([0x80]), 0)


# What a tokenizer.json says about spaces


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "never"),
        ({"normalizer": None, "pre_tokenizer": None}, "never"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first"}}, "first"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never"}}, "never"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always"}}, "always"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}}, "always"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": False}}, "never"),
        ({"normalizer": {"type": "Prepend", "prepend": SPACE}}, "always"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": SPACE}],
                }
            },
            "always",
        ),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "always"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}, "never"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": True}],
                }
            },
            "always",
        ),
    ],
)
def test_where_a_tokenizer_json_puts_a_space(content, expected):
    before = json.dumps(content)
    assert spacing(content) == expected
    assert spacing(without_space(content)) == "never" or "Prepend" in before
    assert json.dumps(content) == before  # it was a copy


def test_without_its_space_a_prepending_step_prepends_nothing():
    step = {"type": "Prepend", "prepend": SPACE}
    content = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, step]}}
    assert steps(without_space(content)) == [{"type": "NFC"}, {"type": "Prepend", "prepend": ""}]


# tokenizer.json


@pytest.mark.parametrize(
    ("way", "places"),
    [("Prepend", (START, SECTION)), ("always", (START, SECTION)), ("first", (START,)), ("never", ())],
)
def test_a_tokenizer_json_puts_its_space_where_its_package_does(load, spaced_reader, way, places):
    reader = spaced_reader(way)
    tokenizer = load(reader, bos_token="<s>", eos_token="</s>")
    for place in PLACES:
        tokens = [reader.id_to_token(i) for i in tokenizer.encode("go a", place)]
        assert tokens == [*([SPACE] if place in places else []), "g", "o", SPACE, "a"], place
    assert tokenizer.encode("go a") == reader.encode("go a").ids
    after_control = reader.encode("</s>go a").ids
    assert after_control == [tokenizer.eos_ids[0], *tokenizer.encode("go a", SECTION)]


@pytest.mark.parametrize("way", ["Prepend", "always", "first", "never"])
def test_a_text_of_a_spacing_tokenizer_json_comes_back(load, spaced_reader, way):
    tokenizer = load(spaced_reader(way))
    for text in ("go", "a  b", "痛风 🩺\n\t\x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_pieces_with_and_without_a_space_in_front(load, bytes_reader, prefix):
    reader = bytes_reader(add_prefix_space=prefix)
    tokenizer = load(reader)
    tokens = [reader.id_to_token(i) for i in tokenizer.encode("gout")]
    assert tokens == [*(["Ġ"] if prefix else []), "gou", "t"]
    assert [reader.id_to_token(i) for i in tokenizer.encode("gout", INSIDE)] == ["gou", "t"]


@pytest.mark.parametrize("text", ["</s>", "a</s>b<s>", "<think></think>", "[INST] END", " <|x|>\n"])
def test_text_never_becomes_a_control_token(load, bytes_reader, text):
    names = ["<s>", "</s>", "[INST]", "END"]
    reader = bytes_reader(special=names, words=["<think>", "</think>", "<|x|>"])
    tokenizer = load(reader, bos_token="<s>", eos_token="</s>")
    controls = {reader.token_to_id(name) for name in [*names, "<think>", "</think>", "<|x|>"]}
    assert controls & set(reader.encode(text).ids)  # the package itself would find them
    ids = tokenizer.encode(text)
    assert not controls & set(ids)
    assert tokenizer.decode(ids) == text


def test_a_control_token_that_is_a_piece_of_text_too_is_spelled(package, load):
    scores = [("<unk>", 0.0), ("</s>", 0.0), (SPACE, -1.0), *((letter, -2.0) for letter in "abs</>")]
    reader = package.Tokenizer(package.models.Unigram(scores, 0, False))
    reader.pre_tokenizer = package.pre_tokenizers.Metaspace(SPACE)
    reader.decoder = package.decoders.Metaspace(SPACE)
    reader.add_special_tokens(["<unk>", "</s>"])
    tokenizer = load(reader, eos_token="</s>")
    assert tokenizer.eos_ids == (1,)
    assert 1 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"


def test_an_added_word_of_a_tokenizer_json_keeps_its_id(load, bytes_reader):
    reader = bytes_reader(special=["<s>", "</s>"], words=["HbA1c", "  "])
    tokenizer = load(reader, bos_token="<s>", eos_token="</s>")
    text = "the HbA1c  is"
    assert {reader.token_to_id("HbA1c"), reader.token_to_id("  ")} < set(reader.encode(text).ids)
    assert tokenizer.encode(text) == reader.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == reader.get_vocab_size()


def test_an_added_word_without_control_tokens_is_one_token(load, bytes_reader):
    reader = bytes_reader(special=[], words=["HbA1c"])
    tokenizer = load(reader)
    assert tokenizer.encode("HbA1c") == [reader.token_to_id("HbA1c")]
    assert tokenizer.decode(tokenizer.encode("HbA1c")) == "HbA1c"


def test_marks_that_are_not_special_are_control_tokens_that_are_shown(load, bytes_reader):
    reader = bytes_reader(words=["<think>"])
    tokenizer = load(reader, eos_token="</s>")
    think, end = reader.token_to_id("<think>"), reader.token_to_id("</s>")
    assert tokenizer.controls["<think>"] == think
    assert tokenizer.decode([*tokenizer.encode("a"), think, *tokenizer.encode("b"), end]) == "a<think>b"


def test_how_a_tokenizer_json_cuts_and_fills_a_batch_is_not_how_a_text_is_encoded(load, bytes_reader):
    reader = bytes_reader()
    expected = reader.encode("gout").ids
    reader.enable_truncation(1)
    assert load(reader).encode("gout") == expected
    reader.no_truncation()
    reader.enable_padding(length=8)
    tokenizer = load(reader, bos_token="<s>")
    assert tokenizer.encode("gout") == expected
    assert tokenizer.start == []


@pytest.mark.parametrize(
    ("template", "starts"), [("<s> $A", True), ("<s> $A </s>", True), ("$A", False), ("$A </s>", False)]
)
def test_a_tokenizer_json_that_starts_texts_with_bos_says_so(package, load, bytes_reader, template, starts):
    reader = bytes_reader()
    tokens = [(name, reader.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
    reader.post_processor = package.processors.TemplateProcessing(template, special_tokens=tokens)
    bos = reader.token_to_id("<s>")
    assert load(reader, bos_token="<s>", eos_token="</s>").start == ([bos] if starts else [])
    assert load(reader, bos_token="<s>", add_bos_token=not starts).start == ([] if starts else [bos])


def test_a_tokenizer_json_alone_knows_no_start_and_no_end(load, bytes_reader):
    tokenizer = load(bytes_reader())
    assert (tokenizer.bos_id, tokenizer.start, tokenizer.eos_ids) == (None, [], ())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "5",
        "[]",
        "null",
        "{}",
        '{"model": 5}',
        '{"added_tokens": 5, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"added_tokens": [5], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"added_tokens": [{"content": "a"}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"normalizer": 5, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "no such model"}}',
        "[" * 100_000,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_a_damaged_tokenizer_json_is_refused(package, load, content):
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load(content)


@pytest.mark.parametrize("bad", [None, 5, {"id": "</s>", "ids": [7], "tokens": []}])
def test_a_damaged_post_processor_is_refused_or_of_no_use(package, load, bytes_reader, bad):
    reader = bytes_reader()
    token = ("</s>", reader.token_to_id("</s>"))
    reader.post_processor = package.processors.TemplateProcessing("$A </s>", special_tokens=[token])
    content = json.loads(reader.to_str())
    content["post_processor"]["special_tokens"] = {} if bad is None else {"</s>": bad}
    try:
        tokenizer = load(json.dumps(content))
    except ValueError:
        return
    assert tokenizer.encode("gout") == reader.encode("gout", add_special_tokens=False).ids


def test_a_tokenizer_json_without_the_package_says_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer\.json needs one more package: pip install tokenizers"):
        load("{}")
