"""The request for a plan: the options of ``placer solve``."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from placer.affinity import Affinity
from placer.errors import require_left_out
from placer.placement.plan import Plan
from placer.placement.world import WorldLayout
from placer.simulation.cost import require_no_sizes
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.trace import Selection

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedNow:
    """The plan that is served now, and its file."""

    path: Path
    plan: Plan

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the plan.

        Raises
        ------
        PlacerError
            If it is not there, or not a valid plan.
        """
        return cls(path=path, plan=Plan.read(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveRequest:
    """What ``placer solve`` is asked for; ``None``: not given.

    Attributes
    ----------
    source
        A trace, or an affinity file.
    selection
        The tokens to profile.
    options
        What to solve for, as it was asked: an engine may decide more of the goal.
    by_time
        Whether predicted time is the objective, with ``traffic`` as what it chooses among.
    engine
        Name of the engine that the plan is for. From counts, without an engine, replicas
        share their load evenly, as ``hash`` has it.
    chooses_redundant
        Whether the number of redundant experts is to be chosen, from none upwards.
    redundant_gain, redundant_memory
        What a step of that choice must save, and GiB that they may take on a rank.
    hardware
        Name or file of the hardware whose time is predicted.
    model, hidden_size, expert_size, weight_bytes
        What sizes an expert, as in ``find_expert_shape``.
    served_now
        The plan whose placement the options start from.
    layout
        How expert-parallel groups lie in a larger world.
    priced_links
        Whether costs of links were given.
    require_optimal
        Whether a plan without a proof of optimality is an error.
    holds_loads_alone
        Whether the source knows neither tokens nor pairs of experts.

    Raises
    ------
    UsageError
        If an option is given without what it belongs to.
    """

    source: Path
    selection: Selection
    options: SolveOptions
    by_time: bool = False
    engine: str | None = None
    chooses_redundant: bool = False
    redundant_gain: float | None = None
    redundant_memory: float | None = None
    hardware: str | None = None
    model: Path | None = None
    hidden_size: int | None = None
    expert_size: int | None = None
    weight_bytes: float | None = None
    served_now: ServedNow | None = None
    layout: WorldLayout | None = None
    priced_links: bool = False
    require_optimal: bool = False
    holds_loads_alone: bool = field(init=False)

    def __post_init__(self) -> None:
        alone = self.holds_counts and not Affinity.read(self.source).has_links
        object.__setattr__(self, "holds_loads_alone", alone)
        goal = self.options.goal
        auto = {
            "--redundant-memory": self.redundant_memory,
            "--redundant-gain": self.redundant_gain,
        }
        for options, is_given, company in (
            (
                {"--hardware": self.hardware},
                self.by_time or self.chooses_cap,
                self._predicts_time,
            ),
            (auto, self.chooses_redundant, "--redundant-experts auto"),
            (
                {"--overflow-price": goal.overflow_price},
                goal.robust != "none",
                "--robust bootstrap or domains",
            ),
            (
                {"--replica-choice": goal.replica_choice},
                self.has_replicas,
                "--redundant-experts: without them each expert has one slot",
            ),
        ):
            if not is_given:
                require_left_out(options, company)
        if not self.weighs_experts and not self.has_replicas:
            require_no_sizes(
                self.model,
                self.hidden_size,
                self.expert_size,
                self.weight_bytes,
                "--hardware or --redundant-experts",
            )

    def with_goal(self, goal: Goal) -> Self:
        """Return the same request with another goal."""
        return replace(self, options=replace(self.options, goal=goal))

    @property
    def _predicts_time(self) -> str:
        """What ``--hardware`` is for, and why it decides nothing here."""
        if self.holds_counts:
            return "the tokens of a trace: counts do not show how long batches take"
        if self.options.goal.objective == "balance":
            return "--objective time: --objective balance does not predict time"
        return "--objective time: a load cap that is given leaves nothing to predict"

    @property
    def objective(self) -> str:
        """What is minimised, as ``--objective`` names it."""
        return "time" if self.by_time else self.options.goal.objective

    @property
    def chooses_cap(self) -> bool:
        """Whether predicted time decides whether a rank may be busier than EPLB's."""
        is_open = self.objective == "traffic" and not self.options.goal.caps.gives_load_cap
        return self.hardware is not None and is_open and not self.holds_counts

    @property
    def weighs_experts(self) -> bool:
        """Whether the size of an expert counts."""
        return self.by_time or self.chooses_cap or self.redundant_memory is not None

    @property
    def has_replicas(self) -> bool:
        """Whether redundant experts are asked for, or their number is to be chosen."""
        return self.redundant_experts != 0

    @property
    def redundant_experts(self) -> int | None:
        """Slots per layer beyond one for each expert; ``None``: to be chosen."""
        return None if self.chooses_redundant else self.options.goal.redundant_experts

    @property
    def holds_counts(self) -> bool:
        """Whether the source is an affinity file, which has no tokens."""
        return self.source.is_file()
