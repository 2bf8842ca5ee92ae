"""When a search stops before it is done: after some seconds, or when it is interrupted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Deadline:
    """Stops a search, which then gives the best that it has.

    Attributes
    ----------
    seconds
        Wall-clock seconds from now, or ``None`` for no limit.
    stopped
        Whether a search was stopped; its result cannot be reproduced.
    """

    seconds: float | None = None
    stopped: bool = False
    _began: float = field(default_factory=time.monotonic)

    def passed(self) -> bool:
        """Return whether to stop now, and remember it."""
        if self.seconds is not None and time.monotonic() - self._began >= self.seconds:
            self.stopped = True
        return self.stopped

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C end the block, not the program."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = True
