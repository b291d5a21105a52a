"""Encoder: every token sees every other (BERT, Devlin et al. 2018, arXiv:1810.04805). Heads on top: heads.py."""

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from seqfuse.models.base import Model, check_ids
from seqfuse.models.blocks import BlockConfig, Context, Stack
from seqfuse.models.projections import project


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BlockConfig):
    """BERT's settings by default. token_types: kinds of segments, 0 for none. pooler: a dense layer with tanh over the
    first token, which BERT's classifiers read. The rest: see BlockConfig."""

    model: ClassVar[str] = "Encoder"

    norm_first: bool = False
    embedding_norm: bool = True
    eps: float = 1e-12
    max_positions: int = 512
    token_types: int = 2
    pooler: bool = False


class Encoder(Model):
    """ids int64 [B, T] -> hidden states [B, T, d]. With lengths, no token sees the padding behind its row."""

    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.stack = Stack(config, causal=False, token_types=config.token_types)
        self.pooler = nn.Linear(config.width, config.width) if config.pooler else None

    def hidden(self, ids, lengths=None, types=None):
        """types: int64 [B, T], the segment of each token; by default 0."""
        check_ids(self, ids, lengths)
        return self.stack(ids, Context(lengths=lengths), types)

    def forward(self, ids, lengths=None, types=None):
        return self.hidden(ids, lengths, types)

    def pooled(self, x):
        """hidden states [B, T, d] -> one vector for each row [B, d], from its first token."""
        if self.pooler is None:
            raise ValueError("Encoder: it has no pooler (pooler=True in its config)")
        return torch.tanh(project(self.pooler, x[:, 0]))

    def output_weights(self):
        return self.stack.embedding.weight, None
