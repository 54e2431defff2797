"""Checkpoints of `torch.save`: the header of a `.bin` file, without running code that is stored in it.

The file is an uncompressed zip archive: `name/data.pkl` describes the tensors, `name/data/0`, `name/data/1`, ... are
their storages. `torch.load` unpickles the description and maps the storages into memory. Their addresses and the
archive's directory give each tensor's bytes in the file, and these are read in chunks like those of safetensors.
"""

import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidoctor.config import UserError, check
from minidoctor.files.json_files import check_fetched, check_regular
from minidoctor.files.safetensors import CODES, Entry, read_header


class Record(NamedTuple):
    """A storage in the archive."""

    begin: int  # bytes from the start of the file
    size: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors or `.bin` file by name. Raises FileNotFoundError or UserError."""
    return read_bin_header(path) if path.suffix == ".bin" else read_header(path)[0]


def read_bin_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a `.bin` file by name. Raises FileNotFoundError or UserError."""
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(40)
    check_fetched(path, start)
    advice = "convert it to safetensors where you trust it"
    check(start[:4] == b"PK\3\4", f"{path}: truncated, or saved by torch before 1.6 and not as a zip file; {advice}")
    try:
        records = read_records(path)
        # weights_only: the restricted unpickler, which calls nothing but the functions that rebuild tensors. It is
        # safe from torch 2.6 on, our lower bound (CVE-2025-32434). Before 2.10 a crafted file can still corrupt
        # memory (CVE-2026-24747), so use a newer torch for files from strangers.
        state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged archive raises almost anything
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"{path}: rejected, because it calls {name[1]:.60}, which could run code; nothing was run"
            raise UserError(f"{reason}; ask for safetensors") from None
        raise UserError(f"{path}: damaged or not a PyTorch file ({' '.join(str(error).split()):.100})") from None
    is_state = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    check(is_state, f"{path}: expected an object of tensors by name; {advice}")
    for name, tensor in state.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype in CODES
        plain = plain and tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_neg()
        check(plain, f"{path}: {name:.200} is not a plain contiguous tensor; {advice}")
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    storages = sorted(found.items())
    # The file is mapped as a whole, so all storages have the same distance from their records.
    offset = storages[0][0] - records[0].begin if storages and records else 0
    same = storages == [(record.begin + offset, record.size) for record in records]
    check(same, f"{path}: damaged, the sizes in the archive and in its description differ")
    return {name: make_entry(tensor, offset) for name, tensor in state.items()}


def make_entry(tensor: Tensor, offset: int) -> Entry:
    begin = tensor.untyped_storage().data_ptr() - offset + int(tensor.storage_offset()) * tensor.itemsize
    return Entry(tensor.dtype, tuple(tensor.shape), begin, begin + tensor.numel() * tensor.itemsize)


def read_records(path: Path) -> list[Record]:
    """Return the storages of an archive in the order of the file. Raises any exception if it is damaged."""
    records = []
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        check(all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), "compressed")
        orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")]
        check(orders in ([], [b"little"]), "big-endian")
        for entry in entries:
            if re.fullmatch(r"[^/]+/data/[^/]+", entry.filename):
                file.seek(entry.header_offset)
                lengths = struct.unpack("<26xHH", file.read(30))  # of the name and of the padding behind it
                records.append(Record(entry.header_offset + 30 + sum(lengths), entry.file_size))
        end = max([record.begin + record.size for record in records], default=0)
        check(end <= path.stat().st_size, "truncated")
    return sorted(records)
