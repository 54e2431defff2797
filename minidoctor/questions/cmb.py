"""CMB as published: a JSON list of questions, for the test questions with the answers in a second file, by id.

    [{"id", "question", "option": {"A": ...}, "answer", "question_type", "exam_type", "exam_class", "exam_subject"}]

CMB: https://arxiv.org/abs/2308.08833.
"""

from pathlib import Path
from typing import Any

from minidoctor.config import UserError
from minidoctor.files.json_files import read_text
from minidoctor.questions.exams import make_exam_row
from minidoctor.questions.json_rows import parse_json_list
from minidoctor.questions.rows import Row, parse_id, require_text

FIELDS = ("exam_type", "exam_class", "exam_subject", "question_type")


def parse_cmb(number: int, record: Any, answers: dict[str, dict[str, Any]]) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    if "question" not in record and "answer" in record:
        raise UserError("an answer without a question; pass a file of answers with --answers")
    row_id = parse_id(record, f"row-{number + 1}")
    published = answers.get(row_id, {})
    if isinstance(record.get("answer"), str):
        record = record | {"answer": "".join(sorted(record["answer"].strip()))}
    for key in (*FIELDS, "answer"):
        if published.get(key) and record.get(key) and published[key] != record[key]:
            raise UserError(f"{key} is {record[key]!r:.40}, in the file of answers {published[key]!r:.40}")
    record = {**published, **record}
    options = record.get("option")
    if not isinstance(options, dict):
        raise UserError('no "option"')
    metadata = {key: require_text(record, key) for key in FIELDS if record.get(key)}
    # A question with four options has an empty fifth one.
    options = {letter: text for letter, text in options.items() if text != ""}
    answer = record.get("answer") or published.get("answer") or ""
    topic = metadata.get("exam_subject", "")
    return make_exam_row(
        "cmb", row_id, record, "question", options, answer, answer_required=False, topic=topic, metadata=metadata
    )


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Return CMB's answers by the id of their question. Raises FileNotFoundError or UserError."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        raise UserError(f'{path}: expected a JSON list of {{"id": ..., "answer": "A"}}')
    answers: dict[str, dict[str, Any]] = {}
    for line, record in parse_json_list(path, text):
        if not isinstance(record, dict) or not isinstance(record.get("answer"), str) or "id" not in record:
            raise UserError(f'{path}:{line}: expected {{"id": ..., "answer": "A"}}, got {record!r:.60}')
        if str(record["id"]) in answers:
            raise UserError(f"{path}:{line}: a second answer for question {record['id']!r:.40}")
        answers[str(record["id"])] = record | {"answer": "".join(sorted(record["answer"].strip()))}
    return answers
