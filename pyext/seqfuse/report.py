"""Self-contained HTML reports: one file, charts as inline SVG, nothing loaded from anywhere.

Every function returns a piece of HTML; `page` puts pieces together. Colours are CSS variables, so a report follows the
reader's light or dark setting, charts included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

import torch

from seqfuse.info import build_info

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d2125; --soft: #667078; --line: #dfe3e6; --fill: #f1f3f4;
  --one: #2563a8; --two: #c2571a; --good: #2e7d4f; --bad: #b3372f;
  --four: #7a4fb0; --five: #97750e; --six: #b83280; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191c; --ink: #e4e7ea; --soft: #98a2aa; --line: #333a40;
  --fill: #1f2428; --one: #6fb0ee; --two: #ee9a5f; --good: #6cc492; --bad: #ee8077;
  --four: #b794ea; --five: #d3b04a; --six: #ee86bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.12rem; margin: 2.6rem 0 .5rem; font-weight: 650; }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .87em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.6rem 0; }
.tile { background: var(--fill); border-radius: .5rem; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.65rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .86rem; line-height: 1.35; display: block; margin-top: .15rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--fill); border-radius: .5rem;
  padding: .9rem 1.1rem; }
summary { cursor: pointer; color: var(--soft); }
figure { margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .84rem; }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg text { fill: var(--soft); } svg .strong { fill: var(--ink); font-size: 13px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .series { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
"""

COLORS = ("var(--one)", "var(--two)", "var(--good)", "var(--four)", "var(--five)", "var(--six)")
DASHES = ("", ";stroke-dasharray:7 4", ";stroke-dasharray:2 4")  # of lines beyond as many colours
LEGEND_ROW = 19


@dataclass(frozen=True)
class Series:
    """One line of a chart. marks: draw a dot at each point (for a few measured values, not for thousands). color: its
    number; lines of one number belong together. None: the next one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    color: int | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    raw = (high - low) / max(1, count) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: Sequence[Series], x_label: str, y_label: str, title: str, from_zero: bool = True) -> str:
    """A line chart with labelled axes; more lines than there are colours begin again with the first, dashed.

    NaN and infinite values are left out. from_zero: where the vertical axis starts; else near the smallest value.
    """
    width, left, right, bottom = 880, 74, 32, 50
    keys = legend([s.name for s in series], width - right)
    top = 34 + LEGEND_ROW * max((row for _, row in keys), default=0)
    height = 306 + top
    points = [[(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)] for s in series]
    every = [p for line in points for p in line]
    if not every:
        return '<p class="soft">Nothing was recorded.</p>'
    x_high = max(x for x, _ in every) or 1.0
    highest = max(y for _, y in every)
    y_low = 0.0 if from_zero else min(y for _, y in every)
    highest = highest if highest > y_low else y_low + 1.0
    y_ticks = ticks(y_low, highest)
    y_low, y_high = min([y_low, *y_ticks]), max(highest + 0.03 * (highest - y_low), *y_ticks)

    def px(x: float) -> float:
        return left + x / x_high * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(0, x_high, 7):
        out.append(f'<text x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:,g}</text>')
    out.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{py(y_low):.1f}" y2="{py(y_low):.1f}"/>')
    middle = left + (width - left - right) / 2
    out.append(f'<text x="{middle}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>')
    across = top + (height - top - bottom) / 2
    out.append(f'<text transform="translate(15 {across}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for i, (s, line, (x_key, row)) in enumerate(zip(series, points, keys, strict=True)):
        number = i if s.color is None else s.color
        stroke = f"stroke:{COLORS[number % len(COLORS)]}"
        stroke += DASHES[number // len(COLORS) % len(DASHES)]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        out.append(f'<polyline class="series" style="{stroke}" points="{path}"/>')
        if s.marks:
            fill = f'r="3" style="fill:{COLORS[number % len(COLORS)]}"'
            out += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" {fill}/>' for x, y in line]
        y_key = 14 + LEGEND_ROW * row
        out.append(f'<text class="strong" x="{x_key}" y="{y_key + 4}">{escape(s.name)}</text>')
        out.append(
            f'<line x1="{x_key - 24}" x2="{x_key - 6}" y1="{y_key}" y2="{y_key}" style="{stroke};stroke-width:3"/>'
        )
        if s.marks:
            out.append(f'<circle cx="{x_key - 15}" cy="{y_key}" {fill}/>')
    return "".join(out) + "</svg>"


def legend(names: Sequence[str], right: float) -> list[tuple[float, int]]:
    """Where the names of a chart's lines begin: (x, row), in order, rows as full as may be and up against the right."""
    rows: list[list[float]] = [[]]
    for name in names:
        wide = 72 + 7 * len(name)  # with the line before it and room behind
        if rows[-1] and sum(rows[-1]) + wide > right:
            rows.append([])
        rows[-1].append(wide)
    places = []
    for row, widths in enumerate(rows):
        x = max(0.0, right - sum(widths)) + 64
        for wide in widths:
            places.append((x, row))
            x += wide
    return places


def short(y: float) -> str:
    """A number at an axis: 0.25, 25, 25k, 2.5M."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(y) >= least:
            return f"{y / size:g}{unit}"
    return f"{y:g}"


def standalone(svg: str) -> str:
    """A chart as a file of its own, with the style that it takes from the page otherwise."""
    style = f"<style>{STYLE} svg {{ background: var(--paper); }}</style>"
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}", 1)


def heat_map(
    columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float]], x_label: str, y_label: str
) -> str:
    """values[row][column] in [0, 1], drawn as cells from empty to full; hover shows the number. Names of columns that
    are wider than a cell stand upright."""
    cell, letter = 34, 8
    row_width, column_width = (letter * max(map(len, names), default=0) for names in (rows, columns))
    upright = column_width > cell
    left, top = max(84, 40 + row_width), max(58, 40 + column_width * upright)
    width, height = left + cell * len(columns) + 10, top + cell * len(rows) + 10
    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(y_label)}">']
    middle = left + cell * len(columns) / 2
    out.append(f'<text x="{middle}" y="14" text-anchor="middle">{escape(x_label)}</text>')
    across = top + cell * len(rows) / 2
    out.append(f'<text transform="translate(14 {across}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for i, name in enumerate(columns):
        x = left + cell * (i + 0.5)
        place = f'transform="translate({x + 4} {top - 12}) rotate(-90)"' if upright else f'x="{x}" y="{top - 12}"'
        anchor = "start" if upright else "middle"
        out.append(f'<text class="strong mono" {place} text-anchor="{anchor}">{escape(name)}</text>')
    for j, name in enumerate(rows):
        y = top + cell * j
        out.append(
            f'<text class="strong mono" x="{left - 12}" y="{y + cell / 2 + 4}" text-anchor="end">{escape(name)}</text>'
        )
        for i, value in enumerate(values[j]):
            box = f'x="{left + cell * i + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="3"'
            out.append(f'<rect {box} style="fill:var(--fill)"/>')
            tip = f"{escape(columns[i])} for {escape(name)}: {value:.2f}"
            strength = min(1.0, max(0.0, value))
            out.append(f'<rect {box} style="fill:var(--one)" fill-opacity="{strength:.3f}"><title>{tip}</title></rect>')
    return "".join(out) + "</svg>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), raw: bool = False) -> str:
    """numbers: the columns that are right-aligned. raw: cells are HTML already."""

    def cells(row: Sequence[str], tag: str, plain: bool) -> str:
        out = []
        for i, cell in enumerate(row):
            kind = ' class="number"' if i in numbers else ""
            out.append(f"<{tag}{kind}>{cell if plain else escape(str(cell))}</{tag}>")
        return "<tr>" + "".join(out) + "</tr>"

    body = "".join(cells(row, "td", raw) for row in rows)
    header = f"<thead>{cells(head, 'th', False)}</thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{body}</tbody></table></div>'


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """The few numbers to see first: (value, what it is)."""
    inner = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(name)}</span></div>' for v, name in facts)
    return f'<div class="tiles">{inner}</div>'


def figure(content: str, caption: str = "") -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{content}</div>{below}</figure>'


def paragraph(text: str, soft: bool = False) -> str:
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def verbatim(text: str) -> str:
    """Text with its own lines and spaces, such as what a model wrote."""
    return f'<div class="text mono">{escape(text)}</div>'


def details(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def page(title: str, *content: str) -> str:
    """The whole document. Images, fonts, scripts and styles from elsewhere have no place in it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(content) + "\n</body></html>\n"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


def environment(device: torch.device) -> list[tuple[str, str]]:
    """Where and with what a run was made: rows for `table`."""
    info = build_info()
    return [
        ("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("device", device_name(device)),
        ("processor", f"{info['cpu']}, {os.cpu_count()} logical cores"),
        ("seqfuse", f"{info['seqfuse']}, CPU kernels at {info['isa']}"),
        ("PyTorch, Triton", f"{info['torch']}, {info['triton']}"),
        ("Python, system", f"{info['python']}, {info['platform']}"),
    ]
