"""Checking a certificate without the solver: costs, limits, prices and the search anew.

Nothing here is code of the solver. Columns are listed with ``itertools``, their costs are
products of matrices, and partitions are looked at in another order.

Legend of the shapes: E logical experts, C experts of a rank, K columns, N distinct rows of
experts, R ranks, S cuts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from placer.arrays import BoolArray, IntArray
from placer.errors import UsageError, VerificationError
from placer.placement.plan import Plan, plan_sha256
from placer.planning.certificate_file import CertificateFile, LayerCertificate
from placer.trace import Selection, Trace

_BLOCK = 1 << 14  # columns that are priced at once
_MOST_SETS = 12_000_000  # placer prove looks at no more in a layer
_ROUNDING = 0.05  # copies, as a cap on them allows for rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedCertificate:
    """What a certificate proves.

    Attributes
    ----------
    bound, reached
        Copies per token and layer: no placement has fewer, and what the plan has.
    num_by_prices, num_by_search, num_by_size
        Layers whose bound each of these proves.
    """

    bound: float
    reached: float
    num_by_prices: int
    num_by_search: int
    num_by_size: int


def check_certificate(
    certificate: CertificateFile, plan_path: Path, trace: Trace
) -> CheckedCertificate:
    """Prove again what a certificate says of a plan.

    Raises
    ------
    UsageError
        If it is of another plan or trace.
    VerificationError
        If a bound does not hold.
    """
    for what, stated, found in (
        ("plan", certificate.plan_sha256, plan_sha256(plan_path)),
        ("trace", certificate.trace_sha256, trace.sha256),
    ):
        if stated != found:
            raise UsageError(
                f"the certificate is of another {what}: it names SHA-256 {stated[:12]}, "
                f"this one has {found[:12]}",
                "write one for these: placer prove PLAN TRACE --certificate FILE",
            )
    plan = Plan.read(plan_path)
    chosen = Selection.from_json({"fold": certificate.fold, "phase": certificate.phase})
    tokens = trace.read(chosen)
    num_ranks = plan.placement.num_ranks
    if (certificate.num_ranks, certificate.num_tokens, len(certificate.layers)) != (
        num_ranks,
        tokens.num_tokens,
        plan.placement.num_layers,
    ):
        raise VerificationError(
            "the certificate's numbers of ranks, tokens or layers are not the plan's",
            "write it again: placer prove PLAN TRACE --certificate FILE",
        )
    reached = 0
    for number, one in enumerate(certificate.layers):
        layer = _Layer.of(plan, number, tokens.experts[number].astype(np.int64))
        fault = layer.fault(one, certificate)
        if fault is not None:
            raise VerificationError(
                f"MoE layer {number} of the certificate proves nothing: {fault}",
                "write it again: placer prove PLAN TRACE --certificate FILE",
            )
        reached += int(layer.cost_of(layer.sets).sum())
    by = [one.proved_by for one in certificate.layers]
    # A token is at home on one rank in R, and sends no copy there.
    each = (num_ranks - 1) / (num_ranks * tokens.num_tokens * len(by))
    return CheckedCertificate(
        bound=each * sum(one.bound for one in certificate.layers),
        reached=each * reached,
        num_by_prices=by.count("prices"),
        num_by_search=by.count("search"),
        num_by_size=by.count("size"),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A layer's tokens and the plan's sets."""

    uses: npt.NDArray[np.float32]
    weight: IntArray
    load: IntArray
    sets: IntArray
    top_k: int
    plan: Plan
    number: int

    @classmethod
    def of(cls, plan: Plan, number: int, experts: IntArray) -> "_Layer":
        """Return a layer of a plan; ``experts`` ``[T, k]`` are what tokens use."""
        placed = plan.placement
        num_experts = placed.num_experts[number]
        rows, weight = np.unique(np.sort(experts, axis=1), axis=0, return_counts=True)
        uses = np.zeros((num_experts, len(rows)), dtype=np.float32)
        uses[rows.T, np.arange(len(rows))] = 1
        row = placed.physical_to_logical_map[number]
        return cls(
            uses=uses,
            weight=weight.astype(np.int64),
            load=np.bincount(experts.ravel(), minlength=num_experts),
            sets=np.sort(row.reshape(placed.num_ranks, -1), axis=1),
            top_k=experts.shape[1],
            plan=plan,
            number=number,
        )

    def cost_of(self, sets: IntArray) -> IntArray:
        """Return ``[K]``: the tokens that use any expert of each set."""
        held = np.zeros((len(sets), len(self.load)), dtype=np.float32)
        np.put_along_axis(held, sets, 1, axis=1)
        touched = (held @ self.uses) > 0
        cost: IntArray = touched @ self.weight
        return cost

    def fault(self, stated: LayerCertificate, certificate: CertificateFile) -> str | None:
        """Return why a certificate does not prove its bound; ``None`` if it does."""
        num_ranks, size = self.sets.shape
        if stated.proved_by == "size":
            fewest = -(-self.top_k // size) * int(self.weight.sum())
            if stated.bound > fewest:
                return f"its bound is {stated.bound}, the size of tokens proves {fewest}"
            return None
        fault = self._fault_of_limits(stated, certificate)
        if fault is not None:
            return fault
        if len(stated.prices) != len(self.load) or len(stated.cuts) != len(
            stated.cut_prices
        ):
            return "it has not one price for every expert and cut"
        scale = certificate.scale
        if scale < 1 or self._most_reduced(stated, scale) >= 2**62:
            return "its prices are too large to add, or their scale is 0"
        if math.comb(len(self.load), size) > _MOST_SETS:
            return f"it has more than {_MOST_SETS:,} sets of experts to look at"
        columns, cost = self._columns(stated)
        if not len(cost):
            return "no set of experts is within its limits"
        reduced = scale * cost - _paid(columns, stated)
        least = int(reduced.min())
        base = sum(stated.prices) + sum(stated.cut_prices) + num_ranks * least
        proved = -(-base // scale)
        if stated.proved_by == "search" and proved < stated.bound:
            allowed = scale * (stated.bound - 1) - base
            near = reduced - least <= allowed
            found = _least_partition(
                columns[near], cost[near], reduced[near] - least, allowed, len(self.load)
            )
            proved = stated.bound if found is None else min(stated.bound, found)
        if proved < stated.bound:
            return f"its bound is {stated.bound}, what it says proves {proved}"
        return None

    def _most_reduced(self, stated: LayerCertificate, scale: int) -> int:
        """Return what no reduced cost of a column exceeds, in whole numbers of any size.

        NumPy adds in 64 bits, where 4 times 2^62 is 0.
        """
        own = self.sets.shape[1] * max(map(abs, stated.prices), default=0)
        most: int = scale * int(self.weight.sum()) + own - sum(stated.cut_prices)
        return most

    def _fault_of_limits(
        self, stated: LayerCertificate, certificate: CertificateFile
    ) -> str | None:
        """Return how limits leave out a placement that the plan's own caps allow."""
        num_ranks = len(self.sets)
        cap = math.floor(
            min(certificate.max_imbalance, num_ranks) * self.load.sum() / num_ranks
        )
        most_load = max(cap, int(self.load[self.sets].sum(axis=1).max()))
        num_tokens = int(self.weight.sum())
        received = self.plan.provenance.get("max_received_copies")
        most_cost = num_tokens
        if received is not None:
            most_cost = math.floor(received * num_tokens / (num_ranks - 1) + _ROUNDING)
        most_cost = max(most_cost, int(self.cost_of(self.sets).max()))
        if stated.most_load < most_load or stated.most_cost < most_cost:
            return "its limits are tighter than the caps of the plan"
        together, apart = self._pins_and_groups()
        if any(tuple(one) not in together for one in stated.together):
            return "it keeps experts together that the plan may part"
        if stated.apart and stated.apart != apart:
            return "it keeps experts apart that the plan may join"
        return None

    def _pins_and_groups(self) -> tuple[set[tuple[int, ...]], list[int] | None]:
        """Return what pins and router groups keep together, and the labels kept apart."""
        num_experts, size = len(self.load), self.sets.shape[1]
        pins = [
            pin.split(":")[1].split("=")
            for pin in self.plan.provenance.get("pins") or ()
            if int(pin.split(":")[0]) == self.number
        ]
        if pins:
            rank_of = {int(expert): int(rank) for expert, rank in pins}
            ranks = set(rank_of.values())
            sets = {tuple(sorted(e for e in rank_of if rank_of[e] == r)) for r in ranks}
            return sets, [rank_of.get(expert, -1) for expert in range(num_experts)]
        n_group = self.plan.model.n_group
        if n_group < 2 or not self.plan.provenance.get("preserve_groups"):
            return set(), None
        width = num_experts // n_group
        if width < size:
            groups = np.arange(num_experts).reshape(n_group, width)
            return {tuple(one) for one in groups.tolist()}, None
        return set(), (np.arange(num_experts) // width).tolist()

    def _columns(self, stated: LayerCertificate) -> tuple[IntArray, IntArray]:
        """Return ``[K, C]`` sets within the limits, and ``[K]`` their costs."""
        num_ranks, size = self.sets.shape
        least_load = int(self.load.sum()) - (num_ranks - 1) * stated.most_load
        kept, costs = [], []
        for block in _blocks(len(self.load), size):
            load = self.load[block].sum(axis=1)
            good = (load >= least_load) & (load <= stated.most_load)
            good &= _allowed(block, stated, len(self.load))
            block = block[good]
            if not len(block):
                continue
            cost = self.cost_of(block)
            within = cost <= stated.most_cost
            kept.append(block[within])
            costs.append(cost[within])
        if not kept:
            return np.zeros((0, size), dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(kept), np.concatenate(costs)


def _blocks(num_experts: int, size: int) -> Iterator[IntArray]:
    """Yield all sets of ``size`` experts, some thousands at once."""
    every = combinations(range(num_experts), size)
    while block := list(islice(every, _BLOCK)):
        yield np.array(block, dtype=np.int64)


def _allowed(sets: IntArray, stated: LayerCertificate, num_experts: int) -> BoolArray:
    """Return ``[K]``: which sets part nothing, and join nothing, that they may not."""
    good = np.ones(len(sets), dtype=np.bool_)
    for group in stated.together:
        number = np.isin(sets, group).sum(axis=1)
        good &= (number == 0) | (number == len(group))
    if stated.apart:
        label = np.array(stated.apart)[sets]
        for one in set(stated.apart) - {-1}:
            other = ((label >= 0) & (label != one)).any(axis=1)
            good &= ~((label == one).any(axis=1) & other)
    return good


def _paid(columns: IntArray, stated: LayerCertificate) -> IntArray:
    """Return ``[K]``: the prices of the experts and cuts of each column."""
    paid: IntArray = np.array(stated.prices, dtype=np.int64)[columns].sum(axis=1)
    for cut, price in zip(stated.cuts, stated.cut_prices, strict=True):
        paid += price * (np.isin(columns, cut).sum(axis=1) >= 2)
    return paid


def _least_partition(
    columns: IntArray, cost: IntArray, extra: IntArray, allowed: int, num_experts: int
) -> int | None:
    """Return the least cost of a partition whose columns' ``extra`` stay within a sum.

    ``None`` where there is no such partition.
    """
    bits = [sum(1 << expert for expert in one) for one in columns.tolist()]
    order = np.argsort(extra, kind="stable").tolist()
    own: list[list[int]] = [[] for _ in range(num_experts)]
    for column in order:
        for expert in columns[column].tolist():
            own[expert].append(column)
    costs, extras = cost.tolist(), extra.tolist()
    full = (1 << num_experts) - 1
    # The expert of the fewest columns first.
    turn = sorted(range(num_experts), key=lambda expert: len(own[expert]))
    best: int | None = None
    stack = [(0, 0, 0)]
    while stack:
        used, spent, paid = stack.pop()
        if used == full:
            best = spent if best is None else min(best, spent)
            continue
        expert = next(one for one in turn if not used >> one & 1)
        for column in own[expert]:
            if paid + extras[column] > allowed:
                break
            if not used & bits[column]:
                stack.append(
                    (
                        used | bits[column],
                        spent + costs[column],
                        paid + extras[column],
                    )
                )
    return best
