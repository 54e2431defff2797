"""CMB, CMExam and CMMLU in their published files.

    CMMLU    CSV ,Question,A,B,C,D,Answer                 the topic is the file name
    CMExam   CSV Question,Options,Answer,Explanation      one option per line, "A text"
    CMB      JSON list of {"id", "question", "option": {"A": ...}, "answer", "question_type", "exam_type", ...};
             the answers to the test questions are in a second file, by id

CMB: https://arxiv.org/abs/2308.08833. CMExam: https://arxiv.org/abs/2306.03030. CMMLU: https://arxiv.org/abs/2306.09212.
"""

import csv
import io
import re
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from minidoctor.config import UserError, check
from minidoctor.files.json_files import read_text, split_lines, unique_keys
from minidoctor.questions.json_rows import check_keys, parse_json_list
from minidoctor.questions.rows import Row, make_row, parse_options, require_text

CMMLU = {"Question", "A", "B", "C", "D", "Answer"}
CMEXAM = {"Question", "Options", "Answer"}
# Chinese names of CMMLU's medical subjects: https://github.com/haonan-li/CMMLU, src/categories.py
SUBJECTS = {
    "anatomy": "解剖学",
    "clinical_knowledge": "临床知识",
    "college_medicine": "大学医学",
    "genetics": "遗传学",
    "nutrition": "营养学",
    "professional_medicine": "专业医学",
    "traditional_chinese_medicine": "中医中药",
    "virology": "病毒学",
}
# "CMMLU-Med" has no single definition: lists of subjects that were published under this name.
SUBJECT_LISTS = {
    # https://github.com/FreedomIntelligence/Apollo, README.md
    "apollo": "anatomy clinical_knowledge college_medicine genetics nutrition traditional_chinese_medicine virology",
    # https://github.com/whiling/meditron-sft-dpo, evaluation/README.md
    "meditron": "anatomy clinical_knowledge college_medicine genetics professional_medicine",
}
CMB_FIELDS = ("exam_type", "exam_class", "exam_subject", "question_type")


def parse_csv(path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    """Return the line of each record and its cells by column, none if their number differs from the header's.

    Strict: an unclosed quote would swallow the rest of the file. Raises UserError.
    """
    records, reader = [], csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # of all readers, therefore restored below; its default is 131,072
    try:
        header = [name.strip() for name in next(cells for cells in reader if "".join(cells).strip())]
        unique_keys([(name, None) for name in header if name])
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                records.append((line, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else {}))
            line = reader.line_num + 1
    except (csv.Error, UserError) as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return records


def parse_csv_record(stem: str, number: int, record: dict[str, str]) -> Row:
    """Return the row of a record of CMMLU or CMExam. Several letters may be correct if the answer has several."""
    check(bool(record), "not as many cells as columns")
    question, answer = require_text(record, "Question").strip(), require_text(record, "Answer")
    if "A" in record:  # columns beyond D, if any, may be empty
        columns = takewhile(record.__contains__, ascii_uppercase)
        options = {letter: record[letter] for letter in columns if letter <= "D" or record[letter].strip()}
    else:
        options = parse_option_lines(record["Options"])
    extra = {name.lower(): "" if cell == "nan" else cell.strip() for name, cell in record.items()}
    check_keys(extra, {"question", "options", "answer"}, "a CSV file")
    fields = {"exam": "cmmlu", "topic": stem} if "A" in record else {"exam": "cmexam"}
    fields |= {"explanation": extra.get("explanation", "")}
    return make_row({}, f"{stem}-{number}", question, parse_options(options, answer), options, **fields)


def parse_option_lines(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for line in split_lines(text):
        match = re.fullmatch(r"\s*([A-Z])[\s.．、:：]\s*(.+)", line)
        if not match or match[1] in options:
            raise UserError(f"options must be one per line, a letter in front, got {line!r:.40}")
        options[match[1]] = match[2]
    return options


def parse_cmb_record(number: int, record: Any, answers: dict[str, dict[str, Any]]) -> Row:
    """Return the row of a record of CMB, completed by its entry in the file of answers."""
    check(isinstance(record, dict), f"expected a JSON object, got {type(record).__name__}")
    only_answer = "question" not in record and "answer" in record
    check(not only_answer, "an answer without a question; pass a file of answers with --answers")
    check_keys(record, {"question", "option", "answer"}, "CMB")
    published = answers.get(str(record.get("id")), {})
    record = published | {key: value for key, value in sort_answer(record).items() if value or key not in published}
    for key in (*CMB_FIELDS, "answer"):
        theirs = published.get(key) or record.get(key)
        check(record.get(key) == theirs, f"{key} is {record.get(key)!r:.40}, in the file of answers {theirs!r:.40}")
    answer = record.get("answer") or ""
    check(isinstance(answer, str), f'"answer" must be letters, got {answer!r:.40}')
    check(isinstance(record.get("option"), dict), 'no "option"')
    options = {letter: text for letter, text in record["option"].items() if text != ""}  # a fifth one may be empty
    question, letters = require_text(record, "question").strip(), parse_options(options, answer)
    metadata = {key: require_text(record, key) for key in CMB_FIELDS if record.get(key)}
    fields: dict[str, Any] = {"exam": "cmb", "topic": metadata.get("exam_subject", ""), "metadata": metadata}
    if "question_type" in metadata:  # more reliable than the answer, and published without it
        fields["multiple_answers"] = "多" in metadata["question_type"]
    return make_row(record, f"row-{number + 1}", question, letters, options, **fields)


def sort_answer(record: dict[str, Any]) -> dict[str, Any]:
    answer = record.get("answer")
    return record | {"answer": "".join(sorted(answer.strip()))} if isinstance(answer, str) else record


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Return CMB's answers by the id of their question. Raises FileNotFoundError or UserError."""
    expected, text = '{"id": ..., "answer": "A"}', read_text(path)
    check(text.lstrip().startswith("["), f"{path}: expected a JSON list of {expected}")
    answers: dict[str, dict[str, Any]] = {}
    for line, record in parse_json_list(path, text):
        is_answer = isinstance(record, dict) and isinstance(record.get("answer"), str) and "id" in record
        check(is_answer, f"{path}:{line}: expected {expected}, got {record!r:.60}")
        check(str(record["id"]) not in answers, f"{path}:{line}: a second answer for question {record['id']!r:.40}")
        answers[str(record["id"])] = sort_answer(record)
    return answers
