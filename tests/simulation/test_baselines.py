"""Baselines: contiguous, balanced and random placements."""

import numpy as np
import pytest

from placer.errors import UsageError
from placer.simulation import BASELINES, balanced, contiguous, random


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


@pytest.mark.parametrize("name", BASELINES)
def test_experts_that_do_not_divide_are_refused(name):
    with pytest.raises(UsageError, match="6 slots do not divide over 4 ranks") as error:
        BASELINES[name]([np.ones(6, dtype=np.int64)], 4, 1)
    assert "1, 2, 3, 6" in error.value.hint


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_the_topology(name):
    placement = BASELINES[name]([np.ones(8, dtype=np.int64)] * 2, 4, 2)
    assert (placement.num_ranks, placement.num_nodes, placement.num_layers) == (4, 2, 2)
