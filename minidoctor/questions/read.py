"""Questions of a file or directory, in the format that the content shows.

A record of a benchmark that cannot be used is skipped and reported with file and line, because published files have a
few of them. In JSON lines, which users write themselves, it stops the program.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import UserError
from minidoctor.files.json_files import read_text, split_lines
from minidoctor.questions.cmb import parse_cmb, read_answers
from minidoctor.questions.exams import CMEXAM, CMMLU, parse_cmexam, parse_cmmlu, parse_csv
from minidoctor.questions.json_rows import parse_json_list, read_rows
from minidoctor.questions.rows import Row

SUFFIXES = (".csv", ".json", ".jsonl")


class Questions(NamedTuple):
    """The rows of a file or directory."""

    rows: list[Row]
    malformed: list[str]  # "file:line: reason" of each skipped record, and unused answers


def read_questions(path: str | Path, answers_file: str | Path | None = None) -> Questions:
    """Read a file, or all files of a directory, optionally with CMB's file of answers.

    Raises FileNotFoundError, or UserError if a file has none of the formats or no question.
    """
    answers = read_answers(Path(answers_file)) if answers_file else {}
    files = [read_file(file, answers) for file in list_question_files(Path(path))]
    rows = [row for file in files for row in file.rows]
    malformed = [message for file in files for message in file.malformed]
    if unused := len(answers.keys() - {row.id for row in rows if row.exam == "cmb"}):
        malformed.append(f"{answers_file}: {unused} of {len(answers)} answers belong to no question that was read")
    return Questions(rows, malformed)


def list_question_files(path: Path) -> list[Path]:
    """Return the path itself, or the files of a directory that can contain questions. Raises FileNotFoundError."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no {', '.join(SUFFIXES)} file here")
    return files


def read_file(path: Path, answers: dict[str, dict[str, Any]]) -> Questions:
    text = read_text(path)
    start = text[:1000].lstrip()
    header = set(next(csv.reader(split_lines(start)[:1]), []))
    if start.startswith("["):
        records, parse = parse_json_list(path, text), lambda number, record: parse_cmb(number, record, answers)
    elif header >= CMMLU:
        records, parse = parse_csv(path, text), lambda number, record: parse_cmmlu(path.stem, number, record)
    elif header >= CMEXAM:
        records, parse = parse_csv(path, text), lambda number, record: parse_cmexam(path.stem, number, record)
    elif path.suffix == ".csv":
        raise UserError(
            f"{path}: the columns are {', '.join(sorted(header))!r:.80}, "
            f"expected CMMLU's ({', '.join(sorted(CMMLU))}) or CMExam's ({', '.join(sorted(CMEXAM))})"
        )
    else:
        return Questions(read_rows(path), [])
    rows, malformed = [], []
    for number, (line, record) in enumerate(records):
        try:
            rows.append(parse(number, record))
        except UserError as error:
            malformed.append(f"{path}:{line}: {error}")
    if not rows:
        raise UserError(malformed[0] if malformed else f"{path}: no questions")
    return Questions(rows, malformed)
