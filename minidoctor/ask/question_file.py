"""A file of questions, answered in batches. Each answer is written when it and those before it are complete."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minidoctor.ask.chat import answer_limit, generate_finite, is_readable
from minidoctor.config import SampleConfig, UserError, check
from minidoctor.files.json_files import format_json, parse_json, read_lines
from minidoctor.model import Model
from minidoctor.questions.json_rows import check_keys
from minidoctor.questions.rows import require_text
from minidoctor.text.tokenizer import Tokenizer


class Question(NamedTuple):
    text: str
    location: str  # "file:line"


def read_question_file(path: Path) -> list[Question]:
    """Read one question from each line that is not blank: its text, or "question" of a JSON object.

    Raises FileNotFoundError or UserError, with file and line.
    """
    questions = []
    for number, line in enumerate(read_lines(path, pipe=True), start=1):
        line = line.strip()
        try:
            check(line != "[" and not line.startswith("[{"), "a JSON list, expected one question per line")
            text = parse_question(line) if line.startswith("{") else line
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if text:
            questions.append(Question(text, f"{path}:{number}"))
    check(bool(questions), f"{path}: no questions")
    return questions


def parse_question(line: str) -> str:
    """Return "question" of a JSON object. Raises UserError, also for a key that would be lost, such as "options"."""
    record = parse_json(line)
    check_keys(record, {"question", "answer"}, "a question")
    return require_text(record, "question")


def count_answered(out: Path, questions: list[Question], resume: bool) -> int:
    """Return how many of the questions the file already answers, after removing an incomplete last row from it.

    Raises UserError if the file has content without `resume`, or anything but answers to these questions.
    """
    content = out.read_bytes() if out.is_file() else b""
    check(resume or not content, f"{out}: already exists; use --resume to continue it or choose another --out")
    *rows, tail = content.split(b"\n")
    rows_without_answer = (format_json({"question": question.text, "answer": ""}) for question in questions)
    starts = [row.removesuffix('"}').encode() for row in rows_without_answer]
    same = len(rows) + bool(tail) <= len(starts) and all(map(bytes.startswith, rows, starts))
    if same and tail:
        start = starts[len(rows)]
        same = tail[: len(start)] == start[: len(tail)]
    check(same, f"{out}: contains something else than answers to these questions; choose another --out")
    if tail:
        with out.open("r+b") as file:
            file.truncate(len(content) - len(tail))
    return len(rows)


def append(out: Path, text: str) -> None:
    """Append text and close the file, so that an answer that was generated is not lost. Raises OSError."""
    try:
        with out.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise type(error)(f"{out}: cannot be written ({error.strerror}); use --resume to continue it") from None


def answer_batch(
    model: Model, tokenizer: Tokenizer, prompts: list[list[int]], config: SampleConfig
) -> Iterator[list[int]]:
    """Yield the answers in the order of the prompts, each as soon as it and those before it are complete."""
    answers: list[list[int]] = [[] for _ in prompts]
    n_complete = 0
    for step in generate_finite(model, tokenizer, prompts, config):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
        while step[n_complete] is None:  # ends, because a step has a token for at least one prompt
            yield answers[n_complete]
            n_complete += 1
    yield from answers[n_complete:]


def answer_questions(
    model: Model,
    tokenizer: Tokenizer,
    questions: list[Question],
    n_answered: int,
    out: Path,
    batch_size: int,
    config: SampleConfig,
) -> None:
    """Append {"question", "answer"} for each question after the first n_answered, and "truncated": true at the limit.

    Raises UserError before the first answer if a question does not fit into the model's context.
    """
    prompts = [tokenizer.chat([{"role": "user", "content": question.text}]) for question in questions]
    limit, n_truncated, n_empty = model.config.max_seq_len, 0, 0
    for (_, location), prompt in zip(questions, prompts, strict=True):
        check(len(prompt) < limit, f"{location}: {len(prompt)} tokens; the context of {limit} includes the answer")
    append(out, "")  # a path that cannot be written is reported before the first answer
    with tqdm(total=len(questions), initial=n_answered, desc="answering") as progress:
        for start in range(0, len(questions), batch_size):
            if min(start + batch_size, len(questions)) <= n_answered:
                continue
            # An interrupted batch is generated again as a whole, because sampled answers depend on the batch.
            batch = answer_batch(model, tokenizer, prompts[start : start + batch_size], config)
            for i, tokens in enumerate(batch, start=start):
                if i < n_answered:
                    continue
                row: dict[str, Any] = {"question": questions[i].text, "answer": tokenizer.decode(tokens)}
                if len(tokens) == answer_limit(model, prompts[i], config):
                    row["truncated"] = True
                append(out, format_json(row) + "\n")
                n_truncated += "truncated" in row
                n_empty += not is_readable(row["answer"])
                progress.update()
    new = f"of the {len(questions) - n_answered} new answers" if n_answered else "answers"
    print(f"{n_truncated} {new} ended at --max-new-tokens or the context, {n_empty} are empty", file=sys.stderr)
    print(f"{len(questions)} answers: {out}", file=sys.stderr)  # stdout may be the file
