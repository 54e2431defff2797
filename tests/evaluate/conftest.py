"""The evaluation program, and small inputs for it."""

import json
import re
import shutil

import pytest
from benchmark_files import ANATOMY

from minidoctor.evaluate.__main__ import main


@pytest.fixture
def evaluate_program(program, base_dir):
    """Run the program and return its output. With `error` it must fail, and stderr must match."""

    def run(*words, base=base_dir, error=None):
        words = words if words[0] == "--compare" else ("--base", base, "--device", "cpu", *words)
        code, out, err = program(main, "evaluate", *words)
        assert (code != 0) == (error is not None), err
        if error:
            assert re.search(error, err), err
        return out

    return run


@pytest.fixture
def long_base(base_dir, tmp_path):
    """The base with a context for the prompts of the benchmarks, which its tokenizer encodes byte by byte."""
    directory = shutil.copytree(base_dir, tmp_path / "long_base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return directory


@pytest.fixture
def cmmlu(tmp_path):
    """test/anatomy.csv, and dev/anatomy.csv with other questions."""
    for name, text in (("test", ANATOMY), ("dev", ANATOMY.replace("哪个科", "什么科").replace("关键", "主要"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anatomy.csv").write_text(text, encoding="utf-8")
    return tmp_path / "test" / "anatomy.csv"
