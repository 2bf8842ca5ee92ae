"""Progress of a search: its objective, the best known bound, and the gap."""

from collections.abc import Callable
from dataclasses import dataclass

#: Called with one line per step of a search.
Progress = Callable[[str], None]


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
