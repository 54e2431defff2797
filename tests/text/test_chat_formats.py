"""Tests of the chat formats: the expected conversations are written by hand, «» enclose the text that is trained.

<s> and </s> are the start and end tokens of the tokenizer, <U> and <A> the tokens that Baichuan gives by id.
"""

import re
from itertools import pairwise

import pytest

from minidoctor.text.chat_formats import CHAT_FORMATS, adapt, recognize, render

NAMES = {"{bos}": "<s>", "{eos}": "</s>", "{user}": "<U>", "{assistant}": "<A>"}
SYSTEM = {"role": "system", "content": "S"}
QUESTIONS = [{"role": "user", "content": f"Q{i}"} for i in (1, 2, 3)]
ANSWERS = [{"role": "assistant", "content": f"A{i}"} for i in (1, 2, 3)]
TURNS = [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], QUESTIONS[2]]
SPECIAL_TOKENS = {"{bos}", "{eos}"}.union(*(format.needs for format in CHAT_FORMATS.values()))

HUATUO_SYSTEM = (
    "一位用户和智能医疗大模型HuatuoGPT之间的对话。对于用户的医疗问诊，HuatuoGPT给出准确的、详细的、温暖的指导建议。"
    "对于用户的指令问题，HuatuoGPT给出有益的、详细的、有礼貌的回答。"
)
# The text that each turn adds: the first question (without and with a system message), an answer, a question, ...
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
    "huatuo-v1": [
        (f"{HUATUO_SYSTEM}<病人>：Q1 <HuatuoGPT>：", "S<病人>：Q1 <HuatuoGPT>："),
        "«A1</s>»",
        "<病人>：Q2 <HuatuoGPT>：",
        "«A2</s>»",
        "<病人>：Q3 <HuatuoGPT>：",
        "«A3</s>»",
    ],
    "deepseek-r1": [
        ("<s><｜User｜>Q1<｜Assistant｜>", "<s>S<｜User｜>Q1<｜Assistant｜>"),
        "«A1</s>»",
        "<｜User｜>Q2<｜Assistant｜>",
        "«A2</s>»",
        "<｜User｜>Q3<｜Assistant｜>",
        "«A3</s>»",
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

# In these two formats an earlier turn changes when another follows it.
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


def rendered(messages, format, special_tokens=SPECIAL_TOKENS):
    """Return the conversation as one text, with the marks of the expected ones."""
    text = "".join(
        f"«{NAMES.get(segment.text, segment.text)}»" if segment.assistant else NAMES.get(segment.text, segment.text)
        for segment in render(messages, format, special_tokens)
    )
    return text.replace("»«", "")


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", CHATS)
def test_prompts_of_one_to_three_turns_follow_their_format(name, n):
    (first, first_with_system), *later = CHATS[name]
    messages, rest = TURNS[: 2 * n - 1], "".join(later[: 2 * n - 2])
    assert rendered(messages, CHAT_FORMATS[name]) == first + rest
    assert rendered([SYSTEM, *messages], CHAT_FORMATS[name]) == first_with_system + rest


@pytest.mark.parametrize("name", CHATS)
def test_answered_chats_end_with_the_end_token(name):
    (first, first_with_system), *later = CHATS[name]
    assert rendered([*TURNS, ANSWERS[2]], CHAT_FORMATS[name]) == first + "".join(later)
    assert rendered([SYSTEM, *TURNS, ANSWERS[2]], CHAT_FORMATS[name]) == first_with_system + "".join(later)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_qwen3_has_an_empty_thinking_block_before_the_last_answer_only(n):
    messages, expected, format = TURNS[: 2 * n - 1], QWEN3[n - 1], CHAT_FORMATS["qwen3"]
    assert rendered(messages, format) == expected
    assert rendered([SYSTEM, *messages], format) == "<|im_start|>system\nS<|im_end|>\n" + expected
    assert rendered([*messages, ANSWERS[n - 1]], format) == f"{expected}«A{n}<|im_end|>»\n"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mistral_v3_has_the_system_message_in_the_last_question(n):
    messages, format = TURNS[: 2 * n - 1], CHAT_FORMATS["mistral-v3"]
    assert rendered(messages, format) == MISTRAL_V3[n - 1]
    assert rendered([SYSTEM, *messages], format) == MISTRAL_V3_SYSTEM[n - 1]
    assert rendered([SYSTEM, *messages, ANSWERS[n - 1]], format) == f"{MISTRAL_V3_SYSTEM[n - 1]}« A{n}</s>»"


def test_every_format_has_an_expected_chat():
    assert {*CHATS, "qwen3", "mistral-v3"} == set(CHAT_FORMATS)


def test_default_system_message_replaces_a_missing_one_only():
    format = CHAT_FORMATS["chatml"]._replace(default_system="Be kind.")
    first, first_with_system = CHATS["chatml"][0]
    assert rendered(TURNS[:1], format) == "<|im_start|>system\nBe kind.<|im_end|>\n" + first
    assert rendered([SYSTEM, *TURNS[:1]], format) == first_with_system


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1"])
def test_formats_that_strip_their_messages_ignore_white_space(name):
    padded = [message | {"content": f"\n {message['content']} \n"} for message in TURNS]
    assert rendered(padded, CHAT_FORMATS[name]) == rendered(TURNS, CHAT_FORMATS[name])


@pytest.mark.parametrize("name", ["chatml", "qwen3", "zephyr", "mistral", "baichuan"])
def test_other_formats_keep_the_white_space_of_a_message(name):
    padded = [QUESTIONS[0] | {"content": "\n Q \n"}]
    assert "\n Q \n" in rendered(padded, CHAT_FORMATS[name])


# Without </think>, before which a past answer of a reasoning model is cut.
TYPED = "".join(sorted(SPECIAL_TOKENS - {"</think>"})) + "{}{}</s>[INST]<<SYS>> x"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_special_tokens_in_a_message_stay_text(name, role):
    def chat(content):
        messages = [SYSTEM, QUESTIONS[0], ANSWERS[0], QUESTIONS[1]]
        return render(
            [m | {"content": content} if m["role"] == role else m for m in messages], CHAT_FORMATS[name], SPECIAL_TOKENS
        )

    assert chat(TYPED) == [
        segment if segment.special else segment._replace(text=segment.text.replace("PLACE", TYPED))
        for segment in chat("PLACE")
    ]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_every_needed_token_is_a_special_segment(name):
    needs = CHAT_FORMATS[name].needs
    segments = render([SYSTEM, *TURNS, ANSWERS[2]], CHAT_FORMATS[name], {"{bos}", "{eos}", *needs})
    assert set(needs) - {"<think>", "</think>"} <= {segment.text for segment in segments if segment.special}
    assert not any(
        marker in segment.text for segment in segments if not segment.special for marker in ("{bos}", "{eos}", *needs)
    )


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_neighbouring_text_is_one_segment(name):
    segments = render([SYSTEM, *TURNS, ANSWERS[2]], CHAT_FORMATS[name], SPECIAL_TOKENS)
    for left, right in pairwise(segments):
        assert left.special or right.special or left.assistant != right.assistant
    assert all(segment.text for segment in segments)


def test_markup_that_is_not_a_special_token_is_part_of_the_text():
    segments = render(TURNS[:1], CHAT_FORMATS["zephyr"], {"{bos}", "{eos}"})
    assert [(segment.text, segment.special) for segment in segments] == [
        ("<|user|>\nQ1", False),
        ("{eos}", True),
        ("\n<|assistant|>\n", False),
    ]


def test_the_longer_of_two_special_tokens_is_matched():
    segments = render(TURNS[:1], CHAT_FORMATS["minidoctor"], {"{bos}", "<|user|>", "<|user|>Q", "<|assistant|>", "<|"})
    assert [segment.text for segment in segments] == ["{bos}", "<|user|>", "Q1", "<|assistant|>"]


# Our own templates, reduced to the marks that distinguish the families.
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
    "deepseek-r1": "{{ bos_token + '<｜User｜>' + turn.content }}{{ '<｜Assistant｜>' + turn.content + eos_token }}",
    "zephyr": ZEPHYR,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_recognize_finds_each_format_by_marks_in_its_template(name):
    recognized, reason = recognize(TEMPLATES[name], CHAT_FORMATS[name].needs)
    assert recognized == name
    mark = re.fullmatch(r"its chat_template has (.+?)(?: and (.+))?", reason)
    assert mark[1] in TEMPLATES[name]
    assert (mark[2] or "") in TEMPLATES[name]


def test_recognize_uses_the_special_tokens_without_a_template():
    assert recognize("", {"<|system|>", "<|user|>", "<|assistant|>"})[0] == "minidoctor"
    assert recognize("", {"{user}", "{assistant}", "{bos}"})[0] == "baichuan"
    assert recognize("", {"<|user|>", "{assistant}", "{bos}"})[0] == "plain"
    assert recognize("", set()) == ("plain", "it has no chat_template")


R1_PROMPTS = {
    "chatml": "<|im_start|>assistant\n<think>\n",
    "qwen3": "<|im_start|>assistant\n<think>\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n",
    "llama3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n<think>",
    "deepseek-r1": "<｜Assistant｜><think>\n",
}


@pytest.mark.parametrize("newline", ["\n", "\\n"])
@pytest.mark.parametrize("name", R1_PROMPTS)
def test_template_of_a_model_that_always_reasons_opens_the_last_answer(name, newline):
    format = CHAT_FORMATS[name]
    template = TEMPLATES[name] + "{{ '" + R1_PROMPTS[name].replace("\n", newline) + "' }}"
    assert recognize(template, format.needs)[0] == name
    for thinking in (False, True):
        adapted = adapt(format, template, thinking)
        assert adapted.generation_prompt == R1_PROMPTS[name]
        assert adapted.past_prompt == (format.past_prompt or format.generation_prompt)
        assert (format.max_new_tokens, adapted.max_new_tokens) == (2048 if name == "deepseek-r1" else 64, 2048)
    assert adapt(format, TEMPLATES[name]).generation_prompt == format.generation_prompt
    assert rendered(TURNS[:3], adapted).count("<think>") == 1
    assert adapt(CHAT_FORMATS["plain"], template).generation_prompt == ""  # chosen in spite of the template


def test_past_answers_of_reasoning_models_are_shortened_to_their_final_part():
    past = [QUESTIONS[0], {"role": "assistant", "content": "<think>\nA?\n</think>\n\nA1"}, QUESTIONS[1]]
    assert rendered(past, CHAT_FORMATS["qwen3"]) == QWEN3[1]
    expected = "<s><｜User｜>Q1<｜Assistant｜>«\n\nA1</s>»<｜User｜>Q2<｜Assistant｜>"
    assert rendered(past, CHAT_FORMATS["deepseek-r1"]) == expected
    assert "«<think>\nA?\n</think>\n\nA1<|im_end|>»" in rendered(past[:2], CHAT_FORMATS["qwen3"])  # the last answer
    assert "«<think>\nA?\n</think>\n\nA1<|im_end|>»" in rendered(past, CHAT_FORMATS["chatml"])


def test_thinking_removes_the_empty_chain_of_thought_of_qwen3():
    format = adapt(CHAT_FORMATS["qwen3"], TEMPLATES["qwen3"], thinking=True)
    assert rendered(TURNS[:3], format) == QWEN3[1].replace("<think>\n\n</think>\n\n", "") != QWEN3[1]
    assert (CHAT_FORMATS["qwen3"].max_new_tokens, format.max_new_tokens) == (64, 2048)


def test_thinking_changes_only_the_limit_of_other_formats():
    for name in ("chatml", "llama3.1", "plain"):
        changed = adapt(CHAT_FORMATS[name], "", thinking=True)
        assert changed == adapt(CHAT_FORMATS[name], "")._replace(max_new_tokens=2048) != CHAT_FORMATS[name]


UNSUPPORTED = {
    "no markup": "{{ messages }}",
    "other markers": "{{ '<start_of_turn>' + turn.role + '\\n' + turn.content + '<end_of_turn>\\n' }}",
    "ends with <|end|>": "{{ '<|user|>\\n' + turn.content + '<|end|>\\n<|assistant|>\\n' + eos_token }}",
    "no end after a question": "{{ '<|user|>\\n' + turn.content + '\\n<|assistant|>\\n' }}{{ answer + eos_token }}",
    "a prefix and no ends": "[gMASK]<sop>{{ '<|user|>\\n' + turn.content }}{{ '<|assistant|>\\n' + turn.content }}",
    "[INST] without spaces": "{{ '[INST]' + turn.content + '[/INST]' }}{{ turn.content + eos_token }}",
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_recognize_rejects_formats_that_are_not_in_the_table(case):
    assert recognize(UNSUPPORTED[case], {"[INST]", "[/INST]", "<|user|>", "<|assistant|>", "{bos}", "{eos}"}) is None


def test_recognize_mistral_v1_also_with_its_marks_as_special_tokens():
    assert recognize(TEMPLATES["mistral-v1"], {"[INST]", "[/INST]"})[0] == "mistral-v1"


def test_mistral_0_1_has_a_space_after_an_answer():
    template = TEMPLATES["mistral-v1"].replace("eos_token }}", "eos_token + ' ' }}")
    assert recognize(template, set())[0] == "mistral-v1"
    assert adapt(CHAT_FORMATS["mistral-v1"], TEMPLATES["mistral-v1"]) == CHAT_FORMATS["mistral-v1"]
    format = adapt(CHAT_FORMATS["mistral-v1"], template)
    messages = [{"role": role, "content": text} for role, text in (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"))]
    assert "".join(segment.text for segment in render(messages, format, [])).endswith(" [INST] Q2 [/INST]")


def default_system(template):
    return adapt(CHAT_FORMATS["chatml"], template).default_system


@pytest.mark.parametrize("newline", ["\n", "\\n"])
def test_adapt_reads_the_default_system_message(newline):
    system = f"{{{{ '<|im_start|>system{newline}You are kind, 你好.<|im_end|>{newline}' }}}}"
    assert default_system(system + CHATML) == "You are kind, 你好."
    # As in the source of Qwen2.5-Math, a Jinja program with escapes.
    system = r"{{ '<|im_start|>system\nPut the answer within \\boxed{}.\nBe brief.<|im_end|>\n' }}"
    assert default_system(system + CHATML) == "Put the answer within \\boxed{}.\nBe brief."


def test_adapt_invents_no_default_system_message():
    assert default_system("") is None
    assert default_system(CHATML) is None
    assert default_system(CHATML + "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}") is None
    assert default_system(CHATML + "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n") is None


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_render_rejects_a_conversation_without_a_user_message(name):
    for messages in ([], [{"role": "system", "content": "Be short."}]):
        with pytest.raises(ValueError, match="user message"):
            render(messages, CHAT_FORMATS[name], {"{bos}", "{eos}"})
