"""Spectral grouping by co-activation: GRACE-MoE (arXiv 2509.25041)."""

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.baseline.grouping import node_then_rank
from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement
from placer.solver.search.pair_search import transport

_NUM_STARTS = 5
_NUM_STEPS = 30
# Squared distances of unit vectors, as whole numbers for the min-cost flow.
_UNIT = 1e6


def grace(problem: BaselineProblem) -> Placement:
    """Cluster each layer's experts by the spectrum of their co-activation.

    Node level, then GPU level (arXiv 2509.25041). There groups may differ in size, freely
    at node level and by a ratio r at GPU level; here slots are equal (r = 0), so the
    assignment of experts to centres is a min-cost flow. Its replicas are left out.
    """
    coactivation = problem.affinity.coactivation

    def split(layer: int, experts: IntArray, num_groups: int) -> IntArray:
        affinity = coactivation[layer][np.ix_(experts, experts)].astype(np.float64)
        points = spectral_points(affinity, num_groups)
        return equal_kmeans(points, num_groups, problem.rng(layer))

    return node_then_rank(problem, split)


def spectral_points(affinity: FloatArray, num_groups: int) -> FloatArray:
    """Embed experts: the leading eigenvectors of D^-1/2 A D^-1/2, rows of length 1.

    Ng, Jordan and Weiss, "On spectral clustering", NIPS 2001. An expert without
    co-activation is at the origin. Returns ``[n, num_groups]`` float64.
    """
    degree = affinity.sum(axis=1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1)), 0.0)
    vectors = np.linalg.eigh(scale[:, None] * affinity * scale)[1][:, -num_groups:]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    points: FloatArray = np.divide(
        vectors, length, out=np.zeros_like(vectors), where=length > 1e-9
    )
    return points


def equal_kmeans(points: FloatArray, num_groups: int, rng: np.random.Generator) -> IntArray:
    """Cluster points ``[n, d]`` into groups of one size by k-means; ``[n]`` int64."""
    best, least = np.arange(len(points)) % num_groups, np.inf
    for _ in range(_NUM_STARTS):
        centres = _spread(points, num_groups, rng)
        group = best
        for _ in range(_NUM_STEPS):
            cost = np.rint(_UNIT * _squared_distance(points, centres))
            before, group = group, transport(cost, len(points) // num_groups)
            if (before == group).all():
                break
            centres = np.stack([points[group == g].mean(axis=0) for g in range(num_groups)])
        cost = np.rint(_UNIT * _squared_distance(points, centres))
        total = float(cost[np.arange(len(points)), group].sum())
        if total < least:
            best, least = group, total
    return best


def _spread(points: FloatArray, num_groups: int, rng: np.random.Generator) -> FloatArray:
    """Draw centres far from one another (k-means++, Arthur and Vassilvitskii 2007)."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < num_groups:
        far = _squared_distance(points, points[chosen]).min(axis=1)
        weight = far + 1e-12
        weight[chosen] = 0
        chosen.append(int(rng.choice(len(points), p=weight / weight.sum())))
    return points[chosen]


def _squared_distance(points: FloatArray, centres: FloatArray) -> FloatArray:
    distance: FloatArray = ((points[:, None] - centres) ** 2).sum(axis=2)
    return distance
