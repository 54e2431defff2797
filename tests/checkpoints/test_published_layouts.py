"""The HuatuoGPT series loads with one call from the files that are published."""

import pytest
import torch
from published_layouts import LAYOUTS, write_layout

from minidoctor.checkpoints.adapters import load
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.config import SampleConfig
from minidoctor.generate import complete

HUATUO_SYSTEM = (
    "一位用户和智能医疗大模型HuatuoGPT之间的对话。对于用户的医疗问诊，HuatuoGPT给出准确的、详细的、温暖的指导建议。"
)
HUATUO_SYSTEM += "对于用户的指令问题，HuatuoGPT给出有益的、详细的、有礼貌的回答。"
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
LLAMA_SYSTEM = "<|begin|><|start_header_id|>system<|end_header_id|>\n\n"
LLAMA_SYSTEM += "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
PROMPTS = {
    "HuatuoGPT-7B": f"{HUATUO_SYSTEM}<病人>：gout? <HuatuoGPT>：",
    "HuatuoGPT2-7B": "<问>：gout?\n<答>：",
    "HuatuoGPT2-13B": "<问>：gout?\n<答>：",
    "HuatuoGPT-o1-7B": f"{QWEN_SYSTEM}<|im_start|>user\ngout?<|im_end|>\n<|im_start|>assistant\n",
    "HuatuoGPT-o1-8B": f"{LLAMA_SYSTEM}<|start_header_id|>user<|end_header_id|>\n\ngout?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.fixture
def write(tmp_path, train_sentencepiece):
    def write(name):
        if "o1" in name:
            pytest.importorskip("tokenizers")
        return write_layout(tmp_path / name, name, train_sentencepiece())

    return write


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout_loads_and_has_the_prompt_of_its_authors(write, name):
    directory, layout = write(name), LAYOUTS[name]
    model, tokenizer = load(directory, **layout.flags)
    prompt = tokenizer.chat([{"role": "user", "content": "gout?"}])
    text, run = "", []
    for i in prompt:  # with the names of special tokens
        run = run if i in tokenizer.names else [*run, i]
        if i in tokenizer.names:
            text, run = text + tokenizer.decode(run) + tokenizer.names[i], []
    assert text + tokenizer.decode(run) == PROMPTS[name]
    answers = complete(model, [prompt], SampleConfig(max_new_tokens=5), tokenizer.eos_ids)
    assert len(answers[0]) <= 5
    assert tokenizer.format.max_new_tokens == (2048 if "o1" in name else 64)
    assert len(checkpoint_hash(directory)) == 64


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout_has_the_switches_of_its_family(write, name):
    model, _ = load(write(name), **LAYOUTS[name].flags)
    config, lengths = model.config, model.lm_head.weight.norm(dim=1)
    assert config.alibi == (name == "HuatuoGPT2-13B")
    assert config.qkv_bias == (name == "HuatuoGPT-o1-7B")
    assert (config.rope_scaling is not None) == (name == "HuatuoGPT-o1-8B")
    assert torch.allclose(lengths, torch.ones(440)) == name.startswith("HuatuoGPT2")
    assert config.max_seq_len == {"qwen2": 32768, "llama": 131072}.get(LAYOUTS[name].kind, 4096)
