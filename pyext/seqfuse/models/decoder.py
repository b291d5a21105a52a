"""Decoder: a language model that predicts the next token. GPT-2 and Llama are two settings of it.

            positions  norm   activation  kv_heads  biases
GPT-2       learned    layer  gelu_tanh   heads     yes
Llama       rope       rms    swiglu      fewer     no
"""

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from seqfuse.models.base import Model, check_capacity, check_ids
from seqfuse.models.blocks import BlockConfig, Context, Stack
from seqfuse.models.cache import KVCache
from seqfuse.models.projections import multiply


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """tied: the output projection is the embedding. The rest: see BlockConfig."""

    model: ClassVar[str] = "Decoder"

    tied: bool = True


class Decoder(Model):
    """ids int64 [B, T] -> logits [B, T, V] of the tokens that come next.

    Rows may be padded on the right; padding is never looked back at, so lengths may be left out.
    """

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.stack = Stack(config, causal=True)
        self.output = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)

    def hidden(self, ids, lengths=None):
        check_ids(self, ids, lengths)
        return self.stack(ids)

    def output_weights(self):
        return (self.stack.embedding if self.output is None else self.output).weight, None

    @torch.no_grad()
    def begin(self, ids, lengths=None, capacity=None):
        """A prompt, int64 [B, T], goes in: (logits of the next token, float32 [B, V], the cache for step()).

        capacity: tokens that the cache has room for, the prompt's among them; by default max_positions.
        """
        check_ids(self, ids, lengths)
        check_capacity(self, capacity, ids.shape[1])
        B, T = ids.shape
        cache = KVCache.of(self.config, B, capacity, like=self.stack.embedding.weight)
        x = self.stack(ids, Context(cache=cache))  # (B, T, d)
        cache.advance(T, lengths)
        x = x[:, -1] if lengths is None else x[torch.arange(B, device=x.device), lengths - 1]  # (B, d)
        return self.logits(x), cache

    @torch.no_grad()
    def step(self, ids, cache):
        """One more token for every row, int64 [B]: logits of the next, float32 [B, V]."""
        x = self.stack(ids[:, None], Context(cache=cache, positions=cache.lengths[:, None]))  # (B, 1, d)
        cache.advance(1)
        return self.logits(x[:, 0])

    def logits(self, x):
        """x [B, d] -> float32 [B, V]."""
        return multiply(x, *self.output_weights()).float()
