"""Implementations timed by the benchmark: the training step of train.py, its lower bound, and a loop over experts.

The lower bound is the frozen model's forward and backward pass, to which an adapter can only add. All of them share
the frozen weights of one base model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minidoctor.batching import IGNORE, Batch, Example, collate
from minidoctor.bench.options import SHAPES, BenchConfig
from minidoctor.checkpoints.hugging_face import load_model, quantized_layers
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.lora import LoRAExperts
from minidoctor.losses import language_model_loss
from minidoctor.model import Model, adapter_state
from minidoctor.ops.compiled import compile_blocks
from minidoctor.ops.linear import Linear
from minidoctor.step import make_optimizer, make_queue, train_step

Step = Callable[[Batch], Any]


def make_base(config: BenchConfig, n_layers: int = 10) -> Model:
    """Return the frozen model: a checkpoint, or random weights of a shape with --layers or else `n_layers` layers."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if config.base:
        return load_model(config.base, dtype, device, quantize=config.quantize).requires_grad_(False)
    torch.manual_seed(0)
    with device:  # created on the device, because drawing a large model on the CPU takes minutes
        model = Model(dataclasses.replace(SHAPES[config.shape], n_layers=config.layers or n_layers))
    model.to(dtype).requires_grad_(False)
    for layer in quantized_layers(model, config.quantize).values():
        weight = layer.weight
        layer.quantize(config.quantize, dtype, device).store(weight)
    return model.eval()


def share_weights(base: Model, adapter: AdapterConfig | None = None, compiled: bool = False) -> Model:
    """Return a model with an untrained adapter on the frozen weights of `base`, which are not copied."""
    with torch.device("meta"):
        model = Model(base.config, adapter)
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, Linear)}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.share(layers[name])
    trainable = {name: tensor.to(base.lm_head.weight.device) for name, tensor in adapter_state(model).items()}
    model.load_state_dict(base.state_dict() | trainable, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    if compiled:
        compile_blocks(model.model.layers)
    return model


def make_step(base: Model, adapter: AdapterConfig, config: TrainConfig, loop: bool = False) -> Step:
    """Return the training step of train.py, with wide LoRA experts or with a loop over experts."""
    model = share_weights(base, adapter, config.compile)
    if loop:
        loop_over_experts(model)
    optimizer, queue, steps = make_optimizer(model, config), make_queue(model, config), iter(range(2**31))
    return lambda batch: train_step(model, optimizer, queue, [batch], next(steps), config)


def make_frozen_step(base: Model, compiled: bool = False) -> Step:
    """Return the lower bound: forward and backward pass from the loss of the answers down to the embeddings."""
    model = share_weights(base, compiled=compiled)
    # A frozen model has no backward pass unless the output of its embedding requires a gradient.
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def step(batch: Batch) -> None:
        batch = batch.to(model.lm_head.weight.device)
        hidden, _ = model.hidden(batch.tokens)  # (B, T, D)
        head = model.lm_head.dense_weight(hidden.dtype)  # (V, D)
        language_model_loss(hidden, head, batch.targets, batch.answer_positions).backward()

    return step


class LoopExperts(LoRAExperts):
    """The usual implementation: each expert gathers its tokens. On a GPU the CPU has to read back how many."""

    def __init__(self, layer: LoRAExperts):
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)  # the same parameters and sizes

    def forward(self, x: Tensor, gates: Tensor | None = None, frozen: Tensor | None = None) -> Tensor:
        """(B, T, D_in) and gates (B, T, E) -> (B, T, D_out)."""
        assert gates is not None
        assert frozen is None  # as in training
        rows, weights = x.flatten(0, -2), gates.flatten(0, -2).to(x.dtype)  # (N, D_in), (N, E)
        y = super(LoRAExperts, self).forward(rows)  # (N, D_out), the frozen layer
        experts = zip(self.lora_a.split(self.rank), self.lora_b.split(self.rank, dim=1), strict=True)
        for e, (a, b) in enumerate(experts):
            tokens = weights[:, e].nonzero().squeeze(-1)  # (n,)
            update = rows[tokens] @ a.to(x.dtype).T @ b.to(x.dtype).T  # (n, D_out)
            y.index_add_(0, tokens, self.scale * weights[tokens, e, None] * update)
        return y.unflatten(0, x.shape[:-1])  # (B, T, D_out)


def loop_over_experts(model: Model) -> None:
    """Replace every layer with experts by a loop over the same experts."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, LoRAExperts):
                setattr(module, name, LoopExperts(layer))


def random_batch(vocab_size: int, batch_size: int, seq_len: int) -> Batch:
    """Return random tokens. The first half of each row is the prompt."""
    generator, half = torch.Generator().manual_seed(0), seq_len // 2
    rows = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator).tolist()
    return collate([Example(row[:-1], [IGNORE] * half + row[half + 1 :]) for row in rows])
