"""The training loop: any recipe's Task, from the first step to the report, on one process or many.

    step        one global batch in `accumulate` parts, then the optimizer
    checkpoint  before the evaluation, so that no evaluation can cost work
    evaluation  on held-out data; the best weights are kept

A run that was killed at any moment and is resumed ends with the same bits (on the same machine with as many threads):
order and dropout of a step depend on the seed and the step's number alone, everything else is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from seqfuse import checkpoints, models, run_report, schedules
from seqfuse.checkpoints import RunFolder, TrainError
from seqfuse.interrupts import CatchInterrupt
from seqfuse.models.files import CheckpointError
from seqfuse.optimizer import Average, make_optimizer
from seqfuse.parallel import Group, Lost, load_shares, local, processes, save_shares
from seqfuse.recipes import lora
from seqfuse.recipes.base import RunConfig, Task
from seqfuse.runlog import RunLog


@dataclasses.dataclass
class Progress:
    """How far a run is: plain values, part of every checkpoint."""

    step: int = 0  # that are done
    epoch: int = 0  # the next batch is number `batch` of this epoch
    batch: int = 0
    evaluated: int = -1  # the step of the last evaluation
    best: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    tokens: int = 0
    seconds: float = 0.0  # of training, all sessions together
    logged: float = 0.0  # seconds at the last line of the log
    window: list[list[float]] = dataclasses.field(default_factory=list)  # the steps since then


class LossOfBatch(nn.Module):
    """The task's loss as a module's forward, which is what DDP and FSDP wrap."""

    def __init__(self, task: Task):
        super().__init__()
        self.model, self.task = task.model, task

    def forward(self, *batch) -> tuple[Tensor, Tensor | int]:
        with autocast(self.task):
            loss, tokens = self.task.loss(self.model, *batch)
            return loss.clone(), tokens  # FSDP hooks what comes out, which must be no view


def autocast(task: Task):
    return torch.autocast(task.device.type, torch.bfloat16, enabled=task.config.precision == "bf16")


class Trainer:
    """Trainer(task, folder).run(): from the newest checkpoint in the folder, or from the start."""

    def __init__(self, task: Task, folder: Path, *, group: Group | None = None, console: Console | None = None):
        self.task, self.config, self.model = task, task.config, task.model
        self.group, self.folder = group or Group(), RunFolder(Path(folder))
        self.console = console or Console(highlight=False, quiet=not self.group.first)
        self.loss = self.group.wrap(LossOfBatch(task), self.config.sharding)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(task)
        self.average = Average(self.weights, self.config.ema)
        self.progress = Progress()
        self.order: list[list[int]] = []  # the batches of the current epoch
        self.pending: list[Tensor] = []  # of steps that nobody has looked at: loss, tokens, interrupts, norm
        self.interrupt, self.clock = CatchInterrupt(), time.perf_counter()
        self.log = RunLog(self.folder.path, self.console, self.config.max_steps, task.unit, self.group.first)

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> bool:
        """Train to the end and write the finished model; False if it was interrupted, after a checkpoint was written.

        Raises TrainError, one sentence, where the folder's run is another one, a loss is not finite, or a disk is full.
        """
        self.begin()
        with self.interrupt, self.log:
            while True:
                if self.due(self.config.evaluate_every) and self.progress.evaluated < self.progress.step:
                    self.evaluate()
                if self.progress.step >= self.config.max_steps or self.out_of_patience:
                    break
                self.step(self.next_batch())
                stop = self.look(self.due(self.config.checkpoint_every) or self.due(self.config.evaluate_every))
                if self.due(self.config.checkpoint_every) or stop:
                    self.save()
                if stop:
                    return False
        self.finish()
        return True

    def due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step % every == 0 or step == self.config.max_steps)

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.worse

    def next_batch(self) -> list[int]:
        progress = self.progress
        if not self.order:
            self.order = self.task.order(progress.epoch)
        indices = self.order[progress.batch]
        progress.batch += 1
        if progress.batch == len(self.order):
            progress.epoch, progress.batch, self.order = progress.epoch + 1, 0, []
        return indices

    # --------------------------------------------------------------------------------------------------------- a step

    def step(self, indices: list[int]) -> None:
        """One update: gradients of the loss per token over the whole global batch, clipped, then AdamW."""
        config, progress = self.config, self.progress
        self.seed(((config.seed * 1_000_003 + progress.step) * 65_537 + self.group.rank) % 2**63)
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.gradients(indices)
        norm = self.scale_gradients(sums[1])
        factor = schedules.factor(config.optim.schedule, progress.step, config.optim.warmup, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * factor * self.task.rate(group["group"], progress.step)
        self.optimizer.step()
        self.average.follow()
        progress.step += 1
        self.pending.append(torch.cat([sums, norm[None]]))

    def seed(self, number: int) -> None:
        """Of everything random in a step. torch.manual_seed does the same in 0.7 ms, for devices that nobody uses."""
        torch.default_generator.manual_seed(number)
        if self.task.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def gradients(self, indices: list[int]) -> Tensor:
        """Backward passes of the parts of a batch; returns [sum of the losses, tokens, interrupts] of all of it."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.task.device)
        sums[2] = self.interrupt.wanted
        share = self.group.share(indices, self.config.accumulate)
        for i, part in enumerate(share):
            counts = bool(part)  # a process without an example computes one all the same, and forgets it
            kept = {} if counts else {name: tensor.clone() for name, tensor in self.task.carried().items()}
            with contextlib.nullcontext() if i == len(share) - 1 else self.group.quiet(self.loss):
                loss, tokens = self.loss(*self.task.to_device(self.task.batch(part or indices[:1])))
                (loss * counts).backward()
            for name, tensor in kept.items():
                self.task.carried()[name].copy_(tensor)
            sums[0] += loss.detach() * counts
            sums[1] += tokens * counts
        return self.group.sum(sums)

    def scale_gradients(self, tokens: Tensor) -> Tensor:
        """From sums to means over the tokens, and down to the largest norm allowed, in one pass; returns the norm."""
        gradients = [local(p.grad) for p in self.weights if p.grad is not None]
        scale = self.group.size / tokens.clamp_min(1)  # gradients are means over the processes
        square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        norm = (self.group.sum(square) if self.group.sharded else square).sqrt() * scale
        if self.config.optim.clip:
            scale = scale * (self.config.optim.clip / norm).clamp_max(1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        return norm

    def look(self, now: bool) -> bool:
        """Bring the numbers of the last steps from the device, check and log them; True if training is to stop.

        A GPU is waited for only where a line of the log, an evaluation or a checkpoint is due, or for a signal.
        """
        config, progress = self.config, self.progress
        line = self.due(config.log_every)
        told = self.group.size == 1 and self.interrupt.wanted  # of several, all look at the same step
        if not (now or line or told or self.task.device.type == "cpu"):
            return False
        rows, self.pending = torch.stack(self.pending).tolist(), []
        for step, row in enumerate(rows, start=progress.step - len(rows) + 1):
            if not math.isfinite(row[0] + row[3]):
                raise TrainError(
                    f"the loss or its gradient is not finite (NaN) in step {step}; {self.folder.where_to_go_on()}; "
                    "lower optim.lr or optim.clip, or look at the data"
                )
        progress.window += rows
        self.tick()
        if line:
            loss, tokens, _, norm = map(sum, zip(*progress.window, strict=True))
            progress.tokens += int(tokens)
            self.log.trained(
                {
                    "step": progress.step,
                    "loss": loss / max(1, tokens),
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "gradient_norm": norm / len(progress.window),
                    "tokens": progress.tokens,
                    "seconds": round(progress.seconds, 3),
                    "tokens_per_second": round(tokens / (progress.seconds - progress.logged), 1),
                }
            )
            progress.window, progress.logged = [], progress.seconds
        return any(row[2] for row in rows) or told

    def tick(self) -> None:
        """Count the time since the last tick as training."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    # ----------------------------------------------------------------------------------------------------- evaluation

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in eval mode, with its averaged weights if there are any."""
        self.average.swap()
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.task), self.group.gathered(self.loss):
                yield
        finally:
            self.average.swap()

    def evaluate(self) -> None:
        """Measure on held-out data; the best weights become checkpoints/best-STEP."""
        progress = self.progress
        with self.evaluating():
            metrics = self.group.agree(self.task.evaluate(self.model))
        progress.evaluated = progress.step
        value, best = metrics[self.task.objective], progress.best
        if math.isfinite(value) and (best is None or (value > best if self.task.higher else value < best)):
            progress.best, progress.best_step, progress.worse = value, progress.step, 0
            self.folder.save("best", progress.step, self.write_model, self.group)
        else:
            progress.worse += 1
        self.log.evaluated(progress.step, metrics)
        self.clock = time.perf_counter()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def begin(self) -> None:
        """Make the folder, or take up its newest checkpoint."""
        if self.group.first:
            self.folder.begin(self.config.to_dict(), self.task.fingerprint, self.model.save_tokenizers)
        self.group.wait()
        self.console.print(self.task.said, markup=False, soft_wrap=True)
        damaged = []
        for path in self.group.agree(self.folder.newest()):
            try:
                self.restore(path)
                break
            except CheckpointError as error:
                damaged.append(str(error))
                self.console.print(f"{error}; trying the checkpoint before it", soft_wrap=True, markup=False)
        else:
            if damaged:
                raise TrainError(f"no checkpoint can be read ({damaged[0]}): begin a new run with another --out")
        if self.group.first:
            self.folder.forget_best_after(self.progress.best_step)
        if self.progress.step:
            self.console.print(f"going on from step {self.progress.step:,} of {self.config.max_steps:,}")
        self.log.rewind(self.progress.step, self.progress.evaluated)
        self.clock = time.perf_counter()

    def save(self) -> None:
        """Write checkpoints/step-STEP."""
        norms = torch._foreach_norm([local(p.detach()) for p in self.weights])
        if not torch.stack(norms).isfinite().all():
            raise TrainError(f"a weight is not finite after step {self.progress.step}; {self.folder.where_to_go_on()}")
        state = {
            "config": self.config.to_dict(),
            "data": self.task.fingerprint,
            "progress": dataclasses.asdict(self.progress),
            "carried": {name: self.group.rows(tensor) for name, tensor in self.task.carried().items()},
        }

        def write(folder: Path) -> None:
            if self.config.sharding == "fsdp":
                save_shares(folder, self.loss, self.optimizer, self.average.tensors)
            elif self.group.first:
                state.update(optimizer=self.optimizer.state_dict(), average=self.average.tensors)
                self.model.save(folder)
            if self.group.first:
                checkpoints.save_state(folder, state)

        self.folder.save("step", self.progress.step, write, self.group)
        self.clock = time.perf_counter()

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        state = checkpoints.load_state(path)
        self.folder.check(state, self.config.to_dict(), self.task.fingerprint, path)
        if self.config.sharding == "fsdp":
            load_shares(path, self.loss, self.optimizer, self.average.tensors)
        else:
            checkpoints.load_weights(path, self.model)
            self.optimizer.load_state_dict(state["optimizer"])
            for average, saved in zip(self.average.tensors, state["average"], strict=True):
                average.copy_(saved)
        for name, carried in self.task.carried().items():
            carried.copy_(state["carried"][name])
        self.progress = Progress(**state["progress"])
        self.order = []

    def write_model(self, folder: Path) -> None:
        """The weights that were evaluated, as the folder of a plain model."""
        self.average.swap()
        tensors = self.group.whole(self.model)
        if self.group.first:
            self.model.save(folder, lora.merge(tensors))
        self.average.swap()

    def finish(self) -> None:
        """The finished model, its results and the report, in the run's folder."""
        kind = "best" if self.config.keep == "best" and self.folder.newest("best") else "last"
        kind = self.group.agree(kind)  # another process may look before the first one has renamed what it wrote
        if kind == "last":
            self.folder.save("last", self.progress.step, self.write_model, self.group)
        if self.group.first:
            model = self.task.finished(models.load(self.folder.newest(kind)[0], device=self.task.device))
            with checkpoints.writing(self.folder.path / "model.safetensors"):
                model.save(self.folder.path)
        self.group.wait()
        if self.group.first:
            findings = run_report.finish(self.task, self.folder, self.progress)
            for name, value in findings.metrics.items():
                self.console.print(f"{name}: {run_report.show(value)}", soft_wrap=True, markup=False)
            if findings.text:
                self.console.print(f"\n{findings.text}\n", markup=False, soft_wrap=True)
            self.console.print(
                f"{self.folder.path}: the model, its report.html and log.jsonl", soft_wrap=True, markup=False
            )


def train(config: RunConfig, folder: Path, *, device: str = "auto", console: Console | None = None) -> bool:
    """Train a recipe's config, from the start or from where the folder's run stopped; False if it was interrupted.

    Under torchrun every process calls it. Raises DataError, CheckpointError or TrainError with one sentence.
    """
    try:
        with processes(device) as (group, where):
            return train_in(group, where, config, Path(folder), console)
    except Lost as error:
        raise TrainError(f"{error}; {RunFolder(Path(folder)).where_to_go_on()}") from error


def train_in(group: Group, device: torch.device, config: RunConfig, folder: Path, console: Console | None) -> bool:
    """train() in a group of processes that is there already; all of them call it."""
    from seqfuse.recipes import RECIPES

    recipe = RECIPES[config.recipe]
    if not group.first:
        group.wait()  # the first one makes the folder, so that all have the same tokenizers
    task = recipe.task(config, device, folder if RunFolder(folder).exists else None)
    if group.first:
        RunFolder(folder).begin(config.to_dict(), task.fingerprint, task.model.save_tokenizers)
        group.wait()

    def train_first(config: RunConfig, name: str) -> bool:
        finished = group.agree(RunFolder(folder / name).finished)
        return finished or train_in(group, device, config, folder / name, console)

    return task.ready(folder, train_first) and Trainer(task, folder, group=group, console=console).run()
