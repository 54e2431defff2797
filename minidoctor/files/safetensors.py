"""The safetensors format: tensors in a file that is checked completely and cannot execute code.

The file is 8 bytes with the length N of the header, N bytes of JSON {"name": {"dtype", "shape", "data_offsets":
[begin, end]}, "__metadata__": {str: str}}, and the packed tensors in row-major order. All sizes are compared with the
size of the file before memory is allocated. Format: https://github.com/huggingface/safetensors
"""

import math
import os
import struct
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidoctor.config import UserError, check
from minidoctor.files.json_files import check_fetched, check_regular, format_json, parse_json, write_atomically

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library
CHUNK = 2**22  # elements that are read and converted at a time


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries by tensor name and the metadata. Raises FileNotFoundError or UserError."""
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # of the open file, which may be replaced in the meantime
        start = file.read(40)
        check_fetched(path, start)
        file.seek(8)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        fits = 8 + length <= size and length <= LARGEST_HEADER
        check(fits, f"{path}: truncated or not safetensors: header of {length} bytes, file of {size} bytes")
        header = parse_json(file.read(length), f"{path}: header: ")
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: header must be an object, its __metadata__ an object of strings")
    entries = {name: parse_entry(f"{path}: {name}", entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        check(entry.begin >= end, f"{path}: tensors overlap")
        end = entry.end
    return entries, metadata


def parse_entry(where: str, entry: Any, data_start: int, file_size: int) -> Entry:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise UserError(f"{where}: expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{where}: dtype {code!r:.40} is not supported, expected one of {', '.join(DTYPES)}")
    valid = natural(shape) and natural(offsets) and len(offsets) == 2 and len(shape) <= 8
    # The limit also applies to an empty tensor: torch multiplies its other dimensions.
    valid = valid and math.prod(max(n, 1) for n in shape) <= 2**60
    check(valid, f"{where}: invalid shape or data_offsets")
    begin, end = (data_start + offset for offset in offsets)
    check(end <= file_size, f"{where}: truncated, the tensor ends at byte {end}, the file at {file_size}")
    n_bytes = math.prod(shape) * DTYPES[code].itemsize
    check(end - begin == n_bytes, f"{where}: {end - begin} bytes for {code} of shape {tuple(shape)}")
    return Entry(DTYPES[code], tuple(shape), begin, end)


def read_tensors(
    path: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    names: Container[str] | None = None,
    entries: Mapping[str, Entry] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, or those of `names`, one at a time, floating-point ones converted to `dtype`.

    `entries` are those of a file in another format (pytorch_bin.py). The file is read in chunks, not memory-mapped:
    mapped pages also count as used memory, and if a mapped file shrinks, the process is killed. Raises as
    `read_header`.
    """
    entries = read_header(path)[0] if entries is None else entries
    buffer = torch.empty(0)  # one for all tensors, because many would fragment the memory
    with path.open("rb") as file:
        for name, entry in entries.items():
            if names is not None and name not in names:
                continue
            target = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
            tensor = torch.empty(entry.shape, dtype=target, device=device)
            direct = target == entry.dtype and tensor.device.type == "cpu"
            file.seek(entry.begin)
            if not direct and (buffer.dtype != entry.dtype or len(buffer) < min(tensor.numel(), CHUNK)):
                buffer = torch.empty(min(tensor.numel(), CHUNK), dtype=entry.dtype)
            for chunk in tensor.view(-1).split(CHUNK):
                stored = chunk if direct else buffer[: len(chunk)]
                content = stored.view(torch.uint8).numpy().data
                check(file.readinto(content) == len(content), f"{path}: truncated while it was read")
                if not direct:
                    chunk.copy_(stored)
            yield name, tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file atomically. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest dtype first, as in the format's own library, so that every tensor is aligned to its dtype.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = format_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    flats = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data for _, tensor in ordered)
    write_atomically(path, struct.pack("<Q", len(text)), text, *flats)
