"""The command line. Each command parses its options, calls one function and turns expected errors into one sentence.

A new command is one function below with @app.command() (bench brings its own, cli_models.py those of models,
cli_train.py those of runs); what it does is imported inside, so that `seqfuse --help` stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqfuse import cli_data, cli_models, cli_train
from seqfuse.benchmarks.cli import bench

app = typer.Typer(
    help="Fused kernels for sequence models in PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the weights and the checkpoint.")] = Path("demo"),
    data: Annotated[
        Path | None, typer.Option(help="Your own lexicon, word<TAB>phonemes on each line, instead of CMUdict.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer are quicker and worse.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order of words.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
) -> None:
    """Train a model that pronounces English words, before and after seqfuse.fuse(), and write a report.

    About five minutes on two CPU cores. Ctrl-C keeps everything; --resume goes on.
    """
    from seqfuse.checkpoints import TrainError
    from seqfuse.data import DataError
    from seqfuse.demo import Demo, DemoError, Options
    from seqfuse.recipes.g2p import RECIPE

    given = {"data": data and str(data), "steps": steps, "seed": seed, "bf16": bf16 or None}
    given = {name: value for name, value in given.items() if value is not None}
    if resume and given:
        options = ", ".join(f"--{name}" for name in given)
        _fail(f"--resume goes on with the settings of the interrupted run: leave out {options}")
    fields = {"data": "data", "steps": "max_steps", "seed": "seed", "bf16": "precision"}
    changes = {fields[name]: "bf16" if name == "bf16" else value for name, value in given.items()}
    try:
        code = Demo(Options(out, RECIPE.configure(changes), device, resume)).run()
    except (DataError, DemoError, TrainError, ValueError) as error:
        _fail(str(error))
    raise typer.Exit(code)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A model's folder, to show what is in it instead.")] = None,
) -> None:
    """Show versions, compiled features, the CPU's instruction set and the GPU; or what a model's folder holds."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    import seqfuse

    with cli_models.one_sentence():
        rows = seqfuse.build_info().items() if model is None else list(cli_models.model_rows(model))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", Text(_plain(value)))
    Console(highlight=False).print(table)


app.command()(bench)
app.add_typer(cli_data.data, name="data")
app.command()(cli_models.generate)
app.command()(cli_models.translate)
app.command("import")(cli_models.import_)
app.command()(cli_models.export)
app.command()(cli_train.train)
app.command("eval")(cli_train.eval_)
app.command()(cli_train.plot)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _fail(message: str) -> None:
    typer.echo(f"seqfuse: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
