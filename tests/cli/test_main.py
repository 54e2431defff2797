import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from minidoctor.cli.main import run
from minidoctor.config import UserError

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("rank must be at least 1"), 2),
        (FileNotFoundError("x: no such file"), 2),
        (FileExistsError(17, "File exists", "x"), 2),
        (IsADirectoryError(21, "Is a directory", "x"), 2),
        (NotADirectoryError(20, "Not a directory", "x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (OSError(28, "No space left on device", "x"), 1),
        (BrokenPipeError(32, "Broken pipe"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 1),
        (RuntimeError(ALLOCATOR), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_expected_errors_become_one_line_and_an_exit_code(error, code, program):
    assert program(raises(error), "program.py") == (code, "", f"program.py: {str(error) or 'interrupted'}\n")


def test_an_allocation_that_fails_becomes_one_line(program):
    code, _, err = program(lambda: torch.empty(2**60, dtype=torch.uint8), "program.py")
    assert (code, err.count("\n")) == (1, 1)
    assert program(raises(MemoryError()), "program.py") == (1, "", "program.py: MemoryError\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a fault in the code"),
        KeyError("missing"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FloatingPointError("nan"),
    ],
)
def test_any_other_exception_is_raised(error, program):
    with pytest.raises(type(error)):
        program(raises(error), "program.py")


def test_a_message_is_one_line_without_control_characters(program):
    _, _, err = program(raises(UserError("unexpected: two\nlines and \x1b[2J, \udce9")), "program.py")
    assert err == "program.py: unexpected: two lines and \\x1b[2J, \\udce9\n"


def start(code, **variables):
    """Run a program of this code as a process."""
    environment = {**os.environ, **variables}
    program = f"from minidoctor.cli.main import run\n\ndef main():\n    {code}\n\nrun(main)\n"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.slow
def test_a_value_error_in_the_code_shows_its_traceback():
    ended = start("[1].index(2)")
    assert ended.returncode == 1
    assert b"Traceback" in ended.stderr
    assert b"ValueError: 2 is not in list" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"caf\\xe9 \\u75db \\udce9\n"), ("latin-1", b"caf\xe9 \\u75db \\udce9\n")]
)
def test_text_that_the_terminal_cannot_print_is_escaped(encoding, expected):
    ended = start(r'print("caf\xe9 \u75db \udce9")', PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stdout) == (0, expected)


@pytest.mark.slow
def test_printed_lines_reach_a_log_file_at_once():
    ended = start('print("step 1"); print("step 2"); __import__("os")._exit(0)', PYTHONUNBUFFERED="")
    assert ended.stdout == b"step 1\nstep 2\n"


@pytest.mark.parametrize(
    ("path", "name"),
    [("/somewhere/train.py", "train.py"), ("/somewhere/minidoctor/evaluate/__main__.py", "minidoctor.evaluate")],
)
def test_errors_begin_with_the_name_of_the_program(path, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [path])

    def main():
        raise UserError("no questions")

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == f"{name}: no questions\n"
