"""The question to ``placer advise``: the model, the engine and the batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from placer.errors import UsageError, one_of
from placer.model import ModelSpec
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.planning.engine_options import require_loadable
from placer.planning.phases import answered
from placer.serving.homes import BatchShape, batch_shapes
from placer.simulation.batch_figures import BatchOptions
from placer.simulation.cost import CostModel, ExpertShape, cost_model
from placer.simulation.sent import Sent, sent_by
from placer.solver.balance.replicas import redundant_experts_that_fit
from placer.target.engine import (
    PHASES,
    Engine,
    Exchange,
    Phase,
    PlacementEffect,
    ReplicaChoice,
    Transfer,
    known_engines,
)
from placer.target.hardware import Hardware


def plain_engine(name: str, exchange: Exchange) -> Engine:
    """Return an engine that represents all with this exchange, in bf16."""
    way = Transfer(exchange=exchange, element="bf16")
    return Engine(
        name=name,
        family="",
        phases=PHASES,
        dispatch=way,
        combine=way,
        replica_choice="hash",
        map_format="json",
        group_rule="any",
        selected_by="",
        source="",
        read_in="",
    )


def usual_engines(num_nodes: int) -> tuple[Engine, Engine]:
    """Return the engines that represent all others if none is named.

    Their default exchange, and the all-to-all that they can be started with.
    """
    return (
        plain_engine("default all-gather", "all-gather"),
        plain_engine("token all-to-all", "per-node" if num_nodes > 1 else "per-rank"),
    )


def predictable_policy(policy: str) -> Policy:
    """Return a policy whose batches can be predicted.

    Raises
    ------
    UsageError
        If they cannot.
    """
    return one_of("batches of --policy", policy, get_args(Policy), "cannot be predicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The serving to advise on, and the smallest saving that is worth a change.

    Attributes
    ----------
    topology
        Ranks and nodes.
    policy
        Home policy.
    engine
        What sends, or ``None``: one copy per rank in bf16.
    hardware, expert
        What the cost model needs, or ``None``: then traffic and balance are the measure.
    shapes
        The batches to serve; an engine serves those that it is run for.
    least_gain
        Share of the measure that a change must save.
    phase
        Only tokens of this phase, or ``None`` for all.
    redundant_experts
        Slots per layer beyond one for each expert.
    layer_ids
        As in ``ServingOptions``.
    """

    topology: Topology
    policy: Policy = "fixed"
    engine: Engine | None = None
    hardware: Hardware | None = None
    expert: ExpertShape | None = None
    shapes: tuple[BatchShape, ...] = batch_shapes()
    least_gain: float = 0.03
    phase: Phase | None = None
    redundant_experts: int = 0
    layer_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        predictable_policy(self.policy)

    @property
    def served(self) -> Engine:
        """The exchanges and replica choice."""
        return self.engine or plain_engine("token all-to-all", "per-rank")

    @property
    def node_doubt(self) -> str | None:
        """A warning if the engine's kernels see other nodes than the topology has."""
        return self.served.doubt(self.topology.num_nodes, self.topology.gpus_per_node)

    @property
    def known_engine(self) -> Engine | None:
        """The engine that ``--engine`` names, or ``None``."""
        is_known = self.engine is not None and self.engine.name in known_engines()
        return self.engine if is_known else None

    @property
    def answered(self) -> tuple[BatchShape, ...]:
        """The batches that the engine is run for."""
        return answered(self.engine, self.shapes)

    @property
    def replica_choice(self) -> ReplicaChoice | None:
        """Which replica of a redundant expert serves; ``None`` without them."""
        return self.served.replica_choice if self.redundant_experts else None

    @property
    def effect(self) -> PlacementEffect:
        """Whether a placement can change what the engine sends."""
        return self.served.effect(self.policy, has_replicas=self.redundant_experts > 0)

    @property
    def sent(self) -> Sent | None:
        """What the engine sends and a placement changes, or ``None``."""
        if not self.effect.changes_traffic:
            return None
        return sent_by(self.served.dispatch.exchange, self.topology.num_nodes)

    def batch_options(self) -> BatchOptions:
        """Return how batches are served."""
        ways = self.served.dispatch.exchange, self.served.combine.exchange
        return BatchOptions(
            policy=self.policy,
            exchanges=ways,
            replica_choice=self.replica_choice,
            layer_ids=self.layer_ids,
        )

    def cost_model(self) -> CostModel | None:
        """Return the cost model, or ``None`` without hardware.

        Raises
        ------
        UsageError
            If there is hardware, but no size of an expert.
        """
        return cost_model(
            self.hardware,
            self.expert,
            self.served.dispatch,
            self.served.combine,
            self.topology.num_nodes,
        )


def filling_reason(question: Question, model: ModelSpec) -> str | None:
    """Say that all placements have redundant experts, where only these fill the ranks."""
    more, num_ranks = question.redundant_experts, question.topology.num_ranks
    if not more:
        return None
    sizes = " and ".join(str(one) for one in dict.fromkeys(model.num_experts))
    return (
        f"{sizes} experts do not divide over {num_ranks} ranks: every placement, "
        f"contiguous and EPLB's too, has {more} redundant expert{'s' * (more > 1)}"
    )


def loadable(
    questions: Sequence[Question], model: ModelSpec
) -> tuple[list[Question], list[str]]:
    """Complete questions by the model; leave out engines that could load no plan.

    There are the fewest redundant experts that fill the ranks. The second value says which
    engines are left out, and why.

    Raises
    ------
    UsageError
        If no engine is left: as :func:`require_loadable` does.
    """
    topology, sizes = questions[0].topology, model.num_experts
    # Where none fill the ranks, solving says so.
    more = next(redundant_experts_that_fit(sizes, topology.num_ranks), 0)
    kept, refused = [], []
    for one in questions:
        try:
            if (engine := one.known_engine) is not None:
                require_loadable(engine, model, redundant_experts=more, topology=topology)
        except UsageError as error:
            refused.append(error)
            continue
        kept.append(replace(one, redundant_experts=more, layer_ids=model.layer_ids))
    if not kept:
        raise refused[0]
    return kept, [f"left out: {error}" for error in refused]
