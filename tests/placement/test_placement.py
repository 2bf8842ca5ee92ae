"""A placement holds only what a runtime could serve, and answers where experts are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.placement import rank_load


def place(
    rows: list[list[int]], sizes: tuple[int, ...], num_ranks: int, num_nodes: int = 1
) -> Placement:
    return Placement.from_json(rows, sizes, num_ranks, num_nodes)


def test_slots_belong_to_ranks_in_order_by_hand() -> None:
    """Two ranks; expert 2 has a copy on each, the second layer has no replicas."""
    placement = place([[3, 2, 0, 2, 1, 4], [1, 0, 3, 2, 5, 4]], (5, 6), 2)
    assert placement.num_layers == 2
    assert placement.has_replicas
    held = [[True, False], [False, True], [True, True], [True, False], [False, True]]
    assert placement.holds(0).tolist() == held
    assert placement.expert_rank(0).tolist() == [0, 1, 0, 0, 1]
    assert placement.expert_rank(1).tolist() == [0, 0, 1, 0, 1, 1]
    assert placement.permutation(1).tolist() == [1, 0, 3, 2, 5, 4]


def test_ranks_are_numbered_node_by_node() -> None:
    assert place([list(range(8))], (8,), 4, 2).ranks_per_node == 2


@pytest.mark.parametrize(
    ("rows", "sizes", "num_ranks", "match"),
    [
        ([[0, 1, 2, 4]], (4,), 2, r"outside 0\.\.3"),
        ([[0, 1, 2, -1]], (4,), 2, r"outside 0\.\.3"),
        (
            [[0, 1, 2, 2]],
            (4,),
            4,
            r"expert 3 has no slot, but slots \[2, 3\] all hold expert 2",
        ),
        ([[]], (4,), 2, "expert 0 has no slot"),
        ([[0, 0, 1, 1]], (2,), 2, r"rank 0 holds two replicas of one expert: \[0, 0\]"),
        ([[0, 1, 1, 0], [0, 1, 2, 1, 0, 0]], (2, 3), 2, "MoE layer 1: rank 1 holds two"),
        ([[0, 1], [0, 1]], (2,), 2, "2 layers placed, 1 layers of experts"),
        ([[0, 1.0]], (2,), 2, "not an integer"),
        ([[0, True]], (2,), 2, "not an integer"),
        ([[0, "1"]], (2,), 2, "not an integer"),
    ],
)
def test_what_no_runtime_could_serve_is_refused(
    rows: list[list[int]], sizes: tuple[int, ...], num_ranks: int, match: str
) -> None:
    with pytest.raises(PlacerError, match=match):
        place(rows, sizes, num_ranks)


@pytest.mark.parametrize(
    ("num_ranks", "num_nodes", "match", "hint"),
    [
        (4, 1, "6 slots do not divide over 4 ranks", "1, 2, 3, 6"),
        (3, 2, "3 ranks do not divide over 2 nodes", "--gpus-per-node"),
        (0, 1, "0 ranks", "--gpus-per-node"),
        (-2, 1, "-2 ranks", "--gpus-per-node"),
        (2, 0, "over 0 nodes", "--gpus-per-node"),
    ],
)
def test_ranks_that_do_not_divide_are_wrong_usage_with_the_remedy(
    num_ranks: int, num_nodes: int, match: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        place([list(range(6))], (6,), num_ranks, num_nodes)
    assert hint in caught.value.hint


def test_replicas_are_no_permutation() -> None:
    placement = place([[0, 1, 1, 0]], (2,), 2)
    with pytest.raises(PlacerError, match="4 slots for 2 experts") as caught:
        placement.permutation(0)
    assert "--redundant-experts 0" in caught.value.hint


@given(
    per_rank=st.integers(1, 5),
    num_nodes=st.integers(1, 3),
    ranks_per_node=st.integers(1, 3),
    data=st.data(),
)
def test_expert_ranks_come_back(
    per_rank: int, num_nodes: int, ranks_per_node: int, data: st.DataObject
) -> None:
    """From ranks to slots and back; inside a rank experts ascend; JSON loses nothing."""
    num_ranks = num_nodes * ranks_per_node
    slots = np.repeat(np.arange(num_ranks), per_rank).tolist()
    ranks = [np.asarray(data.draw(st.permutations(slots))) for _ in range(2)]
    placement = Placement.from_expert_rank(ranks, num_ranks, num_nodes)
    assert not placement.has_replicas
    for layer, row in enumerate(ranks):
        assert placement.expert_rank(layer).tolist() == row.tolist()
        assert placement.holds(layer).sum() == len(row)
        held = placement.permutation(layer).reshape(num_ranks, per_rank)
        for rank in range(num_ranks):
            assert held[rank].tolist() == np.flatnonzero(row == rank).tolist()
    again = place(placement.to_json(), placement.num_experts, num_ranks, num_nodes)
    assert again.to_json() == placement.to_json()


@given(data=st.data())
def test_valid_is_what_brute_force_finds_valid(data: st.DataObject) -> None:
    """Any row of 6 slots of 4 experts on 2 ranks against the three rules, written out."""
    row = data.draw(st.lists(st.integers(0, 4), min_size=6, max_size=6))
    halves = row[:3], row[3:]
    valid = (
        set(row) == {0, 1, 2, 3} and len(set(halves[0])) == 3 and len(set(halves[1])) == 3
    )
    if valid:
        assert place([row], (4,), 2).to_json() == [row]
    else:
        with pytest.raises(PlacerError):
            place([row], (4,), 2)


def test_what_a_placement_says_of_its_slots_by_hand() -> None:
    """Two ranks: layer 0 has a slot more than experts, layer 1 four more."""
    placement = place([[3, 2, 0, 2, 1, 4], [1, 0, 3, 2, 1, 0, 2, 3]], (5, 4), 2)
    assert placement.redundant_experts == 1
    one_node = Placement(
        physical_to_logical_map=placement.physical_to_logical_map,
        num_experts=placement.num_experts,
        num_ranks=2,
    )
    assert one_node.ranks_per_node == 2
    assert placement.slot_of(0).tolist() == [[2, -1, 1, 0, -1], [-1, 4, 3, -1, 5]]
    assert placement.filler_row().tolist() == [0, 1, 2, 3, 4, 0]
    # Experts 0, 2 and 3 on rank 0, experts 1, 2 and 4 on rank 1: half of expert 2 each.
    assert rank_load(placement, 0, np.array([1, 2, 4, 8, 16])).tolist() == [11, 20]


def test_a_missing_expert_is_named_alone_where_none_stands_twice() -> None:
    with pytest.raises(PlacerError) as caught:
        place([[0, 2]], (4,), 2)
    assert str(caught.value) == "MoE layer 0: expert 1 has no slot"
