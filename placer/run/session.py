"""What solving runs with: the receiver of progress, when to stop, and the seed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

from placer.errors import require_amount
from placer.run.deadline import Deadline
from placer.run.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What solving runs with, from the command to the last search.

    Attributes
    ----------
    progress
        Called with one line per step, or ``None``: nobody listens.
    deadline
        Stops searches and proofs; by default nothing does.
    seed
        Seed of all that is drawn.

    Raises
    ------
    UsageError
        If the seed is negative.
    """

    progress: Progress | None = None
    deadline: Deadline = field(default_factory=Deadline)
    seed: int = 0

    def __post_init__(self) -> None:
        require_amount("--seed", self.seed)

    @classmethod
    def begun(
        cls,
        *,
        time_limit: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        began: float | None = None,
    ) -> Self:
        """Return a session of so many seconds from ``began``, by default from now.

        Raises
        ------
        UsageError
            If the time limit or the seed is negative, or the limit is not finite.
        """
        require_amount("--time-limit", time_limit or 0)
        began = time.monotonic() if began is None else began
        deadline = Deadline(seconds=time_limit, began=began)
        return cls(progress=progress, deadline=deadline, seed=seed)

    def tell(self, step: str) -> None:
        """Report a step."""
        if self.progress is not None:
            self.progress(step)

    @property
    def quiet(self) -> Self:
        """The same session without progress."""
        return replace(self, progress=None)

    def part(self, share: float) -> Self:
        """Return a session that has a share of the time that is left."""
        return replace(self, deadline=self.deadline.part(share))

    @contextmanager
    def choosing(self, share: float = 0.5) -> Iterator[Self]:
        """Give a share of the time that is left to a choice of what to search for."""
        with self.deadline.choosing(share) as part:
            yield replace(self, deadline=part)
