"""Tests of the JSON files next to a vocabulary: special tokens, spaces and the chat format."""

import contextlib
import json
import random
import re

import pytest
from paths import FIXTURES

from minidoctor.config import UserError
from minidoctor.text.backends import INSIDE, SECTION, START
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import load_tokenizer

TOKENIZER_FIXTURES = FIXTURES / "tokenizers"
MARKERS = sorted(
    {name for form in CHAT_FORMATS.values() for name in form.needs if not name.startswith("{")}
    | {"<reserved_106>", "<reserved_107>"}
)


@pytest.fixture(scope="session")
def model(make_tokenizer):
    """A SentencePiece model with the special tokens of every format."""
    return make_tokenizer(control_symbols=MARKERS).backend.processor


@pytest.fixture
def load(tmp_path, model):
    """A function that saves a tokenizer.model and JSON files by name and loads them."""

    def write_and_load(chat_format="auto", model=model, thinking=False, **files):
        (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        return load_tokenizer(tmp_path, chat_format, thinking)

    return write_and_load


BAICHUAN = {"user_token_id": 5, "assistant_token_id": 6}
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "gout?"},
    {"role": "assistant", "content": "uric acid"},
    {"role": "user", "content": "哮喘？"},
    {"role": "assistant", "content": "wheezing"},
]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_only_answers_and_the_last_end_token_are_trained_in_every_format(load, name):
    tokenizer = load(name, generation_config=BAICHUAN)
    trained = [ids for ids, assistant in tokenizer.chat_turns(CONVERSATION) if assistant and ids]
    assert trained[-1] == [tokenizer.eos_ids[0]]
    answers = [tokenizer.decode(ids).strip() for ids in trained if ids != trained[-1]]
    assert answers == ["uric acid", "wheezing"]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_prompt_is_a_prefix_of_the_answered_chat(load, name):
    tokenizer = load(name, generation_config=BAICHUAN)
    prompt, whole = tokenizer.chat(CONVERSATION[:4]), tokenizer.chat(CONVERSATION)
    assert whole[: len(prompt)] == prompt
    trained = [i for ids, assistant in tokenizer.chat_turns(CONVERSATION) for i in ([assistant] * len(ids))]
    assert trained.index(True) > 0
    assert not any(assistant for _, assistant in tokenizer.chat_turns(CONVERSATION[:2]))
    assert True not in trained[len(tokenizer.chat(CONVERSATION[:3])) : len(prompt)]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_special_tokens_in_a_message_do_not_change_those_of_the_chat(load, name, role):
    tokenizer = load(name, generation_config=BAICHUAN)
    special = {i for name, i in tokenizer.special_tokens.items() if name != "<unk>"}
    typed = "".join(MARKERS) + "<s></s>{user}{assistant}{bos}{eos}"

    def special_and_text(content):
        messages = [m | {"content": content} if m["role"] == role else m for m in CONVERSATION]
        ids = tokenizer.chat(messages)
        return [i for i in ids if i in special], tokenizer.decode(ids)

    ids, text = special_and_text(typed)
    assert ids == special_and_text("x")[0]
    assert typed in text


def test_thinking_decides_whether_qwen3_reasons(load):
    settings = {"chat_template": "<|im_start|> enable_thinking"}
    off, on = (load(tokenizer_config=settings, thinking=thinking) for thinking in (False, True))
    newlines, (begin, end) = off.encode("\n\n", SECTION), (off.special_tokens[tag] for tag in ("<think>", "</think>"))
    assert off.chat(CONVERSATION[:2]) == [*on.chat(CONVERSATION[:2]), begin, *newlines, end, *newlines]
    assert ("qwen3, thinking" in off.note, "qwen3, thinking" in on.note) == (False, True)
    assert not off.opens_reasoning
    assert not on.opens_reasoning  # the model itself writes <think>


def test_template_that_opens_the_reasoning_is_recognized(load):
    tokenizer = load(tokenizer_config={"chat_template": "'<|im_start|>' + role, '<|im_start|>assistant\\n<think>\\n'"})
    assert tokenizer.chat_format == "chatml"
    assert tokenizer.opens_reasoning
    expected = [tokenizer.special_tokens["<think>"], *tokenizer.encode("\n", SECTION)]
    assert tokenizer.chat(CONVERSATION[:2])[-len(expected) :] == expected


def test_tags_of_the_reasoning_are_displayed_and_other_special_tokens_are_not(load):
    tokenizer = load()
    ids = [tokenizer.special_tokens[name] for name in ("<think>", "<|user|>", "</think>", "<s>")]
    assert tokenizer.decode([*ids[:2], *tokenizer.encode("gout"), *ids[2:]]) == "<think>gout</think>"


def test_normal_piece_used_as_special_token_is_not_matched_in_text(load, model):
    piece = next(i for i in range(model.vocab_size()) if model.id_to_piece(i) == "out")
    tokenizer = load(generation_config={"user_token_id": piece, "assistant_token_id": 6})
    assert piece in model.encode("gout")
    assert piece not in tokenizer.encode("gout")
    assert tokenizer.decode(tokenizer.encode("gout")) == "gout"


@pytest.mark.parametrize(
    ("in_model", "settings", "positions"),
    [
        (True, {}, (START, SECTION)),
        (False, {}, ()),
        (False, {"add_prefix_space": True}, (START, SECTION)),
        (True, {"add_prefix_space": False}, ()),
        (True, {"add_prefix_space": None}, (START, SECTION)),
        (True, {"legacy": True}, (START, SECTION)),
        (True, {"legacy": False}, (START,)),
        (True, {"legacy": False, "add_prefix_space": True}, (START,)),
        (True, {"legacy": False, "add_prefix_space": None}, (START,)),
        (True, {"legacy": False, "add_prefix_space": False}, ()),
    ],
)
def test_settings_decide_where_a_space_is_prepended(load, make_tokenizer, in_model, settings, positions):
    model = make_tokenizer(add_dummy_prefix=in_model).backend.processor
    tokenizer = load(model=model, tokenizer_config=settings)
    for position in (START, SECTION, INSIDE):
        text = "".join(map(model.id_to_piece, tokenizer.encode("gout", position)))
        assert text == ("▁gout" if position in positions else "gout"), position


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "<s>▁[INST]▁gout?▁[/INST]▁uric▁acid▁</s>"),
        ({"legacy": False}, "<s>[INST]▁gout?▁[/INST]▁uric▁acid▁</s>"),
    ],
)
def test_chat_has_the_spaces_of_its_settings(load, make_tokenizer, settings, expected):
    model = make_tokenizer(remove_extra_whitespaces=False).backend.processor
    tokenizer = load("llama2", model=model, tokenizer_config=settings)
    pieces = "".join(model.id_to_piece(i) for i in tokenizer.chat(CONVERSATION[1:3]))
    text = re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), pieces)
    assert text == expected


@pytest.mark.parametrize(
    ("content", "positions"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, (START, SECTION)),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}}, (START,)),
        ({"pre_tokenizer": None, "normalizer": None}, ()),
    ],
)
def test_tokenizer_model_uses_the_spaces_of_a_tokenizer_json(load, model, content, positions):
    tokenizer = load(tokenizer=content, tokenizer_config={"legacy": not positions})
    assert tokenizer.note.startswith("tokenizer.model (not tokenizer.json")
    for position in (START, SECTION, INSIDE):
        text = "".join(map(model.id_to_piece, tokenizer.encode("gout", position)))
        assert text == ("▁gout" if position in positions else "gout"), position


def test_note_reports_file_format_and_reason(load):
    assert load("zephyr").note == "tokenizer.model, chat format zephyr (that of the adapter or --chat-format)"
    template = "{{ '<|im_start|>' + role }}"
    expected = "tokenizer.model, chat format chatml (its chat_template has <|im_start|>)"
    assert load(tokenizer_config={"chat_template": template}).note == expected


def test_added_special_tokens_are_read_from_the_settings(load, model):
    size = model.vocab_size()
    decoder = {str(size + 1): {"content": "<|newer|>", "special": True}, str(size + 2): {"content": "<|marker|>"}}
    tokenizer = load(added_tokens={"<|older|>": size}, tokenizer_config={"added_tokens_decoder": decoder})
    for name, i in (("<|older|>", size), ("<|newer|>", size + 1), ("<|marker|>", size + 2)):
        assert tokenizer.special_tokens[name] == i
        assert i not in tokenizer.encode(name)
        assert tokenizer.decode(tokenizer.encode(name)) == name
        assert tokenizer.decode([i]) == ""


@pytest.mark.parametrize("also_in_the_older_file", [False, True])
def test_added_word_is_one_token_of_text(load, make_tokenizer, also_in_the_older_file):
    model = make_tokenizer(remove_extra_whitespaces=False).backend.processor
    size = model.vocab_size()
    files = {"added_tokens": {"HbA1c": size}} if also_in_the_older_file else {}
    decoder = {str(size): {"content": "HbA1c", "special": False}}
    tokenizer = load(model=model, tokenizer_config={"added_tokens_decoder": decoder}, **files)
    ids = tokenizer.encode("the HbA1c")
    assert ids[-1] == size < tokenizer.vocab_size
    assert tokenizer.decode(ids) == "the HbA1c"
    assert "HbA1c" not in tokenizer.special_tokens


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_spaces_around_added_words_and_displayed_tokens_are_kept(load, make_tokenizer, settings):
    model = make_tokenizer(remove_extra_whitespaces=False).backend.processor
    size = model.vocab_size()
    names = {str(size): "HbA1c", str(size + 1): "<think>"}
    decoder = {i: {"content": name, "special": False} for i, name in names.items()}
    tokenizer = load(model=model, tokenizer_config={"added_tokens_decoder": decoder, **settings})
    for text in ("HbA1c", " HbA1c ", "the HbA1c is", "theHbA1cis", "the  HbA1c\nis"):
        assert size in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = [*tokenizer.encode(text), size + 1, *tokenizer.encode(text, SECTION)]
        assert tokenizer.decode(ids) == f"{text}<think>{text}"


def test_settings_override_the_start_and_end_tokens_of_the_model(load, model):
    user, end = model.piece_to_id("<|user|>"), model.piece_to_id("<|im_end|>")
    assert (load().bos_id, load().eos_ids) == (model.bos_id(), (model.eos_id(),))
    named = load(special_tokens_map={"bos_token": {"content": "<|user|>"}, "eos_token": "<|im_end|>"})
    assert (named.bos_id, named.eos_ids) == (user, (end,))
    later = load(tokenizer_config={"eos_token": "</s>", "bos_token": None})
    assert (later.bos_id, later.eos_ids) == (user, (model.eos_id(),))


def test_every_end_token_of_the_generation_config_ends_an_answer(load, model):
    eos = model.eos_id()
    assert load(generation_config={"eos_token_id": 7}).eos_ids == (eos, 7)
    assert load(generation_config={"eos_token_id": [9, eos, 7]}).eos_ids == (eos, 9, 7)
    assert load(config={"eos_token_id": 8}).eos_ids == (eos, 9, 7)  # generation_config.json overrides config.json
    assert load(config={"eos_token_id": 8}, generation_config={}).eos_ids == (eos, 8)


def test_end_token_of_the_chat_format_is_the_first(load, model):
    tokenizer = load("chatml", generation_config={"eos_token_id": 7})
    assert tokenizer.eos_ids == (model.piece_to_id("<|im_end|>"), model.eos_id(), 7)


def test_add_bos_token_decides_if_texts_start_with_bos(load, model):
    assert load().start == [model.bos_id()]
    assert load(tokenizer_config={"add_bos_token": True}).start == [model.bos_id()]
    assert load(tokenizer_config={"add_bos_token": False}).start == []


def test_baichuan_turns_are_ids_of_the_generation_config(load, make_tokenizer):
    model = make_tokenizer().backend.processor
    tokenizer = load(model=model, generation_config={"user_token_id": 195, "assistant_token_id": 196})
    assert tokenizer.chat_format == "baichuan"
    expected = [*tokenizer.encode("Be short."), 195, *tokenizer.encode("gout?"), 196]
    expected += [*tokenizer.encode("uric acid"), 195, *tokenizer.encode("哮喘？"), 196]
    assert tokenizer.chat(CONVERSATION[:4]) == expected


def test_chat_template_is_read_from_both_of_its_files(load, tmp_path):
    named = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": "<|im_start|>"}]
    assert load(tokenizer_config={"chat_template": named}).chat_format == "chatml"
    (tmp_path / "chat_template.jinja").write_text("<|start_header_id|>", encoding="utf-8")
    assert load(tokenizer_config={"chat_template": named}).chat_format == "llama3"


def test_default_system_message_belongs_to_chatml_only(load):
    template = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{{ '<|im_start|>' + turn.role }}"
    question = [{"role": "user", "content": "gout?"}]
    chatml, llama2 = (load(name, tokenizer_config={"chat_template": template}) for name in ("auto", "llama2"))
    assert "Be kind." in chatml.decode(chatml.chat(question))
    assert "Be kind." not in llama2.decode(llama2.chat(question))


def test_chatml_starts_with_bos_if_its_template_does(load):
    template = "{{ %s'<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}"
    question = [{"role": "user", "content": "gout?"}]
    plain, started = (
        load(tokenizer_config={"chat_template": template % start}).chat(question) for start in ("", "bos_token + ")
    )
    assert started == [load().bos_id, *plain]


def test_unknown_chat_template_fails_in_a_chat_only_and_can_be_overridden(load):
    settings = {"chat_template": "{{ messages }}"}
    tokenizer = load(tokenizer_config=settings)
    assert tokenizer.encode("gout")
    assert tokenizer.chat_format is None
    with pytest.raises(ValueError, match=r"chat_template .*--chat-format"):
        tokenizer.chat(CONVERSATION)
    assert load("zephyr", tokenizer_config=settings).chat(CONVERSATION)


def test_impossible_chat_formats_are_rejected(load, make_tokenizer):
    with pytest.raises(ValueError, match=r"chat_format .*'chatMl'"):
        load("chatMl")
    with pytest.raises(ValueError, match=r"chatml .*<\|im_start\|>"):
        load("chatml", model=make_tokenizer().backend.processor)


WRONG = {
    "tokenizer_config": [
        {"chat_template": 5},
        {"chat_template": [5]},
        {"chat_template": [[]]},
        {"chat_template": [{}]},
        {"chat_template": [{"name": [], "template": ""}]},
        {"chat_template": {"default": ""}},
        {"bos_token": 5},
        {"bos_token": True},
        {"eos_token": ["</s>"]},
        {"eos_token": {}},
        {"eos_token": {"content": 5}},
        {"eos_token": "no such token"},
        {"added_tokens_decoder": 5},
        {"added_tokens_decoder": [5]},
        {"added_tokens_decoder": {"5": 5}},
        {"added_tokens_decoder": {"5": {}}},
        {"added_tokens_decoder": {"five": {"content": "a"}}},
        {"added_tokens_decoder": {"5": {"content": 5}}},
        {"added_tokens_decoder": {"5": {"content": None, "special": True}}},
        {"added_tokens_decoder": {"-5": {"content": "a", "special": False}}},
        {"added_tokens_decoder": {"9" * 30: {"content": "a", "special": False}}},
        {"added_tokens_decoder": {"9" * 30: {"content": "<a>"}}},
    ],
    "generation_config": [
        {"eos_token_id": "2"},
        {"eos_token_id": -1},
        {"eos_token_id": 1.5},
        {"eos_token_id": True},
        {"eos_token_id": {}},
        {"eos_token_id": [[2]]},
        {"eos_token_id": 10**30},
        {"user_token_id": "195", "assistant_token_id": 196},
        {"user_token_id": [195], "assistant_token_id": 196},
    ],
    "added_tokens": [[], 5, {"<a>": "5"}, {"<a>": -1}, {"<a>": None}, {"<a>": 1e9}],
    "tokenizer": [5, {"normalizer": 5}, {"normalizer": {"type": "Sequence", "normalizers": 5}}, {"pre_tokenizer": [5]}]
    + [{"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": scheme}} for scheme in (5, "sometimes", [5])],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in WRONG for content in WRONG[name]])
def test_settings_of_unexpected_structure_are_rejected_with_the_directory(load, tmp_path, name, content):
    with pytest.raises(UserError, match=str(tmp_path)):
        load(**{name: content})


@pytest.mark.parametrize(
    "name", ["tokenizer_config", "generation_config", "special_tokens_map", "config", "added_tokens"]
)
@pytest.mark.parametrize(
    "content", ["", "{", "5", "null", "[]", '"x"', "\x00", "version https://git-lfs.github.com/spec/v1\n"]
)
def test_settings_that_are_not_an_object_are_rejected_with_the_file(load, name, content):
    with pytest.raises(UserError, match=rf"{name}\.json"):
        load(**{name: content})


@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_end_tokens_beyond_the_vocabulary_are_passed_over(load, model, file):
    size, eos = model.vocab_size(), model.eos_id()
    files = {"config": {"vocab_size": size}}
    files[file] = files.get(file, {}) | {"eos_token_id": [size + 9, 7, size]}
    tokenizer = load("chatml", **files)
    assert tokenizer.eos_ids == (model.piece_to_id("<|im_end|>"), eos, 7)
    assert tokenizer.vocab_size == size
    files["config"] = {**files["config"], "vocab_size": size + 1}  # a row without a token can still be generated
    tokenizer = load("chatml", **files)
    assert tokenizer.eos_ids == (model.piece_to_id("<|im_end|>"), eos, 7, size)
    assert tokenizer.vocab_size == size


def test_the_first_end_token_within_the_vocabulary_ends_trained_answers(load, make_tokenizer):
    model = make_tokenizer(eos_id=-1).backend.processor
    config = {"vocab_size": model.vocab_size(), "eos_token_id": [model.vocab_size() + 1, 7]}
    tokenizer = load("plain", model=model, config=config)
    assert (tokenizer.eos_ids, tokenizer.chat(CONVERSATION[:3])[-1]) == ((7,), 7)
    assert tokenizer.vocab_size == model.vocab_size()


def test_added_end_token_beyond_the_vocabulary_is_passed_over_if_the_format_does_not_use_it(load, model):
    size = model.vocab_size()
    settings = {"added_tokens": {"<|end|>": size}, "tokenizer_config": {"eos_token": "<|end|>"}}
    config = {"vocab_size": size}
    tokenizer = load("chatml", config=config, **settings)
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((model.piece_to_id("<|im_end|>"),), size)
    trained = load("zephyr", config=config, **settings)  # its answers end with this token, so the model needs it
    assert (trained.eos_ids, trained.vocab_size) == ((size,), size + 1)


def test_special_tokens_beyond_the_vocabulary_decode_to_nothing(load, model):
    size = model.vocab_size()
    tokenizer = load(added_tokens={"<|far|>": size + 1000}, generation_config={"eos_token_id": size + 5})
    assert tokenizer.decode([size + 1000, *tokenizer.encode("gout"), size + 5]) == "gout"
    assert tokenizer.eos_ids == (model.eos_id(), size + 5)


def test_git_lfs_pointer_is_not_read_as_a_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model: .*git lfs pull"):
        load_tokenizer(tmp_path)


def test_tiktoken_vocabulary_does_not_hide_a_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"tokenizer\.model: a tiktoken vocabulary"):
        load_tokenizer(tmp_path)
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes((TOKENIZER_FIXTURES / "bpe" / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("gout") == load_tokenizer(TOKENIZER_FIXTURES / "bpe").encode("gout")
    assert tokenizer.note.startswith("tokenizer.json (tokenizer.model is a tiktoken vocabulary)")


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json", "added_tokens.json"])
def test_dangling_symlinks_are_reported_and_not_passed_over(load, tmp_path, name):
    load(generation_config={}, added_tokens={})
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "blobs" / "0123.incomplete")
    with pytest.raises(FileNotFoundError, match=rf"{name}: .*0123\.incomplete"):
        load_tokenizer(tmp_path)


def test_download_cache_is_followed_to_its_snapshot(tmp_path, model):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.model").write_bytes(model.serialized_model_proto())
    assert load_tokenizer(tmp_path / "models--org--name").encode("gout") == model.encode("gout")


@pytest.mark.parametrize("name", ["config", "tokenizer_config", "tokenizer", "added_tokens"])
def test_repeated_keys_in_settings_are_rejected_by_name(load, name):
    with pytest.raises(UserError, match=rf"{name}\.json: .*'key'"):
        load(**{name: '{"key": 1, "key": 2}'})


def test_damaged_tokenizer_models_are_rejected_or_encode(tmp_path, model):
    draw, whole = random.Random(0), model.serialized_model_proto()
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 16])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert load_tokenizer(tmp_path).encode("gout")


def test_start_and_end_tokens_without_names_are_ids_of_config_json(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes((TOKENIZER_FIXTURES / "bpe" / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [0, 3]}')
    tokenizer = load_tokenizer(tmp_path, "plain")
    messages = [{"role": "user", "content": "gout?"}, {"role": "assistant", "content": "uric acid"}]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (0, 3))
    assert tokenizer.chat(messages)[-1] == 0


def test_vocabulary_with_gaps_is_as_large_as_its_largest_id(tmp_path):
    pytest.importorskip("tokenizers")
    content = json.loads((TOKENIZER_FIXTURES / "bpe" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] = {piece: 10 * i for piece, i in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("What is gout?")
    assert tokenizer.decode(ids) == "What is gout?"
    assert tokenizer.vocab_size == 10 * (len(content["model"]["vocab"]) - 1) + 1 > max(ids)


@pytest.mark.parametrize("starts", [True, False])
def test_plain_chats_start_as_other_texts(tmp_path, starts):
    (tmp_path / "tokenizer.model").write_bytes((TOKENIZER_FIXTURES / "sentencepiece" / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": starts}))
    tokenizer = load_tokenizer(tmp_path, "plain")
    ids = tokenizer.chat([{"role": "user", "content": "gout?"}])
    assert tokenizer.start == ([tokenizer.bos_id] if starts else [])
    assert ids == tokenizer.start + tokenizer.encode("gout?\n")
