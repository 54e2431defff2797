"""One evaluation from its files to its table. Results are saved as they come, and --resume continues them."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidoctor.checkpoints.adapters import load
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.processes import Processes
from minidoctor.config import UserError, check, check_range
from minidoctor.evaluate.evaluation import Evaluation, prompt_rows, sha256
from minidoctor.evaluate.free_form import RULE
from minidoctor.evaluate.inputs import (
    InputFile,
    find_dev_files,
    hash_adapter,
    list_files,
    read_files,
    read_training_hashes,
)
from minidoctor.evaluate.prompts import Prompter
from minidoctor.evaluate.protocol import EvalConfig, protocol_differences
from minidoctor.evaluate.records import ResultFile, read_result
from minidoctor.evaluate.table import format_summary
from minidoctor.files.json_files import write_json
from minidoctor.model import Model
from minidoctor.questions.overlap import question_hash
from minidoctor.text.stream import printable

RULES = {
    "single_answer": "the option with the highest score, the first of equal ones",
    "multiple_answers": "every option whose score is at least the mean of the question's scores",
    "text": "the bare question: no prompt, options or few-shot examples",
    "generate": "an answer without readable letters is unanswered and wrong",
    "free_form": RULE,
}


@dataclass(frozen=True)
class RunConfig:
    """The model and the files of an evaluation."""

    base: str
    adapter: str | None
    chat_format: str
    device: str
    dtype: str
    data: list[str]
    dev: list[str]  # files of few-shot examples
    answers: str  # CMB's file of answers, or ""
    limit: int  # questions of each file, 0: all
    out: str  # result file, or ""
    resume: bool
    submission: str  # CMB's submission form, or ""

    def __post_init__(self) -> None:
        check_range(self, "limit", low=0)
        check(not (self.submission and self.limit), "--submission needs all questions: omit --limit")
        check(bool(self.out) or not self.resume, "--resume needs --out, the unfinished result to continue")
        check(not self.answers or len(list_files(self.data)) == 1, "--answers belongs to a single --data file, CMB's")


def output_path(run: RunConfig, name: str) -> Path | None:
    """Return the file that a flag asks to write. Raises UserError if it exists: outputs never replace a file."""
    value = getattr(run, name)
    path = Path(os.path.realpath(value))  # of the target of a symlink, and in one spelling
    if not value or (name == "out" and run.resume):
        return path if value else None
    check(path.parent.is_dir(), f"--{name} {value}: the directory does not exist")
    hint = "; --resume continues an unfinished evaluation" if name == "out" else ""
    check(not os.path.lexists(path), f"--{name} {value}: already exists; choose another file{hint}")
    return path


def make_protocol(
    run: RunConfig, evaluation: Evaluation, model: Model, files: list[InputFile], dev: list[InputFile]
) -> dict[str, Any]:
    """Return the JSON form of everything that can change the results."""
    config, tokenizer = evaluation.prompter.config, evaluation.prompter.tokenizer
    return {
        "base": Path(run.base).resolve().name,
        "base_hash": checkpoint_hash(run.base),
        "adapter": hash_adapter(run.adapter) if run.adapter else None,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "chat_format": "raw" if config.raw else tokenizer.chat_format,
        "files": [file.to_json() for file in files],
        "dev": [file.to_json() for file in dev],
        "limit": run.limit,
        **{name: getattr(config, name) for name in ("prompt", "shots", "max_new_tokens")},
        "score": list(config.score),
        "rules": RULES,
        "first_prompts": {q.row.exam or "own": q.text for q in reversed(evaluation.questions)},
    }


def load_evaluation(
    run: RunConfig, config: EvalConfig, files: list[InputFile], dev: list[InputFile]
) -> tuple[Model, Evaluation]:
    """Load the model and prompt all questions."""
    device = choose_device(run.device)
    dtype = choose_dtype(run.dtype, device)
    model, tokenizer = load(run.base, run.adapter, dtype, device, run.chat_format, chats=not config.raw)
    prompter, context = Prompter(tokenizer, config), model.config.max_seq_len
    pool = [row for file in dev for row in file.questions.rows]
    hashes = read_training_hashes(run.adapter) if run.adapter else None
    questions = []
    for file in files:
        for question in prompt_rows(prompter, file.questions.rows[: run.limit or None], pool, context):
            trained_on = None if hashes is None else question_hash(question.row) in hashes
            questions.append(question._replace(file=file.label, trained_on=trained_on))
    evaluation = Evaluation(prompter, questions, [{} for _ in questions])
    evaluation.protocol = make_protocol(run, evaluation, model, files, dev)
    return model, evaluation


def resume(run: RunConfig, unfinished: ResultFile, evaluation: Evaluation) -> None:
    """Take the outcomes of an unfinished result. Raises UserError if it belongs to another evaluation."""
    if differences := protocol_differences(evaluation.protocol, unfinished.protocol):
        values = ", ".join(f"{key} {unfinished.protocol.get(key)!r:.80}" for key in differences)
        raise UserError(f"--resume: {run.out} has another protocol: {values}; use its flags or another --out")
    hashes = [sha256(question.text) for question in evaluation.questions]
    same = [prediction.prompt_sha256 for prediction in unfinished.predictions] == hashes
    check(same, f"--resume: {run.out} has other prompts: the file of --prompt or --dev has changed")
    evaluation.outcomes = [prediction.outcomes for prediction in unfinished.predictions]


def answer_questions(run: RunConfig, model: Model, evaluation: Evaluation, processes: Processes) -> None:
    """Answer all questions. If that ends early, print and save the outcomes so far, and how to continue."""
    evaluation.save()  # a full disk shows before hours of work
    try:
        evaluation.answer(model, processes=processes)
    except BaseException:
        try:
            print(f"{format_summary(evaluation.result().summary)}\nstopped: these are the longest questions only")
            command = ["python", "-m", "minidoctor.evaluate", *sys.argv[1:], *([] if run.resume else ["--resume"])]
            print(f"continue with: {shlex.join(command)}" if run.out else "not saved: there is no --out")
        finally:
            evaluation.save()
        raise


def run_evaluation(run: RunConfig, config: EvalConfig, processes: Processes) -> None:
    """Evaluate, print the table and write the results. Raises FileNotFoundError or UserError.

    With several processes, only the first writes and prints.
    """
    out, submission = (output_path(run, name) if processes.is_first else None for name in ("out", "submission"))
    check(out is None or out != submission, "--out and --submission are the same file")
    unfinished = read_result(Path(run.out)) if run.resume else None
    check(not (unfinished and unfinished.complete), f"--resume: {run.out} is complete; choose another --out")
    paths = list_files(run.data)
    files = read_files(paths, run.answers)
    ids = [row.id if row.exam == "cmb" else "" for file in files for row in file.questions.rows]
    check(not submission or all(map(str.isdecimal, ids)), "--submission is for CMB's numbered test questions")
    dev = read_files(list_files(run.dev) or find_dev_files(paths)) if config.shots else []
    model, evaluation = load_evaluation(run, config, files, dev)
    evaluation.out = out
    if unfinished:
        resume(run, unfinished, evaluation)
    print(f"{run.base}: {evaluation.prompter.tokenizer.note}", file=sys.stderr)
    print("For teaching and measuring. The answers of a model are not medical advice.")
    for exam, text in evaluation.protocol["first_prompts"].items():
        print(f"first prompt ({exam}):\n{printable(text)}\n")
    answer_questions(run, model, evaluation, processes)
    summary, predictions = evaluation.result()
    try:
        print(format_summary(summary))
        if run.adapter and None in (p.trained_on for p in predictions):
            print(f"{run.adapter}: the adapter does not record its training questions")
        for file in (*files, *dev):
            malformed = file.questions.malformed
            print(f"{file.label}: {len(file.questions.rows)} questions, {len(malformed)} malformed")
            print("".join(f"    {message}\n" for message in malformed[:10]), end="")
    finally:
        evaluation.save()
        if submission:  # CMB's official form
            write_json(submission, [{"id": int(p.id), "model_answer": p.prediction or ""} for p in predictions])
        evaluation.save(complete=True)
    print("".join(f"written: {path}\n" for path in (run.out, run.submission) if path), end="")
