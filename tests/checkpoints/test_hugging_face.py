import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import ABSENT, change_tensors, write_checkpoint, write_shards

from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash, find_non_finite, load_model, save_model
from minidoctor.config import ModelConfig, RopeScaling
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import Model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_loads(directory, expected):
    """Assert that the loaded state equals the expected tensors bit for bit."""
    state = load_model(directory).state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.fixture
def base_copy(tmp_path, base_dir):
    return shutil.copytree(base_dir, tmp_path / "copy")


def test_shards_load_as_the_single_file_does(base_dir, base_copy):
    write_shards(base_copy)
    assert_loads(base_copy, load_model(base_dir).state_dict())


def test_missing_shard_and_tensor_in_two_shards_are_named(base_copy):
    name, weight_map = "model.norm.weight", write_shards(base_copy)
    file = base_copy / ("model-1.safetensors" if weight_map[name] == "model-0.safetensors" else "model-0.safetensors")
    change_tensors(file, model__norm__weight=torch.zeros(32))
    with pytest.raises(ValueError, match=r"model\.norm\.weight .*model-\d\.safetensors"):
        load_model(base_copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name):
        load_model(base_copy)


@pytest.mark.parametrize("index", ["shards", "{", '{"weight_map": {"a": "../b"}}'])
def test_single_file_is_preferred_to_a_leftover_index(base_dir, base_copy, index):
    single = (base_copy / WEIGHTS).read_bytes()
    change_tensors(base_copy / WEIGHTS, model__norm__weight=torch.full((32,), 2.0))
    write_shards(base_copy)
    shards = load_model(base_copy).state_dict()
    if index != "shards":
        (base_copy / INDEX).write_text(index)
    (base_copy / WEIGHTS).write_bytes(single)
    assert_loads(base_copy, load_model(base_dir).state_dict())
    assert not torch.equal(load_model(base_copy).state_dict()["model.norm.weight"], shards["model.norm.weight"])
    assert checkpoint_hash(base_copy) == checkpoint_hash(base_dir)


def test_shards_are_used_next_to_a_single_file_that_is_a_dangling_symlink(base_dir, base_copy):
    write_shards(base_copy)
    (base_copy / WEIGHTS).symlink_to("nowhere")
    assert_loads(base_copy, load_model(base_dir).state_dict())
    (base_copy / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: .*symlink.* nowhere"):
        load_model(base_copy)


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-1.safetensors"])
def test_dangling_symlink_instead_of_any_file_is_named(base_copy, file):
    write_shards(base_copy)
    (base_copy / file).unlink()
    (base_copy / file).symlink_to("../blobs/0a1b")
    with pytest.raises(FileNotFoundError, match=rf"{file}: .*symlink.* \.\./blobs/0a1b"):
        load_model(base_copy)


def test_interrupted_download_is_reported(base_copy):
    (base_copy / WEIGHTS).unlink()
    (base_copy / "pytorch_model.bin").touch()
    (base_copy / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (base_copy / ".cache" / "huggingface" / "download" / "0a1b.incomplete").touch()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.* 0a1b\.incomplete"):
        load_model(base_copy)


def test_cache_directory_loads_the_snapshot_of_main(tmp_path, base_dir):
    cache = tmp_path / "models--org--name"
    shutil.copytree(base_dir, cache / "snapshots" / "0a1b")
    shutil.copytree(base_dir, cache / "snapshots" / "2c3d")
    change_tensors(cache / "snapshots" / "2c3d" / WEIGHTS, model__norm__weight=torch.zeros(32))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0a1b")
    assert_loads(cache, load_model(base_dir).state_dict())
    assert read_model_config(cache) == read_model_config(base_dir)
    assert checkpoint_hash(cache) == checkpoint_hash(base_dir)


@pytest.mark.parametrize("part", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model."])
def test_names_of_a_wrapped_model_are_reported(base_copy, part):
    tensors = dict(read_tensors(base_copy / WEIGHTS))
    write_tensors(base_copy / WEIGHTS, {part + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=r"torch\.compile|DistributedDataParallel|peft") as rejected:
        load_model(base_copy)
    assert part.split(".")[0].removeprefix("_fsdp_wrapped_") in str(rejected.value)


@pytest.mark.parametrize(
    "name",
    [
        *("../base/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "config.json", "x" * 9999),
        *("痛" * 100 + ".safetensors", "a\0.safetensors", "\ud800.safetensors"),
    ],
    ids=lambda name: ascii(name)[:30],
)
def test_index_with_another_name_than_of_a_safetensors_file_is_rejected(base_copy, name):
    write_shards(base_copy)
    (base_copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match="copy"):
        load_model(base_copy)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index_is_rejected(base_copy, index):
    write_shards(base_copy)
    (base_copy / INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(base_copy)


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


def test_empty_or_missing_directory_is_rejected(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load_model(directory)


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
@pytest.mark.parametrize("kind", ["baichuan", "baichuan2"])
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
    for kind in ("baichuan", "baichuan2"):
        stored = write_checkpoint(tmp_path / kind, kind, vocab_size=50)["lm_head.weight"]
        stored[:10] *= 1000
        stored[7] = 0
        change_tensors(tmp_path / kind / WEIGHTS, lm_head__weight=stored)
        head = load_model(tmp_path / kind, dtype).lm_head.weight
        assert head.dtype == dtype
        if kind == "baichuan":
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


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"


def test_git_lfs_pointer_instead_of_any_file_is_named(base_dir, base_copy):
    write_shards(base_copy)
    shards = [f"model-{i}.safetensors" for i in range(3)]
    single = shutil.copytree(base_dir, base_copy.with_name("single"))
    for directory, names in ((single, ["config.json", WEIGHTS]), (base_copy, ["config.json", INDEX, *shards])):
        for name in names:
            content = (directory / name).read_bytes()
            (directory / name).write_text(POINTER)
            with pytest.raises(ValueError, match=rf"{directory.name}/{name}: .*git lfs pull"):
                load_model(directory)
            (directory / name).write_bytes(content)
        load_model(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4_k_m.gguf", "consolidated.00.pth", "model.pt"])
def test_directory_with_other_weights_only_is_rejected_by_their_name(tmp_path, base_dir, name):
    shutil.copy(base_dir / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors.* {name}: convert it"):
        load_model(tmp_path)


def test_shards_without_index_are_rejected(base_copy):
    write_shards(base_copy)
    (base_copy / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json"):
        load_model(base_copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_find_non_finite_names_the_first_such_tensor(base_dir, dtype, value):
    model = load_model(base_dir, dtype)
    assert find_non_finite(model) is None
    with torch.no_grad():
        model.model.norm.weight[3] = value
        assert find_non_finite(model) == "model.norm.weight"
        model.model.layers[1].mlp.up_proj.weight[2, 5] = value
    assert find_non_finite(model) == "model.layers.1.mlp.up_proj.weight"


def test_non_finite_model_is_not_saved(tmp_path, model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e30  # finite in float32 and bfloat16 only
    save_model(model, tmp_path / "bfloat16", torch.bfloat16)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight.*float16"):
        save_model(model, tmp_path / "float16", torch.float16)
    assert not (tmp_path / "float16").exists()
