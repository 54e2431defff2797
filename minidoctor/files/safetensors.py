"""Files that are whole or not there: JSON and safetensors, checked before they are read, renamed into place.

A safetensors file is 8 bytes with the header's length N, N bytes of JSON {"name": {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {text: text}}, and the tensors, packed, in row-major order.
Nothing in it can be executed. Everything is checked against the file's size before memory is taken.
"""

import json
import math
import os
import struct
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidoctor.config import UserError
from minidoctor.files.json_files import check_fetched, unique_keys, write_atomically

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library
PART = 2**22  # numbers that are read at a time


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # of this file, not of one that replaces it meanwhile
        start = file.read(40)
        check_fetched(path, start)
        file.seek(8)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        if 8 + length > size or length > LARGEST_HEADER:
            raise UserError(f"{path}: truncated or no safetensors file: header of {length} bytes, file of {size}")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map text to text")
    entries = {name: parse_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    taken = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < taken:
            raise UserError(f"{path}: tensors overlap")
        taken = entry.end
    return entries, metadata


def parse_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> Entry:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise UserError(f"{path}: {name}: expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{path}: {name}: dtype {code!r:.40} is not supported, only {', '.join(DTYPES)}")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise UserError(f"{path}: {name}: bad shape or data_offsets")
    if math.prod(max(n, 1) for n in shape) > 2**60:  # also of an empty tensor: torch multiplies the rest
        raise UserError(f"{path}: {name}: bad shape or data_offsets")
    begin, end = (data_start + offset for offset in offsets)
    if end > size:
        raise UserError(f"{path}: truncated: {name} ends at byte {end}, the file at {size}")
    if end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise UserError(f"{path}: {name}: {end - begin} bytes cannot hold {code} of shape {tuple(shape)}")
    return Entry(DTYPES[code], tuple(shape), begin, end)


def read_tensors(
    path: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    names: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, or those of `names`, one at a time, floating point ones straight in `dtype`.

    Read in small parts into memory that is there to stay, and not mapped: mapped pages count as used memory as
    well, and a mapped file that shrinks kills the process. Raises as `read_header`.
    """
    entries, _ = read_header(path)
    buffer = torch.empty(0)  # one for all: many would leave holes in the memory between the tensors
    with path.open("rb") as file:
        for name, entry in entries.items():
            if names is not None and name not in names:
                continue
            wanted = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
            tensor = torch.empty(entry.shape, dtype=wanted, device=device)
            direct = wanted == entry.dtype and tensor.device.type == "cpu"
            file.seek(entry.begin)
            if not direct and (buffer.dtype != entry.dtype or len(buffer) < min(tensor.numel(), PART)):
                buffer = torch.empty(min(tensor.numel(), PART), dtype=entry.dtype)
            for part in tensor.view(-1).split(PART):
                stored = part if direct else buffer[: len(part)]
                content = stored.view(torch.uint8).numpy().data
                if file.readinto(content) < len(content):
                    raise UserError(f"{path}: truncated while it was read")
                if not direct:
                    part.copy_(stored)
            yield name, tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Raises OSError, leaving what was there before."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest dtype first, as the format's own library does, so that every tensor is aligned to its dtype.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    flats = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data for _, tensor in ordered)
    write_atomically(path, struct.pack("<Q", len(text)), text, *flats)
