"""What people would use instead, on the same weights and modules, so that bench.py can time it beside ours.

    transformers + peft    plain LoRA
    MixLoRA                a loop over experts: https://arxiv.org/abs/2404.15159

Optional packages, imported where used: pip install transformers peft mixlora
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from minidoctor.batching import IGNORE, Batch
from minidoctor.config import AdapterConfig, ModelConfig
from minidoctor.model import Model, is_adapter_name

Step = Callable[[Batch], Any]


def installed(*packages: str) -> bool:
    return all(find_spec(package) for package in packages)


def known(c: ModelConfig) -> bool:
    """Whether it is a plain Llama: only that is built for the peers."""
    return not (c.qkv_bias or c.qk_norm or c.window or c.rope_scaling)


def llama(model: Model) -> Any:
    """The same frozen model in `transformers`; the weights are not copied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    peer = LlamaForCausalLM(config).to(device=model.lm_head.weight.device, dtype=model.lm_head.weight.dtype)
    peer.load_state_dict({k: v for k, v in model.state_dict().items() if not is_adapter_name(k)}, assign=True)
    return peer.requires_grad_(False)


def peft_lora(model: Model, adapter: AdapterConfig) -> tuple[nn.Module, list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets), task_type="CAUSAL_LM"
    )
    peer = get_peft_model(llama(model), config)
    return peer, [p for p in peer.parameters() if p.requires_grad]


def mixlora(model: Model, adapter: AdapterConfig) -> tuple[nn.Module, list[nn.Parameter]]:
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    c, peer = model.config, llama(model)
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
        weights[f"mixlora.layers.{i}.mlp.moe_gate.weight"] = nn.Parameter(
            0.02 * torch.randn(adapter.n_experts, c.dim, **like)
        )
        for target in adapter.targets:
            d_in, d_out = (c.ffn_dim, c.dim) if target == "down_proj" else (c.dim, c.ffn_dim)
            for e in range(adapter.n_experts):
                name = f"mixlora.layers.{i}.mlp.{target}.experts.{e}"
                weights[f"{name}.lora_A.weight"] = 0.02 * torch.randn(adapter.rank, d_in, **like)
                weights[f"{name}.lora_B.weight"] = torch.zeros(d_out, adapter.rank, **like)
    inject_adapter_in_model(peer, config, weights)
    trained: list[nn.Parameter] = []
    for layer in peer.model.layers:
        experts = layer.mlp.mixlora_moes[config.adapter_name_]  # in a plain dict: parameters() does not see them
        trained.append(experts.gate_)
        for expert in experts.experts_.values():
            expert.dropout_.p = 0.0  # as ours; it insists on being given more
            trained += [expert.lora_A.weight, expert.lora_B.weight]
    for p in trained:
        p.requires_grad_(True)
    return peer, trained


def training_step(peer: nn.Module, trained: list[nn.Parameter], lr: float, clip: float) -> Step:
    """A step as these packages are used: logits of all positions, labels that hide prompt and padding."""
    optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)
    peer.train()

    def step(batch: Batch) -> Any:
        batch = Batch(*(tensor.to(trained[0].device) for tensor in batch))
        labels = torch.full_like(batch.targets, IGNORE)
        labels[:, 1:] = batch.targets[:, :-1]  # it shifts them itself, and so never learns the last one
        loss = peer(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
