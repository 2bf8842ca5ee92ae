"""Adding up many counts in a time that grows linearly with their size."""

from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, Self, TypeVar, get_args

# What experts are counted for one by one.
Rows = Literal["none", "tokens", "sequences"]
ROWS: tuple[Rows, ...] = get_args(Rows)


class Addable(Protocol):
    """Counts that add up."""

    def add(self, other: Self, /) -> Self:
        """Return the sum."""


Counts = TypeVar("Counts", bound=Addable)


@dataclass(slots=True)
class PairwiseSum(Generic[Counts]):
    """Adds counts in pairs of equal age, like the digits of a binary counter.

    Rows per token and sequence grow with the trace: added one by one to a running total,
    they would cost a time quadratic in its length.
    """

    _digits: list[Counts | None] = field(default_factory=list)

    def add(self, part: Counts | None) -> None:
        """Add a part; ``None`` is an empty one."""
        if part is None:
            return
        for place, held in enumerate(self._digits):
            if held is None:
                self._digits[place] = part
                return
            part = held.add(part)
            self._digits[place] = None
        self._digits.append(part)

    def result(self) -> Counts | None:
        """Return the sum, ``None`` where nothing was added."""
        total: Counts | None = None
        for held in self._digits:
            if held is not None:
                total = held if total is None else held.add(total)
        return total
