"""Tests of the safetensors format: files are compared with a plain reader and writer of its definition."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch

from minidoctor.config import UserError
from minidoctor.files import safetensors
from minidoctor.files.json_files import read_json
from minidoctor.files.safetensors import DTYPES, read_header, read_tensors, write_tensors

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
SHAPES = [(), (0,), (3,), (2, 3), (0, 4), (2, 1, 2)]


def plain_read(path):
    """Return (dtype, shape, bytes) by tensor name, and the metadata, by the definition of the format."""
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
    """Return the bytes of a tensor: random ones contain NaN, which is not equal to itself."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_tensors():
    """Return tensors of every dtype and shape, and one that is not contiguous."""
    tensors = {}
    for code, dtype in DTYPES.items():
        for shape in SHAPES:
            n_bytes = math.prod(shape) * SIZES[code]
            random_bytes = torch.randint(0, 2 if code == "BOOL" else 256, (n_bytes,), dtype=torch.uint8)
            tensors[f"{code}.{shape}"] = random_bytes.view(dtype).reshape(shape)
    tensors["痛风"] = torch.randn(4, 3).T  # not contiguous
    return tensors


def test_reading_returns_the_written_bits_of_every_dtype_and_shape(tmp_path):
    tensors, path = random_tensors(), tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    back = dict(read_tensors(path))
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name


def test_written_file_follows_the_definition_of_the_format(tmp_path):
    tensors, path = random_tensors(), tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    plain, metadata = plain_read(path)
    assert metadata == {"format": "pt"}
    assert set(plain) == set(tensors)
    for name, tensor in tensors.items():
        code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
        assert plain[name] == (code, tuple(tensor.shape), bits(tensor)), name


def test_tensors_are_packed_and_aligned_to_their_dtype(tmp_path):
    tensors, path = random_tensors(), tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    entries = sorted(read_header(path)[0].values(), key=lambda e: (e.begin, e.end))
    assert [e.end for e in entries[:-1]] == [e.begin for e in entries[1:]]
    assert entries[-1].end == path.stat().st_size
    assert all(e.begin % e.dtype.itemsize == 0 for e in entries)


def test_file_by_the_definition_of_the_format_is_read(tmp_path):
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
    "oversized header length": (struct.pack("<Q", 2**63) + b"{}", "truncated"),
    "not JSON": (b"nonsense", "header.*not JSON"),
    "not text": (b"\xff\xff\xff", "header"),
    "nested without end": (b'{"a":' * 50_000, "not JSON"),
    "not an object": ([1], "header"),
    "metadata not text": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "metadata not an object": ({"__metadata__": "a"}, "__metadata__"),
    "repeated name": (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), "'a'"),
    "overlapping": ({"a": entry((2,), (0, 8)), "b": entry((1,), (4, 8))}, "overlap"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "overlap"),
    "out of range": ({"a": entry((3,), (0, 12))}, "a: truncated"),
    "too few bytes": ({"a": entry((2,), (0, 4))}, "a: 4 bytes"),
    "too many bytes": ({"a": entry((1,), (0, 8))}, "a: 8 bytes"),
    "end before begin": ({"a": entry((2,), (8, 0))}, "a: -8 bytes"),
    "unknown dtype": ({"a": entry(dtype="F4")}, "dtype 'F4'"),
    "dtype not text": ({"a": entry(dtype=["F32"])}, "dtype"),
    "negative shape": ({"a": entry((-1, -2))}, "shape"),
    "float shape": ({"a": entry((2.0,))}, "shape"),
    "bool shape": ({"a": entry((True, 2))}, "shape"),
    "shape not a list": ({"a": entry(2)}, "shape"),
    "negative offset": ({"a": entry((2,), (-8, 0))}, "data_offsets"),
    "float offset": ({"a": entry((2,), (0.0, 8.0))}, "data_offsets"),
    "three offsets": ({"a": entry((2,), (0, 4, 8))}, "data_offsets"),
    "entry not an object": ({"a": [2]}, "a: expected"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "a: expected"),
    "huge and empty": ({"a": entry((0, 2**70), (0, 0))}, "shape"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_invalid_files_are_rejected_with_their_name(tmp_path, kind):
    header, message = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    if kind in ("empty", "shorter than a length", "truncated header", "oversized header length"):
        path.write_bytes(header)
    else:
        plain_write(path, header, EIGHT)
    with pytest.raises(ValueError, match=message) as error:
        list(read_tensors(path))
    assert str(path) in str(error.value)


def test_missing_file_is_reported_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        list(read_tensors(tmp_path / "none.safetensors"))


def sparse(path, start, size):
    """Create a file of `size` bytes of which only the start takes space on the disk."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def test_header_of_10_gb_is_rejected_before_it_is_read(tmp_path):
    path = sparse(tmp_path / "a.safetensors", struct.pack("<Q", 10**10), 8 + 10**10)
    with pytest.raises(ValueError, match=r"a\.safetensors: .*10000000000"):
        read_header(path)


def test_git_lfs_pointer_is_not_reported_as_a_damaged_file(tmp_path):
    path = tmp_path / "a"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 134515008\n")
    for read in (read_header, read_json, lambda path: list(read_tensors(path))):
        with pytest.raises(ValueError, match=r"a: .*git lfs pull"):
            read(path)


# One third in each format by its definition: sign, exponent and the first 10, 7, 23 or 52 bits of the fraction.
THIRDS = {
    "F16": (bytes.fromhex("5535"), 1365 / 4096),
    "BF16": (bytes.fromhex("ab3e"), 171 / 512),
    "F32": (bytes.fromhex("abaaaa3e"), 11184811 / 2**25),
    "F64": (bytes.fromhex("555555555555d53f"), 1 / 3),
}


@pytest.mark.parametrize("code", THIRDS)
def test_reading_converts_exactly_to_the_requested_dtype(tmp_path, code):
    content, value = THIRDS[code]
    header = {"a": entry((3,), (0, 3 * len(content)), code)}
    path = plain_write(tmp_path / "a.safetensors", header, content * 3)
    exact = dict(read_tensors(path, torch.float64))["a"]
    assert (exact.dtype, exact.tolist()) == (torch.float64, [value] * 3)
    half = dict(read_tensors(path, torch.bfloat16))["a"]
    assert (half.dtype, half.tolist()) == (torch.bfloat16, [171 / 512] * 3)


def test_reading_keeps_integers_and_selects_names(tmp_path):
    tensors = {"a": torch.tensor([2**40]), "b": torch.tensor([True, False]), "c": torch.tensor([0.5])}
    write_tensors(tmp_path / "a.safetensors", tensors)
    back = dict(read_tensors(tmp_path / "a.safetensors", torch.bfloat16, names=["a", "b", "unknown"]))
    assert set(back) == {"a", "b"}
    assert (back["a"].dtype, back["a"].item()) == (torch.int64, 2**40)
    assert back["b"].tolist() == [True, False]


@pytest.mark.parametrize("chunk", [1, 3, 12, 13])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_reading_in_chunks_returns_the_whole_tensor(tmp_path, monkeypatch, chunk, dtype):
    monkeypatch.setattr(safetensors, "CHUNK", chunk)
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5, 5), "c": torch.randn(())}
    write_tensors(tmp_path / "a.safetensors", tensors)
    back = dict(read_tensors(tmp_path / "a.safetensors", dtype))
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.to(dtype or tensor.dtype)), name


def test_file_that_shrinks_while_it_is_read_is_rejected(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(10), "b": torch.zeros(100_000)})
    tensors = read_tensors(path)
    next(tensors)
    os.truncate(path, 200_000)
    with pytest.raises(ValueError, match=r"a\.safetensors: truncated"):
        next(tensors)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    old = path.read_bytes()
    os.symlink("/dev/full", tmp_path / "a.safetensors.tmp")  # the temporary file
    with pytest.raises(OSError, match=r"a\.safetensors: .*No space left"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_metadata_and_names_may_contain_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_tensors(tmp_path / "a.safetensors", {name: torch.ones(2)}, {"base": name})
    entries, metadata = read_header(tmp_path / "a.safetensors")
    assert (list(entries), metadata) == ([name], {"base": name})


def test_pipe_is_not_reported_as_missing(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: not a regular file"):
        read_header(tmp_path / "a.safetensors")
