import json
import os

import pytest

from minidoctor.training import report
from minidoctor.training.report import REPORT
from minidoctor.training.run import train
from minidoctor.training.start import start_or_resume
from minidoctor.training.state import STATE


def test_both_evaluations_are_printed_before_the_report_is_written(train_run, data, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            train_run(steps=2, eval=str(data))
    out = capsys.readouterr().out
    assert out.index("before\n") < out.index("after\n")
    assert "chance" in out[out.index("after\n") :]
    train(start_or_resume({"out": str(tmp_path / "run"), "resume": True}))
    assert json.loads((tmp_path / "run" / REPORT).read_text())["eval_after"]["n"] == 6


def test_a_file_name_that_is_not_utf8_reaches_the_report(train_run, data, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
    try:
        os.rename(data, name)
    except OSError:
        pytest.skip("this file system stores UTF-8 names only")
    path = os.fsdecode(name)
    out = train_run(steps=2, data=path, eval=path)
    assert json.loads((out / REPORT).read_text(encoding="utf-8"))["config"]["data"] == path
    (out / REPORT).unlink()
    train(start_or_resume({"out": str(out), "resume": True}))
    assert (out / REPORT).is_file()
    assert (out / STATE).is_file()


def test_a_run_without_evaluation_reports_none(train_run):
    content = json.loads((train_run(steps=1) / REPORT).read_text())
    assert (content["eval_before"], content["eval_after"], content["eval_trained"]) == (None, None, 0)
    assert content["steps"] == 1
    assert content["seconds"] > 0
