"""A recipe for tests of the trainer: sequences that count up, round and round, from anywhere. Small models learn it.

Targets are ignored here and there, so that examples have different numbers of tokens. As a script it trains under
torchrun: python -m torch.distributed.run ... tests/training.py FOLDER '{"max_steps": 8}'.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import torch
from rich.console import Console

from seqfuse import trainer
from seqfuse.checkpoints import TrainError
from seqfuse.cli_train import one_sentence
from seqfuse.models import DecoderConfig, Model, RNNLanguageModelConfig
from seqfuse.parallel import processes
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
    double: bool = False


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
        return model.double() if self.config.double else model

    def order(self, epoch):
        if not self.config.carry:
            return super().order(epoch)
        size = self.config.batch_size  # row i goes on where it was in the batch before
        return [list(range(i, i + size)) for i in range(0, self.examples - size + 1, size)]

    def batch(self, indices):
        factor = torch.ones(len(indices), 1)
        if self.config.poison and self.config.poison - 1 in indices:
            factor[indices.index(self.config.poison - 1)] = float("nan")
        return *(t[indices] for t in self.train), factor, torch.tensor(indices) % self.config.batch_size

    def loss(self, model, ids, targets, factor=1.0, rows=None):
        if self.config.carry and model.training:
            factor = factor * (1 + 0.1 * torch.sin(self.seen[rows]))[:, None]
            self.seen[rows] += ids.float().mean(1)
        loss = model.loss(ids, targets, **self.loss_options(model) | {"reduction": "none"}) * factor
        return loss.sum(), (targets >= 0).sum()

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


def run_until(folder, changes, step: int) -> None:
    """A run that is interrupted after a step."""
    torch.set_num_threads(1)
    config = RECIPE.configure(changes)
    with processes("cpu") as (group, device):
        one = trainer.Trainer(Counting(config, device), folder, group=group)
        next_batch = one.next_batch

        def interrupted():
            one.interrupt.wanted = one.progress.step == step - 1
            return next_batch()

        one.next_batch = interrupted
        assert not one.run()


def run_recipe(folder, recipe: str, changes) -> bool:
    """A run of any recipe, with one thread; several processes may call it together."""
    torch.set_num_threads(1)
    config = RECIPES[recipe].configure(changes)
    return trainer.train(config, folder, device="cpu", console=Console(quiet=True))


def run_on_full_disk(folder, changes) -> None:
    """A run that can write no file of more than some bytes from its second checkpoint on: what a full disk is like."""
    torch.set_num_threads(1)
    config = RECIPE.configure(changes)
    with processes("cpu") as (group, device):
        one = trainer.Trainer(Counting(config, device), folder, group=group)
        save = one.save

        def save_on_full_disk():
            if one.progress.step == 8:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            save()

        one.save = save_on_full_disk
        try:
            one.run()
        except TrainError as error:
            assert "step-000008: could not be written: File too large" in str(error), error
        else:
            raise AssertionError("all was written")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


SERVER = multiprocessing.get_context("forkserver")  # processes that begin in no time, with torch imported once
SERVER.set_forkserver_preload(["seqfuse.trainer", "torch._dynamo", "torch.distributed.checkpoint"])


def start(function, *arguments) -> multiprocessing.Process:
    """Another process, which calls function(*arguments)."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    return process


def call_as(rank: int, size: int, port: int, function, *arguments) -> None:
    """One of `size` processes, with what torchrun would tell it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(size: int, function, *arguments) -> list[int]:
    """function(*arguments) on several processes; returns their exit codes."""
    port = free_port()
    running = [start(call_as, rank, size, port, function, *arguments) for rank in range(size)]
    for process in running:
        process.join(240)  # a loaded machine takes its time; a process that hangs is not waited for
        process.kill()
        process.join()
    return [process.exitcode for process in running]


def save_gradients(folder, changes) -> None:
    """Those of the first batch, whole, as the optimizer would see them: FOLDER/gradients.pt."""
    torch.set_num_threads(1)
    with processes("cpu") as (group, _):
        one = trainer.Trainer(make(**changes), folder, group=group)
        norm = one.scale_gradients(one.gradients(one.next_batch())[1])
        whole = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in one.model.named_parameters()}
        if group.first:
            folder.mkdir()
            torch.save(whole | {"norm": norm}, folder / "gradients.pt")


if __name__ == "__main__":
    with one_sentence():
        run(Path(sys.argv[1]), json.loads(sys.argv[2]))
