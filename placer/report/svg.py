"""Drawing panels as HTML and SVG that take their colours from the page's style."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import count

import numpy as np

from placer.arrays import IntArray
from placer.report.chart import Bars, Line, Lines, Matrix
from placer.report.png import NOTHING, STEPS, image_url

_WIDTH, _HEIGHT = 380, 215
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 38
_MATRIX_SIDE, _BROAD_SIDE = 340, 1000
# More columns than this need the width of the page, unless rows are as many.
_MOST_COLUMNS = 128
# Size of the text of an axis.
_CHARACTER, _LINE = 6, 13
# Room for the name of a point.
_NAME = 60


def is_broad(panel: Bars | Lines | Matrix) -> bool:
    """Return whether a panel takes the whole width of the page."""
    if not isinstance(panel, Matrix):
        return False
    rows, columns = panel.values.shape
    return bool(columns > max(_MOST_COLUMNS, 2 * rows))


def drawn(panel: Bars | Lines | Matrix, name: str) -> str:
    """Return a panel as HTML; ``name`` tells a screen reader what it shows."""
    match panel:
        case Bars():
            return _bars(panel)
        case Lines():
            return _lines(panel, name)
        case Matrix():
            return _matrix(panel, name)


def _bars(panel: Bars) -> str:
    longest = max((bar.value for bar in panel.bars), default=0) or 1
    rows = "".join(
        f'<tr><th scope="row">{escape(bar.label)}</th><td class="bar">'
        f'<span class="k-{bar.kind}" style="width:{100 * bar.value / longest:.1f}%"></span>'
        f'</td><td class="number">{escape(bar.text)}</td></tr>\n'
        for bar in panel.bars
    )
    return f'<table class="bars"><tbody>\n{rows}</tbody></table>\n'


def _lines(panel: Lines, name: str) -> str:
    frame = _Frame(panel)
    parts = [*frame.axes()]
    named = [(line.label, _swatch(line)) for line in panel.lines]
    if panel.rule is not None:
        y = frame.y(panel.rule[0])
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        )
        named.append((panel.rule[1], '<path class="rule" d="M0 5h30"/>'))
    for line in panel.lines:
        parts += _line(frame, line)
    legend = "".join(
        f'<li><svg width="30" height="10" aria-hidden="true">'
        f"{swatch}</svg> {escape(label)}</li>"
        for label, swatch in named
    )
    shown = f'<ul class="legend">{legend}</ul>' if len(named) > 1 else ""
    return shown + _svg(_WIDTH, _HEIGHT, name, "".join(parts))


def _line(frame: "_Frame", line: Line) -> Iterator[str]:
    points = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    if line.joined and len(points) > 1:
        path = " ".join(f"{x},{y}" for x, y in points)
        yield f'<polyline class="l-{line.kind}" points="{path}"/>'
    if not line.joined or len(points) < 40:
        yield "".join(_mark(line.kind, x, y) for x, y in points)
    named: list[tuple[float, float]] = []
    for (x, y), name in zip(points, line.names, strict=False):
        if all(abs(x - u) > _NAME or abs(y - v) > _LINE for u, v in named):
            named.append((x, y))
            yield f'<text x="{x + 6:.1f}" y="{y - 6:.1f}">{escape(name)}</text>'


def _mark(kind: str, x: float, y: float) -> str:
    """Each kind has a shape of its own, so that no colour is needed."""
    if kind == "contiguous":
        return (
            f'<rect class="k-{kind}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
        )
    if kind == "eplb":
        return f'<path class="k-{kind}" d="M{x} {y - 4:.1f}l4 7h-8z"/>'
    return f'<circle class="k-{kind}" cx="{x}" cy="{y}" r="3"/>'


def _swatch(line: Line) -> str:
    joined = f'<path class="l-{line.kind}" d="M0 5h30"/>' if line.joined else ""
    return joined + _mark(line.kind, 15, 5)


class _Frame:
    """Axes of a panel: where a value is drawn, in units of the drawing."""

    def __init__(self, panel: Lines) -> None:
        self._panel = panel
        xs = [x for line in panel.lines for x in line.x]
        ys = [y for line in panel.lines for y in line.y]
        ys += [] if panel.rule is None else [panel.rule[0]]
        self._x = _padded(self._scaled(min(xs)), self._scaled(max(xs)))
        self._y = _padded(0.0 if panel.from_zero else min(ys), max(ys))

    def _scaled(self, x: float) -> float:
        return float(np.log2(x)) if self._panel.log_x else x

    def x(self, value: float) -> float:
        low, high = self._x
        share = (self._scaled(value) - low) / (high - low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(_TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def axes(self) -> Iterator[str]:
        bottom = _HEIGHT - _BOTTOM
        for tick in _ticks(*self._y):
            y = self.y(tick)
            yield (
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" '
                f'y2="{y}"/><text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">'
                f"{_label(tick)}</text>"
            )
        for value in self._x_ticks():
            x = self.x(value)
            yield (
                f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">'
                f"{_label(value)}</text>"
            )
        middle = (_TOP + bottom) / 2
        yield (
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" '
            f'text-anchor="middle">{escape(self._panel.x_title)}</text>'
            f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(self._panel.y_title)}</text>"
        )

    def _x_ticks(self) -> Sequence[float]:
        if not self._panel.log_x:
            ticks = [tick for tick in _ticks(*self._x) if tick >= 0]
            numbers = (x for line in self._panel.lines for x in line.x)
            whole = all(float(x).is_integer() for x in numbers)
            return [tick for tick in ticks if tick.is_integer() or not whole]
        values = sorted({x for line in self._panel.lines for x in line.x})
        kept: list[float] = []
        for value in values:
            width = _CHARACTER * (len(_label(value)) + 1)
            if not kept or self.x(value) - self.x(kept[-1]) >= width:
                kept.append(value)
        return kept


def _padded(low: float, high: float) -> tuple[float, float]:
    """Leave a margin at each end; zero stays where it is."""
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - margin), high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round values between two."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    first = int(np.ceil(low / step))
    return [
        round(n * step, 10) for n in range(first, int(np.floor(high / step + 1e-9)) + 1)
    ]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _matrix(panel: Matrix, name: str) -> str:
    rows, columns = panel.values.shape
    width = _BROAD_SIDE if is_broad(panel) else _MATRIX_SIDE
    left = 22 + (_CHARACTER + 1) * len(str(rows - 1))
    # Cells are square where both axes are long; a short axis is stretched.
    height = round(min(max(width * rows / columns, 90, 3 * rows), 360))
    # Cells that are smaller than a pixel are mixed, so that none is left out.
    drawn_as = "fine" if max(columns / width, rows / height) > 1 else "cells"
    parts = [
        f'<image class="{drawn_as}" x="{left}" y="4" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="{image_url(_colours(panel))}"/>'
    ]
    for value in _places(columns, width / (_CHARACTER * (len(str(columns)) + 3))):
        x = left + width * (value + 0.5) / columns
        parts.append(
            f'<text x="{x:.1f}" y="{height + 17}" text-anchor="middle">{value}</text>'
        )
    for value in _places(rows, height / _LINE):
        y = 8 + height * (value + 0.5) / rows
        parts.append(f'<text x="{left - 4}" y="{y:.1f}" text-anchor="end">{value}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{height + 32}" text-anchor="middle">'
        f"{escape(panel.x_title)}</text>"
        f'<text transform="translate(13 {4 + height / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(panel.y_title)}</text>'
    )
    return _svg(left + width + 6, height + 38, name, "".join(parts))


def _colours(panel: Matrix) -> IntArray:
    """Return ``[N, M]``: the colour of each cell, for :func:`image_url`."""
    with np.errstate(divide="ignore"):
        place = np.log2(panel.values) / panel.octaves * STEPS
    # The baseline's colour takes half a step on each side.
    steps = np.clip(np.rint(np.nan_to_num(place, neginf=-STEPS)), -STEPS, STEPS)
    return np.where(np.isnan(panel.values), NOTHING, steps + STEPS).astype(np.int64)


def _places(number: int, most: float) -> range:
    """Return the rows or columns that are numbered: at most so many, and at most 12."""
    step = next(2**n for n in count() if number / 2**n <= min(most, 12))
    return range(0, number, step)


def key(octaves: int) -> str:
    """Return what the colours of matrices mean."""
    # The baseline's colour takes half a step on each side.
    near = 2 ** (octaves / STEPS / 2)
    colours = image_url(np.arange(2 * STEPS + 1)[None, :])
    return (
        f'<p class="key">&le; 1/{2**octaves} <svg width="143" height="11" role="img" '
        'aria-label="from blue over grey to orange"><image class="cells" width="143" '
        f'height="11" preserveAspectRatio="none" href="{colours}"/></svg> '
        f"&ge; {2**octaves}; grey: near the baseline ({1 / near:.2f} to {near:.2f})</p>\n"
    )


def _svg(width: float, height: float, name: str, body: str) -> str:
    return (
        f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name, quote=True)}">{body}</svg>\n'
    )
