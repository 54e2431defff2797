"""A page that others can cite: the command, the table, the protocol, the prompts and the hashes of all inputs."""

import sys
from pathlib import Path
from textwrap import indent
from typing import Any

from minidoctor.cli.processes import launch_command
from minidoctor.files.json_files import format_json, write_atomically
from minidoctor.text.stream import printable

DISCLAIMER = "For teaching and measuring. The answers of a model are not medical advice."
INPUTS = {"files": "questions", "dev": "few-shot examples", "train_questions": "training questions"}


def command(n_processes: int, resume: bool) -> str:
    """Return the command that started this program, with or without --resume."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return launch_command(["-m", "minidoctor.evaluate", *words, *["--resume"] * resume], n_processes)


def block(text: str) -> str:
    """Return a code block, indented rather than fenced: no content can end it."""
    return indent(printable(text), "    ", lambda line: True)


def format_report(protocol: dict[str, Any], table: str) -> str:
    """Return the page in Markdown from a protocol and the text table of its results. The command has one process."""
    settings = {key: value for key, value in protocol.items() if key not in (*INPUTS, "rules", "first_prompts")}
    files = [
        f"{file['sha256']}  {file['file']} ({kind}, {file['questions']} questions, {len(file['malformed'])} malformed)"
        for key, kind in INPUTS.items()
        for file in protocol[key]
    ]
    sections = {"Command": command(1, resume=False), "Result": table}
    sections |= {"Protocol": "\n".join(f"{key}: {format_json(value)}" for key, value in settings.items())}
    sections |= {"Rules": "\n".join(f"{key}: {rule}" for key, rule in protocol["rules"].items())}
    sections |= {f"First prompt ({exam})": prompt for exam, prompt in protocol["first_prompts"].items()}
    sections |= {"SHA-256 of the files": "\n".join(files)}
    page = [f"# Evaluation of {printable(protocol['base'])}\n", DISCLAIMER]
    return "\n".join([*page, *(f"\n## {title}\n\n{block(text)}" for title, text in sections.items())])


def write_report(directory: Path, protocol: dict[str, Any], table: str) -> None:
    directory.mkdir()
    write_atomically(directory / "report.md", format_report(protocol, table).encode())
