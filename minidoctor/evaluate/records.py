"""The records of a result file: the outcome of each scoring method for a question, and the question's prediction."""

from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from minidoctor.config import UserError
from minidoctor.files.json_files import read_object


@dataclass(frozen=True)
class Outcome:
    """The result of one scoring method for one question."""

    scores: dict[str, float] = field(default_factory=dict)  # of each option, in nats
    reply: str | None = None  # the generated answer
    nll: float | None = None  # of the correct answer, summed over n_tokens, in nats
    n_tokens: int = 0
    too_long: bool = False  # the question does not fit into the model's context: unanswered
    truncated: bool = False  # the reply ended at max_new_tokens or at the end of the context
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
    trained_on: bool | None  # None: the model has no adapter, or one that does not record its training questions


def from_json(kind: Any, content: Any) -> Any:
    """Return the record of type `kind` from the JSON of its `asdict`. Raises KeyError, TypeError or AttributeError."""
    arguments = get_args(kind)
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: from_json(types[name], value) for name, value in content.items()})  # type: ignore[operator]
    if get_origin(kind) is dict:
        return {key: from_json(arguments[1], value) for key, value in content.items()}
    if get_origin(kind) is tuple:
        return tuple(from_json(arguments[0], value) for value in content)
    if type(None) in arguments:
        return None if content is None else from_json(arguments[0], content)
    if not isinstance(content, (int, float) if kind is float else kind):
        raise TypeError(f"expected {kind.__name__}, got {content!r:.40}")
    return content


class ResultFile(NamedTuple):
    complete: bool  # False: an interrupted evaluation
    protocol: dict[str, Any]
    predictions: list[Prediction]


def read_result(path: Path) -> ResultFile:
    """Read a file that `--out` wrote. Raises FileNotFoundError or UserError."""
    content = read_object(path)
    try:
        predictions = [from_json(Prediction, row) for row in content["predictions"]]
        return ResultFile(from_json(bool, content["complete"]), dict(content["protocol"]), predictions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a result of minidoctor.evaluate ({error!r:.80})") from None
