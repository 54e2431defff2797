"""Upcasting where half precision is not enough. The plain form is `x.float()`."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32 and float64 unchanged, so that a float64 model computes in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
