"""`python -m seqfuse.benchmarks.plot RECORD.json`: one bar chart of the ratios in a record, as SVG.

The file follows the reader's light or dark setting by itself and needs nothing to draw it.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from seqfuse.benchmarks import records
from seqfuse.benchmarks.records import Row

WIDTH, LABEL, RIGHT = 760, 190, 56
BAR, GAP, BETWEEN = 13, 9, 30  # heights: a bar, the space after a case, the space for an op's name

# bars by dtype, chosen to stay apart for colour-blind readers and on both backgrounds
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; } .op { font-weight: 600; } .quiet { fill: #59636e; font-size: 11px; }
.grid { stroke: #d1d9e0; stroke-width: 1; } .one { stroke: #1f2328; stroke-width: 1.5; }
.fp32 { fill: #2f6fb5; } .bf16 { fill: #d9822b; } .fp16 { fill: #3d8f5f; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .quiet { fill: #9198a1; } .grid { stroke: #3d444d; } .one { stroke: #e6edf3; }
  .fp32 { fill: #6aa7ea; } .bf16 { fill: #f0a35a; } .fp16 { fill: #6cc08e; }
}
"""


def ratios(rows: Sequence[Row], mode: str) -> dict[str, dict[str, dict[str, float]]]:
    """{op: {case: {dtype: ratio}}} of seqfuse's own choice (`auto`) in one mode."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.asked == "auto" and row.mode == mode and row.ratio is not None:
            out.setdefault(row.op, {}).setdefault(row.case, {})[row.dtype] = row.ratio
    return out


def svg(record: dict, mode: str = "fwd+bwd") -> str:
    """The chart. Raises ValueError if the record has no ratio in this mode."""
    groups = ratios(record["rows"], mode)
    if not groups:
        raise ValueError(f"the record holds no ratio of seqfuse to torch eager in mode {mode}")
    everything = [r for cases in groups.values() for bars in cases.values() for r in bars.values()]
    step = _step(max(everything))
    top = step * math.ceil(max(1.0, *everything) / step)
    dtypes = [d for d in ("fp32", "bf16", "fp16") if any(d in bars for c in groups.values() for bars in c.values())]

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - RIGHT) * value / top

    body, y, first = [], 88.0, 74.0
    for op, cases in groups.items():
        body.append(f'<text class="op" x="12" y="{y + 12:.0f}">{escape(op)}</text>')
        y += BETWEEN - 8
        for case, bars in cases.items():
            height = BAR * len(bars)
            body.append(f'<text x="{LABEL - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(case)}</text>')
            for dtype in (d for d in dtypes if d in bars):
                ratio = bars[dtype]
                beside = x(1) if x(1) - 36 < x(ratio) < x(1) else x(ratio)  # the line at 1x runs through no number
                body.append(
                    f'<rect class="{dtype}" x="{LABEL}" y="{y:.1f}" width="{x(ratio) - LABEL:.1f}" height="{BAR - 2}" '
                    f'rx="2"><title>{escape(f"{op} {case} {dtype}: {ratio:.2f}x")}</title></rect>'
                    f'<text class="quiet" x="{beside + 5:.1f}" y="{y + BAR - 3:.1f}">{ratio:.2f}x</text>'
                )
                y += BAR
            y += GAP
        y += BETWEEN - 18
    lines = []
    for i in range(round(top / step) + 1):
        value = i * step
        lines.append(f'<line class="grid" x1="{x(value):.1f}" y1="{first}" x2="{x(value):.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="quiet" x="{x(value):.1f}" y="{y + 14:.1f}" text-anchor="middle">{value:g}x</text>')
    one = f'<line class="one" x1="{x(1):.1f}" y1="{first}" x2="{x(1):.1f}" y2="{y:.1f}"/>'
    legend = "".join(
        f'<rect class="{d}" x="{LABEL + 70 * i}" y="52" width="11" height="11" rx="2"/>'
        f'<text x="{LABEL + 70 * i + 17}" y="62">{d}</text>'
        for i, d in enumerate(dtypes)
    )
    what = "forward + backward" if mode == "fwd+bwd" else "forward"
    title = f"seqfuse against PyTorch eager, {what}: times faster"
    height = round(y + 26)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
        f'<text class="title" x="12" y="24">{escape(title)}</text>\n'
        f'<text class="quiet" x="12" y="42">{escape(_where(record))}; the line at 1x is PyTorch</text>\n{legend}\n'
        + "\n".join([*lines, *body, one])
        + "\n</svg>\n"
    )


def _step(largest: float) -> float:
    """A round distance between grid lines, for about six of them."""
    for step in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if largest / step <= 7:
            return step
    return largest / 5


def _where(record: dict) -> str:
    m = record["machine"]
    place = m["gpu"] if m["device"] == "cuda" else f"{m['cpu']} ({m['isa']}), {m['threads']} threads"
    return f"{place}, torch {m['torch']}, {record['date'][:10]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqfuse.benchmarks.plot", description="Draw a record as SVG.")
    parser.add_argument("record", type=Path, help="a file written by seqfuse bench --json")
    parser.add_argument("-o", "--out", type=Path, help="the SVG file; by default RECORD with the ending .svg")
    parser.add_argument("--mode", choices=("fwd", "fwd+bwd"), default="fwd+bwd")
    given = parser.parse_args(arguments)
    out = given.out or given.record.with_suffix(".svg")
    try:
        out.write_text(svg(records.read(given.record), given.mode))
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
