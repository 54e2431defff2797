"""Files of `torch.save` (`.bin`): their header, without running code that is stored in them.

The file is an uncompressed zip archive: `name/data.pkl` describes the tensors, `name/data/0`, `name/data/1`, ... are
their storages. `torch.load` unpickles the description and maps the storages into memory. Their addresses and the
archive's directory give each tensor's bytes in the file, and these are read in chunks like those of safetensors.
"""

import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidoctor.config import UserError, check
from minidoctor.files.json_files import check_fetched, check_regular
from minidoctor.files.safetensors import CODES, Entry, read_header

ADVICE = "convert it to safetensors where you trust it"


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors or `.bin` file by name. Raises FileNotFoundError or UserError."""
    return read_bin_header(path) if path.suffix == ".bin" else read_header(path)[0]


def read_bin_header(path: Path) -> dict[str, Entry]:
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(40)
    check_fetched(path, start)
    check(start[:4] == b"PK\3\4", f"{path}: truncated, or saved by torch before 1.6 and not as a zip file; {ADVICE}")
    try:
        records = read_records(path)
        # weights_only: the restricted unpickler, which calls nothing but the functions that rebuild tensors. It is
        # safe from torch 2.6 on, our lower bound (CVE-2025-32434). Before 2.10 a crafted file can still corrupt
        # memory (CVE-2026-24747), so use a newer torch for files from strangers.
        state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged archive raises almost anything
        reason = f"damaged or not a PyTorch file ({' '.join(str(error).split()):.100})"
        if call := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"rejected, because it calls {call[1]:.60}, which could run code; nothing was run"
        raise UserError(f"{path}: {reason}; ask for safetensors") from None
    check(isinstance(state, dict), f"{path}: expected tensors by name, got {type(state).__name__}; {ADVICE}")
    sizes: dict[int, int] = {}  # of the storages, by address
    for name, tensor in state.items():
        plain = type(name) is str and type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        plain = plain and tensor.dtype in CODES and tensor.layout == torch.strided and not tensor.is_neg()
        plain = plain and tensor.is_contiguous()
        check(plain, f"{path}: {name!r:.200} is not the name of a plain contiguous tensor; {ADVICE}")
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    # The file is mapped as a whole, so all storages have the same distance from their records.
    distance = min(sizes) - records[0][0] if sizes and records else 0
    same = sorted(sizes.items()) == [(begin + distance, size) for begin, size in records]
    check(same, f"{path}: damaged, the sizes in the archive and in its description differ")
    entries = {}
    for name, tensor in state.items():
        begin = tensor.untyped_storage().data_ptr() - distance + int(tensor.storage_offset()) * tensor.itemsize
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), begin, begin + tensor.nbytes)
    return entries


def read_records(path: Path) -> list[tuple[int, int]]:
    """Return begin and size of the storages in the order of the file. Raises any exception if it is damaged."""
    records = []
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        check(all(info.compress_type == zipfile.ZIP_STORED for info in infos), "compressed")
        orders = [archive.read(info) for info in infos if info.filename.endswith("/byteorder")]
        check(orders in ([], [b"little"]), "big-endian")
        for info in infos:
            if re.fullmatch(r"[^/]+/data/[^/]+", info.filename):
                file.seek(info.header_offset)
                lengths = struct.unpack("<26xHH", file.read(30))  # of the name and of the padding after it
                records.append((info.header_offset + 30 + sum(lengths), info.file_size))
                check(sum(records[-1]) <= path.stat().st_size, "truncated")
    return sorted(records)
