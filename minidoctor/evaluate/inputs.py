"""The inputs of an evaluation: their paths, and questions, few-shot examples and training questions as read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidoctor.checkpoints.adapters import ADAPTER, CONFIG
from minidoctor.checkpoints.peft import PICKLED, WEIGHTS
from minidoctor.config import check, check_range
from minidoctor.files.hub_cache import follow_snapshot
from minidoctor.files.json_files import read_bytes
from minidoctor.files.safetensors import read_tensors
from minidoctor.questions.exams import SUBJECT_LISTS
from minidoctor.questions.read import Questions, list_question_files, read_questions

TRAINING_QUESTIONS = "training_questions.safetensors"  # in the directory of an adapter


@dataclass(frozen=True)
class RunConfig:
    """The model and the files of an evaluation."""

    base: str
    adapter: str | None
    chat_format: str
    thinking: bool
    device: str
    dtype: str
    quantize: str
    data: list[str]
    dev: list[str]  # files of few-shot examples
    answers: str  # CMB's file of answers, or ""
    subjects: str  # key of SUBJECT_LISTS, or "all"
    train_questions: list[str]  # files of questions that the model may have been trained on
    limit: int  # questions of each file, 0: all
    out: str  # result file, or ""
    resume: bool
    submission: str  # CMB's submission form, or ""
    report: str  # new directory for the report, or ""

    def __post_init__(self) -> None:
        check_range(self, "limit", low=0)
        check(not (self.submission and self.limit), "--submission needs all questions: omit --limit")
        check(bool(self.out) or not self.resume, "--resume needs --out, the unfinished result to continue")


class InputFile(NamedTuple):
    label: str  # the file's name, or its path if two files have the same name
    sha256: str  # of the text that was read and, for CMB's test questions, of their answers after it
    questions: Questions

    @property
    def subject(self) -> str:
        """The subject of a file of CMMLU, "" for any other file."""
        return self.questions.rows[0].topic if self.questions.rows[0].exam == "cmmlu" else ""

    def to_json(self) -> dict[str, Any]:
        n, malformed = len(self.questions.rows), self.questions.malformed
        return {"file": self.label, "sha256": self.sha256, "questions": n, "malformed": malformed}


class Inputs(NamedTuple):
    files: list[InputFile]
    dev: list[InputFile]  # few-shot examples
    train_questions: list[InputFile]  # those of --train-questions


def list_files(paths: list[str]) -> list[Path]:
    """Return the files of all paths, each once."""
    files = [file for path in paths for file in list_question_files(path)]
    return list({file.resolve(): file for file in reversed(files)}.values())[::-1]


def read_files(paths: list[Path], answers: str = "") -> list[InputFile]:
    """Read files of questions, with CMB's file of answers. Raises FileNotFoundError or UserError."""
    names, files = [path.name for path in paths], []
    for path in paths:
        digest = hashlib.sha256()
        questions = read_questions(path, answers or None, digest.update)
        digest.update(read_bytes(Path(answers)) if answers and questions.rows[0].exam == "cmb" else b"")
        label = path.name if names.count(path.name) == 1 else str(path)
        files.append(InputFile(label, digest.hexdigest(), questions))
    return files


def find_dev_files(data: list[Path]) -> list[Path]:
    """Return each file's few-shot examples: in CMMLU's dev/, or dev next to the file. Raises UserError if none."""
    paths = []
    for file in data:
        candidates = (file.parent.parent / "dev" / file.name, file.with_stem("dev"))
        found = [path for path in candidates if path.exists() and path != file][:1]
        check(bool(found), f"--shots: no file of few-shot examples next to {file}; pass one with --dev")
        paths += found
    return list(dict.fromkeys(paths))


def read_inputs(run: RunConfig, shots: int) -> Inputs:
    """Read all files, of CMMLU only those of the subjects in --subjects. Raises FileNotFoundError or UserError."""
    paths = list_files(run.data)
    files = read_files(paths, run.answers)
    n_cmb = sum(file.questions.rows[0].exam == "cmb" for file in files)
    check(not run.answers or n_cmb == 1, f"--answers belongs to one --data file, CMB's test questions, got {n_cmb}")
    if run.subjects != "all":
        listed = SUBJECT_LISTS[run.subjects].split()
        missing = set(listed).difference(file.subject for file in files)
        check(not missing, f"--subjects {run.subjects}: no file of CMMLU's {', '.join(sorted(missing))}")
        files = [file for file in files if file.subject in ("", *listed)]
    dev = read_files(list_files(run.dev) or find_dev_files(paths)) if shots else []
    return Inputs(files, dev, read_files(list_files(run.train_questions)))


def hash_adapter(directory: str | Path) -> str:
    files = [follow_snapshot(directory) / name for name in (CONFIG, ADAPTER, WEIGHTS, PICKLED)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def read_training_hashes(adapter: str) -> set[int] | None:
    """Return the hashes of the questions that an adapter was trained on, None if it does not record them."""
    path = follow_snapshot(adapter) / TRAINING_QUESTIONS
    if not path.is_file():
        return None
    hashes = dict(read_tensors(path)).get("hashes", torch.empty(0))
    check(hashes.dtype == torch.int64, f"{path}: expected the int64 tensor hashes")
    return set(hashes.tolist())
