"""The KV cache: keys and values of the positions computed so far, for each layer.

Each row of a batch has its own positions, and the keys of row b are written at `positions[b]`. Prompts of different
lengths are padded on the right. Tokens generated later overwrite the padding; before that no token attends to the
padding, which has greater positions than every token of its row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minidoctor.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer, as views into a KVCache."""

    keys: Tensor  # (B, G, S, C)
    values: Tensor  # (B, G, S, C)

    def append(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, C) at the positions of index (B, G, T, C) and return all S keys and values."""
        return self.keys.scatter_(2, index, k), self.values.scatter_(2, index, v)


class KVCache:
    """The cache of all layers, with the number of positions in use."""

    def __init__(self, config: ModelConfig, batch_size: int, max_seq_len: int, like: Tensor):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_seq_len, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.length = 0  # positions in use by the longest row; attention covers only these

    def reserve(self, n_rows: int, n_tokens: int) -> list[LayerCache]:
        """Count n_tokens more positions as in use, at most all, and return the first n_rows rows for each layer."""
        self.length = min(self.length + n_tokens, self.keys.shape[3])
        keys, values = (stored[:, :n_rows, :, : self.length] for stored in (self.keys, self.values))
        return [LayerCache(*layer) for layer in zip(keys.unbind(), values.unbind(), strict=True)]

    def expand(self, config: ModelConfig, batch_size: int, max_seq_len: int) -> "KVCache":
        """Return a larger cache in which every row starts with this cache's only row."""
        cache = KVCache(config, batch_size, max_seq_len, self.keys)
        cache.length = self.length
        cache.keys[:, :, :, : self.length] = self.keys[:, :, :, : self.length]
        cache.values[:, :, :, : self.length] = self.values[:, :, :, : self.length]
        return cache
