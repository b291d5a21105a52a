"""What recipes that give a text one label share: few labelled examples, a test split, and what the report shows."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from seqfuse import data, metrics, ops, report
from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.recipes.base import Findings, RunConfig, Task, fingerprint
from seqfuse.recipes.labels import confusion, f1_table
from seqfuse.recipes.texts import EVALUATED_ROWS, sorted_batches
from seqfuse.tokenizer import Tokenizer

SHOWN = 12  # texts in the report
SPLITS = 20.0, 5.0  # percent of the texts to test and to validate on


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """corpus: what is read without a file of your own, "reviews" or "genres" (see labelled_texts). labelled: examples
    that are trained on, drawn by the seed from the training split; 0: all of it. longest: tokens of a text; longer ones
    are cut."""

    corpus: Literal["reviews", "genres"] = "reviews"
    labelled: int = 500
    longest: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.positive("longest")


class Example(NamedTuple):
    text: str
    label: str
    group: str  # examples of one group are in one split


def labelled_texts(config: ClassifyConfig) -> tuple[list[Example], str]:
    """Each text once, and what was read: the user's file; sentences of film reviews, "negative" or "positive" by the
    sign of the mean rating that some twenty people gave them; or passages of the Brown corpus, "news", "learned" or
    "fiction"."""
    if config.data:
        records = data.read_records(config.data, ("text", "label"))
        return [Example(text, label, text) for text, label in dict(records.rows).items()], records.said
    if config.corpus == "genres":
        rows = [Example(*row) for row in data.brown_genres()]
        source = data.SETS["brown"]
        return rows, f"{source.source}: passages by the kind of prose; licence: {source.licence}"
    rated = {review.text: "positive" if review.rating > 0 else "negative" for review in data.rated_reviews()
             if review.rating}  # fmt: skip
    source = data.SETS["ratings"]
    said = f"{source.source}: negative or positive by their sign; licence: {source.licence}"
    return [Example(text, label, text) for text, label in rated.items()], said


def split_of(example: Example) -> str:
    return data.split_of(example.group, *SPLITS)


class Classification(Task):
    """A subclass gives text_tokenizer() and build(). Nothing but the labelled examples decides what is learned: the
    last weights are kept, not the best ones of a larger validation split."""

    objective = "accuracy"
    higher = True
    unit = "texts"

    def prepare(self) -> None:
        config = self.config
        rows, what = labelled_texts(config)
        splits: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
        for row in rows:
            splits[split_of(row)].append((row.text, row.label))
        for name, part in splits.items():
            if not part:
                raise DataError(f"{config.data}: the {name} split is empty, {len(rows)} texts are too few")
        self.fingerprint = fingerprint(repr([tuple(row) for row in rows]))
        counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
        self.said = f"{what}\ntexts: {counts}"
        self.pool, self.valid, self.test = splits["train"], splits["valid"], splits["test"]
        drawn = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(config.seed))
        self.train = [self.pool[i] for i in drawn[: config.labelled or None].tolist()]
        self.examples = len(self.train)
        self.names = sorted({row.label for row in rows})
        if len(self.names) < 2:
            raise DataError(
                f"{config.data}: all texts have the label {self.names[0]!r}; two labels are wanted at least"
            )
        self.pieces = self.text_tokenizer()
        self.encoded = self.encode(self.train)

    def text_tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def labels(self) -> dict:
        """What a ClassifierConfig says of them."""
        return {"labels": len(self.names), "label_names": tuple(self.names)}

    def encode(self, rows: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """(ids, number of the label)."""
        texts = self.pieces.encode_batch([text for text, _ in rows])
        empty = [self.pieces.unk_id or 0]
        return [
            (ids[: self.config.longest] or empty, self.names.index(label))
            for ids, (_, label) in zip(texts, rows, strict=True)
        ]

    def order(self, epoch):
        return sorted_batches([len(ids) for ids, _ in self.encoded], self.config.batch_size, self.config.seed, epoch)

    def batch(self, indices):
        return self.collate([self.encoded[i] for i in indices])

    def collate(self, encoded):
        """ids [B, T], labels [B] and lengths [B]."""
        rows = [torch.tensor(ids) for ids, _ in encoded]
        ids = pad_sequence(rows, True, self.pieces.pad_id or 0)
        return ids, torch.tensor([label for _, label in encoded]), torch.tensor([len(row) for row in rows])

    def loss(self, model, ids, labels, lengths):
        return ops.cross_entropy(model(ids, lengths), labels, **self.loss_options(model)), len(labels)

    def held_out(self):
        rows = sorted(self.encode(self.valid), key=lambda row: len(row[0]))
        for start in range(0, len(rows), EVALUATED_ROWS):
            yield self.collate(rows[start : start + EVALUATED_ROWS])

    def classify(self, model: Model, rows: list[tuple[str, str]]) -> tuple[list[str], list[float], float]:
        """(label that the model gives, how probable it finds it) of each text, and the mean loss."""
        encoded = self.encode(rows)
        order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))
        found, sure, total = [""] * len(rows), [0.0] * len(rows), 0.0
        for start in range(0, len(order), EVALUATED_ROWS):
            some = order[start : start + EVALUATED_ROWS]
            ids, labels, lengths = self.to_device(self.collate([encoded[i] for i in some]))
            logs = model(ids, lengths).float().log_softmax(-1)  # (B, labels)
            total -= float(logs.gather(1, labels[:, None]).sum())
            for i, log, label in zip(some, *(t.tolist() for t in logs.exp().max(-1)), strict=True):
                found[i], sure[i] = self.names[label], log
        return found, sure, total / len(rows)

    def evaluate(self, model: Model) -> dict[str, float]:
        found, _, loss = self.classify(model, self.valid)
        return {"accuracy": accuracy([label for _, label in self.valid], found), "loss": loss}

    def report(self, model: Model) -> Findings:
        """Accuracy and F1 on the test split, which class is taken for which, and texts it was surely wrong about."""
        found, sure, loss = self.classify(model, self.test)
        true = [label for _, label in self.test]
        scores = metrics.class_scores(true, found)
        values = {"accuracy": accuracy(true, found), "macro_f1": metrics.macro_f1(scores), "loss": loss,
                  "labelled": self.examples, "tested": len(true)}  # fmt: skip
        wrong = sorted((i for i in range(len(true)) if found[i] != true[i]), key=lambda i: -sure[i])[:SHOWN]
        rows = [(self.test[i][0], true[i], f"{found[i]} ({sure[i]:.2f})") for i in wrong]
        return Findings(
            values,
            [
                f1_table("Classes", scores),
                confusion(true, found),
                report.section("Surest mistakes", report.table(["text", "is", "taken for"], rows)),
            ],
        )


def accuracy(true: list[str], found: list[str]) -> float:
    return sum(a == b for a, b in zip(true, found, strict=True)) / len(true)
