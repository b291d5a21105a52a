"""What is asked of a body: a class or a reward, a tag for each token, a span, or the token that was masked.

A body is an Encoder, or any model whose hidden(ids, lengths) gives [B, T, d]: a Decoder, a recurrent language model.

    model = Classifier.on(seqfuse.models.load("DIR"), labels=2)    # a trained body under a new head
    reward = Classifier.on(decoder, labels=1, pooling="last")      # one number for each row
"""

import dataclasses
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from seqfuse import ops
from seqfuse.models.base import Model
from seqfuse.models.blocks import PLAIN, Norm
from seqfuse.models.config import MODELS, Config
from seqfuse.models.encoder import EncoderConfig
from seqfuse.models.projections import multiply, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """body: the config of the model underneath; vocab and the tokens with a meaning are the body's. dropout: before the
    head's layer."""

    vocab: int = 0
    body: Config
    dropout: float = 0.0

    def __post_init__(self):
        if isinstance(self.body, Config):
            if self.checkpoint:
                object.__setattr__(self, "body", dataclasses.replace(self.body, checkpoint=True))
            for name in ("vocab", "bos_id", "eos_id", "pad_id"):
                object.__setattr__(self, name, getattr(self.body, name))
        super().__post_init__()


class Head(Model):
    """A body and what reads its hidden states."""

    def __init__(self, config: HeadConfig, body: Model | None = None):
        super().__init__(config)
        self.body = MODELS[config.body.model](config.body) if body is None else body

    @classmethod
    def on(cls, body: Model, **options) -> Self:
        """A new head, with these options of its config, over a body that may be trained already."""
        model = cls(cls.config_class(body=body.config, **options), body)
        model.tokenizer = body.tokenizer
        weight = next(body.parameters())
        return model.to(weight.device, weight.dtype)

    @property
    def width(self) -> int:
        return self.body.width

    def hidden(self, ids, lengths=None, **options):
        """[B, T, d] of the body. options: what else it takes (an Encoder: types)."""
        x = self.body.hidden(ids, lengths, **options)
        return F.dropout(x, self.config.dropout, self.training)

    def forward(self, ids, lengths=None, **options):
        return multiply(self.hidden(ids, lengths, **options), *self.output_weights())

    def loss(self, ids, targets, lengths=None, types=None, **options):
        """As Model.loss; types: of an Encoder's tokens."""
        options_of_body = {} if types is None else {"types": types}
        weight, bias = self.output_weights()
        x = self.hidden(ids, lengths, **options_of_body)
        return ops.linear_cross_entropy(x, weight, targets, bias=bias, **options)

    def output_layer(self, outputs: int) -> nn.Linear:
        layer = nn.Linear(self.width, outputs)
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(HeadConfig):
    """labels: how many classes, or 1 for a number. pooling: the row's first token, its last, the mean of all, or BERT's
    pooler over the first."""

    model: ClassVar[str] = "Classifier"

    labels: int
    pooling: Literal["first", "last", "mean", "pooler"] = "first"

    def __post_init__(self):
        super().__post_init__()
        self.positive("labels")
        has_pooler = self.pooling != "pooler" or getattr(self.body, "pooler", False)
        self.require(has_pooler, 'pooling "pooler" needs a body with a pooler')


class Classifier(Head):
    """ids [B, T] -> logits [B, labels], or with one label a number for each row [B]: a reward model."""

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig, body: Model | None = None):
        super().__init__(config, body)
        self.output = self.output_layer(config.labels)

    def pool(self, x, lengths):
        """x (B, T, d) -> (B, d)."""
        B, T, _ = x.shape
        if self.config.pooling == "pooler":
            return self.body.pooled(x)
        if self.config.pooling == "first":
            return x[:, 0]
        if self.config.pooling == "last":
            return x[:, -1] if lengths is None else x[torch.arange(B, device=x.device), lengths - 1]
        if lengths is None:
            return x.mean(1)
        there = torch.arange(T, device=x.device) < lengths[:, None]  # (B, T)
        return torch.where(there[..., None], x, 0).sum(1) / lengths[:, None]

    def forward(self, ids, lengths=None, **options):
        x = self.pool(self.body.hidden(ids, lengths, **options), lengths)  # (B, d)
        y = project(self.output, F.dropout(x, self.config.dropout, self.training))  # (B, labels)
        return y[:, 0] if self.config.labels == 1 else y

    def loss(self, ids, targets, lengths=None, **options):
        """Mean cross entropy of classes, int64 [B]; with one label the mean squared error of numbers [B]."""
        y = self(ids, lengths, **options)
        return F.mse_loss(y, targets) if self.config.labels == 1 else ops.cross_entropy(y, targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(HeadConfig):
    """body: of a language model."""

    model: ClassVar[str] = "ActorCritic"


class ActorCritic(Head):
    """A language model, and at each token the reward that is to be expected from there on: what PPO trains.

    model(ids [B, T]) -> logits [B, T, V], those of the body; it generates as the body does.
    """

    config_class = ActorCriticConfig

    def __init__(self, config: ActorCriticConfig, body: Model | None = None):
        super().__init__(config, body)
        self.value = self.output_layer(1)

    def values(self, hidden):
        """hidden [B, T, d] -> [B, T]."""
        return project(self.value, hidden)[..., 0]

    def output_weights(self):
        return self.body.output_weights()

    def begin(self, ids, lengths=None, capacity=None):
        return self.body.begin(ids, lengths, capacity)

    def step(self, ids, cache):
        return self.body.step(ids, cache)

    def step_modules(self):
        return self.body.step_modules()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggerConfig(HeadConfig):
    """labels: how many tags."""

    model: ClassVar[str] = "Tagger"

    labels: int

    def __post_init__(self):
        super().__post_init__()
        self.positive("labels")


class Tagger(Head):
    """ids [B, T] -> logits [B, T, labels]: a tag for each token. loss(): targets [B, T], -100: ignored."""

    config_class = TaggerConfig

    def __init__(self, config: TaggerConfig, body: Model | None = None):
        super().__init__(config, body)
        self.output = self.output_layer(config.labels)

    def output_weights(self):
        return self.output.weight, self.output.bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanQAConfig(HeadConfig):
    """Nothing of its own."""

    model: ClassVar[str] = "SpanQA"


class SpanQA(Head):
    """ids [B, T] -> (start, end), each [B, T]: how likely the answer starts and ends at a token; never in padding."""

    config_class = SpanQAConfig

    def __init__(self, config: SpanQAConfig, body: Model | None = None):
        super().__init__(config, body)
        self.output = self.output_layer(2)

    def forward(self, ids, lengths=None, **options):
        start, end = project(self.output, self.hidden(ids, lengths, **options)).unbind(-1)  # (B, T) twice
        if lengths is None:
            return start, end
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]  # (B, T)
        return start.masked_fill(padding, -torch.inf), end.masked_fill(padding, -torch.inf)

    def loss(self, ids, starts, ends, lengths=None, **options):
        """Mean cross entropy of where answers start and end: int64 [B] each, -100: there is none."""
        start, end = self(ids, lengths, **options)
        return (F.cross_entropy(start, starts) + F.cross_entropy(end, ends)) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMConfig(HeadConfig):
    """mask_id: the token that stands for one to be guessed, or None."""

    model: ClassVar[str] = "MaskedLM"

    mask_id: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require(isinstance(self.body, EncoderConfig), f"body must be an EncoderConfig, got {self.body!r}")
        self.require(self.body.activation in PLAIN, f"body's activation must be one of {', '.join(PLAIN)}")


class MaskedLM(Head):
    """ids [B, T] -> logits [B, T, V] of the token at each place: BERT's head, whose output matrix is the embedding."""

    config_class = MaskedLMConfig

    def __init__(self, config: MaskedLMConfig, body: Model | None = None):
        super().__init__(config, body)
        self.dense, self.norm = nn.Linear(self.width, self.width), Norm(config.body)
        self.bias = nn.Parameter(torch.zeros(config.vocab))

    def hidden(self, ids, lengths=None, **options):
        x = super().hidden(ids, lengths, **options)  # (B, T, d)
        return self.norm(PLAIN[self.config.body.activation](project(self.dense, x)))[0]  # (B, T, d)

    def output_weights(self):
        return self.body.output_weights()[0], self.bias
