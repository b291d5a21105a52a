"""Recurrent models: a language model with AWD-LSTM's regularisation, a body for heads, and text from attributes.

    ids -> Embedding -> recurrent layers (rnn, lstm or gru) -> logits of the next token

Four kinds of sequence mapping, and who does them:

    one to many                  ClassToText            attributes -> text
    many to one                  Classifier(RNNEncoder) text -> class
    many to many, in step        Tagger(RNNEncoder)     token -> its tag;  RNNLanguageModel: token -> the next one
    many to many, not in step    RNNSeq2Seq             text -> text (seq2seq.py)

Training runs each layer as one call over the whole sequence. A step of generation is one fused cell per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Dropout, Embedding, Linear, ModuleList, init

from seqfuse import nn, ops
from seqfuse.models.base import Model, check_ids
from seqfuse.models.config import Config
from seqfuse.models.projections import multiply
from seqfuse.ops.rnn_cell import StepCell
from seqfuse.ops.rnn_extras import keep_mask

LAYERS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
State = tuple[Tensor, ...]  # of one layer in one direction: (h,) or, of an LSTM, (h, c); [B, H] each


class RecurrentState:
    """What a recurrent model remembers between steps: the state of each layer, and the cells that move it on."""

    def __init__(self, layers: list[State], cells: list[StepCell]):
        self.layers, self.cells = layers, cells

    def reorder(self, index: Tensor, grouped: bool = False) -> None:
        self.layers = [tuple([s.index_select(0, index) for s in state]) for state in self.layers]

    def tensors(self) -> list[Tensor]:
        return [s for state in self.layers for s in state]

    def put(self, tensors: list[Tensor]) -> None:
        rest = iter(tensors)
        self.layers = [tuple([next(rest) for _ in state]) for state in self.layers]

    def replayed(self) -> None:
        """Nothing is counted."""


@dataclass(frozen=True, kw_only=True)
class RNNConfig(Config):
    """What all recurrent models share.

    cell: of which kind. embed, hidden: widths. layers: how many. Dropouts, in training: `dropout_embedding` of whole
    words, wherever they stand; `dropout_input`, `dropout_hidden`, `dropout_output` of the units that enter the first
    layer, stand between two, leave the last, the same ones at all times of a sequence (Gal and Ghahramani 2016,
    arXiv:1512.05287); `weight_drop` of elements of the recurrent weights (Merity et al. 2018, arXiv:1708.02182).
    """

    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    embed: int = 256
    hidden: int = 512
    layers: int = 1
    dropout_embedding: float = 0.0
    dropout_input: float = 0.0
    dropout_hidden: float = 0.0
    dropout_output: float = 0.0
    weight_drop: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.positive("vocab", "embed", "hidden", "layers")
        for name in ("dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output", "weight_drop"):
            self.require(getattr(self, name) < 1, f"{name} must be below 1, got {getattr(self, name)!r}")


class Recurrent(torch.nn.Module):
    """Embedding and layers: what all recurrent models are made of. width: of what comes out."""

    def __init__(self, config: RNNConfig, *, vocab: int, bidirectional: bool = False, extra: int = 0, width: int = 0):
        """extra: units that enter the first layer beside the embedding. width: of the last layer, if not `hidden`."""
        super().__init__()
        self.config, self.width = config, width or config.hidden
        self.embedding = Embedding(vocab, config.embed)
        outputs = [config.hidden] * (config.layers - 1) + [self.width]
        inputs = [config.embed + extra, *outputs[:-1]]
        extras = dict(weight_drop=config.weight_drop, recompute=config.checkpoint)
        self.layers = ModuleList(
            LAYERS[config.cell](i, o // (1 + bidirectional), batch_first=True, bidirectional=bidirectional, **extras)
            for i, o in zip(inputs, outputs, strict=True)
        )

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, state: list[State] | None = None
    ) -> tuple[Tensor, list[State], Tensor]:
        """ids: [B, T] int64 -> (output [B, T, width], the state of each layer behind the last token, the last layer's
        output before its dropout). A state of two directions has both in a row: [B, 2H]."""
        config, last = self.config, len(self.layers) - 1
        x = self.embed(ids)
        after = []
        for i, layer in enumerate(self.layers):
            ragged = (
                {} if lengths is None else {"lengths": lengths}
            )  # torch.nn's layers, after unfuse(), have no lengths
            y, s = layer(x, None if state is None else self._for_layer(state[i]), **ragged)
            after.append(tuple(t.transpose(0, 1).flatten(1) for t in (s if isinstance(s, tuple) else (s,))))
            x = self.locked(y, config.dropout_output if i == last else config.dropout_hidden)
        return x, after, y

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, embed]."""
        x = self.embedding(ids)
        if self.training and self.config.dropout_embedding:
            x = x * keep_mask((self.embedding.num_embeddings, 1), self.config.dropout_embedding, x)[ids]
        return self.locked(x, self.config.dropout_input)

    def cells(self) -> list[StepCell]:
        """The layers one step at a time."""
        kinds = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}
        weights = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return [StepCell(kinds[layer.mode], tuple(getattr(layer, name) for name in weights)) for layer in self.layers]

    def step(self, ids: Tensor, cache: RecurrentState) -> Tensor:
        """One token for each row, ids [B] int64 -> output [B, width]; the cache moves on."""
        first, *others = cache.cells
        cache.layers[0] = state = first.looked_up(ids, self.embedding.weight, *cache.layers[0])
        return step_layers(others, state[0], cache.layers, 1)

    def _for_layer(self, state: State):
        state = tuple(t[None] for t in state)
        return state if self.config.cell == "lstm" else state[0]

    def locked(self, x: Tensor, p: float) -> Tensor:
        """Dropout with one mask for all times of a sequence."""
        if not self.training or p == 0:
            return x
        return x * keep_mask((x.shape[0], 1, x.shape[2]), p, x)


def step_layers(cells: list[StepCell], x: Tensor, state: list[State], first: int = 0) -> Tensor:
    """One step of each layer from number `first` on, x: [B, I] -> [B, H]; the entries of `state` are replaced."""
    for i, cell in enumerate(cells, first):
        state[i] = cell(x, *state[i])
        x = state[i][0]
    return x


def last_valid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x: [B, T, d] -> [B, d], at the last token of each row."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(len(x), device=x.device), lengths - 1]


class Generating:
    """begin and step of a Model whose `body` is a Recurrent and whose logits are a projection of its output."""

    body: Recurrent

    def begin(self, ids: Tensor, lengths: Tensor | None, capacity: int) -> tuple[Tensor, RecurrentState]:
        """A prompt in, [B, T] int64: (logits [B, V] float32 of the token behind it, the state). A state has room for
        everything: capacity says nothing here."""
        check_ids(self, ids, lengths)
        x, state, _ = self.body(ids, lengths)
        return self._logits(last_valid(x, lengths)), RecurrentState(state, self.body.cells())

    def step(self, ids: Tensor, cache: RecurrentState) -> Tensor:
        """ids: [B] int64, what was chosen -> logits [B, V] float32 of the next token."""
        return self._logits(self.body.step(ids, cache))

    def _logits(self, x: Tensor) -> Tensor:
        return multiply(x, *self.output_weights()).float()


# ------------------------------------------------------------------------------------------------------ language model


@dataclass(frozen=True, kw_only=True)
class RNNLanguageModelConfig(RNNConfig):
    """tied: the embedding is also the output projection; the last layer is then `embed` wide. Added to the loss in
    training (Merity et al. 2017, arXiv:1708.01009): `activation` times the mean square of the output (AR), `temporal`
    times that of its change from one time to the next (TAR)."""

    model: ClassVar[str] = "RNNLanguageModel"

    tied: bool = True
    activation: float = 0.0
    temporal: float = 0.0


class RNNLanguageModel(Generating, Model):
    """A recurrent language model; with its dropouts AWD-LSTM (Merity et al. 2018, arXiv:1708.02182).

    model(ids [B, T], lengths=None) -> logits [B, T, V].
    """

    config_class = RNNLanguageModelConfig

    def __init__(self, config: RNNLanguageModelConfig):
        super().__init__(config)
        self.body = Recurrent(config, vocab=config.vocab, width=config.embed if config.tied else config.hidden)
        self.output = output_layer(self.body.width, config.vocab, self.body.embedding if config.tied else None)
        init.uniform_(self.body.embedding.weight, -0.1, 0.1)

    @property
    def width(self) -> int:
        return self.body.width

    def hidden(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, T] int64 -> [B, T, width]."""
        check_ids(self, ids, lengths)
        return self.body(ids)[0]  # what comes before sees no padding behind it

    def output_weights(self) -> tuple[Tensor, Tensor | None]:
        return self.output.weight, self.output.bias

    def loss(self, ids, targets, lengths=None, *, state=None, return_state=False, **options):
        """Mean cross entropy of `targets`, int64 [B, T] (-100: ignored), in nats, and the two regularisations.

        state: of every layer at the first token, as return_state=True gave it for the piece of text before, for
        truncated backpropagation through time; without gradient. options: as in ops.linear_cross_entropy.
        Returns a scalar, or (scalar, state).
        """
        check_ids(self, ids, lengths)
        output, state, raw = self.body(ids, None, state)
        weight, bias = self.output_weights()
        loss = ops.linear_cross_entropy(output, weight, targets, bias=bias, **options)
        if self.training and self.config.activation:
            loss = loss + self.config.activation * mean_square(output, lengths)
        if self.training and self.config.temporal and ids.shape[1] > 1:
            lengths = None if lengths is None else (lengths - 1).clamp_min(0)
            loss = loss + self.config.temporal * mean_square(raw[:, 1:] - raw[:, :-1], lengths)
        return (loss, [tuple(t.detach() for t in s) for s in state]) if return_state else loss


def mean_square(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x: [B, T, d], of which the first lengths[b] times count."""
    squares = x.float().square().mean(-1)  # (B, T)
    if lengths is None:
        return squares.mean()
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return squares.where(valid, 0.0).sum() / valid.sum().clamp_min(1)


def output_layer(width: int, vocab: int, tied_to: Embedding | None = None) -> Linear:
    layer = Linear(width, vocab)
    if tied_to is not None:
        layer.weight = tied_to.weight
    return layer


# ------------------------------------------------------------------------------------------------------- body of heads


@dataclass(frozen=True, kw_only=True)
class RNNEncoderConfig(RNNConfig):
    """width: of what comes out; of two directions each has half of it."""

    model: ClassVar[str] = "RNNEncoder"

    bidirectional: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(not self.bidirectional or self.hidden % 2 == 0, f"hidden must be even, got {self.hidden}")

    @property
    def width(self) -> int:
        return self.hidden


class RNNEncoder(Model):
    """A recurrent body for heads: a Tagger reads its output token by token, a Classifier as a whole.

    model(ids [B, T], lengths=None) -> [B, T, hidden]; 0 in the padding, which no direction sees.
    """

    config_class = RNNEncoderConfig

    def __init__(self, config: RNNEncoderConfig):
        super().__init__(config)
        self.body = Recurrent(config, vocab=config.vocab, bidirectional=config.bidirectional)

    def hidden(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        check_ids(self, ids, lengths)
        return self.body(ids, lengths)[0]

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.hidden(ids, lengths)


# --------------------------------------------------------------------------------------------------------- one to many


@dataclass(frozen=True, kw_only=True)
class ClassToTextConfig(RNNConfig):
    """attributes: how many there are, each a number in [0, attributes); an example has one or several.
    attribute_names: what each is called, or None."""

    model: ClassVar[str] = "ClassToText"
    encoder_decoder: ClassVar[bool] = True

    attributes: int = 2
    attribute_names: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.positive("attributes")
        named = self.attribute_names is None or len(self.attribute_names) == self.attributes
        self.require(named, f"attribute_names must be as many as attributes, got {self.attribute_names!r}")
        self.require(self.bos_id is not None, "bos_id must be given: text starts with it")

    @property
    def source_vocab(self) -> int:
        return self.attributes


class ClassToText(Generating, Model):
    """Text with the attributes that are asked for: their sum sets the first state of a language model.

    model(attributes [B, A], tgt [B, T] starting with bos_id, src_lengths=None, tgt_lengths=None) -> logits [B, T, V].
    generate takes the attributes as prompts.
    """

    config_class = ClassToTextConfig

    def __init__(self, config: ClassToTextConfig):
        super().__init__(config)
        self.attributes = Embedding(config.attributes, config.hidden)
        self.drop = Dropout(config.dropout_input)
        self.first = Linear(config.hidden, config.layers * config.hidden)
        self.body = Recurrent(config, vocab=config.vocab)
        self.output = output_layer(config.hidden, config.vocab)

    def forward(self, attributes, tgt, src_lengths=None, tgt_lengths=None):
        weight, bias = self.output_weights()
        return multiply(self.hidden(attributes, tgt, src_lengths), weight, bias)

    def hidden(self, attributes, tgt, src_lengths=None, tgt_lengths=None):
        check_ids(self, tgt, tgt_lengths, "tgt")
        return self.body(tgt, None, self.first_state(attributes, src_lengths))[0]

    def loss(self, attributes, tgt, targets, src_lengths=None, tgt_lengths=None, **options):
        """Mean cross entropy of `targets`, int64 [B, T] (-100: ignored), in nats, for what goes in as `tgt`."""
        weight, bias = self.output_weights()
        return ops.linear_cross_entropy(
            self.hidden(attributes, tgt, src_lengths), weight, targets, bias=bias, **options
        )

    def output_weights(self):
        return self.output.weight, self.output.bias

    def step_modules(self):
        return [self.body, self.output]

    def first_state(self, attributes: Tensor, lengths: Tensor | None) -> list[State]:
        """attributes: [B, A] int64, of which the first lengths[b] count."""
        check_ids(self, attributes, lengths, "attributes", self.config.attributes)
        x = self.attributes(attributes)  # (B, A, H)
        if lengths is not None:
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = x * valid[:, :, None]
        h = torch.tanh(self.first(self.drop(x.sum(1)))).chunk(self.config.layers, dim=-1)
        return [(s, torch.zeros_like(s)) if self.config.cell == "lstm" else (s,) for s in h]

    def begin(self, ids, lengths, capacity):
        first = torch.full((len(ids),), self.config.bos_id, device=ids.device)
        cache = RecurrentState(self.first_state(ids, lengths), self.body.cells())
        return self.step(first, cache), cache
