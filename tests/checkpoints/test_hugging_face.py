import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash, find_non_finite, load_model, save_model
from minidoctor.config import ModelConfig, RopeScaling
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import Model

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "baichuan": "BaiChuanForCausalLM",
    "baichuan2": "BaichuanForCausalLM",
}


def settings_of(kind, vocab=6, dim=8, layers=1, heads=4, kv_heads=2, head_dim=2, ffn=4, **more):
    given = {"model_type": "baichuan" if kind == "baichuan2" else kind, "architectures": [CLASSES[kind]]}
    given |= {"vocab_size": vocab, "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers}
    given |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return given | {"max_position_embeddings": 16, "rms_norm_eps": 1e-5} | more


def shapes_of(kind, vocab=6, dim=8, layers=1, heads=4, kv_heads=2, head_dim=2, ffn=4, tie_word_embeddings=False):
    """The names and shapes in a published checkpoint of the family."""
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, dim)
    for layer in range(layers):
        names = {"input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,)}
        names |= {"mlp.gate_proj.weight": (ffn, dim), "mlp.up_proj.weight": (ffn, dim)}
        names |= {"mlp.down_proj.weight": (dim, ffn), "self_attn.o_proj.weight": (dim, q)}
        if kind.startswith("baichuan"):
            names["self_attn.W_pack.weight"] = (q + 2 * kv, dim)
        else:
            for projection, rows in (("q", q), ("k", kv), ("v", kv)):
                names[f"self_attn.{projection}_proj.weight"] = (rows, dim)
                if kind == "qwen2":
                    names[f"self_attn.{projection}_proj.bias"] = (rows,)
        if kind == "qwen3":
            names |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in names.items()}
    return shapes


def write_checkpoint(directory, kind, dtype=torch.float32, **shape):
    """A random checkpoint as it is published; returns its tensors."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings_of(kind, **shape)))
    tensors = {name: torch.randn(size).to(dtype) for name, size in shapes_of(kind, **shape).items()}
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return tensors


def state_of(directory):
    return load_model(directory).state_dict()


def assert_same_state(directory, expected):
    back = state_of(directory)
    assert set(back) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name


def write_shards(directory, weight_map, tensors):
    for name in set(weight_map.values()):
        write_tensors(directory / name, {t: tensors[t] for t, file in weight_map.items() if file == name})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def sharded_copy(base_dir, directory):
    shutil.copytree(base_dir, directory)
    tensors = dict(read_tensors(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    write_shards(directory, weight_map, tensors)
    return tensors, weight_map


def test_shards_load_as_the_single_file_does(tmp_path, base_dir):
    sharded_copy(base_dir, tmp_path / "shards")
    assert_same_state(tmp_path / "shards", state_of(base_dir))


def test_a_missing_shard_and_a_tensor_in_two_shards_are_named(tmp_path, base_dir):
    tensors, weight_map = sharded_copy(base_dir, tmp_path / "shards")
    name = "model.norm.weight"
    twice = tmp_path / "shards" / ("model-0.safetensors" if weight_map[name][6] != "0" else "model-1.safetensors")
    write_tensors(twice, dict(read_tensors(twice)) | {name: tensors[name]})
    with pytest.raises(ValueError, match=r"model\.norm\.weight stands in another file too"):
        load_model(tmp_path / "shards")
    twice.unlink()
    with pytest.raises(FileNotFoundError, match=twice.name):
        load_model(tmp_path / "shards")


@pytest.mark.parametrize(
    "name", ["../base/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "config.json"]
)
def test_an_index_that_names_a_file_outside_is_refused(tmp_path, base_dir, name):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    index = {"weight_map": {"model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no safetensors file of this directory"):
        load_model(directory)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(tmp_path, base_dir, index):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(directory)


def test_an_index_with_a_file_name_too_long_for_the_system_is_refused(tmp_path, base_dir):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    index = {"weight_map": {"model.norm.weight": "a" * 300 + ".safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match="aaa"):
        load_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 tensors are unexpected: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            r"model\.norm\.weight has shape \(31,\), config\.json asks for \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}),
            r"model\.norm\.weight is I64, expected floating point",
        ),
    ],
)
def test_missing_unexpected_and_wrong_tensors_are_named(tmp_path, base_dir, change, message):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    tensors = dict(read_tensors(directory / "model.safetensors"))
    change(tensors)
    write_tensors(directory / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_old_rotary_frequencies_are_passed_over(tmp_path, base_dir):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    tensors = dict(read_tensors(directory / "model.safetensors"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_tensors(directory / "model.safetensors", tensors)
    assert_same_state(directory, state_of(base_dir))


def test_a_tied_model_loads_with_and_without_its_output_layer_in_the_file(tmp_path, base_dir):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    tensors = dict(read_tensors(directory / "model.safetensors"))
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(directory / "model.safetensors", tensors)
    for place in (base_dir, directory):
        model = load_model(place)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_an_untied_model_keeps_two_matrices_and_needs_both(tmp_path, config):
    model = Model(replace(config, tied=False))
    save_model(model, tmp_path, dtype=torch.float32)
    assert_same_state(tmp_path, model.state_dict())
    tensors = dict(read_tensors(tmp_path / "model.safetensors"))
    del tensors["lm_head.weight"]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"1 tensors are missing: lm_head\.weight"):
        load_model(tmp_path)


def test_a_saved_model_computes_what_it_computed_before(tmp_path, model, config):
    save_model(model, tmp_path, dtype=torch.float32, bos_token_id=1)
    assert read_model_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 1
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    back = load_model(tmp_path)
    assert not back.training
    assert torch.equal(back(tokens)[0], model(tokens)[0])


def test_weights_are_loaded_in_the_dtype_that_is_asked_for_and_experts_in_float32(base_dir, adapter):
    loaded = load_model(base_dir, torch.bfloat16, adapter=adapter)
    plain = dict(read_tensors(base_dir / "model.safetensors"))
    for name, tensor in loaded.state_dict().items():
        if ".router." in name or name.endswith(("lora_a", "lora_b")):
            assert tensor.dtype == torch.float32, name
        elif name in plain:
            assert torch.equal(tensor, plain[name].bfloat16()), name
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == (name not in plain), name


def test_an_empty_or_missing_directory_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load_model(directory)


def test_the_fingerprint_is_that_of_a_copy_and_of_no_model_with_one_other_weight(tmp_path, base_dir):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    assert checkpoint_hash(directory) == checkpoint_hash(base_dir)
    tensors, seen = dict(read_tensors(directory / "model.safetensors")), {checkpoint_hash(base_dir)}
    for name, tensor in tensors.items():
        for place in (0, -1):
            before = tensor.flatten()[place].clone()
            tensor.view(-1)[place] += 0.25
            write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
            assert checkpoint_hash(directory) not in seen, name
            seen.add(checkpoint_hash(directory))
            tensor.view(-1)[place] = before
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    assert checkpoint_hash(directory) == checkpoint_hash(base_dir)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_of_a_family_arrives_under_its_name_in_the_dtype_asked_for(tmp_path, kind, stored, dtype):
    tensors = write_checkpoint(tmp_path, kind, stored, layers=2)
    state = load_model(tmp_path, dtype).state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert state[name].dtype == dtype, name
        assert torch.equal(state[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["baichuan", "baichuan2"])
def test_w_pack_is_queries_then_keys_then_values(tmp_path, kind, stored, dtype):
    tensors = write_checkpoint(tmp_path, kind, stored, layers=2, kv_heads=4)
    state = load_model(tmp_path, dtype).state_dict()
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        packed = tensors.pop(prefix + "W_pack.weight").to(dtype)  # (3 * 8, 8)
        assert torch.equal(state.pop(prefix + "q_proj.weight"), packed[:8])
        assert torch.equal(state.pop(prefix + "k_proj.weight"), packed[8:16])
        assert torch.equal(state.pop(prefix + "v_proj.weight"), packed[16:])
    del tensors["lm_head.weight"], state["lm_head.weight"]  # the next test's
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.to(dtype)), name


def test_rows_of_w_pack_are_counted_by_the_heads_of_the_config(tmp_path):
    packed = write_checkpoint(tmp_path, "baichuan", kv_heads=1)["model.layers.0.self_attn.W_pack.weight"]
    state = load_model(tmp_path).state_dict()
    for name, rows in (("q", packed[:8]), ("k", packed[8:10]), ("v", packed[10:12])):
        assert torch.equal(state[f"model.layers.0.self_attn.{name}_proj.weight"], rows), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_the_second_baichuan_alone_has_rows_of_length_1(tmp_path, dtype):
    for kind in ("baichuan", "baichuan2"):
        tensors = write_checkpoint(tmp_path / kind, kind, vocab=50)
        tensors["lm_head.weight"][:10] *= 1000
        tensors["lm_head.weight"][7] = 0
        write_tensors(tmp_path / kind / "model.safetensors", tensors)
        head, stored = load_model(tmp_path / kind, dtype).lm_head.weight, tensors["lm_head.weight"]
        assert head.dtype == dtype
        if kind == "baichuan":
            assert torch.equal(head, stored.to(dtype))
        else:
            expected = [[x / max(sum(y * y for y in row) ** 0.5, 1e-12) for x in row] for row in stored.tolist()]
            torch.testing.assert_close(head.detach(), torch.tensor(expected).to(dtype))


def test_a_head_that_is_already_normalised_stays_as_it_is(tmp_path):
    tensors = write_checkpoint(tmp_path, "baichuan2", vocab=50)
    tensors["lm_head.weight"] = F.normalize(tensors["lm_head.weight"])
    write_tensors(tmp_path / "model.safetensors", tensors)
    torch.testing.assert_close(load_model(tmp_path).lm_head.weight.detach(), tensors["lm_head.weight"])


@pytest.mark.parametrize("kind", ["baichuan", "baichuan2"])
def test_a_saved_baichuan_is_a_llama_that_computes_the_same(tmp_path, kind):
    write_checkpoint(tmp_path / "first", kind, kv_heads=4, layers=2)
    model = load_model(tmp_path / "first")
    save_model(model, tmp_path / "second", torch.float32)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["model_type"] == "llama"
    assert_same_state(tmp_path / "second", model.state_dict())
    tokens = torch.randint(0, 6, (2, 7))
    assert torch.equal(load_model(tmp_path / "second")(tokens)[0], model(tokens)[0])


SCALINGS = [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 4.0, 1.5, 3.0, 64)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("switch", [{}, {"window": 4}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_every_kind_is_saved_and_loaded_back_equal(tmp_path, scaling, switch, tied):
    config = ModelConfig(6, 8, 2, 4, 2, 2, 4, max_seq_len=16, rope_scaling=scaling, tied=tied)
    model = Model(replace(config, **switch))
    save_model(model, tmp_path, torch.float32)
    assert load_model(tmp_path).config == model.config
    assert_same_state(tmp_path, model.state_dict())


@pytest.mark.parametrize(
    ("kind", "lacks", "has"),
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
def test_the_tensors_of_another_family_are_refused(tmp_path, kind, lacks, has):
    tensors = write_checkpoint(tmp_path, kind, kv_heads=4)
    if has:
        tensors[has] = torch.ones(8)
    else:
        del tensors[lacks]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"unexpected: {has}" if has else f"missing: {lacks}"):
        load_model(tmp_path)


def test_a_normalised_head_that_is_also_the_embedding_is_refused(tmp_path):
    write_checkpoint(tmp_path, "baichuan2", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_model(tmp_path)


def test_a_w_pack_of_another_shape_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path, "baichuan", kv_heads=4)
    tensors["model.layers.0.self_attn.W_pack.weight"] = torch.zeros(16, 8)
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"W_pack\.weight has shape \(16, 8\), config\.json asks for \(24, 8\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1000}, "config.json asks for 1000 layers, the files hold 1"),
        ({"num_hidden_layers": 2}, "config.json asks for 2 layers, the files hold 1"),
        ({"hidden_size": 16}, r"has shape \(6, 8\), config\.json asks for \(6, 16\)"),
        ({"vocab_size": 10}, r"has shape \(6, 8\), config\.json asks for \(10, 8\)"),
        ({"head_dim": 4}, r"_proj\.weight has shape \(., 8\), config\.json asks for \(.*, 8\)"),
        ({"num_key_value_heads": 4}, r"has shape \(4, 8\), config\.json asks for \(8, 8\)"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, r"llama"),
        ({"num_attention_heads": 2**31 - 1, "num_key_value_heads": 1, "head_dim": 2**31 - 2}, r"llama"),
    ],
)
def test_a_config_that_asks_for_more_than_the_files_hold_is_refused(tmp_path, changes, message):
    directory = tmp_path / "llama"
    write_checkpoint(directory, "llama")
    (directory / "config.json").write_text(json.dumps(settings_of("llama") | changes))
    with Allocations() as allocations, pytest.raises(ValueError, match=message):
        load_model(directory)
    assert allocations.n_bytes == 0


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"


def test_a_git_lfs_pointer_in_place_of_any_file_is_named(tmp_path, base_dir):
    sharded_copy(base_dir, tmp_path / "shards")
    single = shutil.copytree(base_dir, tmp_path / "single")
    shards = [f"model-{i}.safetensors" for i in range(3)]
    for directory, names in (
        (single, ["config.json", "model.safetensors"]),
        (tmp_path / "shards", ["config.json", "model.safetensors.index.json", *shards]),
    ):
        for name in names:
            content = (directory / name).read_bytes()
            (directory / name).write_text(POINTER)
            with pytest.raises(ValueError, match=rf"{directory.name}/{name}: only a Git LFS pointer, .*git lfs pull"):
                load_model(directory)
            (directory / name).write_bytes(content)
        load_model(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4_k_m.gguf", "consolidated.00.pth", "model.pt"])
def test_a_directory_with_another_kind_of_weights_only_is_refused_by_their_name(tmp_path, base_dir, name):
    shutil.copy(base_dir / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"weights")
    message = rf"no model\.safetensors or model\.safetensors\.index\.json here, only {name}: convert it to safetensors"
    with pytest.raises(FileNotFoundError, match=message):
        load_model(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path, base_dir):
    directory = tmp_path / "shards"
    sharded_copy(base_dir, directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or model\.safetensors\.index\.json here"):
        load_model(directory)


@pytest.mark.parametrize("name", ["痛" * 100 + ".safetensors", "a\0.safetensors", "\ud800.safetensors", "x" * 9999])
def test_an_index_with_a_name_that_no_file_can_have_is_refused(tmp_path, base_dir, name):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match="base"):
        load_model(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_find_non_finite_names_the_first_such_tensor(base_dir, dtype, value):
    model = load_model(base_dir, dtype)
    assert find_non_finite(model) is None
    with torch.no_grad():
        model.model.norm.weight[3] = value
        assert find_non_finite(model) == "model.norm.weight"
        model.model.layers[1].mlp.up_proj.weight[2, 5] = value
    assert find_non_finite(model) == "model.layers.1.mlp.up_proj.weight"


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that is made, but for views and those without memory."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            storage = out.untyped_storage()
            given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if storage.data_ptr() not in given:
                self.n_bytes += storage.nbytes()
        return out


def test_the_counter_of_the_next_tests_counts_the_weights_once(tmp_path, base_dir):
    with Allocations() as allocations:
        state = load_model(base_dir).state_dict()
    del state["lm_head.weight"]  # tied
    assert allocations.n_bytes == sum(4 * tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("place", ["truncated", "wrong shape", "missing", "twice", "out of range"])
def test_nothing_is_allocated_before_the_last_shard_was_found_to_be_right(tmp_path, base_dir, place):
    directory = tmp_path / "shards"
    tensors, weight_map = sharded_copy(base_dir, directory)
    last = directory / "model-2.safetensors"
    name = min(name for name, file in weight_map.items() if file == last.name)
    kept = {t: tensors[t] for t, file in weight_map.items() if file == last.name}
    if place == "truncated":
        os.truncate(last, last.stat().st_size - 1)
    elif place == "out of range":
        content = last.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header[name]["data_offsets"] = [offset + 2**40 for offset in header[name]["data_offsets"]]
        last.write_bytes(with_header(content, header))
    elif place == "wrong shape":
        write_tensors(last, kept | {name: torch.zeros(3)})
    elif place == "missing":
        del kept[name]
        write_tensors(last, kept)
    else:
        other = next(t for t, file in weight_map.items() if file != last.name)
        write_tensors(last, kept | {other: tensors[other]})
    with Allocations() as allocations, pytest.raises(ValueError, match=r"shards"):
        load_model(directory)
    assert allocations.n_bytes == 0


def with_header(content, header):
    (length,) = struct.unpack("<Q", content[:8])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def flipped(draw, content, region):
    """One to three flipped bits within the first `region` bytes, or a missing end."""
    if draw.random() < 0.15:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(region)] ^= 1 << draw.randrange(8)
    return bytes(changed)


NUMBERS = [0, 1, -1, 2, 3, 7, 8, 2**20, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400]
VALUES = [*NUMBERS, 0.5, 1e300, float("nan"), float("inf"), "", "8", "F16", True, False, None, [], {}, [[]], {"a": []}]
ROPES = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": [], "factor": {}},
    {"rope_theta": 5e5, "rope_type": "default"},
]
OTHER_KEYS = ["rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types"]
OTHER_KEYS += ["hidden_act", "attention_bias", "use_sliding_window", "num_experts", "quantization_config", "dtype"]


def lying_header(draw, content):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(draw.randint(1, 2)):
        name, other = draw.choice(list(header)), draw.choice(list(header))
        entry, lie = header[name], draw.randrange(8)
        if lie == 0 or not isinstance(entry, dict) or "shape" not in entry:
            header[name] = draw.choice(VALUES)
        elif lie == 1:
            entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", *VALUES])
        elif lie == 2:
            entry["shape"] = [draw.choice(VALUES) for _ in range(draw.randint(0, 9))]
        elif lie == 3:
            entry["shape"] = entry["shape"][::-1] + [draw.choice([1, 0, 2])] * draw.randint(0, 1)
        elif lie == 4:
            entry["data_offsets"] = [draw.choice(VALUES) for _ in range(draw.randint(1, 3))]
        elif lie == 5:
            shift = draw.choice([-8, -4, 1, 4, 8, 2**40, 2**63])
            begin, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (0, 0)
            entry["data_offsets"] = [begin + shift, end + shift] if draw.random() < 0.5 else [begin, end + shift]
        elif lie == 6:
            header[other] = entry
        else:
            header[draw.choice(["model.layers.7.mlp.up_proj.weight", "a", "", "\ud800"])] = header.pop(name)
    if draw.random() < 0.1:
        length = draw.choice([0, 1, length - 1, length + 1, len(content), 10**10, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:]
    return with_header(content, header)


def lying_config(draw, content):
    if draw.random() < 0.3:
        return flipped(draw, content, len(content))
    config = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*config, *OTHER_KEYS])
        config[key] = draw.choice([*VALUES, *ROPES, *CLASSES, ["full_attention"]])
    return json.dumps(config).encode()


@contextmanager
def little_memory():
    """The process can get 64 MiB more than it has: less than any lie above asks for, more than a test needs."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**26, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def numbers_in(path, name):
    """A tensor's numbers by the format's definition."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])[name]
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    begin, end = entry["data_offsets"]
    data = torch.frombuffer(bytearray(content[8 + length :][begin:end]), dtype=kinds[entry["dtype"]])
    return data.reshape(entry["shape"]).float()


def survive_mutations(tmp_path, file_name, mutate, n):
    """Each of n changed files is refused in words that name the directory, or is read right, and soon."""
    directories = [tmp_path / kind for kind in CLASSES]
    for directory in directories:
        write_checkpoint(directory, directory.name, tie_word_embeddings=directory.name in ("mistral", "qwen3"))
        with Allocations():  # what is imported at the first use is no allocation of a mutation
            load_model(directory)
    draw, refused = random.Random(0), 0
    with little_memory():
        for i in range(n):
            directory = directories[i % len(directories)]
            good = (directory / file_name).read_bytes()
            (directory / file_name).write_bytes(mutate(draw, good))
            refused += is_refused(directory)
            (directory / file_name).write_bytes(good)
    for directory in directories:
        load_model(directory)
    assert 0.4 * n < refused < n


def is_refused(directory):
    path, allocations, message, start = directory / "model.safetensors", Allocations(), "", time.monotonic()
    try:
        with allocations:
            model = load_model(directory)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert time.monotonic() - start < 5
    # Half precision takes twice its size in float32, and a buffer of its own size.
    assert allocations.n_bytes <= 3 * path.stat().st_size
    if message:
        assert str(directory) in message
        assert len(message) < 2000
        return True
    for name, tensor in model.state_dict().items():
        if "lm_head" not in name and "self_attn" not in name:  # stored as something else in some families
            torch.testing.assert_close(tensor, numbers_in(path, name), rtol=0, atol=0, equal_nan=True)
    return False


def flipped_bits(draw, content):
    header = 8 + struct.unpack("<Q", content[:8])[0]
    # Most of the bytes are weights, where any bit may stand.
    return flipped(draw, content, header if draw.random() < 0.9 else len(content))


def test_2000_files_with_flipped_bits_or_without_their_end_load_or_are_refused(tmp_path):
    survive_mutations(tmp_path, "model.safetensors", flipped_bits, 2000)


def test_1500_files_whose_headers_lie_load_or_are_refused(tmp_path):
    survive_mutations(tmp_path, "model.safetensors", lying_header, 1500)


def test_1500_configs_with_other_values_load_or_are_refused(tmp_path):
    survive_mutations(tmp_path, "config.json", lying_config, 1500)


# VmHWM and not getrusage, whose maximum is inherited from the process that started this one. A child for each
# checkpoint, so that torch is imported once; a tiny one first, for what is mapped only when it is used.
MEASURE = """
import os, sys
from pathlib import Path
import torch
from minidoctor.weights import load_model

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

for tiny, large, dtype in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    if os.fork() == 0:
        load_model(tiny, getattr(torch, dtype))
        before = peak()
        model = load_model(large, getattr(torch, dtype))
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        print(sum(weights.values()), peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""
LARGE = {"vocab": 32_000, "dim": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "ffn": 3072}


def write_zeros(directory, kind, code, **shape):
    """A checkpoint of zeros, which take no space on the disk and are memory like any other once they are read."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings_of(kind, **shape)))
    header, end = {}, 0
    for name, size in shapes_of(kind, **shape).items():
        begin, end = end, end + math.prod(size) * {"F32": 4, "F16": 2, "BF16": 2}[code]
        header[name] = {"dtype": code, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(directory / "model.safetensors", 8 + len(text) + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_loading_takes_at_most_1_15_times_the_memory_of_the_weights(tmp_path):
    cases = [("llama", 15, "F16", "float32"), ("llama", 7, "F32", "bfloat16"), ("baichuan2", 5, "BF16", "bfloat16")]
    arguments = []
    for i, (kind, layers, code, dtype) in enumerate(cases):
        tiny, large = tmp_path / f"tiny{i}", tmp_path / f"large{i}"
        write_zeros(tiny, kind, code)
        write_zeros(large, kind, code, layers=layers, **LARGE)
        arguments += [str(tiny), str(large), dtype]
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(figures) == len(cases)
    assert figures[0][0] > 2**30
    for case, (weights, taken) in zip(cases, figures, strict=True):
        print(f"{case}: {weights / 2**30:.2f} GiB of weights, {taken / weights:.3f} times that taken")
        assert weights <= taken <= 1.15 * weights, case
