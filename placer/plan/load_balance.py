"""Balancing alone: what loads without tokens can be placed for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placer.plan.balance import balance_layer, greedy_balance
from placer.plan.placement import Placement, require_divisible_slots
from placer.plan.problem import FloatArray, IntArray
from placer.plan.replicas import with_replicas

OBJECTIVE = "imbalance (busiest rank's load over the mean, mean over MoE layers)"
METHOD = "an even share, the busiest expert's copies, or CP-SAT"
# CP-SAT is left out where its model would be large; greedy and swaps are close there.
_EXACT_VARIABLES = 4096
# An imbalance this close to its bound is not worth an exact search.
_CLOSE = 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalance:
    """A balanced placement.

    Attributes
    ----------
    placement
        The experts in their slots.
    imbalance
        ``[L]``: max/mean rank load, an expert's load shared evenly by its copies.
    bound
        ``[L]``: no placement with these slots has less.
    """

    placement: Placement
    imbalance: tuple[float, ...]
    bound: tuple[float, ...]


def balance_loads(
    loads: Sequence[FloatArray],
    num_ranks: int,
    num_nodes: int = 1,
    redundant_experts: int = 0,
    max_imbalance: float = np.inf,
) -> LoadBalance:
    """Place experts, and copies of them, for the evenest load.

    Without copies: longest first, swaps, and CP-SAT where it can gain. With copies the
    better, layer by layer, of copies added to a balanced placement and of copies made
    first and packed then (EPLB's order, https://github.com/deepseek-ai/EPLB).

    Parameters
    ----------
    loads
        L arrays ``[E]`` of whole numbers: pairs per expert.
    num_ranks, num_nodes
        The topology.
    redundant_experts
        Slots per layer beyond one for each expert.
    max_imbalance
        What must be reached where it can be; else less than a percent above the bound is
        even enough.

    Raises
    ------
    UsageError
        If slots do not divide over the ranks.
    """
    for layer, load in enumerate(loads):
        require_divisible_slots(len(load), num_ranks, layer)
    # Copies change everything anew, so what they start from need not be proved.
    exact = not redundant_experts
    found = [_balanced(load, num_ranks, max_imbalance, exact=exact) for load in loads]
    placement = Placement.from_expert_rank([one for one, _ in found], num_ranks, num_nodes)
    bound = [value for _, value in found]
    if redundant_experts:
        copied = with_replicas(placement, loads, redundant_experts)
        rows = [
            _with_copies(row, load, num_ranks, redundant_experts)
            for row, load in zip(copied.physical_to_logical_map, loads, strict=True)
        ]
        placement = replace(placement, physical_to_logical_map=tuple(rows))
        bound = [_bound(load, num_ranks, redundant_experts) for load in loads]
    return LoadBalance(
        placement=placement,
        imbalance=tuple(
            _imbalance(row, load, num_ranks)
            for row, load in zip(placement.physical_to_logical_map, loads, strict=True)
        ),
        bound=tuple(bound),
    )


def _balanced(
    load: FloatArray, num_ranks: int, max_imbalance: float, *, exact: bool
) -> tuple[IntArray, float]:
    """Return the rank of every expert, and a bound of the imbalance."""
    bound = _bound(load, num_ranks, 0)
    if not load.any():
        return greedy_balance(load, num_ranks), bound
    mean = load.sum() / num_ranks
    exact = exact and len(load) * num_ranks <= _EXACT_VARIABLES
    close = min(_CLOSE * bound, max(max_imbalance, bound))
    enough = close * mean if exact else np.inf
    found = balance_layer(load, num_ranks, enough)
    if found.max_load > enough:
        bound = max(bound, found.proved_max_load / mean)
    return found.expert_rank, bound


def _bound(load: FloatArray, num_ranks: int, redundant_experts: int) -> float:
    """Return what no imbalance is below, in units of the mean.

    One rank has at least the mean, and at least the heaviest copy beside the lightest
    experts. Copies made one by one of whatever is heaviest make the heaviest copy as
    light as it can be.
    """
    if not load.any():
        return 1.0
    heaviest = float((load / _num_copies(load, num_ranks, redundant_experts)).max())
    if not redundant_experts:
        heaviest += float(np.sort(load)[: len(load) // num_ranks - 1].sum())
    return max(1.0, heaviest * num_ranks / float(load.sum()))


def _num_copies(load: FloatArray, num_ranks: int, redundant_experts: int) -> IntArray:
    """Return ``[E]``: copies of every expert, at most one per rank, heaviest first."""
    copies = np.ones(len(load), dtype=np.int64)
    for _ in range(redundant_experts):
        copies[int(np.where(copies < num_ranks, load / copies, -1.0).argmax())] += 1
    return copies


def _with_copies(
    added: IntArray, load: FloatArray, num_ranks: int, redundant_experts: int
) -> IntArray:
    """Return the evener of copies added to a balanced layer, and copies made first."""
    rows = [_even_out(added, load, num_ranks)]
    packed = _packed(load, num_ranks, redundant_experts)
    if packed is not None:
        rows.append(_even_out(packed, load, num_ranks))
    best = min(rows, key=lambda row: _imbalance(row, load, num_ranks))
    return np.sort(best.reshape(num_ranks, -1), axis=1).ravel()


def _packed(load: FloatArray, num_ranks: int, redundant_experts: int) -> IntArray | None:
    """Pack copies, heaviest first, to the least loaded rank that may take them."""
    copies = _num_copies(load, num_ranks, redundant_experts)
    experts = np.repeat(np.arange(len(load)), copies)
    weight = (load / copies)[experts]
    width = len(experts) // num_ranks
    total = np.zeros(num_ranks)
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for copy in np.argsort(-weight, kind="stable"):
        expert = int(experts[copy])
        allowed = [len(one) < width and expert not in one for one in held]
        if not any(allowed):
            return None
        rank = int(np.where(allowed, total, np.inf).argmin())
        held[rank].append(expert)
        total[rank] += weight[copy]
    return np.asarray(held, dtype=np.int64).ravel()


def _even_out(row: IntArray, load: FloatArray, num_ranks: int) -> IntArray:
    """Swap copies of the busiest rank for lighter ones while its load falls."""
    row = row.copy()
    weight = load / np.bincount(row, minlength=len(load))
    rank = np.arange(len(row)) // (len(row) // num_ranks)
    holds = np.zeros((len(load), num_ranks), dtype=np.bool_)
    holds[row, rank] = True
    while True:
        total = np.bincount(rank, weight[row], minlength=num_ranks)
        busiest = int(total.argmax())
        mine, others = np.flatnonzero(rank == busiest), np.flatnonzero(rank != busiest)
        shed = weight[row[mine]][:, None] - weight[row[others]]
        after = np.maximum(total[busiest] - shed, total[rank[others]] + shed)
        twice = holds[row[mine]][:, rank[others]] | holds[row[others], busiest]
        after = np.where(twice, np.inf, after)
        if not after.size or after.min() >= total[busiest] * (1 - 1e-12):
            return row
        one, two = divmod(int(after.argmin()), len(others))
        here, there = mine[one], others[two]
        holds[row[here], [busiest, rank[there]]] = [False, True]
        holds[row[there], [busiest, rank[there]]] = [True, False]
        row[here], row[there] = row[there], row[here]


def _imbalance(row: IntArray, load: FloatArray, num_ranks: int) -> float:
    """Return max/mean rank load, the copies of an expert sharing its load evenly."""
    weight = load / np.bincount(row, minlength=len(load))
    total = weight[row].reshape(num_ranks, -1).sum(axis=1)
    return float(total.max() / total.mean()) if load.any() else 1.0
