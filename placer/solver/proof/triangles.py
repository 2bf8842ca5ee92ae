"""Sharing a group is transitive: triangle inequalities on top of the relaxation.

For any three experts z_ij + z_jk - z_ik <= 1, and on two groups two of the three must
share one: z_ij + z_jk + z_ik >= 1 (Groetschel and Wakabayashi 1990; Chopra and Rao 1993,
as cuts of equipartition programs: Mitchell 2003). Every inequality has a price of at least
zero; prices rise with its violation at the relaxed z (dual ascent). What they are worth is
a constant, and what they cost moves the weights of the pairs, so any prices certify.

All triples of a layer are priced, and those of two neighbouring layers, as long as they
are few enough to be held.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from placer.arrays import Float32Array, FloatArray
from placer.solver.proof.grouping import Block, GroupingProblem
from placer.solver.proof.relaxation import Relaxation

_MOST_TRIPLES = 60_000_000  # prices of four bytes each
# Of the mean weight, per unit of violation; two groups have more binding inequalities.
_STEP = 0.06
_STEP_OF_TWO = 0.015
_SETTLING_MOVES = 100
# Prices are rounded to multiples of this part of the heaviest weight: their sums are exact.
_PRICE_BITS = 20

# Signs of the pairs (i, j), (j, k) and (i, k), and the right-hand side.
_TRANSITIVE = ((1, 1, -1), 1)
_TWO_OF_THREE = ((-1, -1, -1), -1)


@dataclass(slots=True, kw_only=True, eq=False)
class _Triples:
    """One kind of inequality for all experts i, j, k of three layers.

    Attributes
    ----------
    layers
        The layers of i, j and k.
    signs, most
        Of the three pairs, and the right-hand side.
    price
        ``[E_i, E_j, E_k]`` float32, none negative.
    """

    layers: tuple[int, int, int]
    signs: tuple[int, int, int]
    most: int
    price: Float32Array

    def move(self, relaxed: Relaxation, step: float) -> None:
        """Raise the prices of what is violated, lower those of what is slack.

        With z_ii = 1, a triple that holds an expert twice is never violated.
        """
        i, j, k = self.layers
        one, two, three = self.signs
        excess = one * _held(relaxed, i, j)[:, :, None] + two * _held(relaxed, j, k)
        excess += three * _held(relaxed, i, k)[:, None, :]
        excess -= np.float32(self.most)
        self.price += np.float32(step) * excess
        np.maximum(self.price, 0, out=self.price)

    def pay(self, weight: Mapping[Block, FloatArray], unit: float) -> float:
        """Move ``weight`` by the prices, in units, and return what they are worth."""
        price = np.rint(self.price / np.float32(unit)) * np.float32(unit)
        i, j, k = self.layers
        for sign, (row, column), axis in zip(
            self.signs, ((i, j), (j, k), (i, k)), (2, 0, 1), strict=True
        ):
            paid = sign * price.sum(axis=axis, dtype=np.float64)
            if row == column:
                weight[row, column][...] -= paid + paid.T
            elif row < column:
                weight[row, column][...] -= paid
            else:
                weight[column, row][...] -= paid.T
        return self.most * float(price.sum(dtype=np.float64))


def _held(relaxed: Relaxation, row: int, column: int) -> Float32Array:
    block = relaxed.shared((min(row, column), max(row, column))).astype(np.float32)
    return block if row <= column else block.T


class Triangles:
    """Prices of the triangle inequalities of a grouping problem.

    Parameters
    ----------
    problem
        Its weights must be whole numbers.
    """

    def __init__(self, problem: GroupingProblem) -> None:
        self._weight = problem.weight
        sizes = [len(load) for load in problem.load]
        heaviest = max(float(abs(one).max(initial=0)) for one in self._weight.values())
        self._unit = 2.0 ** (math.frexp(heaviest)[1] - _PRICE_BITS)
        entries = sum(one.size for one in self._weight.values())
        mean = sum(float(abs(one).sum()) for one in self._weight.values()) / entries
        self._step = (_STEP if problem.num_groups > 2 else _STEP_OF_TWO) * mean
        self._num_moves = 0
        self._triples: list[_Triples] = []
        left = _MOST_TRIPLES
        for layers, (signs, most) in _kinds(self._weight, problem.num_groups):
            shape = [sizes[layer] for layer in layers]
            left -= math.prod(shape)
            if left < 0:
                break
            self._triples.append(
                _Triples(
                    layers=layers,
                    signs=signs,
                    most=most,
                    price=np.zeros(shape, dtype=np.float32),
                )
            )

    def move(self, relaxed: Relaxation) -> None:
        """Take one step of all prices at the relaxed z."""
        step = self._step / (1 + self._num_moves / _SETTLING_MOVES)
        self._num_moves += 1
        for triples in self._triples:
            triples.move(relaxed, step)

    def priced(self) -> tuple[float, dict[Block, FloatArray]]:
        """Return c and weights: any placement keeps at most c more than of these weights.

        Raises
        ------
        OverflowError
            If the prices are too large to add up exactly.
        """
        weight = {block: one.copy() for block, one in self._weight.items()}
        worth = [triples.pay(weight, self._unit) for triples in self._triples]
        if sum(abs(one) for one in worth) >= 2.0**52 * self._unit:
            raise OverflowError("the prices of the triangles diverged")
        return sum(worth), weight


def _kinds(
    blocks: Mapping[Block, FloatArray], num_groups: int
) -> list[tuple[tuple[int, int, int], tuple[tuple[int, int, int], int]]]:
    """Return layers and kinds of all inequalities, those inside layers first."""
    inside = [layer for layer, next_layer in blocks if layer == next_layer]
    linked = [block for block in blocks if block[0] != block[1]]
    kinds = [((layer, layer, layer), _TRANSITIVE) for layer in inside]
    if num_groups == 2:
        kinds += [((layer, layer, layer), _TWO_OF_THREE) for layer in inside]
    for one, two in linked:
        for near, far in ((one, two), (two, one)):
            kinds.append(((near, near, far), _TRANSITIVE))
            kinds.append(((near, far, near), _TRANSITIVE))
            if num_groups == 2:
                kinds.append(((near, near, far), _TWO_OF_THREE))
    return kinds
