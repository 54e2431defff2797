"""Expected conversations are written out by hand. «» stand around what is the assistant's own, and learned.

<s> and </s> are the tokenizer's own control tokens, <U> and <A> those that Baichuan gives by number.
"""

import re
from itertools import pairwise

import pytest

from minidoctor.text.chat_formats import CHAT_FORMATS, default_system, layout, recognize

SHOWN = {"{bos}": "<s>", "{eos}": "</s>", "{user}": "<U>", "{assistant}": "<A>"}
SYSTEM = {"role": "system", "content": "S"}
QUESTIONS = [{"role": "user", "content": f"Q{i}"} for i in (1, 2, 3)]
ANSWERS = [{"role": "assistant", "content": f"A{i}"} for i in (1, 2, 3)]
TURNS = [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], QUESTIONS[2]]
ALL_CONTROLS = {"{bos}", "{eos}"}.union(*(form.needs for form in CHAT_FORMATS.values()))

# What each turn adds: the first question (alone; after a system message), an answer, a question, an answer, ...
CHATS = {
    "minidoctor": [
        ("<s><|user|>Q1<|assistant|>", "<s><|system|>S<|user|>Q1<|assistant|>"),
        "«A1</s>»",
        "<|user|>Q2<|assistant|>",
        "«A2</s>»",
        "<|user|>Q3<|assistant|>",
        "«A3</s>»",
    ],
    "plain": [("<s>Q1\n", "<s>S\nQ1\n"), "«A1</s>»", "Q2\n", "«A2</s>»", "Q3\n", "«A3</s>»"],
    "chatml": [
        (
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        ),
        "«A1<|im_end|>»\n",
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
        "«A2<|im_end|>»\n",
        "<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n",
        "«A3<|im_end|>»\n",
    ],
    "llama2": [
        ("<s>[INST] Q1 [/INST]", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]"),
        "« A1 </s>»",
        "<s>[INST] Q2 [/INST]",
        "« A2 </s>»",
        "<s>[INST] Q3 [/INST]",
        "« A3 </s>»",
    ],
    "llama3": [
        (
            "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "«A1<|eot_id|>»",
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«A2<|eot_id|>»",
        "<|start_header_id|>user<|end_header_id|>\n\nQ3<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«A3<|eot_id|>»",
    ],
    "llama3.1": [
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<s><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "«A1<|eot_id|>»",
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«A2<|eot_id|>»",
        "<|start_header_id|>user<|end_header_id|>\n\nQ3<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«A3<|eot_id|>»",
    ],
    "mistral": [
        ("<s> [INST] Q1 [/INST]", "<s> [INST] S\n\nQ1 [/INST]"),
        "« A1</s>»",
        " [INST] Q2 [/INST]",
        "« A2</s>»",
        " [INST] Q3 [/INST]",
        "« A3</s>»",
    ],
    "mistral-v1": [
        ("<s>[INST] Q1 [/INST]", "<s>[INST] S\n\nQ1 [/INST]"),
        "«A1</s>»",
        "[INST] Q2 [/INST]",
        "«A2</s>»",
        "[INST] Q3 [/INST]",
        "«A3</s>»",
    ],
    "baichuan": [("<U>Q1<A>", "S<U>Q1<A>"), "«A1»", "<U>Q2<A>", "«A2»", "<U>Q3<A>", "«A3</s>»"],
    "huatuo": [
        ("<问>：Q1\n<答>：", "S\n<问>：Q1\n<答>："),
        "«A1»\n",
        "<问>：Q2\n<答>：",
        "«A2»\n",
        "<问>：Q3\n<答>：",
        "«A3</s>»\n",
    ],
    "zephyr": [
        ("<|user|>\nQ1</s>\n<|assistant|>\n", "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\n"),
        "«A1</s>»\n",
        "<|user|>\nQ2</s>\n<|assistant|>\n",
        "«A2</s>»\n",
        "<|user|>\nQ3</s>\n<|assistant|>\n",
        "«A3</s>»\n",
    ],
}

# In these two an earlier turn changes when another follows it.
QWEN3 = [
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»\n"
    "<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
]
MISTRAL_V3 = [
    "<s>[INST] Q1[/INST]",
    "<s>[INST] Q1[/INST]« A1</s>»[INST] Q2[/INST]",
    "<s>[INST] Q1[/INST]« A1</s>»[INST] Q2[/INST]« A2</s>»[INST] Q3[/INST]",
]
MISTRAL_V3_SYSTEM = [
    "<s>[INST] S\n\nQ1[/INST]",
    "<s>[INST] Q1[/INST]« A1</s>»[INST] S\n\nQ2[/INST]",
    "<s>[INST] Q1[/INST]« A1</s>»[INST] Q2[/INST]« A2</s>»[INST] S\n\nQ3[/INST]",
]


def shown(messages, form, controls=ALL_CONTROLS):
    """The conversation as one text, marked as the expected ones are."""
    text = "".join(
        f"«{SHOWN.get(piece.text, piece.text)}»" if piece.own else SHOWN.get(piece.text, piece.text)
        for piece in layout(messages, form, controls)
    )
    return text.replace("»«", "")


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", CHATS)
def test_a_chat_of_one_to_three_turns(name, n):
    (first, first_with_system), *later = CHATS[name]
    messages, rest = TURNS[: 2 * n - 1], "".join(later[: 2 * n - 2])
    assert shown(messages, CHAT_FORMATS[name]) == first + rest
    assert shown([SYSTEM, *messages], CHAT_FORMATS[name]) == first_with_system + rest


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_that_is_answered_ends_with_the_token_that_ends_an_answer(name):
    (first, first_with_system), *later = CHATS[name]
    assert shown([*TURNS, ANSWERS[2]], CHAT_FORMATS[name]) == first + "".join(later)
    assert shown([SYSTEM, *TURNS, ANSWERS[2]], CHAT_FORMATS[name]) == first_with_system + "".join(later)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_qwen3_is_told_that_it_has_thought_before_the_last_answer_only(n):
    messages, expected, form = TURNS[: 2 * n - 1], QWEN3[n - 1], CHAT_FORMATS["qwen3"]
    assert shown(messages, form) == expected
    assert shown([SYSTEM, *messages], form) == "<|im_start|>system\nS<|im_end|>\n" + expected
    assert shown([*messages, ANSWERS[n - 1]], form) == f"{expected}«A{n}<|im_end|>»\n"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mistral_v3_has_the_system_message_in_the_last_question(n):
    messages, form = TURNS[: 2 * n - 1], CHAT_FORMATS["mistral-v3"]
    assert shown(messages, form) == MISTRAL_V3[n - 1]
    assert shown([SYSTEM, *messages], form) == MISTRAL_V3_SYSTEM[n - 1]
    assert shown([SYSTEM, *messages, ANSWERS[n - 1]], form) == f"{MISTRAL_V3_SYSTEM[n - 1]}« A{n}</s>»"


def test_every_format_is_tested():
    assert {*CHATS, "qwen3", "mistral-v3"} == set(CHAT_FORMATS)


def test_the_default_system_message_stands_where_a_chat_has_none():
    form = CHAT_FORMATS["chatml"]._replace(default_system="Be kind.")
    first, first_with_system = CHATS["chatml"][0]
    assert shown(TURNS[:1], form) == "<|im_start|>system\nBe kind.<|im_end|>\n" + first
    assert shown([SYSTEM, *TURNS[:1]], form) == first_with_system


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1"])
def test_these_formats_strip_their_messages(name):
    padded = [message | {"content": f"\n {message['content']} \n"} for message in TURNS]
    assert shown(padded, CHAT_FORMATS[name]) == shown(TURNS, CHAT_FORMATS[name])


@pytest.mark.parametrize("name", ["chatml", "qwen3", "zephyr", "mistral", "baichuan"])
def test_these_formats_keep_the_white_space_of_a_message(name):
    padded = [QUESTIONS[0] | {"content": "\n Q \n"}]
    assert "\n Q \n" in shown(padded, CHAT_FORMATS[name])


TYPED = "".join(sorted(ALL_CONTROLS)) + "{}{}</s>[INST]<<SYS>> x"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_what_is_typed_stays_text(name, role):
    def chat(content):
        messages = [SYSTEM, QUESTIONS[0], ANSWERS[0], QUESTIONS[1]]
        return layout(
            [m | {"content": content} if m["role"] == role else m for m in messages], CHAT_FORMATS[name], ALL_CONTROLS
        )

    assert chat(TYPED) == [
        piece if piece.control else piece._replace(text=piece.text.replace("PLACE", TYPED)) for piece in chat("PLACE")
    ]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_every_marker_that_is_a_control_token_is_one_in_the_chat(name):
    needs = CHAT_FORMATS[name].needs
    pieces = layout([SYSTEM, *TURNS, ANSWERS[2]], CHAT_FORMATS[name], {"{bos}", "{eos}", *needs})
    assert set(needs) - {"<think>", "</think>"} <= {piece.text for piece in pieces if piece.control}
    assert not any(
        marker in piece.text for piece in pieces if not piece.control for marker in ("{bos}", "{eos}", *needs)
    )


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_neighbouring_text_is_one_piece_to_encode(name):
    pieces = layout([SYSTEM, *TURNS, ANSWERS[2]], CHAT_FORMATS[name], ALL_CONTROLS)
    for left, right in pairwise(pieces):
        assert left.control or right.control or left.own != right.own
    assert all(piece.text for piece in pieces)


def test_a_marker_that_is_no_control_token_is_part_of_the_text():
    pieces = layout(TURNS[:1], CHAT_FORMATS["zephyr"], {"{bos}", "{eos}"})
    assert [(piece.text, piece.control) for piece in pieces] == [
        ("<|user|>\nQ1", False),
        ("{eos}", True),
        ("\n<|assistant|>\n", False),
    ]


def test_of_two_control_tokens_the_longer_is_taken():
    pieces = layout(TURNS[:1], CHAT_FORMATS["minidoctor"], {"{bos}", "<|user|>", "<|user|>Q", "<|assistant|>", "<|"})
    assert [piece.text for piece in pieces] == ["{bos}", "<|user|>", "Q1", "<|assistant|>"]


# Templates of our own, as short as what tells one family from another.
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}{% endfor %}"
)
LLAMA3 = "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>{% endfor %}"
MISTRAL = "{{ bos_token }}{{ '%s[INST] ' + turn.content + ' [/INST]' }}{{ turn.content + eos_token }}"
ZEPHYR = "{{ '<|user|>\\n' + turn.content + eos_token }}{{ '<|assistant|>\\n' + turn.content + eos_token }}"
TEMPLATES = {
    "chatml": CHATML,
    "qwen3": CHATML + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "llama2": "{{ bos_token + '[INST] <<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn.content + ' [/INST]' }}",
    "llama3": LLAMA3,
    "llama3.1": LLAMA3 + "{{ 'Cutting Knowledge Date: December 2023' }}",
    "mistral": MISTRAL % " ",
    "mistral-v1": MISTRAL % "",
    "mistral-v3": "{{ '[INST] ' + turn.content + '[/INST]' }}{{ ' ' + turn.content + eos_token }}",
    "zephyr": ZEPHYR,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_family_is_known_by_its_template(name):
    found, why = recognize(TEMPLATES[name], CHAT_FORMATS[name].needs)
    assert found == name
    mark = re.fullmatch(r"its chat_template has (.+?)(?: and (.+))?", why)
    assert mark[1] in TEMPLATES[name]
    assert (mark[2] or "") in TEMPLATES[name]


def test_without_a_template_the_control_tokens_tell():
    assert recognize("", {"<|system|>", "<|user|>", "<|assistant|>"})[0] == "minidoctor"
    assert recognize("", {"{user}", "{assistant}", "{bos}"})[0] == "baichuan"
    assert recognize("", {"<|user|>", "{assistant}", "{bos}"})[0] == "plain"
    assert recognize("", set()) == ("plain", "it has no chat_template")


@pytest.mark.parametrize("newline", ["\n", "\\n"])
def test_a_model_that_always_thinks_first_is_unknown(newline):
    template = TEMPLATES["qwen3"] + "{{ '<|im_start|>assistant" + newline + "<think>' }}"
    assert recognize(template, CHAT_FORMATS["qwen3"].needs) is None


UNKNOWN = {
    "no format at all": "{{ messages }}",
    "other markers": "{{ '<start_of_turn>' + turn.role + '\\n' + turn.content + '<end_of_turn>\\n' }}",
    "ends with <|end|>": "{{ '<|user|>\\n' + turn.content + '<|end|>\\n<|assistant|>\\n' + eos_token }}",
    "no end after a question": "{{ '<|user|>\\n' + turn.content + '\\n<|assistant|>\\n' }}{{ answer + eos_token }}",
    "a prefix and no ends": "[gMASK]<sop>{{ '<|user|>\\n' + turn.content }}{{ '<|assistant|>\\n' + turn.content }}",
    "[INST] without spaces": "{{ '[INST]' + turn.content + '[/INST]' }}{{ turn.content + eos_token }}",
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_format_that_is_not_in_the_table_is_not_taken_for_another(what):
    assert recognize(UNKNOWN[what], {"[INST]", "[/INST]", "<|user|>", "<|assistant|>", "{bos}", "{eos}"}) is None


def test_mistrals_first_format_is_known_also_where_its_marks_are_control_tokens():
    assert recognize(TEMPLATES["mistral-v1"], {"[INST]", "[/INST]"})[0] == "mistral-v1"


@pytest.mark.parametrize("newline", ["\n", "\\n"])
def test_the_default_system_message_is_read_from_the_template(newline):
    said = f"{{{{ '<|im_start|>system{newline}You are kind, 你好.<|im_end|>{newline}' }}}}"
    assert default_system(said + CHATML) == "You are kind, 你好."


def test_no_default_system_message_is_made_up():
    assert default_system("") is None
    assert default_system(CHATML) is None
    assert default_system(CHATML + "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}") is None


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_conversation_without_a_question_is_refused(name):
    for messages in ([], [{"role": "system", "content": "Be short."}]):
        with pytest.raises(ValueError, match="needs a message of the user's"):
            layout(messages, CHAT_FORMATS[name], {"{bos}", "{eos}"})
