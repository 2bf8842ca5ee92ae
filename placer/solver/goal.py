"""The goal of a solve: what is minimised, for which serving, under which caps."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from placer.errors import one_of, require_amount
from placer.placement.policy import POLICIES, ContentPolicy, HomePolicy
from placer.solver.caps import Caps
from placer.solver.problem.scenarios import ROBUST, Robust
from placer.target.engine import (
    SOLVABLE_EXCHANGES,
    SOLVABLE_REPLICA_CHOICES,
    SolvableExchange,
    SolvableReplicaChoice,
)

Objective = Literal["traffic", "balance"]

#: What is wrong with a value that the solver does not know.
NOT_SOLVED = "is not possible here"

#: Copies that a pair above the cap is worth, unless another price is asked for or chosen.
OVERFLOW_PRICE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The goal of a solve.

    Attributes
    ----------
    objective
        ``traffic`` under a load cap, or only ``balance``.
    policy
        Home policy: ``fixed``, ``follow``, ``token`` or ``request``.
    exchange
        ``per-rank`` or ``per-node``: what a copy is. ``None``: not given, so what the
        engine sends, or ``per-rank``.
    redundant_experts
        Slots per layer beyond one for each expert.
    replica_choice
        Which replica serves: ``local-first``, ``sglang-static`` or ``hash``; needed where
        there are redundant experts, before anything is solved.
    caps
        On rank load, on homes and on received copies.
    robust
        Which other loads the placement must keep under the cap (``scenarios``).
    overflow_price
        Copies that a pair above the cap is worth, mean over those other loads; ``None`` for
        :data:`OVERFLOW_PRICE`, or what ``inner_cap`` finds that the cap takes.
    receive_price
        Copies that a copy to the busiest receiver is worth, beyond itself.

    Raises
    ------
    UsageError
        If a value is not known or out of range, or a cap has no effect for the policy.
    """

    objective: Objective = "traffic"
    policy: HomePolicy = "fixed"
    exchange: SolvableExchange | None = None
    redundant_experts: int = 0
    replica_choice: SolvableReplicaChoice | None = None
    caps: Caps = field(default_factory=Caps)
    robust: Robust = "none"
    overflow_price: float | None = None
    receive_price: float = 0.0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--objective", self.objective, get_args(Objective)),
            ("--policy", self.policy, POLICIES),
            ("--exchange", self.exchange, SOLVABLE_EXCHANGES),
            ("--replica-choice", self.replica_choice, SOLVABLE_REPLICA_CHOICES),
            ("--robust", self.robust, ROBUST),
        ):
            if value is not None:
                one_of(option, value, known, NOT_SOLVED)
        for option, number in {
            "--redundant-experts": self.redundant_experts,
            "--overflow-price": self.overflow_price or 0,
            "--receive-price": self.receive_price,
        }.items():
            require_amount(option, number)
        self.caps.require_fit(self.policy)

    @property
    def counted(self) -> SolvableExchange:
        """The exchange whose copies count, given or not."""
        return self.exchange or "per-rank"

    @property
    def content_policy(self) -> ContentPolicy | None:
        """The policy, if a token-shuffle table gives its homes, else ``None``."""
        return self.policy if self.policy in ("token", "request") else None

    @property
    def has_draws(self) -> bool:
        """Whether only SGLang's random draws decide which replica serves."""
        has_table = self.content_policy is not None
        is_drawn = self.replica_choice == "sglang-static"
        return self.redundant_experts > 0 and is_drawn and not has_table

    @property
    def balanced(self) -> Self:
        """The goal of only balancing, which knows neither homes nor copies."""
        return replace(
            self,
            objective="balance",
            policy="fixed",
            exchange="per-rank",
            caps=self.caps.without_homes,
            receive_price=0.0,
            robust="none",
        )

    def under(self, load_cap: float, *, relax: bool = True) -> Self:
        """Return the same goal with another cap on load."""
        return replace(self, caps=self.caps.under(load_cap, relax=relax))

    @property
    def relaxed(self) -> Self:
        """The same goal where the best reachable values take the place of missed caps."""
        return replace(self, caps=replace(self.caps, relax=True))

    @property
    def words(self) -> list[str]:
        """The policy and the cap on load as words of a command, those that are given."""
        policy = [] if self.policy == "fixed" else ["--policy", self.policy]
        return policy + self.caps.words

    def to_json(self) -> dict[str, Any]:
        """Return what a plan records of its goal."""
        return self.caps.to_json() | {
            "robust": self.robust,
            "overflow_price": self.overflow_price,
            "receive_price": self.receive_price,
            "replica_choice": self.replica_choice,
            "objective": self.objective,
        }
