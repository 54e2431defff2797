"""One evaluation from its files to its table. Results are saved as they come, and --resume continues them."""

import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from minidoctor.checkpoints.adapters import load
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.processes import Processes
from minidoctor.config import UserError, check
from minidoctor.evaluate.evaluation import Evaluation, generating, prompt_rows, sha256
from minidoctor.evaluate.free_form import RULE
from minidoctor.evaluate.inputs import Inputs, RunConfig, hash_adapter, read_inputs, read_training_hashes
from minidoctor.evaluate.prompts import Prompter
from minidoctor.evaluate.protocol import EvalConfig, protocol_differences
from minidoctor.evaluate.records import ResultFile, read_result
from minidoctor.evaluate.report import DISCLAIMER, command, write_report
from minidoctor.evaluate.table import format_summary
from minidoctor.files.json_files import write_json
from minidoctor.model import Model
from minidoctor.questions.overlap import question_hash, training_hashes
from minidoctor.text.stream import printable

MAX_PROMPT = 2000  # characters of the first prompt that are printed
RULES = {
    "headline": "auto: for a benchmark logits or, if several letters are correct, sets: exact match asks for one set",
    "single_answer": "the option with the highest score, the first of equal ones",
    "multiple_answers": "sets: the set with the highest score; otherwise every option of at least the mean score",
    "text": "the bare question: no prompt, options or few-shot examples",
    "generate": "an answer without readable letters is unanswered, one without a final part unfinished; both are wrong",
    "free_form": RULE,
}


def output_path(run: RunConfig, name: str) -> Path | None:
    """Return the path that a flag asks to write. Raises UserError if it exists: outputs never replace a file."""
    value = getattr(run, name)
    path = Path(os.path.realpath(value))  # of the target of a symlink, and in one spelling
    if not value or (name == "out" and run.resume):
        return path if value else None
    check(path.parent.is_dir(), f"--{name} {value}: the directory does not exist")
    hint = "; --resume continues an unfinished evaluation" if name == "out" else ""
    check(not os.path.lexists(path), f"--{name} {value}: already exists; choose another name{hint}")
    return path


def make_protocol(run: RunConfig, evaluation: Evaluation, model: Model, inputs: Inputs) -> dict[str, Any]:
    """Return the JSON form of everything that can change the results."""
    prompter = evaluation.prompter
    config = prompter.config
    quantized = "" if run.quantize == "none" else f", {run.quantize}"
    return {
        "base": Path(run.base).resolve().name,
        "base_hash": checkpoint_hash(run.base),
        "adapter": hash_adapter(run.adapter) if run.adapter else None,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch.") + quantized,
        "chat_format": "raw" if config.raw else prompter.tokenizer.chat_format,
        "thinking": run.thinking,
        **{key: [file.to_json() for file in files] for key, files in inputs._asdict().items()},
        "subjects": [file.subject for file in inputs.files if file.subject],
        "limit": run.limit,
        **{name: getattr(config, name) for name in ("prompt", "shots")},
        "max_new_tokens": prompter.max_new_tokens,
        "score": list(config.score),
        "rules": RULES,
        "first_prompts": {q.row.exam or "own": q.text for q in reversed(evaluation.questions)},
    }


def load_evaluation(run: RunConfig, config: EvalConfig, inputs: Inputs) -> tuple[Model, Evaluation]:
    """Load the model and prompt all questions."""
    device = choose_device(run.device)
    dtype = choose_dtype(run.dtype, device)
    settings = run.chat_format, not config.raw, run.thinking, run.quantize
    model, tokenizer = load(run.base, run.adapter, dtype, device, *settings)
    prompter, context = Prompter(tokenizer, config), model.config.max_seq_len
    if run.thinking or prompter.opens_reasoning:
        prompter.config = generating(config)
    pool = [row for file in inputs.dev for row in file.questions.rows]
    hashes = read_training_hashes(run.adapter) if run.adapter else None
    for file in inputs.train_questions:
        hashes = (hashes or set()).union(*map(training_hashes, file.questions.rows))
    questions = []
    for file in inputs.files:
        for question in prompt_rows(prompter, file.questions.rows[: run.limit or None], pool, context):
            trained_on = None if hashes is None else question_hash(question.row) in hashes
            questions.append(question._replace(file=file.label, trained_on=trained_on))
    evaluation = Evaluation(prompter, questions, [{} for _ in questions])
    evaluation.protocol = make_protocol(run, evaluation, model, inputs)
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
            print(f"{format_summary(evaluation.result().summary)}\nstopped: these questions are no random sample")
            again = command(processes.size, resume=True)
            print(f"continue with: {again}" if run.out else "not saved: there is no --out")
        finally:
            evaluation.save()
        raise


def run_evaluation(run: RunConfig, config: EvalConfig, processes: Processes) -> None:
    """Evaluate, print the table and write the results. Raises FileNotFoundError or UserError.

    With several processes, only the first writes and prints.
    """
    names = ("out", "submission", "report")
    out, submission, report = (output_path(run, name) if processes.is_first else None for name in names)
    outputs = [path for path in (out, submission, report) if path]
    check(len(set(outputs)) == len(outputs), "two of --out, --submission and --report have the same path")
    unfinished = read_result(Path(run.out)) if run.resume else None
    check(not (unfinished and unfinished.complete), f"--resume: {run.out} is complete; choose another --out")
    inputs = read_inputs(run, config.shots)
    ids = [row.id if row.exam == "cmb" else "" for file in inputs.files for row in file.questions.rows]
    check(not submission or all(map(str.isdecimal, ids)), "--submission is for CMB's numbered test questions")
    model, evaluation = load_evaluation(run, config, inputs)
    evaluation.out = out
    if unfinished:
        resume(run, unfinished, evaluation)
    print(f"{run.base}: {evaluation.prompter.tokenizer.note}", file=sys.stderr)
    print(DISCLAIMER)
    if subjects := evaluation.protocol["subjects"]:
        print(f"{len(subjects)} subjects of CMMLU ({run.subjects}): {', '.join(subjects)}")
    for exam, text in evaluation.protocol["first_prompts"].items():
        cut = f"\n... {len(text) - MAX_PROMPT:,} more characters" if len(text) > MAX_PROMPT else ""
        print(f"first prompt ({exam}):\n{printable(text[:MAX_PROMPT])}{cut}\n")
    answer_questions(run, model, evaluation, processes)
    summary, predictions = evaluation.result()
    try:
        print(format_summary(summary))
        if run.adapter and None in (p.trained_on for p in predictions):
            print(f"{run.adapter}: the adapter does not record its training questions")
        for file in chain(*inputs):
            malformed = file.questions.malformed
            print(f"{file.label}: {len(file.questions.rows)} questions, {len(malformed)} malformed")
            print("".join(f"    {message}\n" for message in malformed[:10]), end="")
    finally:
        evaluation.save()
        if submission:  # CMB's official form
            write_json(submission, [{"id": int(p.id), "model_answer": p.prediction or ""} for p in predictions])
        if report:
            write_report(report, evaluation.protocol, format_summary(summary))
        evaluation.save(complete=True)
    print("".join(f"written: {path}\n" for path in (run.out, run.submission, run.report) if path), end="")
