"""Baichuan-13B compared with its definition in plain_baichuan.py, where the stored fixtures do not reach."""

import json
from dataclasses import replace

import pytest
import torch
from paths import FIXTURES
from plain_baichuan import plain_logits
from tiny_checkpoints import write_checkpoint

from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.kv_cache import KVCache
from minidoctor.model import Model

KINDS = ["baichuan-13b", "baichuan2-13b"]


def read_fixture(kind):
    """Return the model, the tensors of the file and the content of config.json."""
    directory = FIXTURES / "models" / kind
    tensors = {}
    for file in directory.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return load_model(directory), tensors, json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_beyond_the_training_length_equal_the_definition(kind):
    model, tensors, settings = read_fixture(kind)
    tokens = torch.randint(0, settings["vocab_size"], (settings["model_max_length"] + 20,))
    cache = KVCache(model.config, 1, len(tokens), model.lm_head.weight)
    with torch.no_grad():
        expected = plain_logits(tensors, settings, tokens)
        torch.testing.assert_close(model(tokens[None])[0][0], expected, atol=1e-5, rtol=1e-5)
        for first, last in ((0, 120), *((i, i + 1) for i in range(120, len(tokens)))):
            logits, _ = model(tokens[None, first:last], torch.arange(first, last)[None], cache)
            torch.testing.assert_close(logits[0], expected[first:last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batch_beyond_the_training_length_equals_single_sequences(kind):
    model, tensors, settings = read_fixture(kind)
    rows = [torch.randint(0, settings["vocab_size"], (n,)) for n in (140, 129, 5)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        logits, _ = model(padded)
    for ours, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(ours[: len(row)], plain_logits(tensors, settings, row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_logits_differ_with_rotary_positions_and_in_the_other_version(kind):
    model, tensors, settings = read_fixture(kind)
    tokens = torch.randint(0, settings["vocab_size"], (30,))
    rotary = Model(replace(model.config, alibi=False)).eval()
    rotary.load_state_dict(model.state_dict())
    changed = settings | {"z_loss_weight": 0}
    if "z_loss_weight" in settings:
        del changed["z_loss_weight"]
    with torch.no_grad():
        expected = model(tokens[None])[0][0]
        assert not torch.allclose(rotary(tokens[None])[0][0], expected, atol=1e-2)
        assert not torch.allclose(plain_logits(tensors, changed, tokens), expected, atol=1e-2)


def test_40_heads_equal_the_definition(tmp_path):
    changes = {"num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 80, "rms_norm_eps": 1e-6}
    tensors = write_checkpoint(tmp_path, "baichuan2-13b", vocab_size=50, num_hidden_layers=2, **changes)
    settings, tokens = json.loads((tmp_path / "config.json").read_text()), torch.randint(0, 50, (40,))
    with torch.no_grad():
        expected = plain_logits(tensors, settings, tokens)
        # Weights of standard deviation 1 give scores of about 100, whose rounding the softmax enlarges.
        torch.testing.assert_close(load_model(tmp_path)(tokens[None])[0][0], expected, atol=1e-4, rtol=1e-4)
