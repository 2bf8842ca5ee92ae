"""When a search stops before it is done: after some seconds, or when it is interrupted."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self, TypeVar

Step = TypeVar("Step")
Termination = Literal["proved", "step_limit", "time_limit", "interrupted"]


class OutOfTimeError(Exception):
    """The work that was begun would not finish by its deadline.

    Attributes
    ----------
    seconds
        What it would take.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it would take {seconds:.1f} s")
        self.seconds = seconds


@dataclass(slots=True, kw_only=True)
class Deadline:
    """Stops a search, which then returns the best result so far.

    Attributes
    ----------
    seconds
        Wall-clock seconds from now, or ``None`` for no limit.
    stopped
        Whether a search was stopped.
    interrupted
        Whether it was so by Ctrl-C.
    chosen_in_haste
        Whether what to search for was chosen by quick plans that were stopped.
    needed, kept
        Seconds before the end when to stop: for what has to be done afterwards, and for
        what may be.
    began
        ``time.monotonic()`` when the seconds began.
    """

    seconds: float | None = None
    stopped: bool = False
    interrupted: bool = False
    chosen_in_haste: bool = False
    needed: float = 0.0
    kept: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def reproducible(self) -> bool:
        """Whether neither the clock nor Ctrl-C changed the result."""
        return not self.stopped and not self.chosen_in_haste

    def termination(self, *, proved: bool) -> Termination:
        """Return what ended a search, which ``proved`` its result the best or not."""
        if proved:
            return "proved"
        if self.interrupted:
            return "interrupted"
        return "step_limit" if self.reproducible else "time_limit"

    def passed(self) -> bool:
        """Return whether to stop now, and remember it."""
        if self.left() == 0.0:
            self.stopped = True
        return self.stopped

    def left(self) -> float | None:
        """Return the seconds that are left, or ``None`` without a limit."""
        if self.seconds is None:
            return None
        spent = time.monotonic() - self.began
        return max(0.0, self.seconds - self.needed - self.kept - spent)

    def reserve(self, seconds: float) -> None:
        """Stop this many seconds earlier, in addition to other time kept for later work."""
        if self.seconds is not None:
            self.seconds -= seconds

    def needs(self, seconds: float) -> None:
        """Keep at least this many seconds for what follows."""
        self.needed = max(self.needed, seconds)

    def needs_less(self, share: float, *, fixed: float = 0.0) -> None:
        """Keep a share of it, because the next work was made smaller to save time.

        ``fixed`` seconds are taken by less work too.
        """
        self.needed = min(self.needed, fixed + self.needed * share)
        self.chosen_in_haste = True

    @contextmanager
    def keeping(self, share: float) -> Iterator[None]:
        """Keep a share of the time that is left for what follows the block."""
        kept = (self.left() or 0.0) * share
        self.kept += kept
        try:
            yield
        finally:
            self.kept -= kept

    def part(self, share: float) -> Self:
        """Return a new deadline for a share of the time that is left."""
        left = self.left()
        return type(self)(
            seconds=None if left is None else left * share,
            chosen_in_haste=self.chosen_in_haste,
        )

    def extended(self, seconds: float) -> Self:
        """Return a new deadline, later by this much."""
        later = None if self.seconds is None else self.seconds + seconds
        return type(self)(seconds=later, began=self.began)

    @contextmanager
    def choosing(self, share: float = 0.5) -> Iterator[Self]:
        """Give a share of the time that is left to a choice of what to search for."""
        part = self.part(share)
        yield part
        self.chosen_in_haste = not part.reproducible

    def paced(self, steps: Iterable[Step], number: int) -> Iterator[Step]:
        """Yield so many steps of about the same work, as long as all are done in time.

        Raises
        ------
        OutOfTimeError
            If those that were done say that all of them take longer than is left.
        """
        began, left = time.monotonic(), self.left()
        for done, step in enumerate(steps):
            if left is not None:
                seconds = (time.monotonic() - began) * number / max(done, 1)
                if left == 0.0 or seconds > left:
                    raise OutOfTimeError(seconds)
            yield step

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C end the block, not the program."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = self.interrupted = True
