"""Choosing the load cap by predicted time: the default one, or EPLB's busiest rank.

A quick plan under each is made from half of the profile's sequences. The other half says
which takes less time with two-batch overlap; the whole profile is then solved that way.
"""

from dataclasses import dataclass
from typing import Any

from placer.affinity import count_affinity
from placer.model import ModelSpec
from placer.planning.layer_time import batch_times, judged_halves
from placer.planning.question import Question
from placer.run.session import Session
from placer.solver.caps import MAX_IMBALANCE
from placer.solver.options import SolveOptions
from placer.solver.solve import solve_to_choose
from placer.trace import Chunk

# Figures of quick plans are those of a whole search within a hundredth or two.
_MARGIN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CapChoice:
    """The load cap to solve under, and the reason.

    Attributes
    ----------
    options
        What to solve for.
    relative_time
        Overlapped time under the default cap over that under EPLB's, mean over the sizes
        of batches.
    """

    options: SolveOptions
    relative_time: float

    @property
    def told(self) -> str:
        """A sentence on the choice."""
        change = f"{abs(1 - self.relative_time):.1%}"
        cap = f"a load cap of {MAX_IMBALANCE:g}"
        if self.options.goal.caps.below_eplb:
            predicted = f"{change} {'less' if self.relative_time < 1 else 'more'} time"
            return (
                "the busiest rank is kept at or below EPLB's. With two-batch overlap, "
                f"{cap} is predicted to take {predicted}. It is used only if it saves "
                f"{_MARGIN:.0%}, because predictions from quick plans can be wrong by "
                "that much"
            )
        return (
            f"{cap} is used: with two-batch overlap it is predicted to take {change} "
            "less time. A rank may be busier than EPLB's busiest rank"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "below_eplb": self.options.goal.caps.below_eplb,
            "relative_overlapped_time": self.relative_time,
        }


def choose_cap(
    model: ModelSpec,
    profile: Chunk,
    options: SolveOptions,
    question: Question,
    session: Session | None = None,
) -> CapChoice:
    """Return the options under EPLB's load, or the default cap where that is faster.

    Parameters
    ----------
    model
        The trace's model.
    profile
        The tokens to solve on.
    options
        What to solve for, below EPLB's load.
    question
        Engine, hardware and size of an expert.
    session
        Reports each plan; each quick plan has half of its time.

    Raises
    ------
    UsageError
        If the profile is one sequence, or the size of an expert is not known.
    """
    session = session or Session()
    inner, heldout = judged_halves(profile, "--hardware")
    affinity = count_affinity([inner], model, {})
    overlapped = []
    for below, what in ((True, "EPLB's load"), (False, f"cap {MAX_IMBALANCE:g}")):
        session.tell(f"quick plan, {what}")
        quick = options.quick().below_eplb(below)
        with session.choosing(0.5 if below else 1.0) as half:
            placement, _ = solve_to_choose(affinity, quick, inner, half)
        times = batch_times(model, placement, heldout, options, question)
        overlapped.append([one.overlapped for one in times])
    ratios = [free / even for even, free in zip(*overlapped, strict=True)]
    relative = round(sum(ratios) / len(ratios), 6)
    return CapChoice(
        options=options.below_eplb(relative > 1 - _MARGIN), relative_time=relative
    )
