import json
import random
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from minidoctor.checkpoints.adapters import (
    ADAPTER,
    ADAPTER_FILES,
    CONFIG,
    has_adapter,
    load,
    load_adapted_model,
    load_into,
    read_adapter_config,
    save_adapter_config,
)
from minidoctor.checkpoints.hugging_face import checkpoint_hash, load_model, save_model
from minidoctor.config import AdapterConfig, RopeScaling, TrainConfig
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import Model, adapter_state
from minidoctor.router import Router
from minidoctor.training.state import STATE, read_state, save_training_state


@pytest.fixture
def copy(tmp_path, adapter_dir):
    return shutil.copytree(adapter_dir, tmp_path / "adapter")


def test_has_adapter_finds_each_file_of_ours_and_of_peft(tmp_path):
    assert not has_adapter(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").touch()
    assert not has_adapter(tmp_path)
    assert {ADAPTER, CONFIG, STATE, "adapter_model.safetensors", "adapter_model.bin"} == set(ADAPTER_FILES)
    for name in ADAPTER_FILES:
        (tmp_path / name).symlink_to("nowhere")  # a file that cannot be read is not overwritten either
        assert has_adapter(tmp_path)
        (tmp_path / name).unlink()


def test_a_saved_adapter_comes_back_on_its_base(base_dir, adapter_dir, adapter):
    expected = dict(read_tensors(adapter_dir / ADAPTER))
    model = load_adapted_model(base_dir, adapter_dir)
    back = adapter_state(model)
    assert model.adapter == adapter
    assert not model.training
    assert set(back) == set(expected)
    for name, tensor in back.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == torch.float32


def test_a_loaded_adapter_computes_what_it_computed_before(tmp_path, base_dir, adapted, copy, config):
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    write_tensors(copy / ADAPTER, adapter_state(adapted))
    logits = load_adapted_model(base_dir, copy)(tokens)[0]
    assert torch.equal(logits, adapted(tokens)[0])
    assert (logits - load_model(base_dir)(tokens)[0]).abs().max() > 0.1  # the experts do something


def test_an_adapter_of_another_base_is_refused_with_both_names(tmp_path, base_dir, adapter_dir, model):
    with torch.no_grad():
        model.model.norm.weight[0] += 0.25
    other = tmp_path / "other"
    save_model(model, other, dtype=torch.float32)
    with pytest.raises(ValueError, match="the adapter was trained on") as refused:
        load_adapted_model(other, adapter_dir)
    message = str(refused.value)
    for expected in (repr(base_dir.name), str(other), checkpoint_hash(base_dir)[:12], checkpoint_hash(other)[:12]):
        assert expected in message


def test_the_adapters_config_says_which_base_it_belongs_to(base_dir, adapter_dir, adapter, config):
    content = json.loads((adapter_dir / CONFIG).read_text())
    base = {"name": base_dir.name, "model": asdict(config), "fingerprint": checkpoint_hash(base_dir)}
    # As JSON has it: a tuple comes back as a list.
    assert content == json.loads(json.dumps({"base": base, "adapter": asdict(adapter), "chat_format": "auto"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64}, "dim 32, .* has 64"),
        ({"n_layers": 3}, "n_layers 2, .* has 3"),
        ({"n_heads": 8, "n_kv_heads": 4}, "n_heads 4, .* has 8"),
        ({"vocab_size": 500}, "vocab_size 420, .* has 500"),
        # Of these the shapes say nothing.
        ({"rope_theta": 5e5}, r"rope_theta 10000\.0, .* has 500000\.0"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-05, .* has 1e-06"),
        ({"window": 64}, "window 0, .* has 64"),
        ({"rope_scaling": RopeScaling("llama3", 2.0)}, "rope_scaling None, .* has .*llama3"),
        ({"tied": False}, "tied True, .* has False"),
        ({"qkv_bias": True}, "qkv_bias False, .* has True"),
        ({"qk_norm": True}, "qk_norm False, .* has True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_of_a_base_of_another_architecture_is_refused_by_the_field(
    tmp_path, config, adapter_dir, changes, message
):
    other = tmp_path / "other"
    save_model(Model(replace(config, **changes)), other, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: the adapter was trained on '.*' with {message}"):
        load_adapted_model(other, adapter_dir)


def test_an_adapter_comes_back_on_a_base_with_scaled_positions(tmp_path, config, adapter):
    scaled = replace(config, rope_scaling=RopeScaling("llama3", 8.0, original_seq_len=32), rope_theta=500000.0)
    save_model(Model(scaled), tmp_path / "base", dtype=torch.float32)
    save_adapter_config(tmp_path / "adapter", str(tmp_path / "base"), adapter)
    assert read_adapter_config(tmp_path / "adapter", tmp_path / "base") == adapter
    other = replace(scaled, rope_scaling=RopeScaling("llama3", 4.0, original_seq_len=32))
    save_model(Model(other), tmp_path / "other", dtype=torch.float32)
    with pytest.raises(ValueError, match="the adapter was trained on 'base' with rope_scaling"):
        read_adapter_config(tmp_path / "adapter", tmp_path / "other")


def test_a_damaged_base_is_not_called_a_damaged_adapter(tmp_path, base_dir, adapter_dir):
    base = shutil.copytree(base_dir, tmp_path / "damaged")
    (base / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged/config\.json: not JSON") as refused:
        load_adapted_model(base, adapter_dir)
    assert "adapter_config.json" not in str(refused.value)


def test_an_adapter_is_asked_in_the_chat_format_it_was_trained_in(base_dir, copy, adapter):
    def asked(*chat_format):
        return load(str(base_dir), str(copy), torch.float32, torch.device("cpu"), *chat_format)[1].chat_format

    assert asked() == "minidoctor"  # what the base speaks
    save_adapter_config(copy, str(base_dir), adapter, "plain")
    assert asked() == "plain"
    assert asked("zephyr") == "zephyr"
    for unknown in ("klingon", None, 5, []):
        content = json.loads((copy / CONFIG).read_text()) | {"chat_format": unknown}
        (copy / CONFIG).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="chat_format must be auto, "):
            asked()


def test_plain_lora_has_no_router_and_comes_back(tmp_path, base_dir, config):
    adapter = AdapterConfig(n_experts=1, top_k=1, rank=3, targets=("k_proj", "gate_proj"))
    model = load_model(base_dir, adapter=adapter)
    state = adapter_state(model)
    assert not any(isinstance(module, Router) for module in model.modules())
    places = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.k_proj", "mlp.gate_proj")]
    assert set(state) == {f"{place}.lora_{letter}" for place in places for letter in "ab"}
    for tensor in state.values():
        torch.nn.init.normal_(tensor, std=0.3)
    save_adapter_config(tmp_path, str(base_dir), adapter)
    write_tensors(tmp_path / ADAPTER, state)
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    logits, routings = load_adapted_model(base_dir, tmp_path)(tokens)
    assert routings == []
    assert torch.equal(logits, model(tokens)[0])
    assert (logits - load_model(base_dir)(tokens)[0]).abs().max() > 0.1


def test_a_file_of_another_program_may_have_its_own_names_and_precision(tmp_path):
    path, stored = tmp_path / "a.safetensors", torch.randn(3, 2).bfloat16()
    write_tensors(path, {"theirs.a": stored})
    state = {"a": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match="2 tensors are missing or unexpected: a"):
        load_into(state, path)
    load_into(state, path, lambda name: name.removeprefix("theirs."))
    assert torch.equal(state["a"], stored.float())
    for wrong in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(6), torch.zeros(3, 1)):
        write_tensors(path, {"theirs.a": wrong})
        with pytest.raises(ValueError, match=r"a is torch\..*, expected torch\.float32 \(3, 2\)"):
            load_into(state, path, lambda name: name.removeprefix("theirs."))
    assert torch.equal(state["a"], stored.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(min(t)), "1 tensors are missing or unexpected: model.layers.0"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 tensors are missing or unexpected: extra"),
        (lambda t: t.update({min(t): torch.zeros(3)}), r"expected torch\.float32"),
        (lambda t: t.update({min(t): t[min(t)].bfloat16()}), r"is torch\.bfloat16 .*expected torch\.float32"),
    ],
)
def test_a_damaged_adapter_is_refused_with_the_tensors_name(base_dir, copy, change, message):
    tensors = dict(read_tensors(copy / ADAPTER))
    change(tensors)
    write_tensors(copy / ADAPTER, tensors)
    with pytest.raises(ValueError, match=message):
        load_adapted_model(base_dir, copy)


def test_a_truncated_or_missing_adapter_is_refused(base_dir, copy):
    content = (copy / ADAPTER).read_bytes()
    for n in (0, 7, 100, len(content) - 1):
        (copy / ADAPTER).write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"adapter\.safetensors"):
            load_adapted_model(base_dir, copy)
    for name in (ADAPTER, CONFIG):
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_adapted_model(base_dir, copy)


def test_an_adapter_config_that_is_no_config_is_refused(base_dir, copy):
    for text in ("", "{", "[]", "null", "{}", '{"base": []}', '{"base": {}, "adapter": {}}', "[" * 100_000):
        (copy / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            load_adapted_model(base_dir, copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_experts": 5},
        {"n_experts": 0},
        {"n_experts": "4"},
        {"n_experts": 4.0},
        {"n_experts": 10**30},
        {"top_k": 5},
        {"top_k": 2.0},
        {"rank": 3},
        {"rank": 2.5},
        {"rank": 10**15},
        {"alpha": None},
        {"alpha": float("nan")},
        {"routing_dim": 4.0},
        {"routing_dim": -4},
        {"targets": None},
        {"targets": []},
        {"targets": "up_proj"},
        {"targets": [["up_proj"]]},
        {"targets": ["up_proj", "up_proj"]},
        {"targets": ["up_proj"]},
        {"targets": ["lm_head"]},
        {"unheard_of": 1},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_damaged_adapter_config_is_refused(base_dir, copy, changes):
    content = json.loads((copy / CONFIG).read_text())
    content["adapter"] |= changes
    (copy / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="adapter"):
        load_adapted_model(base_dir, copy)


@pytest.mark.parametrize("base", [None, [], "name", {}, {"name": "base"}, {"name": "base", "fingerprint": 5}])
def test_an_adapter_config_with_a_damaged_base_is_refused(base_dir, copy, base):
    content = json.loads((copy / CONFIG).read_text()) | {"base": base}
    (copy / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter_config(copy, base_dir)


@pytest.mark.parametrize(
    "changes",
    [{"model": None}, {"model": []}, {"model": {}}, {"model": "llama"}, {"fingerprint": 5}, {"fingerprint": ""}],
)
def test_a_damaged_description_of_the_base_is_refused(base_dir, copy, changes):
    content = json.loads((copy / CONFIG).read_text())
    content["base"] |= changes
    (copy / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter_config(copy, base_dir)


def test_100_mutated_adapters_load_or_are_refused(base_dir, copy):
    draw, refused = random.Random(0), 0
    for name in (CONFIG, ADAPTER):
        content = (copy / name).read_bytes()
        for _ in range(50):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (copy / name).write_bytes(changed[: draw.choice([len(content), len(content), 200])])
            try:
                load_adapted_model(base_dir, copy)
            except (ValueError, FileNotFoundError):
                refused += 1
        (copy / name).write_bytes(content)
    load_adapted_model(base_dir, copy)
    assert 50 < refused < 100


def test_a_run_comes_back_as_it_was_saved(tmp_path):
    run = {"step": 3, "seconds": 0.5, "tokens": 70, "load": [[0.5, 0.5]], "eval_before": None}
    configs = {"config": TrainConfig(lr=0.1, data="痛风.jsonl"), "adapter": AdapterConfig(rank=2)}
    run |= {"data": "a digest"} | {name: asdict(config) for name, config in configs.items()}
    save_training_state(tmp_path, {"a": torch.ones(2)}, run)
    assert read_state(tmp_path) == run | configs


def test_a_run_that_is_not_there_or_damaged_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        read_state(tmp_path)
    (tmp_path / STATE).write_bytes(b"\0" * 5)
    with pytest.raises(ValueError, match="truncated"):
        read_state(tmp_path)


@pytest.mark.parametrize("metadata", [{}, {"run": "{"}, {"run": "[]"}, {"run": "{}"}], ids=str)
def test_a_training_state_without_a_run_is_refused(tmp_path, metadata):
    write_tensors(tmp_path / STATE, {"a": torch.ones(2)}, metadata)
    with pytest.raises(ValueError, match="no training state"):
        read_state(tmp_path)


def test_an_unknown_chat_format_is_refused_before_the_weights_are_read(tmp_path, base_dir):
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    whole = load(str(base), None, torch.float32, torch.device("cpu"), chats=False)
    assert whole[1].format is None
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"its chat_template is none of .*--chat-format chooses one"):
        load(str(base), None, torch.float32, torch.device("cpu"))
