"""What copies cost and what is capped, from the topology and the caps, counted by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from placer.errors import UsageError
from placer.placement.topology import Topology
from placer.solver.caps import Caps
from placer.solver.problem.traffic import TrafficProblem, copy_prices, sample_sequences
from placer.trace import Chunk
from tests.solver.enumeration import cost_between

LINKS = ((0, 1, 5, 6), (1, 0, 7, 8), (5, 7, 0, 2), (6, 8, 2, 0))
TOPOLOGIES = [
    Topology(gpus_per_node=3),
    Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2),
    Topology(num_nodes=3, gpus_per_node=2, inter_cost=7, intra_cost=3),
    Topology(num_nodes=2, gpus_per_node=2, cost=LINKS),
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_copies_to_ranks_cost_what_the_links_do(topology: Topology) -> None:
    num_ranks = topology.num_ranks
    to_rank, to_node = copy_prices(topology, "per-rank")
    assert to_node.shape == (num_ranks + 1, 0)
    ranks = range(num_ranks)
    cost = [[cost_between(topology, home, rank) for rank in ranks] for home in ranks]
    # Scaled by R: the last row is the mean over all homes, times R.
    expected = [[num_ranks * one for one in row] for row in cost]
    expected.append([sum(row[rank] for row in cost) for rank in ranks])
    assert to_rank.tolist() == expected


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_copies_to_nodes_land_at_the_home_s_place_and_go_on_from_there(
    topology: Topology,
) -> None:
    num_ranks, width = topology.num_ranks, topology.gpus_per_node
    to_rank, to_node = copy_prices(topology, "per-node")
    ranks, nodes = range(num_ranks), range(topology.num_nodes)

    def landing(home: int, node: int) -> int:
        return node * width + home % width

    there = [[cost_between(topology, h, landing(h, n)) for n in nodes] for h in ranks]
    onwards = [
        [cost_between(topology, landing(h, r // width), r) for r in ranks] for h in ranks
    ]
    for price, cost in ((to_node, there), (to_rank, onwards)):
        assert price[:-1].tolist() == [[num_ranks * one for one in row] for row in cost]
        assert price[-1].tolist() == np.sum(cost, axis=0).tolist()


def test_traffic_that_no_placement_changes_is_refused() -> None:
    with pytest.raises(UsageError, match="all-gather does not depend on the placement"):
        copy_prices(Topology(gpus_per_node=2), "all-gather")


def problem(**changes: Any) -> TrafficProblem:
    """Two layers of 10 tokens on 4 ranks."""
    given: dict[str, Any] = {
        "experts": (np.zeros((10, 1), dtype=np.int16),) * 2,
        "topology": Topology(gpus_per_node=4),
        "policy": "follow",
        "load": (np.array([[10.0, 0, 0, 0], [1, 2, 3, 4]]),) * 2,
        "max_load": (np.array([6.0, 5]),) * 2,
    }
    return TrafficProblem(**given | changes)


def test_a_problem_of_one_layer_knows_its_size() -> None:
    one = problem(experts=(np.zeros((10, 1), dtype=np.int16),))
    assert (one.num_layers, one.num_tokens) == (1, 10)


def test_nothing_is_capped_or_priced_beside_copies_by_default() -> None:
    prices = problem().layer_prices(0)
    assert prices.follow
    assert not prices.linear.any()
    assert prices.linear.shape == (4, 4)
    assert (prices.overflow, prices.receive, prices.max_receive) == (0, 0, 0)
    assert (prices.max_homes, prices.crowd, prices.caution) == (0, 0, 0)
    assert not prices.has_unknown_draws
    assert not problem().limits_received
    assert not problem(policy="fixed").layer_prices(0).follow


def test_prices_are_scaled_by_the_ranks() -> None:
    """As those of copies are: half a copy is worth 2 on 4 ranks."""
    move = np.array([[0.5, 1, 0, 0.3], [0, 0, 2, 0], [0, 0, 0, 0], [1.25, 0, 0, 0]])
    prices = problem(
        overflow_price=3.0, receive_price=0.75, move_price=(move, 2 * move)
    ).layer_prices(1)
    assert prices.linear.tolist() == [[4, 8, 0, 2], [0, 0, 16, 0], [0] * 4, [10, 0, 0, 0]]
    assert (prices.overflow, prices.receive) == (12, 3)
    assert prices.max_load.tolist() == [6, 5]
    assert prices.load[1].tolist() == [1, 2, 3, 4]


def test_homes_are_capped_where_a_next_layer_follows() -> None:
    caps = Caps(max_home_imbalance=1.5)
    follow = problem(caps=caps, home_price=3.0)
    first, last = follow.layer_prices(0), follow.layer_prices(1)
    assert (first.max_homes, first.crowd) == (1.5 * 10 / 4, 12)
    assert (last.max_homes, last.crowd) == (0, 0)
    fixed = problem(caps=caps, home_price=3.0, policy="fixed").layer_prices(0)
    assert (fixed.max_homes, fixed.crowd) == (0, 0)


def test_received_copies_are_capped_in_copies_of_the_profile() -> None:
    capped = problem(caps=Caps(max_received_copies=1.2))
    assert capped.limits_received
    assert capped.layer_prices(1).max_receive == pytest.approx(1.2 * 10 / 4)


def test_draws_are_unknown_where_sglang_draws_and_homes_are_not_given() -> None:
    caution = np.array([0.25, 0.5])
    drawn = problem(replica_choice="sglang-static", caution=caution)
    assert drawn.has_unknown_draws
    assert drawn.layer_prices(1).has_unknown_draws
    assert drawn.layer_prices(1).caution == 0.5
    assert not problem(replica_choice="sglang-static").has_unknown_draws
    other = problem(replica_choice="hash", caution=caution)
    assert not other.has_unknown_draws
    assert not other.layer_prices(0).has_unknown_draws
    given = problem(policy="given", replica_choice="sglang-static", caution=caution)
    assert not given.layer_prices(0).has_unknown_draws
    assert given.layer_prices(0).caution == 0.25


def test_a_sample_is_of_whole_sequences_and_no_larger_than_it_must_be(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=200, num_sequences=10)
    assert sample_sequences(chunk, 200, 0) is chunk
    lengths = np.bincount(chunk.sequence_ids)
    drawn = set()
    for seed in range(8):
        sample = sample_sequences(chunk, 70, seed)
        ids = np.unique(sample.sequence_ids)
        drawn.add(tuple(ids))
        assert sample.num_tokens == lengths[ids].sum()
        assert sample.num_tokens - lengths[ids].max() < 70 <= sample.num_tokens
    assert len(drawn) > 1
    # Exactly as many as the first sequence has: it is enough.
    first = sample_sequences(chunk, 1, 5)
    assert sample_sequences(chunk, first.num_tokens, 5).num_tokens == first.num_tokens
