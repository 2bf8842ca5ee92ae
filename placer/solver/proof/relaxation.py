"""Semidefinite relaxation of the pairs of experts that share a group.

A placement of a few layers on G equal groups is a matrix z of zeros and ones: z_ij = 1
where experts i and j share their group. With the experts of several layers together, its
part N = z - 1/G has rows that sum to zero in every layer and, as z is a sum over groups
of x x^T, exactly G - 1 eigenvalues that are not zero, each the number of slots of a group.
So for any symmetric Y

    <Y, z> <= sum(Y) / G + slots * (sum of the G - 1 largest eigenvalues of H Y H),

H being the projection on rows that sum to zero in every layer (Donath and Hoffman 1973;
Zhao, Karisch, Rendl and Wolkowicz 1998 for the semidefinite program). A load cap adds, for
every expert i and layer m (each product of a cap and an assignment, summed over groups),

    least <= sum over j of layer m of load_j z_ij <= cap,

and for every layer the most that the squares of the groups' loads can add up to,

    sum over i, j of load_i load_j z_ij <= most squares.

Weights are split among these sets and the b-matchings of each two layers; every split
gives a valid upper bound of what any placement keeps together, the best split the bound of
the relaxation. The alternating direction method of multipliers (Wen, Goldfarb and Yin 2010)
approaches it, so every stop certifies. Prices are rounded to multiples of a power of two,
which makes all sums exact; the eigenvalues are bounded with their residuals.
"""

import math
from collections.abc import Mapping

import numpy as np

from placer.arrays import FloatArray
from placer.solver.proof.bounds import heaviest_b_matching
from placer.solver.proof.grouping import Block, GroupingProblem
from placer.solver.proof.relaxed_sets import Cone, LoadRows, LoadSquares, upwards

_STEPS_PER_PENALTY = 20
_PRICE_BITS = 24  # of the heaviest weight, in units


class Relaxation:
    """The relaxation of a grouping problem, improved step by step.

    Parameters
    ----------
    problem
        What is relaxed.
    """

    def __init__(self, problem: GroupingProblem) -> None:
        self._problem = problem
        sizes = [len(load) for load in problem.load]
        self._shared: dict[Block, FloatArray] = {}
        self._most: dict[Block, FloatArray] = {}
        for layer, next_layer in problem.weight:
            shape = (sizes[layer], sizes[next_layer])
            shared = np.full(shape, 1 / problem.num_groups)
            if layer == next_layer:
                np.fill_diagonal(shared, 1.0)
            self._shared[layer, next_layer] = shared
            same = layer == next_layer
            self._most[layer, next_layer] = (
                problem.may_share(layer) if same else np.ones(shape)
            )
        self._copies: list[Cone | LoadRows | LoadSquares] = [
            Cone.of(layers, sizes, problem.num_groups) for layers in self._cliques()
        ]
        for block in self._shared:
            self._copies += LoadRows.of_block(block, problem)
            if block[0] == block[1]:
                self._copies += LoadSquares.of_layer(block[0], problem)
        self._penalty = 1.0
        self._num_steps = 0
        self._weight = dict(problem.weight)
        self._scale = 1.0
        self.reweight(problem.weight)

    def _cliques(self) -> list[tuple[int, ...]]:
        linked = [block for block in self._shared if block[0] != block[1]]
        inside = {layer for block in linked for layer in block}
        alone = [(layer,) for layer in range(len(self._problem.load))]
        return [*linked, *(one for one in alone if one[0] not in inside)]

    def reweight(self, weight: Mapping[Block, FloatArray]) -> None:
        """Go on from here with other weights of the same blocks."""
        before, self._weight = self._scale, dict(weight)
        squares = sum(float((one**2).sum()) for one in weight.values())
        entries = sum(one.size for one in weight.values())
        self._scale = math.sqrt(squares / entries) or 1.0
        self._reprice(before / self._scale)

    def _reprice(self, factor: float) -> None:
        for held in self._copies:
            held.price *= factor

    def shared(self, block: Block) -> FloatArray:
        """Return ``[E_l, E_m]``: the relaxed z of two layers, between 0 and 1."""
        return self._shared[block]

    def run(self, num_steps: int) -> None:
        """Take steps towards the bound of the relaxation."""
        for _ in range(num_steps):
            apart, moved = self._step()
            self._num_steps += 1
            if self._num_steps % _STEPS_PER_PENALTY == 0:
                self._balance(math.sqrt(apart), self._penalty * math.sqrt(moved))

    def _step(self) -> tuple[float, float]:
        """Return how far the copies are apart, and how far they moved, both squared."""
        # A block between layers stands twice in a symmetric matrix.
        pull = {
            block: one / (2 * self._scale * self._penalty)
            for block, one in self._weight.items()
        }
        count = dict.fromkeys(pull, 0.0)
        apart = 0.0
        for held in self._copies:
            apart += held.project(self._shared)
            held.add_pull(pull, count)
        moved = 0.0
        for block, total in pull.items():
            shared = np.clip(total / count[block], 0.0, self._most[block])
            if block[0] == block[1]:
                np.fill_diagonal(shared, 1.0)
            moved += float(((shared - self._shared[block]) ** 2).sum())
            self._shared[block] = shared
        for held in self._copies:
            held.settle(self._shared)
        return apart, moved

    def _balance(self, apart: float, moved: float) -> None:
        factor = 1.5 if apart > 5 * moved else 1 / 1.5 if moved > 5 * apart else 1.0
        self._penalty *= factor
        self._reprice(1 / factor)

    def upper_bound(self) -> float:
        """Return a proved bound of the weight that any placement keeps together."""
        heaviest = max(float(abs(one).max(initial=0)) for one in self._weight.values())
        if heaviest == 0:
            return 0.0
        unit = 2.0 ** (math.frexp(heaviest)[1] - _PRICE_BITS)
        # What is left of <rest, z> over ordered pairs, in units, exact.
        rest = {}
        for (layer, next_layer), one in self._weight.items():
            rest[layer, next_layer] = np.ceil(one / unit)
            if layer == next_layer:
                np.fill_diagonal(rest[layer, next_layer], 0.0)
                rest[layer, next_layer] /= 2
        price = self._penalty * self._scale / unit
        bounds = [held.bound(price, rest) for held in self._copies]
        bounds += [self._matching_bound(block, one) for block, one in rest.items()]
        return upwards(upwards(math.fsum(bounds)) * unit)

    def _matching_bound(self, block: Block, rest: FloatArray) -> float:
        """Bound what is left of a block by its heaviest b-matching."""
        layer, next_layer = block
        inside = layer == next_layer
        row_sum = self._problem.slots(next_layer) - inside
        column_sum = self._problem.slots(layer) - inside
        allowed = self._most[block] > 0
        if inside:
            allowed &= ~np.eye(len(rest), dtype=np.bool_)
        weight = np.ceil(rest + rest.T if inside else rest)
        least = float(weight.min())
        kept = heaviest_b_matching(
            np.where(allowed, weight - least, -1.0), row_sum, column_sum
        )
        kept += least * len(rest) * row_sum
        if inside:
            return upwards(kept / 2 + math.fsum(np.diagonal(rest)))
        return kept
