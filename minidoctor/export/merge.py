"""Plain LoRA merged into its base: W + (alpha / R) B A, written as a checkpoint without an adapter."""

import shutil
from pathlib import Path

import torch

from minidoctor.checkpoints.hugging_face import read_stored, save_model
from minidoctor.config import check
from minidoctor.files.json_files import read_object, write_json
from minidoctor.lora import LoRAExperts
from minidoctor.model import Model

# The other files of a checkpoint, which merging does not change.
COPIED = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
COPIED += ["vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"]


@torch.no_grad()
def merge(model: Model) -> None:
    """Add each update to its frozen weight, in float32 for every dtype of the weight, and set the update to zero."""
    for layer in model.modules():
        if isinstance(layer, LoRAExperts):
            update = layer.scale * layer.lora_b @ layer.lora_a  # (D_out, D_in)
            layer.weight.copy_(layer.weight.float() + update)
            layer.lora_b.zero_()


def stored_dtype(base: Path) -> torch.dtype:
    """Return the dtype of most of the weights, by their size in bytes."""
    sizes: dict[torch.dtype, int] = {}
    for _, entry in read_stored(base).values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.begin
    check(bool(sizes), f"{base}: its files contain no tensor")
    return max(sizes, key=sizes.__getitem__)


def write_merged(base: Path, model: Model, out: Path, dtype: torch.dtype) -> None:
    """Merge the adapter and write the checkpoint with the tokenizer and the token ids of the base."""
    merge(model)
    token_ids = {k: value for k, value in read_object(base / "config.json").items() if k.endswith("_token_id")}
    save_model(model, out, dtype, **token_ids)
    for name in COPIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    settings = read_object(out / "tokenizer_config.json") if (out / "tokenizer_config.json").is_file() else {}
    if "auto_map" in settings:  # names a Python file that is not copied, and that a SentencePiece model does not need
        write_json(out / "tokenizer_config.json", settings | {"tokenizer_class": "LlamaTokenizer", "auto_map": None})
