"""Frozen weights in 4 or 8 bits. The plain form of a product is F.linear(x, weight.dequantize(x.dtype)).

    nf4     w = level[code] * scale    16 levels, two codes per byte, a scale for each 64 weights of a row-major matrix
    int8    w = code * scale           code -127 ... 127, a scale for each row

The levels of NF4 are quantiles of the normal distribution, which weights roughly follow. "nf4-double" also quantizes
the scales: minus their mean, int8 in rows of 256. Codes and scales of "nf4" equal those of bitsandbytes bit for bit.
The backward pass dequantizes again, so neither pass keeps a dequantized weight.

NF4 and double quantization: https://arxiv.org/abs/2305.14314, section 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidoctor.config import TINY

# https://arxiv.org/abs/2305.14314, appendix E
LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
BLOCK, SCALE_BLOCK = 64, 256  # weights per scale, and scales per scale of "nf4-double"; section 3
CHUNK = 2**18  # elements that are quantized at a time, a bound of the temporary memory

Device = torch.device | str | None
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows (n, D) in float32 -> n rows of codes, n scales


class QuantizedWeight(nn.Module):
    """A frozen matrix (D_out, D_in) as integer codes and float32 scales."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: Sequence[int], codes: Tensor, scales: Tensor):
        super().__init__()
        self.shape, self.n_weights = tuple(shape), math.prod(shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def store(self, weight: Tensor) -> None:
        """Quantize a matrix (D_out, D_in) of any floating-point dtype."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (D_out, D_in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        return DequantizedProduct.apply(x, self)


class DequantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.weight.dequantize(grad.dtype), None


class NF4Weight(QuantizedWeight):
    """Codes (n, 32) in uint8, the first of each pair in the high bits, and scales (n,) of n blocks."""

    pairs: Tensor

    def __init__(self, shape: Sequence[int], device: Device = None):
        n = math.ceil(math.prod(shape) / BLOCK)
        codes = torch.empty(n, BLOCK // 2, dtype=torch.uint8, device=device)
        super().__init__(shape, codes, torch.empty(n, dtype=torch.float32, device=device))
        # The two levels of each byte as one element of 64 bits. One lookup per byte is 15 times faster than lookups of
        # rows of two elements (AMD EPYC, torch 2.13, 2026-11-26).
        pairs = torch.cartesian_prod(LEVELS, LEVELS).view(torch.int64).flatten()  # (256,)
        self.register_buffer("pairs", pairs.to(codes.device), persistent=False)

    def store(self, weight: Tensor) -> None:
        """Quantize a matrix (D_out, D_in). The last block is padded with zeros."""
        quantize_parts(split_padded(weight, BLOCK), quantize_blocks, self.codes, self.scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (D_out, D_in)."""
        levels = self.pairs.index_select(0, self.codes.flatten().int()).view(torch.float32)  # (64 n,)
        weights = levels.view(-1, BLOCK).mul_(self.block_scales()[:, None]).flatten()
        return weights[: self.n_weights].view(self.shape).to(dtype)

    def block_scales(self) -> Tensor:
        return self.scales


class DoubleNF4Weight(NF4Weight):
    """NF4 whose n block scales are int8 codes (m, 256), with scales (m, 1), around their mean."""

    scale_codes: Tensor
    mean: Tensor

    def __init__(self, shape: Sequence[int], device: Device = None):
        super().__init__(shape, device)
        self.n_blocks, m = len(self.scales), math.ceil(len(self.scales) / SCALE_BLOCK)
        self.scales = self.scales.new_empty(m, 1)
        self.register_buffer("scale_codes", self.codes.new_empty(m, SCALE_BLOCK, dtype=torch.int8))
        self.register_buffer("mean", self.scales.new_empty(()))

    def store(self, weight: Tensor) -> None:
        """Quantize a matrix (D_out, D_in), then its block scales."""
        scales = self.scales.new_empty(self.n_blocks)
        quantize_parts(split_padded(weight, BLOCK), quantize_blocks, self.codes, scales)
        self.mean.copy_(scales.mean())
        quantize_parts(split_padded(scales - self.mean, SCALE_BLOCK), quantize_rows, self.scale_codes, self.scales)

    def block_scales(self) -> Tensor:
        return (self.scale_codes * self.scales + self.mean).flatten()[: self.n_blocks]


class Int8Weight(QuantizedWeight):
    """Codes (D_out, D_in) in int8 and scales (D_out, 1)."""

    def __init__(self, shape: Sequence[int], device: Device = None):
        codes = torch.empty(*shape, dtype=torch.int8, device=device)
        super().__init__(shape, codes, torch.empty(shape[0], 1, dtype=torch.float32, device=device))

    def store(self, weight: Tensor) -> None:
        """Quantize a matrix (D_out, D_in)."""
        quantize_parts(weight.detach(), quantize_rows, self.codes, self.scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (D_out, D_in)."""
        return (self.codes * self.scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1 and not torch.is_grad_enabled():
            y = (self.codes * x.flatten().float()).sum(1)  # (D_out,), one loop over the codes
            return (y * self.scales[:, 0]).to(x.dtype).view(*x.shape[:-1], -1)
        return super().forward(x)


FORMS: dict[str, Callable[[Sequence[int], Device], QuantizedWeight]] = {
    "nf4": NF4Weight,
    "nf4-double": DoubleNF4Weight,
    "int8": Int8Weight,
}


def split_padded(weight: Tensor, size: int) -> Tensor:
    """Return the elements in rows (n, size), the last one padded with zeros."""
    flat, padding = weight.detach().flatten(), -weight.numel() % size
    return (F.pad(flat, (0, padding)) if padding else flat).view(-1, size)


def quantize_parts(rows: Tensor, quantize: Quantize, codes: Tensor, scales: Tensor) -> None:
    """Write the codes and scales of rows (n, D), of at most CHUNK elements at a time."""
    size = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        codes[part], scales[part] = quantize(rows[part].float())


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (n, D) in int8 and scales (n, 1)."""
    scales = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scales.clamp(min=TINY)).round().to(torch.int8), scales


def quantize_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (n, 32) in uint8, two per byte, and scales (n,) of blocks (n, 64)."""
    scales = blocks.abs().amax(1)  # (n,)
    # As bitsandbytes rounds: with the reciprocal, and bounds between levels in float32.
    scaled = (blocks * (1 / scales.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    bounds = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(blocks.device)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)  # (n, 64)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Return one weight with the rows of several, or None if their blocks do not end with their rows."""
    first, shape = weights[0], (sum(w.shape[0] for w in weights), weights[0].shape[1])
    whole_blocks = all(w.n_weights % BLOCK == 0 for w in weights)
    if not (isinstance(first, Int8Weight) or (type(first) is NF4Weight and whole_blocks)):
        return None
    joined = type(first)(shape, first.scales.device)
    joined.codes, joined.scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
    return joined
