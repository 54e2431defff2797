"""Ask the model: one question from the command line, a file of them, or a chat when none is given.

python sample.py --adapter out "What is the key test for gout?"
python sample.py --adapter out                     chat; /reset forgets it, /quit ends, Ctrl-C stops an answer
python sample.py --base DIR --raw "Once upon"      go on with a text, no chat format
python sample.py --adapter out --show-routing "What is the key test for gout?"      and which expert each token went to
python sample.py --adapter out --questions q.txt --out answers.jsonl       one question a line, or {"question": "..."}
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

from minidoctor.checkpoint import load
from minidoctor.config import COMPILE, SampleConfig, add_flags, choose_device, choose_dtype, from_flags, run
from minidoctor.data import parse_json, text_of
from minidoctor.exams import read_text
from minidoctor.generate import complete, generate
from minidoctor.model import Model, compile_blocks
from minidoctor.routing_view import choose_sublayer, question_start, routing_text
from minidoctor.tokenizer import TextStream, Tokenizer, printable

WARNING = "For teaching only. This is not medical advice; ask a doctor."


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


def read_questions(path: Path) -> list[tuple[int, str]]:
    """Line number and question of each line that is not empty: its text, or the "question" of a JSON object.

    Raises FileNotFoundError or ValueError, with file and line.
    """
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            question = text_of(parse_json(line.encode()), "question") if line.lstrip().startswith("{") else line.strip()
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if question:
            questions.append((number, question))
    if not questions:
        raise ValueError(f"{path}: no questions")
    return questions


def answer_file(
    model: Model, tokenizer: Tokenizer, path: Path, out: Path, batch_size: int, config: SampleConfig
) -> None:
    """Writes {"question", "answer"} for each question, in the order of the file, as the batches are done.

    Raises ValueError before the first answer if a question does not fit into the model's context.
    """
    questions = read_questions(path)
    prompts = [tokenizer.chat([{"role": "user", "content": question}]) for _, question in questions]
    for (number, _), prompt in zip(questions, prompts, strict=True):
        if len(prompt) >= model.config.max_seq_len:
            raise ValueError(f"{path}:{number}: {len(prompt)} tokens, the model reads {model.config.max_seq_len}")
    if out.exists():
        raise ValueError(f"{out}: is there already; give another --out")
    window = 8 * batch_size  # among so many, like lengths are answered together
    with out.open("w", encoding="utf-8") as file, tqdm(total=len(questions), desc="answering") as progress:
        for start in range(0, len(questions), window):
            order = sorted(range(start, min(start + window, len(questions))), key=lambda i: len(prompts[i]))
            answers: dict[int, str] = {}
            for k in range(0, len(order), batch_size):
                chosen = order[k : k + batch_size]
                replies = complete(model, tokenizer, [prompts[i] for i in chosen], config)
                answers |= dict(zip(chosen, replies, strict=True))
                progress.update(len(chosen))
            for i in sorted(answers):
                row = {"question": questions[i][1], "answer": answers[i]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(questions)} answers: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="(none: a chat)")
    parser.add_argument("--base", default="data/base", help="checkpoint directory (default data/base)")
    parser.add_argument("--adapter", help="directory that train.py wrote (default: the base alone)")
    parser.add_argument("--raw", action="store_true", help="go on with QUESTION as text, without a chat format")
    parser.add_argument("--chat-format", default="auto", help="how conversations are written (auto: as trained)")
    parser.add_argument("--questions", help="answer the questions of a file: one a line, or JSON lines")
    parser.add_argument("--out", help="where the answers to --questions go, as JSON lines")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered at once (default 8)")
    parser.add_argument("--show-routing", action="store_true", help="show which expert each token went to first")
    parser.add_argument("--layer", type=int, help="layer that --show-routing looks at (default: the last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default auto)")
    parser.add_argument("--compile", action="store_true", help=COMPILE)
    add_flags(parser, SampleConfig)
    given = parser.parse_args()
    config = from_flags(SampleConfig, vars(given))
    if given.raw and given.question is None and not given.questions:
        raise ValueError('--raw needs a text to go on with (it may be empty: --raw "")')
    if given.question is not None and not given.question.strip() and not given.raw:
        raise ValueError("the question is empty")
    if bool(given.questions) != bool(given.out):
        raise ValueError("--questions FILE and --out FILE belong together")
    if given.questions and (given.question is not None or given.raw):
        raise ValueError("--questions asks those of the file: no QUESTION and no --raw beside it")
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    if given.show_routing and given.questions:
        raise ValueError("--show-routing shows answers that are printed, those to --questions go to a file")
    if given.show_routing and not given.adapter:
        raise ValueError("--show-routing needs an --adapter with experts: the base alone has no router")
    if given.layer is not None and not given.show_routing:
        raise ValueError("--layer is the one that --show-routing shows, and needs it")
    device = choose_device(given.device)
    dtype = choose_dtype(given.dtype, device)
    model, tokenizer = load(given.base, given.adapter, dtype, device, given.chat_format, chats=not given.raw)
    sublayer = choose_sublayer(model, given.layer) if given.show_routing else None
    if given.compile:
        compile_blocks(model)
    if given.raw:
        prompt = tokenizer.start + tokenizer.encode(given.question)
        _, tokens = stream(model, tokenizer, prompt, config)
        if sublayer is not None:
            show_routing(model, tokenizer, prompt + tokens, len(tokenizer.start), sublayer)
        return
    print(f"{given.base}: {tokenizer.note}\n{WARNING}", file=sys.stderr)
    if given.questions:
        answer_file(model, tokenizer, Path(given.questions), Path(given.out), given.batch_size, config)
    elif given.question is None:
        chat(model, tokenizer, config, sublayer)
    else:
        reply(model, tokenizer, [{"role": "user", "content": given.question}], config, sublayer)


if __name__ == "__main__":
    run(main)
