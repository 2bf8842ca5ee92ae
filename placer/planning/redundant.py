"""How many redundant experts: the fewest after which the next step saves little.

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
from placer.placement.solver_report import SolverReport
from placer.run.session import Session
from placer.simulation.cost import ExpertShape
from placer.solver.balance.replicas import redundant_experts_that_fit, require_room
from placer.solver.options import SolveOptions
from placer.solver.solve import solve_to_choose
from placer.trace import Chunk

LEAST_GAIN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The result of a number of redundant experts.

    Attributes
    ----------
    redundant_experts
        Slots per layer beyond one for each expert.
    value
        The objective of a quick plan, to be minimised.
    excess
        How far that plan is above the caps on load and on received copies: by what share
        of the cap a layer exceeds it, summed over the layers. 0 where all caps are met.
    bytes_per_rank
        Memory that they take on each rank, all layers, or ``None`` where the size of an
        expert is not known.
    """

    redundant_experts: int
    value: float
    excess: float
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
    stopped_because
        Why no larger number was tried or taken.
    ladder
        The steps tried, ascending.
    """

    redundant_experts: int
    objective_name: str
    least_gain: float
    stopped_because: str
    ladder: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory that redundant experts may take.

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


#: Solves for options in a session; tells the objective, its name, and how far the plan
#: is above the caps.
Worth = Callable[[SolveOptions, Session], tuple[float, str, float]]


def choose_redundant_experts(
    num_experts: Sequence[int],
    options: SolveOptions,
    worth: Worth,
    memory: Memory,
    least_gain: float = LEAST_GAIN,
    session: Session | None = None,
    num_blocks: int = 1,
) -> RedundantChoice:
    """Climb the ladder while the next step saves ``least_gain`` of the objective.

    Unless caps may be relaxed, what counts first is how far a plan is above the
    caps; below them, the objective.

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
    session
        Reports each step; after its deadline no further step is tried.
    num_blocks
        Blocks of ranks that share out the experts, where router groups stay whole.

    Raises
    ------
    UsageError
        If ``least_gain`` is not such a share, or other options leave no choice.
    """
    if options.start.placement is not None:
        raise UsageError(
            "--redundant-experts auto chooses the number of slots, but with --start the "
            "number is that of the plan",
            "give the number of redundant experts of that plan instead of auto",
        )
    if not 0 < least_gain < 1:
        raise UsageError(
            f"--redundant-gain is a share above 0 and below 1, got {least_gain:g}",
            f"for example --redundant-gain {LEAST_GAIN:g}",
        )
    num_ranks = options.topology.num_ranks
    steps: list[Step] = []
    chosen, name = None, ""
    session = session or Session()
    numbers, because = ladder(num_experts, num_ranks, memory, num_blocks)
    for number in numbers:
        if chosen is not None and session.deadline.passed():
            because = f"no time was left to try {number}"
            break
        session.tell(f"{number} redundant experts, quick plan")
        goal = replace(options.goal, redundant_experts=number)
        value, name, excess = worth(replace(options, goal=goal), session)
        step = Step(
            redundant_experts=number,
            value=round(value, 9),
            excess=round(excess, 9),
            bytes_per_rank=memory.bytes_per_rank(-(-number // num_ranks), len(num_experts)),
        )
        steps.append(step)
        little = None
        if chosen is not None:
            counts_caps = not options.goal.caps.relax
            little = _too_little(chosen, step, least_gain, counts_caps=counts_caps)
        if little is not None:
            because = little
            break
        chosen = step
    return RedundantChoice(
        redundant_experts=(chosen or steps[-1]).redundant_experts,
        objective_name=name,
        least_gain=least_gain,
        stopped_because=because,
        ladder=tuple(steps),
    )


def _too_little(
    before: Step, step: Step, least_gain: float, *, counts_caps: bool
) -> str | None:
    """Say why a step is not worth taking; ``None`` where it is."""
    kept, number = 1 - least_gain, step.redundant_experts
    if counts_caps and before.excess:
        if step.excess <= kept * before.excess:
            return None
        return f"{number} would miss the caps by almost as much, or more"
    if counts_caps and step.excess:
        return f"a quick plan with {number} misses a cap"
    if step.value <= kept * before.value:
        return None
    saved = max(0.0, 1 - step.value / before.value) if before.value else 0.0
    return (
        f"{number} would save {saved:.1%}, less than the {least_gain:.0%} of "
        "--redundant-gain"
    )


def ladder(
    num_experts: Sequence[int], num_ranks: int, memory: Memory, num_blocks: int = 1
) -> tuple[list[int], str]:
    """Return the fewest that fill the ranks, then R, 2R, 4R, ... more, as far as allowed.

    The fewest are 0 where the experts divide over the ranks. No rank may hold two replicas
    of an expert, and more than one further replica of each, on average, is not tried, nor
    more than memory allows. The second value says what ends the ladder.

    Raises
    ------
    UsageError
        If no number of redundant experts fills the ranks.
    """
    fitting = list(redundant_experts_that_fit(num_experts, num_ranks, num_blocks))
    if not fitting:
        require_room(num_experts, num_ranks, 0, num_blocks)
    found = fitting[:1]
    step = num_ranks
    while (number := fitting[0] + step) in fitting:
        if number > min(num_experts):
            return found, f"{number} would be more than one extra replica of each expert"
        needed = memory.bytes_per_rank(-(-number // num_ranks), len(num_experts))
        if memory.most_bytes is not None and (needed or 0) > memory.most_bytes:
            return found, f"{number} would take more than --redundant-memory"
        found.append(number)
        step *= 2
    where = "the ranks of its router groups" if num_blocks > 1 else "the ranks"
    return found, f"{number} do not fit: {where} would hold two replicas of an expert"


def worth_on_profile(affinity: Affinity, profile: Chunk | None) -> Worth:
    """Return a function that judges a step by the objective on the profile."""

    def worth(options: SolveOptions, session: Session) -> tuple[float, str, float]:
        quick = replace(options.quick(), goal=options.goal.relaxed)
        _, report = solve_to_choose(affinity, quick, profile, session)
        return report.objective, report.objective_name, excess(report, options)

    return worth


def excess(report: SolverReport, options: SolveOptions) -> float:
    """Return by what share of the cap layers exceed it, summed over the layers and caps."""
    return options.goal.caps.excess(
        report.relaxed_layers.values(), report.relaxed_receive_layers.values()
    )


def ladder_line(choice: RedundantChoice) -> str:
    """Return the sentence on the redundant experts that were tried, and taken."""
    steps = []
    for step in choice.ladder:
        words = f"{step.value:.6g} with {step.redundant_experts}"
        if step.bytes_per_rank:
            words += f" for {step.bytes_per_rank / 2**30:.2f} GiB per rank"
        steps.append(f"{words} (misses a cap)" if step.excess else words)
    return (
        f"{choice.redundant_experts} redundant experts, because {choice.stopped_because}. "
        f"Quick plans, {choice.objective_name}: " + "; ".join(steps)
    )
