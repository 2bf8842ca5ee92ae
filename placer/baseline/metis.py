"""Graph partitioning of each layer by METIS."""

import numpy as np

from placer.arrays import IntArray
from placer.baseline.grouping import equal_groups, node_then_rank
from placer.baseline.problem import BaselineProblem
from placer.errors import UsageError
from placer.placement.placement import Placement

# METIS adds weights in 32 bits.
_LARGEST_SUM = 1 << 30
_NUM_CUTS = 10


def metis(problem: BaselineProblem) -> Placement:
    """Partition each layer's co-activation graph for the least cut, then repair counts.

    Karypis and Kumar, "A fast and high quality multilevel scheme for partitioning
    irregular graphs", SIAM J. Sci. Comput. 20 (1998), by ``pymetis``. METIS balances
    within a tolerance, so the fewest experts move until counts are equal. Per layer, as
    on the graph of all layers it would give whole layers to ranks.

    Raises
    ------
    UsageError
        If pymetis is not installed.
    """
    try:
        import pymetis
    except ImportError as error:
        raise UsageError(
            "--baseline metis needs the package pymetis",
            "pip install 'placer[baselines]', or take --baseline kernighan-lin",
        ) from error
    coactivation = problem.affinity.coactivation
    options = pymetis.Options(seed=problem.seed, ncuts=_NUM_CUTS, ufactor=1)

    def split(layer: int, experts: IntArray, num_groups: int) -> IntArray:
        counts = coactivation[layer][np.ix_(experts, experts)]
        weight = counts // (1 + counts.sum() // _LARGEST_SUM)
        row, column = np.nonzero(weight)
        found = pymetis.part_graph(
            num_groups,
            pymetis.CSRAdjacency(np.searchsorted(row, np.arange(len(experts) + 1)), column),
            eweights=weight[row, column].tolist(),
            options=options,
        )
        group = np.asarray(found[1], dtype=np.int64)
        return equal_groups(group, counts.astype(np.float64), num_groups)

    return node_then_rank(problem, split)
