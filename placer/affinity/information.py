"""What an expert of one layer says about an expert of another: probabilities and bits.

A *table* is ``[N, M]`` int64: how often expert i of a layer met expert j of a later one.
Two kinds are counted. *Top-1* tables hold one pair per token, that of the experts with the
largest router weight. *All pairs* tables, the transitions of an affinity, hold ``top_k`` x
``top_k`` pairs per token; their information is that of one of a token's experts, drawn at
random, about one in the other layer.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from placer.affinity.count import count_pairs
from placer.arrays import FloatArray, IntArray
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.trace import Chunk


def conditional_probability(pairs: IntArray) -> FloatArray:
    """Return ``[N, M]``: P(j | i), rows summing to 1 (zeros for an expert never used).

    The expert affinity of ExFlow (arXiv 2401.08383), section III.
    """
    rows = pairs.sum(axis=1, keepdims=True)
    probability = np.zeros(pairs.shape)
    np.divide(pairs, rows, out=probability, where=rows > 0)
    return probability


def mutual_information(pairs: IntArray) -> float:
    """Return the plug-in mutual information, in bits, of a table (0 without counts).

    The estimate is biased upwards: see :func:`information_by_chance` and
    :func:`miller_madow`, and ``controls`` for tables whose bias is measured instead.
    """
    total = pairs.sum()
    if not total:
        return 0.0
    joint = pairs / total
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    used = joint > 0
    return float((joint[used] * np.log2(joint[used] / product[used])).sum())


def information_by_chance(pairs: IntArray) -> float:
    """Return the plug-in mutual information, in bits, that unlinked layers would show.

    It is the bias (N - 1)(M - 1) / (2 ln 2 x pairs), over experts in use, for as many pairs
    as the table has (Miller 1955): 0 without counts.
    """
    total = int(pairs.sum())
    rows, columns = (np.count_nonzero(pairs.sum(axis=axis)) for axis in (1, 0))
    return float((rows - 1) * (columns - 1) / (2 * np.log(2) * total)) if total else 0.0


def miller_madow(pairs: IntArray) -> float:
    """Return the mutual information, in bits, with the Miller-Madow correction.

    Each entropy of I = H(i) + H(j) - H(i, j) gains (cells in use - 1) / (2 x pairs) nats
    (Miller 1955; for mutual information Roulston, Physica D 125, 1999). It assumes
    independent pairs, so it is meant for top-1 tables; tokens of one sequence resemble
    each other, so some bias may stay. The result can be slightly negative.
    """
    total = int(pairs.sum())
    if not total:
        return 0.0
    in_use = [np.count_nonzero(pairs.sum(axis=axis)) for axis in (0, 1)]
    excess = (np.count_nonzero(pairs) - 1) - sum(cells - 1 for cells in in_use)
    return mutual_information(pairs) - float(excess / (2 * total * np.log(2)))


def jensen_shannon(one: IntArray, two: IntArray) -> float:
    """Return the Jensen-Shannon divergence of two tables, in bits: 0 equal, 1 disjoint.

    Lin, IEEE Transactions on Information Theory 37, 1991, with equal weights. Small tables
    look farther apart than they are.

    Raises
    ------
    UsageError
        If a table is empty, so that it has no distribution.
    """
    if not one.sum() or not two.sum():
        raise UsageError(
            "the table has no counts, so it has no distribution",
            "leave out domains without tokens",
        )
    p, q = one.ravel() / one.sum(), two.ravel() / two.sum()
    middle = _entropy((p + q) / 2)
    return max(0.0, middle - (_entropy(p) + _entropy(q)) / 2)


def domain_distances(tables: Sequence[Sequence[IntArray]]) -> FloatArray:
    """Return ``[D, D]``: Jensen-Shannon divergence of domains, mean over layer pairs.

    Parameters
    ----------
    tables
        Of each of D domains the tables of all layer pairs.
    """
    distances = np.zeros((len(tables), len(tables)))
    for first in range(len(tables)):
        for second in range(first):
            layers = zip(tables[first], tables[second], strict=True)
            distances[first, second] = np.mean([jensen_shannon(a, b) for a, b in layers])
    return distances + distances.T


def top1_tables(
    chunks: Iterable[Chunk], model: ModelSpec, distance: int = 1
) -> list[IntArray]:
    """Count top-1 tables of the layers l and l + ``distance``, for every such pair.

    Raises
    ------
    UsageError
        If the model has no layers so far apart.
    """
    if not 1 <= distance < model.num_layers:
        raise UsageError(
            f"no MoE layers are {distance} apart: the model has {model.num_layers}",
            f"give a distance from 1 to {model.num_layers - 1}",
        )
    sizes = model.num_experts
    shapes = list(zip(sizes, sizes[distance:], strict=False))
    tables = [np.zeros(shape, dtype=np.int64) for shape in shapes]
    for chunk in chunks:
        for layer, (counts, shape) in enumerate(zip(tables, shapes, strict=True)):
            first, second = chunk.experts[layer], chunk.experts[layer + distance]
            counts += count_pairs(first[:, :1], second[:, :1], *shape)
    return tables


def _entropy(probability: FloatArray) -> float:
    used = probability[probability > 0]
    return float(-(used * np.log2(used)).sum())
