"""Command-line flags: one per field of a configuration dataclass, and those of every program that loads a model."""

import argparse
import dataclasses
from typing import Any, get_type_hints

from minidoctor.config import QUANTIZATIONS

# Flags of the programs that load a model, with their defaults and help texts.
MODEL_FLAGS = {
    "base": ("data/base", "checkpoint directory of the base model"),
    "adapter": (None, "adapter directory written by train.py"),
    "chat_format": ("auto", "chat format; auto: the format that the checkpoint was trained in"),
    "thinking": (False, "let a reasoning model reason before it answers"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "dtype of the base model: auto (bfloat16 on a GPU that has it), float32 or bfloat16"),
    "quantize": ("none", f"form of the base model's linear layers: {', '.join(QUANTIZATIONS)}"),
}


def add_model_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags of these names, such as "chat_format", or all of MODEL_FLAGS."""
    for name in names or MODEL_FLAGS:
        default, text = MODEL_FLAGS[name]
        flag = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += f" (default {default or 'none'})"
            parser.add_argument(flag, default=default, help=text, metavar=name.upper())


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add a flag for each field with a help text. A flag that the user does not pass is absent from the namespace."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        name, kind = "--" + field.name.replace("_", "-"), types[field.name]
        default = ",".join(field.default) if isinstance(field.default, tuple) else repr(field.default)
        text = field.metadata["help"] + ("" if kind is bool else f" (default {default})")
        if kind is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        parse = kind if kind in (int, float, str) else lambda value: tuple(value.split(","))
        parser.add_argument(name, type=parse, default=argparse.SUPPRESS, help=text, metavar=field.name.upper())


def from_flags(config: type, flags: dict[str, Any]) -> Any:
    """Return the dataclass with the flags that are its fields, and its defaults for the other fields."""
    return config(**{f.name: flags[f.name] for f in dataclasses.fields(config) if f.name in flags})
