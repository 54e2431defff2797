"""One evaluation from its files to its table. Results are saved as they come, and --resume continues them."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minidoctor.checkpoints.adapters import load
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.config import UserError, check, check_range
from minidoctor.evaluate.evaluation import Evaluation, prompt_rows, sha256
from minidoctor.evaluate.inputs import InputFile, find_dev_files, hash_adapter, list_files, read_files, take_rows
from minidoctor.evaluate.prompts import Prompter
from minidoctor.evaluate.protocol import EvalConfig, protocol_differences
from minidoctor.evaluate.records import Outcome, Prediction, read_result
from minidoctor.evaluate.table import format_summary
from minidoctor.files.json_files import write_json
from minidoctor.model import Model
from minidoctor.questions.rows import Row
from minidoctor.text.stream import printable

RULES = {
    "single_answer": "the option with the highest score, the first of equal ones",
    "multiple_answers": "every option whose score is at least the mean of the question's scores; these are the "
    "questions that have CMB's question type, elsewhere those with several letters in the answer",
    "text": "the bare question: no prompt, options or few-shot examples",
    "generate": "answer extraction without a default: an unreadable answer is unanswered and wrong",
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


def output_path(name: str, value: str) -> Path | None:
    if value and (not Path(value).parent.is_dir() or Path(value).is_dir()):
        raise UserError(f"--{name} {value}: must be a file in a directory that exists")
    return Path(value) if value else None


def make_protocol(
    run: RunConfig, evaluation: Evaluation, dtype: torch.dtype, files: list[InputFile], dev: list[InputFile]
) -> dict[str, Any]:
    """Return the JSON form of everything that can change the results."""
    config, tokenizer = evaluation.prompter.config, evaluation.prompter.tokenizer
    return {
        "base": Path(run.base).resolve().name,
        "base_hash": checkpoint_hash(run.base),
        "adapter": hash_adapter(run.adapter) if run.adapter else None,
        "dtype": str(dtype).removeprefix("torch."),
        "chat_format": "raw" if config.raw else tokenizer.chat_format,
        "files": [file.to_json() for file in files],
        "dev": [file.to_json() for file in dev],
        "limit": run.limit,
        **{name: getattr(config, name) for name in ("prompt", "shots", "max_new_tokens")},
        "score": list(config.score),
        "rules": RULES,
        "first_prompts": {q.row.exam or "own": q.text for q in reversed(evaluation.questions)},
    }


def read_outcomes(path: Path, protocol: dict[str, Any], evaluation: Evaluation) -> list[dict[str, Outcome]]:
    """Return the outcomes of an unfinished result. Raises FileNotFoundError, or UserError for another evaluation."""
    result = read_result(path)
    if differences := protocol_differences(protocol, result.protocol):
        values = ", ".join(f"{key} {result.protocol.get(key)!r:.80}" for key in differences)
        raise UserError(f"--resume: {path} has another protocol: {values}; use its flags or another --out")
    hashes = [sha256(question.text) for question in evaluation.questions]
    same = [prediction.prompt_sha256 for prediction in result.predictions] == hashes
    check(same, f"--resume: {path} has other prompts: the file of --prompt or --dev has changed")
    return [prediction.outcomes for prediction in result.predictions]


def check_submission(rows: list[Row]) -> None:
    for row in rows:
        numbered = row.exam == "cmb" and row.id.isdecimal()
        check(numbered, f"--submission is for CMB's numbered test questions, {row.id!r:.40} is another one")


def make_submission(predictions: list[Prediction]) -> list[dict[str, Any]]:
    """Return CMB's official form: `[{"id": 1, "model_answer": "C"}, ...]`."""
    return [{"id": int(p.id), "model_answer": p.prediction or ""} for p in predictions]


def save_result(out: Path | None, protocol: dict[str, Any], evaluation: Evaluation, complete: bool) -> None:
    if out:
        summary, predictions = evaluation.result()
        content = {"complete": complete, "protocol": protocol, "summary": asdict(summary)}
        write_json(out, content | {"predictions": [asdict(prediction) for prediction in predictions]})


def answer_questions(evaluation: Evaluation, model: Model, run: RunConfig, save: Callable[[], None]) -> None:
    """Answer all questions. If that fails or Ctrl-C stops it, save what is done and print how to continue."""
    save()  # an --out that cannot be written fails before hours of work
    try:
        evaluation.answer(model, save=save)
    except BaseException:
        print(f"{format_summary(evaluation.result().summary)}\nstopped: these are the longest questions only")
        save()
        if run.out:
            command = ["python", "-m", "minidoctor.evaluate", *sys.argv[1:], *([] if run.resume else ["--resume"])]
            print(f"continue with: {shlex.join(command)}")
        raise


def run_evaluation(run: RunConfig, config: EvalConfig) -> None:
    """Evaluate and print the table. Raises FileNotFoundError or UserError."""
    out, submission = output_path("out", run.out), output_path("submission", run.submission)
    device = choose_device(run.device)
    dtype = choose_dtype(run.dtype, device)
    files = read_files(list_files(run.data), run.answers)
    rows = take_rows(files, run.limit)
    if submission:
        check_submission(rows)
    dev = read_files(list_files(run.dev) or find_dev_files(list_files(run.data))) if config.shots else []
    model, tokenizer = load(run.base, run.adapter, dtype, device, run.chat_format, chats=not config.raw)
    prompter = Prompter(tokenizer, config)
    questions = prompt_rows(prompter, rows, take_rows(dev, 0), model.config.max_seq_len)
    evaluation = Evaluation(prompter, questions, [{} for _ in questions])
    protocol = make_protocol(run, evaluation, dtype, files, dev)
    if out and run.resume:
        evaluation.outcomes = read_outcomes(out, protocol, evaluation)
    elif out and out.exists() and not read_result(out).complete:
        raise UserError(f"{out}: an unfinished evaluation; continue it with --resume or choose another --out")
    print(f"{run.base}: {tokenizer.note}", file=sys.stderr)
    print("For teaching and measuring. The answers of a model are not medical advice.")
    for exam, text in protocol["first_prompts"].items():
        print(f"first prompt ({exam}):\n{printable(text)}\n")
    answer_questions(evaluation, model, run, lambda: save_result(out, protocol, evaluation, complete=False))
    summary, predictions = evaluation.result()
    print(format_summary(summary))
    for file in (*files, *dev):
        malformed = file.questions.malformed
        print(f"{file.path.name}: {len(file.questions.rows)} questions, {len(malformed)} malformed")
        print("".join(f"    {message}\n" for message in malformed[:10]), end="")
    if out:
        save_result(out, protocol, evaluation, complete=True)
        print(f"predictions: {out}")
    if submission:
        write_json(submission, make_submission(predictions))
        print(f"submission form for CMB: {submission}")
