"""What an artifact holds, for the terminal, for ``--json`` and for the page."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from placer.report.chart import Chart, Section
from placer.report.headline import Headline


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What an artifact holds.

    Attributes
    ----------
    kind
        What it is, such as ``trace`` or ``plan``.
    headline
        What is said first.
    facts
        One value per name.
    sections
        Tables, such as one row per MoE layer.
    charts
        What a page draws.
    """

    kind: str
    headline: Headline
    facts: Mapping[str, Any]
    sections: tuple[Section, ...]
    charts: tuple[Chart, ...]

    @property
    def tables(self) -> tuple[Section, ...]:
        """All tables: those of charts too."""
        of_charts = (one.table for one in self.charts)
        return (*self.sections, *(one for one in of_charts if one is not None))

    def flat_facts(self) -> dict[str, Any]:
        """Return the facts, those of an object under dotted names."""
        return dict(_flat(self.facts))

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values: rows as objects, tables by their title."""
        return {
            "kind": self.kind,
            "headline": self.headline.to_json(),
            "facts": dict(self.facts),
            "tables": {
                section.title: [
                    dict(zip(section.columns, row, strict=True)) for row in section.rows
                ]
                for section in self.tables
            },
        }


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values inside an object, under dotted names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _flat(part, f"{name}.{number}")
    else:
        yield name, value
