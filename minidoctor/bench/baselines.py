"""Baselines of other packages on the same frozen weights and adapted layers.

    transformers + peft    plain LoRA
    with bitsandbytes      plain LoRA on a base in NF4, QLoRA: https://arxiv.org/abs/2305.14314
    mixlora                a loop over experts: https://arxiv.org/abs/2404.15159
    llama-cpp-python       decoding of gguf files by llama.cpp

The packages are optional and imported where used.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from minidoctor.batching import IGNORE, Batch
from minidoctor.checkpoints.families import config_settings
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig, UserError, check
from minidoctor.model import Model, is_adapter_name

Trainable = tuple[nn.Module, list[nn.Parameter]]


def installed(*packages: str) -> bool:
    return all(find_spec(package) for package in packages)


def transformers_model(model: Model) -> Any:
    """Return the frozen model as one of transformers. The weights are shared, not copied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    baseline = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_settings(model.config)))
    baseline.to(model.lm_head.weight)
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter_name(name)}
    baseline.load_state_dict(state, assign=True)
    return baseline.requires_grad_(False)


def peft_lora(model: Model, adapter: AdapterConfig, nf4: bool = False) -> Trainable:
    """Return peft's plain LoRA on the frozen model, in NF4 or as it is, and its trainable parameters."""
    from peft import LoraConfig, get_peft_model

    targets, baseline = list(adapter.targets), transformers_model(model)
    if nf4:
        quantize_blocks(baseline)
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, task_type="CAUSAL_LM")
    baseline = get_peft_model(baseline, config)
    return baseline, [p for p in baseline.parameters() if p.requires_grad]


def quantize_blocks(baseline: Any) -> None:
    """Replace the linear layers of the blocks by those of bitsandbytes, in NF4 with double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(baseline.model.layers.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                weight, bias = layer.weight, layer.bias
                nf4 = Linear4bit(*weight.shape[::-1], bias is not None, weight.dtype, quant_type="nf4", device="meta")
                nf4.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=nf4)
                nf4.bias = bias
                setattr(module, name, nf4.to(weight.device))  # which quantizes
    baseline.is_loaded_in_4bit = True  # peft then uses its layer for bitsandbytes


def mixlora(model: Model, adapter: AdapterConfig) -> Trainable:
    """Return MixLoRA's experts on the frozen model, and its trainable parameters."""
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    c, baseline = model.config, transformers_model(model)
    settings = {
        "base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA", "r": adapter.rank,
        "lora_alpha": adapter.alpha, "lora_dropout": 0.1, "target_modules": list(adapter.targets), "act_fn": "silu",
        "routing_strategy": "mixlora", "num_experts": adapter.n_experts, "top_k": adapter.top_k,
    }  # fmt: skip
    config = MixLoraConfig.from_config(settings)
    config.dtype_ = torch.float32
    like: dict[str, Any] = {"dtype": torch.float32, "device": model.lm_head.weight.device}
    weights: dict[str, Tensor] = {}
    for i in range(c.n_layers):
        router = nn.Parameter(0.02 * torch.randn(adapter.n_experts, c.dim, **like))
        weights[f"mixlora.layers.{i}.mlp.moe_gate.weight"] = router
        for target, e in product(adapter.targets, range(adapter.n_experts)):
            d_in, d_out = (c.ffn_dim, c.dim) if target == "down_proj" else (c.dim, c.ffn_dim)
            name = f"mixlora.layers.{i}.mlp.{target}.experts.{e}"
            weights[f"{name}.lora_A.weight"] = 0.02 * torch.randn(adapter.rank, d_in, **like)
            weights[f"{name}.lora_B.weight"] = torch.zeros(d_out, adapter.rank, **like)
    inject_adapter_in_model(baseline, config, weights)
    trainable: list[nn.Parameter] = []
    for layer in baseline.model.layers:
        experts = layer.mlp.mixlora_moes[config.adapter_name_]  # in a plain dict, which parameters() does not visit
        trainable.append(experts.gate_)
        for expert in experts.experts_.values():
            expert.dropout_.p = 0.0  # as in the other implementations; MixLoRA's configuration rejects 0
            trainable += [expert.lora_A.weight, expert.lora_B.weight]
    for p in trainable:
        p.requires_grad_(True)
    return baseline, trainable


def make_step(baseline: nn.Module, trainable: list[nn.Parameter], config: TrainConfig) -> Callable[[Batch], Tensor]:
    """Return a training step as these packages are used: logits at all positions, labels without prompt and padding.

    The step returns the mean loss of the answer tokens.
    """
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, fused=True)
    baseline.train()

    def step(batch: Batch) -> Tensor:
        batch = batch.to(trainable[0].device)
        labels = torch.full_like(batch.targets, IGNORE)
        labels[:, 1:] = batch.targets[:, :-1]  # transformers shifts labels, so the last target of a row is not learned
        loss = baseline(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def make_llama_cpp_decoder(
    file: str, prompt: list[int], n: int, config: ModelConfig, gpu: bool
) -> Callable[[], list[int]]:
    """Return greedy decoding of n tokens by llama.cpp. Raises UserError unless the file has the shape of `config`."""
    import llama_cpp

    check(not gpu or llama_cpp.llama_supports_gpu_offload(), "llama-cpp-python was built without GPU; use --device cpu")
    threads: dict[str, Any] = dict.fromkeys(("n_threads", "n_threads_batch"), torch.get_num_threads())
    try:
        model = llama_cpp.Llama(file, n_ctx=len(prompt) + n, n_gpu_layers=-1 if gpu else 0, verbose=False, **threads)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    sizes = (model.n_vocab(), model.n_embd(), llama_cpp.llama_model_n_layer(model.model))
    expected = (config.vocab_size, config.dim, config.n_layers)
    check(sizes == expected, f"{file}: has vocabulary, width and layers {sizes}, the base {expected}")

    def decode() -> list[int]:
        model.reset()  # otherwise the prompt of the round before would still be in the cache
        return list(islice(model.generate(prompt, temp=0.0), n))

    return decode
