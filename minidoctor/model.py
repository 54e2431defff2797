"""A decoder of the Llama kind whose linear layers can have LoRA experts.

    x = x + attention(norm(x))          grouped-query, rotary positions, causal
    x = x + feed_forward(norm(x))       SwiGLU: down(silu(gate(x)) * up(x))

Llama, Mistral, Qwen2, Qwen3 and Baichuan differ in five switches of the config (qkv_bias, qk_norm, window,
rope_scaling, alibi) and in how their weights are stored (checkpoints/families.py). Parameter names are those of
Hugging Face checkpoints, such as `model.layers.0.mlp.gate_proj.weight`. A sublayer with experts adds `router.*` and,
in each adapted linear layer, `lora_a` and `lora_b`.

RMSNorm: https://arxiv.org/abs/1910.07467. RoPE: https://arxiv.org/abs/2104.09864, section 3.4.2.
ALiBi: https://arxiv.org/abs/2108.12409, section 3.
GQA: https://arxiv.org/abs/2305.13245. SwiGLU: https://arxiv.org/abs/2002.05202.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidoctor.config import AdapterConfig, ModelConfig
from minidoctor.kv_cache import KVCache, LayerCache
from minidoctor.lora import make_linear
from minidoctor.ops.linear import Linear
from minidoctor.ops.precision import at_least_float32
from minidoctor.router import PromptGroups, Routing, make_router, project, project_all


class RMSNorm(nn.Module):
    """x / rms(x) * weight. The mean square is computed in float32; bfloat16 has 8 significant bits."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return radians per position (C/2,) of each pair of a head's dimensions: theta^(-2i/C), scaled by the config."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (C/2,)
    # As transformers computes it, not theta**-exponents: the last bit of a frequency, times a position of 100,000,
    # shows in the logits.
    frequencies = 1.0 / config.rope_theta**exponents  # (C/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":  # https://arxiv.org/abs/2306.15595, section 2.3
        return frequencies / scaling.factor
    # Llama 3.1: high frequencies, which distinguish near tokens, are kept; pairs that complete fewer turns than
    # low_freq_factor in the original context are slowed down; the frequencies in between are interpolated.
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)  # (C/2,)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)  # (C/2,)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines (B, 1, T, C) of position * frequency, the angle that rotates each pair."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, C/2)
    cos, sin = angles.cos(), angles.sin()
    # The first half of a head's dimensions takes its partner times minus the sine.
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)  # (B, 1, T, C)


def rotary_lookup(config: ModelConfig, positions: Tensor, like: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
    """Return the rotary table of the positions, in the dtype of `like`. A cache keeps that of all its positions."""
    if cache is None:
        return rotary_table(positions, rotary_frequencies(config, like.device), like.dtype)
    if cache.rotary is None:
        all_positions = torch.arange(cache.size, device=like.device)[None]  # (1, S)
        cache.rotary = rotary_lookup(config, all_positions, like, None)
    cos, sin = (table[0, 0, positions].unsqueeze(1) for table in cache.rotary)
    return cos, sin  # (B, 1, T, C)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, T, C) -> same. Hugging Face checkpoints pair dimension i with i + C/2, not with i + 1."""
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def alibi_slopes(n_heads: int, device: torch.device) -> Tensor:
    """Return the slope (H,) of each head's linear bias, as the authors' code chooses it.

    For n = 2^k heads the slopes are 2^(-8i/n), i = 1 ... n. If H is not a power of two, the heads beyond the largest
    n <= H take the first, third, ... slope of 2n heads.
    """
    n = 2 ** int(math.log2(n_heads))
    exponents = torch.cat([torch.arange(1, n + 1) / n, (1 + 2 * torch.arange(n_heads - n)) / (2 * n)])  # (H,)
    return (2.0 ** (-8 * exponents)).to(device)


class PositionInfo(NamedTuple):
    """Rotary table, attention mask, cache index and group of the tokens, computed once for all layers."""

    rotary: tuple[Tensor, Tensor] | None  # cosines and signed sines (B, 1, T, C); None: ALiBi
    mask: Tensor | None  # (B, 1, T, S), 0 or -inf, or (B, H, T, S) with the ALiBi bias; None: causal, or T = 1
    cache_index: Tensor | None  # (B, G, T, C), position of each token in the cache
    group: Tensor | None  # (B, T), the group of experts that each token chooses from


def position_info(
    config: ModelConfig, x: Tensor, positions: Tensor | None, cache: KVCache | None, groups: PromptGroups | None = None
) -> PositionInfo:
    """Return the PositionInfo of embeddings x (B, T, D), for which the cache has reserved its last T positions.

    Without `positions` (B, T) every row has these or, without a cache, 0 ... T-1. The first dimension is then 1.
    """
    n_rows, n_tokens = x.shape[:2]
    n_keys = cache.length if cache else n_tokens  # S
    all_keys = positions is None and n_tokens in (1, n_keys)  # the tokens attend to all keys that are not after them
    if positions is None:
        positions = torch.arange(n_keys - n_tokens, n_keys, device=x.device)[None]  # (1, T)
    rotary = mask = cache_index = group = None
    if not config.alibi:
        rotary = rotary_lookup(config, positions, x, cache)
    if (cache and not all_keys) or config.alibi or 0 < config.window < n_keys:
        key_positions = torch.arange(n_keys, device=x.device)  # (S,)
        query_positions = positions[:, None, :, None]  # (B, 1, T, 1)
        excluded = key_positions > query_positions  # (B, 1, T, S)
        if config.window:
            excluded |= key_positions <= query_positions - config.window
        mask = torch.zeros_like(excluded, dtype=x.dtype)
        if config.alibi:
            slopes = alibi_slopes(config.n_heads, x.device)[:, None, None]  # (H, 1, 1)
            mask = (slopes * (key_positions - query_positions)).to(x.dtype)  # (B, H, T, S)
        mask = mask.masked_fill(excluded, -torch.inf)  # (B, 1 or H, T, S)
    if cache:
        cache_index = positions[:, None, :, None].expand(n_rows, config.n_kv_heads, n_tokens, config.head_dim)
    if groups:
        votes = groups(x)  # (B, T, J)
        group = (cache.add_votes(votes, positions) if cache else votes.cumsum(1)).argmax(-1)  # (B, T)
    return PositionInfo(rotary, mask, cache_index, group)


class Attention(nn.Module):
    """Grouped-query attention: H/G query heads share one key and value head.

    All four linear layers, o_proj too, use the gates computed from the input of the sublayer.
    """

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        self.head_dim = config.head_dim
        d_q, d_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = make_linear(config.dim, d_q, "q_proj", adapter, config.qkv_bias)
        self.k_proj = make_linear(config.dim, d_kv, "k_proj", adapter, config.qkv_bias)
        self.v_proj = make_linear(config.dim, d_kv, "v_proj", adapter, config.qkv_bias)
        self.o_proj = make_linear(d_q, config.dim, "o_proj", adapter)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.router = make_router(config.dim, "self_attn", adapter)

    def forward(self, x: Tensor, info: PositionInfo, cache: LayerCache | None) -> tuple[Tensor, Routing | None]:
        """(B, T, D) -> (B, T, D) and the routing."""
        routing = self.router(x, info.group) if self.router else None
        q, k, v = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in project_all([self.q_proj, self.k_proj, self.v_proj], x, routing)
        )  # (B, H, T, C), (B, G, T, C), (B, G, T, C)
        q, k = self.q_norm(q), self.k_norm(k)
        if info.rotary:
            q, k = rotate(q, info.rotary), rotate(k, info.rotary)
        if cache and info.cache_index is not None:
            k, v = cache.append(k, v, info.cache_index)  # (B, G, S, C)
        causal = info.mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, info.mask, is_causal=causal, enable_gqa=True)  # (B, H, T, C)
        return project(self.o_proj, out.transpose(1, 2).flatten(2), routing), routing  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU. The three linear layers share one routing, computed from the input of the sublayer."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        self.gate_proj = make_linear(config.dim, config.ffn_dim, "gate_proj", adapter)
        self.up_proj = make_linear(config.dim, config.ffn_dim, "up_proj", adapter)
        self.down_proj = make_linear(config.ffn_dim, config.dim, "down_proj", adapter)
        self.router = make_router(config.dim, "mlp", adapter)

    def forward(self, x: Tensor, group: Tensor | None) -> tuple[Tensor, Routing | None]:
        """(B, T, D) and group (B, T) -> (B, T, D) and the routing."""
        routing = self.router(x, group) if self.router else None
        gate, up = project_all([self.gate_proj, self.up_proj], x, routing)  # (B, T, F)
        return project(self.down_proj, F.silu(gate) * up, routing), routing  # (B, T, D)


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm, each with a residual connection."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, adapter)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config, adapter)

    def forward(self, x: Tensor, info: PositionInfo, cache: LayerCache | None) -> tuple[Tensor, list[Routing]]:
        """(B, T, D) -> (B, T, D) and the routings of the sublayers with experts."""
        attended, attention_routing = self.self_attn(self.input_layernorm(x), info, cache)
        x = x + attended
        fed, mlp_routing = self.mlp(self.post_attention_layernorm(x), info.group)
        return x + fed, [r for r in (attention_routing, mlp_routing) if r]


class Decoder(nn.Module):
    """Embedding, blocks and last norm. A separate module because its parameters are called `model.*` in checkpoints."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None):
        super().__init__()
        # Uniform with variance 1. The normal values of nn.Embedding would make torch import its compiler when a model
        # is made on the device "meta" to load a checkpoint, which takes two seconds.
        weight = torch.empty(config.vocab_size, config.dim).uniform_(-(3**0.5), 3**0.5)  # (V, D)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Block(config, adapter) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Model(nn.Module):
    """A causal language model. With an adapter, everything except experts and routers is frozen."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig | None = None):
        super().__init__()
        self.config, self.adapter = config, adapter
        self.model = Decoder(config, adapter)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.groups = PromptGroups(config.dim, adapter.n_groups) if adapter and adapter.n_groups > 1 else None
        if adapter:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_adapter_name(name))

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None, recompute: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """Return the input of `lm_head` (B, T, D) for tokens (B, T), and one routing per sublayer with experts.

        `positions` (B, T) are the tokens' positions in their rows, by default the next ones of the cache, or 0 ... T-1.
        With `recompute` only the input of each block is saved for the backward pass (activation checkpointing).
        """
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        layer_caches = [None] * self.config.n_layers if cache is None else cache.reserve(*tokens.shape)
        info = position_info(
            self.config, x, positions, cache, self.groups
        )  # after `reserve`, which counts the new positions
        routings: list[Routing] = []
        for block, layer_cache in zip(self.model.layers, layer_caches, strict=True):
            if recompute:
                x, routed = checkpoint(block, x, info, layer_cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x, routed = block(x, info, layer_cache)
            routings += routed
        return self.model.norm(x), routings

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Return logits (B, T, V) for tokens (B, T), and one routing per sublayer with experts."""
        hidden, routings = self.hidden(tokens, positions, cache)
        return self.lm_head(hidden), routings


def is_adapter_name(name: str) -> bool:
    return ".router." in name or name.startswith("groups.") or name.endswith((".lora_a", ".lora_b"))


def adapter_state(model: Model) -> dict[str, Tensor]:
    """Return the tensors of experts, routers and groups by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter_name(name)}


def trainable_parameters(model: Model) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters that are not frozen: the adapter's, or all of a model without one."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
