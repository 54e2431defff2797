"""The transformer blocks compiled with torch.compile. The plain form is the block itself."""

import sys

import torch
from torch import nn

from minidoctor.config import UserError
from minidoctor.ops.int8_product import PackedInt8Weight


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile the blocks in place. Results are the same up to rounding.

    Compilation happens at the first call with each kind of input (one or many tokens, with or without a cache), takes
    some seconds each, and is shared by all blocks, which are alike. Raises UserError where nothing can be compiled.
    Blocks with packed int8 weights stay as they are: each product would interrupt the compiled code.
    """
    if any(isinstance(module, PackedInt8Weight) for module in blocks.modules()):
        print("note: --compile has no effect on packed int8 weights, which batches are computed with", file=sys.stderr)
        return
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=next(blocks.parameters()).device))
    except Exception as error:  # of many classes: no compiler, too old a compiler, an unsupported system
        raise UserError(f"--compile is not available on this machine: {error}".splitlines()[0]) from error
    for block in blocks:
        block.compile(dynamic=True)  # sequence lengths change from batch to batch and from token to token
