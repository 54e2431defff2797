"""An evaluation: each question is answered by its scoring methods, judged, and becomes a prediction.

The first method that applies to a question is its headline. Outcomes are kept by question and method, so that an
interrupted evaluation continues with the missing ones.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minidoctor.checkpoints.hugging_face import explain_non_finite
from minidoctor.cli.processes import Processes
from minidoctor.config import UserError
from minidoctor.evaluate.extraction import read_letters
from minidoctor.evaluate.free_form import contains
from minidoctor.evaluate.prompts import PromptedQuestion, Prompter, choose_shots
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.records import Outcome, Prediction
from minidoctor.evaluate.scoring import SCORERS, decide
from minidoctor.evaluate.summary import Summary, full_summary
from minidoctor.files.json_files import write_json
from minidoctor.generate import NonFiniteLogits
from minidoctor.model import Model
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer

SAVE_INTERVAL = 60  # seconds
ROUND = 256  # questions per process between two exchanges of the outcomes, if there are several processes


class Result(NamedTuple):
    summary: Summary
    predictions: list[Prediction]


def applicable_methods(config: EvalConfig, row: Row) -> list[str]:
    """Return the scoring methods that apply to a row, its headline first.

    By default the headline of the user's questions is `text`: a small base model can recall facts long before it can
    point at an option by its letter. That of a benchmark is the most probable answer in letters.
    """
    auto = ["text", "logits", *([] if config.raw else ["loss"])]
    if row.exam:
        auto = ["sets", "logits"] if row.multiple_answers else ["logits"]
    methods = dict.fromkeys(name for method in config.score for name in (auto if method == "auto" else [method]))
    if not row.options:
        methods = dict.fromkeys(["generate", *(method for method in methods if method == "loss")])
    return [method for method in methods if method != "loss" or row.answer]


def generating(config: EvalConfig) -> EvalConfig:
    """Return the configuration for a model that reasons: the token after its prompt does not answer the question."""
    return replace(config, score=tuple(dict.fromkeys("generate" if x == "auto" else x for x in config.score)))


def judge(row: Row, outcome: Outcome) -> Outcome:
    """Return the outcome with its prediction, and whether that is correct. Letters are compared as a set."""
    if outcome.nll is not None:
        return outcome
    reply = "" if outcome.unfinished else outcome.reply or ""
    if not row.options:
        return replace(outcome, prediction=outcome.reply or "", correct=contains(reply, row.answer))
    letters = read_letters(reply, row.options) if reply else decide(outcome.scores, row.multiple_answers)
    correct = set(letters) == set(row.answer) if row.answer else None
    return replace(outcome, prediction="".join(sorted(letters)), correct=correct)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_prediction(question: PromptedQuestion, config: EvalConfig, outcomes: dict[str, Outcome]) -> Prediction:
    row, copied = question.row, ("id", "exam", "topic", "kind", "language", "multiple_answers", "metadata")
    headline = applicable_methods(config, row)[0]
    outcome = outcomes.get(headline)
    return Prediction(
        **{name: getattr(row, name) for name in copied},
        **{name: getattr(question, name) for name in ("shots", "file", "trained_on")},
        answer="".join(sorted(row.answer)) if row.options else row.answer,
        prediction=outcome.prediction if outcome else None,
        correct=outcome.correct if outcome else None,
        scores=outcome.scores if outcome else {},
        scoring=headline if outcome else None,
        outcomes=outcomes,
        n_options=len(row.options),
        longest_option=max(row.options, key=lambda letter: len(row.options[letter]), default=""),
        question_sha256=sha256(json.dumps([row.question, row.options])),
        prompt_sha256=sha256(question.text),
    )


def prompt_rows(
    prompter: Prompter, rows: Sequence[Row], pool: Sequence[Row], context: int, show: bool = True
) -> list[PromptedQuestion]:
    """Return the prompts of all rows for a model with this context length, with few-shot examples from `pool`."""
    # Room for the answer is worth more than another example.
    limit = max(1, context - prompter.max_new_tokens) if "generate" in prompter.config.score else context
    progress = tqdm(rows, desc="prompts", leave=False, disable=not show, delay=2)
    return [prompter.prompt_question(row, choose_shots(row, pool, prompter.config.shots), limit) for row in progress]


@dataclass
class Evaluation:
    """An evaluation in progress: its questions, their outcomes by method, and the result file, if there is one."""

    prompter: Prompter
    questions: list[PromptedQuestion]
    outcomes: list[dict[str, Outcome]]
    out: Path | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def answer(self, model: Model, show: bool = True, processes: Processes = Processes()) -> None:  # noqa: B008
        """Add the missing outcomes, longest questions of a round first, and save once a minute. Ctrl-C may interrupt.

        Each process answers its share of the questions. After each round all have all outcomes, so that the first can
        save them. Raises UserError with the name of a tensor of the model that is not finite.
        """
        todo: dict[str, list[int]] = {method: [] for method in SCORERS}
        for i, question in enumerate(self.questions):
            for method in applicable_methods(self.prompter.config, question.row):
                todo[method] += [] if method in self.outcomes[i] else [i]
        size = processes.size * (ROUND if processes.size > 1 else max(1, len(self.questions)))
        rounds = [(method, part[i : i + size]) for method, part in todo.items() for i in range(0, len(part), size)]
        shares = [(method, indices[processes.rank :: processes.size]) for method, indices in rounds]
        saved, show = time.monotonic(), show and processes.is_first
        n_questions = sum(len(indices) for _, indices in shares)
        with tqdm(total=n_questions, desc="evaluating", leave=False, disable=not show) as progress:
            for method, indices in shares:
                marks: list[bool] = []
                for i in self.add_outcomes(model, method, indices):
                    correct = self.outcomes[i][method].correct
                    marks += [] if correct is None else [correct]
                    progress.set_postfix_str(f"{method} {sum(marks) / max(1, len(marks)):.1%}", refresh=False)
                    progress.update()
                    if time.monotonic() - saved > SAVE_INTERVAL:
                        self.save()
                        saved = time.monotonic()
                for share in processes.gather({i: self.outcomes[i] for i in indices}):
                    for i, outcomes in share.items():
                        self.outcomes[i] |= outcomes

    def add_outcomes(self, model: Model, method: str, indices: list[int]) -> Iterator[int]:
        """Add the outcomes of one method, and yield the index of each question that is done."""
        try:
            for k, outcomes in SCORERS[method](model, self.prompter, [self.questions[i] for i in indices]):
                row = self.questions[indices[k]].row
                self.outcomes[indices[k]] |= {name: judge(row, outcome) for name, outcome in outcomes.items()}
                yield indices[k]
        except NonFiniteLogits as error:
            raise UserError(f"{error}: {explain_non_finite(model)}") from None

    def result(self) -> Result:
        pairs = zip(self.questions, self.outcomes, strict=True)
        predictions = [make_prediction(question, self.prompter.config, outcomes) for question, outcomes in pairs]
        return Result(full_summary(predictions), predictions)

    def save(self, complete: bool = False) -> None:
        if self.out:
            summary, predictions = self.result()
            content = {"complete": complete, "protocol": self.protocol, "summary": asdict(summary)}
            write_json(self.out, content | {"predictions": [asdict(prediction) for prediction in predictions]})


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    show_progress: bool = True,
    config: EvalConfig = EvalConfig(),  # noqa: B008  # frozen
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> Result:
    """Return the predictions for all rows and their summary."""
    prompter = Prompter(tokenizer, config)
    if prompter.opens_reasoning:
        prompter.config = generating(config)
    questions = prompt_rows(prompter, rows, [], model.config.max_seq_len, show_progress)
    evaluation = Evaluation(prompter, questions, [{} for _ in questions])
    evaluation.answer(model, show_progress, processes)
    return evaluation.result()
