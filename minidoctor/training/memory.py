"""How much memory a training step needs, said before it starts, and what to lower when it does not fit.

    frozen weights    their own bytes
    trained weights   16 bytes each: weight, gradient and AdamW's two moments in float32
    activations       what the way back needs of each token, added up layer by layer below
    logits            two pieces of fixed size, whatever the batch: ops/cross_entropy.py
    contrast          the queue, and n_anchors * E * C similarities of each layer: fixed, too

An estimate: the allocator's own losses are not in it. `python -m minidoctor.bench memory` measures a step beside it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from minidoctor.config import TARGETS, TrainConfig
from minidoctor.model import Model
from minidoctor.ops.cross_entropy import CHUNK

GIB = 2**30
ADVICE = "lower --batch-size or --max-seq-len, raise --accumulate, or add --recompute"
CONTRAST_COPIES = 6  # similarity, masked twice, exponentials, and gradients


def activations_per_token(model: Model) -> tuple[int, int]:
    """Numbers that a block keeps of one token for the way back, and those it holds for a moment on that way."""
    c, a = model.config, model.adapter
    targets = a.targets if a else ()
    wide = a.n_experts * a.rank if a else 0
    attention, mlp = (any(TARGETS[t] == sublayer for t in targets) for sublayer in ("self_attn", "mlp"))
    d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    kept = 2 * c.dim + 2 * d_q + 2 * d_kv + 3 * c.ffn_dim  # norms' inputs; q, k, v and output; gate, silu, up
    kept += c.dim * (attention + mlp)  # what router and experts read
    kept += d_q * ("o_proj" in targets) + c.ffn_dim * ("down_proj" in targets)
    kept += 2 * wide * len(targets)  # A x, before and after the gates
    return kept, 3 * c.ffn_dim


def estimate(model: Model, config: TrainConfig, n_tokens: int, n_answers: int) -> dict[str, int]:
    """Bytes of a step whose largest part has so many tokens, padding included, and answer tokens."""
    c, a = model.config, model.adapter
    size = model.lm_head.weight.element_size()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    kept, passing = activations_per_token(model)
    layers = c.n_layers * c.dim + kept if config.recompute else c.n_layers * kept
    piece = min(n_answers, max(1, CHUNK // c.vocab_size)) * c.vocab_size
    contrast = 0
    if a and a.n_experts > 1 and config.contrast_weight:
        n_routers = sum(name.endswith("router.scale") for name, _ in model.named_parameters())
        rings = n_routers * a.n_experts * config.queue_capacity
        contrast = 4 * rings * (a.routing_dim + CONTRAST_COPIES * config.n_anchors)
    return {
        "frozen weights": frozen,
        "trained weights": 16 * trained,
        "activations": n_tokens * size * (layers + passing),
        "logits": 2 * 4 * piece + 2 * size * n_answers * c.dim,
        "contrast": contrast,
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None


def in_words(needed: Mapping[str, int], free: int | None) -> str:
    """The estimate in words, with the advice where it will not fit. The frozen weights are in memory already."""
    parts = ", ".join(f"{name} {n / GIB:.2f}" for name, n in needed.items())
    line = f"memory of a step: about {sum(needed.values()) / GIB:.2f} GiB ({parts})"
    more = sum(needed.values()) - needed["frozen weights"]
    if free is not None and more > free:
        line += f"\nWARNING: {more / GIB:.2f} GiB more are needed and {free / GIB:.2f} are free: {ADVICE}"
    return line


def out_of_memory(error: BaseException) -> bool:
    """Whether this is the GPU's or the CPU's way of saying that there is no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
