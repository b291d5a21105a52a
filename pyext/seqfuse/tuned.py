"""This machine's own measurements: which backend won for an op and a class of shapes (`seqfuse bench --tune`).

One JSON file per user, {machine: {op: {shape class: backend}}}. A machine is its GPU, or its CPU's instruction set and
torch's number of threads, so that one file serves a home directory that several machines share.
"""

import json
import os
import tempfile
from pathlib import Path

import torch

from seqfuse import native

_table: dict | None = None
_generation = 0


def cache_dir() -> Path:
    """Where seqfuse keeps what it may lose: $XDG_CACHE_HOME/seqfuse, by default ~/.cache/seqfuse."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqfuse"


def path() -> Path:
    return cache_dir() / "tuned.json"


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu {native.isa()} x{torch.get_num_threads()}"


def _load() -> dict:
    global _table
    if _table is None:
        try:
            _table = json.loads(path().read_text())
        except (OSError, ValueError):  # none yet, or damaged: the built-in rules hold
            _table = {}
        if not _is_table(_table):
            _table = {}
    return _table


def _is_table(found) -> bool:
    """Whether it is {machine: {op: {shape class: backend}}}."""
    parts = [found]
    for _ in range(3):
        if not all(isinstance(part, dict) for part in parts):
            return False
        parts = [value for part in parts for value in part.values()]
    return all(isinstance(value, str) for value in parts)


def exists() -> bool:
    """Whether this user has any table."""
    return bool(_load() if _table is None else _table)


def lookup(op: str, case) -> str | None:
    """The backend that won for this case's class of shapes, or None. A case tells its class by `shape_class()`."""
    table = _load()
    if not table:
        return None
    return table.get(machine(case.device), {}).get(op, {}).get(case.shape_class())


def save(device: str, op: str, winners: dict[str, str]) -> Path:
    """Add winners {shape class: backend} for this machine, atomically."""
    global _generation
    table = _load()
    table.setdefault(machine(device), {}).setdefault(op, {}).update(winners)
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False) as f:
        json.dump(table, f, indent=1, sort_keys=True)
    os.replace(f.name, path())
    _generation += 1
    native.door.shut()
    return path()


def reload() -> None:
    """Read the file again at the next lookup."""
    global _table, _generation
    _table = None
    _generation += 1
    native.door.shut()


def generation() -> int:
    return _generation
