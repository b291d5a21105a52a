"""The commands of a run: train, eval, plot."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from seqfuse import cli_models
from seqfuse.cli_models import DeviceName

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def train(
    recipe: Annotated[str | None, typer.Argument(help="Which one; --list shows all.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the recipes.")] = False,
    data: Annotated[Path | None, typer.Option(help="Your own file instead of the recipe's data.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/RECIPE if it is not given.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: optim.lr=3e-4, seed=1.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show all settings, train nothing.")] = False,
    compare_reference: Annotated[
        bool, typer.Option("--compare-reference", help="Train the same model on plain PyTorch in turn, and time both.")
    ] = False,
    device: DeviceName = "auto",
) -> None:
    """Train a model, from the data to the report; the same command again goes on where it was stopped.

    Ctrl-C finishes the step and keeps everything. Under torchrun (torchrun ... -m seqfuse train ...) on many devices.
    """
    from seqfuse.recipes import RECIPES

    with one_sentence():
        if list_:
            width = max(map(len, RECIPES))
            for name, known in RECIPES.items():
                typer.echo(f"{name:{width}}  {known.about}")
            return
        config, folder = _config(recipe, data, out, set_ or [], resume)
        if print_config:
            typer.echo(json.dumps(config.to_dict(), indent=2))
            return
        if compare_reference:
            from seqfuse.comparison import compare

            compare(config, device=device)
            return
        code = _train(config, folder, device, resumed=resume is not None)
    raise typer.Exit(code)


def _config(recipe: str | None, data: Path | None, out: Path | None, changes: list[str], resume: Path | None):
    """(the config that was asked for, the run's folder)."""
    from seqfuse.checkpoints import PATHS, RunFolder
    from seqfuse.models import files
    from seqfuse.recipes import RECIPES

    if resume is not None:
        given = {"RECIPE": recipe, "--data": data, "--out": out, "--set": changes}
        given = [name for name, value in given.items() if value]
        if given:
            raise ValueError(f"--resume goes on with the settings that the run has: leave out {', '.join(given)}")
        values = RunFolder(resume).settings()["config"]
        with files.named(resume / "run.json"):
            return _recipe(values.get("recipe")).read(values), resume
    if recipe is None:
        raise ValueError(f"which recipe? There are {', '.join(RECIPES)}; or --resume RUN")
    values = dict(map(_key_and_value, changes))
    if data is not None:
        values["data"] = str(data.absolute())
    for name in PATHS:  # of what is there; other values are names
        value = values.get(name)
        if isinstance(value, str) and value not in ("", "minilm") and Path(value).exists():
            values[name] = str(Path(value).absolute())
    return _recipe(recipe).configure(values), out or Path("runs") / recipe


def _recipe(name: object):
    from seqfuse.recipes import RECIPES

    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _key_and_value(text: str) -> tuple[str, object]:
    """KEY=VALUE; numbers, true, false and null as in JSON, everything else is text."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _train(config, folder: Path, device: str, resumed: bool) -> int:
    from rich.console import Console

    from seqfuse import trainer
    from seqfuse.checkpoints import RunFolder
    from seqfuse.interrupts import INTERRUPTED
    from seqfuse.parallel import pick_device

    console = Console(highlight=False)
    if RunFolder(folder).finished:
        data = None if resumed else _recipe(config.recipe).task(config, pick_device(device), folder).fingerprint
        RunFolder(folder).check(RunFolder(folder).settings(), config.to_dict(), data, folder / "run.json")
        console.print(f"{folder}: this run is finished; another --out begins a new one", soft_wrap=True, markup=False)
        return 0
    finished = trainer.train(config, folder, device=device)
    if not finished:
        console.print(f"stopped; go on with  seqfuse train --resume {folder}", soft_wrap=True, markup=False)
        return INTERRUPTED
    return 0


def eval_(run: Run, device: DeviceName = "auto") -> None:
    """Measure a run's model on held-out data: what its recipe reports. The pictures go into RUN/evaluation.html."""
    from seqfuse.checkpoints import RunFolder
    from seqfuse.parallel import pick_device
    from seqfuse.run_report import evaluate, show, write_evaluation

    with one_sentence():
        config, _ = _config(None, None, None, [], run)
        task = _recipe(config.recipe).task(config, pick_device(device), run)
        folder = RunFolder(run)
        folder.check(folder.settings(), config.to_dict(), task.fingerprint, run / "run.json")
        findings, path = evaluate(task, folder)
        typer.echo(f"{path}: {config.recipe}")
        for name, value in findings.metrics.items():
            typer.echo(f"{name}: {show(value)}")
        if findings.text:
            typer.echo(f"\n{findings.text}")
        typer.echo(f"\n{write_evaluation(task, folder, findings, path)}: the same with pictures")


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option(help="The file: .svg, .html or .png.")] = None,
) -> None:
    """Draw the curves of a run; of several, a page that compares them."""
    from seqfuse import run_report

    with one_sentence():
        path = out or (runs[0] / "curves.svg" if len(runs) == 1 else Path("comparison.html"))
        run_report.plot(run_report.open_runs(runs), path)
        typer.echo(path)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """As of the other commands; a run that can't begin or go on ends with exit code 1."""
    from seqfuse.checkpoints import TrainError

    try:
        with cli_models.one_sentence():
            yield
    except TrainError as error:
        typer.echo(f"seqfuse: {error}", err=True)
        raise typer.Exit(1) from None
