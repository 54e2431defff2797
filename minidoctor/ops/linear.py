"""y = x W^T + b, also fast for few rows, for quantized weights, and for several layers of the same input.

The plain form is F.linear(x, W, b). Decoding at batch size 1 is memory-bound: each token should cost one read of W.
On a CPU, F.linear of one row reads W at a third of the memory bandwidth. The product W x^T, split over the rows of W
into one part per thread, reads it at full bandwidth and is faster for up to about a hundred rows. Under torch.compile,
a sum per output is fastest for one row: the compiler makes it, with the norm before it, one loop over W. For several
rows that loop is slower.

All weights of SmolLM2-135M once, float32, 2 cores (AMD EPYC, torch 2.13, 2026-11-25), lower bound 16.5 ms:
1 row 45 -> 16.5 ms, 4 rows 62 -> 23, 8 rows 66 -> 40, 64 rows 162 -> 139, 128 rows 272 -> 243.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidoctor.ops import quantized
from minidoctor.ops.quantized import QuantizedWeight

FEW_ROWS = 128
N_PARTS = 16  # more than most CPUs have threads; a divisor of most widths


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D_in), weight (D_out, D_in) -> (..., D_out)."""
    rows = x.reshape(-1, x.shape[-1])  # (n, D_in)
    if len(rows) > FEW_ROWS or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    compiling = torch.compiler.is_compiling()
    if compiling and len(rows) == 1:
        y = (weight * rows).sum(-1)  # (D_out,)
    else:
        n_parts = 1 if compiling or len(weight) % N_PARTS else N_PARTS  # the compiler would copy x for each part
        columns = rows.contiguous().t().expand(n_parts, -1, -1)  # (P, D_in, n)
        y = torch.bmm(weight.unflatten(0, (n_parts, -1)), columns)  # (P, D_out/P, n)
        y = y.flatten(0, 1).t().contiguous()  # (n, D_out)
    y = y.view(*x.shape[:-1], -1)  # (..., D_out)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """torch's linear layer, computed by `linear` or, if the weight is quantized, by that."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True):
        super().__init__(d_in, d_out, bias)
        self.quantized: QuantizedWeight | None = None  # in place of `weight`, which then has no rows
        self.joined: Tensor | None = None  # `weight` is a view of some of its rows
        self.rows: slice | None = None  # of `quantized`, if several layers share it

    def quantize(self, kind: str, dtype: torch.dtype, device: torch.device | str) -> QuantizedWeight:
        """Replace the weight by a quantized one for another matrix to be stored, and return it."""
        self.quantized = quantized.FORMS[kind](self.weight.shape, device)
        self.weight = nn.Parameter(torch.empty(0, self.in_features, dtype=dtype, device=device), requires_grad=False)
        return self.quantized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        """Convert or move the layer, as `model.to` does. A copy of the weight is not a view of the joined matrix."""
        self.joined = None
        return super()._apply(fn, recurse)

    def share(self, layer: "Linear") -> None:
        """Use the weight of another layer if it is quantized, and the matrix that its weight is joined in."""
        self.joined, self.rows = layer.joined, layer.rows
        if layer.quantized:
            self.quantized, self.weight = layer.quantized, layer.weight

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (D_out, D_in), dequantized if it is quantized."""
        return self.weight if self.quantized is None else self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if self.quantized is None:
            return linear(x, self.weight, self.bias)
        y = self.quantized(x) if self.rows is None else self.quantized(x)[..., self.rows]
        return y if self.bias is None else y + self.bias


def join_projections(model: nn.Module) -> None:
    """Join q, k and v, and gate and up, which have the same input, for one product at inference: `joined_product`."""
    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if hasattr(module, names[0]):
                join([getattr(module, name) for name in names])


def join(layers: Sequence[Linear]) -> None:
    """Store the weights of several layers as one matrix, of which their weights become views."""
    sizes = [layer.out_features for layer in layers]
    weights = [layer.quantized for layer in layers if layer.quantized]
    if not weights:
        whole = torch.cat([layer.weight.detach() for layer in layers])
        for layer, rows in zip(layers, whole.split(sizes), strict=True):
            layer.weight, layer.joined = nn.Parameter(rows, layer.weight.requires_grad), whole
    elif joined := quantized.join(weights):
        for i, layer in enumerate(layers):
            layer.quantized, layer.rows = joined, slice(sum(sizes[:i]), sum(sizes[: i + 1]))


def joined_product(layers: Sequence[Linear], x: Tensor) -> list[Tensor] | None:
    """Return W x + b of each layer, from one product, or None if they are not joined or gradients are recorded."""
    first = layers[0]
    if torch.is_grad_enabled():
        return None
    if first.joined is not None:
        y = linear(x, first.joined)
    elif first.quantized and first.rows:
        y = first.quantized(x)
    else:
        return None
    parts = y.split([layer.out_features for layer in layers], dim=-1)
    return [part if layer.bias is None else part + layer.bias for layer, part in zip(layers, parts, strict=True)]
