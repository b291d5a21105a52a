"""The options of `seqfuse bench`. The command line registers it by `app.command()(bench)`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help="Ops (layer_norm, gru, ...) or suites (norms, losses, projections, attention, recurrent, models).",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="auto, cpu, triton, cuda, torch or reference; may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or (GPU) fp16; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, few repeats, no torch.compile.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time every backend and let `auto` follow the winners.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write a record (a folder: under the usual name).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases with this text in their name, such as H512.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="fwd, fwd+bwd or (models) step; may be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for one case in one mode; 2, or 0.3 if quick.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile as a baseline.")] = None,
) -> None:
    """Time seqfuse against PyTorch's own ops; every speed stands beside a checked result.

    The exit status is 1 if a result is wrong: its row then shows the reason and no speed.
    """
    from seqfuse.benchmarks import run

    try:
        code = run.main(
            ops or (), backend or (), dtype or (), quick, tune, json_file,
            device=device, case=case, mode=mode or (), seconds=seconds, compile=compile,
        )  # fmt: skip
    except ValueError as error:
        typer.echo(f"seqfuse: {error}", err=True)
        code = 2
    raise typer.Exit(code)
