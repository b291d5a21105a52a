"""A run's folder: its settings, its checkpoints, the finished model.

    run.json                        the config, and the fingerprint of the data
    log.jsonl                       a line every few steps and one for each evaluation
    tokenizer.json                  that of the model, from the start
    checkpoints/step-000400/        the model's folder and trainer.pt: optimizer, position in the data; the newest two
    checkpoints/best-000200/        the model's folder as it was at the best evaluation; those that a checkpoint needs
    config.json, model.safetensors  the finished model: with tokenizer.json a folder for seqfuse.models.load
    results.json, report.html       what the finished model was found to do

A checkpoint is written under another name and renamed when all of it is on the disk: it is there as a whole or not at
all. Reading one runs no code (weights_only).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from seqfuse.models import files
from seqfuse.models.base import Model
from seqfuse.models.files import CheckpointError
from seqfuse.parallel import Group, says_lost

PATHS = ("data", "test", "start", "reward")  # settings that may be one
# of a run, besides run.json
WRITTEN = ("model.safetensors", "config.json", "tokenizer.json", "source_tokenizer.json", "log.jsonl", "results.json",
           "report.html", "checkpoints")  # fmt: skip
KEEP = 2  # newest checkpoints: should one turn out damaged, there is another


class TrainError(Exception):
    """One sentence for the user: why a run can't begin or go on."""


class RunFolder:
    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / "checkpoints"

    # --------------------------------------------------------------------------------------------------- the settings

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    @property
    def finished(self) -> bool:
        return (self.path / "results.json").is_file()

    def taken(self) -> Path | None:
        """What a new run would write over, if there is anything. A run that was killed at once leaves empty folders."""
        found = (self.path / name for name in WRITTEN)
        return next((p for p in found if (any(p.iterdir()) if p.is_dir() else p.exists())), None)

    def settings(self) -> dict:
        """run.json: "config", what RunConfig.to_dict() gave, and "data", the task's fingerprint."""
        path = self.path / "run.json"
        if not self.exists:
            raise TrainError(f"{path}: there is no such file, so there is no run to go on with")
        settings = files.read_json(path)
        if not isinstance(settings.get("config"), dict) or not isinstance(settings.get("data"), str):
            raise TrainError(f"{path}: has no config, or not the SHA-256 of its data")
        return settings

    def begin(self, config: dict, data: str, save_tokenizers: Callable[[Path], None]) -> None:
        """Make the folder of a new run; of one that is there, check that it has this config and was on this data."""
        if self.exists:
            self.check(self.settings(), config, data, self.path / "run.json")
        else:
            if taken := self.taken():
                raise TrainError(f"{taken}: exists, and nothing is written over: give another --out")
            with writing(self.path / "run.json"):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                files.write_json(self.path / "run.json", {"config": config, "data": data})
        with writing(self.path / "tokenizer.json"):
            save_tokenizers(self.path)
        for part in self.checkpoints.glob("*.part"):  # what a killed run left
            shutil.rmtree(part, ignore_errors=True)
        for part in self.path.glob("*.part"):
            part.unlink(missing_ok=True)

    def check(self, settings: dict, config: dict, data: str | None, where: Path) -> None:
        """TrainError if `settings`, which stand in the file `where`, are not this config and this data."""
        for name, (there, here) in differences(with_new_settings(settings["config"]), config).items():
            if name == "data":  # where the file lies: what counts is what is in it
                continue
            if name in PATHS and there and here and os.path.abspath(str(there)) == os.path.abspath(str(here)):
                continue
            raise TrainError(
                f"{where}: the run has {name} = {there!r}, not {here!r}; seqfuse train --resume {self.path} goes on "
                "with the settings it has, another --out begins a new run"
            )
        if data is not None and settings["data"] != data:
            raise TrainError(
                f"{where}: the run was on other data (SHA-256 {settings['data'][:12]}..., now {data[:12]}...); bring "
                "back the file as it was, or begin a new run with another --out"
            )

    # ------------------------------------------------------------------------------------------------ the checkpoints

    def newest(self, kind: str = "step") -> list[Path]:
        """The checkpoints of a kind, "step" or "best", the newest first."""
        found = [p for p in self.checkpoints.glob(f"{kind}-*") if p.name.removeprefix(f"{kind}-").isdigit()]
        return sorted(found, key=step_of, reverse=True)

    def forget_best_after(self, step: int) -> None:
        """What a run that goes on from an earlier checkpoint has yet to find again."""
        for path in self.newest("best"):
            if step_of(path) > step:
                shutil.rmtree(path, ignore_errors=True)

    def where_to_go_on(self) -> str:
        """Part of a sentence about a run that has to stop."""
        newest = self.newest()
        return f"the last good checkpoint is {newest[0]}" if newest else f"{self.path} has no checkpoint yet"

    def save(self, kind: str, step: int, write: Callable[[Path], None], group: Group) -> None:
        """Let `write` fill a folder, then make it the newest checkpoint of its kind and drop older ones.

        All processes of the group call it, and `write` on each.
        """
        path = self.checkpoints / f"{kind}-{step:06d}"
        part = path.with_name(path.name + ".part")
        with writing(path):
            if group.first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            group.wait()
            write(part)
            group.wait()
            if group.first:
                for file in (*part.iterdir(), part):
                    sync(file)
                shutil.rmtree(path, ignore_errors=True)
                part.rename(path)
                sync(path.parent)
        if group.first:
            for old in self.superseded(kind):
                shutil.rmtree(old, ignore_errors=True)
            if kind == "step":
                for old in self.superseded("best"):
                    shutil.rmtree(old, ignore_errors=True)

    def superseded(self, kind: str) -> list[Path]:
        """The checkpoints of a kind that nothing needs any more. Each step checkpoint that is kept needs the newest
        "best" before it: a run that goes on from there may find none that is better."""
        found, steps = self.newest(kind), self.newest()[:KEEP]
        if kind == "best" and steps:  # a checkpoint is written before the evaluation of its step
            found = [path for path in found if step_of(path) < step_of(steps[-1])]
        return found[KEEP if kind == "step" else 1 :]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def with_new_settings(config: dict) -> dict:
    """A run's config, and of settings that are newer than the run the defaults."""
    from seqfuse.recipes import RECIPES

    recipe = RECIPES.get(config.get("recipe"))
    try:
        return config if recipe is None else recipe.read(config).to_dict()
    except ValueError:  # edited by hand, or older than a setting that is gone: the differences are to be seen
        return config


def differences(a: dict, b: dict, prefix: str = "") -> dict[str, tuple]:
    """The values of two dicts of dicts that are not the same, by path: {"optim.lr": (0.1, 0.2)}."""
    found = {}
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found |= differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found[prefix + key] = (x, y)
    return found


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path):
    """What goes wrong while writing `path` is a TrainError, and half of it is removed; not the loss of a process."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        if says_lost(error):
            raise
        shutil.rmtree(path.with_name(path.name + ".part"), ignore_errors=True)
        raise TrainError(f"{path}: could not be written: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]


def load_weights(folder: Path, model: Model) -> None:
    """Those of a step's checkpoint, adapters included, into the model that was trained."""
    path = folder / "model.safetensors"
    tensors, own = files.read_safetensors(path), files.tensors_of(model)
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in (tensors, own)]
    if shapes[0] != shapes[1]:
        name = min(shapes[0].items() ^ shapes[1].items())[0]
        what = " and ".join(f"{'no tensor' if s is None else list(s)} {whose}" for s, whose in
                            ((shapes[0].get(name), "there"), (shapes[1].get(name), "in this run's model")))  # fmt: skip
        raise CheckpointError(f"{path}: is of another model: {name} is {what}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def save_state(folder: Path, state: dict) -> None:
    with open(folder / "trainer.pt", "wb") as file:
        torch.save(state, file)


def load_state(folder: Path) -> dict:
    path = folder / "trainer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is missing, damaged, or no checkpoint of a run: {reason_of(error)}") from error
