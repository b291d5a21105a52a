"""What a run tells while it goes: log.jsonl, a progress bar, TensorBoard if it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seqfuse.checkpoints import writing
from seqfuse.files import save_atomically

TRAINED = ("loss", "lr", "tokens_per_second")  # that a line about training has, among others


def progress_bar(console: Console) -> Progress:
    bar = BarColumn(max(6, min(40, console.width - 82)))  # what stands beside it is to fit
    columns = (bar, MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[held]}"))
    columns += (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("left"))
    return Progress(*columns, console=console, transient=not console.is_terminal, disable=not console.is_terminal)


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl. Others, such as one that a killed run left half, are passed over."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if is_record(record):
            lines.append(record)
    return lines


def is_record(record: object) -> bool:
    """Whether RunLog writes such lines."""
    if not isinstance(record, dict):
        return False
    evaluation = record.get("evaluation")
    values = evaluation if isinstance(evaluation, dict) else {name: record.get(name) for name in TRAINED}
    return all(isinstance(v, int | float) for v in (record.get("step"), *values.values()))


class RunLog:
    """log.jsonl: {"step": 10, "loss": ..., ...} for training, {"step": 200, "evaluation": {...}} for evaluations.

    The same numbers go to a progress bar (without a terminal: a printed line for each evaluation) and, if TensorBoard
    is installed, into the folder's tensorboard/. Of several processes only the first writes.
    """

    def __init__(self, folder: Path, console: Console, steps: int, unit: str, first: bool = True):
        self.folder, self.path, self.first = folder, folder / "log.jsonl", first
        self.console, self.steps, self.unit = console, steps, unit
        self.told, self.begun = "", 0  # the newest numbers, for a printed line; where this session goes on

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop what a run wrote after the checkpoint it goes on from."""
        self.begun = step
        if self.first:
            kept = [r for r in read_log(self.path) if r["step"] <= (evaluated if "evaluation" in r else step)]
            text = "".join(json.dumps(r) + "\n" for r in kept)
            with writing(self.path):
                save_atomically(self.path, lambda part: part.write_text(text, encoding="utf-8"))

    def __enter__(self) -> RunLog:
        self.bar = progress_bar(self.console)
        self.bar.start()
        self.task = self.bar.add_task("training", total=self.steps, completed=self.begun, loss="", held="", speed="")
        self.file = open(self.path, "a", encoding="utf-8") if self.first else None  # noqa: SIM115
        self.board = None
        if self.first and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"))
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()
        for writer in (self.file, self.board):
            if writer is not None:
                writer.close()

    def trained(self, record: dict) -> None:
        """A line about some steps: step, loss, lr, gradient_norm, tokens, seconds, tokens_per_second."""
        self._write(record, {k: v for k, v in record.items() if k != "step"}, "training")
        loss, speed = f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} {self.unit}/s"
        self.bar.update(self.task, completed=record["step"], loss=loss, speed=speed)
        self.told = f"{loss}  {speed}  "

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self._write({"step": step, "evaluation": metrics}, metrics, "held-out")
        held = "  ".join(f"held-out {name} {value:.4g}" for name, value in metrics.items())
        self.bar.update(self.task, completed=step, held=held.partition("  ")[0].replace(" loss ", " "))  # room is short
        self.console.print(f"step {step:,}/{self.steps:,}  {self.told}{held}", highlight=False, soft_wrap=True)

    def _write(self, record: dict, numbers: dict[str, float], kind: str) -> None:
        if not self.first:
            return
        with writing(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in numbers.items():
                    self.board.add_scalar(f"{kind}/{name}", value, record["step"])
