"""A decoder of the Llama kind whose linear layers can have LoRA experts.

    x = x + attention(norm(x))          grouped-query, rotary positions, causal
    x = x + feed_forward(norm(x))       SwiGLU: down(silu(gate(x)) * up(x))

Llama, Mistral, Qwen2, Qwen3 and Baichuan differ by four switches of the config (qkv_bias, qk_norm, window,
rope_scaling) and by how their weights are stored, which `families.py` knows.

Parameter names are those of Hugging Face checkpoints (`model.layers.0.mlp.gate_proj.weight`), so loading needs
no table. A sublayer with experts adds `router.*` and, in each adapted linear, `lora_a` and `lora_b`.

RMSNorm: https://arxiv.org/abs/1910.07467. RoPE: https://arxiv.org/abs/2104.09864, section 3.4.2.
GQA: https://arxiv.org/abs/2305.13245. SwiGLU: https://arxiv.org/abs/2002.05202.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidoctor.config import TARGETS, AdapterConfig, ModelConfig
from minidoctor.linear import Linear
from minidoctor.lora import LoRAExperts
from minidoctor.router import Router, Routing


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32: the square of a bfloat16 activation has 8 bits left."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head's dimensions (C/2,): theta^(-2i/C), scaled as the checkpoint asks."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (C/2,)
    # Not theta**-exponents: the last bit of a frequency, times a position of 100,000, shows in the logits.
    frequencies = 1.0 / config.rope_theta**exponents  # (C/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":  # https://arxiv.org/abs/2306.15595, section 2.3
        return frequencies / scaling.factor
    # Llama 3.1: pairs that turn often within the original context keep their speed, for they tell near tokens
    # apart; those that do not complete a turn are slowed down, and between the two it is interpolated.
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)  # (C/2,)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)  # (C/2,)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (B, 1, T, C) of position * frequency: pair i of a head turns by that angle."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, C/2)
    cos, sin = angles.cos(), angles.sin()
    # The first half of a head's dimensions takes its partner times minus the sine.
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)  # (B, 1, T, C)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, T, C) -> same. Checkpoints in this layout pair dimension i with i + C/2, not with i + 1."""
    cos, sin = table
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Places(NamedTuple):
    """Where the tokens stand and what they see: the same for all layers, so made once for all of them."""

    table: tuple[Tensor, Tensor]  # cosines and sines (B, 1, T, C)
    mask: Tensor | None  # (B, 1, T, S), 0 or -inf; None: all before and itself
    slots: Tensor | None  # (B, G, T, C), the position of each token in the cache


class KVCache:
    """Keys and values of the positions computed so far, for each layer.

    Each row of the batch has its own positions: row b writes at `positions[b]`. So prompts of different
    lengths are padded on the right, and the tokens that follow overwrite the padding, which until then
    lies in the future of every real token and is never seen.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_seq_len: int, like: Tensor):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_seq_len, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0  # positions that are looked at: those in use, of the longest row

    def repeated(self, config: ModelConfig, batch_size: int, max_seq_len: int) -> "KVCache":
        """A cache for rows that all go on from what this one's only row has read."""
        cache = KVCache(config, batch_size, max_seq_len, self.keys)
        cache.length = self.length
        for new, old in ((cache.keys, self.keys), (cache.values, self.values)):
            new[:, :, :, : self.length] = old[:, :, :, : self.length]
        return cache

    def layers(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the first rows, (B, G, S, C) for each layer: writing to them writes here."""
        keys, values = (stored[:, :batch_size, :, : self.length] for stored in (self.keys, self.values))
        return list(zip(keys.unbind(), values.unbind(), strict=True))


def linear(d_in: int, d_out: int, name: str, adapter: AdapterConfig | None, bias: bool = False) -> Linear:
    if adapter and name in adapter.targets:
        return LoRAExperts(d_in, d_out, adapter.n_experts, adapter.rank, adapter.alpha, bias)
    return Linear(d_in, d_out, bias)


def router(dim: int, sublayer: str, adapter: AdapterConfig | None) -> Router | None:
    """One router for all adapted linears of a sublayer; none where there is nothing to choose, in plain LoRA."""
    if adapter and adapter.n_experts > 1 and any(TARGETS[target] == sublayer for target in adapter.targets):
        return Router(dim, adapter.n_experts, adapter.top_k, adapter.routing_dim)
    return None


def apply(layer: Linear, x: Tensor, routing: Routing | None) -> Tensor:
    """A linear layer, with the routing's gates if it has experts."""
    return layer(x, routing.gates) if isinstance(layer, LoRAExperts) and routing else layer(x)


class Attention(nn.Module):
    """Each of the H/G query heads of a group attends to the same keys and values."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        self.head_dim = config.head_dim
        d_q, d_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = linear(config.dim, d_q, "q_proj", adapter, config.qkv_bias)
        self.k_proj = linear(config.dim, d_kv, "k_proj", adapter, config.qkv_bias)
        self.v_proj = linear(config.dim, d_kv, "v_proj", adapter, config.qkv_bias)
        self.o_proj = linear(d_q, config.dim, "o_proj", adapter)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.router = router(config.dim, "self_attn", adapter)

    def forward(self, x: Tensor, places: Places, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Routing | None]:
        """(B, T, D) and the layer's stored keys and values -> (B, T, D) and the routing."""
        routing = self.router(x) if self.router else None
        q, k, v = (
            apply(projection, x, routing).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, T, C), (B, G, T, C), (B, G, T, C)
        q, k = rotate(self.q_norm(q), places.table), rotate(self.k_norm(k), places.table)
        if stored and places.slots is not None:
            slots = places.slots
            k, v = (old.scatter_(2, slots, new) for old, new in zip(stored, (k, v), strict=True))  # (B, G, S, C)
        mask = places.mask
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)  # (B, H, T, C)
        return apply(self.o_proj, out.transpose(1, 2).flatten(2), routing), routing  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU. The three linears share one routing, made from the sublayer's input."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        self.gate_proj = linear(config.dim, config.ffn_dim, "gate_proj", adapter)
        self.up_proj = linear(config.dim, config.ffn_dim, "up_proj", adapter)
        self.down_proj = linear(config.ffn_dim, config.dim, "down_proj", adapter)
        self.router = router(config.dim, "mlp", adapter)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """(B, T, D) -> (B, T, D) and the routing."""
        routing = self.router(x) if self.router else None
        hidden = F.silu(apply(self.gate_proj, x, routing)) * apply(self.up_proj, x, routing)  # (B, T, F)
        return apply(self.down_proj, hidden, routing), routing  # (B, T, D)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, adapter)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config, adapter)

    def forward(self, x: Tensor, places: Places, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, list[Routing]]:
        """(B, T, D) -> (B, T, D) and the routings of the sublayers that have experts."""
        attended, attention_routing = self.self_attn(self.input_layernorm(x), places, stored)
        x = x + attended
        fed, routing = self.mlp(self.post_attention_layernorm(x))
        return x + fed, [r for r in (attention_routing, routing) if r]


class Decoder(nn.Module):
    """Everything but the output layer. A module of its own because checkpoints call it `model`."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        # Not nn.Embedding's own normal values: drawing these without memory (device "meta", as when a checkpoint
        # is loaded) makes torch import its compiler, which takes two seconds.
        rows = torch.empty(config.vocab_size, config.dim).uniform_(-(3**0.5), 3**0.5)  # of variance 1, too
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(Block(config, adapter) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Model(nn.Module):
    """A causal language model. With an adapter everything but experts and routers is frozen."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None = None):
        super().__init__()
        self.config, self.adapter = config, adapter
        self.model = Decoder(config, adapter)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        if adapter:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_adapter_name(name))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """(B, T) -> (B, T, D), ready for `lm_head`, and one routing for each sublayer with experts.

        `positions` (B, T) says where in each row the tokens stand; without it they are 0 ... T-1. With `recompute`
        a block keeps its input alone for the way back (activation checkpointing).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # (B, T)
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        places = self.places(positions, cache, x.dtype)
        stored = cache.layers(len(tokens)) if cache else [None] * self.config.n_layers
        routings: list[Routing] = []
        for layer, of_layer in zip(self.model.layers, stored, strict=True):
            if recompute:
                x, new = checkpoint(layer, x, places, of_layer, use_reentrant=False, preserve_rng_state=False)
            else:
                x, new = layer(x, places, of_layer)
            routings += new
        return self.model.norm(x), routings

    def places(self, positions: Tensor, cache: KVCache | None, dtype: torch.dtype) -> Places:
        config, (n_rows, n_tokens) = self.config, positions.shape
        table = rotary_table(positions, rotary_frequencies(config, positions.device), dtype)
        mask = slots = None
        if cache or 0 < config.window < n_tokens:
            others = torch.arange(cache.length if cache else n_tokens, device=positions.device)  # (S,)
            own = positions[:, None, :, None]  # (B, 1, T, 1)
            unseen = others > own  # (B, 1, T, S)
            if config.window:
                unseen |= others <= own - config.window
            mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)  # (B, 1, T, S)
        if cache:
            slots = positions[:, None, :, None].expand(n_rows, config.n_kv_heads, n_tokens, config.head_dim)
        return Places(table, mask, slots)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """(B, T) -> logits (B, T, V) and routings."""
        hidden, routings = self.hidden(tokens, positions, cache)
        return self.lm_head(hidden), routings


def compile_blocks(model: Model) -> None:
    """From now on the blocks run as machine code made for them, with the same results up to rounding.

    It is made when a block first meets tokens of a kind (one or many, with a cache or without), in some seconds each,
    and once for all blocks, which are alike. Raises ValueError where nothing can be compiled.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=model.lm_head.weight.device))
    except Exception as error:  # of many kinds: no compiler, one that is too old, a system that is not supported
        raise ValueError(f"--compile does not work here: {error}".splitlines()[0]) from error
    for layer in model.model.layers:
        layer.compile(dynamic=True)  # lengths change from batch to batch, and in writing from token to token


def is_adapter_name(name: str) -> bool:
    return ".router." in name or name.endswith((".lora_a", ".lora_b"))


def adapter_state(model: Model) -> dict[str, Tensor]:
    """Name to tensor of what fine-tuning trains."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter_name(name)}


def trained_weights(model: Model) -> dict[str, nn.Parameter]:
    """Name to parameter of what is not frozen: the adapter's, or all of a model without one."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
