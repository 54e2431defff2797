"""Tiny checkpoints of every family, in the layout in which the large ones are published."""

import json

import torch
from torch import nn

from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.files.safetensors import read_tensors, write_tensors

ABSENT = object()
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "baichuan": "BaiChuanForCausalLM",
    "baichuan2": "BaichuanForCausalLM",
    "baichuan-13b": "BaichuanForCausalLM",
    "baichuan2-13b": "BaichuanForCausalLM",
}
TINY = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "head_dim": 2}


def config_json(kind="llama", **changes):
    """Return the content of a small config.json. A key changed to ABSENT is left out."""
    settings = {"model_type": kind.split("2")[0].split("-")[0] if "baichuan" in kind else kind}
    settings["architectures"] = [ARCHITECTURES[kind]]
    settings |= {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    settings |= {"sliding_window": None, "tie_word_embeddings": False}
    if "13b" in kind:
        settings["model_max_length"] = settings.pop("max_position_embeddings")
    if kind == "baichuan2-13b":
        settings["z_loss_weight"] = 0
    settings |= changes
    return {key: value for key, value in settings.items() if value is not ABSENT}


def tensor_shapes(settings):
    """Return the names and shapes of the tensors in a checkpoint with this config.json."""
    dim, ffn, vocab = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    heads = settings["num_attention_heads"]
    head_dim = settings.get("head_dim", dim // heads)
    q, kv = heads * head_dim, settings.get("num_key_value_heads", heads) * head_dim
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, dim)
    for layer in range(settings["num_hidden_layers"]):
        names = {"input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,)}
        names |= {"mlp.gate_proj.weight": (ffn, dim), "mlp.up_proj.weight": (ffn, dim)}
        names |= {"mlp.down_proj.weight": (dim, ffn), "self_attn.o_proj.weight": (dim, q)}
        if settings["model_type"] == "baichuan":
            names["self_attn.W_pack.weight"] = (q + 2 * kv, dim)
        else:
            for projection, rows in (("q", q), ("k", kv), ("v", kv)):
                names[f"self_attn.{projection}_proj.weight"] = (rows, dim)
                if settings["model_type"] == "qwen2":
                    names[f"self_attn.{projection}_proj.bias"] = (rows,)
        if settings["model_type"] == "qwen3":
            names |= {f"self_attn.{projection}_norm.weight": (head_dim,) for projection in ("q", "k")}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in names.items()}
    return shapes


def write_checkpoint(directory, kind, dtype=torch.float32, **changes):
    """Write a random checkpoint of a few hundred weights and return its tensors."""
    directory.mkdir(exist_ok=True)
    settings = config_json(kind, **(TINY | changes))
    (directory / "config.json").write_text(json.dumps(settings))
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in tensor_shapes(settings).items()}
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return tensors


def write_shards(directory, n=3, single="model.safetensors"):
    """Replace model.safetensors by n shards and an index, or by those of pytorch_model.bin. Return the weight map."""
    tensors = dict(read_tensors(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    stem, suffix = single.split(".")
    weight_map = {name: f"{stem}-{i % n}.{suffix}" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        shard = {name: tensors[name] for name in tensors if weight_map[name] == file}
        (torch.save(shard, directory / file) if suffix == "bin" else write_tensors(directory / file, shard))
    (directory / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def write_bin(directory, single="model.safetensors", pickled="pytorch_model.bin"):
    """Replace a safetensors file by the same tensors from torch.save. Return them."""
    tensors = dict(read_tensors(directory / single))
    (directory / single).unlink()
    torch.save(tensors, directory / pickled)
    return tensors


def change_tensors(path, **changes):
    """Change tensors of a safetensors file. ABSENT removes one; "__" in a keyword means a dot."""
    tensors = dict(read_tensors(path)) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not ABSENT})


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def randomize(model):
    """Draw weights so large that each of them, the adapter's included, shows in the logits."""
    for name, tensor in model.state_dict().items():
        nn.init.normal_(tensor, 1.0 if "norm" in name else 0.0, 0.1 if ".lora_" in name else 0.15)
    return model.eval()


def assert_loads(directory, expected):
    """Assert that the loaded state equals the expected tensors bit for bit."""
    state = load_model(directory).state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
