"""The metric of what an engine sends, by which placements are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from placer.arrays import Int32Array
from placer.placement.plan import Plan
from placer.simulation.metrics import PolicyTally
from placer.target.engine import (
    Engine,
    Exchange,
    PlacementEffect,
    ReplicaChoice,
    Transfer,
    placement_effect,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What is counted.

    Attributes
    ----------
    metric
        The key of ``PolicyMetrics``.
    heading
        The heading of a table's column.
    words
        In a sentence.
    """

    metric: str
    heading: str
    words: str

    def of_token(self, tally: PolicyTally) -> Int32Array:
        """Return ``[T]``: what each token sent in all layers."""
        return {
            PAIRS: tally.pairs_of_token,
            RANK_COPIES: tally.copies_of_token,
            NODE_COPIES: tally.node_copies_of_token,
        }[self]


PAIRS = Sent(metric="remote_pairs_per_token", heading="pairs/token", words="pairs sent")
RANK_COPIES = Sent(
    metric="remote_rank_copies_per_token", heading="copies/token", words="copies sent"
)
NODE_COPIES = Sent(
    metric="remote_node_copies_per_token",
    heading="node copies/token",
    words="copies sent between nodes",
)


def sent_by(exchange: Exchange, num_nodes: int) -> Sent | None:
    """Return the metric of an exchange; ``None`` if placement cannot change it."""
    if exchange == "per-expert":
        return PAIRS
    if exchange == "per-rank":
        return RANK_COPIES
    if exchange == "per-node":
        return NODE_COPIES if num_nodes > 1 else RANK_COPIES
    return None


_PER_RANK = Transfer(exchange="per-rank", element="bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """The exchanges and the replica choice with which a placement is served.

    Attributes
    ----------
    dispatch, combine
        To the experts, and back.
    replica_choice
        Which replica of an expert serves; ``None`` where each has one.
    num_nodes
        Nodes that the ranks are on.
    has_replicas
        Whether experts may have more than one replica.
    """

    dispatch: Transfer = _PER_RANK
    combine: Transfer = _PER_RANK
    replica_choice: ReplicaChoice | None = None
    num_nodes: int = 1
    has_replicas: bool = False

    @classmethod
    def of(
        cls, plan: Plan, engine: Engine | None, replica_choice: ReplicaChoice | None = None
    ) -> Self:
        """Return what an engine sends of a plan; without one, what it was solved for."""
        if engine is None:
            exchange: Exchange = "per-node" if plan.exchange == "per-node" else "per-rank"
            dispatch = combine = Transfer(exchange=exchange, element="bf16")
        else:
            dispatch, combine = engine.dispatch, engine.combine
        return cls(
            dispatch=dispatch,
            combine=combine,
            replica_choice=replica_choice or plan.recorded_choice,
            num_nodes=plan.placement.num_nodes,
            has_replicas=plan.placement.has_replicas,
        )

    @property
    def sent(self) -> Sent | None:
        """What is sent, or ``None`` where it is the same for all placements."""
        return sent_by(self.dispatch.exchange, self.num_nodes)

    def effect(self, policy: str) -> PlacementEffect:
        """Return whether a placement can change what is sent under a home policy."""
        return placement_effect(
            policy,
            self.dispatch.exchange,
            self.replica_choice,
            has_replicas=self.has_replicas,
        )

    def compared(self, policy: str) -> Sent | None:
        """Return the metric that compares placements under a home policy, or ``None``."""
        return self.sent if self.effect(policy).changes_traffic else None


def deployable(policies: Iterable[str], own: str) -> list[str]:
    """Return the policies that an engine can serve, and a plan's own.

    ``follow`` is research and ``oracle`` an upper limit (``docs/concepts.md``).
    """
    return [one for one in policies if one == own or one not in ("follow", "oracle")]
