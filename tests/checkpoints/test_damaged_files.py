"""Damaged checkpoints load correctly or are rejected, quickly, without an allocation that the files do not justify."""

import json
import os
import random
import resource
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import ABSENT, ARCHITECTURES, change_json, change_tensors, write_checkpoint, write_shards
from torch.utils._python_dispatch import TorchDispatchMode

from minidoctor.checkpoints.hugging_face import load_model


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are created, except views and tensors on the device meta."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            storage = out.untyped_storage()
            arguments = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if storage.data_ptr() not in arguments:
                self.n_bytes += storage.nbytes()
        return out


def test_allocations_count_the_weights_once(base_dir):
    with Allocations() as allocations:
        state = load_model(base_dir).state_dict()
    del state["lm_head.weight"]  # tied
    assert allocations.n_bytes == sum(4 * tensor.numel() for tensor in state.values())


def test_equal_output_layer_of_a_tied_model_is_not_allocated(tmp_path):
    tensors = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(tmp_path / "model.safetensors", lm_head__weight=tensors["model.embed_tokens.weight"])
    with Allocations() as allocations:
        load_model(tmp_path)
    assert allocations.n_bytes == sum(4 * tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1000}, "tensors are missing: model.layers.1."),
        ({"num_hidden_layers": 2}, "9 tensors are missing: model.layers.1."),
        ({"hidden_size": 16}, r"\(6, 8\).*\(6, 16\)"),
        ({"vocab_size": 10}, r"\(6, 8\).*\(10, 8\)"),
        ({"head_dim": 4}, r"_proj\.weight .*\(., 8\).*\(.*, 8\)"),
        ({"num_key_value_heads": 4}, r"\(4, 8\).*\(8, 8\)"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, r"llama"),
        ({"num_attention_heads": 2**31 - 1, "num_key_value_heads": 1, "head_dim": 2**31 - 2}, r"llama"),
    ],
    ids=str,
)
def test_config_larger_than_the_files_is_rejected_without_allocation(tmp_path, changes, message):
    write_checkpoint(tmp_path / "llama", "llama")
    change_json(tmp_path / "llama" / "config.json", **changes)
    with Allocations() as allocations, pytest.raises(ValueError, match=message):
        load_model(tmp_path / "llama")
    assert allocations.n_bytes == 0


@pytest.mark.parametrize("fault", ["truncated", "wrong shape", "missing", "twice", "out of range"])
def test_nothing_is_allocated_before_the_last_shard_is_checked(tmp_path, fault):
    directory = tmp_path / "shards"
    tensors = write_checkpoint(directory, "llama")
    weight_map = write_shards(directory)
    last = directory / "model-2.safetensors"
    name = min(name for name, file in weight_map.items() if file == last.name)
    if fault == "truncated":
        os.truncate(last, last.stat().st_size - 1)
    elif fault == "out of range":
        header = read_header_json(last.read_bytes())
        header[name]["data_offsets"] = [offset + 2**40 for offset in header[name]["data_offsets"]]
        last.write_bytes(replace_header(last.read_bytes(), json.dumps(header).encode()))
    elif fault == "wrong shape":
        change_tensors(last, **{name: torch.zeros(3)})
    elif fault == "missing":
        change_tensors(last, **{name: ABSENT})
    else:
        repeated = next(name for name, file in weight_map.items() if file != last.name)
        change_tensors(last, **{repeated: tensors[repeated]})
    with Allocations() as allocations, pytest.raises(ValueError, match=r"shards"):
        load_model(directory)
    assert allocations.n_bytes == 0


def read_header_json(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def replace_header(content, text):
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def flip_bits(draw, content, region):
    """Flip one to three bits within the first `region` bytes, or cut off the end."""
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
CODES = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3"]
OTHER_NAMES = ["model.layers.7.mlp.up_proj.weight", "a", "", "\ud800"]


def falsify_header(draw, content):
    """Put one or two false values into the header of a safetensors file, or a false length in front of it."""
    header = read_header_json(content)
    for _ in range(draw.randint(1, 2)):
        name, other = draw.choice(list(header)), draw.choice(list(header))
        entry, kind = header[name], draw.randrange(8)
        if kind == 0 or not isinstance(entry, dict) or "shape" not in entry:
            header[name] = draw.choice(VALUES)
        elif kind == 1:
            entry["dtype"] = draw.choice([*CODES, *VALUES])
        elif kind == 2:
            entry["shape"] = [draw.choice(VALUES) for _ in range(draw.randint(0, 9))]
        elif kind == 3:
            entry["shape"] = entry["shape"][::-1] + [draw.choice([1, 0, 2])] * draw.randint(0, 1)
        elif kind == 4:
            entry["data_offsets"] = [draw.choice(VALUES) for _ in range(draw.randint(1, 3))]
        elif kind == 5:
            shift = draw.choice([-8, -4, 1, 4, 8, 2**40, 2**63])
            begin, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (0, 0)
            entry["data_offsets"] = [begin + shift, end + shift] if draw.random() < 0.5 else [begin, end + shift]
        elif kind == 6:
            header[other] = entry
        else:
            header[draw.choice(OTHER_NAMES)] = header.pop(name)
    if draw.random() < 0.1:
        (length,) = struct.unpack("<Q", content[:8])
        length = draw.choice([0, 1, length - 1, length + 1, len(content), 10**10, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:]
    return replace_header(content, json.dumps(header).encode())


def falsify_config(draw, content):
    if draw.random() < 0.3:
        return flip_bits(draw, content, len(content))
    config = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*config, *OTHER_KEYS])
        config[key] = draw.choice([*VALUES, *ROPES, *ARCHITECTURES, ["full_attention"]])
    return json.dumps(config).encode()


def flip_weights_file(draw, content):
    header = 8 + struct.unpack("<Q", content[:8])[0]
    # Most of the bytes are weights, where every bit pattern is valid.
    return flip_bits(draw, content, header if draw.random() < 0.9 else len(content))


@contextmanager
def limited_memory():
    """Let the process allocate 64 MiB more: less than any false size requests, more than a test needs."""
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


def decode_tensor(path, name):
    """Return a tensor from the definition of the format, in float32."""
    content = path.read_bytes()
    entry = read_header_json(content)[name]
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    begin, end = (8 + struct.unpack("<Q", content[:8])[0] + offset for offset in entry["data_offsets"])
    data = torch.frombuffer(bytearray(content[begin:end]), dtype=dtypes[entry["dtype"]])
    return data.reshape(entry["shape"]).float()


def load_or_reject(directory):
    """Return whether the checkpoint is rejected, with a short message. If it loads, compare with the file."""
    path, allocations, message, start = directory / "model.safetensors", Allocations(), "", time.monotonic()
    try:
        with allocations:
            model = load_model(directory)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert time.monotonic() - start < 5
    # Half precision takes twice its size in float32, and a buffer of the size of the file.
    assert allocations.n_bytes <= 3 * path.stat().st_size
    if message:
        assert str(directory) in message
        assert len(message) < 2000
        return True
    for name, tensor in model.state_dict().items():
        if "lm_head" not in name and "self_attn" not in name:  # stored under other names in some families
            torch.testing.assert_close(tensor, decode_tensor(path, name), rtol=0, atol=0, equal_nan=True)
    return False


@pytest.mark.parametrize(
    ("file_name", "mutate"),
    [("model.safetensors", flip_weights_file), ("model.safetensors", falsify_header), ("config.json", falsify_config)],
)
def test_500_mutated_files_load_correctly_or_are_rejected(tmp_path, file_name, mutate):
    directories = [tmp_path / kind for kind in ARCHITECTURES]
    for directory in directories:
        write_checkpoint(directory, directory.name, tie_word_embeddings=directory.name in ("mistral", "qwen3"))
        with Allocations():  # imports at the first use would count as allocations of a mutation
            load_model(directory)
    draw, n_rejected = random.Random(0), 0
    with limited_memory():
        for i in range(500):
            path = directories[i % len(directories)] / file_name
            content = path.read_bytes()
            path.write_bytes(mutate(draw, content))
            n_rejected += load_or_reject(path.parent)
            path.write_bytes(content)
    for directory in directories:
        load_model(directory)
    assert 0.4 * 500 < n_rejected < 500
