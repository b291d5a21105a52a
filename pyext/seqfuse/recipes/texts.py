"""What recipes over running text share: where it comes from, what is held out, how it becomes examples and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from seqfuse import attention_pictures, data, metrics, report
from seqfuse.data import DataError
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.config import MODELS
from seqfuse.recipes.base import Findings, RunConfig, Task, check_positions, fingerprint, generator
from seqfuse.tokenizer import SPECIALS, Tokenizer

IGNORED = -100  # as a target: predict nothing here
EVALUATED_ROWS = 64  # of a batch
UNK = SPECIALS[3]
MOST_UNKNOWN = 1e-3  # share of it
SAMPLED = 300  # tokens of the sample in the report, at most
POOL = 32  # batches that are sorted by length together, before they are shuffled


def sorted_batches(lengths: Sequence[Any], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch for examples of these lengths, which may be tuples: pools of shuffled examples are sorted
    by length before they are cut into batches of `size`, so little is padded."""
    random = generator(seed, epoch)
    shuffled = torch.randperm(len(lengths), generator=random).tolist()
    batches = []
    for start in range(0, len(lengths), POOL * size):
        pool = sorted(shuffled[start : start + POOL * size], key=lengths.__getitem__)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(RunConfig):
    """text: without a file of your own, "gutenberg" (books: those whose name starts so), or "stdlib", the source code
    of the running Python's standard library, which needs no network. limit: characters of these that are used; a file
    of your own is read to its end. tokens: the kind of tokenizer, trained on the training text; vocab: how many tokens
    it may have. length: tokens of one example. prompt: what the sample in the report goes on from.
    """

    text: Literal["gutenberg", "stdlib"] = "gutenberg"
    books: str = "austen"
    limit: int = 1_000_000
    tokens: Literal["characters", "bytes", "bpe"] = "characters"
    vocab: int = 1000
    length: int = 128
    prompt: str = "The "

    def __post_init__(self):
        super().__post_init__()
        self.positive("limit", "vocab", "length")
        self.require(self.prompt != "", "prompt must not be empty")


class TextTask(Task):
    """Text -> train_ids and held_ids, both [N] int64. Every twentieth piece of the text is held out.

    A subclass may cut examples its own way; here they are pieces of `length` tokens, the targets the tokens behind.
    """

    def prepare(self) -> None:
        config = self.config
        text, name = self.read()
        train, held = data.hold_out(text)
        self.said = f"{name}: {len(text):,} characters, of which {len(held):,} are held out"
        self.unit = "characters" if config.tokens == "characters" else "tokens"
        self.fingerprint = fingerprint(text)
        self.text_tokenizer = self.tokenizer(lambda: self.train_tokenizer(train))
        self.train_ids = torch.tensor(self.text_tokenizer.encode(train))
        self.held_ids = torch.tensor(self.text_tokenizer.encode(held))
        self.held_bytes = len(held.encode())
        self.check_unknown(name, text)
        if len(self.train_ids) <= config.length or len(self.held_ids) < 2:
            raise DataError(
                f"{config.data or config.text}: {len(text)} characters are too few for examples of {config.length} "
                "tokens"
            )
        self.examples = (len(self.train_ids) - 1) // config.length
        check_positions(getattr(config.model, "body", config.model), config.length, "length")
        most = getattr(config.model, "max_positions", None)
        self.room = SAMPLED if most is None else min(SAMPLED, most - len(self.text_tokenizer.encode(config.prompt)))
        if self.room < 1:
            raise DataError(f"prompt: it leaves no room for a sample in the model's {most} positions (max_positions)")

    def check_unknown(self, name: str, text: str) -> None:
        """Characters that became <unk> are easily foretold: with many of them no number would say anything. Where the
        text itself says <unk>, it is meant."""
        if self.config.tokens != "characters":
            return
        ids = torch.cat([self.train_ids, self.held_ids])
        unknown = int((ids == self.text_tokenizer.unk_id).sum()) - text.count(UNK)
        if unknown > MOST_UNKNOWN * len(ids):
            raise DataError(
                f"{name}: {unknown:,} of {len(ids):,} characters are none of the {self.config.vocab} tokens (vocab); "
                "raise vocab, or take tokens=bpe, which knows them all"
            )
        if unknown:
            self.said += f"; {unknown:,} characters are too rare to be tokens"

    def read(self) -> tuple[str, str]:
        """The text, and what it is."""
        config = self.config
        if config.data:
            return data.read_text(config.data), config.data
        if config.text == "stdlib":
            return data.standard_library()[: config.limit], "source code of Python's standard library"
        item = data.SETS["gutenberg"]
        books = data.gutenberg(config.books)[: config.limit]
        return books, f"{item.source}, those called {config.books}*; {item.licence}"

    def train_tokenizer(self, text: str) -> Tokenizer:
        return Tokenizer.train([text], self.config.tokens, vocab=self.config.vocab)

    def build(self) -> Model:
        config = dataclasses.replace(self.config.model, **self.text_tokenizer.config())
        model = MODELS[config.model](config)
        model.tokenizer = self.text_tokenizer
        return model

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """ids and targets, [B, length] each."""
        places = torch.tensor(indices)[:, None] * self.config.length + torch.arange(self.config.length)
        return self.train_ids[places], self.train_ids[places + 1]

    def loss(self, model, ids, targets):
        return model.loss(ids, targets, **self.loss_options(model)), (targets != IGNORED).sum()

    def held_out(self):
        """Pieces of almost `length` tokens."""
        x, y = self.split_rows(-(-(len(self.held_ids) - 1) // self.config.length))
        return zip(x.split(EVALUATED_ROWS), y.split(EVALUATED_ROWS), strict=True)

    def evaluate(self, model: Model) -> dict[str, float]:
        return self.named(super().evaluate(model)["loss"])

    def named(self, loss: float) -> dict[str, float]:
        """loss: the mean over the held-out tokens, in nats; and what it is in other units."""
        bits = metrics.bits_per_byte(loss * (len(self.held_ids) - 1), self.held_bytes)
        return {"loss": loss, "perplexity": metrics.perplexity(loss), "bits_per_byte": bits}

    def split_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """All of the held-out text once as ids and targets, [rows, N] each; the end of the last row has targets that
        don't count."""
        ids = self.held_ids
        width = -(-(len(ids) - 1) // rows)
        missing = rows * width - (len(ids) - 1)
        x = torch.cat([ids[:-1], ids.new_zeros(missing)]).view(rows, width)
        y = torch.cat([ids[1:], ids.new_full((missing,), IGNORED)]).view(rows, width)
        return x, y

    def report(self, model: Model) -> Findings:
        """What evaluate() says, a text that the model wrote, and where it looks if it has attention."""
        sample = generate(model, self.config.prompt, max_new_tokens=self.room, temperature=0.8, seed=self.config.seed)
        sections = [report.section("Sample", report.verbatim(sample))]
        sections += attention_pictures.to_itself(model, self.text_tokenizer, self.held_ids)
        return Findings(self.evaluate(model), sections, sample)
