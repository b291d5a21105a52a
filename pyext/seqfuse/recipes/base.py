"""What every recipe is: a function that returns a config, and a Task that knows model, data, loss and evaluation.

A recipe's file has a RunConfig with its own fields, a Task, a function that returns the config, and at its end

    RECIPE = Recipe("charlm", "what it shows, in one line", charlm, CharLM)

which recipes/__init__.py lists. The trainer (trainer.py) does the rest: `seqfuse train charlm --set optim.lr=3e-4`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.config import Config, Settings, unknown_key
from seqfuse.schedules import Schedule
from seqfuse.tokenizer import Tokenizer

Batch = tuple[Any, ...]  # tensors, and None for what is not there


# ------------------------------------------------------------------------------------------------------------- configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim(Settings):
    """AdamW. clip: largest norm of the gradient, 0: none. warmup: steps. schedule: see schedules.py.

    weight_decay: of matrices; biases, and the weights of norms, have none.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    warmup: int = 100
    schedule: Schedule = "cosine"

    def __post_init__(self):
        super().__post_init__()
        self.positive("lr")
        for name in ("beta1", "beta2"):
            self.require(getattr(self, name) < 1, f"{name} must be below 1, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Everything that decides a run's result, apart from the data and the machine. Each recipe adds its own fields.

    recipe: its name. seed: of weights, order and dropout. max_steps: optimizer steps, each on one global batch of
    batch_size examples, which all processes together work off in `accumulate` parts each. checkpoint_every,
    evaluate_every: steps. log_every: steps that a line of the log stands for. precision: "bf16" is autocast. ema: decay
    of the averaged weights that are evaluated and kept, 0: none. patience: end after this many evaluations without a
    better one, 0: never. keep: which weights a finished run leaves. sharding: what happens under torchrun, "ddp": each
    process has the whole model, "fsdp": a share of it. data: the user's own file. model: of the vocabulary the task
    knows only when it has read the data; what a config says of tokens is replaced then.
    """

    recipe: str
    seed: int = 0
    max_steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    checkpoint_every: int = 200
    evaluate_every: int = 200
    log_every: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float = 0.0
    patience: int = 0
    label_smoothing: float = 0.0
    keep: Literal["best", "last"] = "best"
    sharding: Literal["ddp", "fsdp"] = "ddp"
    data: str | None = None
    optim: Optim = Optim()
    model: Config

    def __post_init__(self):
        super().__post_init__()
        self.positive("max_steps", "batch_size", "accumulate", "checkpoint_every", "evaluate_every", "log_every")
        self.require(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        for name in ("ema", "label_smoothing"):
            self.require(getattr(self, name) < 1, f"{name} must be below 1, got {getattr(self, name)!r}")


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass
class Findings:
    """What a finished run has to show. metrics: by name, the first ones matter most; a string is a signature or a unit.
    sections: HTML made by seqfuse.report, for report.html. text: samples, for the terminal."""

    metrics: dict[str, float | str]
    sections: list[str] = dataclasses.field(default_factory=list)
    text: str = ""


class Task:
    """What a recipe hands to the trainer: a model, examples by number, the loss of some of them, an evaluation.

    A subclass gives prepare, build, batch, loss, held_out and, if it has more to show, report.
    objective: the name in evaluate()'s result that decides which weights are best; the lowest, unless `higher`.
    unit: what loss() counts, for the throughput.
    """

    objective = "loss"
    higher = False
    unit = "tokens"
    examples: int  # for training; set by prepare
    fingerprint: str  # of the data, set by prepare: a run is resumed on the same data only
    said = ""  # what was read, of which columns, under what licence; for the user, set by prepare

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu", folder: Path | None = None):
        """folder: of the run, where tokenizers are read if it has them."""
        self.config, self.device, self.folder = config, torch.device(device), folder
        self.prepare()
        torch.manual_seed(config.seed)  # on the CPU, so that it is the same model on every device
        self.model: Model = self.build().to(self.device)

    # -------------------------------------------------------------------------------------------- what a recipe writes

    def prepare(self) -> None:
        """Read the data (config.data: the user's file); set `examples` and `fingerprint`. DataError where it is bad."""
        raise NotImplementedError

    def build(self) -> Model:
        """The model with random weights, on the CPU, with its tokenizers."""
        raise NotImplementedError

    def batch(self, indices: list[int]) -> Batch:
        """The tensors of these training examples, on the CPU; the trainer moves them."""
        raise NotImplementedError

    def loss(self, model: Model, *batch) -> tuple[Tensor, Tensor | int]:
        """(sum of the losses, number of predicted tokens) of a batch, by model.loss(..., **self.loss_options(model)).

        Sums, not means: the trainer divides by the tokens of the whole global batch, whatever parts it came in.
        """
        raise NotImplementedError

    def held_out(self) -> Iterable[Batch]:
        """The batches of the held-out split, always the same."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ what it may do its way

    def order(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch: decided by seed and epoch only, so they are the same on any number of
        processes. Here: shuffled, a last incomplete batch left out."""
        random = generator(self.config.seed, epoch)
        shuffled, size = torch.randperm(self.examples, generator=random).tolist(), self.config.batch_size
        whole = [shuffled[i : i + size] for i in range(0, self.examples - size + 1, size)]
        return whole or [shuffled]

    @torch.no_grad()
    def evaluate(self, model: Model) -> dict[str, float]:
        """On the held-out split, the model in eval mode: names and numbers, the objective first. Here: the mean loss
        per token, in nats."""
        total, count = 0.0, 0
        for batch in self.held_out():
            loss, tokens = self.loss(model, *self.to_device(batch))
            total, count = total + float(loss), count + int(tokens)
        return {"loss": total / max(1, count)}

    def report(self, model: Model) -> Findings:
        """What the finished model has to show. Here: what evaluate() says."""
        return Findings(dict(self.evaluate(model)))

    def ready(self, folder: Path, train: Callable[[RunConfig, str], bool]) -> bool:
        """Before the first step of a run, and of one that goes on: the run's folder is there. What a task needs beside
        its data it takes here, and the weights to start from; a checkpoint's come over them.

        train(config, name): another run, in folder/name, which is taken up where it stopped or left alone if it is
        finished; False if it was interrupted, and then ready() returns False too.
        """
        return True

    def group(self, name: str) -> int:
        """The group that a parameter is in; rate() gives each its learning rate."""
        return 0

    def rate(self, group: int, step: int) -> float:
        """What the learning rate of a group is multiplied by in a step, 0: it is frozen."""
        return 1.0

    def finished(self, model: Model) -> Model:
        """What a finished run leaves of the model that was trained."""
        return model

    def carried(self) -> dict[str, Tensor]:
        """What one batch leaves to the next (recurrent states), each [rows of the global batch, ...], or nothing: it is
        part of a checkpoint. Row i belongs to the i-th example of a batch. The trainer writes into these tensors."""
        return {}

    # --------------------------------------------------------------------------------------------------------- helpers

    def loss_options(self, model: Model) -> dict[str, Any]:
        """Of ops.linear_cross_entropy: a sum, with label smoothing in training only."""
        smoothing = self.config.label_smoothing if model.training else 0.0
        return {"reduction": "sum", "label_smoothing": smoothing}

    def to_device(self, batch: Batch) -> Batch:
        return tuple(t.to(self.device, non_blocking=True) if isinstance(t, Tensor) else t for t in batch)

    def tokenizer(self, train: Callable[[], Tokenizer], file: str = "tokenizer.json") -> Tokenizer:
        """That of the run's folder if it has one, so that a resumed run reads text as before; else a new one."""
        if self.folder is not None and (self.folder / file).is_file():
            return Tokenizer.load(self.folder / file)
        return train()


def generator(seed: int, number: int) -> torch.Generator:
    """Of what is drawn at random for an epoch or an example, whatever the seed's size."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def fingerprint(*texts: str | bytes | Path) -> str:
    """SHA-256 of the data: text, bytes, or the contents of files."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.read_bytes() if isinstance(text, Path) else text.encode() if isinstance(text, str) else text
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def check_positions(model: Config, tokens: int, setting: str) -> None:
    """DataError if a model has not as many positions as the longest example, which `setting` limits, has tokens."""
    most = getattr(model, "max_positions", None)
    if most is not None and tokens > most:
        raise DataError(f"{setting}: an example of {tokens} tokens is longer than the {most} that the model has "
                        f"positions for (max_positions); lower {setting}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- recipes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """name and about: for the command line. config: a function that returns the RunConfig; its arguments are
    short names for several fields at once. task: makes the task, with the arguments of Task."""

    name: str
    about: str
    config: Callable[..., RunConfig]
    task: Callable[..., Task]

    def configure(self, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """The config with some values changed: {"cell": "gru", "optim.lr": 3e-4}. A key is an argument of the config
        function or the path of a field. Raises ValueError with one sentence for an unknown key or a wrong value."""
        changes, short = dict(changes or {}), list(inspect.signature(self.config).parameters)
        values = self.config(**{k: changes.pop(k) for k in short if k in changes}).to_dict()
        for path, value in changes.items():
            *parents, name = path.split(".")
            inside = values
            for parent in parents:
                inside = inside.get(parent)
                if not isinstance(inside, dict):
                    known = [k for k, v in values.items() if isinstance(v, dict)]
                    sentence = f"{self.name} has no settings called {parent!r}"
                    raise ValueError(f"{path}: {sentence}; settings of their own have {', '.join(known)}")
            if name not in inside or path == "recipe":
                listed = [k for k in inside if k not in ("model", "recipe") or isinstance(inside[k], dict)]
                raise ValueError(unknown_key(path, [*short, *paths(values)], [*listed, *([] if parents else short)]))
            inside[name] = value
        return self.read(values)

    def read(self, values: dict) -> RunConfig:
        """From what RunConfig.to_dict() gave."""
        return type(self.config()).from_dict(values)


def paths(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of a dict of dicts: ["seed", "optim", "optim.lr", ...]."""
    found = []
    for name, value in values.items():
        found += [prefix + name, *(paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [])]
    return found
