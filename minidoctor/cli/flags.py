"""TODO"""

import argparse
import dataclasses
from typing import Any, get_type_hints


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag a field. A flag that was not given is left out of the result, so that a caller can tell."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = "--" + field.name.replace("_", "-"), types[field.name]
        shown = ",".join(field.default) if isinstance(field.default, tuple) else repr(field.default)
        text = field.metadata["help"] + ("" if kind is bool else f" (default {shown})")
        if kind is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        parse = kind if kind in (int, float, str) else lambda value: tuple(value.split(","))
        parser.add_argument(name, type=parse, default=argparse.SUPPRESS, help=text, metavar=field.name.upper())


def from_flags(config: type, given: dict[str, Any]) -> Any:
    """The dataclass with the given flags that belong to it, and its defaults otherwise."""
    return config(**{f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given})
