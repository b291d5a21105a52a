"""Transformer: the encoder-decoder of "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762).

    source -> encoder (every token sees every other) -> memory
    target -> decoder (a token sees those before it, and the memory) -> logits of the next token

Marian's and BART's models are settings of it. Norms after each sum as in the paper, or before each branch
(norm_first=True), which trains without warm-up.
"""

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import nn

from seqfuse import ops
from seqfuse.models.base import Model, check_capacity, check_ids
from seqfuse.models.blocks import MOST_LAYERS, BlockConfig, Context, Stack
from seqfuse.models.cache import CrossCache
from seqfuse.models.projections import multiply


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """The paper's settings by default. layers: of the encoder; decoder_layers: None for as many.

    start_id: what every target starts with, None for bos_id; one of them must be given. source_vocab: of the source,
    where it has tokens of its own; None: source and target share vocab and embedding. tied: the output projection is
    the target's embedding. output_bias: of the logits. The rest: see BlockConfig.
    """

    model: ClassVar[str] = "Transformer"
    encoder_decoder: ClassVar[bool] = True

    norm_first: bool = False
    positions: Literal["learned", "sinusoidal", "rope"] = "sinusoidal"
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"] = "relu"
    scale_embeddings: bool = True
    decoder_layers: int | None = None
    start_id: int | None = None
    source_vocab: int | None = None
    tied: bool = True
    output_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.positive("decoder_layers", "source_vocab")
        few = (self.decoder_layers or 1) <= MOST_LAYERS
        self.require(few, f"decoder_layers must be at most {MOST_LAYERS}, got {self.decoder_layers}")
        self.require(self.start is not None, "start_id or bos_id must be given: every target starts with it")

    @property
    def start(self) -> int | None:
        return self.bos_id if self.start_id is None else self.start_id


class Transformer(Model):
    """(src int64 [B, Ts], tgt int64 [B, T]) -> logits [B, T, V] of the tokens that come after those of tgt.

    tgt starts with config.start. src_lengths, tgt_lengths: int64 [B] where rows are padded on the right; the padding of
    targets is never looked back at, so tgt_lengths may be left out.
    """

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.encoder = Stack(config, causal=False, vocab=config.source_vocab)
        self.decoder = Stack(config, causal=True, cross=True, layers=config.decoder_layers)
        if config.source_vocab is None:
            self.decoder.embedding = self.encoder.embedding
        self.output = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab)) if config.output_bias else None

    def encode(self, src, src_lengths=None):
        """src [B, Ts] -> memory [B, Ts, d]."""
        check_ids(self, src, src_lengths, "src", self.config.source_vocab)
        return self.encoder(src, Context(lengths=src_lengths))

    def hidden(self, src, tgt, src_lengths=None, tgt_lengths=None):
        memory = self.encode(src, src_lengths)  # (B, Ts, d)
        check_ids(self, tgt, tgt_lengths, "tgt")
        return self.decoder(tgt, Context(memory=memory, source_lengths=src_lengths))  # (B, T, d)

    def forward(self, src, tgt, src_lengths=None, tgt_lengths=None):
        return multiply(self.hidden(src, tgt, src_lengths, tgt_lengths), *self.output_weights())

    def loss(self, src, tgt, targets, src_lengths=None, tgt_lengths=None, **options):
        """Mean cross entropy of `targets`, int64 [B, T] (-100: ignored), in nats, for what goes in as `tgt`.

        Of words w: tgt = start, w_1, w_2 ... and targets = w_1, w_2, ..., eos. options: as in ops.linear_cross_entropy.
        """
        weight, bias = self.output_weights()
        x = self.hidden(src, tgt, src_lengths, tgt_lengths)
        return ops.linear_cross_entropy(x, weight, targets, bias=bias, **options)

    def output_weights(self):
        return (self.decoder.embedding if self.output is None else self.output).weight, self.output_bias

    @torch.no_grad()
    def begin(self, ids, lengths=None, capacity=None):
        """A source, int64 [B, Ts], goes in: (logits of the target's first token, float32 [B, V], the cache for step()).

        capacity: tokens of a target that the cache has room for, the start among them; by default max_positions.
        """
        check_capacity(self, capacity, 1)
        memory = self.encode(ids, lengths)
        B, Ts, _ = memory.shape
        cache = CrossCache.of(self.config, B, capacity, memory, layers=len(self.decoder.blocks))
        lengths = torch.full((B,), Ts, device=ids.device) if lengths is None else lengths
        cache.read([block.cross.keys_and_values(memory) for block in self.decoder.blocks], lengths)
        return self.step(torch.full((B,), self.config.start, device=ids.device), cache), cache

    @torch.no_grad()
    def step(self, ids, cache):
        """One more token for every row, int64 [B]: logits of the next, float32 [B, V]. Padding is never said."""
        x = self.decoder(ids[:, None], Context(cache=cache, positions=cache.lengths[:, None]))  # (B, 1, d)
        cache.advance(1)
        logits = multiply(x[:, 0], *self.output_weights()).float()
        if self.config.pad_id is not None:
            logits[:, self.config.pad_id] = -torch.inf
        return logits

    def step_modules(self):
        return [self.decoder]

    def weight_bytes(self) -> int:
        once = (
            p for block in self.decoder.blocks for p in block.cross.kv.parameters()
        )  # read for a source, not a step
        return super().weight_bytes() - sum(p.numel() * p.element_size() for p in once)
