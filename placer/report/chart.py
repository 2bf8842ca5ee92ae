"""What a report draws: values, units and words, before they are drawn.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks.
"""

from dataclasses import dataclass

from placer.arrays import FloatArray

#: Placements that have a colour of their own in every report, in the order of bars.
PLACER, CONTIGUOUS, EPLB, OTHER = "placer", "contiguous", "eplb", "other"


def kind_of_placement(name: str) -> str:
    """Return whose colour a placement is drawn in."""
    return name if name in (PLACER, CONTIGUOUS, EPLB) else OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table: its title, columns and rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A value of :class:`Bars`, and what is written beside it."""

    label: str
    value: float
    text: str
    kind: str = OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Horizontal bars from zero: the longest has the full width."""

    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of one thing, in the order of ``x``; ``joined`` by a line or not.

    ``names`` are written beside the points, where there is room.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: str = OTHER
    joined: bool = True
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Lines over one axis. The rule is a horizontal line with its name."""

    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    rule: tuple[float, str] | None = None
    log_x: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """A matrix of ratios, 1 being the baseline.

    Attributes
    ----------
    values
        ``[N, M]``; NaN where there is nothing.
    octaves
        The last colours are reached at ``2 ** octaves`` and its inverse. It belongs to the
        kind of chart, so that reports can be compared.
    """

    x_title: str
    y_title: str
    values: FloatArray
    octaves: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart with its words.

    Attributes
    ----------
    name
        Identifies the chart on the page: letters and hyphens.
    title
        What it shows.
    reading
        One sentence: how to read it.
    unit, baseline
        What is counted, and what it is compared with.
    panels
        What is drawn, each under its own heading; a single one may have none.
    table
        The same figures for those who read no colours.
    """

    name: str
    title: str
    reading: str
    unit: str
    baseline: str
    panels: tuple[tuple[str, Bars | Lines | Matrix], ...]
    table: Section | None = None
