"""The inputs of an evaluation as they were read: questions, few-shot examples and the adapter's training questions."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidoctor.checkpoints.adapters import ADAPTER, CONFIG
from minidoctor.checkpoints.peft import WEIGHTS
from minidoctor.config import check
from minidoctor.files.json_files import read_bytes
from minidoctor.files.safetensors import read_tensors
from minidoctor.questions.read import Questions, list_question_files, read_questions

TRAINING_QUESTIONS = "training_questions.safetensors"  # in the directory of an adapter


class InputFile(NamedTuple):
    label: str  # the file's name, or its path if two files have the same name
    sha256: str  # of the text that was read, after that of CMB's answers
    questions: Questions

    def to_json(self) -> dict[str, Any]:
        n, malformed = len(self.questions.rows), self.questions.malformed
        return {"file": self.label, "sha256": self.sha256, "questions": n, "malformed": malformed}


def list_files(paths: list[str]) -> list[Path]:
    return [file for path in paths for file in list_question_files(Path(path))]


def read_files(paths: list[Path], answers: str = "") -> list[InputFile]:
    """Read files of questions, each once, with CMB's file of answers. Raises FileNotFoundError or UserError."""
    names, files = [path.name for path in paths], []
    for path in paths:
        digest = hashlib.sha256(read_bytes(Path(answers)) if answers else b"")
        questions = read_questions(path, answers or None, digest.update)
        label = path.name if names.count(path.name) == 1 else str(path)
        files.append(InputFile(label, digest.hexdigest(), questions))
    return files


def find_dev_files(data: list[Path]) -> list[Path]:
    """Return CMMLU's few-shot examples: dev/ next to the directory of the questions. Raises UserError if none."""
    paths = []
    for file in data:
        candidates = (file.parent.parent / "dev" / file.name, file.with_stem("dev"))
        paths += [path for path in candidates if path.exists() and path != file][:1]
    check(bool(paths), f"--shots: no file of few-shot examples next to {data[0]}; pass one with --dev")
    return paths


def hash_adapter(directory: str | Path) -> str:
    files = [Path(directory) / name for name in (CONFIG, ADAPTER, WEIGHTS)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def read_training_hashes(adapter: str) -> set[int] | None:
    """Return the hashes of the questions that an adapter was trained on, None if it does not record them."""
    path = Path(adapter) / TRAINING_QUESTIONS
    if not path.is_file():
        return None
    hashes = dict(read_tensors(path)).get("hashes", torch.empty(0))
    check(hashes.dtype == torch.int64, f"{path}: expected the int64 tensor hashes")
    return set(hashes.tolist())
