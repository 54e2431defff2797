"""From questions to predictions: each way of scoring asked, its answer judged, one row of the result for each question.

The first way that applies to a question is its headline: `prediction`, `correct` and `scores` of its row. The others
stand below "also". A run can be stopped at any place and go on, for what is known of a question is kept by way.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from minidoctor.evaluate.extraction import read_letters
from minidoctor.evaluate.prompts import Asker, Question, choose_shots
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.scoring import SCORERS, Outcome, decide
from minidoctor.evaluate.summary import Prediction, full_summary
from minidoctor.model import Model
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer

SAVE_EVERY = 60  # seconds
Found = dict[str, Outcome]  # by way of scoring: what is known of one question


def ways_of(config: EvalConfig, row: Row) -> list[str]:
    """The ways that apply to a row, the first for its headline.

    Where nothing was chosen, one's own questions go by text first: a small base knows facts long before it can
    point at them by letter.
    """
    auto = ["logits"] if row.exam else ["text", "logits", *([] if config.raw else ["loss"])]
    ways = dict.fromkeys(one for way in config.score for one in (auto if way == "auto" else [way]))
    if not row.options:
        ways = dict.fromkeys(["generate", *(way for way in ways if way == "loss")])
    return [way for way in ways if way != "loss" or row.answer]


def answer(
    model: Model,
    asker: Asker,
    questions: list[Question],
    config: EvalConfig,
    found: list[Found],
    show_progress: bool = True,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Adds to `found` what is not yet known of each question; calls `save` once a minute. Ctrl-C may stop it."""
    todo = {
        way: [i for i, (one, known) in enumerate(zip(questions, found, strict=True))
              if way in ways_of(config, one.row) and way not in known]
        for way in SCORERS
    }  # fmt: skip
    saved, right = time.monotonic(), Counter[str]()
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc="evaluating", leave=False, disable=not show_progress) as progress:
        for way, indices in todo.items():
            done = 0
            for k, outcomes in SCORERS[way](model, asker, [questions[i] for i in indices], config):
                i, row = indices[k], questions[indices[k]].row
                found[i] |= {name: judge(row, outcome) for name, outcome in outcomes.items()}
                correct = found[i][way].get("correct")
                done, right[way] = done + (correct is not None), right[way] + bool(correct)
                progress.update()
                if done:
                    progress.set_postfix_str(f"{way} {right[way] / done:.1%}", refresh=False)
                if time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()


def judge(row: Row, outcome: Outcome) -> Outcome:
    """The outcome with the prediction that it speaks for, "" if none, and whether it is right, None if nobody knows."""
    if "nll" in outcome:
        if not math.isfinite(outcome["nll"]):
            raise FloatingPointError(f"the loss of an answer is {outcome['nll']}, the model's weights are damaged")
        return outcome
    reply = outcome.get("reply")
    if not row.options:
        return outcome | {"prediction": reply or "", "correct": contains(reply or "", row.answer)}
    prediction = decide(outcome["scores"], row.multiple_answers) if reply is None else read_letters(reply, row.options)
    return outcome | {"prediction": prediction, "correct": prediction == row.answer if row.answer else None}


def contains(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply, upper or lower case, whatever the spaces."""
    return " ".join(answer.lower().split()) in " ".join(reply.lower().split())


def prediction_of(question: Question, config: EvalConfig, found: Found) -> Prediction:
    """One row of the result file. The headline way stands at the top, the others below "also"."""
    row, headline = question.row, ways_of(config, question.row)[0]
    known: dict[str, Any] = {"scoring": headline, **found[headline]} if headline in found else {}
    also = {way: outcome for way, outcome in found.items() if way not in (headline, "loss")}
    return {
        "id": row.id,
        **{"scoring": None, "prediction": None, "answer": row.answer, "correct": None, "scores": {}, **known},
        "also": also,
        **found.get("loss", {}),
        "exam": row.exam,
        "subject": row.topic,
        **row.metadata,
        "language": row.language,
        "several": row.multiple_answers,
        "n_options": len(row.options),
        "longest": max(row.options, key=lambda letter: len(row.options[letter]), default=""),
        "question_sha256": sha256(json.dumps([row.question, row.options])),
        "prompt_sha256": sha256(question.text),
        "shots": question.shots,
    }


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def known_from(prediction: Prediction) -> Found:
    """What a row of a result file knows: the other way round."""
    known: Found = dict(prediction["also"])
    if prediction["scoring"]:
        keys = ("prediction", "correct", "scores", "reply", "too_long")
        known[prediction["scoring"]] = {key: prediction[key] for key in keys if key in prediction}
    if "nll" in prediction:
        known["loss"] = {key: prediction[key] for key in ("nll", "n_tokens")}
    return known


def result_of(questions: list[Question], config: EvalConfig, found: list[Found]) -> dict[str, Any]:
    """`{"summary": {..., "languages": {...}, "exams": {...}}, "predictions": [...]}`."""
    predictions = [prediction_of(one, config, known) for one, known in zip(questions, found, strict=True)]
    return {"summary": full_summary(predictions), "predictions": predictions}


def put_questions(
    asker: Asker, rows: list[Row], pool: list[Row], config: EvalConfig, limit: int, show_progress: bool = True
) -> list[Question]:
    if "generate" in config.score:
        limit = max(1, limit - config.max_new_tokens)  # room for the answer counts more than another shot
    bar = tqdm(rows, desc="prompts", leave=False, disable=not show_progress, delay=2)
    return [asker.put(row, config.prompt, choose_shots(row, pool, config.shots), limit) for row in bar]


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    rows: list[Row],
    show_progress: bool = True,
    config: EvalConfig = EvalConfig(),  # noqa: B008  # frozen
    pool: Sequence[Row] = (),
) -> dict[str, Any]:
    """The result of all rows; solved questions are taken from `pool`."""
    asker = Asker(tokenizer, config.raw)
    questions = put_questions(asker, rows, list(pool), config, model.config.max_seq_len, show_progress)
    found: list[Found] = [{} for _ in rows]
    answer(model, asker, questions, config, found, show_progress)
    return result_of(questions, config, found)
