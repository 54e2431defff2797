"""The records of a result file: the outcome of each scoring method for a question, and the question's prediction."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import UserError
from minidoctor.files.json_files import from_json, read_object


@dataclass(frozen=True)
class Outcome:
    """The result of one scoring method for one question."""

    scores: dict[str, float] = field(default_factory=dict)  # of each option or set of options, in nats
    reply: str | None = None  # the generated answer
    nll: float | None = None  # of the correct answer, summed over n_tokens, in nats
    n_tokens: int = 0
    too_long: bool = False  # the question does not fit into the model's context: unanswered
    truncated: bool = False  # the reply ended at max_new_tokens or at the end of the context
    unfinished: bool = False  # the reply ended before its reasoning did: wrong, and not counted as unanswered
    prediction: str = ""  # letters or, for a free-form question, the reply
    correct: bool | None = None  # None: the correct answer is unknown


@dataclass(frozen=True)
class Prediction:
    """One question of a result file, in the order of the input files."""

    id: str
    prediction: str | None  # with `correct` and `scores`: of the method `scoring`; None: not done yet
    answer: str
    correct: bool | None
    scores: dict[str, float]
    scoring: str | None  # the headline method
    outcomes: dict[str, Outcome]  # by method
    exam: str
    topic: str
    metadata: dict[str, str]
    language: str
    multiple_answers: bool
    n_options: int  # 0: free-form
    longest_option: str
    question_sha256: str
    prompt_sha256: str
    shots: int
    file: str
    trained_on: bool | None  # occurs in the training questions; None: these are unknown
    kind: str = ""


class ResultFile(NamedTuple):
    complete: bool  # False: an interrupted evaluation
    protocol: dict[str, Any]
    predictions: list[Prediction]


def read_result(path: Path) -> ResultFile:
    """Read a file that `--out` wrote. Raises FileNotFoundError or UserError."""
    content = read_object(path)
    try:
        predictions = [from_json(Prediction, row, strict=False) for row in content["predictions"]]
        return ResultFile(from_json(bool, content["complete"]), dict(content["protocol"]), predictions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a result of minidoctor.evaluate ({error!r:.80})") from None
