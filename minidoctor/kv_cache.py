"""The KV cache: keys and values of the positions computed so far, for each layer.

Each row of a batch has its own positions, and the keys of row b are written at `positions[b]`. Prompts of different
lengths are padded on the right. Tokens generated later overwrite the padding; before that no token attends to the
padding, which has greater positions than every token of its row.
"""

from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    keys: Tensor  # (B, G, S, C)
    values: Tensor  # (B, G, S, C)

    def append(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, C) at the positions of index (B, G, T, C) and return all S keys and values."""
        return self.keys.scatter_(2, index, k), self.values.scatter_(2, index, v)


class KVCache:
    """The cache of all layers, with the number of positions in use."""

    def __init__(self, config: ModelConfig, batch_size: int, max_seq_len: int, like: Tensor):
        shape = (batch_size, config.n_kv_heads, max_seq_len, config.head_dim)  # (B, G, S, C)
        # Not like.new_zeros, which shards the cache if `like` is sharded.
        zeros = partial(torch.zeros, shape, dtype=like.dtype, device=like.device)
        self.layers = [LayerCache(zeros(), zeros()) for _ in range(config.n_layers)]
        self.size = max_seq_len
        self.length = 0  # positions in use by the longest row; attention covers only these
        self.rotary: tuple[Tensor, Tensor] | None = None  # (1, 1, S, C), computed at the first use
        self.votes: Tensor | None = None  # (B, S + 1, J), sums before each position; made at the first use

    def reserve(self, n_rows: int, n_tokens: int) -> list[LayerCache]:
        """Count n_tokens more positions as in use, at most all, and return the first n_rows rows for each layer."""
        self.length = min(self.length + n_tokens, self.size)
        return [LayerCache(*(stored[:n_rows, :, : self.length] for stored in layer)) for layer in self.layers]

    def add_votes(self, votes: Tensor, positions: Tensor) -> Tensor:
        """Return the sums of votes (B, T, J) up to each of the positions (B or 1, T), which follow on each other."""
        if self.votes is None:
            self.votes = votes.new_zeros(len(self.layers[0].keys), self.size + 1, votes.shape[-1])
        index, stored = positions.unsqueeze(-1).expand_as(votes), self.votes[: len(votes)]  # (B, T, J)
        sums = stored.gather(1, index[:, :1]) + votes.cumsum(1)  # (B, T, J)
        stored.scatter_(1, index + 1, sums)
        return sums

    def fix_shapes(self) -> None:
        """Let attention cover all positions from now on, so that the shapes no longer depend on the length.

        The tokens then need a mask, which they have if their positions are given.
        """
        self.length = self.size
        for stored in chain(*self.layers, [] if self.votes is None else [self.votes]):
            torch._dynamo.mark_static_address(stored)  # a CUDA graph writes into it and does not copy it

    def expand(self, config: ModelConfig, batch_size: int, max_seq_len: int) -> "KVCache":
        """Return a larger cache in which every row starts with this cache's only row."""
        cache = KVCache(config, batch_size, max_seq_len, self.layers[0].keys)
        cache.length = self.length
        if self.votes is not None:
            cache.votes = F.pad(self.votes.expand(batch_size, -1, -1), (0, 0, 0, max_seq_len - self.size))
        for target, source in zip(chain.from_iterable(cache.layers), chain.from_iterable(self.layers), strict=True):
            target[:, :, : self.length] = source[:, :, : self.length]
        return cache
