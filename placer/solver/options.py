"""The options of the solver."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from placer.errors import UsageError, one_of
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.solver.goal import NOT_SOLVED, Goal
from placer.solver.params import SolverParams
from placer.solver.start import Start
from placer.target.engine import SOLVABLE_REPLICA_CHOICES

Proof = Literal["none", "quick", "full"]
PROOFS: tuple[Proof, ...] = get_args(Proof)


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """The options of the solver.

    Attributes
    ----------
    topology
        Ranks, nodes and costs.
    goal
        What is minimised, for which serving, under which caps.
    start
        Where to start, and what stays.
    proof
        How much work goes into the bounds: ``none``, ``quick`` or ``full``.
    params
        How long to search, and how.
    """

    topology: Topology
    goal: Goal = field(default_factory=Goal)
    start: Start = field(default_factory=Start)
    proof: Proof = "quick"
    params: SolverParams = field(default_factory=SolverParams)

    def __post_init__(self) -> None:
        one_of("--proof", self.proof, PROOFS, NOT_SOLVED)

    def require_replica_choice(self) -> None:
        """Refuse redundant experts of which nothing says which replica serves.

        Raises
        ------
        UsageError
            If there are some.
        """
        if self.goal.redundant_experts and self.goal.replica_choice is None:
            raise UsageError(
                f"{self.goal.redundant_experts} redundant experts need a replica choice",
                f"give --replica-choice {' or '.join(SOLVABLE_REPLICA_CHOICES)}",
            )

    def require_load(
        self,
        reached: Collection[float],
        num_layers: int,
        *,
        stopped: bool = False,
        without_groups: float | None = None,
    ) -> None:
        """Refuse layers above the cap on load, unless it may be relaxed.

        Parameters and errors are those of :meth:`Caps.require_load`; ``without_groups`` is
        what the worst layer reaches with split router groups, where they were kept whole.
        """
        company = f"with {self.goal.redundant_experts} redundant experts"
        other_way, preserves = (
            "ask for more --redundant-experts",
            self.start.preserve_groups,
        )
        if preserves or without_groups is not None:
            company += " and whole router groups"
            other_way = "split the groups where the engine may"
        if without_groups is not None:
            way = "without --preserve-groups" if preserves else "--ignore-groups"
            other_way = f"split the groups, which reaches {without_groups:.4f} ({way})"
        self.goal.caps.require_load(
            reached, num_layers, company=company, other_way=other_way, stopped=stopped
        )

    def guarded(self) -> Self:
        """Return the same options, with EPLB's load as a cap if the two can be compared.

        They do where EPLB packs as it likes on links that are all alike, and nothing is
        given that says otherwise: a cap, a plan to start from, other loads.
        """
        topology, goal, caps = self.topology, self.goal, self.goal.caps
        alike = topology.num_nodes == 1 and topology.cost is None
        free = self.start.placement is None and not self.start.preserve_groups
        below = goal.objective == "traffic" and goal.robust == "none"
        return self.below_eplb(below and alike and free and caps.leaves_eplb)

    def below_eplb(self, below: bool) -> Self:
        """Return the same options, with EPLB's load as a cap or without."""
        caps = replace(self.goal.caps, below_eplb=below)
        return replace(self, goal=replace(self.goal, caps=caps))

    def start_policies(self, top_k: int) -> tuple[Policy, ...]:
        """Return the policies whose placements are solved first; without a table, itself.

        A table gives each layer homes of its own, so what counts most for ``token`` is how
        many ranks the ``top_k`` experts of a token are on, as under ``fixed``; but where
        experts before predict those after, the plan for ``follow`` may serve it better.
        A request keeps one home: layers must agree on what a rank is for, as under
        ``follow``.
        """
        if self.goal.policy == "fixed":
            return ("fixed",)
        if self.goal.policy == "token" and top_k > 1:
            given = self.start.placement is not None or self.start.preserve_groups
            return ("fixed",) if given else ("fixed", "follow")
        return ("follow",)

    def quick(self) -> Self:
        """Return options for a quick plan: a few seconds of search, no proof.

        Its copies and its imbalance are those of a whole search within a hundredth or two.
        """
        num_sweeps = min(1, self.params.num_sweeps)
        params = replace(self.params, num_rounds=0, num_sweeps=num_sweeps, num_starts=1)
        return replace(self, proof="none", params=params)

    @property
    def _asked_of_tokens(self) -> dict[str, bool]:
        """The options that need tokens, and whether each is given."""
        goal, start = self.goal, self.start
        return {
            f"--policy {goal.policy}": goal.content_policy is not None,
            **goal.caps.given_for_tokens,
            "--exchange per-node": goal.counted == "per-node",
            "--redundant-experts": goal.redundant_experts > 0,
            "--robust": goal.robust != "none",
            "--receive-price": goal.receive_price > 0,
            "--start": start.placement is not None,
            "--pin": bool(start.pins),
            "--preserve-groups": start.preserve_groups,
        }

    @property
    def pays_for_ranks(self) -> bool:
        """Whether a token costs by the ranks that serve it, wherever its home is.

        On one node both exchanges count the same copies.
        """
        is_by_rank = self.goal.counted == "per-rank" or self.topology.num_nodes == 1
        return self.goal.policy == "fixed" and is_by_rank

    @property
    def only_for_traffic(self) -> str | None:
        """The first given option that balancing cannot serve, or ``None``."""
        asked = self._asked_of_tokens
        asked["--policy follow"] = self.goal.policy == "follow"
        for option in ("--redundant-experts", "--start", "--preserve-groups"):
            asked.pop(option)
        return next((option for option, wanted in asked.items() if wanted), None)

    @property
    def needs_tokens(self) -> str | None:
        """The first given option that needs tokens, or ``None``."""
        asked = self._asked_of_tokens.items()
        return next((option for option, wanted in asked if wanted), None)

    def to_json(self) -> dict[str, Any]:
        """Return what a plan records of its options."""
        params = self.params.changed()
        for recorded in ("num_rounds", "num_sweeps"):
            params.pop(recorded, None)
        recorded_params = {
            "num_rounds": self.params.num_rounds,
            "num_sweeps": self.params.num_sweeps,
        } | ({"params": params} if params else {})
        return recorded_params | self.goal.to_json() | self.start.to_json()
