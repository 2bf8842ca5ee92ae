"""Evening out one layer: moves that lower the load of its busiest rank.

Legend of the shapes: E experts, R ranks, P slots.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray

# A smaller gain than this share is rounding.
_SAME = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoveCost:
    """The cost of leaving the placement that is served now.

    Attributes
    ----------
    start
        ``[E, R]``: whether a rank holds an expert now.
    price
        Pairs of the busiest rank that a move is worth.
    most_load
        Above this load of a rank, in pairs, moves cost nothing.
    """

    start: BoolArray
    price: float
    most_load: float


class EvenOut:
    """Exchanges experts of the busiest rank, or replicates them, while it pays.

    Parameters
    ----------
    row
        ``[P]``: the expert in each slot.
    load
        ``[E]``: pairs per expert.
    num_ranks
        R.
    served
        ``[E, R]``: the pairs that each rank serves of each expert; experts with several
        replicas then stay where they are. ``None``: replicas share the load evenly.
    move_cost
        What leaving a start costs, or ``None``.
    """

    def __init__(
        self,
        row: IntArray,
        load: FloatArray,
        num_ranks: int,
        served: FloatArray | None = None,
        move_cost: MoveCost | None = None,
    ) -> None:
        self.row = row.copy()
        self._load, self._served, self._cost = load, served, move_cost
        self._rank = np.arange(len(row)) // (len(row) // num_ranks)
        self._num_ranks = num_ranks
        self._count()

    @property
    def most_load(self) -> float:
        """Load of the busiest rank, in pairs."""
        return float(self._total.max())

    def run(self, enough: float = 0.0, floor: float = 0.0) -> Self:
        """Move while it pays and a rank is above ``floor``.

        Other replicas are made only while one is above ``enough``.
        """
        best, reached = self.row.copy(), self._value()
        while self.most_load > floor and (
            self._swap() or (self.most_load > enough and self._replicate())
        ):
            if (value := self._value()) < reached:
                best, reached = self.row.copy(), value
        self.row = best
        self._count()
        return self

    def _count(self) -> None:
        """Count what the slots hold."""
        size = len(self._load)
        self._num_replicas = np.bincount(self.row, minlength=size)
        self._holds = np.zeros((size, self._num_ranks), dtype=np.bool_)
        self._holds[self.row, self._rank] = True
        if self._served is None:
            self._weight = (self._load / np.maximum(self._num_replicas, 1))[self.row]
        else:
            alone = self._num_replicas[self.row] == 1
            served = self._served[self.row, self._rank]
            self._weight = np.where(alone, self._load[self.row], served)
        self._total = np.bincount(self._rank, self._weight, minlength=self._num_ranks)

    def _value(self) -> tuple[float, float]:
        """Return the load above what is asked for, and what is minimised below it."""
        cost, most = self._cost, self.most_load
        if cost is None:
            return 0.0, most
        moved = int((self._holds & ~cost.start).sum())
        return max(0.0, most - cost.most_load), most + cost.price * moved

    def _priced(self, after: FloatArray, moves: IntArray) -> FloatArray:
        """Add the price of ``moves``, unless the busiest rank must be relieved.

        Moves back to the start earn theirs, but only where they lower the busiest rank's
        load too: so every move does, and the search ends.
        """
        after = np.where(after < self.most_load * (1 - _SAME), after, np.inf)
        cost = self._cost
        if cost is None or self.most_load > cost.most_load:
            return after
        return after + cost.price * moves

    def _stays(self, experts: IntArray, ranks: IntArray) -> IntArray:
        """Return 1 where the start has an expert on a rank, else 0."""
        if self._cost is None:
            return np.zeros(np.broadcast_shapes(experts.shape, ranks.shape), dtype=np.int64)
        return self._cost.start[experts, ranks].astype(np.int64)

    def _swap(self) -> bool:
        """Swap a replica of the busiest rank for another's; return whether one pays."""
        busiest = int(self._total.argmax())
        free = np.ones(len(self.row), dtype=np.bool_)
        if self._served is not None:
            free = self._num_replicas[self.row] == 1
        mine = np.flatnonzero((self._rank == busiest) & free)
        others = np.flatnonzero((self._rank != busiest) & free)
        if not len(mine) or not len(others):
            return False
        given, taken, there = self.row[mine][:, None], self.row[others], self._rank[others]
        shed = self._weight[mine][:, None] - self._weight[others]
        after = np.maximum(self._total[busiest] - shed, self._total[there] + shed)
        here = np.array(busiest)
        after = self._priced(
            after,
            self._stays(given, here)
            - self._stays(given, there)
            + self._stays(taken, there)
            - self._stays(taken, here),
        )
        after[self._holds[given, there] | self._holds[taken, busiest]] = np.inf
        if after.min() >= self._total[busiest] * (1 - _SAME):
            return False
        one, two = divmod(int(after.argmin()), len(others))
        self.row[[mine[one], others[two]]] = self.row[[others[two], mine[one]]]
        self._count()
        return True

    def _replicate(self) -> bool:
        """Put one expert's replica in the place of another's; return whether one pays."""
        if self._served is not None:
            return False
        busiest = int(self._total.argmax())
        spare = np.flatnonzero(self._num_replicas[self.row] > 1)
        at_busiest = self._rank[spare] == busiest
        tried = (
            (self.row[self._rank == busiest], spare[~at_busiest]),
            (np.flatnonzero(~self._holds[:, busiest]), spare[at_busiest]),
        )
        found = [
            self._best_replica(experts, slots)
            for experts, slots in tried
            if len(experts) and len(slots)
        ]
        if not found:
            return False
        after, expert, slot = min(found)
        if after >= self._total[busiest] * (1 - _SAME):
            return False
        self.row[slot] = expert
        self._count()
        return True

    def _best_replica(self, experts: IntArray, slots: IntArray) -> tuple[float, int, int]:
        """Return the best new replica: most load of a rank it changes, expert, slot."""
        ranks, gone = self._rank[slots], self.row[slots]
        share = self._load[experts] / (self._num_replicas[experts] + 1)
        less = (
            self._holds[experts]
            * (share - self._load[experts] / self._num_replicas[experts])[:, None]
        )
        more = (
            self._holds[gone]
            * (self._load[gone] / (self._num_replicas[gone] - 1) - self._weight[slots])[
                :, None
            ]
        )
        more[np.arange(len(slots)), ranks] = -self._weight[slots]
        total = self._total + less[:, None, :] + more
        total[:, np.arange(len(slots)), ranks] += share[:, None]
        touched = self._holds[experts][:, None, :] | self._holds[gone]
        after = np.where(touched, total, -np.inf).max(axis=2)
        moves = self._stays(gone, ranks) - self._stays(experts[:, None], ranks)
        after = self._priced(after, moves)
        after[self._holds[experts[:, None], ranks]] = np.inf
        one, two = divmod(int(after.argmin()), len(slots))
        return float(after[one, two]), int(experts[one]), int(slots[two])
