"""Questions of a file or directory, in the format that the content shows.

A malformed record of a benchmark is skipped and reported, because the published files contain a few. In a user's own
JSON lines or list it raises UserError.
"""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import UserError
from minidoctor.files.json_files import parse_json, read_text, split_lines
from minidoctor.questions import exams
from minidoctor.questions.json_rows import FORMATS, parse_json_list, parse_row
from minidoctor.questions.rows import Row

SUFFIXES = (".csv", ".json", ".jsonl")


class Questions(NamedTuple):
    rows: list[Row]
    malformed: list[str]  # "file:line: reason" of each skipped record, and the number of unused answers


def read_questions(
    path: str | Path, answers_file: str | Path | None = None, on_read: Callable[[bytes], None] = lambda text: None
) -> Questions:
    """Read a file, pipe, or all files of a directory, optionally with CMB's file of answers.

    `on_read` gets the text of each file, in UTF-8 without a byte order mark: a pipe cannot be read again to hash it.
    Raises FileNotFoundError, or UserError if a file has none of the formats or no question.
    """
    answers = exams.read_answers(Path(answers_file)) if answers_file else {}
    files = []
    for file in list_question_files(path):
        text = read_text(file, pipe=True)
        on_read(text.encode())
        files.append(parse_file(file, text, answers))
    rows = [row for file in files for row in file.rows]
    malformed = [message for file in files for message in file.malformed]
    ids = {row.id for row in rows if row.exam == "cmb"}
    if ids and (unused := len(answers.keys() - ids)):
        malformed.append(f"{answers_file}: {unused} of {len(answers)} answers belong to no question that was read")
    return Questions(rows, malformed)


def list_question_files(path: str | Path) -> list[Path]:
    """Return the path itself, or the question files of a directory. Raises FileNotFoundError if there is none."""
    if path == "":  # not those of the current directory, because of a variable of the shell that is not set
        raise UserError("the path of the questions is empty")
    path = Path(path)
    if not path.is_dir():
        return [path]
    visible = (file for file in sorted(path.iterdir()) if not file.name.startswith("."))  # not macOS's ._x.csv
    files = [file for file in visible if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: no {', '.join(SUFFIXES)} file here")
    return files


def parse_file(path: Path, text: str, answers: dict[str, dict[str, Any]]) -> Questions:
    """Parse the text of one file. `answers` are CMB's by id."""
    start = text[:1000].lstrip()
    header = {name.strip() for name in next(csv.reader(split_lines(start)[:1]), [])}
    if start.startswith("["):
        entries = list(parse_json_list(path, text))
        if is_cmb([entry for _, entry in entries]):
            return parse_records(path, entries, lambda i, _, entry: exams.parse_cmb_record(i, entry, answers))
        return parse_records(path, entries, lambda i, _, entry: parse_row(entry, str(i + 1)), strict=True)
    if header >= exams.CMMLU or header >= exams.CMEXAM:
        records = exams.parse_csv(path, text)
        return parse_records(path, records, lambda i, _, record: exams.parse_csv_record(path.stem, i, record))
    if path.suffix.lower() == ".csv":
        columns, cmmlu, cmexam = (", ".join(sorted(names)) for names in (header, exams.CMMLU, exams.CMEXAM))
        raise UserError(f"{path}: the columns are {columns!r:.80}, expected CMMLU's ({cmmlu}) or CMExam's ({cmexam})")
    lines = ((line, text) for line, text in enumerate(split_lines(text), start=1) if text.strip())
    return parse_records(path, lines, lambda _, line, text: parse_row(parse_json(text), str(line)), strict=True)


def is_cmb(entries: list[Any]) -> bool:
    """Return whether the entries of a JSON list have CMB's format, not one of JSON lines."""
    entries = [entry for entry in entries if isinstance(entry, dict)]
    keys = set().union(*entries)
    if not keys & {*exams.CMB_FIELDS} - {"question_type"}:  # other files have a question_type, too
        return bool(entries) and all("option" in entry for entry in entries)
    return "option" in keys or keys & {*FORMATS, "options"} <= {"question"}


def parse_records(
    path: Path, records: Iterable[tuple[int, Any]], parse: Callable[[int, int, Any], Row], strict: bool = False
) -> Questions:
    """Return parse(index, line, record) of each (line, record). Raises UserError if there is no row."""
    rows, malformed = [], []
    for i, (line, record) in enumerate(records):
        try:
            rows.append(parse(i, line, record))
        except UserError as error:
            malformed.append(f"{path}:{line}: {error}")
            if strict:
                raise UserError(malformed[0]) from None
    if not rows:
        raise UserError(malformed[0] if malformed else f"{path}: no questions")
    return Questions(rows, malformed)
