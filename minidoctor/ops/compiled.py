"""The transformer blocks compiled with torch.compile. The plain form is the block itself."""

import torch
from torch import nn

from minidoctor.config import UserError


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile the blocks in place. Results are the same up to rounding.

    Compilation happens at the first call with each kind of input (one or many tokens, with or without a cache), takes
    some seconds each, and is shared by all blocks, which are alike. Raises UserError where nothing can be compiled.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=next(blocks.parameters()).device))
    except Exception as error:  # of many classes: no compiler, too old a compiler, an unsupported system
        raise UserError(f"--compile is not available on this machine: {error}".splitlines()[0]) from error
    for block in blocks:
        block.compile(dynamic=True)  # sequence lengths change from batch to batch and from token to token
