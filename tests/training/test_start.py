import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT

import train as program_file
from minidoctor.config import AdapterConfig, TrainConfig, UserError
from minidoctor.evaluate.inputs import TRAINING_QUESTIONS
from minidoctor.training import run, start
from minidoctor.training.log import METRICS
from minidoctor.training.report import REPORT
from minidoctor.training.start import lock_directory, resume_command, start_or_resume
from minidoctor.training.state import STATE, read_state


def resume(out, **flags):
    run.train(start_or_resume({"out": str(out), "resume": True, **flags}))


def test_a_second_run_in_one_directory_is_rejected_at_once(tmp_path):
    with lock_directory(tmp_path / "out"):
        with pytest.raises(UserError, match="another run is active"), lock_directory(tmp_path / "out"):
            pass
        with lock_directory(tmp_path / "separate"):
            pass
    with lock_directory(tmp_path / "out"):  # the file remains, the lock does not
        assert (tmp_path / "out" / "training.lock").exists()


@pytest.mark.slow
def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    code = f"""
from pathlib import Path
from minidoctor.training.start import lock_directory
with lock_directory(Path({str(tmp_path / "out")!r})):
    print("locked", flush=True)
    input()
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run is active"), lock_directory(tmp_path / "out"):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / "out" / "training.lock").exists()
    with lock_directory(tmp_path / "out"):
        pass


def test_rejected_flags_create_no_directory(tmp_path, program):
    for flags in (["--resume"], ["--rank", "0"]):
        code, _, err = program(program_file.main, "train.py", "--out", tmp_path / "out", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_model.safetensors", "adapter_model.bin",
                                  "adapter_config.json", METRICS, REPORT, TRAINING_QUESTIONS])  # fmt: skip
def test_a_new_run_overwrites_no_adapter_and_no_result(tmp_path, name):
    (tmp_path / name).write_text("content")
    with pytest.raises(UserError, match="already contains"):
        start_or_resume({"out": str(tmp_path)})
    assert (tmp_path / name).read_text() == "content"


def test_a_finished_run_is_protected_also_without_its_training_state(train_run):
    out = train_run(steps=1)
    with pytest.raises(UserError, match="already contains"):
        start_or_resume({"out": str(out)})
    (out / STATE).unlink()
    with pytest.raises(UserError, match="already contains"):
        start_or_resume({"out": str(out)})


def test_a_symlink_to_the_output_directory_is_kept(train_run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    out = train_run(steps=1)
    assert out.is_symlink()
    assert (tmp_path / "disk" / REPORT).is_file()


def test_a_dangling_symlink_as_output_is_reported_and_kept(tmp_path, program):
    (tmp_path / "run").symlink_to(tmp_path / "missing")
    code, _, err = program(program_file.main, "train.py", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert (tmp_path / "run").is_symlink()


def test_resume_accepts_the_automatic_values_of_the_first_command(train_run):
    out = train_run(steps=2)
    flags = {"out": str(out), "n_groups": 0, "dtype": "auto"}
    saved, state = read_state(out), start_or_resume(flags | {"resume": True})
    assert (state.config.dtype, state.adapter) == ("float32", saved.adapter)
    with pytest.raises(UserError, match="dtype is bfloat16"):
        start_or_resume(flags | {"resume": True, "dtype": "bfloat16"})


def test_resume_rejects_other_settings(train_run, tmp_path):
    out = train_run(steps=2)
    for flags in ({"lr": 0.5}, {"steps": 3}, {"rank": 3}):
        (name, value), *_ = flags.items()
        with pytest.raises(UserError, match=f"{name} is {value}"):
            start_or_resume({"out": str(out), "resume": True, **flags})
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        start_or_resume({"out": str(tmp_path / "nowhere"), "resume": True})


def test_resume_may_change_accumulation_checkpointing_and_compilation(train_run):
    flags = {"out": str(train_run(steps=1, compile=False)), "resume": True}
    changed = start_or_resume({**flags, "accumulate": 2, "recompute": True, "compile": True}).config
    assert (changed.accumulate, changed.recompute, changed.compile) == (2, True, True)
    assert start_or_resume(flags).config.compile is False


@pytest.fixture
def stopped(train_run, data, signal_in_step):
    """A run of 4 steps that was stopped after 2."""
    with signal_in_step(1):
        return train_run(steps=4, eval=str(data))


@pytest.mark.parametrize("name", start.INPUTS)
def test_resume_rejects_inputs_with_other_content(stopped, tmp_path, base_dir, rows_file, name):
    path = rows_file({"question": "Gout?", "answer": "uric acid"}, name="different.jsonl")
    if name == "base":
        path = shutil.copytree(base_dir, tmp_path / "different")
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-2] ^= 1
        (path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"--{name}"):
        resume(stopped, **{name: str(path)})


def test_resume_rejects_data_that_have_changed_in_place(stopped, data):
    data.write_text(data.read_text() + '{"question": "new", "answer": "row"}\n')
    with pytest.raises(UserError, match="--data"):
        resume(stopped)


def test_resume_rejects_an_evaluation_that_was_switched_off(stopped):
    with pytest.raises(UserError, match="--eval"):
        resume(stopped, eval="")


def test_resume_accepts_every_path_to_the_same_content(stopped, data, tmp_path, base_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copy(data, tmp_path / "copy.jsonl")
    base = shutil.copytree(base_dir, tmp_path / "base")
    resume("run", data=f"./{data.name}", eval=str(copy), base="./base")
    assert read_state(stopped).step == 4
    assert base.is_dir()


def test_a_run_with_relative_paths_resumes_in_another_directory(train_run, data, tmp_path, signal_in_step, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with signal_in_step(1):
        train_run(steps=4, data=data.name, out="run")
    monkeypatch.chdir("/")
    resume(tmp_path / "run")
    assert read_state(tmp_path / "run").step == 4


def test_a_moved_run_resumes(train_run, data, tmp_path, signal_in_step, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    data.rename(project / data.name)
    monkeypatch.chdir(project)
    with signal_in_step(1):
        train_run(steps=4, data=data.name, out="run")
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    resume("run")
    assert read_state(Path("run")).step == 4


@pytest.mark.parametrize("name", [METRICS, "adapter_config.json", TRAINING_QUESTIONS, "adapter.safetensors"])
def test_a_deleted_file_does_not_block_resume(stopped, name, capsys):
    content = (stopped / name).read_bytes()
    (stopped / name).unlink()
    resume(stopped)
    if name == METRICS:
        assert "contains 0 of the 2 steps" in capsys.readouterr().out
        assert len((stopped / name).read_text().splitlines()) == 2
    elif name != "adapter.safetensors":
        assert (stopped / name).read_bytes() == content


def test_the_flags_of_a_resumed_run_are_kept_before_its_next_save(stopped, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resume(stopped, accumulate=2)
    assert read_state(stopped).config.accumulate == 2
    assert read_state(stopped).step == 2


def test_printed_commands_are_quoted(stopped, capsys, program, monkeypatch):
    config = TrainConfig(out="my runs/$one")
    assert shlex.split(resume_command(config, 1)) == ["python", "train.py", "--out", "my runs/$one", "--resume"]
    words = shlex.split(resume_command(replace(config, compile=True), 4))
    assert words[:4] == ["torchrun", "--nproc-per-node", "4", "train.py"]
    assert words[-1] == "--compile"
    moved = stopped.rename(stopped.with_name("my run"))
    resume(moved)
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line[line.index("python") :])
    assert words[words.index("--adapter") + 1] == str(moved)


def test_the_saved_directory_is_that_of_the_program(stopped):
    assert read_state(stopped).directory == os.getcwd()
    assert start_or_resume({"out": "unused"}).adapter == AdapterConfig()
