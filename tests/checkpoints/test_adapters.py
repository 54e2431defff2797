import json
import random
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from tiny_checkpoints import ABSENT, change_json, change_tensors, randomize

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
from minidoctor.config import AdapterConfig, RopeScaling, UserError
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import Model, adapter_state
from minidoctor.router import Router


@pytest.fixture
def copy(tmp_path, adapter_dir):
    return shutil.copytree(adapter_dir, tmp_path / "adapter")


def change_section(directory, section, **changes):
    """Change keys of one object in adapter_config.json."""
    content = json.loads((directory / CONFIG).read_text())
    content[section] |= changes
    (directory / CONFIG).write_text(json.dumps(content))


def test_has_adapter_finds_each_file_of_ours_and_of_peft(tmp_path):
    assert not has_adapter(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").touch()
    assert not has_adapter(tmp_path)
    theirs = {"adapter_model.safetensors", "adapter_model.bin"}
    assert {ADAPTER, CONFIG, "training_state.safetensors"} | theirs == set(ADAPTER_FILES)
    for name in ADAPTER_FILES:
        (tmp_path / name).symlink_to("nowhere")  # a file that cannot be read is not overwritten either
        assert has_adapter(tmp_path)
        (tmp_path / name).unlink()


def test_saved_adapter_loads_onto_its_base(base_dir, adapter_dir, adapter):
    stored = dict(read_tensors(adapter_dir / ADAPTER))
    model = load_adapted_model(base_dir, adapter_dir)
    state = adapter_state(model)
    assert model.adapter == adapter
    assert not model.training
    assert set(state) == set(stored)
    for name, tensor in state.items():
        assert torch.equal(tensor, stored[name]), name
        assert tensor.dtype == torch.float32


def test_loaded_adapter_computes_the_same(base_dir, adapted, copy, config):
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    write_tensors(copy / ADAPTER, adapter_state(adapted))
    logits = load_adapted_model(base_dir, copy)(tokens)[0]
    assert torch.equal(logits, adapted(tokens)[0])
    assert (logits - load_model(base_dir)(tokens)[0]).abs().max() > 0.1  # the adapter changes the logits


def test_other_files_of_the_directory_are_ignored(base_dir, copy):
    write_tensors(copy / "training_questions.safetensors", {"hashes": torch.arange(3)})
    (copy / "report.json").write_text("{")
    expected = adapter_state(load_adapted_model(base_dir, copy))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_tensors(copy / ADAPTER))


def test_load_has_defaults_for_base_and_adapter(base_dir, adapter_dir, config):
    tokens = torch.randint(0, config.vocab_size, (1, 5))
    plain, tokenizer = load(base_dir)
    assert tokenizer.vocab_size == config.vocab_size
    assert torch.equal(plain(tokens)[0], load_model(base_dir)(tokens)[0])
    adapted, _ = load(str(base_dir), str(adapter_dir))
    assert torch.equal(adapted(tokens)[0], load_adapted_model(base_dir, adapter_dir)(tokens)[0])
    assert not torch.equal(adapted(tokens)[0], plain(tokens)[0])
    assert load(base_dir, None, torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16


def test_adapter_of_another_base_is_rejected_with_both_hashes(tmp_path, base_dir, adapter_dir, model):
    with torch.no_grad():
        model.model.norm.weight[0] += 0.25
    changed = tmp_path / "changed"
    save_model(model, changed, dtype=torch.float32)
    with pytest.raises(ValueError, match="checkpoint_hash") as rejected:
        load_adapted_model(changed, adapter_dir)
    for expected in (repr(base_dir.name), str(changed), checkpoint_hash(base_dir), checkpoint_hash(changed)):
        assert expected in str(rejected.value)


def test_adapter_config_describes_base_and_adapter(base_dir, adapter_dir, adapter, config):
    content = json.loads((adapter_dir / CONFIG).read_text())
    base = {"name": base_dir.name, "model": asdict(config), "checkpoint_hash": checkpoint_hash(base_dir)}
    # Through JSON, which turns tuples into lists.
    assert content == json.loads(json.dumps({"base": base, "adapter": asdict(adapter), "chat_format": "auto"}))


def test_adapter_config_of_an_earlier_version_loads(tmp_path, base_dir, copy, adapter, model):
    content = json.loads((copy / CONFIG).read_text())
    content["base"]["fingerprint"] = content["base"].pop("checkpoint_hash")
    del content["base"]["model"]["alibi"]  # a field that was added later
    content["adapter"]["n_experts"] = 8  # today with two groups by default
    del content["adapter"]["n_groups"]
    (copy / CONFIG).write_text(json.dumps(content))
    assert read_adapter_config(copy, base_dir) == replace(adapter, n_experts=8, n_groups=1)
    save_model(model, tmp_path / "rounded", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="checkpoint_hash"):
        read_adapter_config(copy, tmp_path / "rounded")
    del content["base"]["model"]["dim"]
    (copy / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dim None"):
        read_adapter_config(copy, base_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64}, "dim 32, .* has 64"),
        ({"n_layers": 3}, "n_layers 2, .* has 3"),
        ({"n_heads": 8, "n_kv_heads": 4}, "n_heads 4, .* has 8"),
        ({"vocab_size": 500}, "vocab_size 420, .* has 500"),
        # These leave the shapes unchanged.
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
def test_adapter_of_another_architecture_is_rejected_by_the_field(tmp_path, config, adapter_dir, changes, message):
    save_model(Model(replace(config, **changes)), tmp_path / "base", dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
        load_adapted_model(tmp_path / "base", adapter_dir)


def test_adapter_config_reads_back_on_a_base_with_scaled_positions(tmp_path, config, adapter):
    scaled = replace(config, rope_scaling=RopeScaling("llama3", 8.0, original_seq_len=32), rope_theta=500000.0)
    save_model(Model(scaled), tmp_path / "base", dtype=torch.float32)
    save_adapter_config(tmp_path / "adapter", str(tmp_path / "base"), adapter)
    assert read_adapter_config(tmp_path / "adapter", tmp_path / "base") == adapter
    scaled = replace(scaled, rope_scaling=RopeScaling("llama3", 4.0, original_seq_len=32))
    save_model(Model(scaled), tmp_path / "changed", dtype=torch.float32)
    with pytest.raises(ValueError, match="'base' with rope_scaling"):
        read_adapter_config(tmp_path / "adapter", tmp_path / "changed")


def test_damaged_base_is_not_reported_as_a_damaged_adapter(tmp_path, base_dir, adapter_dir):
    base = shutil.copytree(base_dir, tmp_path / "damaged")
    (base / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged/config\.json: not JSON") as rejected:
        load_adapted_model(base, adapter_dir)
    assert "adapter_config.json" not in str(rejected.value)


def test_load_rejects_an_empty_path_of_an_adapter(base_dir):
    with pytest.raises(UserError, match="empty"):
        load(base_dir, "")


def test_load_uses_the_chat_format_of_training(base_dir, copy, adapter):
    def chat_format(*choice):
        return load(base_dir, copy, torch.float32, "cpu", *choice)[1].chat_format

    assert chat_format() == "minidoctor"  # that of the base
    save_adapter_config(copy, str(base_dir), adapter, "plain")
    assert chat_format() == "plain"
    assert chat_format("zephyr") == "zephyr"
    for unknown in ("klingon", None, 5, []):
        change_json(copy / CONFIG, chat_format=unknown)
        with pytest.raises(ValueError, match="chat_format"):
            chat_format()


def test_unknown_chat_format_is_rejected_before_the_weights_are_read(tmp_path, base_dir):
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert load(base, chats=False)[1].format is None
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"chat_template.*--chat-format"):
        load(base)


def test_plain_lora_has_no_router_and_loads(tmp_path, base_dir, config):
    adapter = AdapterConfig(n_experts=1, rank=3, targets=("k_proj", "gate_proj"))
    model = randomize(load_model(base_dir, adapter=adapter))
    model.load_state_dict(load_model(base_dir).state_dict(), strict=False)
    state = adapter_state(model)
    assert not any(isinstance(module, Router) for module in model.modules())
    layers = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.k_proj", "mlp.gate_proj")]
    assert set(state) == {f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"}
    save_adapter_config(tmp_path, str(base_dir), adapter)
    write_tensors(tmp_path / ADAPTER, state)
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    logits, routings = load_adapted_model(base_dir, tmp_path)(tokens)
    assert routings == []
    assert torch.equal(logits, model(tokens)[0])
    assert (logits - load_model(base_dir)(tokens)[0]).abs().max() > 0.1


def remove_prefix(name):
    return name.removeprefix("theirs.")


def test_load_into_renames_and_converts_files_of_other_programs(tmp_path):
    path, stored = tmp_path / "a.safetensors", torch.randn(3, 2).bfloat16()
    write_tensors(path, {"theirs.a": stored})
    state = {"a": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"2 tensors .*: a"):
        load_into(state, path)
    load_into(state, path, remove_prefix)
    assert torch.equal(state["a"], stored.float())
    for unsuitable in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(6), torch.zeros(3, 1)):
        write_tensors(path, {"theirs.a": unsuitable})
        with pytest.raises(ValueError, match=r"a is torch\..*, expected torch\.float32 \(3, 2\)"):
            load_into(state, path, remove_prefix)
    assert torch.equal(state["a"], stored.float())
    write_tensors(path, {"theirs.a": stored, "a": stored})
    with pytest.raises(ValueError, match="a is stored under two names"):
        load_into(state, path, remove_prefix)


def test_names_of_a_compiled_model_are_reported(base_dir, copy):
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in read_tensors(copy / ADAPTER)}
    write_tensors(copy / ADAPTER, tensors)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: _orig_mod\..*torch\.compile"):
        load_adapted_model(base_dir, copy)


def test_cache_directories_of_base_and_adapter_are_followed(tmp_path, base_dir, adapter_dir, config):
    base, adapter = tmp_path / "models--org--base", tmp_path / "models--org--adapter"
    shutil.copytree(base_dir, base / "snapshots" / "0a1b")
    shutil.copytree(adapter_dir, adapter / "snapshots" / "2c3d")
    tokens = torch.randint(0, config.vocab_size, (1, 5))
    logits = load(base, adapter)[0](tokens)[0]
    assert torch.equal(logits, load(base_dir, adapter_dir)[0](tokens)[0])


FIRST = "model.layers.0.mlp.down_proj.lora_a"  # (8, 48)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (FIRST, ABSENT, rf"1 tensors .*: {FIRST}"),
        ("extra", torch.zeros(1), "1 tensors .*: extra"),
        (FIRST, torch.zeros(3), rf"{FIRST} .*\(3,\), expected .*\(8, 48\)"),
        (FIRST, torch.zeros(8, 48).bfloat16(), rf"{FIRST} is torch\.bfloat16 .*torch\.float32"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_unsuitable_tensor_of_an_adapter_is_named(base_dir, copy, name, tensor, message):
    change_tensors(copy / ADAPTER, **{name: tensor})
    with pytest.raises(ValueError, match=message):
        load_adapted_model(base_dir, copy)


def test_truncated_or_missing_adapter_is_rejected(base_dir, copy):
    content = (copy / ADAPTER).read_bytes()
    for n in (0, 7, 100, len(content) - 1):
        (copy / ADAPTER).write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"adapter\.safetensors"):
            load_adapted_model(base_dir, copy)
    for name in (ADAPTER, CONFIG):
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_adapted_model(base_dir, copy)


def test_malformed_adapter_config_is_rejected(base_dir, copy):
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
        {"unknown": 1},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_damaged_experts_configuration_is_rejected(base_dir, copy, changes):
    change_section(copy, "adapter", **changes)
    with pytest.raises(ValueError, match="adapter"):
        load_adapted_model(base_dir, copy)


@pytest.mark.parametrize("base", [None, [], "name", {}, {"name": "base"}, {"name": "base", "checkpoint_hash": 5}])
def test_missing_description_of_the_base_is_rejected(base_dir, copy, base):
    change_json(copy / CONFIG, base=base)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter_config(copy, base_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": []},
        {"model": {}},
        {"model": "llama"},
        {"checkpoint_hash": 5},
        {"checkpoint_hash": ""},
    ],
    ids=str,
)
def test_damaged_description_of_the_base_is_rejected(base_dir, copy, changes):
    change_section(copy, "base", **changes)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter_config(copy, base_dir)


def test_100_mutated_adapters_load_or_are_rejected(base_dir, copy):
    draw, n_rejected = random.Random(0), 0
    for name in (CONFIG, ADAPTER):
        content = (copy / name).read_bytes()
        for _ in range(50):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (copy / name).write_bytes(changed[: draw.choice([len(content), len(content), 200])])
            try:
                load_adapted_model(base_dir, copy)
            except (ValueError, FileNotFoundError):
                n_rejected += 1
        (copy / name).write_bytes(content)
    load_adapted_model(base_dir, copy)
    assert 50 < n_rejected < 100
