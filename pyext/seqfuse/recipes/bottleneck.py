"""The bottleneck of the encoder-decoder without attention (Cho et al. 2014, arXiv:1409.1259; Bahdanau et al. 2015,
arXiv:1409.0473): one vector can't hold a long input, attention looks at all of it.

The task is to write random letters backwards: exact, endless, and as hard as it is long.

    seqfuse train bottleneck                                             # with attention
    seqfuse train bottleneck --set attention=null --out runs/fixed       # the same without
"""

from __future__ import annotations

import dataclasses
import string

import torch
from torch import Tensor

from seqfuse import attention_pictures, report
from seqfuse.data import DataError
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.seq2seq import RNNSeq2Seq, RNNSeq2SeqConfig
from seqfuse.recipes.base import Findings, Optim, Recipe, RunConfig, Task, fingerprint, generator
from seqfuse.tokenizer import SPECIALS, Tokenizer

BATCHES = 500  # that are called an epoch: no example comes twice


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(RunConfig):
    """shortest, longest: letters of an example. measured: the lengths at which accuracy is measured, a step of so many
    letters apart, each on `measured_on` examples."""

    shortest: int = 4
    longest: int = 24
    measured: int = 4
    measured_on: int = 200

    def __post_init__(self):
        super().__post_init__()
        self.positive("shortest", "measured", "measured_on")
        in_order = self.shortest <= self.longest
        self.require(in_order, f"longest must be at least shortest, got {self.longest} and {self.shortest}")


def bottleneck(attention: str | None = "general") -> BottleneckConfig:
    """attention: additive, dot, general, or None for a fixed vector."""
    return BottleneckConfig(
        recipe="bottleneck",
        max_steps=1500,
        batch_size=64,
        evaluate_every=500,
        checkpoint_every=500,
        optim=Optim(lr=3e-3, weight_decay=0.0),
        model=RNNSeq2SeqConfig(vocab=4, bos_id=1, cell="gru", embed=64, hidden=128, attention=attention),
    )


class Bottleneck(Task):
    unit = "letters"

    def prepare(self) -> None:
        if self.config.data:
            raise DataError("bottleneck: its examples are drawn at random, so it takes no file (--data)")
        self.letters = Tokenizer.of([*SPECIALS, *string.ascii_lowercase], "characters", specials=SPECIALS)
        self.examples = BATCHES * self.config.batch_size
        self.said = "letters drawn at random from the seed"
        self.fingerprint = fingerprint("letters drawn at random")

    def build(self) -> Model:
        model = RNNSeq2Seq(dataclasses.replace(self.config.model, **self.letters.config()))
        model.tokenizer = self.letters
        return model

    def order(self, epoch: int) -> list[list[int]]:
        size = self.config.batch_size
        first = epoch * self.examples
        return [list(range(i, i + size)) for i in range(first, first + self.examples, size)]

    def batch(self, indices):
        """Letters of one length for the whole global batch, so nothing is padded."""
        config, number = self.config, indices[0] // self.config.batch_size
        draw = generator(config.seed, number + 1)
        length = int(torch.randint(config.shortest, config.longest + 1, (), generator=draw))
        rows = [i % config.batch_size for i in indices]
        return self.examples_of(length, config.batch_size, draw)[rows], length

    def examples_of(self, length: int, count: int, draw: torch.Generator) -> Tensor:
        return torch.randint(len(SPECIALS), self.letters.vocab_size, (count, length), generator=draw)

    def loss(self, model, source, length):
        backwards = source.flip(1)  # (B, T)
        edge = backwards.new_full((len(backwards), 1), 0)
        inputs = torch.cat([edge + self.letters.bos_id, backwards], 1)  # (B, T + 1)
        targets = torch.cat([backwards, edge + self.letters.eos_id], 1)
        return model.loss(source, inputs, targets, **self.loss_options(model)), targets.numel()

    def held_out(self):
        config = self.config
        draw = generator(config.seed, 0)
        for length in self.lengths():
            yield self.examples_of(length, config.measured_on, draw), length

    def lengths(self) -> range:
        return range(self.config.shortest, self.config.longest + 1, self.config.measured)

    def accuracy(self, model: Model) -> dict[int, float]:
        """Of each length, the share of letters that greedy decoding writes in the right place."""
        found = {}
        for source, length in self.held_out():
            source = source.to(self.device)
            written = generate(model, source, max_new_tokens=length, stop=())
            found[length] = float((written == source.flip(1)).float().mean())
        return found

    def report(self, model: Model) -> Findings:
        found = self.accuracy(model)
        name = "a fixed vector" if self.config.model.attention is None else f"attention ({self.config.model.attention})"
        chart = curves({name: found})
        values = {f"accuracy_at_{length}": value for length, value in found.items()}
        sections, rows = [report.section("Accuracy by length", report.figure(chart))], []
        for source, length in self.held_out():
            letters = source[0].tolist()
            written = generate(model, source[:1].to(self.device), max_new_tokens=length, stop=())[0].tolist()
            rows.append([self.letters.decode(ids) for ids in (letters, letters[::-1], written)])
        sections.append(report.section("Samples", report.table(["letters", "backwards", "model"], rows)))
        sections += attention_pictures.to_the_source(model, letters, written)
        text = "\n".join(f"{given} -> {wrote}" for given, _, wrote in rows)
        return Findings(self.evaluate(model) | values, sections, text)


def curves(found: dict[str, dict[int, float]]) -> str:
    """A chart of accuracies by length, a line for each name."""
    series = [report.Series(name, list(line), list(line.values()), marks=True) for name, line in found.items()]
    return report.line_chart(series, "letters of the input", "share of letters right", "accuracy by length")


RECIPE = Recipe(
    "bottleneck", "one vector can't hold a long input, attention can: letters backwards", bottleneck, Bottleneck
)
