"""What a model remembers between steps of generation.

Every cache has `lengths` (int64 [B], the tokens that each row has seen) and `reorder(index)`: row i becomes what row
index[i] was. index: int64 [B'], B' may differ from B. Beam search needs no more than that, of any model.
"""

import torch

from seqfuse import ops


class KVCache:
    """Keys and values of every layer, in room that is allocated once: [B, Hkv, capacity, D] each.

    A prompt goes in as a whole, padded on the right; then every step writes one key and attends over all of them. Keys
    of padding lie behind a row's length, where nobody reads, and are written over.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.used = 0  # no row has written further: known without waiting for a device

    @classmethod
    def of(cls, config, B: int, capacity: int | None, like: torch.Tensor):
        """For a model of this config, with weights like `like`; no capacity: the longest sequence that it takes."""
        shape = (B, config.Hkv, capacity or config.max_positions, config.D)
        return cls(config.layers, shape, like.dtype, like.device)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def attend(self, layer: int, q, k, v):
        """Causal attention of T new tokens, which are kept: q [B, H, T, D], k, v [B, Hkv, T, D] -> [B, H, T, D]."""
        keys, values = self.keys[layer], self.values[layer]
        if self.used:
            return ops.attention_with_kv_cache(q, keys, values, k, v, cache_lengths=self.lengths)
        keys[:, :, : k.shape[2]] = k
        values[:, :, : v.shape[2]] = v
        return ops.attention(q, k, v, causal=True)  # nothing before it: the kernel for whole sequences

    def advance(self, T: int, lengths=None) -> None:
        """All layers have attended T tokens, of which row b keeps lengths[b] (None: all)."""
        self.lengths = self.lengths + (T if lengths is None else lengths)
        self.used += T

    def reorder(self, index) -> None:
        self.keys = [self._gathered(t, index) for t in self.keys]
        self.values = [self._gathered(t, index) for t in self.values]
        self.lengths = self.lengths[index]

    def _gathered(self, t, index):
        rows = t[:, :, : self.used].index_select(0, index)  # only what has been written
        if len(index) != len(t):
            t = t.new_empty(len(index), *t.shape[1:])
        t[:, :, : self.used] = rows
        return t


class CrossCache(KVCache):
    """A KVCache that also has the keys and values of a source, computed once: [S, Hkv, Ts, D] for every layer."""

    sources: list  # of (keys, values)
    source_lengths: torch.Tensor  # int64 [B]
    source_of: torch.Tensor  # int64 [B]: which source each row has

    def read(self, sources, source_lengths) -> None:
        self.sources, self.source_lengths = sources, source_lengths
        self.source_of = torch.arange(len(source_lengths), device=source_lengths.device)

    def attend_source(self, layer: int, q):
        """q [B, H, T, D] -> [B, H, T, D], over the source's keys."""
        k, v = self.sources[layer]
        return ops.attention_with_kv_cache(q, k, v, cache_lengths=self.source_lengths, causal=False)

    def reorder(self, index) -> None:
        super().reorder(index)
        of = self.source_of[index]
        if not torch.equal(of, self.source_of):  # beams of one source change places: their keys need not move
            self.sources = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.sources]
            self.source_lengths, self.source_of = self.source_lengths[index], of
