"""An estimate of the memory of a training step, printed before the first one.

    frozen weights   their size in the dtype of the base, or quantized; with --shard a process has its part
    gathered         with --shard: embeddings, output layer and the largest block, whole
    dequantized      the largest quantized weight, as one product or gradient needs it
    trainable        16 bytes per parameter: value, gradient and AdamW's two moments in float32; with groups of experts
                     20, because an update is scaled from the value before it
    activations      the tensors saved for the backward pass, added up below for one block
    logits           two chunks of fixed size, for every batch: ops/cross_entropy.py
    contrast         the queue, and n_anchors * E * Q similarities per router: fixed, too

The allocator's overhead is not included. `python -m minidoctor.bench memory` measures a step.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from minidoctor.config import TARGETS, TrainConfig
from minidoctor.expert_queue import ExpertQueue
from minidoctor.model import Model, is_adapter_name
from minidoctor.ops.cross_entropy import CHUNK
from minidoctor.ops.quantized import QuantizedWeight

GIB = 2**30
ADVICE = "lower --batch-size or --max-seq-len, raise --accumulate, or add --recompute"
CONTRAST_COPIES = 6  # tensors of the similarities' size: themselves, two masked, exponentials, two gradients


def activations_per_token(model: Model) -> tuple[int, int]:
    """Return the elements that a block saves per token, and those that its backward pass allocates temporarily."""
    c, a = model.config, model.adapter
    targets = a.targets if a else ()
    d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    saved = 2 * c.dim + 2 * d_q + 2 * d_kv + 3 * c.ffn_dim  # norms' inputs; q, k, v and output; gate, silu, up
    saved += c.dim * len({TARGETS[target] for target in targets})  # inputs of routers and experts
    saved += d_q * ("o_proj" in targets) + c.ffn_dim * ("down_proj" in targets)
    saved += 2 * (a.n_experts * a.rank if a else 0) * len(targets)  # A x, before and after the gates
    return saved, 3 * c.ffn_dim


def estimate(
    model: Model, queue: ExpertQueue | None, config: TrainConfig, n_tokens: int, n_answers: int
) -> dict[str, int]:
    """Return the bytes of a step, by use, for n_tokens (with padding) and n_answers answer tokens.

    These are the tokens of one process in a micro-batch.
    """
    c, size = model.config, model.lm_head.weight.element_size()
    saved, temporary = activations_per_token(model)
    layers = c.n_layers * c.dim + saved if config.recompute else c.n_layers * saved
    chunk = min(n_answers, max(1, CHUNK // c.vocab_size)) * c.vocab_size
    n_keys = queue.keys[..., 0].numel() if queue else 0
    contrast = queue.keys.numel() + n_keys * CONTRAST_COPIES * config.n_anchors if queue else 0
    tensors = (*model.named_parameters(), *model.named_buffers())
    frozen = {name: x for name, x in tensors if not (x.requires_grad or is_adapter_name(name))}
    blocks = Counter[str]()  # bytes of each block by its number, and of the rest by ""
    for name, x in frozen.items():
        blocks[name.split(".")[2] if ".layers." in name else ""] += x.nbytes
    return {
        # A sharded tensor's nbytes are those of the whole.
        "frozen weights": sum(getattr(x, "to_local", lambda x=x: x)().nbytes for x in frozen.values()),
        "gathered": blocks.pop("") + max(blocks.values()) if config.shard else 0,
        "dequantized": max(
            (w.n_weights * (4 + size) for w in model.modules() if isinstance(w, QuantizedWeight)), default=0
        ),
        "trainable": (20 if model.groups else 16) * sum(p.numel() for p in model.parameters() if p.requires_grad),
        "activations": n_tokens * size * (layers + temporary),
        "logits": 2 * 4 * chunk + 2 * size * n_answers * c.dim,
        "contrast": 4 * contrast,
    }


def free_memory(device: torch.device) -> int | None:
    """Return the available bytes, or None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if device.type == "cpu" and meminfo.exists() else ""
    available = re.search(r"MemAvailable: *(\d+) kB", text)
    return int(available[1]) * 1024 if available else None


def format_estimate(needed: Mapping[str, int], free: int | None) -> str:
    """Return the estimate as text, with advice if it exceeds the free memory. The frozen weights are loaded already."""
    sizes = ", ".join(f"{name} {n / GIB:.2f}" for name, n in needed.items() if n)
    line = f"memory of a step: about {sum(needed.values()) / GIB:.2f} GiB ({sizes})"
    missing = sum(needed.values()) - needed["frozen weights"]
    if free is not None and missing > free:
        line += f"\nWARNING: it needs {missing / GIB:.2f} GiB in addition and {free / GIB:.2f} are free: {ADVICE}"
    return line
