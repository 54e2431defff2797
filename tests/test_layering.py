"""The layering of the package, from its imports, and what no file may use."""

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "minidoctor"
METHOD = ["config", "lora", "router", "kv_cache", "model", "expert_queue", "losses", "batching", "step", "generate"]
SHELVES = ["ops", "files", "cli", "text", "checkpoints", "questions", "evaluate", "training"]
SHELVES += ["picture", "ask", "export", "bench", "study"]
PROGRAMS = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "data").glob("*.py"))]
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *PROGRAMS]


def imported(path: Path) -> set[str]:
    """Return the method files and shelves that a file imports, such as "step" or "text"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minidoctor":
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("minidoctor.")}
    return names


def test_every_file_and_shelf_has_a_place_in_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *METHOD}
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(SHELVES)
    for shelf in SHELVES:
        assert (PACKAGE / shelf / "README.md").is_file(), shelf


@pytest.mark.parametrize("name", METHOD)
def test_method_files_import_only_files_above_them_and_ops(name):
    assert imported(PACKAGE / f"{name}.py") <= {*METHOD[: METHOD.index(name)], "ops"}


@pytest.mark.parametrize("shelf", SHELVES)
def test_shelves_import_the_method_and_shelves_above_them(shelf):
    above = {"config"} if shelf == "ops" else {*METHOD, *SHELVES[: SHELVES.index(shelf)]}
    for path in sorted((PACKAGE / shelf).rglob("*.py")):
        assert imported(path) <= above | {shelf}, path.relative_to(ROOT)


def test_imported_finds_every_form_of_import(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("import minidoctor.step\nfrom minidoctor.text.stream import x\nfrom minidoctor import lora\n")
    assert imported(path) == {"step", "text", "lora"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_executes_stored_code_or_reads_the_environment(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bpickle\b|torch\.save\(|\bexec\(|(?<![.\w])eval\(", text)
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text))
    assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(text)))
    if path != PACKAGE / "cli" / "processes.py":  # reads the variables that torchrun sets
        assert not re.search(r"os\.environ|getenv\(", text)
