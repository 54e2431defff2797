"""Tests of the tokenizer backends, with tokenizers small enough that their output is known in advance.

The tests of tokenizer.json are skipped if the package `tokenizers`, which writes it, is not installed.
"""

import json
import sys

import pytest
import sentencepiece

from minidoctor.text.backends import (
    INSIDE,
    SECTION,
    START,
    AddedToken,
    SentencePieceBackend,
    markers_as_control,
    without_space,
)
from minidoctor.text.tokenizer import load_tokenizer

POSITIONS = (START, SECTION, INSIDE)
SPACE = "▁"  # a space in a piece of SentencePiece
LETTERS = "abcdefghijklmnopqrstuvwxyzA1"


@pytest.fixture
def model_file(tmp_path, train_sentencepiece):
    """A function that trains a SentencePiece model and returns its path."""

    def write(**settings):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(train_sentencepiece(**settings))
        return path

    return write


@pytest.fixture
def package():
    return pytest.importorskip("tokenizers")


@pytest.fixture
def load(tmp_path):
    """A function that saves a tokenizer.json and its settings and loads them."""

    def write_and_load(reader, **settings):
        content = reader if isinstance(reader, str) else reader.to_str()
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return load_tokenizer(tmp_path)

    return write_and_load


@pytest.fixture
def bytes_reader(package):
    """Byte-level BPE as in GPT-2, Qwen and Llama 3: an id for each byte, two merges, then the added tokens."""

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
    """BPE with byte fallback as in Llama 2 and Mistral, without merges; `scheme` decides where it prepends a space."""

    def make(scheme):
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *LETTERS]
        vocab = {name: i for i, name in enumerate(names)}
        model = package.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        reader = package.Tokenizer(model)
        replace = package.normalizers.Replace(" ", SPACE)
        if scheme == "Prepend":
            reader.normalizer = package.normalizers.Sequence([package.normalizers.Prepend(SPACE), replace])
        else:
            reader.pre_tokenizer = package.pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        decoders = [package.decoders.Replace(SPACE, " "), package.decoders.ByteFallback(), package.decoders.Fuse()]
        reader.decoder = package.decoders.Sequence(
            decoders if scheme == "never" else [*decoders, package.decoders.Strip(" ", 1, 0)]
        )
        reader.add_special_tokens(["<unk>", "<s>", "</s>"])
        return reader

    return make


def spelling(backend, text, position):
    """Return the pieces as one text, which does not depend on their boundaries."""
    return "".join(map(backend.processor.id_to_piece, backend.encode(text, position)))


# SentencePiece


@pytest.mark.parametrize(
    ("scheme", "positions"),
    [("always", (START, SECTION)), ("first", (START,)), ("never", ())],
)
@pytest.mark.parametrize("in_model", [True, False])
def test_sentencepiece_prepends_a_space_by_the_given_scheme(model_file, scheme, positions, in_model):
    backend = SentencePieceBackend(model_file(add_dummy_prefix=in_model), scheme, [])
    for position in POSITIONS:
        expected = SPACE + "gout" if position in positions else "gout"
        assert spelling(backend, "gout", position) == expected, position


@pytest.mark.parametrize(("in_model", "positions"), [(True, (START, SECTION)), (False, ())])
def test_sentencepiece_prepends_a_space_as_stored_without_a_scheme(model_file, in_model, positions):
    backend = SentencePieceBackend(model_file(add_dummy_prefix=in_model), None, [])
    for position in POSITIONS:
        expected = SPACE + "gout" if position in positions else "gout"
        assert spelling(backend, "gout", position) == expected, position


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("in_model", [True, False])
def test_decoding_removes_the_prepended_space_only(model_file, scheme, in_model):
    path = model_file(add_dummy_prefix=in_model, remove_extra_whitespaces=False)
    backend = SentencePieceBackend(path, scheme, [])
    for position in POSITIONS:
        for text in ("gout", " gout", "  gout", "gout "):
            assert backend.decode(backend.encode(text, position), position) == text, position


def test_an_added_word_is_one_token(model_file):
    path = model_file()
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    added = [AddedToken("HbA1c", size, True), AddedToken("HbA1c test", size + 1, True)]
    backend = SentencePieceBackend(path, "always", added)
    before, after = (backend.encode(text, START) for text in ("the", "is"))
    assert backend.encode("the HbA1c is", START)[: len(before)] == before
    assert backend.encode("HbA1c test", START) == [size + 1]  # the longer of two
    assert backend.encode("HbA1cHbA1c", INSIDE) == [size, size]
    assert backend.encode("HbA1cis", START) == [size, *after]  # the text after the word is a section
    assert backend.encode("isHbA1c", INSIDE)[0] != after[0]
    assert backend.size == size + 2


def test_an_added_special_token_is_not_matched_in_text(model_file):
    path = model_file()
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    added = [
        AddedToken("<|call|>", size, True),
        AddedToken("[TOOL]", size + 1, True),
        AddedToken("END", size + 2, False),
    ]
    backend = SentencePieceBackend(path, "always", added)
    for token in added:
        assert token.special
        ids = backend.encode(token.content, INSIDE)
        assert token.id not in ids
        assert backend.processor.decode(ids) == token.content


def test_displayed_tokens_are_special_if_they_look_like_markers():
    assert [AddedToken(name, 0, True).special for name in ("<|x|>", "[INST]", "<a\nb>")] == [True] * 3
    assert [AddedToken(name, 0, True).special for name in ("HbA1c", "<", "<>", "[]", "a<b>", "<b>a", "  ")] == [
        False
    ] * 7
    assert AddedToken("HbA1c", 0, False).special


def test_token_to_id_is_none_for_unknown_tokens(model_file):
    path = model_file()
    backend, processor = (
        SentencePieceBackend(path, None, []),
        sentencepiece.SentencePieceProcessor(model_file=str(path)),
    )
    assert backend.token_to_id("</s>") == processor.eos_id() == backend.eos_id
    assert backend.token_to_id("<unk>") == processor.unk_id() == backend.unk_id
    assert backend.token_to_id("no piece of it") is None
    assert backend.size == processor.vocab_size()


def test_missing_start_and_end_tokens_have_no_id(model_file):
    backend = SentencePieceBackend(model_file(bos_id=-1, eos_id=-1), None, [])
    assert (backend.bos_id, backend.eos_id) == (None, None)


def test_only_user_defined_markers_become_control_pieces(tmp_path, model_file):
    long = f"<|{'x' * 150}|>"  # lengths above 127 have two bytes
    markers, words = ["<eoh>", "[INST]", "<问>", long], ["gout", "a<b>"]
    path = model_file(user_defined_symbols=[*markers, *words], control_symbols=["<call>"])
    before = path.read_bytes()
    after = markers_as_control(before)
    old, changed = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (before, after))
    new_control = {i for i in range(old.vocab_size()) if changed.is_control(i) and not old.is_control(i)}
    assert new_control == {old.piece_to_id(marker) for marker in markers}
    assert [len(before), sum(a != b for a, b in zip(before, after, strict=True))] == [len(after), len(markers)]
    for text in markers:
        assert old.piece_to_id(text) in old.encode(text)
        assert old.piece_to_id(text) not in changed.encode(text)
    assert all(changed.piece_to_id(word) in changed.encode(word) for word in words)
    assert markers_as_control(after) == after


# Spaces of a tokenizer.json


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
def test_prepend_scheme_of_a_tokenizer_json(content, expected):
    before = json.dumps(content)
    changed, scheme = without_space(content)
    assert scheme == expected
    assert without_space(changed)[1] == "never" or "Prepend" in before
    assert json.dumps(content) == before  # changed in a copy only


def test_without_space_a_prepend_step_prepends_nothing():
    step = {"type": "Prepend", "prepend": SPACE}
    content = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, step]}}
    changed, _ = without_space(content)
    assert changed["normalizer"]["normalizers"] == [{"type": "NFC"}, {"type": "Prepend", "prepend": ""}]


# tokenizer.json


@pytest.mark.parametrize(
    ("scheme", "positions"),
    [("Prepend", (START, SECTION)), ("always", (START, SECTION)), ("first", (START,)), ("never", ())],
)
def test_json_backend_prepends_a_space_as_its_package_does(load, spaced_reader, scheme, positions):
    reader = spaced_reader(scheme)
    tokenizer = load(reader, bos_token="<s>", eos_token="</s>")
    for position in POSITIONS:
        tokens = [reader.id_to_token(i) for i in tokenizer.encode("go a", position)]
        assert tokens == [*([SPACE] if position in positions else []), "g", "o", SPACE, "a"], position
    assert tokenizer.encode("go a") == reader.encode("go a").ids
    after_special = reader.encode("</s>go a").ids
    assert after_special == [tokenizer.eos_ids[0], *tokenizer.encode("go a", SECTION)]


@pytest.mark.parametrize("scheme", ["Prepend", "always", "first", "never"])
def test_json_backend_decodes_the_text_that_it_encoded(load, spaced_reader, scheme):
    tokenizer = load(spaced_reader(scheme))
    for text in ("go", "a  b", "痛风 🩺\n\t\x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_bpe_prepends_a_space_outside_other_text(load, bytes_reader, prefix):
    reader = bytes_reader(add_prefix_space=prefix)
    tokenizer = load(reader)
    tokens = [reader.id_to_token(i) for i in tokenizer.encode("gout")]
    assert tokens == [*(["Ġ"] if prefix else []), "gou", "t"]
    assert [reader.id_to_token(i) for i in tokenizer.encode("gout", INSIDE)] == ["gou", "t"]


@pytest.mark.parametrize("text", ["</s>", "a</s>b<s>", "<think></think>", "[INST] END", " <|x|>\n"])
def test_json_backend_matches_no_special_token_in_text(load, bytes_reader, text):
    names = ["<s>", "</s>", "[INST]", "END"]
    reader = bytes_reader(special=names, words=["<think>", "</think>", "<|x|>"])
    tokenizer = load(reader, bos_token="<s>", eos_token="</s>")
    special = {reader.token_to_id(name) for name in [*names, "<think>", "</think>", "<|x|>"]}
    assert special & set(reader.encode(text).ids)  # the package would match them
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_token_that_is_also_a_piece_is_encoded_letter_by_letter(package, load):
    scores = [("<unk>", 0.0), ("</s>", 0.0), (SPACE, -1.0), *((letter, -2.0) for letter in "abs</>")]
    reader = package.Tokenizer(package.models.Unigram(scores, 0, False))
    reader.pre_tokenizer = package.pre_tokenizers.Metaspace(SPACE)
    reader.decoder = package.decoders.Metaspace(SPACE)
    reader.add_special_tokens(["<unk>", "</s>"])
    tokenizer = load(reader, eos_token="</s>")
    assert tokenizer.eos_ids == (1,)
    assert 1 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"


def test_added_words_of_a_tokenizer_json_keep_their_ids(load, bytes_reader):
    reader = bytes_reader(special=["<s>", "</s>"], words=["HbA1c", "  "])
    tokenizer = load(reader, bos_token="<s>", eos_token="</s>")
    text = "the HbA1c  is"
    assert {reader.token_to_id("HbA1c"), reader.token_to_id("  ")} < set(reader.encode(text).ids)
    assert tokenizer.encode(text) == reader.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == reader.get_vocab_size()


def test_an_added_word_without_special_tokens_is_one_token(load, bytes_reader):
    reader = bytes_reader(special=[], words=["HbA1c"])
    tokenizer = load(reader)
    assert tokenizer.encode("HbA1c") == [reader.token_to_id("HbA1c")]
    assert tokenizer.decode(tokenizer.encode("HbA1c")) == "HbA1c"


def test_markers_that_are_not_marked_as_special_are_special_but_displayed(load, bytes_reader):
    reader = bytes_reader(words=["<think>"])
    tokenizer = load(reader, eos_token="</s>")
    think, end = reader.token_to_id("<think>"), reader.token_to_id("</s>")
    assert tokenizer.special_tokens["<think>"] == think
    assert tokenizer.decode([*tokenizer.encode("a"), think, *tokenizer.encode("b"), end]) == "a<think>b"


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored(load, bytes_reader):
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
def test_template_of_a_tokenizer_json_decides_if_texts_start_with_bos(package, load, bytes_reader, template, starts):
    reader = bytes_reader()
    tokens = [(name, reader.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
    reader.post_processor = package.processors.TemplateProcessing(template, special_tokens=tokens)
    bos = reader.token_to_id("<s>")
    assert load(reader, bos_token="<s>", eos_token="</s>").start == ([bos] if starts else [])
    assert load(reader, bos_token="<s>", add_bos_token=not starts).start == ([] if starts else [bos])


def test_tokenizer_json_without_settings_has_no_start_and_end(load, bytes_reader):
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
def test_damaged_tokenizer_json_is_rejected(package, load, content):
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load(content)


@pytest.mark.parametrize("bad", [None, 5, {"id": "</s>", "ids": [7], "tokens": []}])
def test_damaged_post_processor_is_rejected_or_ignored(package, load, bytes_reader, bad):
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


def test_tokenizer_json_without_its_package_names_the_command(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer\.json .*pip install tokenizers"):
        load("{}")
