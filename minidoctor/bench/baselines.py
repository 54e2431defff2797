"""Baselines of other packages on the same frozen weights and adapted layers.

    transformers + peft    plain LoRA
    mixlora                a loop over experts: https://arxiv.org/abs/2404.15159

The packages are optional and imported where used.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from minidoctor.batching import IGNORE, Batch
from minidoctor.checkpoints.families import config_settings
from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.model import Model, is_adapter_name


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


def peft_lora(model: Model, adapter: AdapterConfig) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return peft's plain LoRA on the frozen model, and its trainable parameters."""
    from peft import LoraConfig, get_peft_model

    targets = list(adapter.targets)
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, task_type="CAUSAL_LM")
    baseline = get_peft_model(transformers_model(model), config)
    return baseline, [p for p in baseline.parameters() if p.requires_grad]


def mixlora(model: Model, adapter: AdapterConfig) -> tuple[nn.Module, list[nn.Parameter]]:
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
