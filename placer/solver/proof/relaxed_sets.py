"""The sets among which the relaxation splits its weights: cones, rows and squares of loads.

Each projects onto itself, prices what it pulls, and bounds what its price keeps together.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from placer.arrays import FloatArray
from placer.solver.proof.grouping import Block, GroupingProblem

_EPSILON = float(np.finfo(np.float64).eps)
_OVER_RELAXATION = 1.6
_FINE = 2.0**20  # prices are multiples of one part of a unit in so many
_MOST_PRICE = 2.0**30  # units; larger prices would not add up exactly


def upwards(value: float) -> float:
    """Return the next float64 above a value."""
    return math.nextafter(value, math.inf)


def rounded(price: FloatArray) -> FloatArray:
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


class Cone:
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
        paid = rounded(-price * (self.price + self.price.T) / 2)
        for block, rows, columns in self._blocks():
            rest[block][...] -= paid[rows, columns] * (1 if rows == columns else 2)
        num_others = self._num_groups - 1
        spread = _largest_eigenvalues(self._centre(paid.copy()), num_others)
        # Rounding of the means: |N| is at most slots * sqrt(G - 1).
        size = len(paid)
        rounding = 16 * _EPSILON * size * (size + 4) * float(abs(paid).max())
        spread += rounding * math.sqrt(num_others)
        even = upwards(math.fsum(paid.ravel()) / self._num_groups)
        return upwards(even + upwards(self._slots * spread))


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


class LoadRows:
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
        each = rounded(-price * (self.price @ self._load) / (self._load @ self._load))
        paid = np.outer(each, self._load)
        if not (abs(paid) < _MOST_PRICE).all():
            raise OverflowError("the prices of the relaxation diverged")
        rest[self._block][...] -= paid.T if self._transposed else paid
        least, most = self._between
        return upwards(
            math.fsum(np.nextafter(np.maximum(each * least, each * most), np.inf))
        )


class LoadSquares:
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
