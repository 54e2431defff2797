"""Tests of text and JSON files: line ends, repeated keys, names that are not UTF-8, pipes and symlinks."""

import codecs
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from minidoctor.config import UserError
from minidoctor.files.json_files import (
    format_json,
    from_json,
    parse_json,
    read_bytes,
    read_json,
    read_lines,
    read_object,
    read_text,
    split_lines,
    write_atomically,
    write_json,
)

# All other characters at which str.splitlines ends a line.
NOT_LINE_ENDS = [c for c in map(chr, range(0x110000)) if len(f"a{c}b".splitlines()) > 1 and c not in "\r\n"]


def file(tmp_path, content, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_three_line_ends_split_lines(tmp_path, end):
    text = end.join(["痛风", "", "gout", ""])
    assert split_lines(text) == ["痛风", "", "gout"]
    assert read_lines(file(tmp_path, codecs.BOM_UTF8 + text.encode())) == ["痛风", "", "gout"]
    assert split_lines(text + "last") == ["痛风", "", "gout", "last"]


def test_all_other_separators_stay_in_their_line(tmp_path):
    assert {"\x85", "\u2028", "\x0c", "\x1c"} <= set(NOT_LINE_ENDS)
    lines = [f"a{char}b" for char in NOT_LINE_ENDS]
    assert read_lines(file(tmp_path, "\n".join(lines) + "\n")) == lines


def test_mixed_and_missing_line_ends():
    assert split_lines("a\r\n\rb\n\nc") == ["a", "", "b", "", "c"]
    assert split_lines("") == []
    assert split_lines("\n") == [""]


@pytest.mark.parametrize("text", ["gout\nasthma\n", "痛风\n哮喘\n"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "gbk"])
def test_other_encodings_are_rejected_with_the_file(tmp_path, text, encoding):
    path = file(tmp_path, text.encode(encoding))
    if (encoding, text.isascii()) == ("gbk", True):
        assert read_text(path) == text
        return
    with pytest.raises(UserError, match=r"a\.txt:.* save the file as UTF-8"):
        read_text(path)


def test_invalid_utf8_is_rejected_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt:3: "):
        read_text(file(tmp_path, "痛风\n\ncafé".encode()[:-1]))


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[" * 100_000, "9" * 5000, b"\xff\xfe", b'"\0"'])
def test_invalid_json_is_rejected_with_the_file(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(file(tmp_path, text, "a.json"))


@pytest.mark.parametrize(
    "text", ['{"answer": "A", "answer": "B"}', '[{"options": {"A": 1, "answer": 2, "answer": 2}}]']
)
def test_repeated_keys_are_rejected_by_name(tmp_path, text):
    assert json.loads(text)  # Python keeps the last value
    with pytest.raises(UserError, match="'answer'"):
        parse_json(text)
    with pytest.raises(UserError, match=r"a\.json: .*'answer'"):
        read_json(file(tmp_path, text, "a.json"))


def test_equal_keys_of_different_objects_are_allowed():
    assert parse_json('[{"a": {"a": 1}}, {"a": 2}]') == [{"a": {"a": 1}}, {"a": 2}]


def test_repeated_key_of_a_large_object_is_found_quickly():
    text = "{" + ",".join(f'"{i}":{i}' for i in range(200_000)) + ',"7":0}'
    with pytest.raises(UserError, match="'7'"):  # a quadratic search would take minutes
        parse_json(text)


def test_objects_are_read_back_and_required_where_asked_for(tmp_path):
    path, content = tmp_path / "a.json", {"name": "痛风", "n": [1, 2.5, None, True]}
    write_json(path, content)
    assert read_object(path) == content
    assert "痛风" in path.read_text(encoding="utf-8")
    write_json(path, [content])
    assert read_json(path) == [content]
    with pytest.raises(UserError, match=r"a\.json: .*list"):
        read_object(path)


def test_json_keeps_every_byte_of_a_file_name(tmp_path):
    names = [os.fsdecode(b"caf" + bytes([byte]) + b"\\.jsonl") for byte in range(1, 256)]
    write_json(tmp_path / "a.json", {name: [name, "痛风"] for name in names})
    assert read_json(tmp_path / "a.json") == {name: [name, "痛风"] for name in names}


@pytest.mark.parametrize("text", ["\ud83d", "\ude00 \ud83d", "\\\udce9", '"\udce9\\"', "\x00\x85\u2028\x1c"])
def test_json_keeps_lone_surrogates_and_separators(text):
    assert parse_json(format_json({text: text})) == {text: text}
    assert format_json([text]).encode()
    assert len(split_lines(format_json([text]))) == 1


def test_missing_files_directories_and_dangling_symlinks_are_distinguished(tmp_path):
    (tmp_path / "link").symlink_to("blobs/0123.incomplete")
    for name, kind, message in (
        ("none", FileNotFoundError, "no such file"),
        ("", UserError, "directory"),
        ("link", FileNotFoundError, r"0123\.incomplete"),
        ("x" * 300, FileNotFoundError, "no such file"),
    ):
        for read in (read_bytes, read_json, read_lines):
            with pytest.raises(kind, match=message):
                read(tmp_path / name)


def fed_pipe(tmp_path, content):
    """Create a named pipe and a thread that writes the content into it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[content], daemon=True).start()
    return path


def test_pipes_are_read_once_where_that_is_allowed(tmp_path):
    path = fed_pipe(tmp_path, "痛风\ngout\n".encode())
    for read in (read_bytes, read_text, read_lines, read_json):
        with pytest.raises(UserError, match="pipe: not a regular file"):
            read(path)
    assert read_lines(path, pipe=True) == ["痛风", "gout"]


def test_standard_input_is_read():
    code = "from pathlib import Path; from minidoctor.files.json_files import read_lines as read; "
    code += "print(read(Path('/dev/stdin'), pipe=True))"
    run = subprocess.run([sys.executable, "-c", code], input="a\nb\n", capture_output=True, text=True)
    assert run.stdout == "['a', 'b']\n", run.stderr


def test_write_follows_a_symlink(tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = file(tmp_path / "disk", "old", "real.json"), tmp_path / "out.json"
    link.symlink_to(Path("disk") / "real.json")
    for content in (1, 2):
        write_json(link, content)
        assert link.is_symlink()
        assert read_json(target) == read_json(link) == content
    target.unlink()
    write_json(link, 3)  # the target of a dangling symlink is created
    assert (link.is_symlink(), read_json(target)) == (True, 3)
    assert sorted(os.listdir(tmp_path)) == ["disk", "out.json"]
    assert os.listdir(tmp_path / "disk") == ["real.json"]


def test_write_goes_directly_into_a_pipe_or_device(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()), daemon=True)
    reader.start()
    write_atomically(path, b"one ", b"two")
    reader.join(10)
    assert received == [b"one two"]
    assert os.listdir(tmp_path) == ["pipe"]


def test_failed_write_is_reported_with_the_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere" / "a", tmp_path / "file" / "a", tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(OSError, match=f"^{path}: "):
            write_atomically(path, b"text")
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError, match=r"\(No such file or directory\)$"):
        write_atomically(tmp_path / "nowhere" / "a", b"text")


@dataclass(frozen=True)
class Settings:
    size: int
    scale: float
    name: str
    on: bool
    names: tuple[str, ...]


SETTINGS = {"size": 1, "scale": 2, "name": "a", "on": True, "names": ["b", "c"]}


def test_from_json_returns_the_dataclass():
    assert from_json(Settings, SETTINGS) == Settings(1, 2.0, "a", True, ("b", "c"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 1.5}, "size"),
        ({"size": True}, "size"),
        ({"scale": "2"}, "scale"),
        ({"scale": False}, "scale"),
        ({"name": None}, "name"),
        ({"on": 1}, "on"),
        ({"names": "b"}, "names"),
        ({"names": [1]}, "names"),
        ({"other": 1}, "other"),
    ],
)
def test_from_json_rejects_other_types_and_unknown_keys_by_name(change, message):
    with pytest.raises(UserError, match=message):
        from_json(Settings, SETTINGS | change)


def test_from_json_lists_missing_keys():
    with pytest.raises(UserError, match="name, on"):
        from_json(Settings, {"size": 1, "scale": 2.0, "names": []})
    with pytest.raises(UserError, match="list"):
        from_json(Settings, [])


@dataclass
class Group:
    settings: Settings
    by_name: dict[str, Settings]
    interval: tuple[float, float] | None
    note: str = ""


GROUP = {"settings": SETTINGS, "by_name": {"a": SETTINGS}, "interval": [0, 0.5]}


def test_from_json_returns_nested_dataclasses():
    settings = from_json(Settings, SETTINGS)
    assert from_json(Group, GROUP | {"note": "x"}) == Group(settings, {"a": settings}, (0, 0.5), "x")
    assert from_json(Group, GROUP | {"note": "x", "interval": None, "by_name": {}}) == Group(settings, {}, None, "x")
    assert from_json(Group, GROUP | {"note": "x", "settings": settings}).settings is settings


def test_from_json_leaves_fields_to_their_defaults_unless_strict():
    with pytest.raises(UserError, match="no note"):
        from_json(Group, GROUP)
    assert from_json(Group, GROUP, strict=False).note == ""
    with pytest.raises(TypeError, match="interval"):
        from_json(Group, {key: GROUP[key] for key in ("settings", "by_name")}, strict=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": []}, "settings: expected an object"),
        ({"by_name": [SETTINGS]}, "by_name"),
        ({"by_name": {"a": SETTINGS | {"size": "1"}}}, "size"),
        ({"interval": ["0", 1]}, "interval"),
        ({"interval": 0.5}, "interval"),
        ({"note": None}, "note"),
    ],
)
def test_from_json_rejects_other_types_in_nested_records(change, message):
    with pytest.raises(UserError, match=message):
        from_json(Group, GROUP | {"note": ""} | change)
