"""Which rank serves a pair, and which rank serves most of a token."""

import numpy as np
import pytest

from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.serving.homes import fixed_homes
from placer.serving.layer_serving import (
    LayerServing,
    blocks,
    first_occurrence,
    majority_rank,
    rank_dtype,
)


def columns(*tokens):
    """``[k, T]`` from one tuple per token."""
    return np.array(tokens, dtype=np.uint8).T


def test_local_first_by_hand():
    """Expert 0 on ranks 0, 2, 3 and 5 of three nodes of two ranks; experts 1, 2 once."""
    placement = Placement(
        physical_to_logical_map=(np.array([0, 1, 0, 0, 2, 0]),),
        num_experts=(3,),
        num_ranks=6,
        num_nodes=3,
    )
    serving = LayerServing.of(placement, 0)
    chosen = columns(*[(0, 1, 2)] * 6)
    home = np.arange(6, dtype=np.uint8)
    # Home 1 is beside rank 0, home 4 beside rank 5; all others hold expert 0.
    assert serving.ranks(chosen, home).tolist() == [
        [0, 0, 2, 3, 5, 5],
        [1] * 6,
        [4] * 6,
    ]


def test_equal_copies_take_turns_by_token_index():
    placement = Placement(
        physical_to_logical_map=(np.array([1, 2, 0, 3, 0, 4, 0, 5]),),
        num_experts=(6,),
        num_ranks=4,
    )
    serving = LayerServing.of(placement, 0)
    served = serving.ranks(columns(*[(0,)] * 7), np.zeros(7, dtype=np.uint8))
    assert served.tolist() == [[1, 2, 3, 1, 2, 3, 1]]


def test_the_best_home_counts_copies_and_keeps_the_preferred_rank_on_a_tie():
    """Experts 0, 1 on both ranks, 2 on rank 0, 3 on rank 1."""
    placement = Placement(
        physical_to_logical_map=(np.array([0, 1, 2, 0, 1, 3]),),
        num_experts=(4,),
        num_ranks=2,
    )
    serving = LayerServing.of(placement, 0)
    chosen = columns((0, 1), (0, 1), (0, 2), (0, 3))
    preferred = np.array([0, 1, 1, 0], dtype=np.uint8)
    assert serving.most_held_rank(chosen, preferred).tolist() == [0, 1, 0, 1]


def test_a_majority_tie_goes_to_the_rank_that_the_router_lists_first():
    ranks = columns((2, 1, 1, 2), (3, 1, 1, 0), (5, 4, 3, 2), (1, 0, 0, 0))
    assert majority_rank(ranks).tolist() == [2, 1, 5, 0]
    # The tie is of ranks 1 and 2: rank 5 stands first, but once.
    assert majority_rank(columns((5, 1, 2, 1, 2))).tolist() == [1]


def test_first_occurrence_marks_each_distinct_rank_once():
    ranks = columns((2, 1, 1, 2), (3, 3, 3, 3))
    assert first_occurrence(ranks).T.tolist() == [
        [True, True, False, False],
        [True, False, False, False],
    ]


@pytest.mark.parametrize("num_ranks", [256, 300])
def test_many_ranks_do_not_overflow_their_dtype(num_ranks):
    serving = LayerServing.of(contiguous((num_ranks,), num_ranks), 0)
    chosen = np.array([[0, num_ranks - 1]])
    homes = fixed_homes(np.array([0, 1]), num_ranks)
    assert serving.ranks(chosen, homes).tolist() == [[0, num_ranks - 1]]


def test_fixed_homes_follow_the_order_of_the_sequences_that_are_left():
    """Sequences 1, 3, 9 on two ranks: homes 0, 1, 0, whatever their ids."""
    assert fixed_homes(np.array([1, 1, 3, 9, 9]), 2).tolist() == [0, 0, 1, 0, 0]


def test_a_byte_holds_256_ranks():
    assert (rank_dtype(255), rank_dtype(256)) == (np.uint8, np.uint16)
    for num_ranks, dtype in ((256, np.uint8), (257, np.uint16)):
        serving = LayerServing.of(contiguous((num_ranks,), num_ranks), 0)
        assert serving.replica_rank.dtype == serving.choices.dtype == dtype
        assert fixed_homes(np.array([0, 1]), num_ranks).dtype == dtype
        last = np.array([[num_ranks - 1]])
        assert serving.ranks(last, np.zeros(1, dtype)).tolist() == [[num_ranks - 1]]


@pytest.fixture
def replicated():
    """Two nodes of two ranks: expert 0 on ranks 0, 1 and 2, experts 1 to 3 once."""
    placement = Placement(
        physical_to_logical_map=(np.array([1, 0, 0, 2, 3, 0, 4, 5]),),
        num_experts=(6,),
        num_ranks=4,
        num_nodes=2,
    )
    return LayerServing.of(placement, 0)


def test_tables_list_the_ranks_of_copies_and_repeat_the_last(replicated):
    assert replicated.replica_rank.tolist() == [
        [0, 1, 2],
        [0, 0, 0],
        [1, 1, 1],
        [2, 2, 2],
        [3, 3, 3],
        [3, 3, 3],
    ]
    assert replicated.num_replicas.tolist() == [3, 1, 1, 1, 1, 1]
    assert replicated.num_choices.tolist() == [[1] * 6] * 4
    # At home on ranks 0 to 2, and on rank 3's node there is only rank 2.
    assert replicated.choices[:, 0].tolist() == [[0], [1], [2], [2]]


def test_shares_and_counts_of_pairs_that_homes_could_serve(replicated):
    """A pair of expert 0 counts for three ranks; a token of no group for none."""
    chosen = columns((0, 1), (0, 4), (2, 3), (0, 5))
    assert replicated.share_held(chosen).tolist() == [
        [1, 0.5, 0.5, 0],
        [0.5, 0.5, 0.5, 0.5],
        [0, 0.5, 0.5, 0],
        [0.5, 0.5, 0.5, 0.5],
    ]
    counted = replicated.count_held(chosen, np.array([1, 0, 0, -1]), 3)
    assert counted.tolist() == [[1, 2, 2, 1], [2, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("num_tokens", "number"), [(0, 0), (1, 1), (16384, 1), (16385, 2), (5_000_000, 64)]
)
def test_blocks_are_all_tokens_once_and_few(num_tokens, number):
    parts = list(blocks(num_tokens))
    assert len(parts) == number
    covered = [range(num_tokens)[part] for part in parts]
    assert [one.start for one in covered[1:]] == [one.stop for one in covered[:-1]]
    assert sum(map(len, covered)) == num_tokens
