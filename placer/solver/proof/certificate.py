"""The certificate of the pair objective: the best of all valid lower bounds.

What placements keep on one rank is bounded by the semidefinite relaxation of all layers
together (``relaxation``), tightened by triangle inequalities (``triangles``), and by
b-matchings of each two layers (``bounds``). With nodes,

    cost = intra_cost [ranks differ] + (inter_cost - intra_cost) [nodes differ],

so the bound is joined from that of splits into ranks and that of splits into nodes; of a
matrix of costs the least inside a node and the least between nodes count. Load caps of
ranks hold for nodes too, times their ranks. Pins only take placements away; replicas would
break the bounds.
"""

import math

from placer.arrays import FloatArray
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.proof.bounds import METHOD as MATCHING_METHOD
from placer.solver.proof.bounds import pair_bound
from placer.solver.proof.grouping import Block, GroupingProblem
from placer.solver.proof.relaxation import Relaxation
from placer.solver.proof.triangles import Triangles

METHOD = "semidefinite relaxation of neighbouring layers with triangle inequalities"
NUM_STEPS = 300
_FIRST_STEPS = 60  # before triangles
_STEPS_PER_MOVE = 4
# Eigenvalues differ between machines in their last bits; proved digits do not.
_STABLE_BITS = 20


class PairCertificate:
    """A proved lower bound of ``problem.objective`` that can be improved at any time.

    Parameters
    ----------
    problem
        A problem that some placement solves: its load caps can be met.

    Attributes
    ----------
    bound
        The best bound so far, a whole number.
    method
        How it was proved.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self.bound = pair_bound(problem)
        self.method = MATCHING_METHOD
        self._total = _total_weight(problem)
        topology = problem.topology
        inside, across = topology.least_costs()
        costs = {topology.num_ranks: inside}
        if across > inside:
            costs[topology.num_nodes] = across - inside
        self._groupings = [
            (cost, _Grouping(_grouping_problem(problem, num_groups)))
            for num_groups, cost in costs.items()
            if num_groups > 1 and cost > 0
        ]

    def improve(self, num_steps: int = NUM_STEPS) -> float:
        """Take steps of the relaxation and return the best bound so far.

        The same steps give the same bound on any machine, up to a bit in a million.
        """
        try:
            found = math.fsum(
                cost * (self._total - grouping.improve(num_steps))
                for cost, grouping in self._groupings
            )
        except OverflowError:  # prices far from balance prove nothing
            return self.bound
        bound = float(math.ceil(stable_floor(found)))  # objectives are whole numbers
        if bound > self.bound:
            self.bound, self.method = bound, METHOD
        return self.bound


class _Grouping:
    """The relaxation of one split into groups, with its triangles."""

    def __init__(self, problem: GroupingProblem) -> None:
        self._relaxed = Relaxation(problem)
        self._triangles = Triangles(problem)
        self._num_steps = 0

    def improve(self, num_steps: int) -> float:
        """Take steps and return a proved bound of the weight that stays together."""
        worth, weight = self._triangles.priced()
        for _ in range(num_steps):
            self._relaxed.run(1)
            self._num_steps += 1
            if self._num_steps > _FIRST_STEPS and self._num_steps % _STEPS_PER_MOVE == 0:
                self._triangles.move(self._relaxed)
                worth, weight = self._triangles.priced()
                self._relaxed.reweight(weight)
        return worth + self._relaxed.upper_bound()


def stable_floor(value: float, num_bits: int = _STABLE_BITS) -> float:
    """Round down to this many leading bits, which every machine computes alike."""
    step = 2.0 ** (math.frexp(value)[1] - num_bits)
    return math.floor(value / step) * step


def _total_weight(problem: PlacementProblem) -> float:
    within = sum(float(one.sum()) for one in problem.within) / 2
    return within + sum(float(one.sum()) for one in problem.between or ())


def _grouping_problem(problem: PlacementProblem, num_groups: int) -> GroupingProblem:
    """Return the split into ranks or nodes that the pair objective asks for."""
    weight: dict[Block, FloatArray] = {
        (layer, layer): one for layer, one in enumerate(problem.within)
    }
    for layer, one in enumerate(problem.between or ()):
        weight[layer, layer + 1] = one
    ranks = problem.num_ranks // num_groups
    return GroupingProblem(
        num_groups=num_groups,
        weight=weight,
        load=problem.load,
        max_load=[ranks * cap for cap in problem.max_load],
    )
