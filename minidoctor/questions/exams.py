"""CMExam and CMMLU as published: CSV files, told apart by their columns.

    CMMLU    ,Question,A,B,C,D,Answer                  the subject is the file name
    CMExam   Question,Options,Answer,Explanation       one option per line, "A text"

CMExam does not publish which questions have several correct letters: the number of letters in the answer decides.

CMExam: https://arxiv.org/abs/2306.03030. CMMLU: https://arxiv.org/abs/2306.09212.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidoctor.config import UserError
from minidoctor.files.json_files import split_lines
from minidoctor.questions.rows import (
    Row,
    conversation,
    detect_language,
    format_multiple_choice,
    parse_letters,
    parse_options,
    require_text,
)

CMMLU = {"Question", "A", "B", "C", "D", "Answer"}
CMEXAM = {"Question", "Options", "Answer"}


def parse_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line of each record and its cells by column, none if their number differs from the header's.

    Strict: an unclosed quote would swallow the rest of the file. Raises UserError.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(cells for cells in reader if "".join(cells).strip())]
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield line, dict(zip(header, cells, strict=False)) if len(cells) == len(header) else {}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def parse_cmmlu(subject: str, number: int, record: dict[str, str]) -> Row:
    options = {letter: record.get(letter, "") for letter in "ABCD"}
    answer = record.get("Answer", "")
    return make_exam_row("cmmlu", f"{subject}-{number}", record, "Question", options, answer, topic=subject)


def parse_cmexam(stem: str, number: int, record: dict[str, str]) -> Row:
    options: dict[str, str] = {}
    for line in split_lines(record.get("Options", "")):
        match = re.fullmatch(r"\s*([A-Z])[\s.．、:：]\s*(.+)", line)
        if not match or match[1] in options:
            raise UserError(f"options must be one per line, a letter in front, got {line!r:.40}")
        options[match[1]] = match[2]
    explanation = record.get("Explanation", "").strip()
    explanation = "" if explanation == "nan" else explanation
    answer = record.get("Answer", "")
    return make_exam_row("cmexam", f"{stem}-{number}", record, "Question", options, answer, explanation=explanation)


def make_exam_row(
    exam: str,
    row_id: str,
    record: dict[str, Any],
    key: str,
    options: dict[str, str],
    answer: Any,
    answer_required: bool = True,
    **fields: Any,
) -> Row:
    """Return the row of a record. Raises UserError if it is not a question with options and letters of these."""
    if not record:
        raise UserError("not as many cells as columns")
    question = require_text(record, key).strip()
    if not isinstance(answer, str):
        raise UserError(f"the answer must be letters, got {answer!r:.40}")
    if answer_required and not answer.strip():
        raise UserError("no answer")
    parse_options(options)
    letters = "".join(sorted(parse_letters(answer.strip(), options)))
    messages = conversation(*format_multiple_choice(question, options, letters))
    question_type = fields.get("metadata", {}).get("question_type")  # if published, the answer does not decide
    return Row(
        id=row_id,
        messages=messages if letters else messages[:1],
        question=question,
        options=options,
        answer=letters,
        language=detect_language(question),
        multiple_answers="多" in question_type if question_type else len(letters) > 1,
        exam=exam,
        **{"topic": "", **fields},
    )
