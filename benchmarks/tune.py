"""`--tune`: from measured rows to the table that `auto` follows on this machine (seqfuse.tuned)."""

import statistics
from collections.abc import Iterable

from seqfuse import dispatch
from seqfuse.benchmarks.records import Row


def candidates(op: str, device: str) -> list[str]:
    """Backends worth timing: not the reference, which is there to be right, and not an interpreter."""
    out = ["reference", "triton"] if device == "cpu" else ["reference"]
    return [name for name in dispatch.ops().get(op, ()) if name not in out]


def winners(rows: Iterable[Row]) -> dict[str, dict[str, str]]:
    """{op: {shape class: backend}}: the fastest in geometric mean over the cases of the class, by the
    ratio to eager, which disturbances of the machine leave alone.

    Only a backend that ran every case of the class, correctly, can win: a wrong result anywhere in it disqualifies.
    """
    classes: dict[tuple[str, str], dict[str, list[Row]]] = {}
    cases: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row.asked and row.shape_class:
            key = row.op, row.shape_class
            classes.setdefault(key, {}).setdefault(row.backend, []).append(row)
            cases.setdefault(key, set()).add(row.case)
    table: dict[str, dict[str, str]] = {}
    for key, backends in classes.items():
        speed = {
            name: statistics.geometric_mean(r.ratio or 1 / r.median_ms for r in mine)
            for name, mine in backends.items()
            if all(r.status == "ok" for r in mine) and {r.case for r in mine} == cases[key]
        }
        if speed:
            table.setdefault(key[0], {})[key[1]] = max(speed, key=speed.get)
    return table
