"""Progress: which step of how many, and the gap of a search."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

#: Called with one line per step.
Progress = Callable[[str], None]
Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class Steps:
    """Reports which step of how many begins, such as "step 2 of 5: eplb".

    Attributes
    ----------
    tell
        Receives the lines, or ``None``.
    total
        Number of steps.
    unit
        What one step is called.
    """

    tell: Progress | None
    total: int
    unit: str = "step"
    _begun: int = 0

    def begin(self, what: str = "") -> None:
        """Report that the next step begins; ``what`` says what it does."""
        self._begun += 1
        if self.tell is not None:
            line = f"{self.unit} {self._begun:,} of {self.total:,}"
            self.tell(f"{line}: {what}" if what else line)

    def each(
        self, items: Iterable[Item], what: Callable[[Item], str] = lambda _: ""
    ) -> Iterator[Item]:
        """Yield the items; each is a step, in the words of ``what``."""
        for item in items:
            self.begin(what(item))
            yield item


@dataclass(slots=True, kw_only=True)
class GapLine:
    """Reports one line for each step; it does not change the result.

    Attributes
    ----------
    tell
        Receives the lines, or ``None``.
    num_decimals
        Of objective and bound.
    bound
        A proved lower bound of the objective, or ``None``.
    """

    tell: Progress | None
    num_decimals: int
    bound: float | None = None

    def raise_bound(self, bound: float | None) -> None:
        """Keep the best of the bounds."""
        known = [one for one in (self.bound, bound) if one is not None]
        self.bound = max(known, default=None)

    def __call__(self, what: str, objective: float) -> None:
        """Report what was done, and the current figures."""
        if self.tell is None:
            return
        line = f"{what}: objective {objective:.{self.num_decimals}f}"
        if self.bound is not None:
            line += f", bound {self.bound:.{self.num_decimals}f}"
            line += f", gap {gap(objective, self.bound):.1%}"
        self.tell(line)


def gap(objective: float, bound: float) -> float:
    """Return ``(objective - bound) / objective``, 0 where nothing is to be gained."""
    return max(0.0, (objective - bound) / objective) if objective > 0 else 0.0
