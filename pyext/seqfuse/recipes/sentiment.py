"""Transfer learning: a pretrained encoder under a new head learns from a few hundred labelled texts.

    seqfuse train sentiment                                # MiniLM, 500 labelled sentences of film reviews
    seqfuse train sentiment --set scratch=true             # the same architecture with random weights
    seqfuse train sentiment --set lora=8                   # low-rank adapters instead of all weights (needs peft)
    seqfuse train sentiment --data mine.tsv                # text<TAB>label; .jsonl: keys "text" and "label"

Runs with other numbers of labelled examples (--set labelled=100) make a label-efficiency curve: `seqfuse plot RUN...`.
"""

from __future__ import annotations

import dataclasses

from seqfuse.models.base import Model
from seqfuse.models.config import MODELS
from seqfuse.models.encoder import EncoderConfig
from seqfuse.models.heads import Classifier, ClassifierConfig
from seqfuse.recipes import lora
from seqfuse.recipes.base import Optim, Recipe
from seqfuse.recipes.classify import Classification, ClassifyConfig
from seqfuse.recipes.pretrained import load_body


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentimentConfig(ClassifyConfig):
    """start: the pretrained body, "minilm" or the folder of any model; of `model` only the head counts. scratch: the
    body's architecture and tokenizer with random weights. lora: rank of the adapters that are trained instead of the
    body's own weights, 0: none."""

    start: str = "minilm"
    scratch: bool = False
    lora: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.require(not (self.scratch and self.lora), "adapters (lora) are for a pretrained body, not for scratch")


def sentiment(scratch: bool = False, lora: int = 0) -> SentimentConfig:
    """scratch: random weights. lora: rank of adapters. Each has a learning rate of its own; scratch trains longer."""
    return SentimentConfig(
        recipe="sentiment",
        scratch=scratch,
        lora=lora,
        max_steps=120 if scratch else 40,
        batch_size=32,
        evaluate_every=20,
        keep="last",
        optim=Optim(lr=3e-4 if scratch else 2e-3 if lora else 1e-4, warmup=20, schedule="linear"),
        model=ClassifierConfig(
            body=EncoderConfig(vocab=30522, width=384, layers=6, heads=12), labels=2, pooling="mean", dropout=0.1
        ),
    )


class Sentiment(Classification):
    def text_tokenizer(self):
        self.body = load_body(self.config.start)
        return self.body.tokenizer

    def build(self) -> Model:
        body, config = self.body, self.config.model
        if self.config.scratch:
            body = MODELS[body.config.model](body.config)
            body.tokenizer = self.body.tokenizer
        model = Classifier.on(body, labels=len(self.names), pooling=config.pooling, dropout=config.dropout).train()
        return lora.attach(model, self.config.lora) if self.config.lora else model

    def exported(self, tensors):
        return lora.merge(tensors) if self.config.lora else tensors


RECIPE = Recipe("sentiment", "transfer learning: a pretrained encoder and few labelled texts", sentiment, Sentiment)
