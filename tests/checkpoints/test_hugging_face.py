import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import ABSENT, assert_loads, change_tensors, write_checkpoint, write_shards

from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import (
    checkpoint_hash,
    explain_non_finite,
    find_non_finite,
    load_model,
    save_model,
)
from minidoctor.config import ModelConfig, RopeScaling
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import Model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", ABSENT, r"missing: model\.norm\.weight"),
        ("extra", torch.zeros(2), "unexpected: extra"),
        ("model.norm.weight", torch.zeros(31), r"model\.norm\.weight .*\(31,\).*\(32,\)"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int64), r"model\.norm\.weight .*I64"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_unsuitable_tensor_is_named(base_copy, name, tensor, message):
    change_tensors(base_copy / WEIGHTS, **{name: tensor})
    with pytest.raises(ValueError, match=message):
        load_model(base_copy)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(base_dir, base_copy):
    change_tensors(base_copy / WEIGHTS, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_loads(base_copy, load_model(base_dir).state_dict())


def test_tied_model_loads_with_and_without_output_layer_in_the_file(base_dir, base_copy):
    embedding = dict(read_tensors(base_dir / WEIGHTS))["model.embed_tokens.weight"]
    change_tensors(base_copy / WEIGHTS, lm_head__weight=embedding)
    for directory in (base_dir, base_copy):
        model = load_model(directory)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embedding)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_tied_model_with_another_output_layer_in_the_file_is_untied(base_dir, base_copy, config, stored, sharded):
    head = dict(read_tensors(base_dir / WEIGHTS))["model.embed_tokens.weight"].to(stored)
    head[-1, -1] += 1  # the last bytes of the tensor
    change_tensors(base_copy / WEIGHTS, lm_head__weight=head)
    expected = load_model(base_dir).state_dict() | {"lm_head.weight": head.float()}
    if sharded:
        write_shards(base_copy)
    assert read_model_config(base_copy).tied
    assert_loads(base_copy, expected)
    untied = Model(replace(config, tied=False)).eval()
    untied.load_state_dict(expected)
    model, tokens = load_model(base_copy), torch.randint(0, config.vocab_size, (2, 9))
    assert torch.equal(model(tokens)[0], untied(tokens)[0])
    assert not torch.equal(model(tokens)[0], load_model(base_dir)(tokens)[0])


def test_output_layer_with_the_bytes_of_the_embeddings_in_another_dtype_is_different(base_copy):
    embedding = dict(read_tensors(base_copy / WEIGHTS))["model.embed_tokens.weight"].half()
    head = embedding.view(torch.bfloat16)
    change_tensors(base_copy / WEIGHTS, model__embed_tokens__weight=embedding, lm_head__weight=head)
    model = load_model(base_copy)
    assert torch.equal(model.lm_head.weight, head.float())
    assert torch.equal(model.model.embed_tokens.weight, embedding.float())


def test_untied_model_is_saved_with_both_matrices(tmp_path, base_copy):
    embedding = dict(read_tensors(base_copy / WEIGHTS))["model.embed_tokens.weight"]
    change_tensors(base_copy / WEIGHTS, lm_head__weight=embedding * 2)
    model = load_model(base_copy)
    save_model(model, tmp_path / "saved", torch.float32)
    assert not read_model_config(tmp_path / "saved").tied
    assert_loads(tmp_path / "saved", model.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1, -1])
def test_output_layer_of_a_tied_model_is_treated_as_in_transformers(base_copy, config, factor):
    transformers = pytest.importorskip("transformers")
    embedding = dict(read_tensors(base_copy / WEIGHTS))["model.embed_tokens.weight"]
    change_tensors(base_copy / WEIGHTS, lm_head__weight=embedding * factor)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base_copy, dtype=torch.float32).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(load_model(base_copy)(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_untied_model_has_two_matrices_and_needs_both(tmp_path, config):
    model = Model(replace(config, tied=False))
    save_model(model, tmp_path, dtype=torch.float32)
    assert_loads(tmp_path, model.state_dict())
    change_tensors(tmp_path / WEIGHTS, lm_head__weight=ABSENT)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load_model(tmp_path)


def test_saved_model_computes_the_same(tmp_path, model, config):
    save_model(model, tmp_path, dtype=torch.float32, bos_token_id=1)
    assert read_model_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 1
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


def test_base_has_the_requested_dtype_and_experts_are_float32(base_dir, adapter):
    loaded = load_model(base_dir, torch.bfloat16, adapter=adapter)
    base = dict(read_tensors(base_dir / WEIGHTS))
    for name, tensor in loaded.state_dict().items():
        if ".router." in name or name.endswith(("lora_a", "lora_b")):
            assert tensor.dtype == torch.float32, name
        elif name in base:
            assert torch.equal(tensor, base[name].bfloat16()), name
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == (name not in base), name


def test_checkpoint_hash_changes_with_any_weight(base_dir, base_copy):
    assert checkpoint_hash(base_copy) == checkpoint_hash(base_dir)
    tensors, hashes = dict(read_tensors(base_copy / WEIGHTS)), {checkpoint_hash(base_dir)}
    for name, tensor in tensors.items():
        for index in (0, -1):
            before = tensor.flatten()[index].clone()
            tensor.view(-1)[index] += 0.25
            write_tensors(base_copy / WEIGHTS, tensors, {"format": "pt"})
            assert checkpoint_hash(base_copy) not in hashes, name
            hashes.add(checkpoint_hash(base_copy))
            tensor.view(-1)[index] = before
    write_tensors(base_copy / WEIGHTS, tensors, {"format": "pt"})
    assert checkpoint_hash(base_copy) == checkpoint_hash(base_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_of_a_family_loads_under_its_name(tmp_path, kind, stored, dtype):
    tensors = write_checkpoint(tmp_path, kind, stored, num_hidden_layers=2)
    state = load_model(tmp_path, dtype).state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert state[name].dtype == dtype, name
        assert torch.equal(state[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["baichuan", "baichuan2", "baichuan-13b", "baichuan2-13b"])
def test_w_pack_contains_queries_then_keys_then_values(tmp_path, kind, stored, dtype):
    tensors = write_checkpoint(tmp_path, kind, stored, num_hidden_layers=2, num_key_value_heads=4)
    state = load_model(tmp_path, dtype).state_dict()
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        packed = tensors.pop(prefix + "W_pack.weight").to(dtype)  # (3 * 8, 8)
        assert torch.equal(state.pop(prefix + "q_proj.weight"), packed[:8])
        assert torch.equal(state.pop(prefix + "k_proj.weight"), packed[8:16])
        assert torch.equal(state.pop(prefix + "v_proj.weight"), packed[16:])
    del tensors["lm_head.weight"], state["lm_head.weight"]  # normalized in the second version, tested below
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.to(dtype)), name


def test_rows_of_w_pack_follow_the_heads_of_the_config(tmp_path):
    packed = write_checkpoint(tmp_path, "baichuan", num_key_value_heads=1)["model.layers.0.self_attn.W_pack.weight"]
    state = load_model(tmp_path).state_dict()
    for name, rows in (("q", packed[:8]), ("k", packed[8:10]), ("v", packed[10:12])):
        assert torch.equal(state[f"model.layers.0.self_attn.{name}_proj.weight"], rows), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_baichuan2_has_output_rows_of_length_1(tmp_path, dtype):
    for kind in ("baichuan", "baichuan2", "baichuan-13b", "baichuan2-13b"):
        stored = write_checkpoint(tmp_path / kind, kind, vocab_size=50)["lm_head.weight"]
        stored[:10] *= 1000
        stored[7] = 0
        change_tensors(tmp_path / kind / WEIGHTS, lm_head__weight=stored)
        head = load_model(tmp_path / kind, dtype).lm_head.weight
        assert head.dtype == dtype
        if "2" not in kind:
            assert torch.equal(head, stored.to(dtype))
        else:
            expected = [[x / max(sum(y * y for y in row) ** 0.5, 1e-12) for x in row] for row in stored.tolist()]
            torch.testing.assert_close(head.detach(), torch.tensor(expected).to(dtype))


def test_normalized_head_stays_unchanged(tmp_path):
    head = F.normalize(write_checkpoint(tmp_path, "baichuan2", vocab_size=50)["lm_head.weight"])
    change_tensors(tmp_path / WEIGHTS, lm_head__weight=head)
    torch.testing.assert_close(load_model(tmp_path).lm_head.weight.detach(), head)


@pytest.mark.parametrize("kind", ["baichuan", "baichuan2"])
def test_saved_baichuan_is_a_llama_that_computes_the_same(tmp_path, kind):
    write_checkpoint(tmp_path / "first", kind, num_key_value_heads=4, num_hidden_layers=2)
    model = load_model(tmp_path / "first")
    save_model(model, tmp_path / "second", torch.float32)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["model_type"] == "llama"
    assert_loads(tmp_path / "second", model.state_dict())
    tokens = torch.randint(0, 6, (2, 7))
    assert torch.equal(load_model(tmp_path / "second")(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["baichuan-13b", "baichuan2-13b"])
def test_saved_baichuan_13b_is_a_baichuan_that_computes_the_same(tmp_path, kind, dtype):
    stored = write_checkpoint(tmp_path / "first", kind, num_key_value_heads=4, num_hidden_layers=2)
    model, tokens = load_model(tmp_path / "first", dtype), torch.randint(0, 6, (2, 7))
    save_model(model, tmp_path / "second", dtype)
    settings = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == ("baichuan", ["BaichuanForCausalLM"])
    assert "max_position_embeddings" not in settings
    assert set(dict(read_tensors(tmp_path / "second" / WEIGHTS))) == set(stored)
    assert load_model(tmp_path / "second", dtype).config == model.config
    assert_loads(tmp_path / "second", {name: tensor.float() for name, tensor in model.state_dict().items()})
    assert torch.equal(load_model(tmp_path / "second", dtype)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 4.0, 1.5, 3.0, 64)], ids=str
)
@pytest.mark.parametrize("switch", [{}, {"window": 4}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_of_every_kind_loads_equal(tmp_path, scaling, switch, tied):
    config = ModelConfig(6, 8, 2, 4, 2, 2, 4, max_seq_len=16, rope_scaling=scaling, tied=tied)
    model = Model(replace(config, **switch))
    save_model(model, tmp_path, torch.float32)
    assert load_model(tmp_path).config == model.config
    assert_loads(tmp_path, model.state_dict())


@pytest.mark.parametrize(
    ("kind", "absent", "extra"),
    [
        ("qwen2", "model.layers.0.self_attn.k_proj.bias", None),
        ("llama", None, "model.layers.0.self_attn.q_proj.bias"),
        ("qwen2", None, "model.layers.0.self_attn.o_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", None),
        ("llama", None, "model.layers.0.self_attn.k_norm.weight"),
        ("baichuan", "model.layers.0.self_attn.W_pack.weight", None),
        ("baichuan", None, "model.layers.0.self_attn.q_proj.weight"),
        ("llama", None, "model.layers.0.self_attn.W_pack.weight"),
        ("llama", None, "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("llama", None, "model.layers.0.self_attn.q_proj.weight_scale"),
    ],
)
def test_tensors_of_another_family_are_rejected(tmp_path, kind, absent, extra):
    write_checkpoint(tmp_path, kind, num_key_value_heads=4)
    change_tensors(tmp_path / WEIGHTS, **({extra: torch.ones(8)} if extra else {absent: ABSENT}))
    with pytest.raises(ValueError, match=f"unexpected: {extra}" if extra else f"missing: {absent}"):
        load_model(tmp_path)


def test_tied_normalized_head_is_rejected(tmp_path):
    write_checkpoint(tmp_path, "baichuan2", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_model(tmp_path)


def test_w_pack_of_another_shape_is_rejected(tmp_path):
    write_checkpoint(tmp_path, "baichuan", num_key_value_heads=4)
    change_tensors(tmp_path / WEIGHTS, **{"model.layers.0.self_attn.W_pack.weight": torch.zeros(16, 8)})
    with pytest.raises(ValueError, match=r"W_pack\.weight .*\(16, 8\).*\(24, 8\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_find_non_finite_names_the_first_such_tensor(base_dir, dtype, value):
    model = load_model(base_dir, dtype)
    assert find_non_finite(model) is None
    assert "overflow" in explain_non_finite(model)
    with torch.no_grad():
        model.model.norm.weight[3] = value
        assert find_non_finite(model) == "model.norm.weight"
        model.model.layers[1].mlp.up_proj.weight[2, 5] = value
    assert find_non_finite(model) == "model.layers.1.mlp.up_proj.weight"
    assert explain_non_finite(model).startswith("model.layers.1.mlp.up_proj.weight contains")


def test_non_finite_model_is_not_saved(tmp_path, model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e30  # finite in float32 and bfloat16 only
    save_model(model, tmp_path / "bfloat16", torch.bfloat16)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight.*float16"):
        save_model(model, tmp_path / "float16", torch.float16)
    assert not (tmp_path / "float16").exists()
