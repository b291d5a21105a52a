"""One to many: a class goes in, a text comes out. The class sets the first state of a recurrent language model.

    seqfuse train class_to_text                       # sentences of film reviews that people rated negative or positive
    seqfuse train class_to_text --data mine.tsv       # class<TAB>text; .jsonl: keys "label" and "text"

Whether the class says anything about the text is measured without another model: turned round by Bayes' rule, p(class |
text) ~ p(text | class) p(class), the generator itself names the class of a held-out text.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seqfuse import data, metrics, report
from seqfuse.data import DataError
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.recurrent import ClassToText, ClassToTextConfig
from seqfuse.recipes.base import Findings, Optim, Recipe, RunConfig, Task, fingerprint
from seqfuse.recipes.texts import EVALUATED_ROWS, IGNORED
from seqfuse.tokenizer import Tokenizer

HELD_OUT = 10.0  # percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassToTextRun(RunConfig):
    """vocab: tokens. longest: tokens of a text; longer ones are left out. rated: without a file, texts rated at least
    so far from 0 are positive or negative, others are left out. shown: samples of each class."""

    vocab: int = 2000
    longest: int = 56
    rated: float = 1.0
    shown: int = 5

    def __post_init__(self):
        super().__post_init__()
        self.positive("vocab", "longest", "shown")


def class_to_text(cell: str = "gru") -> ClassToTextRun:
    """cell: rnn, lstm or gru."""
    dropouts = {"dropout_input": 0.2, "dropout_output": 0.3}
    return ClassToTextRun(
        recipe="class_to_text",
        max_steps=800,
        evaluate_every=200,
        checkpoint_every=200,
        optim=Optim(lr=3e-3, warmup=50),
        model=ClassToTextConfig(vocab=4, bos_id=1, cell=cell, embed=128, hidden=256, **dropouts),
    )


class OneToMany(Task):
    def prepare(self) -> None:
        config = self.config
        rows, what = self.read()
        parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
        for label, text in rows:
            parts[data.split_of(text, 0.0, HELD_OUT) == "valid"].append((label, text))
        self.classes = sorted({label for label, _ in parts[0]})
        self.fingerprint = fingerprint("\n".join("\t".join(row) for row in rows))
        self.pieces = self.tokenizer(lambda: Tokenizer.train([t for _, t in parts[0]], "bpe", vocab=config.vocab))
        self.train, self.held = map(self.encode, parts)
        self.said = f"{what}\n{len(self.train):,} texts to train on, {len(self.held):,} held out"
        self.examples = len(self.train)
        if len(self.classes) < 2 or not self.train or not self.held:
            raise DataError(
                f"{config.data or 'ratings'}: {len(self.train)} texts to train on and {len(self.held)} held out, of "
                f"{len(self.classes)} classes: some of both are wanted, and two classes (longest is {config.longest})"
            )

    def read(self) -> tuple[list[tuple[str, str]], str]:
        """(class, text) of each example; what was read."""
        if self.config.data:
            records = data.read_records(self.config.data, ("label", "text"))
            return records.rows, records.said
        names, item = {True: "positive", False: "negative"}, data.RATINGS
        clear = [text for text in data.rated_reviews() if abs(text.rating) >= self.config.rated]
        rows = [(names[text.rating > 0], text.text) for text in clear]
        return rows, f"{item.source}: {len(rows):,} sentences of film reviews; licence: {item.licence}"

    def encode(self, rows: list[tuple[str, str]]) -> list[tuple[int, list[int]]]:
        """(number of the class, <bos>, ids of the text, <eos>); texts of classes that are new to training left out."""
        edges, numbers = (self.pieces.bos_id, self.pieces.eos_id), {name: i for i, name in enumerate(self.classes)}
        known = [(numbers[label], text) for label, text in rows if label in numbers]
        ids = self.pieces.encode_batch([text for _, text in known])
        every = [(label, [edges[0], *row, edges[1]]) for (label, _), row in zip(known, ids, strict=True)]
        return [row for row in every if len(row[1]) <= self.config.longest]

    def build(self) -> Model:
        own = {"attributes": len(self.classes), "attribute_names": tuple(self.classes), **self.pieces.config()}
        model = ClassToText(dataclasses.replace(self.config.model, **own))
        model.tokenizer = self.pieces
        return model

    def batch(self, indices):
        return self.collate([self.train[i] for i in indices])

    def collate(self, rows) -> tuple[Tensor, Tensor, Tensor]:
        """Classes [B, 1]; what goes in and what should come out, [B, T] each."""
        texts = [torch.tensor(ids) for _, ids in rows]
        inputs = pad_sequence([t[:-1] for t in texts], True, self.pieces.pad_id)
        targets = pad_sequence([t[1:] for t in texts], True, IGNORED)
        return torch.tensor([[label] for label, _ in rows]), inputs, targets

    def loss(self, model, classes, inputs, targets):
        return model.loss(classes, inputs, targets, **self.loss_options(model)), (targets != IGNORED).sum()

    def held_out(self):
        rows = sorted(self.held, key=lambda row: len(row[1]))
        for i in range(0, len(rows), EVALUATED_ROWS):
            yield self.collate(rows[i : i + EVALUATED_ROWS])

    def evaluate(self, model):
        loss = super().evaluate(model)["loss"]
        return {"loss": loss, "perplexity": metrics.perplexity(loss), "class_accuracy": self.accuracy(model)}

    @torch.no_grad()
    def accuracy(self, model: Model) -> float:
        """Share of the held-out texts whose class is the likeliest one, by Bayes' rule."""
        counts = Counter(label for label, _ in self.train)
        prior = torch.tensor([counts[i] for i in range(len(self.classes))], device=self.device).log()
        right = 0
        for batch in self.held_out():
            classes, inputs, targets = self.to_device(batch)
            scores = []  # log p(text | class), of each class [B]
            for number in range(len(self.classes)):
                each = model.loss(torch.full_like(classes, number), inputs, targets, reduction="none")
                scores.append(-each.sum(1))
            right += int(((torch.stack(scores, 1) + prior).argmax(1) == classes[:, 0]).sum())
        return right / len(self.held)

    def report(self, model):
        counts = Counter(label for label, _ in self.held)
        values = self.evaluate(model) | {"majority_class": max(counts.values()) / len(self.held)}
        rows = [(name, text) for i, name in enumerate(self.classes) for text in self.samples(model, i)]
        table = report.section("Texts of each class", report.table(["class", "text"], rows))
        return Findings(values, [table], "\n".join(": ".join(row) for row in rows))

    def samples(self, model: Model, number: int) -> list[str]:
        config = self.config
        asked = torch.full((config.shown, 1), number, device=self.device)
        ids = generate(model, asked, max_new_tokens=config.longest, temperature=0.7, seed=config.seed)
        return [self.pieces.decode(row) for row in ids]


RECIPE = Recipe(
    "class_to_text", "one to many: from a class to a text, by a recurrent network", class_to_text, OneToMany
)
