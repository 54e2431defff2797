"""Products of int8 weights on a CPU, by fbgemm or, on ARM, qnnpack. The plain form is that of ops/quantized.py.

Both multiply 8-bit activations. These are too few bits for the outliers of a transformer: perplexity would rise by 2 %
(127 levels) to 15 % (63 levels). Here each activation has two digits, x = step * (high + low / (2 * digit)), and high
and low are two rows of one product. Decoding reads the weights once all the same, and rows stay independent of the
other rows of a batch. The result differs from the plain form by at most

    max_j |x_j| * sum_j |w_ij| / (4 * digit^2)        digit = 127, or 63 where larger products saturate

and by float32 rounding. Outliers of activations: https://arxiv.org/abs/2208.07339, section 3.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidoctor.config import TINY
from minidoctor.ops.quantized import Int8Weight, QuantizedWeight

ENGINES = ("fbgemm", "qnnpack")  # of torch.backends.quantized, the first one is used that the machine has


class PackedInt8Weight(QuantizedWeight):
    """The codes of an Int8Weight as an engine stores them, and its scales."""

    def __init__(self, weight: Int8Weight, engine: str, digit: int):
        super().__init__(weight.shape, weight.codes.new_empty(0), weight.scales)
        self.engine, self.digit = engine, digit
        previous, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
        with warnings.catch_warnings():  # quantized tensors are deprecated, their products are not yet
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(weight.scales), dtype=torch.long)
            codes = torch._make_per_channel_quantized_tensor(weight.codes, weight.scales[:, 0].double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(codes, None)
        torch.backends.quantized.engine = previous

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (D_out, D_in)."""
        return (torch.ops.quantized.linear_unpack(self.packed)[0].int_repr() * self.scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if x.requires_grad and torch.is_grad_enabled():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).float()  # (n, D_in)
        step = rows.abs().amax(1, keepdim=True).clamp_(min=TINY) / self.digit  # (n, 1)
        scaled = rows / step
        high = scaled.round()
        digits = torch.cat([high, (scaled - high) * (2 * self.digit)])  # (2n, D_in), rounded by the product
        high, low = self.multiply(digits).chunk(2)  # (n, D_out)
        y = torch.add(high, low, alpha=0.5 / self.digit) * step
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def multiply(self, digits: Tensor) -> Tensor:
        """Round numbers (n, D_in) of -digit ... digit to integers and return their product (n, D_out)."""
        if self.engine == "fbgemm":
            return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                digits, 1.0, self.digit + 1, self.packed
            )
        # qnnpack has no product with a given step. It divides the range of all elements into 255 steps, so one more row
        # makes the range -128 ... 127. NaN would be an error; here it is still in `step`.
        limits = F.pad(digits.new_tensor([[-128.0, 127.0]]), (0, digits.shape[1] - 2))  # (1, D_in)
        return torch.ops.quantized.linear_dynamic(torch.cat([digits.nan_to_num(), limits]), self.packed)[:-1]


def pack_int8(model: nn.Module) -> bool:
    """Replace the int8 weights of a model by packed ones. Return False if there are none, or no product for them."""
    weights = [module for module in model.modules() if isinstance(module, Int8Weight)]
    engines = [engine for engine in ENGINES if engine in torch.backends.quantized.supported_engines]
    if not weights or not engines or any(weight.scales.device.type != "cpu" for weight in weights):
        return False
    # Without VNNI, fbgemm sums pairs of products in 16 bits, which two of the largest digits exceed.
    probe, ones = Int8Weight((16, 64)), torch.ones(16, 64)
    probe.store(ones)
    digit = 127 if torch.allclose(PackedInt8Weight(probe, engines[0], 127)(ones), ones @ ones.T) else 63
    packed: dict[Int8Weight, PackedInt8Weight] = {}  # layers can share a weight
    for module in list(model.modules()):
        for name, weight in module.named_children():
            if isinstance(weight, Int8Weight):
                if weight not in packed:
                    packed[weight] = PackedInt8Weight(weight, engines[0], digit)
                    weight.codes = weight.codes.new_empty(0)
                setattr(module, name, packed[weight])
    return True
