"""The data of a run: the questions to learn as tokens and targets, and the questions of the evaluation."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.batching import IGNORE, Example
from minidoctor.config import LARGEST, TrainConfig, check
from minidoctor.files.json_files import read_bytes
from minidoctor.questions.overlap import question_hash, training_hashes
from minidoctor.questions.read import list_question_files, read_questions
from minidoctor.questions.rows import Row, add_explanation
from minidoctor.text.tokenizer import Tokenizer, encode_conversation


class TrainingData(NamedTuple):
    """The content of `--data`, tokenized, and of `--eval`."""

    examples: list[Example]
    question_hashes: Tensor  # int64, sorted and unique: every question that the examples teach
    eval_rows: list[Row]
    eval_trained: int  # number of eval_rows whose question is also in the examples


def hash_files(path: str) -> str:
    """Return a hash of the content of a file, or of all question files of a directory; "" for no path."""
    digest = hashlib.sha256()
    for file in list_question_files(path) if path else ():
        digest.update(hashlib.sha256(read_bytes(file)).digest())
    return digest.hexdigest() if path else ""


def read_rows(path: str) -> list[Row]:
    """Read the questions of a file or directory and print which malformed rows were skipped."""
    questions = read_questions(path)
    for message in questions.malformed[:5]:
        print(f"skipped: {message}")
    if len(questions.malformed) > 5:
        print(f"skipped: {len(questions.malformed) - 5} more malformed rows of {path}")
    return questions.rows


def select_rows(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """Return the rows to learn and the rows to evaluate, and print the skipped rows and the overlap."""
    rows, eval_rows = read_rows(config.data), read_rows(config.eval) if config.eval else []
    n_rows = len(rows)
    rows = [row for row in rows if row.messages[-1]["role"] == "assistant"]
    if len(rows) < n_rows:
        print(f"skipped: {n_rows - len(rows)} questions of {config.data} without an answer")
    eval_hashes = {question_hash(row) for row in eval_rows}
    not_in_eval = [row for row in rows if eval_hashes.isdisjoint(training_hashes(row))]
    overlap = f"{len(rows) - len(not_in_eval)} of {len(rows)} questions of {config.data} are also in {config.eval}"
    if config.leave_out_eval:
        print(f"skipped: {overlap}")
        rows = not_in_eval
    elif len(not_in_eval) < len(rows):
        print(f"WARNING: {overlap}. Accuracy on them measures memory; --leave-out-eval skips them in training")
    check(bool(rows), f"{config.data}: no question is left to train on")
    return rows, eval_rows


def load_data(config: TrainConfig, tokenizer: Tokenizer, context: int) -> TrainingData:
    """Read and tokenize the data, and print the skipped rows and the truncated answers.

    `context` is the longest sequence of the base model. Raises FileNotFoundError or UserError.
    """
    rows, eval_rows = select_rows(config)
    limit, needed, n_truncated = config.max_seq_len, 0, 0
    examples, hashes = list[Example](), set[int]()
    for row in rows:
        messages = add_explanation(row) if config.explain else row.messages
        tokens, targets = encode_conversation(messages, tokenizer, LARGEST)
        n_truncated += len(tokens) > limit
        needed = max(needed, len(tokens))
        if max(targets[:limit]) != IGNORE:
            examples.append(Example(tokens[:limit], targets[:limit]))
            hashes |= training_hashes(row)
    if n_truncated:
        print(f"{n_truncated} of {len(rows)} answers are truncated at --max-seq-len {limit}; {needed} would keep all")
    if len(examples) < len(rows):
        print(f"skipped: {len(rows) - len(examples)} of {len(rows)} rows, whose answers begin after --max-seq-len")
    check(bool(examples), f"{config.data}: no answer begins within --max-seq-len {limit}")
    check(
        min(needed, limit) <= context,
        f"{config.data}: an example has {min(needed, limit)} tokens, the context of {config.base} is {context}; "
        f"lower --max-seq-len to {context}",
    )
    n_shared = sum(question_hash(row) in hashes for row in eval_rows)
    return TrainingData(examples, torch.tensor(sorted(hashes)), eval_rows, n_shared)
