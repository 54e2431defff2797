"""The promises about the code as a whole: reading order, line counts, what is never used."""

import ast
import re
from pathlib import Path

import minidoctor

ROOT = Path(__file__).parent.parent
ORDER = re.search(r"files above it:\n(.*?)\.\n", minidoctor.__doc__, re.DOTALL)[1].replace("\n", " ").split(", ")
PACKAGE = ROOT / "minidoctor"
SOURCES = [*sorted(PACKAGE.glob("*.py")), ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "data").glob("*.py"))]


def imported(path):
    """The modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minidoctor."):
            found.add(node.module.removeprefix("minidoctor."))
    return found


def test_a_file_imports_only_files_above_it():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)
    for place, name in enumerate(ORDER):
        assert imported(PACKAGE / f"{name}.py") <= set(ORDER[:place]), name


def test_the_readme_has_the_real_order_and_line_counts():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\w+\.py` \|.*$", readme, re.MULTILINE)
    columns = [re.findall(r"`(\w+\.py)` \| (\d+) \|", row) for row in rows]
    table = [column[i] for i in range(3) for column in columns if i < len(column)]  # down the left column first
    assert [name for name, _ in table] == [f"{name}.py" for name in (*ORDER, "train", "sample")]
    for name, lines in table:
        path = ROOT / name if name in ("train.py", "sample.py") else PACKAGE / name
        assert len(path.read_text(encoding="utf-8").splitlines()) == int(lines), name
    assert len(readme.splitlines()) < 250  # of them 40 are the study, with its table and pictures


def test_nothing_on_disk_can_execute_code():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\b|torch\.load\(|torch\.save\(|\bexec\(|(?<![.\w])eval\(", text), path


def test_no_environment_switches_and_no_globals():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"os\.environ|getenv\(|^\s*global ", text, re.MULTILINE), path
