"""Answers in a terminal: one answer printed while it is generated, or a chat."""

import codecs
import contextlib
import io
import sys
import unicodedata
from collections.abc import Iterator

from minidoctor.checkpoints.hugging_face import explain_non_finite
from minidoctor.config import SampleConfig, UserError
from minidoctor.generate import NonFiniteLogits, generate
from minidoctor.model import Model
from minidoctor.picture.terminal import question_start, routing_text
from minidoctor.text.stream import TextStream, printable
from minidoctor.text.tokenizer import Tokenizer

WARNING = "For teaching only. This is not medical advice; ask a doctor."
GREETING = """Ask a question. /reset starts a new conversation, /quit ends, Ctrl-C stops an answer. Examples:
    What is the key test for gout?      How is asthma treated?
    痛风的首选治疗是什么？              哮喘的典型症状是什么？"""


def generate_finite(
    model: Model, tokenizer: Tokenizer, prompts: list[list[int]], config: SampleConfig
) -> Iterator[list[int | None]]:
    """Generate until an end-of-answer token. Raises UserError if the logits are not finite."""
    try:
        yield from generate(model, prompts, config, tokenizer.eos_ids)
    except NonFiniteLogits as error:
        raise UserError(f"{error}: {explain_non_finite(model)}") from None


def answer_limit(model: Model, prompt: list[int], config: SampleConfig) -> int:
    """Return the maximum length of the answer in tokens. An answer of this length may be incomplete."""
    return min(config.max_new_tokens, model.config.max_seq_len - len(prompt))


def is_readable(text: str) -> bool:
    """Return whether the text has a letter, number, punctuation mark or symbol, other than those for unknown bytes."""
    return any(unicodedata.category(char)[0] in "LNPS" and char not in "\ufffd⁇" for char in text)


def stream(model: Model, tokenizer: Tokenizer, prompt: list[int], config: SampleConfig) -> tuple[str, list[int]]:
    """Print the answer while it is generated, and return its text and tokens. Ctrl-C ends it early."""
    decoder, text, tokens = TextStream(tokenizer), "", list[int]()
    with contextlib.suppress(KeyboardInterrupt):
        for (token,) in generate_finite(model, tokenizer, [prompt], config):
            if token is not None:
                tokens.append(token)
                chunk = decoder.push(token)
                text += chunk
                print(printable(chunk), end="", flush=True)
    rest = decoder.rest()
    print(printable(rest) + ("" if is_readable(text + rest) else "(empty answer)"))
    if len(tokens) == answer_limit(model, prompt, config):
        context = len(tokens) < config.max_new_tokens
        limit = f"the context of {model.config.max_seq_len}" if context else f"--max-new-tokens {config.max_new_tokens}"
        print(f"(the answer ended at {limit} and may be incomplete)", file=sys.stderr)
    return text + rest, tokens


def reply(
    model: Model, tokenizer: Tokenizer, messages: list[dict[str, str]], config: SampleConfig, sublayer: int | None
) -> str:
    """Print and return the answer to the last message. With a sublayer, print the routing of both."""
    prompt = tokenizer.chat(messages)
    answer, tokens = stream(model, tokenizer, prompt, config)
    if sublayer is not None:
        print_routing(model, tokenizer, prompt + tokens, question_start(tokenizer, messages), sublayer)
    return answer


def print_routing(model: Model, tokenizer: Tokenizer, tokens: list[int], start: int, sublayer: int) -> None:
    print("\n" + routing_text(model, tokenizer, tokens, start, sublayer, colour=sys.stdout.isatty()))


def truncate_history(messages: list[dict[str, str]], tokenizer: Tokenizer, limit: int) -> list[dict[str, str]]:
    """Drop the earliest turns until the prompt has at most `limit` tokens. The last message always stays."""
    while len(messages) > 1 and len(tokenizer.chat(messages)) > limit:
        messages = messages[2:]
    return messages


def read_undecodable() -> None:
    """Let stdin replace bytes that it cannot decode, and read UTF-8 where the locale has only ASCII."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def chat(model: Model, tokenizer: Tokenizer, config: SampleConfig, sublayer: int | None = None) -> None:
    """Answer questions from stdin until /quit or its end. The prompt contains the conversation so far."""
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    read_undecodable()
    print(GREETING)
    history: list[dict[str, str]] = []
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
            history = []
            print("(new conversation)")
        elif question.startswith("/"):
            print(f"unknown command {question.split()[0]!r:.40}; the commands are /reset and /quit")
        elif question:
            if "\ufffd" in question:
                print("(some bytes of the question could not be decoded and were replaced)")
            asked = [*history, {"role": "user", "content": question}]
            # Half of the context is left for the answer.
            messages = truncate_history(asked, tokenizer, model.config.max_seq_len // 2)
            if len(messages) < len(asked):
                print(f"(the first {len(asked) - len(messages)} messages no longer fit into the context)")
            try:
                answer = reply(model, tokenizer, messages, config, sublayer)
            except UserError as error:  # a question that is too long, for example; the conversation stays as it was
                print(error)
            else:
                history = [*messages, {"role": "assistant", "content": answer}]
