"""Transfer learning: a pretrained encoder under a new head learns from a few hundred labelled texts.

    seqfuse train sentiment                                # MiniLM, 500 labelled sentences of film reviews
    seqfuse train sentiment --set scratch=true             # the same architecture with random weights
    seqfuse train sentiment --set lora=8                   # low-rank adapters instead of all weights (needs peft)
    seqfuse train sentiment --data mine.tsv                # text<TAB>label; .jsonl: keys "text" and "label"

A label-efficiency curve in the report, of the pretrained body and of the same architecture from scratch:

    seqfuse train sentiment --set "curve=[50,100,200]"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from seqfuse import report
from seqfuse.models.base import Model
from seqfuse.models.config import MODELS
from seqfuse.models.encoder import EncoderConfig
from seqfuse.models.files import read_json
from seqfuse.models.heads import Classifier, ClassifierConfig
from seqfuse.recipes import lora
from seqfuse.recipes.base import Findings, Optim, Recipe, check_positions
from seqfuse.recipes.classify import Classification, ClassifyConfig
from seqfuse.recipes.pretrained import load_body

LONGER = 3  # times as many steps from scratch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentimentConfig(ClassifyConfig):
    """start: the pretrained body, "minilm" or the folder of any model; of `model` only the head counts. scratch: the
    body's architecture and tokenizer with random weights. lora: rank of the adapters that are trained instead of the
    body's own weights, 0: none. curve: numbers of labelled examples; with each of them the pretrained body, and the
    same one from scratch for three times the steps, are trained first, in folders within the run's own."""

    start: str = "minilm"
    scratch: bool = False
    lora: int = 0
    curve: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        self.require(all(n > 0 for n in self.curve), f"curve must hold positive numbers, got {list(self.curve)}")
        self.require(not (self.scratch and self.curve), "a curve trains from scratch too: leave out scratch")
        self.require(not (self.scratch and self.lora), "adapters (lora) are for a pretrained body, not for scratch")


def sentiment(scratch: bool = False, lora: int = 0) -> SentimentConfig:
    """scratch: random weights. lora: rank of adapters. Each has a learning rate of its own; scratch trains longer."""
    return SentimentConfig(
        recipe="sentiment",
        scratch=scratch,
        lora=lora,
        max_steps=40 * LONGER if scratch else 40,
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
        check_positions(self.body.config, self.config.longest, "longest")
        return self.body.tokenizer

    def build(self) -> Model:
        body, config = self.body, self.config.model
        if self.config.scratch:
            body = MODELS[body.config.model](body.config)
            body.tokenizer = self.body.tokenizer
        model = Classifier.on(body, **self.labels(), pooling=config.pooling, dropout=config.dropout).train()
        return lora.attach(model, self.config.lora) if self.config.lora else model

    # ---------------------------------------------------------------------------------------- accuracy against labels

    def points(self) -> Iterator[tuple[str, SentimentConfig]]:
        """(folder within the run's own, config) of each run of the curve."""
        alone = dataclasses.replace(self.config, curve=())
        from_scratch = {
            "scratch": True,
            "lora": 0,
            "max_steps": LONGER * alone.max_steps,
            "optim": dataclasses.replace(alone.optim, lr=sentiment(scratch=True).optim.lr),
        }
        for n in sorted(set(self.config.curve)):
            yield f"labelled-{n}", dataclasses.replace(alone, labelled=n)
            yield f"labelled-{n}-scratch", dataclasses.replace(alone, labelled=n, **from_scratch)

    def ready(self, folder, train):
        self.folder = folder
        return all(train(config, name) for name, config in self.points())

    def report(self, model: Model) -> Findings:
        findings = super().report(model)
        if self.config.curve:
            findings.sections.insert(0, self.efficiency(findings.metrics["accuracy"]))
        return findings

    def efficiency(self, accuracy: float) -> str:
        """A section: accuracy on the test split against labelled examples. accuracy: of this run itself."""
        found: dict[str, dict[int, float]] = {"pretrained": {self.examples: accuracy}, "from scratch": {}}
        for name, config in self.points():
            metrics = read_json(self.folder / name / "results.json")["metrics"]
            found["from scratch" if config.scratch else "pretrained"][metrics["labelled"]] = metrics["accuracy"]
        lines = [report.Series(name, *zip(*sorted(line.items()), strict=True), marks=True)
                 for name, line in found.items()]  # fmt: skip
        chart = report.line_chart(lines, "labelled examples", "accuracy", "accuracy by labelled examples", False)
        rows = [
            (f"{n:,}", *(f"{100 * line[n]:.1f}" if n in line else "" for line in found.values()))
            for n in sorted({n for line in found.values() for n in line})
        ]
        table = report.table(["labelled examples", *(f"{name}, %" for name in found)], rows, range(3))
        return report.section("Label efficiency", report.figure(chart), table)


RECIPE = Recipe("sentiment", "transfer learning: a pretrained encoder and few labelled texts", sentiment, Sentiment)
