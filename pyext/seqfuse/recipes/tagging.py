"""What recipes that tag words share: sentences become pieces of words, and the first piece of a word has its tag.

A body reads pieces, so any tokenizer serves and no word is unknown: byte pairs learned from the training words, or the
word pieces that a pretrained body brings along, with its [CLS] and [SEP] around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from seqfuse import data, report
from seqfuse.data import DataError, PackageFile, Sentence
from seqfuse.models.base import Model
from seqfuse.models.encoder import EncoderConfig
from seqfuse.models.heads import Tagger, TaggerConfig
from seqfuse.models.recurrent import RNNEncoderConfig
from seqfuse.recipes import lora
from seqfuse.recipes.base import Optim, RunConfig, Task, check_positions, fingerprint
from seqfuse.recipes.pretrained import load_body
from seqfuse.recipes.texts import EVALUATED_ROWS, IGNORED, sorted_batches
from seqfuse.tokenizer import Tokenizer

WORD_PIECES = 6  # of a word at most: the longest example then fits into 512 positions
SHOWN = 6  # sentences in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggingConfig(RunConfig):
    """start: a pretrained body instead of the one in `model`: "minilm", or the folder of a model. lora: rank of the
    adapters that are trained instead of that body's own weights, 0: none. column: of the tag in
    the user's file, counted from 0; by default the last, in a .conllu file the fourth. test: the user's file of
    sentences that the report is about; without it a tenth of `data`. vocab: pieces of words. longest: words of an
    example; longer sentences are cut. limit: sentences of training, 0: all.
    """

    start: str | None = None
    lora: int = 0
    column: int | None = None
    test: str | None = None
    vocab: int = 8000
    longest: int = 80
    limit: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.positive("vocab", "longest")
        pretrained = self.start is not None or not self.lora
        self.require(pretrained, "adapters (lora) are for a pretrained body, which start names")


def tagging(recipe: str, arch: str, start: str | None, lora: int, **options) -> TaggingConfig:
    """arch: bilstm or transformer. With a start the rates are those of fine-tuning, adapters have one of their own."""
    if arch not in ("bilstm", "transformer"):
        raise ValueError(f"{recipe}: arch must be bilstm or transformer, got {arch!r}")
    if arch == "bilstm":
        body = RNNEncoderConfig(vocab=1, embed=128, hidden=256, layers=2, dropout_input=0.3, dropout_hidden=0.3)
    else:
        body = EncoderConfig(vocab=1, width=192, layers=4, heads=4, token_types=0, norm_first=True, dropout=0.1,
                             embedding_norm=False)  # fmt: skip
    from_scratch = 1e-3 if arch == "transformer" else 3e-3
    return TaggingConfig(
        recipe=recipe,
        start=start,
        lora=lora,
        optim=Optim(lr=2e-3 if lora else 3e-4 if start else from_scratch),
        model=TaggerConfig(body=body, labels=1, dropout=0.1 if start else 0.3),
        **options,
    )


class Tagging(Task):
    """A subclass gives sentences() and scores(), and what its report shows. source: of its sentences, for the user.
    spans: tags are those of spans."""

    unit = "words"
    higher = True
    spans = False
    source: PackageFile

    def sentences(self) -> list[tuple[Sentence, str]]:
        """(sentence, what decides its split), where the user gave no file."""
        raise NotImplementedError

    def scores(self, true: list[tuple[str, ...]], predicted: list[list[str]]) -> dict[str, float]:
        """The objective first. Tags of each sentence."""
        raise NotImplementedError

    def prepare(self) -> None:
        config = self.config
        splits: dict[str, list[Sentence]] = {"train": [], "valid": [], "test": []}
        percent = (0.0, 5.0) if config.test else (10.0, 3.0)
        for sentence, group in self.read(config.data) if config.data else self.sentences():
            splits[data.split_of(group, *percent)].append(sentence)
        if config.test:
            splits["test"] = [sentence for sentence, _ in self.read(config.test)]
        for name, part in splits.items():
            if not part:
                raise DataError(f"{config.data}: the {name} split is empty, there are too few sentences")
        counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
        self.said = f"{self.what()}\nsentences: {counts}"
        self.fingerprint = fingerprint(repr(splits))
        self.train = [cut for s in splits["train"][: config.limit or None] for cut in self.cut(s)]
        self.valid, self.test = ([cut for s in splits[name] for cut in self.cut(s)] for name in ("valid", "test"))
        self.examples = len(self.train)
        self.names = sorted({tag for s in self.train for tag in s.tags})
        self.number = {name: i for i, name in enumerate(self.names)}
        self.known = {word for s in self.train for word in s.words}
        if config.start:
            self.body = load_body(config.start)
            self.pieces = self.body.tokenizer
        else:
            words = [" " + word for s in self.train for word in s.words]
            self.pieces = self.tokenizer(lambda: Tokenizer.train(words, "bpe", vocab=config.vocab))
        self.ids_of: dict[str, list[int]] = {}
        self.encoded = [self.encode(s) for s in self.train]
        most = max(len(ids) for ids, _ in (*self.encoded, *map(self.encode, (*self.valid, *self.test))))
        check_positions(self.body.config if config.start else config.model.body, most, "longest")

    def what(self) -> str:
        """What was read, for the user."""
        if self.config.data:
            column = "last" if self.config.column is None else f"{self.config.column + 1}."
            column = "UPOS" if self.config.column is None and self.config.data.endswith(".conllu") else column
            return f"{self.config.data}: a word and its tag, the {column} column"
        return f"{self.source.source}; licence: {self.source.licence}"

    def read(self, path: str) -> list[tuple[Sentence, str]]:
        return [(s, " ".join(s.words)) for s in data.read_conll(path, self.config.column, self.spans)]

    def cut(self, sentence: Sentence) -> Iterator[Sentence]:
        for i in range(0, len(sentence.words), self.config.longest):
            yield Sentence(*(part[i : i + self.config.longest] for part in sentence))

    def encode(self, sentence: Sentence) -> tuple[list[int], list[int]]:
        """Ids of the pieces, and where each word starts."""
        around = (self.pieces.bos_id, self.pieces.eos_id) if self.config.start else (None, None)
        first, last = ([] if token is None else [token] for token in around)
        ids, starts = first, []
        for word in sentence.words:
            if word not in self.ids_of:  # the space makes byte pairs see that a word begins
                found = self.pieces.encode(f" {word}", specials=False)
                self.ids_of[word] = found[:WORD_PIECES] or [self.pieces.unk_id]
            starts.append(len(ids))
            ids += self.ids_of[word]
        return ids + last, starts

    def build(self) -> Model:
        config = self.config.model
        labels = {"labels": len(self.names), "label_names": tuple(self.names)}
        if self.config.start:
            model = Tagger.on(self.body, **labels, dropout=config.dropout)
            return lora.attach(model, self.config.lora) if self.config.lora else model
        body = dataclasses.replace(config.body, **self.pieces.config())
        model = Tagger(dataclasses.replace(config, body=body, **labels))
        model.tokenizer = self.pieces
        return model

    def order(self, epoch):
        return sorted_batches([len(ids) for ids, _ in self.encoded], self.config.batch_size, self.config.seed, epoch)

    def batch(self, indices):
        return self.collate([self.encoded[i] for i in indices], [self.train[i] for i in indices])

    def collate(self, encoded: Sequence[tuple[list[int], list[int]]], sentences: Sequence[Sentence]):
        """ids, targets [B, T] and lengths [B]; a tag that training has not is no target."""
        rows, targets = [torch.tensor(ids) for ids, _ in encoded], []
        for (ids, starts), sentence in zip(encoded, sentences, strict=True):
            target = torch.full((len(ids),), IGNORED)
            target[starts] = torch.tensor([self.number.get(tag, IGNORED) for tag in sentence.tags])
            targets.append(target)
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, True, self.pieces.pad_id or 0), pad_sequence(targets, True, IGNORED), lengths

    def loss(self, model, ids, targets, lengths):
        return model.loss(ids, targets, lengths, **self.loss_options(model)), (targets != IGNORED).sum()

    def held_out(self):
        valid = sorted(self.valid, key=lambda sentence: len(sentence.words))
        for start in range(0, len(valid), EVALUATED_ROWS):
            some = valid[start : start + EVALUATED_ROWS]
            yield self.collate([self.encode(s) for s in some], some)

    def tag(self, model: Model, sentences: Sequence[Sentence]) -> tuple[list[list[str]], float]:
        """The tags that the model gives, and the mean loss of a word."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].words))
        found: list[list[str]] = [[]] * len(sentences)
        total, count = 0.0, 0
        for start in range(0, len(order), EVALUATED_ROWS):
            some = order[start : start + EVALUATED_ROWS]
            encoded = [self.encode(sentences[i]) for i in some]
            ids, targets, lengths = self.to_device(self.collate(encoded, [sentences[i] for i in some]))
            logits = model(ids, lengths)  # (B, T, labels)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            total, count = total + float(loss), count + int((targets != IGNORED).sum())
            for i, (_, starts), row in zip(some, encoded, logits.argmax(-1).tolist(), strict=True):
                found[i] = [self.names[row[place]] for place in starts]
        return found, total / max(1, count)

    def evaluate(self, model: Model) -> dict[str, float]:
        found, loss = self.tag(model, self.valid)
        return self.scores([s.tags for s in self.valid], found) | {"loss": loss}

    def samples(self, found: Sequence[Sequence[str]]) -> str:
        """A section: sentences of the test split with the tags they got, and what the wrong ones should be."""
        rows = []
        for sentence, tags in list(zip(self.test, found, strict=True))[:SHOWN]:
            triples = zip(sentence.words, sentence.tags, tags, strict=True)
            rows.append((" ".join(f"{w}/{p}" if p == t else f"{w}/{p} (is {t})" for w, t, p in triples),))
        return report.section("Sentences of the test split", report.table([""], rows))


def flat(rows: Sequence[Sequence[str]]) -> list[str]:
    return [tag for row in rows for tag in row]
