"""A report as one HTML page with plots, which needs nothing but a browser: no script, nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Final

from embedmesh_cli.bench.report import Plot, Report, Section

__all__ = ["as_html", "svg"]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")  # Okabe and Ito
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #d9d9d9; --soft: #5c5c5c }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --faint: #3a3a3a; --soft: #a3a3a3 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem }
code { font-size: 13px } h2 { margin-top: 2.5rem } p { margin: .3rem 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--faint); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500 }
.held::before { content: "held "; color: #009e73 }
.broken::before { content: "broken "; color: #d55e00; font-weight: 700 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } svg { width: 560px; max-width: 100%; height: auto }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .grid { stroke: var(--faint); stroke-width: 1 }
"""


def as_html(report: Report) -> str:
    """Write the page."""
    body = "".join(_html_of(section) for section in report.sections)
    head = "".join(f"<p><code>{html.escape(line)}</code></p>" for line in report.headline())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>embedmesh bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>embedmesh bench</h1>{head}{body}</body></html>\n"
    )


def _html_of(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.name)}</h2><p>{html.escape(section.about)}</p>"]
    for check in section.checks:
        kind = "held" if check.held else "broken"
        parts.append(f'<p class="{kind}">{html.escape(check.claim)}: {html.escape(check.found)}</p>')
    for table in section.tables:
        columns, *cells = table.shown()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        parts.append(f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>')
    parts.append('<div class="plots">' + "".join(svg(plot) for plot in section.plots) + "</div>")
    parts += [f"<p>{html.escape(note)}</p>" for note in section.notes]
    return "".join(parts)


_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 30, 44


class _Axis:
    """Maps values to pixels, and knows where its ticks are."""

    def __init__(self, values: Sequence[float], low: float, high: float, *, log: bool) -> None:
        self._log = log
        least, most = (min(values), max(values)) if values else (1.0, 10.0)
        self._from: float
        self._to: float
        if log:
            self._from, self._to = math.floor(math.log10(least)), math.ceil(math.log10(most))
            self._to = max(self._to, self._from + 1)
            self.ticks = [10.0**n for n in range(int(self._from), int(self._to) + 1)]
        else:
            least = min(0.0, least)
            step = _nice((most - least) / 5 or 1.0)
            self._from, self._to = least, math.ceil((most - least) / step - 1e-9) * step + least or step
            self.ticks = [least + i * step for i in range(round((self._to - least) / step) + 1)]
        self._low, self._high = low, high

    def at(self, value: float) -> float:
        """The pixel of a value."""
        position = math.log10(value) if self._log else value
        return self._low + (position - self._from) / (self._to - self._from) * (self._high - self._low)


def _nice(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def svg(plot: Plot) -> str:
    """Draw a plot."""

    def shown(x: float, y: float) -> bool:
        fine = math.isfinite(x) and math.isfinite(y)
        return fine and (x > 0 or not plot.log_x) and (y > 0 or not plot.log_y)

    lines = [[(x, y) for x, y in zip(s.x, s.y, strict=True) if shown(x, y)] for s in plot.series]
    points = [point for line in lines for point in line]
    across = _Axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, log=plot.log_x)
    up = _Axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP, log=plot.log_y)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(plot.title)}">']
    parts.append(f'<text x="{_LEFT}" y="16" font-weight="600">{html.escape(plot.title)}</text>')
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(plot.x_label)}</text>')
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(13 {height}) rotate(-90)" text-anchor="middle">{html.escape(plot.y_label)}</text>'
    )
    for i, (series, line) in enumerate(zip(plot.series, lines, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in line:
            label = f"<title>{html.escape(f'{series.name}: {x:.4g}, {y:.4g}')}</title>"
            dot = f'cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3.5" fill="{colour}"'
            parts.append(f"<circle {dot}>{label}</circle>")
        parts.append(f'<rect x="{_LEFT + 8}" y="{_TOP + 6 + 16 * i}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 23}" y="{_TOP + 15 + 16 * i}">{html.escape(series.name)}</text>')
    return "".join(parts) + "</svg>"
