"""Chat formats: how a conversation is written as one text with control tokens, for the families of open checkpoints.

A checkpoint was trained on one format and answers badly in any other. Its `chat_template` is a program; this is
instead a table of the formats that people use, and a look at the template to see which of them it is:

    <|im_start|>user\n What is gout? <|im_end|>\n <|im_start|>assistant\n   Gout is ... <|im_end|>   \n
    `------------------ not learned -----------------------------------'   `----- learned -----'  `not'

In a format "{}" stands for a message, "{bos}" and "{eos}" for the tokenizer's own, "{user}" and "{assistant}" for
the two that Baichuan's generation_config.json gives by number.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from minidoctor.config import UserError


class ChatFormat(NamedTuple):
    user: str
    opening: str  # of the assistant's turn: here a prompt ends and the model goes on
    system: str
    answer: str = "{}"
    end: str = "{eos}"  # the token that ends the answer, learned with it
    after: str = ""  # follows the answer, not learned
    start: str = "{bos}"
    past_opening: str | None = None  # `opening` and `end` of earlier answers, if not those of the last
    past_end: str | None = None
    default_system: str | None = None  # what stands there when a conversation has no system message
    system_inside: str = ""  # "first" or "last": the user's message that it is put in front of, no turn of its own
    strip: bool = False  # messages lose the white space around them
    needs: tuple[str, ...] = ()  # control tokens without which a conversation cannot be told from text


CHATML = ChatFormat(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    opening="<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    start="",
    needs=("<|im_start|>", "<|im_end|>"),
)
LLAMA3 = ChatFormat(
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    strip=True,
    needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
MISTRAL = ChatFormat(
    system="{}\n\n", system_inside="first", user=" [INST] {} [/INST]", opening="", answer=" {}"
)  # fmt: skip
CHAT_FORMATS = {
    "minidoctor": ChatFormat(
        system="<|system|>{}",
        user="<|user|>{}",
        opening="<|assistant|>",
        needs=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "plain": ChatFormat(system="{}\n", user="{}\n", opening=""),  # for a base that has seen no conversation
    "chatml": CHATML,
    # With thinking off: the model is told that it has thought already.
    "qwen3": CHATML._replace(
        opening=CHATML.opening + "<think>\n\n</think>\n\n",
        past_opening=CHATML.opening,
        needs=(*CHATML.needs, "<think>", "</think>"),
    ),
    "llama2": ChatFormat(
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        system_inside="first",
        user="{bos}[INST] {} [/INST]",
        opening="",
        answer=" {} ",
        start="",
        strip=True,
    ),
    "llama3": LLAMA3,
    # From 3.1 on the two dates stand in front of every system message, also of none.
    "llama3.1": LLAMA3._replace(
        system=LLAMA3.system.replace("{}", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}"),
        default_system="",
    ),
    "mistral": MISTRAL,
    # As the first revisions of its versions 0.1 and 0.2 had it.
    "mistral-v1": MISTRAL._replace(user="[INST] {} [/INST]", answer="{}"),
    # Version 0.3, where [INST] is one token.
    "mistral-v3": MISTRAL._replace(user="[INST] {}[/INST]", system_inside="last", needs=("[INST]", "[/INST]")),
    "baichuan": ChatFormat(
        system="{}", user="{user}{}", opening="{assistant}", past_end="", start="", needs=("{user}", "{assistant}")
    ),
    # HuatuoGPT-II, which has no chat_template: https://github.com/FreedomIntelligence/HuatuoGPT-II, cli_demo.py
    "huatuo": ChatFormat(
        system="{}\n", user="<问>：{}\n", opening="<答>：", past_end="", after="\n", start=""
    ),
    "zephyr": ChatFormat(
        system="<|system|>\n{}{eos}\n",
        user="<|user|>\n{}{eos}\n",
        opening="<|assistant|>\n",
        after="\n",
        start="",
    ),
}  # fmt: skip


class Segment(NamedTuple):
    text: str
    own: bool  # the assistant's words, or the token that ends them
    control: bool  # `text` is the name of a control token


def recognize(template: str, controls: Collection[str]) -> tuple[str, str] | None:
    """The name of the format that a checkpoint speaks and what shows it; None if it is none of the table's."""
    if re.search(r"assistant(\\n|\n)<think>", template):
        return None  # a model that always thinks before it answers
    spaced_mistral = "mistral" if " [INST]" in template else "mistral-v1"
    marks = (  # the most telling first
        ("<|start_header_id|>", "Cutting Knowledge Date", "llama3.1"),
        ("<|start_header_id|>", "", "llama3"),
        ("<|im_start|>", "enable_thinking", "qwen3"),
        ("<|im_start|>", "", "chatml"),
        ("<<SYS>>", "[INST]", "llama2"),
        ("[INST] ", " [/INST]", spaced_mistral),
        ("[INST] ", "[/INST]", "mistral-v3"),
    )
    for first, second, name in marks:
        if first in template and second in template:
            return name, f"its chat_template has {first.strip()}{' and ' + second.strip() if second else ''}"
    if re.search(r"<\|user\|>[^}]*eos_token", template) and "<|end|>" not in template:
        return "zephyr", "its chat_template has <|user|>"
    if template:
        return None
    for name, shown in (("minidoctor", "the tokens <|user|>, <|assistant|>"), ("baichuan", "user_token_id")):
        if set(CHAT_FORMATS[name].needs) <= set(controls):
            return name, f"it has {shown}"
    return "plain", "it has no chat_template"


def adapt(name: str, template: str) -> ChatFormat:
    """The format with what a ChatML template says of its own: a system message where there is none, bos in front."""
    form = CHAT_FORMATS[name]
    if not form.opening.startswith("<|im_start|>"):
        return form
    return form._replace(start="{bos}" if "bos_token" in template else "", default_system=default_system(template))


def default_system(template: str) -> str | None:
    found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^<>{}'\"]+)<\|im_end\|>", template)
    return found[1] if found else None


def layout(messages: list[dict[str, str]], form: ChatFormat, controls: Iterable[str]) -> list[Segment]:
    """The conversation in pieces, texts and control tokens, ready to be encoded one by one.

    Only the format's own markup is searched for control tokens, never a message. Ends with the opening of the
    assistant's turn when the last message is not the assistant's. Raises ValueError if nothing was asked.
    """
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise UserError("a conversation needs a message of the user's")
    special = re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")
    pieces: list[Segment] = []

    def add(text: str, own: bool = False, control: bool = False) -> None:
        if pieces and not control and pieces[-1][1:] == (own, False):  # one text, encoded as one
            text = pieces.pop().text + text
        if text:
            pieces.append(Segment(text, own, control))

    def write(markup: str, message: str = "", own: bool = False) -> None:
        before, _, after = markup.partition("{}")
        for part, text in ((before, message), (after, "")):
            for i, bit in enumerate(special.split(part) if part else []):
                add(bit, own, control=i % 2 == 1)
            add(text, own)

    write(form.start)
    if form.default_system is not None and messages[0]["role"] != "system":
        write(form.system, form.default_system)
    host = {"first": asked[0], "last": asked[-1]}.get(form.system_inside)  # of the system message
    inside = "".join(form.system.replace("{}", m["content"]) for m in messages if m["role"] == "system")
    for i, message in enumerate(messages):
        content = message["content"].strip() if form.strip else message["content"]
        if message["role"] == "assistant":
            past = i < asked[-1]
            write(form.past_opening if past and form.past_opening is not None else form.opening)
            write(form.answer, content, own=True)
            write(form.past_end if past and form.past_end is not None else form.end, own=True)
            write(form.after)
        elif message["role"] == "user":
            write(form.user, inside + content if i == host else content)
        elif host is None:
            write(form.system, content)
    if messages[-1]["role"] != "assistant":
        write(form.opening)
    return pieces
