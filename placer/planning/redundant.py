"""How many redundant experts: the fewest beyond which the next step gains little.

Every step costs memory on every rank, and later copies gain less than earlier ones. For R
ranks the ladder begins with the fewest further slots per layer that fill them evenly, 0
where the experts do, and goes on with R, 2R, 4R, ... more; quick plans of the profile say
what each step is worth by the objective that the plan is solved for.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.run.deadline import Deadline
from placer.run.progress import Progress
from placer.simulation.cost import ExpertShape
from placer.solver.balance.replicas import (
    redundant_experts_that_fit,
    require_room,
)
from placer.solver.options import SolveOptions
from placer.solver.solve import solve_to_choose
from placer.trace import Chunk

LEAST_GAIN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a number of redundant experts is worth.

    Attributes
    ----------
    redundant_experts
        Slots per layer beyond one for each expert.
    value
        The objective of a quick plan, to be minimised.
    meets_cap
        Whether that plan is under the caps on load and on received copies.
    bytes_per_rank
        Memory that they take on each rank, all layers, or ``None`` where the size of an
        expert is not known.
    """

    redundant_experts: int
    value: float
    meets_cap: bool
    bytes_per_rank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedundantChoice:
    """A number of redundant experts, and why.

    Attributes
    ----------
    redundant_experts
        The number chosen.
    objective_name
        What the ladder's values count.
    least_gain
        Share of the value that the next step must save to be taken.
    ladder
        The steps tried, ascending.
    """

    redundant_experts: int
    objective_name: str
    least_gain: float
    ladder: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What redundant experts may take.

    Attributes
    ----------
    expert_bytes
        Bytes of one expert, or ``None`` where it is not known.
    most_bytes
        Most bytes on each rank, all layers, or ``None`` for no limit but that of the
        ladder.
    """

    expert_bytes: int | None = None
    most_bytes: int | None = None

    @classmethod
    def of(cls, expert: ExpertShape | None, most_gib: float | None) -> Self:
        """Return what experts of a shape may take, in GiB per rank."""
        if most_gib is not None and most_gib < 0:
            raise UsageError(f"--redundant-memory must not be negative, got {most_gib:g}")
        if most_gib is not None and not np.isfinite(most_gib):
            raise UsageError(
                f"--redundant-memory must be a finite number, got {most_gib:g}",
                "leave it out for no limit",
            )
        return cls(
            expert_bytes=None if expert is None else round(expert.num_bytes),
            most_bytes=None if most_gib is None else int(most_gib * 2**30),
        )

    def __post_init__(self) -> None:
        if self.most_bytes is not None and self.expert_bytes is None:
            raise UsageError(
                "--redundant-memory needs the size of an expert",
                "give --model DIR, or --hidden-size and --expert-size",
            )

    def bytes_per_rank(self, slots_per_rank: int, num_layers: int) -> int | None:
        """Return what further slots take on each rank."""
        if self.expert_bytes is None:
            return None
        return slots_per_rank * num_layers * self.expert_bytes


#: Solves for options until a deadline; tells the objective, its name, and whether all caps
#: are met.
Worth = Callable[[SolveOptions, Deadline], tuple[float, str, bool]]


def choose_redundant_experts(
    num_experts: Sequence[int],
    options: SolveOptions,
    worth: Worth,
    memory: Memory,
    least_gain: float = LEAST_GAIN,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> RedundantChoice:
    """Climb the ladder while the next step saves ``least_gain`` of the objective.

    Steps whose quick plan misses a cap are passed over, unless ``relax_cap`` is asked for.

    Parameters
    ----------
    num_experts
        ``[L]``: experts of every layer.
    options
        What to solve for; its ``redundant_experts`` is not looked at.
    worth
        What a quick plan with some options reaches.
    memory
        What the experts may take.
    least_gain
        Share of the objective, above 0 and below 1.
    progress
        Called with each step.
    deadline
        No further step is tried after it; one of ``options.time_limit`` by default.

    Raises
    ------
    UsageError
        If ``least_gain`` is no such share, or other options leave no choice.
    """
    if options.start is not None:
        raise UsageError(
            "--redundant-experts auto chooses a number of slots, but --start has as many "
            "slots as it has",
            "give the number of the plan to start from instead of auto",
        )
    if not 0 < least_gain < 1:
        raise UsageError(
            f"--redundant-gain is a share above 0 and below 1, got {least_gain:g}",
            f"for example --redundant-gain {LEAST_GAIN:g}",
        )
    num_ranks = options.topology.num_ranks
    if next(redundant_experts_that_fit(num_experts, num_ranks), None) is None:
        require_room(num_experts, num_ranks, 0)
    steps: list[Step] = []
    chosen, name = None, ""
    deadline = deadline or Deadline(seconds=options.time_limit)
    for number in ladder(num_experts, num_ranks, memory):
        if steps and deadline.passed():
            break
        if progress is not None:
            progress(f"{number} redundant experts, quick plan")
        value, name, meets_cap = worth(replace(options, redundant_experts=number), deadline)
        per_rank = memory.bytes_per_rank(-(-number // num_ranks), len(num_experts))
        step = Step(
            redundant_experts=number,
            value=round(value, 9),
            meets_cap=meets_cap,
            bytes_per_rank=per_rank,
        )
        steps.append(step)
        if not meets_cap and not options.relax_cap:
            continue
        if chosen is not None and step.value > (1 - least_gain) * chosen.value:
            break
        chosen = step
    return RedundantChoice(
        # Where no step meets the cap, the largest is the nearest to it.
        redundant_experts=(chosen or steps[-1]).redundant_experts,
        objective_name=name,
        least_gain=least_gain,
        ladder=tuple(steps),
    )


def ladder(num_experts: Sequence[int], num_ranks: int, memory: Memory) -> list[int]:
    """Return the fewest that fill the ranks, then R, 2R, 4R, ... more, as far as allowed.

    The fewest are 0 where the experts divide over the ranks. No rank may hold two copies
    of an expert, and more than one further copy of each, on average, is not tried, nor
    more than memory allows.
    """
    fitting = list(redundant_experts_that_fit(num_experts, num_ranks))
    found = fitting[:1]
    step = num_ranks
    while (number := fitting[0] + step) in fitting and number <= min(num_experts):
        needed = memory.bytes_per_rank(-(-number // num_ranks), len(num_experts))
        if (needed or 0) > (np.inf if memory.most_bytes is None else memory.most_bytes):
            break
        found.append(number)
        step *= 2
    return found


def worth_on_profile(affinity: Affinity, profile: Chunk | None) -> Worth:
    """Return what judges a step by the objective on the profile itself."""

    def worth(options: SolveOptions, deadline: Deadline) -> tuple[float, str, bool]:
        quick = replace(options.quick(), relax_cap=True)
        _, report = solve_to_choose(affinity, quick, profile, deadline)
        return report.objective, report.objective_name, report.meets_caps

    return worth


def ladder_line(choice: RedundantChoice) -> str:
    """Return the sentence on the redundant experts that were tried, and taken."""
    steps = []
    for step in choice.ladder:
        words = f"{step.redundant_experts}: {step.value:.6g}"
        if step.bytes_per_rank:
            words += f" for {step.bytes_per_rank / 2**30:.2f} GiB per rank"
        steps.append(words if step.meets_cap else f"{words} above a cap")
    return (
        f"{choice.redundant_experts} redundant experts, no next step that is allowed and "
        f"was tried saves {choice.least_gain:.0%}; {choice.objective_name}, quick plans: "
        + "; ".join(steps)
    )
