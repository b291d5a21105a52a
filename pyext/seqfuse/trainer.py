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

from seqfuse import checkpoints, schedules
from seqfuse.checkpoints import RunFolder, TrainError
from seqfuse.interrupts import CatchInterrupt
from seqfuse.models import files
from seqfuse.models.files import CheckpointError
from seqfuse.parallel import Group
from seqfuse.recipes.base import Optim, RunConfig, Task
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
    window: list[list[float]] = dataclasses.field(default_factory=list)  # steps since the last line of the log


class LossOfBatch(nn.Module):
    """The task's loss as a module's forward, which is what DDP and FSDP wrap."""

    def __init__(self, task: Task):
        super().__init__()
        self.model, self.task = task.model, task

    def forward(self, *batch) -> tuple[Tensor, Tensor | int]:
        with autocast(self.task):
            return self.task.loss(self.model, *batch)


def autocast(task: Task):
    return torch.autocast(task.device.type, torch.bfloat16, enabled=task.config.precision == "bf16")


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


class Trainer:
    """Trainer(task, folder).run(): from the newest checkpoint in the folder, or from the start."""

    def __init__(self, task: Task, folder: Path, *, group: Group | None = None, console: Console | None = None):
        self.task, self.config, self.model = task, task.config, task.model
        self.group, self.folder = group or Group(), RunFolder(folder)
        self.console = console or Console(highlight=False)
        self.loss = LossOfBatch(task)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, self.config.optim)
        self.average = [p.detach().clone() for p in self.weights] if self.config.ema else []
        self.progress = Progress()
        self.order: list[list[int]] = []  # the batches of the current epoch
        self.log = RunLog(folder / "log.jsonl", self.console, self.config.max_steps, task.unit)

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> bool:
        """Train to the end and report; False if it was interrupted, after the checkpoint was written."""
        self.begin()
        with CatchInterrupt() as interrupt, self.log:
            while True:
                if self.due(self.config.evaluate_every) and self.progress.evaluated < self.progress.step:
                    self.evaluate()
                if self.progress.step >= self.config.max_steps or self.out_of_patience:
                    break
                self.step(self.next_batch())
                if self.due(self.config.checkpoint_every) or interrupt.wanted:
                    self.save()
                if interrupt.wanted:
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
        config, progress, started = self.config, self.progress, time.perf_counter()
        torch.manual_seed((config.seed * 1_000_003 + progress.step) * 65_537 + self.group.rank)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.gradients(indices)
        norm = self.scale_gradients(sums[1])
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * self.schedule()
        self.optimizer.step()
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - config.ema)
        progress.step += 1
        progress.window.append([*sums.tolist(), float(norm)])
        progress.seconds += time.perf_counter() - started
        self.check_and_log()

    def gradients(self, indices: list[int]) -> Tensor:
        """Backward passes of the parts of a batch; returns (sum of the losses, tokens) of all of it."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.task.device)
        for part in parts(indices, self.config.accumulate):
            loss, tokens = self.loss(*self.task.to_device(self.task.batch(part)))
            loss.backward()
            sums[0] += loss.detach()
            sums[1] += tokens
        return sums

    def scale_gradients(self, tokens: Tensor) -> Tensor:
        """From sums to means over the tokens, and down to the largest norm allowed, in one pass; returns the norm."""
        gradients = [p.grad for p in self.weights if p.grad is not None]
        scale = 1 / tokens.clamp_min(1)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) * scale
        if self.config.optim.clip:
            scale = scale * (self.config.optim.clip / (norm + 1e-6)).clamp_max(1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        return norm

    def schedule(self) -> float:
        optim = self.config.optim
        return schedules.factor(optim.schedule, self.progress.step, optim.warmup, self.config.max_steps)

    def check_and_log(self) -> None:
        progress, config = self.progress, self.config
        losses, tokens, norms = zip(*progress.window, strict=True)
        if not math.isfinite(losses[-1] + norms[-1]):
            raise TrainError(
                f"the loss or its gradient is not finite in step {progress.step}; the last checkpoint is kept: lower "
                "optim.lr or optim.clip, or look at the data"
            )
        if progress.step % config.log_every and progress.step != config.max_steps:
            return
        count = sum(tokens)
        progress.tokens += int(count)
        self.log.trained(
            {
                "step": progress.step,
                "loss": sum(losses) / max(1, count),
                "lr": self.optimizer.param_groups[0]["lr"],
                "gradient_norm": sum(norms) / len(norms),
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "tokens_per_second": progress.tokens / progress.seconds,
            }
        )
        progress.window = []

    # --------------------------------------------------------------------------------------------------- evaluation

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in eval mode, with its averaged weights if there are any."""
        self.swap_average()
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.task):
                yield
        finally:
            self.swap_average()

    @torch.no_grad()
    def swap_average(self) -> None:
        for weight, average in zip(self.weights, self.average, strict=bool(self.average)):
            other = weight.clone()
            weight.copy_(average)
            average.copy_(other)

    def evaluate(self) -> None:
        """Measure on held-out data; the best weights become checkpoints/best-STEP."""
        progress = self.progress
        with self.evaluating():
            metrics = self.task.evaluate(self.model)
            progress.evaluated = progress.step
            value = metrics[self.task.objective]
            sign = -1 if self.task.higher else 1
            if progress.best is None or sign * value < sign * progress.best:
                progress.best, progress.best_step, progress.worse = value, progress.step, 0
                self.folder.save("best", progress.step, self.model.save)
            else:
                progress.worse += 1
        self.log.evaluated(progress.step, metrics)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def begin(self) -> None:
        """Start the folder, or take up its newest checkpoint."""
        values = {"config": self.config.to_dict(), "data": self.task.fingerprint}
        if not self.folder.exists:
            self.folder.begin(values)
            self.save_tokenizers()
        for path in self.folder.steps():
            try:
                self.restore(path)
                break
            except CheckpointError as error:
                self.console.print(f"{error}; trying the checkpoint before it", soft_wrap=True)
        self.log.rewind(self.progress.step, self.progress.evaluated)

    def save_tokenizers(self) -> None:
        for name, file in (("tokenizer", "tokenizer.json"), ("source_tokenizer", "source_tokenizer.json")):
            if getattr(self.model, name) is not None:
                getattr(self.model, name).save(self.folder.path / file)

    def save(self) -> None:
        state = {
            "progress": dataclasses.asdict(self.progress),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "carried": self.task.carried(),
        }

        def write(folder: Path) -> None:
            self.model.save(folder)
            checkpoints.save_state(folder, state)

        self.folder.save("step", self.progress.step, write)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        state, tensors = checkpoints.load_state(path), files.read_safetensors(path / "model.safetensors")
        own = files.tensors_of(self.model)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        for own, saved in zip(self.average, state["average"], strict=True):
            own.copy_(saved)
        for name, carried in self.task.carried().items():
            carried.copy_(state["carried"][name])
        self.progress = Progress(**state["progress"])

    def finish(self) -> None:
        """The finished model, in the run's folder."""
        best = self.folder.steps("best")
        if self.config.keep == "best" and best:
            own = files.tensors_of(self.model)
            with torch.no_grad():
                for name, tensor in files.read_safetensors(best[0] / "model.safetensors").items():
                    own[name].copy_(tensor)
        self.model.eval()
        self.model.save(self.folder.path)


def parts(indices: list[int], count: int) -> list[list[int]]:
    """Indices cut into `count` parts of almost one size, in order; empty ones are left out."""
    bounds = [len(indices) * i // count for i in range(count + 1)]
    return [indices[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def train(config: RunConfig, folder: Path, device: str = "cpu") -> Trainer:
    """Train a recipe's config in this process, from the start or from where the folder's run stopped."""
    from seqfuse.recipes import RECIPES

    task = RECIPES[config.recipe].task(config, device, folder)
    trainer = Trainer(task, folder)
    trainer.run()
    return trainer
