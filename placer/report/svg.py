"""Drawing panels as HTML and SVG that take their colours from the page's style."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

import numpy as np

from placer.arrays import IntArray
from placer.report.chart import Bars, Line, Lines, Matrix

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 38
# Colours of a matrix on each side of the baseline.
_STEPS = 5
_MATRIX_SIDE = 340
_CHARACTER = 6


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
    if panel.rule is not None:
        y = frame.y(panel.rule[0])
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">'
            f"{escape(panel.rule[1])}</text>"
        )
    for line in panel.lines:
        parts += _line(frame, line)
    legend = "".join(
        f'<li><svg width="30" height="10" aria-hidden="true">'
        f"{_swatch(line)}</svg> {escape(line.label)}</li>"
        for line in panel.lines
    )
    shown = f'<ul class="legend">{legend}</ul>' if len(panel.lines) > 1 else ""
    return shown + _svg(_WIDTH, _HEIGHT, name, "".join(parts))


def _line(frame: "_Frame", line: Line) -> Iterator[str]:
    points = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    if line.joined and len(points) > 1:
        path = " ".join(f"{x},{y}" for x, y in points)
        yield f'<polyline class="l-{line.kind}" points="{path}"/>'
    if not line.joined or len(points) < 40:
        yield "".join(_mark(line.kind, x, y) for x, y in points)


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
            return [tick for tick in _ticks(*self._x) if tick >= 0]
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
    # Cells are square where both axes are long; a short axis is stretched.
    width = _MATRIX_SIDE
    height = round(min(max(width * rows / columns, 90), 360))
    parts = [
        f'<svg x="{_LEFT - 16}" y="4" width="{width}" height="{height}" '
        f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges">{"".join(_cells(_steps(panel)))}</svg>'
    ]
    left = _LEFT - 16
    for value in _places(columns):
        x = left + width * (value + 0.5) / columns
        parts.append(
            f'<text x="{x:.1f}" y="{height + 17}" text-anchor="middle">{value}</text>'
        )
    for value in _places(rows):
        y = 8 + height * (value + 0.5) / rows
        parts.append(f'<text x="{left - 4}" y="{y:.1f}" text-anchor="end">{value}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{height + 32}" text-anchor="middle">'
        f"{escape(panel.x_title)}</text>"
        f'<text transform="translate(13 {4 + height / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(panel.y_title)}</text>'
    )
    return _svg(left + width + 6, height + 38, name, "".join(parts)) + _key(panel.octaves)


def _steps(panel: Matrix) -> IntArray:
    """Return ``[N, M]``: the colour of each cell; -1 where there is nothing."""
    with np.errstate(divide="ignore"):
        place = np.log2(panel.values) / panel.octaves * _STEPS
    # The baseline's colour takes half a step on each side.
    steps = np.clip(np.rint(np.nan_to_num(place, neginf=-_STEPS)), -_STEPS, _STEPS)
    return np.where(np.isnan(panel.values), -1, steps + _STEPS).astype(np.int64)


def _cells(steps: IntArray) -> Iterator[str]:
    """Yield one path for each colour; neighbours of one colour are one rectangle."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(steps.tolist()):
        x = 0
        for step, run in groupby(row):
            length = len(list(run))
            if step >= 0:
                paths.setdefault(step, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    for step in sorted(paths):
        yield f'<path class="m{step}" d="{"".join(paths[step])}"/>'


def _places(number: int) -> range:
    """Return the rows or columns that are numbered."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if number / s <= 12)
    return range(0, number, step)


def _key(octaves: int) -> str:
    colours = "".join(f'<i class="m{step}"></i>' for step in range(2 * _STEPS + 1))
    return (
        f'<p class="key">&le; 1/{2**octaves} <span>{colours}</span> &ge; {2**octaves}; '
        "grey: 1, the baseline</p>\n"
    )


def _svg(width: float, height: float, name: str, body: str) -> str:
    return (
        f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name, quote=True)}">{body}</svg>\n'
    )
