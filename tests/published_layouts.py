"""Tiny random checkpoints in exactly the layout in which the HuatuoGPT series is published.

Keys of config.json, formats and names of the weights, tokenizer files and their settings are those of the published
directories; only sizes and vocabularies are small.
"""

import json
import shutil
from typing import Any, NamedTuple

from paths import FIXTURES
from tiny_checkpoints import ABSENT, change_json, write_checkpoint, write_shards

BAICHUAN_TOKENIZER = {
    "add_bos_token": False, "add_eos_token": False, "tokenizer_class": "BaichuanTokenizer", "use_fast": False,
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}, "model_max_length": 4096,
    **{key: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False}
       for key, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))},
}  # fmt: skip
QWEN_TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA_TEMPLATE = """{{- bos_token }}{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}{{- "<|eot_id|>" }}
{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'}}{%- endfor %}"""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
SHARED = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "vocab_size": 440,
    "sliding_window": ABSENT,
}


class Layout(NamedTuple):
    kind: str  # in tiny_checkpoints.py
    weights: str  # the name of the single file, of which there are shards
    n_shards: int
    changes: dict[str, Any]  # of config.json
    flags: dict[str, Any]  # arguments of `load`, and flags of the programs


BAICHUAN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16", "head_dim": ABSENT}
BAICHUAN |= {"rms_norm_eps": 1e-6, "num_key_value_heads": ABSENT, "_from_model_config": True}
LAYOUTS = {
    "HuatuoGPT-7B": Layout(
        "baichuan", "pytorch_model.bin", 2,
        BAICHUAN | {"max_position_embeddings": 4096, "model_max_length": ABSENT}, {"chat_format": "huatuo-v1"},
    ),
    "HuatuoGPT2-7B": Layout(
        "baichuan2", "pytorch_model.bin", 2,
        BAICHUAN | {"max_position_embeddings": 4096, "model_max_length": 4096, "z_loss_weight": 0},
        {"chat_format": "huatuo"},
    ),
    "HuatuoGPT2-13B": Layout(
        "baichuan2-13b", "pytorch_model.bin", 3,
        BAICHUAN | {"model_max_length": 4096, "hidden_size": 80, "num_attention_heads": 40},
        {"chat_format": "huatuo"},
    ),
    "HuatuoGPT-o1-7B": Layout(
        "qwen2", "model.safetensors", 4,
        {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "head_dim": ABSENT,
         "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28, "attention_dropout": 0.0},
        {"thinking": True},
    ),
    "HuatuoGPT-o1-8B": Layout(
        "llama", "model.safetensors", 4,
        {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA3,
         "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "head_dim": ABSENT},
        {"thinking": True},
    ),
}  # fmt: skip


def write_layout(directory, name, sentencepiece_model):
    """Write a checkpoint of this name. `sentencepiece_model` is the content of a tokenizer.model."""
    layout = LAYOUTS[name]
    write_checkpoint(directory, layout.kind, num_hidden_layers=2, **(SHARED | layout.changes))
    write_shards(directory, layout.n_shards, layout.weights)
    if layout.kind.startswith("baichuan"):
        settings = BAICHUAN_TOKENIZER
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "user_token_id": 195, "assistant_token_id": 196}
        (directory / "generation_config.json").write_text(json.dumps(ids | {"max_new_tokens": 2048}))
    else:
        shutil.copytree(FIXTURES / "tokenizers" / "bpe", directory, dirs_exist_ok=True)
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        qwen = layout.kind == "qwen2"
        settings |= {"chat_template": QWEN_TEMPLATE, "bos_token": None} if qwen else {"chat_template": LLAMA_TEMPLATE}
        settings |= {"eos_token": "<|im_end|>" if qwen else "<|eot_id|>", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    change_json(directory / "config.json", transformers_version="4.46.0")
    return directory
