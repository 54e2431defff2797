"""Take a plain-LoRA adapter (`train.py --n-experts 1`) to other programs.

    python -m minidoctor.export --base DIR --adapter out --peft DIR      as the package `peft` reads it
    python -m minidoctor.export --base DIR --adapter out --merge DIR     a full checkpoint, W + (alpha / R) B A

With more than one expert both are refused: the gates depend on the token, so no fixed matrix equals them.
"""

import argparse
import shutil
from pathlib import Path

import torch

from minidoctor.checkpoints.adapters import load_adapted_model, read_adapter_config, trained_format
from minidoctor.checkpoints.hugging_face import checkpoint_files, checkpoint_hash, save_model
from minidoctor.checkpoints.peft import is_peft, refuse_mixture, write_peft
from minidoctor.cli.device import choose_dtype
from minidoctor.cli.main import run
from minidoctor.config import UserError
from minidoctor.files.json_files import read_object, write_json
from minidoctor.files.safetensors import read_header
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model, adapter_state

# What stands beside the weights in a checkpoint and is the same after merging.
COPIED = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


@torch.no_grad()
def merge(model: Model) -> None:
    """Adds each update to its frozen weight, in float32 whatever the weight's dtype, and switches the update off."""
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            update = layer.scale * layer.lora_b @ layer.lora_a  # (D_out, D_in)
            layer.weight.copy_(layer.weight.float() + update)
            layer.lora_b.zero_()


def stored_dtype(base: str) -> torch.dtype:
    """Of most of the weights."""
    sizes: dict[torch.dtype, int] = {}
    for path in checkpoint_files(Path(base)):
        for entry in read_header(path)[0].values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.begin
    if not sizes:
        raise UserError(f"{base}: its files hold no tensor")
    return max(sizes, key=sizes.__getitem__)


def write_merged(base: str, model: Model, out: Path, dtype: torch.dtype) -> None:
    merge(model)
    ids = {key: value for key, value in read_object(Path(base) / "config.json").items() if key.endswith("_token_id")}
    save_model(model, out, dtype, **ids)
    for name in COPIED:
        if (Path(base) / name).is_file():
            shutil.copyfile(Path(base) / name, out / name)
    settings = read_object(out / "tokenizer_config.json") if (out / "tokenizer_config.json").is_file() else {}
    if "auto_map" in settings:  # names a program that is not copied; a SentencePiece model needs none
        settings |= {"tokenizer_class": "LlamaTokenizer", "auto_map": None}
        write_json(out / "tokenizer_config.json", settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="data/base", help="checkpoint directory (default data/base)")
    parser.add_argument("--adapter", required=True, help="directory that train.py wrote, or peft")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--peft", metavar="DIR", help="write the adapter here, in the layout of peft")
    where.add_argument("--merge", metavar="DIR", help="write the merged checkpoint here")
    parser.add_argument("--dtype", default="auto", help="of the merged weights: auto (the base's), float32, bfloat16")
    given = parser.parse_args()
    out, adapter = Path(given.merge if given.peft is None else given.peft), Path(given.adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose a directory that is not there or empty")
    if given.peft is not None and given.dtype != "auto":
        raise UserError("--dtype is for --merge; an adapter stays in float32")
    if not is_peft(adapter):
        refuse_mixture(read_adapter_config(adapter, given.base), "export")
    dtype = stored_dtype(given.base) if given.dtype == "auto" else choose_dtype(given.dtype, torch.device("cpu"))
    model, chat_format = load_adapted_model(given.base, adapter, dtype), trained_format(adapter)
    assert model.adapter
    if given.peft is not None:
        notes = {"base_fingerprint": checkpoint_hash(given.base), "chat_format": chat_format}
        write_peft(out, str(Path(given.base).resolve()), model.adapter, adapter_state(model), notes)
    else:
        write_merged(given.base, model, out, dtype)
    print(out)
    if chat_format != "auto":
        print(f"trained in chat format {chat_format}: if it is not recognized, ask with --chat-format {chat_format}")


if __name__ == "__main__":
    run(main)
