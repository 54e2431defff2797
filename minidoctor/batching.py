"""Examples to padded batches, in a seeded order that can be restarted at any step.

`targets[t]` is the token that follows `tokens[t]` if that token belongs to an answer or ends it, else IGNORE. The
answer positions are those with a target: from the last token of a prompt to the last but one of its answer. The
contents of a batch are a function of the seed and the step alone, so a resumed run needs no other record of its
position in the data.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # the target that torch's cross-entropy leaves out


class Example(NamedTuple):
    """One tokenized conversation."""

    tokens: list[int]
    targets: list[int]


class Batch(NamedTuple):
    """Examples padded on the right: under a causal mask no token ever attends to the padding."""

    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), False on padding; for the losses, as causal attention needs none
    answer_positions: Tensor  # (n,), indices into the B*T flattened positions; a GPU would have to count them

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(examples: list[Example]) -> Batch:
    """Pad the examples to the length of the longest."""
    tokens = pad_sequence([torch.tensor(e.tokens) for e in examples], batch_first=True)  # (B, T)
    targets = pad_sequence([torch.tensor(e.targets) for e in examples], batch_first=True, padding_value=IGNORE)
    lengths = torch.tensor([len(e.tokens) for e in examples])  # (B,)
    attention_mask = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
    return Batch(tokens, targets, attention_mask, (targets.flatten() != IGNORE).nonzero().squeeze(1))


def micro_batches(examples: list[Example], n: int) -> list[Batch]:
    """Split the examples of one step, sorted by length, into at most n batches for gradient accumulation."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    size = math.ceil(len(by_length) / n)
    return [collate(by_length[i : i + size]) for i in range(0, len(by_length), size)]


class ShuffledBatches:
    """Batches that contain every example once per epoch, in an order drawn from the seed and the epoch.

    To keep padding low, the shuffled examples are sorted by length within windows of 16 batches, cut into batches,
    and the batches are shuffled.
    """

    window = 16

    def __init__(self, examples: list[Example], batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.per_epoch = math.ceil(len(examples) / batch_size)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the batches of an epoch as indices of examples."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        size, batches = self.window * self.batch_size, []
        for start in range(0, len(order), size):
            by_length = sorted(order[start : start + size], key=lambda i: len(self.examples[i].tokens))
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def starting_at(self, step: int) -> Iterator[list[Example]]:
        """Yield the examples of step, step + 1, ... without end."""
        while True:
            number, offset = divmod(step, self.per_epoch)
            for batch in self.epoch(number)[offset:]:
                yield [self.examples[i] for i in batch]
                step += 1
