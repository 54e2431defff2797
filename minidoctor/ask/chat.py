"""TODO"""

import contextlib
import sys

from minidoctor.config import SampleConfig
from minidoctor.generate import generate
from minidoctor.model import Model
from minidoctor.picture.terminal import question_start, routing_text
from minidoctor.text.stream import TextStream, printable
from minidoctor.text.tokenizer import Tokenizer


def stream(model: Model, tokenizer: Tokenizer, prompt: list[int], config: SampleConfig) -> tuple[str, list[int]]:
    """Prints the answer as it comes and returns its text and tokens; Ctrl-C ends it early."""
    text = TextStream(tokenizer)
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        for (token,) in generate(model, [prompt], config, tokenizer.eos_ids):
            if token is not None:
                new = text.push(token)
                answer += new
                print(printable(new), end="", flush=True)
    rest = text.rest()
    print(printable(rest))
    return answer + rest, text.ids


def reply(
    model: Model,
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    config: SampleConfig,
    sublayer: int | None,
) -> str:
    """Prints the answer to the last message and returns it; below it the routing of both, if a sublayer is given."""
    prompt = tokenizer.chat(messages)
    answer, tokens = stream(model, tokenizer, prompt, config)
    if sublayer is not None:
        show_routing(model, tokenizer, prompt + tokens, question_start(tokenizer, messages), sublayer)
    return answer


def show_routing(model: Model, tokenizer: Tokenizer, tokens: list[int], start: int, sublayer: int) -> None:
    print("\n" + routing_text(model, tokenizer, tokens, start, sublayer, colour=sys.stdout.isatty()))


def chat(model: Model, tokenizer: Tokenizer, config: SampleConfig, sublayer: int | None = None) -> None:
    """Questions and answers until /quit or the end of the input; each question is asked with what was said."""
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    print("Ask a question. /reset forgets the conversation, /quit ends, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if question == "/reset":
            messages = []
            print("(forgotten)")
        elif question.startswith("/"):
            print(f"no such command: {question.split()[0]}; there are /reset and /quit")
        elif question:
            messages.append({"role": "user", "content": question})
            messages, dropped = fitting(messages, tokenizer, model.config.max_seq_len - 1)
            if dropped:
                print(f"({dropped} earlier messages no longer fit and are forgotten)")
            try:
                answer = reply(model, tokenizer, messages, config, sublayer)
            except ValueError as error:
                print(error)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def fitting(messages: list[dict[str, str]], tokenizer: Tokenizer, limit: int) -> tuple[list[dict[str, str]], int]:
    """The latest messages that leave half of the context for the answer, from a question on, and how many went."""
    kept = messages
    while len(kept) > 1 and len(tokenizer.chat(kept)) > limit // 2:
        kept = kept[2:]
    return kept, len(messages) - len(kept)
