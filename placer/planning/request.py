"""The request for a plan: the options of ``placer solve``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from placer.affinity import Affinity
from placer.errors import one_of, require_left_out
from placer.placement.world import WorldLayout
from placer.simulation.cost import require_no_sizes
from placer.solver.options import NOT_SOLVED, SolveOptions
from placer.trace import Selection

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveRequest:
    """The options of a solve; ``None``: not given.

    Attributes
    ----------
    source
        A trace, or an affinity file.
    selection
        The tokens to profile.
    options
        What to solve for, except for what the other fields decide.
    objective
        ``traffic``, ``balance`` or ``time``.
    engine
        Name of the engine that the plan is for.
    exchange, replica_choice
        As in ``SolveOptions``. From counts, without an engine, replicas share their load
        evenly, as ``hash`` has it.
    redundant_experts
        Slots per layer beyond one for each expert; ``None`` to choose their number.
    redundant_gain, redundant_memory
        What a step of that choice must save, and GiB that they may take on a rank.
    hardware
        Name or file of the hardware whose time is predicted.
    model, hidden_size, expert_size, weight_bytes
        What sizes an expert, as in ``find_expert_shape``.
    start
        Path of the plan to improve.
    migration_cost
        As in ``SolveOptions``.
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
        If the objective is not known, or an option is given without what it belongs to.
    """

    source: Path
    selection: Selection
    options: SolveOptions
    objective: str = "traffic"
    engine: str | None = None
    exchange: str | None = None
    replica_choice: str | None = None
    redundant_experts: int | None = 0
    redundant_gain: float | None = None
    redundant_memory: float | None = None
    hardware: str | None = None
    model: Path | None = None
    hidden_size: int | None = None
    expert_size: int | None = None
    weight_bytes: float | None = None
    start: Path | None = None
    migration_cost: float = 0.0
    layout: WorldLayout | None = None
    priced_links: bool = False
    require_optimal: bool = False
    holds_loads_alone: bool = field(init=False)

    def __post_init__(self) -> None:
        alone = self.holds_counts and not Affinity.read(self.source).has_links
        object.__setattr__(self, "holds_loads_alone", alone)
        one_of("--objective", self.objective, ("traffic", "balance", "time"), NOT_SOLVED)
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
            (auto, self.redundant_experts is None, "--redundant-experts auto"),
            (
                {"--overflow-price": self.options.overflow_price},
                self.options.robust != "none",
                "--robust bootstrap or domains",
            ),
            (
                {"--replica-choice": self.replica_choice},
                self.has_replicas,
                "--redundant-experts: without them each expert has one slot",
            ),
        ):
            if not is_given:
                require_left_out(options, company)
        if not self.weighs_experts:
            require_no_sizes(
                self.model,
                self.hidden_size,
                self.expert_size,
                self.weight_bytes,
                "--hardware or --redundant-memory",
            )

    @property
    def _predicts_time(self) -> str:
        """What ``--hardware`` is for, and why it decides nothing here."""
        if self.holds_counts:
            return "the tokens of a trace: counts do not show how long batches take"
        if self.objective == "balance":
            return "--objective time: --objective balance does not predict time"
        return "--objective time: a load cap that is given leaves nothing to predict"

    @property
    def by_time(self) -> bool:
        """Whether predicted time is the objective."""
        return self.objective == "time"

    @property
    def chooses_cap(self) -> bool:
        """Whether predicted time decides whether a rank may be busier than EPLB's."""
        is_open = self.objective == "traffic" and not self.options.gives_load_cap
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
    def holds_counts(self) -> bool:
        """Whether the source is an affinity file, which has no tokens."""
        return self.source.is_file()
