"""What a model remembers between steps of generation.

Every cache has `lengths` (int64 [B], the tokens that each row has seen) and `reorder(index)`: row i becomes what row
index[i] was. index: int64 [B'], B' may differ from B. Beam search needs no more than that, of any model.
"""

import torch

from seqfuse import ops


class KVCache:
    """Keys and values of every layer, in room that is allocated once: [B, Hkv, capacity, D] each.

    A prompt goes in by fill(), padded on the right; then every step writes one key and attends over all of them. Keys
    of padding lie behind a row's length, where nobody reads, and are written over.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.used = 0  # no row has written further: known without waiting for a device

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def fill(self, layer: int, k, v) -> None:
        """The prompt's keys and values, [B, Hkv, T, D]."""
        self.keys[layer][:, :, : k.shape[2]] = k
        self.values[layer][:, :, : v.shape[2]] = v

    def filled(self, lengths, T: int) -> None:
        """After fill() of all layers: row b has lengths[b] of the T tokens (None: all of them)."""
        self.lengths = torch.full_like(self.lengths, T) if lengths is None else lengths.clone()
        self.used = T

    def attend(self, layer: int, q, k, v, **options):
        """Write k, v [B, Hkv, 1, D] behind what each row has, and attend: q [B, Hq, 1, D] -> [B, Hq, 1, D]."""
        return ops.attention_with_kv_cache(
            q, self.keys[layer], self.values[layer], k, v, cache_lengths=self.lengths, **options
        )

    def advance(self) -> None:
        """After attend() of all layers."""
        self.lengths += 1
        self.used += 1

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
