"""How objects of the API show themselves: a title, facts, and a small table."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placer.errors import UsageError
from placer.run.verdict import Verdict

if TYPE_CHECKING:
    from pandas import DataFrame

    from placer.api.opening import Opened
    from placer.model import ModelSpec

#: The title (or ``None``), columns and rows of a table.
TitledTable = tuple[str | None, Sequence[str], Sequence[Sequence[object]]]

_TABLE: Any = {"index": False, "na_rep": "-", "float_format": "{:.3f}".format}
# More rows are no longer one screen.
_MOST_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What an object shows of itself.

    Attributes
    ----------
    title
        What it is.
    facts
        Values by name; those without one are left out.
    columns, rows
        A table, whose first rows are shown.
    lines
        Sentences after it.
    """

    title: str
    facts: Mapping[str, object] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    lines: Sequence[str] = ()

    @property
    def known(self) -> dict[str, str]:
        """The facts that there are, in words."""
        return {name: str(v) for name, v in self.facts.items() if v not in (None, "", ())}

    @property
    def last_lines(self) -> list[str]:
        """The lines after the table; the first says if rows were left out."""
        left_out = len(self.rows) - _MOST_ROWS
        more = [f"and {left_out} more rows: .to_frame()"] if left_out > 0 else []
        return [*more, *self.lines]

    def frame(self) -> "DataFrame":
        """Return the first rows of the table."""
        from pandas import DataFrame

        return DataFrame(self.rows[:_MOST_ROWS], columns=list(self.columns))


class Shown:
    """An object with a one-screen text, and the same as HTML for notebooks."""

    __slots__ = ()

    @abstractmethod
    def _shape(self) -> Shape: ...

    def __repr__(self) -> str:
        shape = self._shape()
        width = max(map(len, shape.known), default=0)
        facts = [f"  {name:<{width}}  {value}" for name, value in shape.known.items()]
        table = ["", shape.frame().to_string(**_TABLE)] if shape.rows else []
        return "\n".join([shape.title, *facts, *table, *shape.last_lines])

    def _repr_html_(self) -> str:
        shape = self._shape()
        facts = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in shape.known.items()
        )
        parts = [f"<p><b>{escape(shape.title)}</b></p>"]
        if facts:
            parts.append(f"<table>{facts}</table>")
        if shape.rows:
            parts.append(shape.frame().to_html(border=0, **_TABLE))
        return "".join([*parts, *(f"<p>{escape(line)}</p>" for line in shape.last_lines)])


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Result(Shown):
    """What a command found or wrote: the answer first.

    Attributes
    ----------
    title
        What the facts are of.
    verdict
        The answer.
    facts
        The JSON object of the command with ``--json``, without its verdict.
    out
        What was written, or ``None``.
    """

    title: str
    verdict: Verdict
    facts: Mapping[str, Any]
    out: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the command prints with ``--json``."""
        return {"verdict": self.verdict.to_json()} | dict(self.facts)

    def open(self) -> "Opened":
        """Open what was written, as :func:`placer.open` does.

        Raises
        ------
        UsageError
            If nothing was written.
        """
        from placer.api.opening import open

        if self.out is None:
            raise UsageError("nothing was written", "use the facts of this result")
        return open(self.out)

    def _shape(self) -> Shape:
        lines = [] if self.verdict.next is None else [f"next: {self.verdict.next}"]
        return Shape(
            title=" ".join(self.verdict.answer),
            facts=self.facts,
            lines=[*self.verdict.more, *lines],
        )


def model_words(model: "ModelSpec") -> str:
    """Return the shape of the model's routing, in words."""
    sizes = " and ".join(str(one) for one in dict.fromkeys(model.num_experts))
    routed = f", top-{model.top_k}" if model.top_k else ""
    return f"{model.num_layers} MoE layers of {sizes} experts{routed}"


def model_name(model: "ModelSpec") -> str:
    """Return what people call the model."""
    return model.id or model.model_type or "a model without a name"


def layers_of(model: "ModelSpec") -> tuple[int, ...]:
    """Return ``[L]``: the model's own number of each MoE layer; 0 to L-1 where unknown."""
    return model.layer_ids or tuple(range(model.num_layers))
