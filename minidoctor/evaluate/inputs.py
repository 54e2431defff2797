"""The inputs of an evaluation as they were read: questions, few-shot examples and the hash of the adapter."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from minidoctor.config import check
from minidoctor.files.json_files import read_bytes
from minidoctor.questions.read import Questions, list_question_files, read_questions
from minidoctor.questions.rows import Row


class InputFile(NamedTuple):
    path: Path
    sha256: str
    questions: Questions

    def to_json(self) -> dict[str, Any]:
        n, malformed = len(self.questions.rows), self.questions.malformed
        return {"file": self.path.name, "sha256": self.sha256, "questions": n, "malformed": malformed}


def list_files(paths: list[str]) -> list[Path]:
    return [file for path in paths for file in list_question_files(Path(path))]


def read_files(paths: list[Path], answers: str = "") -> list[InputFile]:
    """Read files of questions, with CMB's file of answers. Raises FileNotFoundError or UserError."""
    files = []
    for path in paths:
        digest = hashlib.sha256(read_bytes(path) + (read_bytes(Path(answers)) if answers else b""))
        files.append(InputFile(path, digest.hexdigest(), read_questions(path, answers or None)))
    return files


def find_dev_files(data: list[Path]) -> list[Path]:
    """Return CMMLU's few-shot examples: dev/ next to the directory of the questions. Raises UserError if none."""
    paths = []
    for file in data:
        candidates = (file.parent.parent / "dev" / file.name, file.with_stem("dev"))
        paths += [path for path in candidates if path.exists() and path != file][:1]
    check(bool(paths), f"--shots: no file of few-shot examples next to {data[0]}; pass one with --dev")
    return paths


def take_rows(files: list[InputFile], limit: int) -> list[Row]:
    """Return the first `limit` rows of each file, all if it is 0."""
    return [row for file in files for row in file.questions.rows[: limit or None]]


def hash_adapter(directory: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(directory).glob("adapter*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
