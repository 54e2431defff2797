"""Make tests/fixtures: tiny checkpoints of every family, and the logits and tokens that `transformers` computes.

    pip install transformers sentencepiece protobuf
    python tests/make_fixtures.py            write them again
    python tests/make_fixtures.py --check    make them in a temporary directory and compare with the stored ones

The tests read the stored results and do not need these packages. Baichuan is not in `transformers`. By its published
definition it is a Llama whose q, k and v are the rows of one matrix, in this order; the second version divides each
row of the output layer by its length. The expected values are therefore those of a Llama with the same weights. Those
of Baichuan-13B, which has ALiBi, come from plain_baichuan.py.
"""

import argparse
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from plain_baichuan import plain_greedy, plain_logits
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tensor_shapes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "fixtures"
LENGTHS = (48, 23, 7)  # tokens of the prompts: two beyond the window, one beyond the original context, one below both
NEW_TOKENS = 64
ROTARY_KEYS = ("max_position_embeddings", "rope_theta", "num_key_value_heads")
Function = Callable[[torch.Tensor], torch.Tensor]

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,  # small, so that the scaling shows in few positions
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # 4 of 8 dimensions turn too slowly, 2 are in between
}


ALIBI = {"hidden_size": 36, "num_attention_heads": 6, "model_max_length": 128}  # 6 heads: not a power of two


def family(name: str, architecture: str, **changes: object) -> dict[str, object]:
    return {"architectures": [architecture], "model_type": name, **SHAPE, **changes}


MODELS = {
    "llama": (family("llama", "LlamaForCausalLM", num_key_value_heads=4), torch.float32),
    "llama-linear": (
        family(
            "llama", "LlamaForCausalLM", tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 2.0}
        ),
        torch.float16,
    ),
    "llama3": (
        family("llama", "LlamaForCausalLM", tie_word_embeddings=True, rope_scaling=LLAMA3, head_dim=8),
        torch.bfloat16,
    ),
    "mistral": (family("mistral", "MistralForCausalLM", sliding_window=8), torch.bfloat16),
    "qwen2": (
        family(
            "qwen2", "Qwen2ForCausalLM", use_sliding_window=False, sliding_window=16, max_window_layers=2
        ),
        torch.float16,
    ),
    "qwen3": (
        family(
            "qwen3", "Qwen3ForCausalLM", head_dim=16, attention_bias=False, tie_word_embeddings=True,
            sliding_window=None, use_sliding_window=False, max_window_layers=2,
        ),
        torch.bfloat16,
    ),
    "baichuan": (family("baichuan", "BaiChuanForCausalLM"), torch.float32),
    "baichuan2": (family("baichuan", "BaichuanForCausalLM"), torch.bfloat16),
    "baichuan-13b": (family("baichuan", "BaichuanForCausalLM", **ALIBI), torch.float32),
    "baichuan2-13b": (family("baichuan", "BaichuanForCausalLM", **ALIBI, z_loss_weight=0), torch.bfloat16),
}  # fmt: skip
# Checkpoints that are stored as files of torch.save: the directory whose content they have, and the number of files.
PICKLED = {
    "llama-bin": ("llama", 1),
    "llama-bin-shards": ("llama", 2),
    "baichuan2-bin": ("baichuan2", 1),
    "baichuan2-bin-shards": ("baichuan2", 2),
    "baichuan-13b": ("baichuan-13b", 1),
    "baichuan2-13b": ("baichuan2-13b", 2),
}


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Draw weights that depend on the names only, so large that a wrong order of operations shows in the logits."""
    tensors = {}
    for name, shape in sorted(shapes.items()):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        weights = torch.randn(shape, generator=generator) * 0.2
        tensors[name] = (weights + 1 if "norm" in name else weights).to(dtype)
    return tensors


def write_model(directory: Path, settings: dict, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def as_llama(settings: dict) -> dict:
    return settings | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def make_model(directory: Path, name: str) -> None:
    settings, dtype = MODELS[name]
    if "model_max_length" in settings:
        return make_alibi_model(directory, settings, dtype)
    is_baichuan = name.startswith("baichuan")
    if is_baichuan:
        settings = settings | {"num_key_value_heads": settings["num_attention_heads"]}
    tensors = draw(tensor_shapes(as_llama(settings) if is_baichuan else settings), dtype)
    with tempfile.TemporaryDirectory() as temporary:
        reference = directory
        if is_baichuan:
            reference = Path(temporary) / "llama"
            write_llama_of_baichuan(reference, name, settings, tensors)
            for layer in range(settings["num_hidden_layers"]):
                block = f"model.layers.{layer}.self_attn."
                packed = [tensors.pop(f"{block}{projection}_proj.weight") for projection in "qkv"]
                tensors[block + "W_pack.weight"] = torch.cat(packed)
            settings = {key: value for key, value in settings.items() if key != "num_key_value_heads"}
        write_model(directory, settings, tensors)
        # In float32 for every stored dtype, with attention computed step by step.
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, attn_implementation="eager")
    greedy = partial(
        model.eval().generate, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = expected_outputs(
        settings["vocab_size"], lambda tokens: model(tokens[None]).logits[0],
        lambda tokens: greedy(tokens[None], attention_mask=torch.ones_like(tokens[None]))[0, len(tokens) :],
    )  # fmt: skip
    save_file(expected, directory / "expected.safetensors")
    if name == "llama3":  # in two shards, as large checkpoints are
        write_shards(directory, tensors)
    if name == "llama-linear":  # as old tied checkpoints are: with the output layer and the rotary frequencies
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_llama_of_baichuan(directory: Path, name: str, settings: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write the Llama that computes the same, in float32."""
    twin = {key: tensor.float() for key, tensor in tensors.items()}
    if name == "baichuan2":
        head = twin["lm_head.weight"]
        twin["lm_head.weight"] = head / head.square().sum(1, keepdim=True).sqrt()
    write_model(directory, as_llama(settings), twin)


def make_alibi_model(directory: Path, settings: dict, dtype: torch.dtype) -> None:
    settings = {key: settings[key] for key in settings if key not in ROTARY_KEYS}
    tensors = draw(tensor_shapes(settings), dtype)
    write_model(directory, settings, tensors)
    greedy = partial(plain_greedy, tensors, settings, n=NEW_TOKENS)
    expected = expected_outputs(settings["vocab_size"], partial(plain_logits, tensors, settings), greedy)
    save_file(expected, directory / "expected.safetensors")


def expected_outputs(vocab_size: int, logits: Function, greedy: Function) -> dict[str, torch.Tensor]:
    """Return random prompts with their logits and greedy continuations."""
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for length in LENGTHS:
        tokens = torch.randint(0, vocab_size, (1, length), generator=generator)[0]
        with torch.no_grad():
            expected |= {f"tokens.{length}": tokens, f"logits.{length}": logits(tokens)}
            expected[f"greedy.{length}"] = greedy(tokens).clone()
    return expected


def write_pickled(source: Path, directory: Path, n_files: int) -> None:
    """Write a copy of a checkpoint with pytorch_model.bin, or shards and their index, instead of model.safetensors."""
    tensors = load_file(source / "model.safetensors")
    if source != directory:
        shutil.copytree(source, directory)
    (directory / "model.safetensors").unlink()
    if n_files == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{i % n_files + 1:05}-of-{n_files:05}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace model.safetensors by two shards and their index."""
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, shard in shards.items():
        save_file({key: tensors[key] for key in shard}, directory / file, metadata={"format": "pt"})
    weight_map = {key: file for file, shard in shards.items() for key in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}, indent=1) + "\n")
    (directory / "model.safetensors").unlink()


SENTENCES = (
    "The key test for gout is uric acid in the joint fluid. Gout is treated in rheumatology.",
    "The typical symptoms of asthma are wheezing and a cough at night.",
    "痛风的关键检查是关节液中的尿酸。哮喘的典型症状是喘息和夜间咳嗽。",
)
TEXTS = (
    "What is the key test for gout?",
    "痛风的关键检查是什么？  two  spaces, a\ttab\nand 12345 mg",
    "\n\nnew lines, an emoji 🩺 and a byte \x07",
    "it's 40°C; isn't it?",
)
CHAT = [
    {"role": "user", "content": "What is gout?"},
    {"role": "assistant", "content": "A disease of the joints.\n痛风。"},
    {"role": "user", "content": "Is it treated?\n"},
]
SYSTEM = {"role": "system", "content": "Answer briefly."}
# The chat formats, written again for the template engine of `transformers`.
TURNS = "{{% for m in messages %}}{}{{% endfor %}}{{% if add_generation_prompt %}}{}{{% endif %}}"
TEMPLATES = {
    "chatml": TURNS.format(
        "{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}", "{{'<|im_start|>assistant\n'}}"
    ),
    "llama3": "{{bos_token}}"
    + TURNS.format(
        "{{'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content.strip() + '<|eot_id|>'}}",
        "{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}",
    ),
    "zephyr": TURNS.format("{{'<|' + m.role + '|>\n' + m.content + eos_token + '\n'}}", "{{'<|assistant|>\n'}}"),
    "mistral-v1": "{{bos_token}}"
    + TURNS.format(
        "{% if m.role == 'user' %}{{'[INST] ' + m.content + ' [/INST]'}}{% else %}{{m.content + eos_token}}{% endif %}",
        "",
    ),
}


def make_sentencepiece(directory: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, model_type="bpe", vocab_size=400,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_bpe(directory: Path) -> None:
    special = ["<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_tokenizer(directory: Path) -> None:
    directory.mkdir(parents=True)
    name = directory.name
    {"sentencepiece": make_sentencepiece, "bpe": make_bpe}[name](directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chats = []
    formats = {"sentencepiece": ("zephyr", "mistral-v1"), "bpe": ("chatml", "llama3")}
    for form in formats[name]:
        for system in ([SYSTEM], []) if form != "mistral-v1" else ([],):
            for messages in (system + CHAT[:1], system + CHAT[:2], system + CHAT):
                ids = tokenizer.apply_chat_template(
                    messages, chat_template=TEMPLATES[form], return_dict=False,
                    add_generation_prompt=messages[-1]["role"] == "user",
                )  # fmt: skip
                chats.append({"format": form, "messages": messages, "ids": ids})
    texts = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in TEXTS]
    content = json.dumps({"texts": texts, "chats": chats}, ensure_ascii=False)
    (directory / "expected.json").write_text(
        content.replace('{"text', '\n{"text').replace('{"format', '\n{"format') + "\n"
    )


def make(out: Path) -> None:
    for name in MODELS:
        shutil.rmtree(out / "models" / name, ignore_errors=True)
        make_model(out / "models" / name, name)
    for name, (source, n_files) in PICKLED.items():
        if name != source:
            shutil.rmtree(out / "models" / name, ignore_errors=True)
        write_pickled(out / "models" / source, out / "models" / name, n_files)
    for name in ("sentencepiece", "bpe"):
        shutil.rmtree(out / "tokenizers" / name, ignore_errors=True)
        make_tokenizer(out / "tokenizers" / name)


def check() -> None:
    """Raise AssertionError if the fixtures made now differ from the stored ones."""
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
        for path in sorted(OUT.rglob("*.*")):
            made = Path(temporary) / path.relative_to(OUT)
            if path.suffix == ".safetensors":
                torch.testing.assert_close(load_file(made), load_file(path), msg=str(path))
            elif path.suffix == ".bin":  # the archive also has random identifiers
                contents = (torch.load(file, weights_only=True) for file in (made, path))
                torch.testing.assert_close(*contents, msg=str(path))
            else:
                assert made.read_bytes() == path.read_bytes(), path
    print("equal to the stored fixtures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored fixtures and write nothing")
    check() if parser.parse_args().check else make(OUT)
