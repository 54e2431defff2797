"""TODO"""

import json
import os
from pathlib import Path
from typing import Any, get_type_hints

from minidoctor.config import UserError, check


def read_bytes(path: Path) -> bytes:
    """Raises FileNotFoundError, or ValueError for what Git leaves where it has not fetched a large file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    check_fetched(path, content)
    return content


def check_fetched(path: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: only a Git LFS pointer, the file itself was not fetched: git lfs pull")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError or ValueError."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Under a temporary name first: whoever reads `path` finds the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error.strerror}); what was there before is unchanged") from None


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise UserError("a name stands twice")
    return dict(pairs)


def from_json(config: type, content: Any) -> Any:
    """The dataclass with the fields of a JSON object, each of its type. Raises ValueError."""
    check(isinstance(content, dict), f"expected an object, got {type(content).__name__}")
    types, fields = get_type_hints(config), {}
    for name, value in content.items():
        check(name in types, f"unknown setting {name!r:.40}")
        if isinstance(value, list):
            value = tuple(value) if all(isinstance(item, str) for item in value) else None
        kind = {float: (int, float)}.get(types[name], getattr(types[name], "__origin__", types[name]))
        right = isinstance(value, kind) and (type(value) is not bool or kind is bool)
        check(right, f"{name} is {value!r:.40}, expected {getattr(types[name], '__name__', 'another type')}")
        fields[name] = value
    missing = sorted(set(types) - set(fields))
    check(not missing, f"no {', '.join(missing)}")
    return config(**fields)
