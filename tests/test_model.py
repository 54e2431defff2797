import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from minidoctor.config import AdapterConfig, ModelConfig
from minidoctor.files import read_tensors
from minidoctor.model import KVCache, Model, adapter_state, is_adapter_name, rotary_frequencies, rotary_table, rotate
from minidoctor.weights import load_model, save_model

TINY = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIXTURE = Path(__file__).parent / "fixtures" / "llama"


def tiny_model(adapter: AdapterConfig | None = None) -> Model:
    """Random weights; the experts too, so that they matter."""
    torch.manual_seed(0)
    model = Model(TINY, adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["logits", "greedy"])
def test_logits_equal_an_independent_implementation(name):
    """Computed once by `tests/make_fixtures.py`; see there."""
    model = load_model(FIXTURE)
    stored = dict(read_tensors(FIXTURE / "expected.safetensors"))
    with torch.no_grad():
        if name == "logits":
            torch.testing.assert_close(model(stored["tokens"])[0], stored["logits"])
        else:
            tokens = stored["tokens"][:1]
            for _ in range(stored["greedy"].shape[1] - tokens.shape[1]):
                tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], dim=1)
            assert torch.equal(tokens, stored["greedy"])


def test_a_token_is_not_seen_by_those_before_it():
    model = tiny_model(AdapterConfig(n_experts=4, routing_dim=8, targets=EVERYWHERE))
    tokens = torch.randint(0, 50, (2, 10))
    logits, routings = model(tokens)
    for t in range(9):
        changed = tokens.clone()
        changed[:, t + 1] = (changed[:, t + 1] + 1) % 50
        other, other_routings = model(changed)
        assert torch.equal(other[:, : t + 1], logits[:, : t + 1])
        assert not torch.allclose(other[:, t + 1 :], logits[:, t + 1 :])
        for ours, theirs in zip(routings, other_routings, strict=True):
            assert torch.equal(ours.gates[:, : t + 1], theirs.gates[:, : t + 1])


def test_cached_steps_equal_the_full_forward_for_rows_of_different_lengths():
    model = tiny_model(AdapterConfig(n_experts=4, routing_dim=8, targets=EVERYWHERE))
    tokens = torch.randint(0, 50, (3, 12))
    lengths = torch.tensor([7, 3, 5])  # each row's prompt; the rest follows one token at a time
    with torch.no_grad():
        full, _ = model(tokens)
        cache = KVCache(TINY, 3, 12, model.lm_head.weight)
        cache.length = 7
        prompt = tokens[:, :7].masked_fill(torch.arange(7) >= lengths[:, None], 0)
        logits, _ = model(prompt, torch.arange(7).expand(3, 7), cache)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row, :length], full[row, :length])
        for step in range(5):
            positions = lengths + step
            cache.length += 1
            logits, _ = model(tokens[torch.arange(3), positions][:, None], positions[:, None], cache)
            torch.testing.assert_close(logits[:, 0], full[torch.arange(3), positions])


def test_padding_on_the_right_changes_nothing():
    model = tiny_model()
    tokens = torch.randint(0, 50, (2, 6))
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[0][:, :6], model(tokens)[0])


def test_adapted_model_equals_the_base_bit_for_bit_before_training(tmp_path):
    save_model(tiny_model(), tmp_path, torch.float32)
    tokens = torch.randint(0, 50, (2, 10))
    adapter = AdapterConfig(n_experts=4, routing_dim=8, targets=EVERYWHERE)
    adapted, base = load_model(tmp_path, adapter=adapter), load_model(tmp_path)
    logits, routings = adapted(tokens)
    assert torch.equal(logits, base(tokens)[0])
    assert len(routings) == 4  # attention and feed-forward of two layers
    assert not base(tokens)[1]


def test_only_experts_and_routers_are_trained():
    model = tiny_model(AdapterConfig(targets=("gate_proj", "up_proj", "down_proj")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_state(model))
    assert all(is_adapter_name(name) for name in trained)
    per_layer = 3 * 2 + 3  # A and B of three linears; the router's projection, embeddings and scale
    assert len(trained) == 2 * per_layer


def test_the_same_seed_gives_the_same_experts_whatever_the_base(tmp_path):
    save_model(tiny_model(), tmp_path, torch.float32)
    torch.manual_seed(3)
    loaded = adapter_state(load_model(tmp_path, adapter=AdapterConfig()))
    torch.manual_seed(3)
    again = adapter_state(load_model(tmp_path, torch.bfloat16, adapter=AdapterConfig()))
    assert all(torch.equal(loaded[name], again[name]) for name in loaded)


def test_rotation_depends_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    frequencies = rotary_frequencies(TINY, torch.device("cpu"))

    def score(i: int, j: int) -> float:
        tables = [rotary_table(torch.tensor([[p]]), frequencies, torch.float32) for p in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum().item()

    assert score(5, 3) == pytest.approx(score(105, 103), rel=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_rotation_turns_each_pair_by_its_angle():
    x = torch.randn(1, 1, 1, 4)
    frequencies = rotary_frequencies(replace(TINY, head_dim=4, rope_theta=100.0), torch.device("cpu"))
    turned = rotate(x, rotary_table(torch.tensor([[3]]), frequencies, torch.float32)).flatten()
    for pair, angle in ((0, 3.0), (1, 3.0 / 10)):
        complex_number = torch.complex(x.flatten()[pair], x.flatten()[pair + 2])
        expected = complex_number * torch.polar(torch.tensor(1.0), torch.tensor(angle))
        torch.testing.assert_close(torch.complex(turned[pair], turned[pair + 2]), expected)


def test_a_bfloat16_base_trains_float32_experts(tmp_path):
    save_model(tiny_model(), tmp_path)
    model = load_model(tmp_path, torch.bfloat16, adapter=AdapterConfig(n_experts=4, routing_dim=8))
    logits, _ = model(torch.randint(0, 50, (2, 10)))
    logits.float().logsumexp(-1).mean().backward()
    assert logits.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_adapter_name(name) else torch.bfloat16)
        assert (parameter.grad is not None) == is_adapter_name(name)


def test_parameter_names_are_those_of_the_checkpoint():
    names = set(json.loads((FIXTURE / "names.json").read_text()))
    assert {name for name in load_model(FIXTURE).state_dict() if name != "lm_head.weight"} == names
