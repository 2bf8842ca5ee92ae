"""Columns: all sets of experts that one rank may hold, and what they cost.

Without replicas a layer's ranks split its experts into R sets of C = E/R. A set costs the
tokens that use any of its experts, so the copies of a layer are a sum over its ranks:

    minimise  sum over sets G of cost(G) x_G
    where     every expert is in one chosen set, x_G is 0 or 1

which is a set partition (Balas and Padberg 1976). A load cap, a cap on received copies,
pins and router groups say which sets there are.

Legend of the shapes: E logical experts, C experts of a rank, K columns, N distinct rows of
experts, k experts per token, R ranks, S cuts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from placer.arrays import BoolArray, Int16Array, IntArray
from placer.solver.kernels.columns import fill_columns, fill_reduced_costs

#: Prices are whole numbers of this part of a copy: every sum of them is exact.
SCALE = 1 << 12
_WORD = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Limits:
    """Which sets of experts a rank may hold.

    Attributes
    ----------
    least_load, most_load
        Pairs that a rank serves; the least is what others leave when they serve the most.
    most_cost
        Tokens that may use a rank, the cap on received copies.
    together
        Sets of experts of which a rank holds all or none: pins to one rank, router groups.
    apart
        ``[E]`` int64 labels: a rank holds no two experts of different labels, those of -1
        left out.
    """

    least_load: int
    most_load: int
    most_cost: int
    together: tuple[tuple[int, ...], ...] = ()
    apart: IntArray | None = None

    def allowed(self, experts: Int16Array, num_experts: int) -> BoolArray:
        """Return ``[K]``: which of ``[K, C]`` sets pins and router groups allow."""
        good = np.ones(len(experts), dtype=np.bool_)
        for group in self.together:
            inside = np.zeros(num_experts, dtype=np.int64)
            inside[list(group)] = 1
            number = inside[experts].sum(axis=1)
            good &= (number == 0) | (number == min(len(group), experts.shape[1]))
        if self.apart is not None:
            label = self.apart[experts]
            most = label.max(axis=1)
            least = np.where(label < 0, most[:, None], label).min(axis=1)
            good &= most == least
        return good


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DualPrices:
    """Dual prices of a layer's experts and cuts, in parts of ``SCALE`` of a copy.

    A cut says of three experts that at most one chosen set has two of them (subset-row
    inequalities: Jepsen, Petersen, Spoorendonk and Pisinger 2008). Any prices prove

        SCALE x cost >= sum of prices + R x the least reduced cost of a column

    as R columns are chosen, and prices of cuts are not above 0.

    Attributes
    ----------
    experts
        ``[E]`` int64.
    cuts, cut_prices
        ``[S, 3]`` experts and ``[S]`` int64, none above 0.
    """

    experts: IntArray
    cuts: IntArray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    cut_prices: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def total(self) -> int:
        """The sum of all prices."""
        return int(self.experts.sum()) + int(self.cut_prices.sum())

    def members(self) -> npt.NDArray[np.uint64]:
        """Return ``[E, W]``: a bit for each cut that an expert is part of."""
        words = -(-len(self.cuts) // _WORD)
        found = np.zeros((len(self.experts), words), dtype=np.uint64)
        for number, cut in enumerate(self.cuts):
            found[cut, number // _WORD] |= np.uint64(1 << number % _WORD)
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """All sets of experts that a rank of a layer may hold.

    Attributes
    ----------
    experts
        ``[K, C]`` int16, ascending.
    cost
        ``[K]`` int64: tokens that use any expert of the set.
    num_experts
        E.
    limits
        Which sets are allowed.
    """

    experts: Int16Array
    cost: IntArray
    num_experts: int
    limits: Limits

    def reduced_costs(self, prices: DualPrices) -> IntArray:
        """Return ``[K]``: SCALE x cost, less the prices of what a column holds."""
        reduced = np.empty(len(self.cost), dtype=np.int64)
        fill_reduced_costs(
            self.experts,
            self.cost,
            SCALE,
            prices.experts,
            prices.members(),
            prices.cut_prices,
            reduced,
        )
        return reduced


def num_columns(num_experts: int, size: int) -> int:
    """Return how many sets of ``size`` experts there are."""
    return math.comb(num_experts, size)


def all_columns(
    rows: IntArray, weight: IntArray, load: IntArray, size: int, limits: Limits
) -> Columns:
    """Return all sets of ``size`` experts within the limits.

    Parameters
    ----------
    rows, weight
        ``[N, k]`` int64 experts of the distinct tokens, and ``[N]`` how many each stands
        for.
    load
        ``[E]`` int64 pairs of each expert.
    size
        Experts of a rank, C.
    limits
        Which sets are allowed.
    """
    num_experts = len(load)
    room = num_columns(num_experts, size)
    experts = np.zeros((room, size), dtype=np.int16)
    cost = np.zeros(room, dtype=np.int64)
    number = fill_columns(
        rows,
        weight,
        load,
        limits.least_load,
        limits.most_load,
        limits.most_cost,
        experts,
        cost,
    )
    experts, cost = experts[:number], cost[:number]
    good = limits.allowed(experts, num_experts)
    if not good.all():
        experts, cost = experts[good], cost[good]
    return Columns(experts=experts, cost=cost, num_experts=num_experts, limits=limits)


def cost_of_sets(rows: IntArray, weight: IntArray, sets: Sequence[IntArray]) -> IntArray:
    """Return the cost of each of some sets of experts."""
    size = int(rows.max()) + 1
    found = []
    for one in sets:
        inside = np.zeros(max(size, int(max(one)) + 1), dtype=np.bool_)
        inside[one] = True
        found.append(int(weight[inside[rows].any(axis=1)].sum()))
    return np.array(found, dtype=np.int64)
