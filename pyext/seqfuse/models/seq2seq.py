"""The recurrent encoder-decoder, without attention and with each of the attentions that made it famous.

    source -> Embedding -> encoder, in one or two directions -> memory [B, T, H] and the decoder's first state
    target -> Embedding -> decoder -> (attention over the memory) -> logits of the next token

attention
    None        the last state of the encoder is all that the decoder gets (Sutskever et al. 2014, arXiv:1409.3215)
    "dot"       score = h . m                    (Luong et al. 2015, arXiv:1508.04025, section 3.1,
    "general"   score = h . W m                   without the input feeding of section 3.3)
    "additive"  score = v . tanh(Q h + K m)      (Bahdanau et al. 2015, arXiv:1409.0473)

What it costs: Luong's attention comes after the decoder's layers and is not fed back into them, so in training the
decoder runs over all of the target in one call. Bahdanau's context is an input of the next step: a loop over the steps.

Products with the memory, of the keys and of the half of the readout that reads the context, are taken once a source
and not once a step: the readout is tanh(C sum_t a_t m_t + D h + b), and C sum_t a_t m_t = sum_t a_t (C m_t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear

from seqfuse import nn, ops
from seqfuse.models.base import Model, check_ids
from seqfuse.models.projections import multiply, project
from seqfuse.models.recurrent import Recurrent, RecurrentState, RNNConfig, State, output_layer, step_layers
from seqfuse.ops.rnn_cell import StepCell


@dataclass(frozen=True, kw_only=True)
class RNNSeq2SeqConfig(RNNConfig):
    """vocab: of the target. source_vocab: of the source, by default as many. bidirectional: the encoder, of which each
    direction then has half of `hidden`. norm: LayerNorm over the memory and over what the decoder's layers give.
    checkpoint: of the layers' whole calls; the steps of the additive attention keep what they keep."""

    model: ClassVar[str] = "RNNSeq2Seq"
    encoder_decoder: ClassVar[bool] = True

    source_vocab: int | None = None
    attention: Literal["additive", "dot", "general", None] = "general"
    bidirectional: bool = True
    norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.positive("source_vocab")
        self.require(self.bos_id is not None, "bos_id must be given: a target starts with it")
        self.require(not self.bidirectional or self.hidden % 2 == 0, f"hidden must be even, got {self.hidden}")
        one_by_one = self.attention == "additive" and (self.weight_drop or self.dropout_hidden)
        self.require(
            not one_by_one, "attention 'additive' goes step by step, which weight_drop and dropout_hidden can't"
        )

    @property
    def width(self) -> int:
        return self.hidden


class Memory(NamedTuple):
    """A source, as the decoder's steps read it.

    keys: [B, T, H] and values: [B, T, H] of the attention. context: [B, T, H], what is fed back into the layers, of the
    additive attention alone. lengths: int64 [B], or None where no source is padded.
    """

    keys: Tensor
    values: Tensor
    context: Tensor | None
    lengths: Tensor | None


class Seq2SeqState(RecurrentState):
    """The decoder's state, and the memory, which the beams of a source share: it has `beams` rows of state each."""

    def __init__(self, layers: list[State], cells: list[StepCell], memory: Memory | None):
        super().__init__(layers, cells)
        self.memory, self.beams = memory, 1

    def reorder(self, index: Tensor, grouped: bool = False) -> None:
        super().reorder(index)
        if self.memory is None:
            return
        if grouped:
            self.beams = index.shape[0] // self.memory.keys.shape[0]
            return
        source = index // self.beams
        self.memory, self.beams = Memory(*(None if t is None else t[source] for t in self.memory)), 1

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(t for t in self.memory or () if t is not None)]

    def put(self, tensors: list[Tensor]) -> None:
        own = sum(map(len, self.layers))
        super().put(tensors[:own])
        rest = iter(tensors[own:])
        if self.memory is not None:
            self.memory = Memory(*(None if t is None else next(rest) for t in self.memory))


class RNNSeq2Seq(Model):
    """model(src [B, T], tgt [B, U] starting with bos_id, src_lengths=None, tgt_lengths=None) -> logits [B, U, V]."""

    config_class = RNNSeq2SeqConfig

    def __init__(self, config: RNNSeq2SeqConfig):
        super().__init__(config)
        H, attention = config.hidden, config.attention
        self.encoder = Recurrent(config, vocab=config.source_vocab or config.vocab, bidirectional=config.bidirectional)
        self.decoder = Recurrent(config, vocab=config.vocab, extra=H if attention == "additive" else 0)
        if config.norm:
            self.memory_norm, self.decoder_norm = nn.LayerNorm(H), nn.LayerNorm(H)
        if attention is not None:
            self.read_context, self.read_hidden = Linear(H, H, bias=False), Linear(H, H)
        if attention in ("general", "additive"):
            self.keys = Linear(H, H, bias=attention == "additive")
        if attention == "additive":
            self.query, self.score = Linear(H, H, bias=False), Linear(H, 1, bias=False)
        self.output = output_layer(H, config.vocab)

    # ------------------------------------------------------------------------------------------------------- the parts

    def encode(self, src: Tensor, lengths: Tensor | None = None) -> tuple[Memory | None, list[State]]:
        """src: [B, T] int64 -> (the memory, None without attention; the decoder's first state)."""
        check_ids(self, src, lengths, "src", self.config.source_vocab)
        states, last, _ = self.encoder(src, lengths)  # (B, T, H)
        if self.config.attention is None:
            return None, last
        if self.config.norm:
            states = self.memory_norm(states)
        keys = states if self.config.attention == "dot" else self.keys(states)
        context = states if self.config.attention == "additive" else None
        return Memory(keys, self.read_context(states), context, lengths), last

    def weights(self, hidden: Tensor, memory: Memory) -> Tensor:
        """hidden: [B, U, H] of the decoder -> [B, U, T], how much of each place in the source each of them reads."""
        if self.config.attention == "additive":
            mixed = torch.tanh(self.query(hidden)[:, :, None] + memory.keys[:, None])  # (B, U, T, H)
            scores = self.score(mixed)[..., 0]
        else:
            scores = torch.bmm(hidden, memory.keys.transpose(1, 2))
        if memory.lengths is not None:
            padding = torch.arange(scores.shape[-1], device=scores.device) >= memory.lengths[:, None]  # (B, T)
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        return scores.softmax(-1)

    def readout(self, hidden: Tensor, weights: Tensor | None, memory: Memory | None) -> Tensor:
        """[B, U, H] of the decoder's layers and [B, U, T] -> [B, U, H], what the output projection reads."""
        if memory is None:
            return hidden
        read = project(self.read_hidden, hidden)
        return torch.tanh(torch.baddbmm(read, weights, memory.values))

    # -------------------------------------------------------------------------------------------------------- training

    def forward(self, src, tgt, src_lengths=None, tgt_lengths=None):
        weight, bias = self.output_weights()
        return multiply(self.hidden(src, tgt, src_lengths), weight, bias)

    def hidden(self, src, tgt, src_lengths=None, tgt_lengths=None):
        """Teacher forcing: [B, T], [B, U] int64 -> [B, U, H], what the output projection reads."""
        return self._decode(src, tgt, src_lengths)[0]

    def loss(self, src, tgt, targets, src_lengths=None, tgt_lengths=None, **options):
        """Mean cross entropy of `targets`, int64 [B, U] (-100: ignored), in nats, for what goes in as `tgt`."""
        weight, bias = self.output_weights()
        return ops.linear_cross_entropy(self.hidden(src, tgt, src_lengths), weight, targets, bias=bias, **options)

    def alignment(self, src, tgt, src_lengths=None):
        """[B, T], [B, U] int64 -> [B, U, T]: where in the source the decoder looks behind each token of tgt."""
        if self.config.attention is None:
            raise ValueError("RNNSeq2Seq: attention is None, so there is no alignment")
        return self._decode(src, tgt, src_lengths)[1]

    def _decode(self, src, tgt, src_lengths):
        check_ids(self, tgt, None, "tgt")
        memory, state = self.encode(src, src_lengths)
        if self.config.attention == "additive":
            return self._decode_in_steps(tgt, state, memory)
        hidden = self._normed(self.decoder(tgt, None, state)[0])
        weights = None if memory is None else self.weights(hidden, memory)
        return self.readout(hidden, weights, memory), weights

    def _decode_in_steps(self, tgt, state, memory):
        inputs, outputs, weights, cells = self.decoder.embed(tgt), [], [], self.decoder.cells()
        for x in inputs.unbind(1):
            hidden, a = self._additive_step(x, state, cells, memory)
            outputs.append(hidden)
            weights.append(a)
        hidden = self._normed(self.decoder.locked(torch.cat(outputs, 1), self.config.dropout_output))
        weights = torch.cat(weights, 1)
        return self.readout(hidden, weights, memory), weights

    def _additive_step(self, x, state, cells, memory, beams=1):
        """x: [B * beams, E]. Returns (the layers' output, the weights), [B, beams, H] and [B, beams, T]."""
        B = len(memory.keys)
        weights = self.weights(state[-1][0].view(B, beams, -1), memory)
        context = (weights @ memory.context).flatten(0, 1)
        return step_layers(cells, torch.cat([x, context], -1), state).view(B, beams, -1), weights

    def _normed(self, hidden):
        return self.decoder_norm(hidden) if self.config.norm else hidden

    # ------------------------------------------------------------------------------------------------------ generation

    def begin(self, ids, lengths, capacity):
        """The source in, [B, T] int64: (logits [B, V] float32 of the first token, the state)."""
        memory, state = self.encode(ids, lengths)
        first = torch.full((len(ids),), self.config.bos_id, device=ids.device)
        cache = Seq2SeqState(state, self.decoder.cells(), memory)
        return self.step(first, cache), cache

    def step(self, ids, cache):
        """ids: [B] int64, what was chosen -> logits [B, V] float32 of the next token."""
        memory = cache.memory
        if self.config.attention == "additive":
            x = self.decoder.embedding(ids)
            hidden, weights = self._additive_step(x, cache.layers, cache.cells, memory, cache.beams)
            hidden = self.readout(self._normed(hidden), weights, memory).flatten(0, 1)
        else:
            hidden = self._normed(self.decoder.step(ids, cache))  # (B, H)
            if memory is not None:
                read = project(self.read_hidden, hidden)
                hidden = ops.luong_readout(hidden, memory.keys, memory.values, read, memory.lengths)
        return multiply(hidden, *self.output_weights()).float()

    def output_weights(self):
        return self.output.weight, self.output.bias

    def step_modules(self):
        names = ("decoder", "decoder_norm", "read_hidden", "query", "score", "output")
        return [getattr(self, name) for name in names if hasattr(self, name)]
