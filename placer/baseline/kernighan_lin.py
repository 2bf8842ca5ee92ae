"""Graph bisection of each layer by networkx: it needs no other package."""

from typing import TYPE_CHECKING

import numpy as np

from placer.arrays import IntArray
from placer.baseline.grouping import node_then_rank
from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement

if TYPE_CHECKING:
    import networkx as nx

_NUM_STARTS = 5


def kernighan_lin(problem: BaselineProblem) -> Placement:
    """Cut each layer's co-activation graph in two, and the parts again, least cut first.

    Kernighan and Lin, "An efficient heuristic procedure for partitioning graphs", Bell
    System Technical Journal 49 (1970), which swaps pairs and so keeps counts; the best of
    five random starts.
    """
    import networkx as nx

    coactivation = problem.affinity.coactivation

    def split(layer: int, experts: IntArray, num_groups: int) -> IntArray:
        graph = nx.from_numpy_array(coactivation[layer][np.ix_(experts, experts)])
        return _bisect(graph, num_groups, problem.rng(layer))

    return node_then_rank(problem, split)


def _bisect(graph: "nx.Graph", num_groups: int, rng: np.random.Generator) -> IntArray:
    """Return the group of every expert of ``graph``, in its order; ``[n]`` int64."""
    from networkx import cut_size
    from networkx.algorithms.community import kernighan_lin_bisection

    experts = np.fromiter(graph, dtype=np.int64)
    group = np.zeros(len(experts), dtype=np.int64)
    if num_groups == 1:
        return group
    first = num_groups // 2
    size = len(experts) * first // num_groups
    cuts = []
    for _ in range(_NUM_STARTS):
        drawn = rng.permutation(experts).tolist()
        parts = kernighan_lin_bisection(graph, (set(drawn[:size]), set(drawn[size:])))
        cuts.append((cut_size(graph, *parts, weight="weight"), sorted(parts[0])))
    ours = np.isin(experts, min(cuts)[1])
    group[ours] = _bisect(graph.subgraph(experts[ours].tolist()), first, rng)
    others = graph.subgraph(experts[~ours].tolist())
    group[~ours] = first + _bisect(others, num_groups - first, rng)
    return group
