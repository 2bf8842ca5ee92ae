"""Balancing only: what can be solved from loads without tokens.

Legend of the shapes: L MoE layers, E experts, R ranks, P slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.placement.imbalance import imbalance
from placer.placement.placement import Placement, holders
from placer.run.deadline import Deadline
from placer.solver.balance.layer_balance import Balancing, LayerBalance
from placer.solver.balance.replicas import require_room
from placer.solver.balance.served_load import ServedLoad
from placer.target.engine import ReplicaChoice

OBJECTIVE = "imbalance (busiest rank's load over the mean, mean over MoE layers)"
#: Which replica serves depends on the home of a token.
OBJECTIVE_OF_REPLICAS = (
    "imbalance with even homes (busiest rank's load over the mean, mean over MoE layers)"
)
METHOD = "an even share, the busiest expert's replicas, the busiest group, or CP-SAT"
# Work of CP-SAT on replicas, all layers together, in its deterministic seconds.
_DETERMINISTIC_TIME = 4.0
_SAME = 1e-12
# How the largest of the ranks' loads is integrated: standard deviations, and points.
_REACH, _NUM_POINTS = 6.0, 257


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalance:
    """A balanced placement.

    Attributes
    ----------
    placement
        The experts in their slots.
    imbalance
        ``[L]``: max/mean rank load, as replicas serve while homes are even over the ranks.
    predicted
        ``[L]``: what to expect where the homes of tokens are drawn.
    bound
        ``[L]``: no placement with these slots, and groups as whole as asked, has less.
    """

    placement: Placement
    imbalance: tuple[float, ...]
    predicted: tuple[float, ...]
    bound: tuple[float, ...]


def balance_loads(
    loads: Sequence[FloatArray], asked: Balancing, deadline: Deadline | None = None
) -> LoadBalance:
    """Place experts and replicas for the most even load.

    Without replicas: longest first, swaps, and CP-SAT where it can gain. With replicas:
    those that EPLB makes and packs, evened out; where that is not close to the bound,
    replicas made by other rules, and CP-SAT where the layer is small. Replicas that do not
    share evenly are counted as they serve, and the experts with one replica swapped around
    them.

    Parameters
    ----------
    loads
        L arrays ``[E]`` of whole numbers: pairs per expert.
    asked
        What to balance for.
    deadline
        Stops CP-SAT; none by default.

    Raises
    ------
    UsageError
        If slots do not divide over the ranks, or two replicas of an expert share a rank.
    """
    sizes = tuple(map(len, loads))
    require_room(sizes, asked.num_ranks, asked.redundant_experts, asked.num_blocks)
    deadline = deadline or Deadline()
    seconds = _DETERMINISTIC_TIME / len(loads)
    starts = (
        [None] * len(sizes)
        if asked.start is None
        else (asked.start.physical_to_logical_map)
    )
    layers = [
        LayerBalance(load, asked, start, seconds, deadline)
        for load, start in zip(loads, starts, strict=True)
    ]
    served = ServedLoad(
        asked.replica_choice, _placement(sizes, [one.row for one in layers], asked),
        asked.layer_ids,
    )  # fmt: skip
    rows, reached, predicted = [], [], []
    for layer, load in zip(layers, loads, strict=True):
        row = layer.served(served)
        rows.append(row)
        shares = served.place(holders(row, len(load), asked.num_ranks))
        reached.append(imbalance(load @ shares))
        predicted.append(_predicted_imbalance(shares, load))
    return LoadBalance(
        placement=_placement(sizes, rows, asked),
        imbalance=tuple(reached),
        predicted=tuple(predicted),
        bound=tuple(layer.bound for layer in layers),
    )


def predicted_imbalance(
    placement: Placement,
    loads: Sequence[FloatArray],
    replica_choice: ReplicaChoice,
    layer_ids: Sequence[int] | None,
) -> tuple[float, ...]:
    """Return ``[L]``: the max/mean rank load to expect if homes of tokens are random.

    Parameters
    ----------
    placement
        Experts in slots.
    loads
        L arrays ``[E]``: pairs per expert.
    replica_choice, layer_ids
        As in :class:`Balancing`.
    """
    served = ServedLoad(replica_choice, placement, layer_ids)
    return tuple(
        _predicted_imbalance(served.place(placement.holds(layer)), load)
        for layer, load in enumerate(loads)
    )


def _predicted_imbalance(shares: FloatArray, load: FloatArray) -> float:
    """Return max/mean rank load where a replica serves each pair with its share's chance.

    A rank's load is then nearly normal, with the variance of a sum of binomials. The mean
    of the largest of independent X_r is the integral of 1 - prod_r P(X_r < x); that the
    ranks share one sum spreads them a little more.
    """
    total, variance = load @ shares, load @ (shares * (1 - shares))
    if not variance.any():
        return imbalance(load @ shares)
    one_sum = len(total) / (len(total) - 1)
    deviation = np.sqrt(np.maximum(one_sum * variance, _SAME * total.max()))
    most, reach = float(total.max()), _REACH * float(deviation.max())
    x = np.linspace(most - reach, most + reach, _NUM_POINTS)
    standard = (x[:, None] - total) / deviation
    # Of the normal distribution, within 0.0003.
    below = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (standard + 0.044715 * standard**3)))
    largest = x[-1] - np.trapezoid(below.prod(axis=1), x)
    return float(largest / total.mean())


def _placement(
    sizes: tuple[int, ...], rows: Sequence[IntArray], asked: Balancing
) -> Placement:
    return Placement(
        physical_to_logical_map=tuple(
            np.sort(row.reshape(asked.num_ranks, -1), axis=1).ravel() for row in rows
        ),
        num_experts=sizes,
        num_ranks=asked.num_ranks,
        num_nodes=asked.num_nodes,
    )
