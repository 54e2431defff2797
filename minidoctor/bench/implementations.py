"""What of ours bench.py times: a step as train.py runs it, the floor beneath it, and the way that it does not take.

All of them share the frozen weights of one base.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidoctor.batching import IGNORE, Batch, Example, collate
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.lora import LoRAExperts
from minidoctor.losses import language_model_loss
from minidoctor.model import Model, adapter_state, position_info
from minidoctor.ops.compiled import compile_blocks
from minidoctor.ops.linear import linear
from minidoctor.step import make_optimizer, make_queue, train_step

CONTRAST = 0.03  # its weight: on in all that is timed unless it says otherwise
# The config.json of https://huggingface.co/HuggingFaceTB/SmolLM2-135M, Qwen/Qwen3-0.6B and Qwen/Qwen3-4B
SHAPES = {
    "smollm2": ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192, 1e-5, 1e5),
    "qwen3-0.6b": ModelConfig(151936, 1024, 28, 16, 8, 128, 3072, 40960, 1e-6, 1e6, qk_norm=True),
    "qwen3-4b": ModelConfig(151936, 2560, 36, 32, 8, 128, 9728, 40960, 1e-6, 1e6, qk_norm=True),
}


def base_of(directory: str | None, shape: str, n_layers: int, device_name: str, dtype_name: str) -> Model:
    """A checkpoint, or random weights of a shape: frozen."""
    device = choose_device(device_name)
    dtype = choose_dtype(dtype_name, device)
    if directory:
        return load_model(directory, dtype, device).requires_grad_(False)
    torch.manual_seed(0)
    with device:  # made where it shall be, for a large one would take minutes on the CPU
        model = Model(dataclasses.replace(SHAPES[shape], n_layers=n_layers))
    return model.to(dtype).requires_grad_(False).eval()


def twin(base: Model, adapter: AdapterConfig | None = None, compiled: bool = False) -> Model:
    """Another model on the frozen weights of `base`, which are not copied."""
    with torch.device("meta"):
        model = Model(base.config, adapter)
    new = {name: tensor.to(base.lm_head.weight.device) for name, tensor in adapter_state(model).items()}
    model.load_state_dict(base.state_dict() | new, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name in new)
    if compiled:
        compile_blocks(model.model.layers)
    return model


def our_step(base: Model, adapter: AdapterConfig, config: TrainConfig, looped: bool = False) -> Callable[[Batch], Any]:
    model = twin(base, adapter, config.compile)
    if looped:
        loop_over_experts(model)
    optimizer, queue, steps = make_optimizer(model, config), make_queue(model, config), iter(range(2**31))
    return lambda batch: train_step(model, optimizer, queue, [batch], next(steps), config)


class LoopExperts(LoRAExperts):
    """The usual way: each expert gathers its tokens and adds its part. On a GPU the CPU waits for their number."""

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """(B, T, D_in) and gates (B, T, E) -> (B, T, D_out)."""
        assert gates is not None
        rows, weights = x.flatten(0, -2), gates.flatten(0, -2).to(x.dtype)  # (N, D_in), (N, E)
        y = linear(rows, self.weight, self.bias)  # (N, D_out)
        experts = zip(self.lora_a.split(self.rank), self.lora_b.split(self.rank, dim=1), strict=True)
        for e, (a, b) in enumerate(experts):
            mine = weights[:, e].nonzero().squeeze(-1)  # (n,)
            part = rows[mine] @ a.to(x.dtype).T @ b.to(x.dtype).T  # (n, D_out)
            y.index_add_(0, mine, self.scale * weights[mine, e, None] * part)
        return y.unflatten(0, x.shape[:-1])  # (B, T, D_out)


def loop_over_experts(model: Model) -> None:
    adapter = model.adapter
    assert adapter
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LoRAExperts):
                size = layer.in_features, layer.out_features, adapter.n_experts, adapter.rank, adapter.alpha
                with torch.device("meta"):
                    other = LoopExperts(*size, bias=layer.bias is not None)
                for key, p in layer.named_parameters():
                    setattr(other, key, p)
                setattr(module, name, other)


def frozen_step(base: Model, batch: Batch) -> None:
    """The floor: forward and backward of the frozen model, from the answers' loss down to the embeddings."""
    device, model = base.lm_head.weight.device, base.model
    batch = batch.to(device)
    x = model.embed_tokens(batch.tokens).requires_grad_()  # (B, T, D)
    positions = torch.arange(x.shape[1], device=device).expand_as(batch.tokens)  # (B, T)
    info = position_info(base.config, positions, x.dtype, None)
    hidden = x
    for layer in model.layers:
        hidden, _ = layer(hidden, info, None)
    language_model_loss(model.norm(hidden), base.lm_head.weight, batch.targets, batch.answer_positions).backward()


def drawn_batch(vocab_size: int, batch_size: int, seq_len: int) -> Batch:
    """Random tokens, the first half of each row prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator).tolist()
    half = seq_len // 2
    return collate([Example(row[:-1], [IGNORE] * half + row[half + 1 :]) for row in rows])
