"""What `seqfuse bench` prints."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from seqfuse.benchmarks.records import Row


def _console() -> Console:
    # into a file or a pipe: wide enough for a whole row
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150, soft_wrap=False)


def say(text: str) -> None:
    _console().print(text, markup=False)


def progress(text: str):
    """A line that says what is being measured, gone when it is done; nothing where there is no terminal."""
    return _console().status(f"[dim]{text}[/dim]")


def heading(head: dict) -> None:
    """Where and with what this is measured, and a warning if the machine is busy."""
    m = head["machine"]
    where = m["gpu"] if m["device"] == "cuda" else f"{m['cpu']}, {m['isa']}, {m['threads']} threads"
    commit = head["commit"][:10] + (" with changes" if head["dirty"] else "") if head["commit"] else "not a checkout"
    say(f"{where} · torch {m['torch']} · seqfuse {m['seqfuse']} ({commit})")
    if m["device"] == "cpu" and m["load"] is not None and m["load"] > 0.6:
        say(f"note: the machine is busy (load {m['load']} on {m['cores']} cores), so don't quote these times")


def table(rows: Sequence[Row]) -> None:
    """The rows of one op and dtype, and below them what is to be said in words: those bound by memory, then others."""
    for memory_bound in (True, False):
        _table([r for r in rows if r.status != "refused" and _memory_bound(r) == memory_bound], memory_bound)


def _table(rows: Sequence[Row], memory_bound: bool) -> None:
    if not rows:
        return
    out = Table(
        title=f"{rows[0].op} {rows[0].dtype}", title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    gpu = any(r.host_us is not None for r in rows)
    models = any(r.tokens_per_s is not None for r in rows)
    rate = "tokens/s" if models else "GB/s" if memory_bound else "TFLOP/s"
    right = ["ms", "p10 to p90", "vs eager", rate, "MFU" if models else "of ceiling", "MiB", "error"]
    for name in ("case", "mode", "contender", *right, *(["host us"] if gpu else [])):
        out.add_column(name, justify="left" if name in ("case", "mode", "contender") else "right", no_wrap=True)
    before = None
    for row in rows:
        group = row.case, row.mode
        first = group != before
        if first and before is not None:
            out.add_row("")
        before = group
        out.add_row(
            *(group if first else ("", "")), *_cells(row, memory_bound), *([_number(row.host_us)] if gpu else [])
        )
    console = _console()
    console.print(out)
    for line in _choices(rows):
        console.print(f"[dim]{line}[/dim]")
    for row in rows:
        if row.status in ("wrong", "failed"):
            console.print(
                f"[red]{row.op} {row.case} {row.mode} {row.dtype}, {row.contender}: {row.status}[/red]: ", end=""
            )
            console.print(row.message, markup=False)
    console.print()


def _memory_bound(row: Row) -> bool:
    from seqfuse.benchmarks import registry

    cases = registry.find([row.op])
    return next((c for c in cases if c.name == row.case), cases[0]).bound == "memory"


def _cells(row: Row, memory_bound: bool) -> list[str]:
    name = f"{row.contender} → {row.backend}" if row.asked == "auto" and row.backend else row.contender
    if row.status != "ok" or row.median_ms is None:
        red = {"wrong": "[red]wrong: no speed[/red]", "failed": "[red]failed[/red]"}.get(row.status, "")
        return [name, red, "", "", "", "", "", _error(row)]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    if row.ours and ratio:
        ratio = f"[bold {'green' if row.ratio >= 1 else 'yellow'}]{ratio}[/]"
    return [
        f"[bold]{name}[/bold]" if row.ours else name,
        _number(row.median_ms),
        f"{_number(row.p10_ms)} to {_number(row.p90_ms)}",
        ratio,
        _number(row.tokens_per_s or (row.gbs if memory_bound else row.tflops)),
        f"{row.percent_of_ceiling:.0f}%",
        f"{row.peak_memory / 2**20:.2f}",
        _error(row),
    ]


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e} {row.error_at}"


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _choices(rows: Sequence[Row]) -> list[str]:
    """Why `auto` chose what it chose: one line for each reason, with the cases it holds for."""
    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.asked == "auto" and row.backend:
            cases = why.setdefault((row.backend, row.reason), [])
            if row.case not in cases:
                cases.append(row.case)
    everywhere = len(why) == 1
    return [f"auto → {b} ({r})" + ("" if everywhere else f": {', '.join(c)}") for (b, r), c in why.items()]


def summary(means: Sequence[dict], ceilings: dict[str, float]) -> None:
    """Geometric means, and the ceilings they were measured beside."""
    if not means:
        return
    out = Table(title="geometric mean of the ratios to torch eager", title_justify="left", box=None, pad_edge=False,
                header_style="bold")  # fmt: skip
    for name in ("op", "dtype", "mode", "contender", "cases", "geomean", "worst", "in case"):
        out.add_column(name, justify="right" if name in ("cases", "geomean", "worst") else "left", no_wrap=True)
    for m in means:
        if m["contender"].startswith("seqfuse") or m["contender"] == "torch.compile":
            out.add_row(m["op"], m["dtype"], m["mode"], m["contender"], str(m["cases"]), f"{m['geomean']:.2f}x",
                        f"{m['worst']:.2f}x", m["worst_case"])  # fmt: skip
    _console().print(out)
    say("ceilings of this run: " + ", ".join(f"{name.replace('_', ' ')} {_number(v)}" for name, v in ceilings.items()))


def refusals(rows: Sequence[Row]) -> None:
    """Backends that were asked for and can't run: each reason once."""
    reasons = {(r.contender, r.op, r.message): None for r in rows if r.status == "refused"}
    for contender, op, message in reasons:
        say(f"{contender} can't run {op} here: {message}")


def winners(table: dict[str, dict[str, str]], path) -> None:
    """What --tune found."""
    out = Table(title="fastest on this machine", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("op", "sizes", "backend"):
        out.add_column(name)
    for op, classes in table.items():
        for sizes, backend in classes.items():
            out.add_row(op, sizes, backend)
    _console().print(out)
    say(
        f"`auto` follows this from now on; the table is {path}"
        if path
        else "no backend could be timed: nothing is kept"
    )
