"""Files of torch.save: read like torch.load reads them, and rejected without running anything."""

import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from minidoctor.config import UserError
from minidoctor.files.pytorch_bin import read_bin_header, read_entries
from minidoctor.files.safetensors import read_tensors


class Call:
    """An object whose pickled form calls a function with these arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def read(path, dtype=None):
    return dict(read_tensors(path, dtype, entries=read_bin_header(path)))


def example_tensors():
    """Return tensors that are separate, tied, views, parameters, scalars or empty, in several dtypes."""
    a = torch.randn(3, 4)
    tensors = {"a": a, "tied": a, "rows": a[1:], "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(2, 2)), "also empty": torch.empty(0)}
    return tensors | {str(dtype): torch.arange(7).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int64)}


def test_tensors_are_those_of_torch_load(path):
    torch.save(example_tensors(), path)
    expected = torch.load(path, weights_only=True)
    assert expected.keys() == read(path).keys() == read_entries(path).keys()
    for name, tensor in read(path).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in read(path, torch.bfloat16).items():
        floating = expected[name].dtype.is_floating_point
        assert torch.equal(tensor, expected[name].bfloat16() if floating else expected[name]), name


def test_state_of_a_module_is_read(path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), path)
    for name, tensor in read(path).items():
        assert torch.equal(tensor, module.state_dict()[name]), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", ["pathlib.Path", "exec", "os.system", "getattr"])
def test_file_that_calls_a_function_is_rejected_and_nothing_runs(tmp_path, path, call, zipped):
    made = tmp_path / "made"
    state = {
        "pathlib.Path": Call(Path.touch, made),
        "exec": Call(exec, f"open({str(made)!r}, 'w')"),
        "os.system": Call(os.system, f"touch {made}"),
        "getattr": Call(getattr, Call(Path, str(made)), "touch"),
    }[call]
    torch.save({"a": torch.ones(2), "b": state}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .*(could run code; nothing was run|not as a zip file)"):
        read_bin_header(path)
    assert not made.exists()
    if zipped and call != "getattr":
        torch.load(path, weights_only=False)
        assert made.exists()  # the file would have done it


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ([torch.ones(2)], "by name"),
        ({1: torch.ones(2)}, "1 is not the name"),
        ({"state_dict": {"a": torch.ones(2)}}, "state_dict"),
        ({"a": torch.ones(2), "epoch": 3}, "epoch"),
        ({"transposed": torch.ones(2, 3).T}, "transposed"),
        ({"expanded": torch.ones(1).expand(3)}, "expanded"),
        ({"sparse": torch.eye(3).to_sparse()}, "sparse"),
        ({"bytes": torch.ones(2, dtype=torch.int8)}, "bytes"),
        ({"complex": torch.ones(2, dtype=torch.complex64)}, "complex"),
        ({"meta": torch.ones(2, device="meta")}, "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_but_plain_tensors_by_name_is_rejected(path, state, name):
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: .*{name}"):
        read_bin_header(path)


def test_legacy_file_is_rejected_with_a_hint(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"torch before 1\.6.* convert it"):
        read_bin_header(path)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"PK\3\4" + b"x" * 100, b"\x80\x02}q\x00."])
def test_other_content_is_rejected(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: "):
        read_bin_header(path)


def test_missing_file_and_git_lfs_pointer_are_named(path):
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
        read_bin_header(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_bin_header(path)


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive again with changed records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(records).items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records | {"pytorch_model/data/0": records["pytorch_model/data/0"][:-4]},
        lambda records: records | {"pytorch_model/data/0": records["pytorch_model/data/0"] + b"1234"},
        lambda records: records | {"pytorch_model/data/9": b"1234"},
        lambda records: {name: content for name, content in records.items() if not name.endswith("data/0")},
        lambda records: {name: content for name, content in records.items() if not name.endswith("data.pkl")},
        lambda records: records | {"pytorch_model/byteorder": b"big"},
        lambda records: records | {"pytorch_model/constants.pkl": b""},
    ],
    ids=["shorter", "longer", "more storages", "fewer storages", "no description", "big-endian", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_archive_that_contradicts_its_description_is_rejected(path, change):
    torch.save({"a": torch.ones(5), "b": torch.ones(3)}, path)
    rewrite(path, dict)
    assert read(path)["a"].tolist() == [1] * 5  # the rewriting itself does no harm
    rewrite(path, change)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged"):
        read_bin_header(path)


def test_compressed_archive_is_rejected(path):
    torch.save({"a": torch.ones(5)}, path)
    rewrite(path, dict, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_bin_header(path)


def test_description_with_a_larger_tensor_than_its_storage_is_rejected(path):
    torch.save({"a": torch.ones(100)}, path)
    content = path.read_bytes()
    assert content.count(b"Kd") >= 1  # the pickled integer 100
    path.write_bytes(content.replace(b"Kd", b"K\xff"))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged"):
        read_bin_header(path)


def test_record_outside_the_file_is_rejected(path):
    torch.save({"a": torch.ones(100)}, path)
    content, size = path.read_bytes(), struct.pack("<I", 400)
    assert size in content  # of the record, in the archive's directory
    path.write_bytes(content.replace(size, struct.pack("<I", 2**30)))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged"):
        read_bin_header(path)


@pytest.mark.filterwarnings("ignore")
def test_400_mutated_files_are_read_as_torch_load_does_or_rejected(path):
    torch.save(example_tensors(), path)
    content, draw, messages = path.read_bytes(), random.Random(0), []
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed[: draw.choice([len(content)] * 5 + [draw.randrange(len(content))])])
        try:
            tensors = read(path)
        except UserError as error:
            messages.append(str(error))
        else:
            expected = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)
    assert 100 < len(messages) < 400
    assert all(message.startswith(f"{path}: ") and len(message) < 1000 for message in messages)
