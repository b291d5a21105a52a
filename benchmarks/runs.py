"""Runs of `seqfuse train`, side by side, each in a process of its own: what claims.py trains before it judges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from seqfuse import data, files

RUNS = "RUNS"  # in a setting: the folder of the runs


@dataclass(frozen=True)
class Run:
    """One training run. settings: as with --set. tiny: on the pairs of tiny_pairs(). after: the run of align whose
    fine-tuned model and reward model this one takes."""

    name: str
    recipe: str
    settings: dict = field(default_factory=dict)
    tiny: bool = False
    after: str = ""


def tiny_pairs(path: Path) -> Path:
    """50 pairs of English and Italian."""
    rows = [(s, t) for s, t, _ in data.translations("it").rows if 4 <= len(s.split()) <= 12][:50]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_atomically(path, lambda part: part.write_text("".join(f"{s}\t{t}\n" for s, t in rows), encoding="utf-8"))
    return path


def command_of(run: Run, runs: Path) -> list[str]:
    command = ["seqfuse", "train", run.recipe, "--out", str(runs / run.name)]
    if run.tiny:
        command += ["--data", str(runs / "tiny.tsv")]
    earlier = {"start": str(runs / run.after / "sft"), "reward": str(runs / run.after / "reward")} if run.after else {}
    for name, value in (run.settings | earlier).items():
        text = value.replace(RUNS, str(runs)) if isinstance(value, str) else json.dumps(value)
        command += ["--set", f"{name}={text}"]
    return command


def needs(run: Run, names: list[str]) -> list[str]:
    """The runs whose models this one starts from."""
    return [name for name in names if any(f"=RUNS/{name}/" in word for word in command_of(run, Path(RUNS)))]


def train(run: Run, runs: Path, threads: int, before: list[Future]) -> str:
    """Train it in a process of its own, after the runs that it starts from; says how long that took."""
    for other in before:
        other.result()
    start, said = time.perf_counter(), runs / f"{run.name}.txt"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with said.open("a") as output:
        command = [sys.executable, "-m", *command_of(run, runs)]
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{run.name} was stopped or failed with exit status {code}: see {said}")
    return f"{run.name}: {(time.perf_counter() - start) / 60:.1f} minutes"


def train_all(every: list[Run], runs: Path, jobs: int) -> None:
    """As many side by side as there are jobs; first those whose models others start from."""
    sources = {run.name: needs(run, [other.name for other in every]) for run in every}
    awaited = {name for source in sources.values() for name in source}
    if any(run.tiny for run in every) and not (runs / "tiny.tsv").is_file():
        tiny_pairs(runs / "tiny.tsv")
    runs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool, futures = ThreadPoolExecutor(jobs), {}
    try:
        for run in sorted(every, key=lambda run: run.name not in awaited):
            before = [futures[name] for name in sources[run.name]]
            futures[run.name] = pool.submit(train, run, runs, threads, before)
        for done, future in enumerate(as_completed(futures.values()), start=1):
            print(f"[{done}/{len(every)}] {future.result()}", flush=True)
    except RuntimeError as error:
        sys.exit(str(error))
    finally:  # a run that Ctrl-C stops writes a checkpoint first
        pool.shutdown(cancel_futures=True)
