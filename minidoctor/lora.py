"""LoRA experts: E small low-rank updates of one frozen linear layer, stored as one wide LoRA.

    y = W x + (alpha / R) * sum_e  g_e * B_e A_e x

The sum over experts is one matrix product: stack the E matrices A_e (R, D_in) into one (E*R, D_in),
lay the E matrices B_e (D_out, R) side by side into one (D_out, E*R), and multiply the E*R hidden
values by their expert's gate in between. An expert that was not chosen has gate 0 and adds nothing:
no loop, no gather, exactly the top-k result. With one expert it is plain LoRA.

LoRA: https://arxiv.org/abs/2106.09685, section 4.1.
Shapes: D_in and D_out are the frozen layer's own.
"""

import math

import torch
from torch import Tensor, nn

from minidoctor.linear import Linear, product


class LoRAExperts(Linear):
    """A frozen linear layer plus E gated low-rank experts. With all gates 0 it is the plain layer.

    A subclass, so that the frozen weight keeps the name it has in the pretrained checkpoint.
    """

    def __init__(self, d_in: int, d_out: int, n_experts: int, rank: int, alpha: float, bias: bool = False):
        super().__init__(d_in, d_out, bias)
        self.requires_grad_(False)
        self.rank = rank
        self.scale = alpha / rank  # keeps the update's size roughly the same when rank changes
        # On the CPU whatever the device of the rest: the same seed gives the same experts everywhere,
        # and a model whose frozen part is still without memory (device "meta") has real experts.
        self.lora_a = nn.Parameter(torch.empty(n_experts * rank, d_in, device="cpu"))
        self.lora_b = nn.Parameter(torch.zeros(d_out, n_experts * rank, device="cpu"))
        # B = 0 makes every expert a no-op at step 0, so training starts from the pretrained model.
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the LoRA authors' code

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """(B, T, D_in) and gates (B, T, E) -> (B, T, D_out). Without gates all experts serve: plain LoRA."""
        # The experts stay in float32 for the optimizer and are used in the dtype of x.
        lora_a, lora_b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        rows = x.flatten(0, -2)  # (N, D_in)
        hidden = product(rows, lora_a)  # (N, E*R)
        if gates is not None:
            gates = gates.flatten(0, -2).to(x.dtype).unsqueeze(-1)  # (N, E, 1)
            hidden = (hidden.unflatten(-1, (-1, self.rank)) * gates).flatten(-2)  # (N, E*R)
        # Added in place to the frozen layer's output, which nothing else holds: written apart and added, the wide
        # result would cross the memory four more times.
        y = super().forward(rows).addmm_(hidden, lora_b.T, alpha=self.scale)  # (N, D_out)
        return y.unflatten(0, x.shape[:-1])  # (B, T, D_out)
