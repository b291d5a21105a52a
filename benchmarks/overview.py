"""`python -m seqfuse.benchmarks.overview [RECORDS] [-o docs]`: every CPU record in one picture and one table.

performance.svg: one row an op and kind of case, one lane a dtype. A dot is the geometric mean of what machines of one
kind measured, the newest record of each case counting; the line behind the dots runs from the slowest single
case to the fastest. performance.md: the same numbers, and the records that they are from.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from seqfuse.benchmarks import records
from seqfuse.benchmarks.plot import STYLE
from seqfuse.benchmarks.records import Row

MACHINES = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512", "slow_dots": "AVX-512, slow BF16",
            "avx512_bf16": "AVX512-BF16", "zen5": "Zen 5", "amx": "AMX"}  # fmt: skip
KINDS = (
    *("gru", "rnn", "lstm", "lengths", "GRUCell", "LSTMCell", "RNNCell"),
    *("causal", "dense", "window", "bias", "softcap"),
    *(
        "layer_norm",
        "layer_norm, residual",
        "rms_norm",
        "rms_norm, residual",
        "gated",
        "linear",
        "linear_cross_entropy",
    ),
)
NAMES = {
    "gru": "GRU", "rnn": "RNN", "lstm": "LSTM", "lengths": "lengths= over packed", "causal": "attention, causal",
    "dense": "attention, dense", "window": "attention, window 256", "bias": "attention, trained bias",
    "softcap": "attention, softcap", "layer_norm": "LayerNorm", "layer_norm, residual": "LayerNorm after x + r",
    "rms_norm": "RMSNorm", "rms_norm, residual": "RMSNorm after x + r", "gated": "swiglu, geglu", "linear": "Linear",
}  # fmt: skip
DTYPES = ("fp32", "bf16")
WIDTH, LABEL, RIGHT, LANE, BETWEEN, TOP = 800, 204, 24, 17, 9, 84
LOW, HIGH = 0.5, 128.0

Points = dict[str, dict[str, dict[str, list[float]]]]  # kind -> dtype -> machine -> ratios

COLOURS = """
.baseline { fill: #b0b8c0; }
.avx2 { fill: #7a8691; } .avx512 { fill: #2f6fb5; } .avx512_bf16 { fill: #3d8f5f; }
.slow_dots { fill: #7a5bc0; } .zen5 { fill: #b5427a; } .amx { fill: #d9822b; }
.span { stroke: #d1d9e0; stroke-width: 5; stroke-linecap: round; }
@media (prefers-color-scheme: dark) {
  .avx2 { fill: #a6b0ba; } .avx512 { fill: #6aa7ea; } .avx512_bf16 { fill: #6cc08e; }
  .slow_dots { fill: #b39ae8; } .zen5 { fill: #e583b1; } .amx { fill: #f0a35a; }
  .span { stroke: #3d444d; }
}
"""


def kind_of(row: Row) -> str:
    """The row of the picture that a case belongs to."""
    if row.op == "attention":
        return "bias" if row.case.startswith("biases") else row.case.partition("-")[0]
    if row.op == "rnn_cell":
        return row.case.partition("-")[0].upper() + "Cell"
    if row.case.endswith("-lengths"):
        return "lengths"
    return f"{row.op}, residual" if row.case.endswith("-residual") else row.op


def points(everything: Iterable[dict], mode: str = "fwd+bwd") -> Points:
    """Ratios of what `auto` chose, of each case the newest. Small sequences (T below 256) are left out of attention."""
    newest: dict[tuple, float] = {}
    for record in sorted(everything, key=lambda record: record["date"]):
        for row in record["rows"]:
            small = row.op == "attention" and any(f"-T{t}-" in row.case for t in (16, 64))
            if row.asked == "auto" and row.mode == mode and row.ratio is not None and not small:
                newest[kind_of(row), row.dtype, records.kind(record["machine"]), row.op, row.case] = row.ratio
    out: Points = {}
    for (kind, dtype, isa, *_), ratio in newest.items():
        out.setdefault(kind, {}).setdefault(dtype, {}).setdefault(isa, []).append(ratio)
    return out


def present(found: Points) -> list[str]:
    """The kinds of machines that were measured, narrowest vectors first."""
    return [isa for isa in MACHINES if any(isa in by for dtypes in found.values() for by in dtypes.values())]


def x(ratio: float) -> float:
    share = math.log(min(max(ratio, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return LABEL + (WIDTH - LABEL - RIGHT) * share


def lane(dtype: str, machines: dict[str, list[float]], y: float, name: str) -> list[str]:
    """One dtype of one kind: the span of its single cases, and a dot for each machine."""
    ratios = [r for values in machines.values() for r in values]
    parts = [f'<text class="quiet" x="{LABEL - 10}" y="{y + 4:.1f}" text-anchor="end">{dtype}</text>',
             f'<line class="span" x1="{x(min(ratios)):.1f}" y1="{y}" x2="{x(max(ratios)):.1f}" y2="{y}"/>']  # fmt: skip
    for isa in (isa for isa in MACHINES if isa in machines):
        values = machines[isa]
        mean = statistics.geometric_mean(values)
        said = f"{name}, {dtype}, {MACHINES[isa]}: {mean:.2f}x over {len(values)} cases, "
        said += f"{min(values):.2f}x to {max(values):.2f}x"
        parts.append(f'<circle class="{isa}" cx="{x(mean):.1f}" cy="{y}" r="5"><title>{escape(said)}</title></circle>')
    return parts


def svg(found: Points) -> str:
    """The picture. Raises ValueError if there is nothing to draw."""
    if not found:
        raise ValueError("the records hold no ratio of seqfuse to torch eager")
    body, y = [], float(TOP)
    for kind in (kind for kind in KINDS if kind in found):
        name = NAMES.get(kind, kind)
        lanes = [dtype for dtype in DTYPES if dtype in found[kind]]
        middle = y + LANE * (len(lanes) - 1) / 2
        body.append(f'<text x="12" y="{middle + 4:.1f}">{escape(name)}</text>')
        for dtype in lanes:
            body += lane(dtype, found[kind][dtype], y, name)
            y += LANE
        y += BETWEEN
    grid = []
    for value in (0.5, 1, 2, 4, 8, 16, 32, 64, 128):
        kind_of_line = "one" if value == 1 else "grid"
        grid.append(
            f'<line class="{kind_of_line}" x1="{x(value):.1f}" y1="{TOP - 14}" x2="{x(value):.1f}" y2="{y - 12:.1f}"/>'
        )
        grid.append(f'<text class="quiet" x="{x(value):.1f}" y="{y + 4:.1f}" text-anchor="middle">{value:g}x</text>')
    legend, left = [], 12
    for isa in present(found):
        legend.append(f'<circle class="{isa}" cx="{left + 6}" cy="56" r="5"/>')
        legend.append(f'<text x="{left + 17}" y="60">{MACHINES[isa]}</text>')
        left += 36 + 7 * len(MACHINES[isa])
    title = "Times faster than PyTorch on two CPU threads, forward + backward"
    quiet = "dots: geometric mean of a machine's cases; line: from the slowest single case to the fastest"
    height = round(y + 16)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{title}">\n<style>{STYLE}{COLOURS}</style>\n'
        f'<text class="title" x="12" y="24">{title}</text>\n<text class="quiet" x="12" y="42">{quiet}</text>\n'
        + "\n".join([*legend, *grid, *body])
        + "\n</svg>\n"
    )


def cell(ratios: list[float] | None, forward: list[float] | None) -> str:
    if not ratios:
        return ""
    more = f" ({statistics.geometric_mean(forward):.2f})" if forward else ""
    return f"{statistics.geometric_mean(ratios):.2f}{more}, {min(ratios):.2f}"


def page(everything: list[dict], files: list[Path]) -> str:
    """The numbers behind the picture, and what they were taken from."""
    both, forward = points(everything), points(everything, "fwd")
    lines = [
        "# Performance on CPUs",
        "",
        "Written by `python -m seqfuse.benchmarks.overview` from [the records](../benchmarks/records). Times faster",
        "than PyTorch eager in the same run, two threads of two-core virtual machines: geometric mean of forward +",
        "backward (of forward alone), and the slowest single case of forward + backward. `auto` chose; every case",
        "passed its accuracy check first. Kernels have changed since the older records: the newest of a case counts.",
        "",
        "![times faster than PyTorch, by op and machine](performance.svg)",
        "",
        "| | | " + " | ".join(MACHINES[isa] for isa in present(both)) + " |",
        "| --- | --- |" + " --- |" * len(present(both)),
    ]
    for kind in (kind for kind in KINDS if kind in both):
        for dtype in (dtype for dtype in DTYPES if dtype in both[kind]):
            alone = forward.get(kind, {}).get(dtype, {})
            cells = [cell(both[kind][dtype].get(isa), alone.get(isa)) for isa in present(both)]
            lines.append(f"| {NAMES.get(kind, kind)} | {dtype} | " + " | ".join(cells) + " |")
    lines += ["", "| record | processor | kind | torch |", "| --- | --- | --- | --- |"]
    for path, record in zip(files, everything, strict=True):
        m, kind = record["machine"], records.kind(record["machine"])
        link = f"[{path.name}](../benchmarks/records/{path.name})"
        lines.append(f"| {link} | {m['cpu']} | {MACHINES.get(kind, kind)} | {m['torch']} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqfuse.benchmarks.overview", description="Draw all CPU records.")
    parser.add_argument("records", type=Path, nargs="?", default=Path("benchmarks/records"), help="a folder of records")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs"), help="the folder of performance.svg and .md")
    given = parser.parse_args(arguments)
    files = sorted(given.records.glob("cpu-*.json"))
    try:
        everything = [records.read(path) for path in files]
        (given.out / "performance.svg").write_text(svg(points(everything)))
        (given.out / "performance.md").write_text(page(everything, files))
    except (ValueError, OSError) as error:
        print(f"overview: {error}", file=sys.stderr)
        return 2
    print(given.out / "performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
