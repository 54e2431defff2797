"""Export a plain-LoRA adapter (`train.py --n-experts 1`) for other programs.

    python -m minidoctor.export --base DIR --adapter out --peft DIR      in the layout of the package `peft`
    python -m minidoctor.export --base DIR --adapter out --merge DIR     a full checkpoint, W + (alpha / R) B A

An adapter with more experts is rejected: the gates depend on the token, so no fixed matrix equals them.
"""

import argparse
from pathlib import Path

import torch

from minidoctor.checkpoints.adapters import (
    load_adapted_model,
    read_adapter_config,
    read_chat_format,
    read_quantization,
)
from minidoctor.checkpoints.families import read_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.checkpoints.peft import check_plain_lora, is_peft, write_peft
from minidoctor.cli.device import choose_dtype
from minidoctor.cli.flags import add_model_flags
from minidoctor.cli.main import run
from minidoctor.config import check
from minidoctor.export.merge import stored_dtype, write_merged
from minidoctor.files.hub_cache import follow_snapshot
from minidoctor.model import adapter_state


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser, "base")
    parser.add_argument("--adapter", required=True, help="adapter directory written by train.py or by peft")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--peft", metavar="DIR", help="output directory of the adapter in the layout of peft")
    output.add_argument("--merge", metavar="DIR", help="output directory of the merged checkpoint")
    help_text = "dtype of the merged weights: auto (that of the base), float32, bfloat16"
    parser.add_argument("--dtype", default="auto", help=help_text)
    flags = parser.parse_args()
    base, adapter, dtype = follow_snapshot(flags.base), follow_snapshot(flags.adapter), flags.dtype
    out = Path(flags.merge if flags.peft is None else flags.peft)
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(free, f"{out}: exists already; choose a new or empty directory")
    check(flags.peft is None or dtype == "auto", "--dtype is for --merge; an exported adapter is float32")
    if not is_peft(adapter):
        check_plain_lora(read_adapter_config(adapter, base))  # before gigabytes are read
    weights_dtype = stored_dtype(base) if dtype == "auto" else choose_dtype(dtype, torch.device("cpu"))
    model, chat_format = load_adapted_model(base, adapter, weights_dtype), read_chat_format(adapter)
    if flags.peft is None:
        write_merged(base, model, out, weights_dtype)
    else:
        assert model.adapter
        metadata = {"base_checkpoint_hash": checkpoint_hash(base), "chat_format": chat_format}
        write_peft(out, str(base.resolve()), model.adapter, adapter_state(model), metadata)
    print(out)
    if flags.peft is not None and read_config(base)[1].packed:
        print("the base stores q, k and v as one matrix, so peft would not find these: with peft, use --merge")
    if (trained_on := read_quantization(adapter)) != "none":
        weights = "exported for" if flags.merge is None else f"merged into {weights_dtype} copies of"
        print(f"trained with --quantize {trained_on}; {weights} the weights of {base}, which are not quantized")
    if chat_format != "auto":
        print(f"trained in chat format {chat_format}; if it is not recognized, use --chat-format {chat_format}")


if __name__ == "__main__":
    run(main)
