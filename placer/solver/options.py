"""The options of the solver."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from placer.errors import UsageError, one_of, require_amount
from placer.placement.pins import Pin
from placer.placement.placement import Placement
from placer.placement.policy import POLICIES, ContentPolicy, HomePolicy, Policy
from placer.placement.topology import Topology
from placer.solver.params import SolverParams
from placer.solver.problem.scenarios import ROBUST, Robust
from placer.target.engine import (
    SOLVABLE_EXCHANGES,
    SOLVABLE_REPLICA_CHOICES,
    SolvableExchange,
    SolvableReplicaChoice,
)

Proof = Literal["none", "quick", "full"]
Objective = Literal["traffic", "balance"]
PROOFS: tuple[Proof, ...] = get_args(Proof)

#: What is wrong with a value that the solver does not know.
NOT_SOLVED = "is not possible here"

#: The cap on max/mean rank load where none is given.
MAX_IMBALANCE = 1.10
#: Copies that a pair above the cap is worth, unless another price is asked for or chosen.
OVERFLOW_PRICE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """The options of the solver.

    Attributes
    ----------
    topology
        Ranks, nodes and costs.
    objective
        ``traffic`` under a load cap, or ``balance`` alone.
    policy
        Home policy: ``fixed``, ``follow``, ``token`` or ``request``.
    exchange
        ``per-rank`` or ``per-node``: what a copy is.
    max_imbalance
        Cap on max/mean rank load in every layer; ``None`` for :data:`MAX_IMBALANCE`, or
        the best reachable in layers where that is out of reach.
    max_home_imbalance
        Cap on max/mean tokens per home rank in every layer, for ``follow`` and ``token``,
        or ``None``.
    max_received_copies
        Cap on R x the copies that a rank receives per token, in every layer, for ``fixed``
        and ``follow``, or ``None``.
    below_eplb
        Cap the load of every layer at what EPLB with as many slots has on the profile,
        where that is below ``max_imbalance``.
    relax_cap
        Take the best reachable value in layers where a ``max_imbalance`` that is given, or
        ``max_received_copies``, is out of reach.
    redundant_experts
        Slots per layer beyond one for each expert.
    replica_choice
        Which replica serves: ``local-first``, ``sglang-static`` or ``hash``; needed where
        there are redundant experts.
    robust
        Which other loads the placement must keep under the cap (``scenarios``).
    overflow_price
        Copies that a pair above the cap is worth, mean over those other loads; ``None`` for
        :data:`OVERFLOW_PRICE`, or what ``inner_cap`` finds that the cap takes.
    receive_price
        Copies that a copy to the busiest receiver is worth, beyond itself.
    proof
        How much work goes into the bounds: ``none``, ``quick`` or ``full``.
    start
        A placement to improve, or ``None``.
    migration_cost
        Copies, over the profile, that moving one expert from where the start has it is
        worth; where load is balanced, pairs of its layer's busiest rank.
    pins
        Experts that stay on a rank.
    preserve_groups
        Keep router groups whole: each on ranks of its own, or several on a rank. Without
        redundant experts a permuted checkpoint can express the plan.
    ignore_groups
        Split router groups over nodes where balancing would keep them whole.
    params
        How long to search, and how.
    """

    topology: Topology
    objective: Objective = "traffic"
    policy: HomePolicy = "fixed"
    exchange: SolvableExchange = "per-rank"
    max_imbalance: float | None = None
    max_home_imbalance: float | None = None
    max_received_copies: float | None = None
    below_eplb: bool = False
    relax_cap: bool = False
    redundant_experts: int = 0
    replica_choice: SolvableReplicaChoice | None = None
    robust: Robust = "none"
    overflow_price: float | None = None
    receive_price: float = 0.0
    proof: Proof = "quick"
    start: Placement | None = None
    migration_cost: float = 0.0
    pins: tuple[Pin, ...] = ()
    preserve_groups: bool = False
    ignore_groups: bool = False
    params: SolverParams = field(default_factory=SolverParams)

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--objective", self.objective, get_args(Objective)),
            ("--policy", self.policy, POLICIES),
            ("--exchange", self.exchange, SOLVABLE_EXCHANGES),
            ("--replica-choice", self.replica_choice, SOLVABLE_REPLICA_CHOICES),
            ("--robust", self.robust, ROBUST),
            ("--proof", self.proof, PROOFS),
        ):
            if value is not None:
                one_of(option, value, known, NOT_SOLVED)
        for option, number in {
            "--redundant-experts": self.redundant_experts,
            "--overflow-price": self.overflow_price or 0,
            "--receive-price": self.receive_price,
            "--migration-cost": self.migration_cost,
            "--max-imbalance": self.load_cap,
        }.items():
            require_amount(option, number)
        if self.load_cap < 1:
            raise UsageError(
                f"--max-imbalance is max/mean rank load, at least 1, got {self.load_cap:g}",
                "for example --max-imbalance 1.1",
            )
        self._require_consistent()

    def _require_consistent(self) -> None:
        if self.redundant_experts and self.replica_choice is None:
            raise UsageError(
                f"{self.redundant_experts} redundant experts need a replica choice",
                f"give --replica-choice {' or '.join(SOLVABLE_REPLICA_CHOICES)}",
            )
        if self.max_home_imbalance is not None:
            self._require_home_cap(self.max_home_imbalance)
        if self.max_received_copies is not None:
            self._require_receive_cap(self.max_received_copies)
        if self.migration_cost and self.start is None:
            raise UsageError(
                f"--migration-cost {self.migration_cost:g} is the cost of leaving a plan, "
                "but no plan is given",
                "give the plan that is served now: --start PLAN",
            )
        if self.preserve_groups and self.ignore_groups:
            raise UsageError(
                "--preserve-groups and --ignore-groups exclude each other",
                "give one of the two",
            )
        if self.preserve_groups and self.start is not None:
            raise UsageError(
                "--preserve-groups makes a new placement, and --start improves an old one",
                "drop one of them",
            )
        if self.preserve_groups and self.pins:
            raise UsageError(
                "--pin may split the groups that --preserve-groups keeps whole",
                "drop one of them",
            )

    def _require_home_cap(self, cap: float) -> None:
        if not 1 < cap < float("inf"):
            raise UsageError(
                f"--max-home-imbalance must be above 1, got {cap:g}",
                "choose for example --max-home-imbalance 1.5",
            )
        if self.policy not in ("follow", "token"):
            raise UsageError(
                f"--max-home-imbalance {cap:g} has no effect for --policy {self.policy}: "
                "the request router balances the homes of whole sequences",
                "drop it, or solve for --policy follow or token",
            )

    def _require_receive_cap(self, cap: float) -> None:
        if not 0 < cap < float("inf"):
            raise UsageError(
                f"--max-received-copies must be above 0, got {cap:g}",
                "choose it from the bottleneck_rank_copies_per_token of a plan without "
                "this cap",
            )
        if self.content_policy is not None:
            raise UsageError(
                f"--max-received-copies {cap:g} cannot be kept for --policy "
                f"{self.policy}: received copies depend on homes of a table that is built "
                "after the solve",
                "use --receive-price instead, or solve for --policy fixed or follow",
            )

    @property
    def load_cap(self) -> float:
        """The cap on max/mean rank load, given or not."""
        return MAX_IMBALANCE if self.max_imbalance is None else self.max_imbalance

    @property
    def gives_load_cap(self) -> bool:
        """Whether a cap on load is asked for."""
        return self.max_imbalance is not None

    @property
    def relaxes_load_cap(self) -> bool:
        """Whether to use the best reachable if the load cap is out of reach."""
        return self.relax_cap or not self.gives_load_cap

    def require_no_load_cap(self, option: str) -> None:
        """Refuse a cap on load beside an option that has caps of its own.

        Raises
        ------
        UsageError
            If one is given.
        """
        if self.max_imbalance is not None:
            raise UsageError(
                f"--max-imbalance {self.max_imbalance:g} is one load cap, {option} has its "
                "own",
                "drop one of them",
            )

    def most_load(self, pairs: float, num_ranks: int) -> float:
        """Return the pairs that a rank may serve of all pairs of a layer."""
        return self.load_cap * pairs / num_ranks

    def under(self, load_cap: float, *, relax_cap: bool = True) -> Self:
        """Return the same under another cap on load."""
        return replace(self, max_imbalance=load_cap, relax_cap=relax_cap)

    def guarded(self) -> Self:
        """Return the same options, with EPLB's load as a cap if the two can be compared.

        They do where EPLB packs as it likes on links that are all alike, and nothing is
        given that says otherwise: a cap, a plan to start from, other loads.
        """
        topology = self.topology
        alike = topology.num_nodes == 1 and topology.cost is None
        given = self.gives_load_cap or self.max_received_copies is not None
        free = self.start is None and self.robust == "none" and not self.preserve_groups
        below = self.objective == "traffic" and alike and free and not given
        return replace(self, below_eplb=below)

    @property
    def content_policy(self) -> ContentPolicy | None:
        """The policy, if a token-shuffle table gives its homes, else ``None``."""
        return self.policy if self.policy in ("token", "request") else None

    def start_policies(self, top_k: int) -> tuple[Policy, ...]:
        """Return the policies whose placements are solved first; without a table, itself.

        A table gives each layer homes of its own, so what counts most for ``token`` is how
        many ranks the ``top_k`` experts of a token are on, as under ``fixed``; but where
        experts before predict those after, the plan for ``follow`` may serve it better.
        A request keeps one home: layers must agree on what a rank is for, as under
        ``follow``.
        """
        if self.policy == "fixed":
            return ("fixed",)
        if self.policy == "token" and top_k > 1:
            given = self.start is not None or self.preserve_groups
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
    def constrained(self) -> bool:
        """Whether a placement may start above the load cap."""
        return self.start is not None or bool(self.pins) or self.preserve_groups

    @property
    def has_draws(self) -> bool:
        """Whether only SGLang's random draws decide which replica serves."""
        has_table = self.content_policy is not None
        is_drawn = self.replica_choice == "sglang-static"
        return self.redundant_experts > 0 and is_drawn and not has_table

    @property
    def asked_of_tokens(self) -> dict[str, bool]:
        """The options that need tokens, and whether each is given."""
        return {
            f"--policy {self.policy}": self.content_policy is not None,
            "--max-home-imbalance": self.max_home_imbalance is not None,
            "--max-received-copies": self.max_received_copies is not None,
            "--exchange per-node": self.exchange == "per-node",
            "--redundant-experts": self.redundant_experts > 0,
            "--robust": self.robust != "none",
            "--receive-price": self.receive_price > 0,
            "--start": self.start is not None,
            "--pin": bool(self.pins),
            "--preserve-groups": self.preserve_groups,
        }

    @property
    def traffic_alone(self) -> str | None:
        """The first option that is only for traffic, or ``None``."""
        asked = self.asked_of_tokens | {"--policy follow": self.policy == "follow"}
        for option in ("--redundant-experts", "--start", "--preserve-groups"):
            asked.pop(option)
        return next((option for option, wanted in asked.items() if wanted), None)

    @property
    def needs_tokens(self) -> str | None:
        """The first given option that needs tokens, or ``None``."""
        asked = self.asked_of_tokens.items()
        return next((option for option, wanted in asked if wanted), None)

    @property
    def words(self) -> list[str]:
        """The policy and the cap on load as words of a command, those that are given."""
        words = [] if self.policy == "fixed" else ["--policy", self.policy]
        if self.max_imbalance is not None:
            words += ["--max-imbalance", f"{self.max_imbalance:g}"]
        return words

    def to_json(self) -> dict[str, Any]:
        """Return what a plan tells of its options."""
        params = self.params.changed()
        for recorded in ("num_rounds", "num_sweeps"):
            params.pop(recorded, None)
        told = {
            "num_rounds": self.params.num_rounds,
            "num_sweeps": self.params.num_sweeps,
            "robust": self.robust,
            "overflow_price": self.overflow_price,
            "receive_price": self.receive_price,
            "replica_choice": self.replica_choice,
            "relax_cap": self.relax_cap,
            "max_imbalance_given": self.gives_load_cap,
            "objective": self.objective,
            "pins": [str(pin) for pin in self.pins],
            "preserve_groups": self.preserve_groups,
            "ignore_groups": self.ignore_groups,
            "max_home_imbalance": self.max_home_imbalance,
            "max_received_copies": self.max_received_copies,
        }
        return told | ({"params": params} if params else {})
