"""The answer of a command: what is printed first, and ``verdict`` in its JSON."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a command found, in words.

    Attributes
    ----------
    answer
        What was found or changes: one sentence, or one for each engine and phase.
    sure
        How sure that is, or ``None`` where nothing is uncertain.
    cost
        What it costs, or ``None`` where it costs nothing.
    next
        The command to run next, or ``None``.
    is_better
        Whether what is judged is better than what it is compared with; ``None`` where
        nothing is compared, or only a part of it is better.
    """

    answer: tuple[str, ...]
    sure: str | None = None
    cost: str | None = None
    next: str | None = None
    is_better: bool | None = None

    @property
    def more(self) -> tuple[str, ...]:
        """The sentences after the answer."""
        return tuple(one for one in (self.sure, self.cost) if one is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"answer": list(self.answer)}
