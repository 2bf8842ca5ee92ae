"""Hypergraph partitioning of each layer by mt-KaHyPar."""

from functools import cache
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.baseline.grouping import equal_groups, node_then_rank
from placer.baseline.problem import BaselineProblem
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.solver.proof.copies import TokenSets, token_sets


def mtkahypar(problem: BaselineProblem) -> Placement:
    """Partition each layer's hypergraph, whose edges are what tokens use, for least km1.

    km1 adds up, over tokens, the groups beyond the first that serve a token: under the
    policy ``fixed`` the copies themselves, up to a constant. Gottesbueren, Heuer, Maas,
    Sanders and Schlag, "Scalable high-quality hypergraph partitioning", ACM Trans.
    Algorithms 20 (2024); preset ``deterministic_quality``, one thread, epsilon 0.

    Raises
    ------
    UsageError
        If mtkahypar is not installed.
    """
    partitioner, library = _partitioner()
    sets = token_sets([problem.tokens])
    coactivation = problem.affinity.coactivation

    def split(layer: int, experts: IntArray, num_groups: int) -> IntArray:
        context = partitioner.context_from_preset(library.PresetType.DETERMINISTIC_QUALITY)
        context.set_partitioning_parameters(num_groups, 0.0, library.Objective.KM1)
        context.logging = False
        edges, weights = _edges(sets[layer], experts)
        library.set_seed(problem.seed)
        graph = partitioner.create_hypergraph(
            context, len(experts), len(edges), edges, [1] * len(experts), weights
        )
        found = graph.partition(context)
        group = np.asarray([found.block_id(n) for n in range(len(experts))], dtype=np.int64)
        counts = coactivation[layer][np.ix_(experts, experts)].astype(np.float64)
        return equal_groups(group, counts, num_groups)

    return node_then_rank(problem, split)


@cache
def _partitioner() -> tuple[Any, Any]:
    """Return mt-KaHyPar, which starts its threads once in a process, and its module."""
    try:
        import mtkahypar as library
    except ImportError as error:
        raise UsageError(
            "--baseline mt-kahypar needs the package mtkahypar",
            "pip install 'placer[baselines]', or take --baseline kernighan-lin",
        ) from error
    return library.initialize(1), library


def _edges(sets: TokenSets, experts: IntArray) -> tuple[list[list[int]], list[int]]:
    """Return the edges among ``experts``, as places in it, and the tokens of each."""
    place = np.full(1 + max(int(sets.experts.max()), int(experts.max())), -1)
    place[experts] = np.arange(len(experts))
    edges, weights = [], []
    for row, number in zip(place[sets.experts], sets.num_tokens.tolist(), strict=True):
        edge = row[row >= 0].tolist()
        if len(edge) > 1:
            edges.append(edge)
            weights.append(number)
    return edges, weights
