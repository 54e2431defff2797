"""Text and JSON files: decoded strictly, checked for repeated keys, and replaced atomically when written."""

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from minidoctor.config import UserError, check


def read_bytes(path: Path, pipe: bool = False) -> bytes:
    """Read a file. Raises FileNotFoundError, or UserError for a Git LFS pointer and anything but a regular file.

    `pipe` also allows pipes and /dev/stdin. They can be read only once, so callers that open a file twice must not.
    """
    check_regular(path, pipe)
    content = path.read_bytes()
    check_fetched(path, content)
    return content


def check_regular(path: Path, pipe: bool = False) -> None:
    if not os.path.exists(path):  # unlike Path.exists also False for a name that is too long
        link = f", the symlink leads to {os.readlink(path)}" if os.path.islink(path) else ""
        raise FileNotFoundError(f"{path}: no such file{link}")
    check(not path.is_dir(), f"{path}: a directory, expected a file")
    check(pipe or path.is_file(), f"{path}: not a regular file; copy its content into one")


def check_fetched(path: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: only a Git LFS pointer, the content was not fetched; run git lfs pull")


def read_text(path: Path, pipe: bool = False) -> str:
    """Read UTF-8 text, with or without a byte order mark. Raises as `read_bytes`."""
    content = read_bytes(path, pipe)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    check("\0" not in text, f"{path}: contains NUL characters, as UTF-16 text does; save the file as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r only: `str.splitlines` also splits at form feed, U+0085, U+2028 and others."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_lines(path: Path, pipe: bool = False) -> list[str]:
    return split_lines(read_text(path, pipe))


def parse_json(text: str | bytes, where: str = "") -> Any:
    """Parse JSON without repeated keys. Raises UserError, whose message begins with `where`."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, UserError) else f"not JSON ({error})"
        raise UserError(f"{where}{reason}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON decoder's pairs, where Python's own decoder keeps the last of equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"key {key!r:.40} occurs {count} times in one object")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises FileNotFoundError or UserError."""
    return parse_json(read_text(path), f"{path}: ")


def read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    check(isinstance(content, dict), f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def format_json(content: Any, **layout: Any) -> str:
    r"""Format JSON that can be encoded as UTF-8.

    A lone surrogate, with which Python represents a byte of a file name that is not UTF-8, becomes its escape `\udcXX`.
    """
    return json.dumps(content, ensure_ascii=False, **layout).encode("utf-8", "backslashreplace").decode()


def write_json(path: Path, content: Any) -> None:
    """Write JSON that `read_json` reads back equal. Raises OSError."""
    write_atomically(path, (format_json(content, indent=2) + "\n").encode())


def write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    """Write to a temporary file and rename it: readers of `path` find the old content or the complete new one.

    A symlink stays and its target is replaced. Pipes and devices such as /dev/stdout are written directly.
    """
    direct = os.path.exists(path) and not os.path.isfile(path)
    target = path if direct else Path(os.path.realpath(path))
    temporary = target if direct else target.with_name(target.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            if not direct:
                os.fsync(file.fileno())
                temporary.replace(target)
    except OSError as error:
        unchanged = "; its previous content is unchanged" if os.path.isfile(path) else ""
        raise type(error)(f"{path}: cannot be written ({error.strerror}){unchanged}") from None
    finally:
        if not direct:
            with suppress(OSError):
                temporary.unlink()


def from_json(kind: Any, content: Any, strict: bool = True, name: str = "content") -> Any:
    """Return the dataclass `kind`, or a value of another annotated type, from its JSON, checked against the types.

    With `strict`, fields that have a default must be there as well. Raises UserError, or TypeError without `strict`.
    """
    arguments, origin = get_args(kind), get_origin(kind) or kind
    if type(None) in arguments:
        return None if content is None else from_json(arguments[0], content, strict, name)
    if is_dataclass(kind) and not isinstance(content, origin):
        check(isinstance(content, dict), f"{name}: expected an object, got {type(content).__name__}")
        types = get_type_hints(kind)
        for key in content:
            check(key in types, f"unknown setting {key!r:.40}")
        missing = sorted(types.keys() - content.keys()) if strict else []
        check(not missing, f"no {', '.join(missing)}")
        return origin(**{key: from_json(types[key], value, strict, key) for key, value in content.items()})
    expected = {float: (int, float), tuple: (list, tuple)}.get(origin, origin)
    valid = isinstance(content, expected) and (type(content) is not bool or kind is bool)
    check(valid, f"{name} is {content!r:.40}, expected {getattr(kind, '__name__', kind)}")
    if origin is dict:
        return {key: from_json(arguments[1], value, strict, name) for key, value in content.items()}
    if origin is tuple:
        return tuple(from_json(arguments[0], value, strict, name) for value in content)
    return content
