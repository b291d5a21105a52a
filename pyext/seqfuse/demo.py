"""`seqfuse demo`: build, time, fuse, check, time again, train, evaluate, report. The recipe is recipes/g2p.py.

Plain is the same model as torch.nn has it (`seqfuse.unfuse`), its other ops PyTorch's own; the one line that makes it
fast is `seqfuse.fuse(model)`. Every speed that is printed was measured in this run (or, after --resume, in the run that
was interrupted), whether the fused model is faster or not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import seqfuse
from seqfuse import dispatch, report, testing
from seqfuse.checkpoints import RunFolder, writing
from seqfuse.interrupts import INTERRUPTED
from seqfuse.models.files import read_json, write_json
from seqfuse.optimizer import make_optimizer
from seqfuse.parallel import pick_device
from seqfuse.recipes import g2p
from seqfuse.recipes.base import Findings, RunConfig
from seqfuse.tokenizer import SPECIALS
from seqfuse.trainer import Trainer, autocast

TIMED_STEPS = 16
DECODED = 1500  # words, for the speed of decoding
SPLITS = (("train", "for training"), ("valid", "for validation"), ("test", "held out for the test"))


class DemoError(Exception):
    """One sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Options:
    out: Path
    config: RunConfig
    device: str = "auto"
    resume: bool = False


@dataclasses.dataclass
class Measured:
    """What was found before training; kept in the run's folder, so that a resumed run can report it."""

    speed: list[list] = dataclasses.field(default_factory=list)  # what, plain, fused, unit
    checks: list[list] = dataclasses.field(default_factory=list)  # what, relative errors of plain and fused float32
    backends: list[list] = dataclasses.field(default_factory=list)  # module, op, backend, reason

    def speed_lines(self) -> list[str]:
        return [f"{w}: plain {p:,.2f} {u}, fused {f:,.2f} {u}, ratio {f / p:.2f}x" for w, p, f, u in self.speed]


# ------------------------------------------------------------------------------------------- correctness and speed


def plain_copy(model: nn.Module) -> nn.Module:
    return seqfuse.unfuse(copy.deepcopy(model))


def check_equal(task: g2p.G2P, plain: nn.Module, fused: nn.Module, batch: tuple) -> list[list]:
    """Hold fused logits and gradients against float64 by the library's one error rule (seqfuse.testing).

    Raises DemoError on a violation.
    """
    exact = copy.deepcopy(plain).double()
    logits, grads = [], []
    for model, ops in ((exact, dispatch.plain), (plain, dispatch.plain), (fused, contextlib.nullcontext)):
        with ops():
            model.zero_grad()
            logits.append(model(*batch[:2]).detach())
            task.loss(model, *batch)[0].backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
            model.zero_grad()
    rows = []
    try:
        testing.assert_accurate(logits[2], logits[0], logits[1], dims=(0, 1), what="logits")
        rows.append(["logits", *(float(testing.relative_error(x, logits[0])) for x in logits[1:])])
        for name, truth in grads[0].items():
            testing.assert_accurate(grads[2][name], truth, grads[1][name], what=f"gradient of {name}")
            errors = (float(testing.relative_error(g[name], truth)) for g in grads[1:])
            rows.append([f"gradient of {name}", *errors])
    except AssertionError as error:
        raise DemoError(f"the fused model does not compute what the plain one does: {error}") from error
    return rows


def time_alternately(contenders: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over rounds; in every round each runs once on the same work, in turn. What is
    called "plain" runs on PyTorch's own ops."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders) if i % 2 == 0 else list(contenders)[::-1]
        for name in names:
            with dispatch.plain() if name == "plain" else contextlib.nullcontext():
                start = time.perf_counter()
                contenders[name](i)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def stepper(task: g2p.G2P, model: nn.Module, work: list[tuple]) -> Callable[[int], None]:
    """A training step on one of the batches in `work`, the same as the trainer's."""
    optimizer = make_optimizer(task, model)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(task):
            loss, tokens = task.loss(model, *work[i % len(work)])
        (loss / tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), task.config.optim.clip)
        optimizer.step()

    return step


# -------------------------------------------------------------------------------------------------------- the demo


class ShownG2P(g2p.G2P):
    """The recipe, which also reports what the demo measured."""

    measured: Measured

    def report(self, model) -> Findings:
        findings, measured = super().report(model), self.measured
        measured.speed = [*measured.speed[:1], self.decoding_speed(model)]
        speed = report.table(
            ["", "plain torch.nn", "fused", "ratio"],
            [(w, f"{p:,.2f} {u}", f"{f:,.2f} {u}", f"{f / p:.2f}x") for w, p, f, u in measured.speed],
            numbers=(1, 2, 3),
        )
        checks = report.table(
            ["relative L2 error against float64", "plain torch.nn", "fused"],
            [(name, f"{plain:.1e}", f"{fused:.1e}") for name, plain, fused in measured.checks],
            numbers=(1, 2),
        )
        findings.sections += [
            report.section(
                "Speed",
                speed,
                report.paragraph(
                    "Measured in one run, plain and fused taking turns on the same batches; medians. Larger is faster.",
                    soft=True,
                ),
                report.table(["module", "op", "backend in training", "why"], measured.backends),
            ),
            report.section(
                "Is it the same model?",
                report.paragraph(
                    "Before training: logits and every gradient of one batch, in float32. The rule is at most twice "
                    "plain PyTorch's own error plus a floor of 2e-6."
                ),
                report.details(f"logits and {len(measured.checks) - 1} gradients", checks),
                report.paragraph(f"Data: {self.said}.", soft=True),
            ),
        ]
        findings.text += "\n\n" + "\n".join(measured.speed_lines())
        return findings

    def decoding_speed(self, model: nn.Module) -> list:
        words, plain = self.words["test"][:DECODED], plain_copy(model)
        contenders = {
            "plain": lambda i: self.transcribe(plain, words),
            "fused": lambda i: self.transcribe(model, words),
        }
        time_alternately(contenders, 1)
        seconds = time_alternately(contenders, 4)
        return ["greedy decoding", len(words) / seconds["plain"], len(words) / seconds["fused"], "words/s"]


class Demo:
    def __init__(self, options: Options, console: Console | None = None):
        self.options = options
        self.console = console or Console(highlight=False)
        self.folder = RunFolder(options.out)
        self.notes = options.out / "measured.json"
        self.device = pick_device(options.device)
        self.config = options.config
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def head(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def run(self) -> int:
        """The whole demo; returns the exit code."""
        if self.options.resume:
            self.config = g2p.RECIPE.read(self.folder.settings()["config"])
        else:
            self.make_folder()
        try:
            task = self.prepare()
            task.measured = self.read_notes() if self.options.resume else self.compare(task)
        except KeyboardInterrupt:
            self.say("\ninterrupted before training began: start again with the same command")
            return INTERRUPTED
        self.head("5  Training the fused model")
        trainer = Trainer(task, self.options.out, console=self.console)
        try:
            if not trainer.run():
                return self.explain_resume(f"stopped after step {trainer.progress.step:,} of {self.config.max_steps:,}")
        except KeyboardInterrupt:
            return self.explain_resume("stopped")
        self.say(f"{trainer.progress.step:,} steps in {trainer.progress.seconds:.0f} s")
        self.say(f"try  seqfuse translate {self.options.out} --beams 1 somethingology")
        self.say(f"report: {self.options.out / 'report.html'}")
        self.say(f"{time.perf_counter() - self.started:.0f} s in all")
        return 0

    def make_folder(self) -> None:
        """An empty one. A new run never overwrites an earlier one that somebody may still want."""
        out = self.options.out
        try:
            if self.folder.exists or self.folder.taken():
                old = next(p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.old{i}")).exists())
                out.rename(old)
                self.say(f"the earlier run in {out} is now {old}")
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"cannot make the folder {out}: {error.strerror}") from error

    def read_notes(self) -> Measured:
        try:
            return Measured(**read_json(self.notes))
        except TypeError as error:
            raise DemoError(f"{self.notes}: is not what this version writes ({error}): begin a new run") from error

    def explain_resume(self, what: str) -> int:
        if not self.folder.newest():
            self.say(f"\n{what} before the first checkpoint: start again with the same command")
            return INTERRUPTED
        more = [] if self.options.out == Path("demo") else ["--out", str(self.options.out)]
        arguments = shlex.join(["--resume", *more])
        self.say(f"\n{what}; everything is in {self.options.out}. Go on from there with")
        self.say(f"    seqfuse demo {arguments}")
        self.say(f'or  make demo ARGS="{arguments}"')
        return INTERRUPTED

    def prepare(self) -> ShownG2P:
        self.head("1  Data and model")
        with self.console.status("reading the pronouncing dictionary"):
            task = ShownG2P(self.config, self.device, self.options.out if self.options.resume else None)
        counts = ", ".join(f"{len(task.words[split]):,} {name}" for split, name in SPLITS)
        phonemes = task.phonemes.vocab_size - len(SPECIALS)
        self.say(f"{len(task.lexicon):,} words split by hash: {counts}; {phonemes} phonemes")
        size, where = task.model.num_parameters() / 1e6, report.device_name(self.device)
        self.say(f"attention encoder-decoder (GRU), {size:.2f} million parameters; on {where}")
        return task

    def compare(self, task: ShownG2P) -> Measured:
        """Time plain, fuse, check, time both alternately. Nothing of it touches the model that is trained."""
        measured, config = Measured(), task.config
        # Rare word lengths make small batches: of the first ones take the largest.
        first = sorted(task.order(0)[: 4 * TIMED_STEPS], key=len, reverse=True)[:TIMED_STEPS]
        work = [task.to_device(task.batch(indices)) for indices in first]
        plain = plain_copy(task.model)

        self.head("2  Plain torch.nn")
        plain_step = stepper(task, plain, work)
        time_alternately({"plain": plain_step}, 2)  # allocations, first-call choices
        alone = time_alternately({"plain": plain_step}, TIMED_STEPS)
        self.say(f"{1 / alone['plain']:.2f} training steps/s, {config.batch_size} words each")

        self.head("3  Fused: seqfuse.fuse(model)")
        fused = seqfuse.fuse(copy.deepcopy(plain))
        measured.checks = check_equal(task, plain, fused, work[0])
        # what the training pass inside check_equal ran on; seqfuse.explain(model) also tells what was refused and why
        measured.backends = [[row.module, row.op, row.backend, row.reason] for row in seqfuse.explain(fused)]
        chosen = Table("module", "op", "backend", "why", box=None, pad_edge=False, header_style="dim")
        for row in measured.backends:
            chosen.add_row(*row)
        self.console.print(chosen)
        worst = max(measured.checks, key=lambda row: row[2])
        self.say(
            f"logits and {len(measured.checks) - 1} gradients keep the error rule against float64; largest relative "
            f"error {worst[2]:.1e} (plain torch.nn there: {worst[1]:.1e}), {worst[0]}"
        )

        self.head("4  Plain and fused, alternately")
        contenders = {"plain": plain_step, "fused": stepper(task, fused, work)}
        time_alternately(contenders, 2)
        seconds = time_alternately(contenders, TIMED_STEPS)
        measured.speed = [["training step", 1 / seconds["plain"], 1 / seconds["fused"], "steps/s"]]
        self.say(measured.speed_lines()[0])
        with writing(self.notes):
            write_json(self.notes, dataclasses.asdict(measured))
        return measured
