"""The files of a checkpoint directory: single file or shards, links, downloads, and names of wrapped models."""

import json
import re
import shutil

import pytest
import torch
from tiny_checkpoints import (
    ABSENT,
    assert_loads,
    change_json,
    change_tensors,
    write_bin,
    write_checkpoint,
    write_shards,
)

from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash, load_model
from minidoctor.files.safetensors import read_tensors, write_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


PICKLED = "pytorch_model.bin"


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bin_checkpoint_loads_as_safetensors_do(base_dir, base_copy, sharded, dtype):
    (write_shards(base_copy, single=PICKLED) if sharded else write_bin(base_copy))
    assert not list(base_copy.glob("*.safetensors"))
    expected, state = load_model(base_dir, dtype).state_dict(), load_model(base_copy, dtype).state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_checkpoint_hash_is_that_of_the_tensors_in_either_format(base_dir, base_copy):
    tensors = write_bin(base_copy)
    assert checkpoint_hash(base_copy) == checkpoint_hash(base_dir)
    tensors["model.norm.weight"][-1] += 1
    torch.save(tensors, base_copy / PICKLED)
    assert checkpoint_hash(base_copy) != checkpoint_hash(base_dir)


@pytest.mark.parametrize("pickled", ["single", "sharded"])
def test_safetensors_are_preferred_to_bin_files_with_a_note(capsys, base_dir, base_copy, pickled):
    load_model(base_copy)
    assert capsys.readouterr().err == ""
    change_tensors(base_copy / WEIGHTS, model__norm__weight=torch.full((32,), 2.0))
    (write_bin(base_copy) if pickled == "single" else write_shards(base_copy, single=PICKLED))
    changed = load_model(base_copy).state_dict()
    assert capsys.readouterr().err == ""
    shutil.copy(base_dir / WEIGHTS, base_copy)
    assert_loads(base_copy, load_model(base_dir).state_dict())
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"note: {base_copy} has model\.safetensors and pytorch_model\S*\.bin; .*\n", err)
    assert not torch.equal(changed["model.norm.weight"], load_model(base_dir).state_dict()["model.norm.weight"])
    write_shards(base_copy)
    assert_loads(base_copy, load_model(base_dir).state_dict())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", ABSENT, r"missing: model\.norm\.weight"),
        ("extra", torch.zeros(2), "unexpected: extra"),
        ("model.norm.weight", torch.zeros(31), r"model\.norm\.weight .*\(31,\).*\(32,\)"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int64), r"model\.norm\.weight .*I64"),
        ("_orig_mod.model.norm.weight", torch.zeros(32), r"torch\.compile"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "wrapped"],
)
def test_unsuitable_tensor_of_a_bin_file_is_named(base_copy, name, tensor, message):
    tensors = write_bin(base_copy) | {name: tensor}
    torch.save({key: value for key, value in tensors.items() if value is not ABSENT}, base_copy / PICKLED)
    with pytest.raises(ValueError, match=message):
        load_model(base_copy)


def test_output_layer_of_a_tied_model_in_a_bin_file_is_used_if_it_differs(tmp_path):
    tensors = write_checkpoint(tmp_path / "tied", "llama", vocab_size=50)
    change_json(tmp_path / "tied" / "config.json", tie_word_embeddings=True)
    write_bin(tmp_path / "tied")
    model = load_model(tmp_path / "tied")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # saved once, as torch.save does for a tied model
    torch.save(tensors, tmp_path / "tied" / PICKLED)
    assert load_model(tmp_path / "tied").config.tied


def test_tensor_in_two_bin_shards_is_rejected(base_copy):
    weight_map = write_shards(base_copy, single=PICKLED)
    torch.save({name: torch.zeros(2) for name in weight_map}, base_copy / "pytorch_model-1.bin")
    with pytest.raises(ValueError, match=r"pytorch_model-\d\.bin: .* is also in pytorch_model-\d\.bin"):
        load_model(base_copy)


@pytest.mark.parametrize("name", ["pytorch_model-1.bin", f"{PICKLED}.index.json"])
def test_missing_bin_shard_and_foreign_name_in_its_index_are_named(base_copy, name):
    write_shards(base_copy, single=PICKLED)
    if name.endswith("json"):
        (base_copy / name).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    else:
        (base_copy / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name)):
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
    (base_copy / "model.pth").touch()
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


def test_empty_or_missing_directory_is_rejected(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load_model(directory)


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


@pytest.mark.parametrize("name", ["other.bin", "model-q4_k_m.gguf", "consolidated.00.pth", "model.pt"])
def test_directory_with_other_weights_only_is_rejected_by_their_name(tmp_path, base_dir, name):
    shutil.copy(base_dir / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors.* {name}: convert it"):
        load_model(tmp_path)


def test_shards_without_index_are_rejected(base_copy):
    write_shards(base_copy)
    (base_copy / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.* index of shards"):
        load_model(base_copy)
