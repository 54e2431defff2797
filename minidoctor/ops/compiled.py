"""The transformer blocks or the whole decoding step, compiled with torch.compile. The plain form is the model."""

import sys

import torch
from torch import nn

from minidoctor.config import UserError
from minidoctor.ops.int8_product import PackedInt8Weight


def compile_blocks(blocks: nn.Module) -> None:
    """Compile the blocks in place. Results are the same up to rounding.

    Compilation happens at the first call with each kind of input (one or many tokens, with or without a cache), takes
    some seconds each, and is shared by all blocks, which are alike. Raises UserError where nothing can be compiled.
    Blocks with packed int8 weights stay as they are: each product would interrupt the compiled code.
    """
    if any(isinstance(module, PackedInt8Weight) for module in blocks.modules()):
        print("note: --compile has no effect on packed int8 weights, which batches are computed with", file=sys.stderr)
        return
    check_compiler(next(blocks.parameters()).device)
    for block in blocks.children():
        block.compile(dynamic=True)  # sequence lengths change from batch to batch and from token to token


def compile_decoding(model: nn.Module) -> bool:
    """Compile a model in place for generation. Return True if it then needs SampleConfig.static_cache.

    On a GPU the whole step of a token becomes a CUDA graph, because a token takes the GPU less time than it takes
    Python to call the kernels. The prompt is not compiled. On other devices the blocks are. Raises UserError.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        compile_blocks(model.get_submodule("model.layers"))
        return False
    check_compiler(device)
    model.compile(mode="reduce-overhead")
    return True


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile does not work on this device."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of many classes: no compiler, too old a compiler, an unsupported system
        raise UserError(f"--compile is not available on this machine: {error}".splitlines()[0]) from error
