import argparse
import dataclasses

import pytest

from minidoctor.cli.flags import MODEL_FLAGS, add_flags, add_model_flags, from_flags
from minidoctor.config import AdapterConfig, SampleConfig, TrainConfig


def parse(config, *words):
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize("config", [TrainConfig, AdapterConfig, SampleConfig])
def test_without_flags_the_dataclass_has_its_defaults_and_no_flag_is_present(config):
    assert parse(config) == {}
    assert from_flags(config, {}) == config()


@pytest.mark.parametrize("config", [TrainConfig, AdapterConfig, SampleConfig])
def test_every_field_with_a_help_text_is_a_flag_that_accepts_its_printed_default(config):
    words, expected = [], {}
    fields = [field for field in dataclasses.fields(config) if field.metadata]
    assert len(fields) >= len(dataclasses.fields(config)) - 1  # only the program itself sets static_cache
    for field in fields:
        expected[field.name] = field.default
        if field.default is False:
            words += ["--" + field.name.replace("_", "-")]
            expected[field.name] = True
        else:
            text = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
            words += ["--" + field.name.replace("_", "-"), text]
    assert parse(config, *words) == expected


def test_flags_become_values_of_the_field_types():
    words = ["--batch-size", "4", "--lr", "1e-3", "--base", "some/where", "--resume"]
    config = from_flags(TrainConfig, parse(TrainConfig, *words))
    assert config == TrainConfig(batch_size=4, lr=0.001, base="some/where", resume=True)


def test_a_tuple_flag_is_split_at_commas():
    config = from_flags(AdapterConfig, parse(AdapterConfig, "--targets", "q_proj,v_proj"))
    assert config.targets == ("q_proj", "v_proj")


def test_zero_and_empty_text_are_not_replaced_by_the_default():
    config = from_flags(TrainConfig, parse(TrainConfig, "--warmup", "0", "--eval", ""))
    assert (config.warmup, config.eval) == (0, "")


def test_flags_of_another_dataclass_are_left_out():
    assert from_flags(SampleConfig, {"top_k": 3, "rank": 4}) == SampleConfig(top_k=3)


def test_a_flag_of_the_wrong_type_ends_in_exit_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(TrainConfig, "--steps", "many")
    assert "--steps" in capsys.readouterr().err


def test_model_flags_are_all_or_the_named_ones():
    parser = argparse.ArgumentParser()
    add_model_flags(parser, "base", "device")
    assert vars(parser.parse_args(["--device", "cpu"])) == {"base": "data/base", "device": "cpu"}
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    assert set(vars(parser.parse_args(["--chat-format", "plain"]))) == set(MODEL_FLAGS)
    assert [parser.parse_args(words).thinking for words in ([], ["--thinking"])] == [False, True]


def test_model_flags_have_the_defaults_of_the_training_flags():
    config = TrainConfig()
    assert {name: MODEL_FLAGS[name][0] for name in ("base", "chat_format", "device", "dtype")} == {
        name: getattr(config, name) for name in ("base", "chat_format", "device", "dtype")
    }
