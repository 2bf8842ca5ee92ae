"""What a baseline may see."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placer.affinity import Affinity, count_affinity
from placer.affinity.count import expert_load
from placer.arrays import AnyArray
from placer.errors import UsageError
from placer.placement.placement import require_divisible_slots
from placer.placement.topology import Topology
from placer.trace import EVERYTHING, Chunk, Selection, Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class BaselineProblem:
    """A profile and a topology; counts are made when a baseline first asks for them.

    Attributes
    ----------
    trace, selection
        The profile: tokens of the trace.
    topology
        Ranks and nodes.
    redundant_experts
        Slots per layer beyond one for each expert; only ``eplb`` fills them.
    seed
        Seed of the random draws.
    solver_seconds
        Time of CP-SAT for all programs of a baseline together, in its deterministic
        seconds, so that the placement does not depend on the machine.

    Raises
    ------
    UsageError
        If the slots of a layer do not divide over the ranks, or a number is negative.
    """

    trace: Trace
    selection: Selection = EVERYTHING
    topology: Topology
    redundant_experts: int = 0
    seed: int = 0
    solver_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, number in {
            "redundant_experts": self.redundant_experts,
            "seed": self.seed,
            "solver_seconds": self.solver_seconds,
        }.items():
            if number < 0:
                raise UsageError(f"{name} must not be negative, got {number}")
        self._require_slots(self.redundant_experts)

    def require_no_replicas(self) -> None:
        """Refuse a problem whose experts fit on the ranks only with redundant experts.

        Raises
        ------
        UsageError
            If the experts of a layer do not divide over the ranks.
        """
        self._require_slots(0)

    def _require_slots(self, more: int) -> None:
        for layer, size in enumerate(self.num_experts):
            require_divisible_slots(size + more, self.num_ranks, layer)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """``[L]``: logical experts per layer."""
        return self.trace.model.num_experts

    @property
    def num_ranks(self) -> int:
        """Number of ranks, R."""
        return self.topology.num_ranks

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.topology.num_nodes

    @cached_property
    def load(self) -> list[AnyArray]:
        """L arrays ``[E]`` int64: pairs per expert."""
        return expert_load(self.trace, self.selection)

    @cached_property
    def affinity(self) -> Affinity:
        """Transitions and co-activation of the profile."""
        chunks = self.trace.chunks(self.selection)
        return count_affinity(chunks, self.trace.model, {})

    @cached_property
    def tokens(self) -> Chunk:
        """All tokens of the profile."""
        return self.trace.read(self.selection)

    def rng(self, layer: int) -> np.random.Generator:
        """Return the random numbers of a layer, the same at every call."""
        return np.random.default_rng((self.seed, layer))
