"""An evaluation: each question is answered by its scoring methods, judged, and becomes a prediction.

The first method that applies to a question is its headline. Outcomes are kept by question and method, so that an
interrupted evaluation continues with the missing ones.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tqdm import tqdm

from minidoctor.checkpoints.hugging_face import find_non_finite
from minidoctor.config import UserError
from minidoctor.evaluate.extraction import read_letters
from minidoctor.evaluate.free_form import contains
from minidoctor.evaluate.prompts import PromptedQuestion, Prompter, choose_shots
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.records import Outcome, Prediction
from minidoctor.evaluate.scoring import SCORERS, decide
from minidoctor.evaluate.summary import Summary, full_summary
from minidoctor.generate import NonFiniteLogits
from minidoctor.model import Model
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer

SAVE_INTERVAL = 60  # seconds
ROW_FIELDS = ("id", "exam", "topic", "language", "multiple_answers", "metadata")  # copied to the prediction


class Result(NamedTuple):
    summary: Summary
    predictions: list[Prediction]


def applicable_methods(config: EvalConfig, row: Row) -> list[str]:
    """Return the scoring methods that apply to a row, its headline first.

    By default the headline of the user's questions is `text`: a small base model can recall facts long before it can
    point at an option by its letter.
    """
    auto = ["logits"] if row.exam else ["text", "logits", *([] if config.raw else ["loss"])]
    methods = dict.fromkeys(name for method in config.score for name in (auto if method == "auto" else [method]))
    if not row.options:
        methods = dict.fromkeys(["generate", *(method for method in methods if method == "loss")])
    return [method for method in methods if method != "loss" or row.answer]


def judge(row: Row, outcome: Outcome) -> Outcome:
    """Return the outcome with its prediction, and whether that is correct. Letters are compared as a set."""
    if outcome.nll is not None:
        return outcome
    reply = outcome.reply or ""
    if not row.options:
        return replace(outcome, prediction=reply, correct=contains(reply, row.answer))
    generated = outcome.reply is not None
    letters = read_letters(reply, row.options) if generated else decide(outcome.scores, row.multiple_answers)
    correct = set(letters) == set(row.answer) if row.answer else None
    return replace(outcome, prediction="".join(sorted(letters)), correct=correct)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_prediction(question: PromptedQuestion, config: EvalConfig, outcomes: dict[str, Outcome]) -> Prediction:
    row = question.row
    headline = applicable_methods(config, row)[0]
    outcome = outcomes.get(headline)
    return Prediction(
        **{name: getattr(row, name) for name in ROW_FIELDS},
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
        shots=question.shots,
        file=question.file,
        trained_on=question.trained_on,
    )


def prompt_rows(
    prompter: Prompter, rows: Sequence[Row], pool: Sequence[Row], context: int, show: bool = True
) -> list[PromptedQuestion]:
    """Return the prompts of all rows for a model with this context length, with few-shot examples from `pool`."""
    config = prompter.config
    # Room for the answer is worth more than another example.
    limit = max(1, context - config.max_new_tokens) if "generate" in config.score else context
    progress = tqdm(rows, desc="prompts", leave=False, disable=not show, delay=2)
    return [prompter.prompt_question(row, choose_shots(row, pool, config.shots), limit) for row in progress]


@dataclass
class Evaluation:
    """The questions of an evaluation, and the outcomes so far: of each question, by method."""

    prompter: Prompter
    questions: list[PromptedQuestion]
    outcomes: list[dict[str, Outcome]]

    def answer(self, model: Model, show: bool = True, save: Callable[[], None] = lambda: None) -> None:
        """Add the missing outcomes, longest questions first. Call `save` once a minute; Ctrl-C may interrupt.

        Raises UserError with the name of a tensor of the model that is not finite.
        """
        try:
            self.add_outcomes(model, show, save)
        except NonFiniteLogits as error:
            tensor = find_non_finite(model)
            cause = f"{tensor} contains NaN or infinity" if tensor else "an overflow; try --dtype float32"
            raise UserError(f"{error}: {cause}") from None

    def add_outcomes(self, model: Model, show: bool, save: Callable[[], None]) -> None:
        todo = {method: self.missing(method) for method in SCORERS}
        saved = time.monotonic()
        with tqdm(total=sum(map(len, todo.values())), desc="evaluating", leave=False, disable=not show) as progress:
            for method, indices in todo.items():
                marks: list[bool] = []
                for k, outcomes in SCORERS[method](model, self.prompter, [self.questions[i] for i in indices]):
                    row, done = self.questions[indices[k]].row, self.outcomes[indices[k]]
                    done |= {name: judge(row, outcome) for name, outcome in outcomes.items()}
                    marks += [] if done[method].correct is None else [bool(done[method].correct)]
                    progress.update()
                    if marks:
                        progress.set_postfix_str(f"{method} {sum(marks) / len(marks):.1%}", refresh=False)
                    if time.monotonic() - saved > SAVE_INTERVAL:
                        save()
                        saved = time.monotonic()

    def missing(self, method: str) -> list[int]:
        """Return the indices of the questions that the method applies to and that have no outcome of it yet."""
        config = self.prompter.config
        return [
            i
            for i, question in enumerate(self.questions)
            if method in applicable_methods(config, question.row) and method not in self.outcomes[i]
        ]

    def result(self) -> Result:
        pairs = zip(self.questions, self.outcomes, strict=True)
        predictions = [make_prediction(question, self.prompter.config, outcomes) for question, outcomes in pairs]
        return Result(full_summary(predictions), predictions)


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    show_progress: bool = True,
    config: EvalConfig = EvalConfig(),  # noqa: B008  # frozen
    pool: Sequence[Row] = (),
) -> Result:
    """Return the predictions for all rows and their summary; few-shot examples are taken from `pool`."""
    prompter = Prompter(tokenizer, config)
    questions = prompt_rows(prompter, rows, pool, model.config.max_seq_len, show_progress)
    evaluation = Evaluation(prompter, questions, [{} for _ in questions])
    evaluation.answer(model, show_progress)
    return evaluation.result()
