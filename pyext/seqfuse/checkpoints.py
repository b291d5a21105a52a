"""A run's folder: its settings, its checkpoints, the finished model.

    run.json                        the config, and the fingerprint of the data
    log.jsonl                       a line every few steps and one for each evaluation
    tokenizer.json                  that of the model, from the start
    checkpoints/step-000400/        the model's folder and trainer.pt: optimizer, position in the data; the newest two
    checkpoints/best-000200/        the model's folder as it was at the best evaluation
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
from seqfuse.models.files import CheckpointError

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

    def begin(self, values: dict) -> None:
        """Make the folder and write run.json."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            files.write_json(self.path / "run.json", values)

    def settings(self) -> dict:
        if not self.exists:
            raise TrainError(f"{self.path / 'run.json'}: there is no such file, so there is no run to go on with")
        return files.read_json(self.path / "run.json")

    # ------------------------------------------------------------------------------------------------ the checkpoints

    def steps(self, kind: str = "step") -> list[Path]:
        """The checkpoints of a kind, "step" or "best", the newest first."""
        found = [p for p in self.checkpoints.glob(f"{kind}-*") if p.name.removeprefix(f"{kind}-").isdigit()]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)

    def save(self, kind: str, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, then make it the newest checkpoint of its kind and drop the oldest ones."""
        path = self.checkpoints / f"{kind}-{step:06d}"
        with writing(path):
            part = self.part(kind, step)
            write(part)
            self.complete(part, path)
        for old in self.steps(kind)[KEEP if kind == "step" else 1 :]:
            shutil.rmtree(old, ignore_errors=True)

    def part(self, kind: str, step: int) -> Path:
        """An empty folder to write a checkpoint into."""
        part = self.checkpoints / f"{kind}-{step:06d}.part"
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        part.mkdir(parents=True)
        return part

    def complete(self, part: Path, path: Path) -> None:
        for file in (*part.iterdir(), part):
            sync(file)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path):
    """What goes wrong while writing `path` is a TrainError, and half of it is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        shutil.rmtree(path.with_name(path.name + ".part"), ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainError(f"{path}: could not be written: {reason}") from error


def save_state(folder: Path, state: dict) -> None:
    with open(folder / "trainer.pt", "wb") as file:
        torch.save(state, file)


def load_state(folder: Path) -> dict:
    path = folder / "trainer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path}: is missing, damaged, or no checkpoint of a run: {reason}") from error
