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

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import FloatArray
from placer.solver.proof.bounds import heaviest_b_matching

Block = tuple[int, int]

_EPSILON = float(np.finfo(np.float64).eps)
_OVER_RELAXATION = 1.6
_STEPS_PER_PENALTY = 20
_PRICE_BITS = 24  # of the heaviest weight, in units
_FINE = 2.0**20  # prices are multiples of one part of a unit in so many
_MOST_PRICE = 2.0**30  # units; larger prices would not add up exactly


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupingProblem:
    """Split the experts of every layer into equal groups and keep weight together.

    Attributes
    ----------
    num_groups
        G: ranks, or nodes.
    weight
        By layers (l, m), l <= m, m at most l + 1: ``[E_l, E_m]`` float64, the value of
        two experts in one group. Every layer has its own block (l, l), symmetric; there
        each unordered pair counts once.
    load
        L arrays ``[E]`` of whole numbers.
    max_load
        ``[L]``: most load of a group; some placement meets it.
    """

    num_groups: int
    weight: Mapping[Block, FloatArray]
    load: Sequence[FloatArray]
    max_load: Sequence[float]

    def slots(self, layer: int) -> int:
        """Experts that each group holds in a layer."""
        return len(self.load[layer]) // self.num_groups

    def load_range(self, layer: int) -> tuple[float, float] | None:
        """Return the least and most load of a group, or ``None`` if nothing is capped."""
        load, cap = np.sort(self.load[layer]), self.max_load[layer]
        slots = self.slots(layer)
        if load[-slots:].sum() <= cap:
            return None
        left = float(load.sum()) - (self.num_groups - 1) * cap
        return max(left, float(load[:slots].sum())), cap

    def most_squares(self, layer: int) -> float | None:
        """Return the most that squared loads of groups add up to, ``None`` if uncapped.

        A convex sum is largest with all but one of the loads at an end of their range.
        """
        between = self.load_range(layer)
        if between is None:
            return None
        least, cap = between
        spare = float(self.load[layer].sum()) - self.num_groups * least
        full = int(spare // (cap - least)) if cap > least else 0
        one = least + spare - full * (cap - least)
        others = self.num_groups - full - 1
        return full * cap**2 + (one**2 + others * least**2 if others >= 0 else 0.0)

    def may_share(self, layer: int) -> FloatArray:
        """Return ``[E, E]``: 0 where two experts cannot share a group, else 1.

        Two experts cannot if they overload it even with the lightest companions.
        """
        load, slots = self.load[layer], self.slots(layer)
        may = np.ones((len(load), len(load)))
        if slots == 1:
            may[:] = 0.0
        elif self.load_range(layer) is not None:
            lightest = np.sort(load)[: slots - 2].sum()
            may[load[:, None] + load + lightest > self.max_load[layer]] = 0.0
        np.fill_diagonal(may, 1.0)
        return may


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
        self._copies: list[_Cone | _LoadRows | _LoadSquares] = [
            _Cone.of(layers, sizes, problem.num_groups) for layers in self._cliques()
        ]
        for block in self._shared:
            self._copies += _LoadRows.of_block(block, problem)
            if block[0] == block[1]:
                self._copies += _LoadSquares.of_layer(block[0], problem)
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
        return _upwards(_upwards(math.fsum(bounds)) * unit)

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
            return _upwards(kept / 2 + math.fsum(np.diagonal(rest)))
        return kept


def _upwards(value: float) -> float:
    return math.nextafter(value, math.inf)


def _rounded(price: FloatArray) -> FloatArray:
    """Round prices so that sums and products with loads are exact.

    Raises
    ------
    OverflowError
        If a price is too large for that; the weights are then far from balanced.
    """
    if not (abs(price) < _MOST_PRICE).all():
        raise OverflowError("the prices of the relaxation diverged")
    rounded: FloatArray = np.rint(price * _FINE) / _FINE
    return rounded


class _Cone:
    """Layers whose shared matrix has the eigenvalues of a split into groups.

    Attributes
    ----------
    price
        ``[N, N]``: scaled multipliers; N experts of all the layers.
    """

    def __init__(
        self, layers: tuple[int, ...], offsets: Sequence[int], num_groups: int
    ) -> None:
        size = offsets[-1]
        ends = [slice(one, two) for one, two in itertools.pairwise(offsets)]
        self._at = dict(zip(layers, ends, strict=True))
        self._num_groups = num_groups
        self._slots = size // num_groups
        self.price = np.zeros((size, size))
        self._copy = np.zeros((size, size))

    @classmethod
    def of(cls, layers: tuple[int, ...], sizes: Sequence[int], num_groups: int) -> Self:
        """Build the cone of layers of these sizes."""
        offsets = list(itertools.accumulate((sizes[n] for n in layers), initial=0))
        return cls(layers, offsets, num_groups)

    def _blocks(self) -> list[tuple[Block, slice, slice]]:
        at = self._at
        return [((one, two), at[one], at[two]) for one in at for two in at if one <= two]

    def _gather(self, shared: Mapping[Block, FloatArray]) -> FloatArray:
        whole = np.empty_like(self.price)
        for block, rows, columns in self._blocks():
            whole[columns, rows] = shared[block].T
            whole[rows, columns] = shared[block]
        return whole

    def _centre(self, matrix: FloatArray) -> FloatArray:
        """Take the mean off every row and column of every block, in place."""
        for rows in self._at.values():
            matrix[rows] -= matrix[rows].mean(axis=0)
        for columns in self._at.values():
            matrix[:, columns] -= matrix[:, columns].mean(axis=1, keepdims=True)
        return matrix

    def project(self, shared: Mapping[Block, FloatArray]) -> float:
        """Move the copy to the nearest allowed matrix; return how far it is, squared."""
        held = self._gather(shared)
        values, vectors = np.linalg.eigh(self._centre(held - self.price))
        kept = _nearest_spectrum(values, self._slots, self._num_groups - 1)
        used = kept > 0
        nearest = (vectors[:, used] * kept[used]) @ vectors[:, used].T
        nearest += 1 / self._num_groups
        apart = nearest - held
        self._copy = held + _OVER_RELAXATION * apart
        return float((apart**2).sum())

    def add_pull(self, pull: dict[Block, FloatArray], count: dict[Block, float]) -> None:
        """Add where this copy wants the shared blocks, and its weight."""
        wanted = self._copy + self.price
        for block, rows, columns in self._blocks():
            pull[block] += wanted[rows, columns]
            count[block] += 1.0

    def settle(self, shared: Mapping[Block, FloatArray]) -> None:
        """Raise the price of the difference that is left."""
        self.price += self._copy - self._gather(shared)

    def bound(self, price: float, rest: Mapping[Block, FloatArray]) -> float:
        """Take this cone's prices off ``rest`` and bound what they are worth."""
        paid = _rounded(-price * (self.price + self.price.T) / 2)
        for block, rows, columns in self._blocks():
            rest[block][...] -= paid[rows, columns] * (1 if rows == columns else 2)
        num_others = self._num_groups - 1
        spread = _largest_eigenvalues(self._centre(paid.copy()), num_others)
        # Rounding of the means: |N| is at most slots * sqrt(G - 1).
        size = len(paid)
        rounding = 16 * _EPSILON * size * (size + 4) * float(abs(paid).max())
        spread += rounding * math.sqrt(num_others)
        even = _upwards(math.fsum(paid.ravel()) / self._num_groups)
        return _upwards(even + _upwards(self._slots * spread))


def _nearest_spectrum(values: FloatArray, most: float, number: int) -> FloatArray:
    """Return the nearest values between 0 and ``most`` whose sum is ``number * most``."""
    breaks = np.sort(np.r_[values, values - most])
    sums = np.clip(values - breaks[:, None], 0.0, most).sum(axis=1)  # descending
    right = min(int(np.searchsorted(-sums, -number * most)), len(breaks) - 1)
    left = max(right - 1, 0)
    drop = sums[left] - sums[right]
    part = (sums[left] - number * most) / drop if drop > 0 else 0.0
    shift = breaks[left] + part * (breaks[right] - breaks[left])
    nearest: FloatArray = np.clip(values - shift, 0.0, most)
    return nearest


def _largest_eigenvalues(matrix: FloatArray, number: int) -> float:
    """Bound the sum of the largest eigenvalues of a symmetric matrix from above.

    With any U near to orthogonal, U^T M U has eigenvalues of M times factors of at most
    1 + |U^T U - 1| (Ostrowski), within the residual of those computed (Weyl). The last
    terms cover the rounding of the residuals themselves.
    """
    if number == 0:
        return 0.0
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    size, norm = len(matrix), float(np.linalg.norm(matrix))
    residual = float(np.linalg.norm(vectors.T @ matrix @ vectors - np.diag(values)))
    residual += 8 * size**2 * _EPSILON * norm
    skew = float(np.linalg.norm(vectors.T @ vectors - np.eye(size)))
    skew = 2 * skew + 8 * size**2 * _EPSILON
    largest = values[-number:]
    margin = number * residual + 2 * skew * (float(abs(largest).sum()) + number * residual)
    return float(largest.sum()) + margin


class _LoadRows:
    """The load of one layer on the group of each expert of another (or the same) layer.

    Attributes
    ----------
    price
        ``[E_l, E_m]``: scaled multipliers.
    """

    def __init__(
        self, rows: int, columns: int, load: FloatArray, between: tuple[float, float]
    ) -> None:
        self._block = (min(rows, columns), max(rows, columns))
        self._transposed = rows > columns
        # The two directions of a block between layers count as one copy.
        self._share = 1.0 if rows == columns else 0.5
        self._load, self._between = load, between
        self.price = np.zeros((0, 0))
        self._copy = np.zeros((0, 0))

    @classmethod
    def of_block(cls, block: Block, problem: GroupingProblem) -> list[Self]:
        """Build the rows of a block, in both directions, where a load cap binds."""
        built = []
        for rows, columns in dict.fromkeys((block, block[::-1])):
            between = problem.load_range(columns)
            if between is not None:
                one = cls(rows, columns, problem.load[columns], between)
                one.price = np.zeros((len(problem.load[rows]), len(problem.load[columns])))
                built.append(one)
        return built

    def _held(self, shared: Mapping[Block, FloatArray]) -> FloatArray:
        held = shared[self._block]
        return held.T if self._transposed else held

    def project(self, shared: Mapping[Block, FloatArray]) -> float:
        """Move the copy to the nearest allowed matrix; return how far it is, squared."""
        held = self._held(shared)
        wanted = held - self.price
        carried = wanted @ self._load
        excess = carried - np.clip(carried, *self._between)
        nearest = wanted - np.outer(excess / (self._load @ self._load), self._load)
        apart = nearest - held
        self._copy = held + _OVER_RELAXATION * apart
        return float((apart**2).sum())

    def add_pull(self, pull: dict[Block, FloatArray], count: dict[Block, float]) -> None:
        """Add where this copy wants the shared block, and its weight."""
        wanted = self._copy + self.price
        if self._block[0] == self._block[1]:
            wanted = (wanted + wanted.T) / 2
        pull[self._block] += self._share * (wanted.T if self._transposed else wanted)
        count[self._block] += self._share

    def settle(self, shared: Mapping[Block, FloatArray]) -> None:
        """Raise the price of the difference that is left."""
        self.price += self._copy - self._held(shared)

    def bound(self, price: float, rest: Mapping[Block, FloatArray]) -> float:
        """Take these rows' prices off ``rest`` and bound what they are worth."""
        each = _rounded(-price * (self.price @ self._load) / (self._load @ self._load))
        paid = np.outer(each, self._load)
        if not (abs(paid) < _MOST_PRICE).all():
            raise OverflowError("the prices of the relaxation diverged")
        rest[self._block][...] -= paid.T if self._transposed else paid
        least, most = self._between
        return _upwards(
            math.fsum(np.nextafter(np.maximum(each * least, each * most), np.inf))
        )


class _LoadSquares:
    """The sum of the squared loads of the groups of one layer.

    Attributes
    ----------
    price
        ``[E, E]``: scaled multipliers.
    """

    def __init__(self, layer: int, load: FloatArray, most: float) -> None:
        self._block = (layer, layer)
        self._products = np.outer(load, load)
        self._norm = float((self._products**2).sum())
        self._most = most
        self.price = np.zeros_like(self._products)
        self._copy = np.zeros_like(self._products)

    @classmethod
    def of_layer(cls, layer: int, problem: GroupingProblem) -> list[Self]:
        """Build the sum of a layer where its load cap binds."""
        most = problem.most_squares(layer)
        return [] if most is None else [cls(layer, problem.load[layer], most)]

    def project(self, shared: Mapping[Block, FloatArray]) -> float:
        """Move the copy to the nearest allowed matrix; return how far it is, squared."""
        wanted = shared[self._block] - self.price
        excess = max(0.0, float((wanted * self._products).sum()) - self._most)
        apart = wanted - excess / self._norm * self._products - shared[self._block]
        self._copy = shared[self._block] + _OVER_RELAXATION * apart
        return float((apart**2).sum())

    def add_pull(self, pull: dict[Block, FloatArray], count: dict[Block, float]) -> None:
        """Add where this copy wants the shared block, and its weight."""
        pull[self._block] += self._copy + self.price
        count[self._block] += 1.0

    def settle(self, shared: Mapping[Block, FloatArray]) -> None:
        """Raise the price of the difference that is left."""
        self.price += self._copy - shared[self._block]

    def bound(self, price: float, rest: Mapping[Block, FloatArray]) -> float:
        """Take this sum's price off ``rest`` and bound what it is worth."""
        each = max(0.0, -price * float((self.price * self._products).sum()) / self._norm)
        # Rounded down, also for products that are: no z is negative.
        paid = np.floor(each * self._products * (1 - 4 * _EPSILON) * _FINE) / _FINE
        if not (paid < _MOST_PRICE).all():
            raise OverflowError("the prices of the relaxation diverged")
        rest[self._block][...] -= paid
        return each * self._most * (1 + 16 * _EPSILON)
