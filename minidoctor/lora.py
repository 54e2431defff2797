"""LoRA experts: E low-rank updates of one frozen linear layer, computed as one wide LoRA.

    y = W x + (alpha / R) * sum_e  g_e * B_e A_e x

The sum over experts is a single matrix product. Stack the matrices A_e (R, D_in) into one (E*R, D_in), place the
matrices B_e (D_out, R) side by side in one (D_out, E*R), and multiply the E*R hidden values by the gates in between.
An expert that was not chosen has gate 0 and contributes nothing, so the result is exactly top-k, without a loop,
a gather or a host-device synchronization. The price is that the hidden values of all E experts are computed; E*R is
small next to D_in. With one expert this is plain LoRA.

LoRA: https://arxiv.org/abs/2106.09685, section 4.1.
"""

import math

import torch
from torch import Tensor, nn

from minidoctor.config import AdapterConfig
from minidoctor.ops.linear import Linear, linear


class LoRAExperts(Linear):
    """A frozen linear layer plus E gated low-rank experts.

    It is a subclass of the linear layer, so that the frozen weight keeps its name in the pretrained checkpoint.
    """

    def __init__(self, d_in: int, d_out: int, n_experts: int, rank: int, alpha: float, bias: bool = False):
        super().__init__(d_in, d_out, bias)
        self.requires_grad_(False)
        self.rank = rank
        self.scale = alpha / rank  # keeps the size of the update roughly constant when the rank changes
        # Always created on the CPU: the same seed then gives the same experts on every device, and a model whose
        # frozen part is still on the device "meta" has real experts.
        self.lora_a = nn.Parameter(torch.empty(n_experts * rank, d_in, device="cpu"))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the LoRA authors' code
        # B = 0 makes every update 0 at step 0, so training starts from exactly the pretrained model.
        self.lora_b = nn.Parameter(torch.zeros(d_out, n_experts * rank, device="cpu"))

    def forward(self, x: Tensor, gates: Tensor | None = None, frozen: Tensor | None = None) -> Tensor:
        """(B, T, D_in) and gates (B, T, E) -> (B, T, D_out). Without gates every expert has gate 1 (plain LoRA).

        `frozen` (B, T, D_out) is the product of the frozen layer, if it is already computed, and is overwritten.
        """
        # The parameters stay in float32 for the optimizer and are cast to the dtype of x at use.
        lora_a, lora_b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        rows = x.flatten(0, -2)  # (N, D_in)
        hidden = linear(rows, lora_a)  # (N, E*R)
        if gates is not None:
            gates = gates.flatten(0, -2).to(x.dtype).unsqueeze(-1)  # (N, E, 1)
            hidden = (hidden.unflatten(-1, (-1, self.rank)) * gates).flatten(-2)  # (N, E*R)
        # Added in place to an output that the backward pass does not need: a separate (N, D_out) update would be
        # written and read again.
        y = super().forward(rows) if frozen is None else frozen.flatten(0, -2)
        y.addmm_(hidden, lora_b.T, alpha=self.scale)  # (N, D_out)
        return y.unflatten(0, x.shape[:-1])  # (B, T, D_out)


def make_linear(d_in: int, d_out: int, name: str, adapter: AdapterConfig | None, bias: bool = False) -> Linear:
    if adapter and name in adapter.targets:
        return LoRAExperts(d_in, d_out, adapter.n_experts, adapter.rank, adapter.alpha, bias)
    return Linear(d_in, d_out, bias)
