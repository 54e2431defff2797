"""CMB, CMExam and CMMLU, read from their files as they are published. The content tells which it is:

    CMMLU    CSV: ,Question,A,B,C,D,Answer                  the subject is the file's name, dev/ holds the examples
    CMExam   CSV: Question,Options,Answer,Explanation       the options one a line, "A text"
    CMB      JSON: [{"question", "option": {"A": ...}, "answer", "question_type", "exam_type", ...}]
             the test questions have no answers; they are in a second file, by id
    own      JSON lines, as data.py reads them

A row of a benchmark that cannot be used is left out and said, with file and line; one's own file is refused for it.
CMExam does not say which questions have several right letters: the number of letters in its answer does.

CMB: https://arxiv.org/abs/2308.08833. CMExam: https://arxiv.org/abs/2306.03030. CMMLU: https://arxiv.org/abs/2306.09212.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import UserError
from minidoctor.files.json_files import read_bytes, unique_keys
from minidoctor.questions.rows import Row, conversation, language_of, multiple_choice, parse_options, read_rows, text_of

CMMLU = {"Question", "A", "B", "C", "D", "Answer"}
CMEXAM = {"Question", "Options", "Answer"}
ABOUT = ("exam_type", "exam_class", "exam_subject", "question_type")  # what CMB says of a question
SUFFIXES = (".csv", ".json", ".jsonl")


class Questions(NamedTuple):
    rows: list[Row]
    odd: list[str]  # "file:line: why" of each row that was left out, and answers without a question


def read_questions(path: str | Path, answers: str | Path | None = None) -> Questions:
    """The questions of a file, or of all files of a directory. `answers` is CMB's file of answers.

    Raises FileNotFoundError, or ValueError if a file is of none of these kinds or has no question.
    """
    path = Path(path)
    known = read_answers(Path(answers)) if answers else {}
    files = question_files(path)
    read = [read_file(file, known) for file in files]
    rows, odd = [row for part in read for row in part.rows], [line for part in read for line in part.odd]
    if unused := len(known.keys() - {row.id for row in rows if row.exam == "cmb"}):
        odd.append(f"{answers}: {unused} of {len(known)} answers are for no question that was read")
    return Questions(rows, odd)


def overlap(rows: list[Row], others: list[Row]) -> set[str]:
    """The questions, without space and punctuation, that stand in both: what was trained on is no test."""
    return {normalize_question(row.question) for row in rows} & {normalize_question(row.question) for row in others}


def normalize_question(question: str) -> str:
    return re.sub(r"[\W_]", "", question).lower()


def question_files(path: Path) -> list[Path]:
    """The files that a path means: itself, or those of a directory that can hold questions."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no {', '.join(SUFFIXES)} file here")
    return files


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None


def read_file(path: Path, answers: dict[str, dict[str, Any]]) -> Questions:
    text = read_text(path)
    start = text[:1000].lstrip()
    header = set(next(csv.reader(start.splitlines()[:1]), []))
    if start.startswith("["):
        records, make = json_records(path, text), lambda number, record: cmb_row(number, record, answers)
    elif header >= CMMLU:
        records, make = csv_records(path, text), lambda number, record: cmmlu_row(path.stem, number, record)
    elif header >= CMEXAM:
        records, make = csv_records(path, text), lambda number, record: cmexam_row(path.stem, number, record)
    elif path.suffix == ".csv":
        raise UserError(
            f"{path}: the columns are {', '.join(sorted(header))!r:.80}, "
            f"expected CMMLU's ({', '.join(sorted(CMMLU))}) or CMExam's ({', '.join(sorted(CMEXAM))})"
        )
    else:
        return Questions(read_rows(path), [])
    rows, odd = [], []
    for number, (line, record) in enumerate(records):
        try:
            rows.append(make(number, record))
        except ValueError as error:
            odd.append(f"{path}:{line}: {error}")
    if not rows:
        raise UserError(odd[0] if odd else f"{path}: no questions")
    return Questions(rows, odd)


def csv_records(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and cells by column of each record. Strict: a quote left open would swallow the rest of the file."""
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


def json_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Line and value of each entry of a JSON list."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)  # a second option B would replace the first
    try:
        json.loads(text)  # the whole first, so that what is found between its entries is only space and commas
        at = text.index("[") + 1
        line = 1 + text.count("\n", 0, at)
        while True:
            start = at
            while text[start] in " \t\r\n,":
                start += 1
            line += text.count("\n", at, start)
            if text[start] == "]":
                return
            record, at = decoder.raw_decode(text, start)
            yield line, record
            line += text.count("\n", start, at)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def cmmlu_row(subject: str, number: int, record: dict[str, str]) -> Row:
    options = {letter: record.get(letter, "") for letter in "ABCD"}
    row_id, answer = f"{subject}-{number}", record.get("Answer", "")
    return exam_row("cmmlu", row_id, record, "Question", options, answer, topic=subject)


def cmexam_row(stem: str, number: int, record: dict[str, str]) -> Row:
    options: dict[str, str] = {}
    for line in record.get("Options", "").splitlines():
        found = re.fullmatch(r"\s*([A-Z])[\s.．、:：]\s*(.+)", line)
        if not found or found[1] in options:
            raise UserError(f"options must be one a line, a letter in front, got {line!r:.40}")
        options[found[1]] = found[2]
    explanation = record.get("Explanation", "").strip()
    answer, row_id = record.get("Answer", ""), f"{stem}-{number}"
    explanation = "" if explanation == "nan" else explanation
    return exam_row("cmexam", row_id, record, "Question", options, answer, explanation=explanation)


def cmb_row(number: int, record: Any, answers: dict[str, dict[str, Any]]) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    if "question" not in record and "answer" in record:
        raise UserError("an answer without a question; a file of answers is given with --answers")
    row_id = text_of(record, "id") if isinstance(record.get("id"), str) else str(record.get("id", f"row-{number + 1}"))
    known = answers.get(row_id, {})
    if isinstance(record.get("answer"), str):
        record = record | {"answer": "".join(sorted(record["answer"].strip()))}
    for key in (*ABOUT, "answer"):
        if known.get(key) and record.get(key) and known[key] != record[key]:
            raise UserError(f"{key} is {record[key]!r:.40}, in the file of answers {known[key]!r:.40}")
    record = {**known, **record}
    options = record.get("option")
    if not isinstance(options, dict):
        raise UserError('no "option"')
    about = {key: text_of(record, key) for key in ABOUT if record.get(key)}
    # The fifth option of a question with four is there and empty.
    options = {letter: text for letter, text in options.items() if text != ""}
    answer = record.get("answer") or known.get("answer") or ""
    topic = about.get("exam_subject", "")
    return exam_row("cmb", row_id, record, "question", options, answer, topic=topic, about=about, answered=False)


def exam_row(
    exam: str,
    row_id: str,
    record: dict[str, Any],
    key: str,
    options: dict[str, str],
    answer: Any,
    answered: bool = True,
    **more: Any,
) -> Row:
    """Raises ValueError if that is no question with options and letters among them; `answered`: an answer must be."""
    if not record:
        raise UserError("not as many cells as columns")
    question = text_of(record, key).strip()
    if not isinstance(answer, str):
        raise UserError(f"the answer must be letters, got {answer!r:.40}")
    if answered and not answer.strip():
        raise UserError("no answer")
    letters = "".join(sorted(answer.strip()))
    parse_options(options, answer.strip())
    messages = conversation(*multiple_choice(question, options, letters))
    kind = more.get("about", {}).get("question_type")  # where the benchmark says it, the answer has no say
    several = "多" in kind if kind else len(letters) > 1
    return Row(
        id=row_id,
        messages=messages if letters else messages[:1],
        question=question,
        options=options,
        answer=letters,
        language=language_of(question),
        several=several,
        exam=exam,
        **{"topic": "", **more},
    )


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """CMB's answers by the id of their question. Raises FileNotFoundError or ValueError."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        raise UserError(f'{path}: expected a JSON list of {{"id": ..., "answer": "A"}}')
    answers: dict[str, dict[str, Any]] = {}
    for line, record in json_records(path, text):
        if not isinstance(record, dict) or not isinstance(record.get("answer"), str) or "id" not in record:
            raise UserError(f'{path}:{line}: expected {{"id": ..., "answer": "A"}}, got {record!r:.60}')
        if str(record["id"]) in answers:
            raise UserError(f"{path}:{line}: a second answer for question {record['id']!r:.40}")
        answers[str(record["id"])] = record | {"answer": "".join(sorted(record["answer"].strip()))}
    return answers
