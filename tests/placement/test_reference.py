"""Baselines: contiguous, balanced and random placements."""

import numpy as np

from placer.placement.reference import contiguous, random
from placer.solver.balance.load_caps import balanced


def test_contiguous_slices_the_experts_in_order():
    placement = contiguous((4, 8), 2)
    assert placement.expert_rank(0).tolist() == [0, 0, 1, 1]
    assert placement.expert_rank(1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_balanced_by_hand():
    """Loads 9, 7, 4, 3, 2, 1: 9 to rank 0, 7 and 4 to rank 1, 3 to rank 0, 2 to rank 1."""
    placement = balanced([np.array([1, 9, 3, 7, 2, 4])], 2)
    assert placement.expert_rank(0).tolist() == [0, 0, 0, 1, 1, 1]


def test_balanced_keeps_counts_equal_where_one_expert_is_very_hot():
    placement = balanced([np.array([100, 1, 1, 1])], 2)
    assert np.bincount(placement.expert_rank(0)).tolist() == [2, 2]


def test_random_depends_on_the_seed_alone():
    one, same, other = (random((16,) * 3, 4, seed=s).to_json() for s in (1, 1, 2))
    assert one == same
    assert one != other
