"""`seqfuse train RECIPE --compare-reference`: the same model twice, on seqfuse's kernels and on plain PyTorch.

Both start from the same weights, see the same batches and take turns, step by step, so that whatever else the machine
does meets both. The plain one is the model after seqfuse.unfuse, its ops PyTorch's own (dispatch.plain). Before a speed
is measured, both must compute the same loss.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqfuse
from seqfuse import dispatch, testing
from seqfuse.checkpoints import TrainError
from seqfuse.models.blocks import Norm
from seqfuse.parallel import pick_device
from seqfuse.recipes.base import RunConfig, Task
from seqfuse.trainer import Trainer, autocast

STEPS = 100  # at most
WARM_UP = 5  # steps that are not timed: first calls choose and allocate
LAST = 10  # steps whose mean loss is shown


class _Packing:
    """torch.nn's recurrent layers with lengths, as one gives them to PyTorch: packed sequences."""

    def forward(self, x, hx=None, *, lengths=None):
        if lengths is None:
            return super().forward(x, hx)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, state = super().forward(packed, hx)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], state


PACKING = {c: type(f"Packing{c.__name__}", (_Packing, c), {}) for c in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)}


class _PlainNorm(Norm):
    """A norm behind PyTorch's own dropout: ours has the same mask on every backend, which plain code is slow at."""

    def forward(self, x, residual=None):
        if residual is not None:
            x = F.dropout(x, self.dropout, self.training) + residual
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps), x
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps), x


PLAIN_CLASSES = PACKING | {Norm: _PlainNorm}


def make_plain(model: torch.nn.Module) -> None:
    """What one would train without seqfuse, in place: seqfuse.unfuse, and modules that do with PyTorch's means what
    seqfuse does in one op."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weight-drop stays, over PyTorch's own op
        seqfuse.unfuse(model)
    for module in model.modules():
        module.__class__ = PLAIN_CLASSES.get(type(module), type(module))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """tokens per second, medians over the steps; ratio: the median of fused over plain in the same step; losses: means
    per token over the last steps."""

    fused: float
    plain: float
    ratio: float
    fused_loss: float
    plain_loss: float
    steps: int
    unit: str


class Contender:
    """A model under training, and what its steps took."""

    def __init__(self, task: Task, scope):
        self.task, self.scope = task, scope
        self.trainer = Trainer(task, Path())  # whose folder stays untouched: only steps are taken
        self.seconds: list[float] = []
        self.rows: list[list[float]] = []  # loss and tokens

    def held_out_loss(self) -> torch.Tensor:
        batch = next(iter(self.task.held_out()))
        with self.scope(), torch.no_grad(), autocast(self.task):
            loss, tokens = self.task.loss(self.task.model.eval(), *self.task.to_device(batch))
        return loss.double().cpu() / int(tokens)

    def step(self, indices: list[int]) -> None:
        start = time.perf_counter()
        with self.scope():
            self.trainer.step(indices)
        row = self.trainer.pending.pop().tolist()  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.rows.append(row[:2])

    def rate(self) -> float:
        return statistics.median(row[1] / s for row, s in zip(self.rows[WARM_UP:], self.seconds[WARM_UP:], strict=True))

    def loss(self) -> float:
        return sum(row[0] for row in self.rows[-LAST:]) / sum(row[1] for row in self.rows[-LAST:])


def compare(config: RunConfig, *, device: str = "auto", console: Console | None = None) -> Comparison:
    """Train both for max_steps, at most STEPS, and print what it took. Raises TrainError if their losses differ."""
    from seqfuse.recipes import RECIPES

    where, make = pick_device(device), RECIPES[config.recipe].task
    fused = Contender(make(config, where), lambda: seqfuse.backend("auto"))
    plain = Contender(make(config, where), dispatch.plain)
    make_plain(plain.task.model)
    check_equal(fused.held_out_loss(), plain.held_out_loss(), config)
    steps = max(min(config.max_steps, STEPS), WARM_UP + 1)
    for i in range(steps):
        batch = fused.trainer.next_batch()
        for one in (fused, plain) if i % 2 else (plain, fused):
            one.step(batch)
    ratios = [p / f for f, p in zip(fused.seconds[WARM_UP:], plain.seconds[WARM_UP:], strict=True)]
    result = Comparison(
        fused.rate(), plain.rate(), statistics.median(ratios), fused.loss(), plain.loss(), steps, fused.task.unit
    )
    say(result, console or Console(highlight=False))
    return result


def check_equal(fused: torch.Tensor, plain: torch.Tensor, config: RunConfig) -> None:
    """The losses of a held-out batch before the first step, by the floor of the dtype that was computed in."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:
        testing.assert_accurate(fused, plain, dtype=dtype, what="the fused model's loss")
    except AssertionError as error:
        raise TrainError(f"fused and plain model do not compute the same, so no speed is compared: {error}") from error


def say(result: Comparison, console: Console) -> None:
    unit = f"{result.unit}/s"
    console.print(f"plain PyTorch: {result.plain:,.0f} {unit}, loss {result.plain_loss:.4f}")
    console.print(f"seqfuse:       {result.fused:,.0f} {unit}, loss {result.fused_loss:.4f}")
    console.print(f"ratio: {result.ratio:.2f}x ({result.steps} steps in turn; losses: means of the last {LAST} steps)")
