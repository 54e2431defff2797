"""Chat formats: conversations as text with special tokens, for the families of open checkpoints.

A checkpoint was trained in one format and answers badly in any other. Its `chat_template` is a Jinja program. This
file has a table of the common formats instead, and recognizes a checkpoint's format by marks in its template:

    <|im_start|>user\n What is gout? <|im_end|>\n <|im_start|>assistant\n   Gout is ... <|im_end|>   \n
    `------------------ prompt: no loss --------------------------------'  `------ loss --------'  `no loss'

In a format, "{}" is the message, "{bos}" and "{eos}" are the tokenizer's start and end tokens, and "{user}" and
"{assistant}" are the two tokens that Baichuan's generation_config.json gives by id.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from minidoctor.config import UserError
from minidoctor.text.backends import match_any


class ChatFormat(NamedTuple):
    user: str
    generation_prompt: str  # opens the assistant's turn
    system: str
    answer: str = "{}"
    end: str = "{eos}"  # the token that ends the answer, trained with it
    after: str = ""  # follows the answer, without loss
    start: str = "{bos}"
    past_prompt: str | None = None  # the generation prompt of earlier answers, if it differs from the last one's
    past_end: str | None = None
    default_system: str | None = None  # the message of a conversation without a system message
    system_in_user: str = ""  # "first" or "last": the user message that includes the system message
    strip: bool = False  # messages lose the white space around them
    needs: tuple[str, ...] = ()  # special tokens without which the markup would be plain text
    max_new_tokens: int = 64  # default for an answer to an exam question; of a reasoning model REASONING_TOKENS


REASONING_TOKENS = 2048  # as in the README of HuatuoGPT-o1
NO_THINKING = "<think>\n\n</think>\n\n"  # an empty chain of thought, which turns thinking off
CHATML = ChatFormat(
    system="<|im_start|>system\n{}<|im_end|>\n", user="<|im_start|>user\n{}<|im_end|>\n", start="",
    generation_prompt="<|im_start|>assistant\n", end="<|im_end|>", after="\n", needs=("<|im_start|>", "<|im_end|>"),
)  # fmt: skip
LLAMA3 = ChatFormat(
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>", strip=True,
    needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)  # fmt: skip
MISTRAL = ChatFormat(
    system="{}\n\n", system_in_user="first", user=" [INST] {} [/INST]", generation_prompt="", answer=" {}"
)
CHAT_FORMATS = {
    "minidoctor": ChatFormat(
        system="<|system|>{}", user="<|user|>{}", generation_prompt="<|assistant|>",
        needs=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "plain": ChatFormat(system="{}\n", user="{}\n", generation_prompt=""),  # for a base trained on no conversation
    "chatml": CHATML,
    # Without --thinking, the last answer follows an empty chain of thought.
    "qwen3": CHATML._replace(
        generation_prompt=CHATML.generation_prompt + NO_THINKING,
        past_prompt=CHATML.generation_prompt, needs=(*CHATML.needs, "<think>", "</think>"),
    ),
    "llama2": ChatFormat(
        system="<<SYS>>\n{}\n<</SYS>>\n\n", system_in_user="first", user="{bos}[INST] {} [/INST]",
        generation_prompt="", answer=" {} ", start="", strip=True,
    ),
    "llama3": LLAMA3,
    # From 3.1 on the two dates precede every system message, also an empty one.
    "llama3.1": LLAMA3._replace(
        system=LLAMA3.system.replace("{}", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}"),
        default_system="",
    ),
    "mistral": MISTRAL,
    # As in the first revisions of versions 0.1, with a space after each answer, and 0.2.
    "mistral-v1": MISTRAL._replace(user="[INST] {} [/INST]", answer="{}"),
    # Version 0.3, where [INST] is one token.
    "mistral-v3": MISTRAL._replace(user="[INST] {}[/INST]", system_in_user="last", needs=("[INST]", "[/INST]")),
    "baichuan": ChatFormat(
        system="{}", user="{user}{}", generation_prompt="{assistant}", past_end="", start="",
        needs=("{user}", "{assistant}"),
    ),
    # HuatuoGPT-7B: https://github.com/FreedomIntelligence/HuatuoGPT, huatuo_cli_demo_stream.py
    "huatuo-v1": ChatFormat(
        system="{}", user="<病人>：{} ", generation_prompt="<HuatuoGPT>：", start="",
        default_system="一位用户和智能医疗大模型HuatuoGPT之间的对话。对于用户的医疗问诊，HuatuoGPT给出准确的、详细的、温暖的"
        "指导建议。对于用户的指令问题，HuatuoGPT给出有益的、详细的、有礼貌的回答。",
    ),
    # HuatuoGPT-II, which has no chat_template: https://github.com/FreedomIntelligence/HuatuoGPT-II, cli_demo.py
    "huatuo": ChatFormat(
        system="{}\n", user="<问>：{}\n", generation_prompt="<答>：", past_end="", after="\n", start=""
    ),
    "zephyr": ChatFormat(
        system="<|system|>\n{}{eos}\n", user="<|user|>\n{}{eos}\n", generation_prompt="<|assistant|>\n",
        after="\n", start="",
    ),
    "deepseek-r1": ChatFormat(
        system="{}", user="<｜User｜>{}", generation_prompt="<｜Assistant｜>", past_prompt="<｜Assistant｜>",
        needs=("<｜User｜>", "<｜Assistant｜>"), max_new_tokens=REASONING_TOKENS,
    ),
}  # fmt: skip


class Segment(NamedTuple):
    text: str
    assistant: bool  # the assistant's answer or the token that ends it
    special: bool  # `text` is the name of a special token


def recognize(template: str, special_tokens: Collection[str]) -> tuple[str, str] | None:
    """Return the name of a checkpoint's chat format and the reason, or None for a format that is not in the table."""
    marks = (  # the most specific first
        ("<|start_header_id|>", "Cutting Knowledge Date", "llama3.1"),
        ("<|start_header_id|>", "", "llama3"),
        ("<|im_start|>", "enable_thinking", "qwen3"),
        ("<|im_start|>", "", "chatml"),
        ("<｜User｜>", "<｜Assistant｜>", "deepseek-r1"),
        ("<<SYS>>", "[INST]", "llama2"),
        ("[INST] ", " [/INST]", "mistral" if " [INST]" in template else "mistral-v1"),
        ("[INST] ", "[/INST]", "mistral-v3"),
    )
    for first, second, name in marks:
        if first in template and second in template:
            return name, f"its chat_template has {first.strip()}{' and ' + second.strip() if second else ''}"
    if re.search(r"<\|user\|>[^}]*eos_token", template) and "<|end|>" not in template:
        return "zephyr", "its chat_template has <|user|>"
    if template:
        return None
    for name, reason in (("minidoctor", "the tokens <|user|>, <|assistant|>"), ("baichuan", "user_token_id")):
        if set(CHAT_FORMATS[name].needs) <= set(special_tokens):
            return name, f"it has {reason}"
    return "plain", "it has no chat_template"


def adapt(format: ChatFormat, template: str, thinking: bool = False) -> ChatFormat:
    """Return a format as a checkpoint's template varies it.

    In ChatML, the default system message and the start token vary. The assistant's turn of a model that always reasons
    opens with <think>. With `thinking`, no empty chain of thought is put there. Mistral 0.1 has a space after
    an answer.
    """
    prompt = format.past_prompt or format.generation_prompt
    opening = re.search(re.escape(prompt.rstrip()) + r"((?:\\n|\n)*<think>(?:\\n|\n)?)", template)
    if prompt and opening:
        opened = prompt.rstrip() + opening[1].replace("\\n", "\n")
        format = format._replace(generation_prompt=opened, past_prompt=prompt, max_new_tokens=REASONING_TOKENS)
    elif thinking:
        prompt = format.generation_prompt.removesuffix(NO_THINKING)
        format = format._replace(generation_prompt=prompt, max_new_tokens=REASONING_TOKENS)
    if "[INST]" in format.user and re.search(r"eos_token *\+ *' '", template):
        format = format._replace(after=" ")
    if not format.generation_prompt.startswith("<|im_start|>"):
        return format
    # The text is in a string literal, with escapes. An expression would begin with {{ or {%.
    system = re.search(r"<\|im_start\|>system(?:\\n|\n)((?:(?!\{[{%])[^<>'\"])+)<\|im_end\|>", template)
    message = system and re.sub(r"\\(.)", lambda escape: "\n" if escape[1] == "n" else escape[1], system[1])
    return format._replace(start="{bos}" if "bos_token" in template else "", default_system=message)


def render(messages: list[dict[str, str]], format: ChatFormat, special_tokens: Iterable[str]) -> list[Segment]:
    """Split a conversation into segments of text and special tokens, to be encoded one by one.

    Special tokens are recognized in the markup of the format only, never in a message. A conversation without a last
    answer ends with the generation prompt. Raises UserError if there is no user message.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise UserError("a conversation needs a user message")
    pattern = match_any(special_tokens)
    segments: list[Segment] = []

    def add(text: str, assistant: bool, special: bool = False) -> None:
        if segments and not special and segments[-1][1:] == (assistant, False):
            text = segments.pop().text + text  # neighbouring text is encoded as one
        if text:
            segments.append(Segment(text, assistant, special))

    def write(markup: str, message: str = "", assistant: bool = False) -> None:
        before, _, after = markup.partition("{}")
        for part, text in ((before, message), (after, "")):
            for i, piece in enumerate(pattern.split(part)):
                add(piece, assistant, special=i % 2 == 1)
            add(text, assistant)

    write(format.start)
    if format.default_system is not None and messages[0]["role"] != "system":
        write(format.system, format.default_system)
    host = {"first": users[0], "last": users[-1]}.get(format.system_in_user)
    prefix = "".join(format.system.replace("{}", m["content"]) for m in messages if m["role"] == "system")
    for i, message in enumerate(messages):
        content = message["content"].strip() if format.strip else message["content"]
        if message["role"] == "assistant":
            past = i < users[-1]
            if past and format.past_prompt:  # the templates of reasoning models; only DeepSeek's keep the newlines
                content = content.rpartition("</think>")[2].lstrip("\n" if format.end == "<|im_end|>" else "")
            write(format.past_prompt if past and format.past_prompt is not None else format.generation_prompt)
            write(format.answer, content, assistant=True)
            write(format.past_end if past and format.past_end is not None else format.end, assistant=True)
            write(format.after)
        elif message["role"] == "user":
            write(format.user, prefix + content if i == host else content)
        elif host is None:
            write(format.system, content)
    if messages[-1]["role"] != "assistant":
        write(format.generation_prompt)
    return segments
