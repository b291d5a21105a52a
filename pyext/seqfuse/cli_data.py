"""seqfuse data: what the recipes learn from."""

from __future__ import annotations

from typing import Annotated

import typer

from seqfuse.cli_models import one_sentence

data = typer.Typer(help="The data sets of the recipes: list them, fetch one.", no_args_is_help=True)


@data.command("list")
def list_() -> None:
    """Show each set's name, size, licence, and whether it is in the cache."""
    from seqfuse.data import SETS, cache_dir, cached

    for name, item in SETS.items():
        where = "in the cache" if cached(item) else "not in the cache"
        typer.echo(f"{name:14} {item.size / 1e6:5.1f} MB  {where}")
        typer.echo(f"    {item.source}\n    Licence: {item.licence}")
    typer.echo(f"The cache is {cache_dir()}.")


@data.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those that `seqfuse data list` shows.")],
) -> None:
    """Bring a set into the cache, once; after that no network is needed. Prints where it is."""
    from seqfuse.data import SETS, DataError, cached
    from seqfuse.data import fetch as run

    with one_sentence():
        if name not in SETS:
            raise DataError(f"there is no set called {name!r}; there are {', '.join(SETS)}")
        if not cached(SETS[name]):
            typer.echo(f"fetching {name}, {SETS[name].size / 1e6:.1f} MB and what it is packed with ...", err=True)
        path = run(SETS[name])
        typer.echo(path)
        typer.echo(f"{SETS[name].source}; licence: {SETS[name].licence}", err=True)
