"""What a model remembers between steps of generation.

Every cache has `reorder(index, grouped=False)`: row i becomes what row index[i] was. index: int64 [B'], B' may differ
from B. grouped: a promise that rows of one source or prompt stand together, as many of each and in the order of these,
before and after, as the beams of a search do: what they share need not move. Beam search needs no more, of any model.
For a CUDA graph (captured.py) a cache also gives its tensors(), takes others of their shapes by put(), and hears by
replayed() of a step that ran without the model.
"""

import torch

from seqfuse import ops
from seqfuse.ops.autograd import autocast_is_on


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
    def of(cls, config, B: int, capacity: int | None, like: torch.Tensor, layers: int | None = None):
        """For a model of this config, of the dtype that projections of `like` have, on its device; no capacity: the
        longest that it takes."""
        shape = (B, config.Hkv, capacity or config.max_positions, config.D)
        converted = autocast_is_on(like) and like.dtype != torch.float64
        dtype = torch.get_autocast_dtype(like.device.type) if converted else like.dtype
        return cls(layers or config.layers, shape, dtype, like.device)

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

    def reorder(self, index, grouped: bool = False) -> None:
        self.keys = [self._gathered(t, index) for t in self.keys]
        self.values = [self._gathered(t, index) for t in self.values]
        self.lengths = self.lengths[index]

    def tensors(self) -> list[torch.Tensor]:
        return [*self.keys, *self.values, self.lengths]

    def put(self, tensors: list[torch.Tensor]) -> None:
        n = len(self.keys)
        self.keys, self.values, self.lengths = tensors[:n], tensors[n : 2 * n], tensors[2 * n]

    def replayed(self) -> None:
        self.used += 1

    def _gathered(self, t, index):
        rows = t[:, :, : self.used].index_select(0, index)  # only what has been written
        if len(index) != len(t):
            t = t.new_empty(len(index), *t.shape[1:])
        t[:, :, : self.used] = rows
        return t


class CrossCache(KVCache):
    """A KVCache that also has the keys and values of S sources, computed once: [S, Hkv, Ts, D] for every layer.

    Rows that stand together may share a source, as beams do: its keys are neither copied nor moved for them.
    """

    def read(self, sources, source_lengths) -> None:
        """sources: (keys, values) of every layer; source_lengths: int64 [S]."""
        self.sources = [(k.contiguous(), v.contiguous()) for k, v in sources]
        self.source_lengths = source_lengths

    def attend_source(self, layer: int, q):
        """q [S n, H, 1, D] -> [S n, H, 1, D], over the keys of the source of each n rows."""
        k, v = self.sources[layer]
        beams = q.unflatten(0, (len(k), -1)).squeeze(3).transpose(1, 2)  # (S, H, n, D)
        y = ops.attention_with_kv_cache(beams, k, v, cache_lengths=self.source_lengths, causal=False)
        return y.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    def reorder(self, index, grouped: bool = False) -> None:
        of = index // (len(self.lengths) // len(self.source_lengths))  # the source of each new row
        super().reorder(index)
        if grouped:
            return
        self.sources = [(k.index_select(0, of), v.index_select(0, of)) for k, v in self.sources]
        self.source_lengths = self.source_lengths[of]

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *(t for pair in self.sources for t in pair), self.source_lengths]

    def put(self, tensors: list[torch.Tensor]) -> None:
        own = 2 * len(self.keys) + 1
        super().put(tensors[:own])
        *sources, self.source_lengths = tensors[own:]
        self.sources = list(zip(sources[::2], sources[1::2], strict=True))
