"""How a plan was solved."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from placer.planning.layer_time import TimeChoice
    from placer.simulation.cost import ExpertShape


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a plan was solved: what its verdict and its tables add to the plan itself.

    Attributes
    ----------
    source
        The trace or the affinity file.
    start
        The plan that was started from, or ``None``.
    model, expert
        What sizes a token of the KV cache and an expert, or ``None``.
    time
        Why it was solved as it was, where time is the objective; else ``None``.
    """

    source: Path
    start: Path | None = None
    model: Path | None = None
    expert: "ExpertShape | None" = None
    time: "TimeChoice | None" = None

    @property
    def time_lines(self) -> list[str]:
        """What predicted time chose, and for which links another plan is faster."""
        if self.time is None:
            return []
        return [
            f"least predicted time on held-out sequences of the profile: {self.time.name}",
            *(
                f"{shape.batching}, {shape.tokens_per_rank:,} tokens per rank: compared "
                f"with the load balancer, the fastest plan for traffic {found.words}"
                for shape, found in self.time.break_even_by_size
            ),
        ]
