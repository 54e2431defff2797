import sys

import pytest

from minidoctor.cli.main import run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such thing"), 2),
        (FileNotFoundError("x: no such file"), 2),
        (IsADirectoryError(21, "Is a directory", "x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (OSError(28, "No space left on device", "x"), 1),
        (FloatingPointError("step 3: loss not finite"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_run_ends_an_error_with_its_exit_code_and_one_line_on_stderr(error, code, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"program.py: {str(error) or 'interrupted'}\n"


def test_run_prints_one_line_without_control_characters_whatever_the_message_holds(capsys):
    def main():
        raise ValueError("model.safetensors: 1 tensors are unexpected: two\nlines and \x1b[2J")

    with pytest.raises(SystemExit):
        run(main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_run_returns_after_success_and_lets_a_programming_error_show_its_traceback(capsys):
    run(lambda: None)
    with pytest.raises(KeyError):
        run(lambda: {}["missing"])
    assert capsys.readouterr() == ("", "")
