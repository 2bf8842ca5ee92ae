"""Both programs of MoETuner against every solution of a tiny instance."""

import itertools

import numpy as np
import pytest

from placer.baseline import BaselineProblem
from placer.baseline.moetuner import moetuner
from placer.placement.topology import Topology

TOLERANCE = 1.025  # at which the paper's solver stops


@pytest.fixture(params=[(1, 4), (2, 2)], ids=["one node", "two nodes"])
def problem(request, make_trace):
    num_nodes, gpus_per_node = request.param
    return BaselineProblem(
        trace=make_trace(num_tokens=300),
        topology=Topology(
            num_nodes=num_nodes, gpus_per_node=gpus_per_node, inter_cost=5, intra_cost=2
        ),
        solver_seconds=20,
    )


def away_from_mean(load, ranks):
    clusters = [sum(load[e] for e in range(8) if ranks[e] == r) for r in range(4)]
    return sum(abs(one - sum(load) / 4) for one in clusters)


def test_the_first_program_evens_loads(problem):
    placement = moetuner(problem)
    for layer, counts in enumerate(problem.load):
        load = counts.tolist()
        least = min(
            away_from_mean(load, ranks)
            for ranks in set(itertools.permutations((0, 0, 1, 1, 2, 2, 3, 3)))
        )
        found = away_from_mean(load, placement.expert_rank(layer).tolist())
        assert found <= TOLERANCE * least + 1e-9


def test_the_second_program_shortens_the_slowest_transfers(problem):
    """Sum over neighbouring layers of the dearest transfer; every renaming of the ranks.

    The chain over three layers is tried whole: 24 x 24 x 24 renamings.
    """
    topology, tokens = problem.topology, problem.tokens
    ranks = [moetuner(problem).expert_rank(layer) for layer in range(3)]
    names = list(itertools.permutations(range(4)))

    def price(one, two):
        if one == two:
            return 0
        if topology.num_nodes == 1:
            return 1
        same_node = one // topology.gpus_per_node == two // topology.gpus_per_node
        return 2 if same_node else 5

    def slowest(layer):
        """Return [24, 24]: the dearest transfer under each renaming of both layers."""
        sent = np.zeros((4, 4))
        for row in zip(tokens.experts[layer], tokens.experts[layer + 1], strict=True):
            for i, j in itertools.product(*row):
                sent[ranks[layer][i], ranks[layer + 1][j]] += 1
        pairs = list(itertools.product(range(4), repeat=2))
        return np.array(
            [
                [max(sent[a, b] * price(one[a], two[b]) for a, b in pairs) for two in names]
                for one in names
            ]
        )

    total = slowest(0)[:, :, None] + slowest(1)
    as_placed = names.index((0, 1, 2, 3))
    found = total[as_placed, as_placed, as_placed]
    assert found <= TOLERANCE * total.min() + 1e-9
    assert total.max() > TOLERANCE * total.min()  # so that a renaming matters
