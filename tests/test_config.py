import argparse
import dataclasses
import re
import sys

import pytest
import torch

from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig

SHAPE = {
    "vocab_size": 9,
    "dim": 8,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 2,
    "ffn_dim": 8,
}


def given(config, *words):
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize("config", [TrainConfig, AdapterConfig, SampleConfig])
def test_without_flags_the_dataclass_has_its_defaults_and_nothing_counts_as_given(config):
    assert given(config) == {}
    assert from_flags(config, {}) == config()


@pytest.mark.parametrize("config", [TrainConfig, AdapterConfig, SampleConfig])
def test_every_field_is_a_flag_that_takes_what_its_default_prints(config):
    words, expected = [], {}
    for field in dataclasses.fields(config):
        expected[field.name] = field.default
        if field.default is False:
            words += ["--" + field.name.replace("_", "-")]
            expected[field.name] = True
        else:
            text = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
            words += ["--" + field.name.replace("_", "-"), text]
    assert given(config, *words) == expected


def test_flags_become_values_of_the_field_types():
    words = ["--batch-size", "4", "--lr", "1e-3", "--base", "some/where", "--resume"]
    config = from_flags(TrainConfig, given(TrainConfig, *words))
    assert config == TrainConfig(batch_size=4, lr=0.001, base="some/where", resume=True)


def test_a_tuple_flag_is_split_at_commas():
    config = from_flags(AdapterConfig, given(AdapterConfig, "--targets", "q_proj,v_proj"))
    assert config.targets == ("q_proj", "v_proj")


def test_a_zero_that_was_given_is_not_taken_for_the_default():
    config = from_flags(TrainConfig, given(TrainConfig, "--warmup", "0", "--eval", ""))
    assert (config.warmup, config.eval) == (0, "")


def test_flags_of_another_dataclass_are_left_out():
    assert from_flags(SampleConfig, {"top_k": 3, "rank": 4}) == SampleConfig(top_k=3)


def test_a_flag_of_the_wrong_type_ends_in_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        given(TrainConfig, "--steps", "many")
    assert ended.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (AdapterConfig, {"top_k": 9}, "top_k must be between 1 and n_experts=8, got 9"),
        (AdapterConfig, {"top_k": 0}, "top_k must be between 1 and n_experts=8, got 0"),
        (AdapterConfig, {"n_experts": 0}, "n_experts must be at least 1 and at most 4096, got 0"),
        (AdapterConfig, {"rank": -1}, "rank must be at least 1 and at most 4096, got -1"),
        (AdapterConfig, {"alpha": float("nan")}, "alpha must be above 0, got nan"),
        (AdapterConfig, {"targets": ("gate",)}, "unknown target 'gate', choose from q_proj"),
        (AdapterConfig, {"targets": ()}, "targets must be named once each, got ()"),
        (AdapterConfig, {"targets": ("q_proj", "q_proj")}, "targets must be named once each, got ('q_proj'"),
        (TrainConfig, {"steps": 0}, "steps must be at least 1, got 0"),
        (TrainConfig, {"lr": 0.0}, "lr must be above 0, got 0.0"),
        (TrainConfig, {"accumulate": -2}, "accumulate must be at least 1, got -2"),
        (TrainConfig, {"contrast_weight": -0.1}, "contrast_weight must be at least 0, got -0.1"),
        (TrainConfig, {"balance_weight": float("nan")}, "balance_weight must be at least 0, got nan"),
        (TrainConfig, {"queue_share": 65}, "queue_share must be at most queue_capacity=64, got 65"),
        (TrainConfig, {"max_seq_len": 1}, "max_seq_len must be at least 2, got 1"),
        (TrainConfig, {"seed": -1}, "seed must be at least 0, got -1"),
        (SampleConfig, {"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        (
            SampleConfig,
            {"temperature": float("inf")},
            "temperature must be at least 0 and at most 2.14748e+09, got inf",
        ),
        (SampleConfig, {"top_k": -1}, "top_k must be at least 0, got -1"),
        (SampleConfig, {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        (SampleConfig, {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        (SampleConfig, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (ModelConfig, {**SHAPE, "n_kv_heads": 3}, "n_kv_heads=3"),
        (ModelConfig, {**SHAPE, "head_dim": 3}, "head_dim must be even to be rotated in pairs, got 3"),
        (ModelConfig, {**SHAPE, "norm_eps": 0.0}, "norm_eps must be above 0 and at most 1, got 0.0"),
    ],
)
def test_a_bad_value_is_refused_by_name_expectation_and_value(config, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**values)


@pytest.mark.parametrize("config", [SampleConfig, TrainConfig])
def test_a_seed_that_no_generator_takes_is_refused(config):
    with pytest.raises(ValueError, match="seed"):
        config(seed=2**64)


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


def test_devices_and_dtypes_are_chosen_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda, mps, got 'tpu'"):
        choose_device("tpu")
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, got 'int8'"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(ValueError, match="device cuda is not there"):
        choose_device("cuda")
