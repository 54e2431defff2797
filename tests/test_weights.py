import json
import math
import os
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidoctor.families import read_model_config
from minidoctor.files import DTYPES, read_header, read_tensors, write_atomically, write_tensors
from minidoctor.model import Model
from minidoctor.weights import fingerprint, load_model, save_model

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
SHAPES = [(), (0,), (3,), (2, 3), (0, 4), (2, 1, 2)]


def plain_read(path):
    """The format by its definition: name -> (dtype, shape, bytes), and the metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    return tensors, metadata


def plain_write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bits(tensor):
    """The bytes of a tensor: random ones hold NaN, which equals nothing."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors_of_every_kind():
    tensors = {}
    for code, dtype in DTYPES.items():
        for shape in SHAPES:
            n_bytes = math.prod(shape) * SIZES[code]
            random_bytes = torch.randint(0, 2 if code == "BOOL" else 256, (n_bytes,), dtype=torch.uint8)
            tensors[f"{code}.{shape}"] = random_bytes.view(dtype).reshape(shape)
    tensors["痛风"] = torch.randn(4, 3).T  # not contiguous
    return tensors


def test_tensors_of_every_dtype_and_shape_come_back_bit_for_bit(tmp_path):
    tensors, path = tensors_of_every_kind(), tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    back = dict(read_tensors(path))
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name


def test_files_written_here_are_what_the_formats_definition_says(tmp_path):
    tensors, path = tensors_of_every_kind(), tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    plain, metadata = plain_read(path)
    assert metadata == {"format": "pt"}
    assert set(plain) == set(tensors)
    for name, tensor in tensors.items():
        code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
        assert plain[name] == (code, tuple(tensor.shape), bits(tensor)), name


def test_tensors_stand_without_gaps_and_aligned_to_their_dtype(tmp_path):
    tensors, path = tensors_of_every_kind(), tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    entries = sorted(read_header(path)[0].values(), key=lambda e: (e.begin, e.end))
    assert [e.end for e in entries[:-1]] == [e.begin for e in entries[1:]]
    assert entries[-1].end == path.stat().st_size
    assert all(e.begin % e.dtype.itemsize == 0 for e in entries)


def test_a_file_written_by_the_formats_definition_is_read(tmp_path):
    header = {"b": entry((2,), (4, 12)), "a": entry((), (0, 4)), "__metadata__": {"who": "a test"}}
    path = plain_write(tmp_path / "a.safetensors", header, struct.pack("<3f", 1.5, -2.0, 3.25))
    back = dict(read_tensors(path))
    assert back["a"].item() == 1.5
    assert back["b"].tolist() == [-2.0, 3.25]
    assert read_header(path)[1] == {"who": "a test"}


EIGHT = b"\0" * 8
BAD_FILES = {
    "empty": (b"", "truncated"),
    "shorter than a length": (b"\0\0\0", "truncated"),
    "truncated header": (struct.pack("<Q", 50) + b'{"a": ', "truncated"),
    "oversized header length": (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors file"),
    "not JSON": (b"nonsense", "not JSON"),
    "not text": (b"\xff\xff\xff", "not JSON"),
    "nested without end": (b'{"a":' * 50_000, "not JSON"),
    "not an object": ([1], "must be a JSON object"),
    "metadata not text": ({"__metadata__": {"a": 1}}, "must map text to text"),
    "metadata not an object": ({"__metadata__": "a"}, "must map text to text"),
    "duplicate names": (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), "stands twice"),
    "overlapping": ({"a": entry((2,), (0, 8)), "b": entry((1,), (4, 8))}, "overlap"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "overlap"),
    "out of range": ({"a": entry((3,), (0, 12))}, "truncated: a ends at byte"),
    "too few bytes": ({"a": entry((2,), (0, 4))}, "4 bytes cannot hold F32 of shape"),
    "too many bytes": ({"a": entry((1,), (0, 8))}, "8 bytes cannot hold F32 of shape"),
    "end before begin": ({"a": entry((2,), (8, 0))}, "-8 bytes cannot hold"),
    "unknown dtype": ({"a": entry(dtype="F4")}, "dtype 'F4' is not supported"),
    "dtype no text": ({"a": entry(dtype=["F32"])}, "is not supported"),
    "negative shape": ({"a": entry((-1, -2))}, "bad shape"),
    "float shape": ({"a": entry((2.0,))}, "bad shape"),
    "bool shape": ({"a": entry((True, 2))}, "bad shape"),
    "shape no list": ({"a": entry(2)}, "bad shape"),
    "negative offset": ({"a": entry((2,), (-8, 0))}, "bad shape or data_offsets"),
    "float offset": ({"a": entry((2,), (0.0, 8.0))}, "bad shape or data_offsets"),
    "three offsets": ({"a": entry((2,), (0, 4, 8))}, "bad shape or data_offsets"),
    "entry no object": ({"a": [2]}, "expected dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "expected dtype, shape and data_offsets"),
    "huge and empty": ({"a": entry((0, 2**70), (0, 0))}, "shape"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name(tmp_path, kind):
    header, message = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    if kind in ("empty", "shorter than a length", "truncated header", "oversized header length"):
        path.write_bytes(header)
    else:
        plain_write(path, header, EIGHT)
    with pytest.raises(ValueError, match=message) as refused:
        list(read_tensors(path))
    assert str(path) in str(refused.value)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        list(read_tensors(tmp_path / "none.safetensors"))


def mutated(content, draw, region):
    """A bit flip or two within the first `region` bytes, or a truncation."""
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.randint(1, 2)):
        changed[draw.randrange(region)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_300_mutated_files_load_or_are_refused(tmp_path, base_dir):
    draw, refused = random.Random(0), 0
    directory = shutil.copytree(base_dir, tmp_path / "base")
    names = {"model.safetensors": 220, "config.json": 80}
    for name, n in names.items():
        content = (base_dir / name).read_bytes()
        header = 8 + struct.unpack("<Q", content[:8])[0]
        for _ in range(n):
            # Most of the bytes are weights, where any bit may stand.
            (directory / name).write_bytes(mutated(content, draw, min(header, len(content))))
            try:
                load_model(directory)
            except (ValueError, FileNotFoundError):
                refused += 1
        (directory / name).write_bytes(content)
    load_model(directory)
    assert 150 < refused < 300


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


def changed_config(base_dir, directory, **changes):
    shutil.copytree(base_dir, directory)
    settings = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma"),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        # Where newer checkpoints keep the two settings of the rotation, https://github.com/huggingface/transformers
        # from version 5 on.
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}),
    ],
)
def test_a_setting_that_this_decoder_does_not_have_is_named(tmp_path, base_dir, key, value):
    directory = changed_config(base_dir, tmp_path / "base", **{key: value})
    with pytest.raises(ValueError, match=rf"config\.json: {key} is "):
        read_model_config(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "32"},
        {"hidden_size": 32.0},
        {"hidden_size": True},
        {"hidden_size": 0},
        {"hidden_size": -32},
        {"hidden_size": 64},
        {"head_dim": 7},
        {"num_attention_heads": 0},
        {"num_attention_heads": [4]},
        {"num_key_value_heads": 3},
        {"vocab_size": 10},
        {"vocab_size": 10**30},
        {"hidden_size": 10**400, "num_attention_heads": 4.0},
        {"num_hidden_layers": 3},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "small"},
        {"rope_theta": -1},
        {"rope_theta": 10**400},
        {"tie_word_embeddings": "yes"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, base_dir, changes):
    with pytest.raises(ValueError, match="base"):
        load_model(changed_config(base_dir, tmp_path / "base", **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"model_type": "llama"}'])
def test_a_config_that_is_no_config_is_refused(tmp_path, base_dir, text):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(directory)


def test_what_config_json_leaves_out_has_llamas_defaults(tmp_path):
    settings = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = read_model_config(tmp_path)
    assert (config.n_kv_heads, config.head_dim, config.max_seq_len) == (4, 4, 2048)
    assert (config.norm_eps, config.rope_theta, config.tied) == (1e-6, 10000.0, False)


def test_an_empty_or_missing_directory_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load_model(directory)


def test_the_fingerprint_is_that_of_a_copy_and_of_no_model_with_one_other_weight(tmp_path, base_dir):
    directory = shutil.copytree(base_dir, tmp_path / "base")
    assert fingerprint(directory) == fingerprint(base_dir)
    tensors, seen = dict(read_tensors(directory / "model.safetensors")), {fingerprint(base_dir)}
    for name, tensor in tensors.items():
        for place in (0, -1):
            before = tensor.flatten()[place].clone()
            tensor.view(-1)[place] += 0.25
            write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
            assert fingerprint(directory) not in seen, name
            seen.add(fingerprint(directory))
            tensor.view(-1)[place] = before
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    assert fingerprint(directory) == fingerprint(base_dir)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    old = path.read_bytes()
    os.symlink("/dev/full", tmp_path / "a.safetensors.tmp")  # where the new file is first written
    with pytest.raises(OSError, match=r"a\.safetensors: could not be written .*No space left"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_write_into_a_directory_that_is_not_there_fails_with_the_name(tmp_path):
    with pytest.raises(OSError, match="nowhere/a: could not be written"):
        write_atomically(tmp_path / "nowhere" / "a", b"text")
