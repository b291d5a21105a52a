"""A recipe for tests of the trainer: sequences that count up, round and round, from anywhere. Small models learn it.

Targets are ignored here and there, so that examples have different numbers of tokens. As a script it trains under
torchrun: python -m torch.distributed.run ... tests/training.py FOLDER '{"max_steps": 8}'.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from seqfuse import trainer
from seqfuse.models import DecoderConfig, Model, RNNLanguageModelConfig
from seqfuse.recipes import RECIPES
from seqfuse.recipes.base import Findings, Optim, Recipe, RunConfig, Task, fingerprint
from seqfuse.tokenizer import Tokenizer

VOCAB = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountingConfig(RunConfig):
    """carry: the task remembers what it saw, as recurrent models do from batch to batch."""

    length: int = 9
    examples: int = 40
    carry: bool = False
    poison: int = 0  # an example whose loss is NaN, counted from 1


def counting(kind: str = "rnn") -> CountingConfig:
    if kind == "rnn":
        model = RNNLanguageModelConfig(vocab=VOCAB, cell="gru", embed=16, hidden=16, dropout_output=0.1)
    else:
        model = DecoderConfig(vocab=VOCAB, width=16, layers=2, heads=2, max_positions=16, dropout=0.1)
    return CountingConfig(
        recipe="counting", max_steps=12, batch_size=8, checkpoint_every=4, evaluate_every=6, log_every=1,
        optim=Optim(lr=3e-2, warmup=2), model=model,
    )  # fmt: skip


class Counting(Task):
    def prepare(self):
        c = self.config
        random = torch.Generator().manual_seed(7)
        ids = (torch.randint(0, VOCAB, (c.examples + 8, 1), generator=random) + torch.arange(c.length + 1)) % VOCAB
        x, y = ids[:, :-1], ids[:, 1:].clone()
        y[torch.rand(y.shape, generator=random) < 0.3] = -100
        y[:, -1] = ids[:, -1]
        self.train, self.valid, self.examples = (x[:-8], y[:-8]), (x[-8:], y[-8:]), c.examples
        self.fingerprint = fingerprint(Path(c.data)) if c.data else fingerprint(str(ids.tolist()))
        self.words = self.tokenizer(lambda: Tokenizer.of([chr(97 + i) for i in range(VOCAB)], "characters"))
        self.seen = torch.zeros(c.batch_size)

    def build(self):
        model = Model.from_config(self.config.model)
        model.tokenizer = self.words
        return model

    def batch(self, indices):
        factor = torch.ones(len(indices))
        if self.config.poison and self.config.poison - 1 in indices:
            factor[indices.index(self.config.poison - 1)] = float("nan")
        return *(t[indices] for t in self.train), factor.sum() / len(indices)

    def loss(self, model, ids, targets, factor=1.0):
        loss = model.loss(ids, targets, **self.loss_options(model)) * factor
        if self.config.carry and model.training:
            loss = loss * (1 + 0.01 * torch.sin(self.seen.sum()))
            self.seen += ids.float().mean()
        return loss, (targets >= 0).sum()

    def carried(self):
        return {"seen": self.seen} if self.config.carry else {}

    def held_out(self):
        return [self.valid]

    def report(self, model):
        return Findings(self.evaluate(model) | {"signature": "exact"}, text="a sample [not markup]")


RECIPE = RECIPES["counting"] = Recipe("counting", "counts, for tests", counting, Counting)


def make(**changes) -> Counting:
    return Counting(RECIPE.configure(changes))


def run(folder, changes) -> bool:
    """A run in one process with one thread."""
    torch.set_num_threads(1)
    return trainer.train(RECIPE.configure(changes), folder, device="cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer.train(RECIPE.configure(json.loads(sys.argv[2])), Path(sys.argv[1]), device="cpu")
