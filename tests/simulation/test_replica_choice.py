"""Which copy serves under the replica choices of engines."""

from collections import Counter

import numpy as np
import pytest

from placer.plan import Placement
from placer.simulation import simulate
from placer.simulation.homes import Batches
from placer.simulation.replica_choice import Server, hashed_row, sglang_static_ranks
from placer.trace import Chunk


def placement_of(rows, num_experts, num_ranks, num_nodes=1):
    return Placement(
        physical_to_logical_map=tuple(np.asarray(row) for row in rows),
        num_experts=(num_experts,) * len(rows),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


#: Expert 0 on ranks 0, 1, 3 and 5; 1 to 8 once, two or three slots per rank.
SIX_RANKS = [[0, 1, 0, 2, 3, 4, 0, 5, 6, 7, 0, 8]]


def test_static_takes_the_copy_at_home_then_the_first_on_a_node_that_lacks_another():
    """Three nodes of two ranks: node 0 has copies on both ranks, node 1 and 2 on one."""
    (chosen,) = sglang_static_ranks(placement_of(SIX_RANKS, 9, 6, 3))
    assert chosen[:, 0].tolist() == [0, 1, 3, 3, 5, 5]
    assert chosen[:, 4].tolist() == [2] * 6


def test_static_shares_the_homes_evenly_where_a_node_holds_every_copy():
    """On one node the node narrows nothing: ranks 2 and 4 draw, two of four copies."""
    (chosen,) = sglang_static_ranks(placement_of(SIX_RANKS, 9, 6))
    assert chosen[[0, 1, 3, 5], 0].tolist() == [0, 1, 3, 5]
    assert set(chosen[[2, 4], 0]) <= {0, 1, 3, 5}
    assert len(set(chosen[[2, 4], 0])) == 2, "a copy serves one more home at most"


#: Eight ranks of three slots, two layers of twelve experts, each expert on two ranks.
EIGHT_RANKS = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 2, 1, 4, 3, 6, 5, 8, 7, 9, 11, 10],
    [11, 9, 3, 8, 0, 10, 5, 1, 7, 4, 2, 6, 9, 11, 3, 8, 0, 1, 5, 10, 7, 4, 2, 6],
]
#: What SGLang 0.5.23's own functions (``srt/eplb/expert_location.py``) answer for it on one
#: and on four nodes: per layer and home, a digit per expert: the rank that serves.
SGLANG_ANSWERS = {
    1: """000556562733 444111266777 404156222733 000511522333
          444111226377 000556562377 040556266333 444116222777
          527076321010 157476721010 527032325064 153432321410
          553436765464 553432365464 127036365460 127476721014""",
    4: """000111266777 000111526337 044556222333 404116222333
          444556522373 444551562733 400156266777 040516266777
          127032361010 157036721010 123432321014 523432321460
          553436365464 557436725414 127476761464 527476765060""",
}


@pytest.mark.parametrize("num_nodes", SGLANG_ANSWERS)
def test_static_is_what_sglang_answers(num_nodes):
    chosen = sglang_static_ranks(placement_of(EIGHT_RANKS, 12, 8, num_nodes))
    digits = ["".join(map(str, home)) for layer in chosen for home in layer.tolist()]
    assert digits == SGLANG_ANSWERS[num_nodes].split()


def test_static_serves_every_pair_of_a_home_from_one_rank():
    placement = placement_of([SIX_RANKS[0]], 9, 6)
    tokens = np.zeros((1, 50), dtype=np.int64)
    server = Server(placement, "sglang-static", Batches.of(np.zeros(50), 50))
    (serving,) = server.layers()
    ranks = server.ranks(serving, tokens, np.full(50, 2, dtype=np.uint8))
    assert len(np.unique(ranks)) == 1


def test_the_hash_is_knuths():
    """Row 3: 3 x 2654435769 = 7963307307, less 2^32 = 4294967296."""
    assert hashed_row(np.array([0, 1, 3])).tolist() == [0, 2654435769, 3668340011]


def test_rows_count_the_tokens_of_a_batch_and_home():
    """Two sequences in turn, batches of three: tokens 0, 2, 1 and 3, 4."""
    batches = Batches.of(np.array([0, 0, 1, 1, 1]), 3)
    assert batches.order.tolist() == [0, 2, 1, 3, 4]
    home = np.array([0, 0, 0, 1, 1], dtype=np.uint8)
    assert batches.row_at_home(home, 2).tolist() == [0, 2, 1, 0, 1]


def test_the_hash_spreads_over_the_copies_whatever_the_home():
    """One expert on both of two ranks, the sequence at home on rank 0: half goes away."""
    placement = placement_of([[0, 1, 0, 2]], 3, 2)
    tokens = Chunk(
        experts=(np.zeros((1000, 1), dtype=np.uint8),),
        sequence_ids=np.zeros(1000, dtype=np.int32),
        positions=np.arange(1000, dtype=np.int32),
    )
    local, hashed = (
        simulate(placement, tokens, replica_choice=choice)["fixed"]
        for choice in ("local-first", "hash")
    )
    assert local.local_activation_rate == 1
    assert hashed.local_activation_rate == pytest.approx(0.5, abs=0.05)


def test_cover_prefers_a_rank_that_is_visited_anyway():
    """Expert 2 is on rank 2 alone and expert 0 on ranks 1 and 2: both go to rank 2."""
    placement = placement_of([[1, 3, 0, 4, 0, 2]], 5, 3)
    server = Server(placement, "cover", Batches.of(np.zeros(2), 2))
    (serving,) = server.layers()
    chosen = np.array([[0, 0], [2, 1]])
    assert server.ranks(serving, chosen, np.zeros(2, dtype=np.uint8)).tolist() == [
        [2, 2],
        [2, 0],
    ]


def test_cover_lets_one_rank_join_for_many_pairs():
    """Experts 0 and 1 share rank 2, and have another copy each on ranks 1 and 3."""
    placement = placement_of([[2, 3, 0, 4, 0, 1, 1, 5]], 6, 4)
    server = Server(placement, "cover", Batches.of(np.zeros(3), 3))
    (serving,) = server.layers()
    chosen = np.array([[0] * 3, [1] * 3])
    served = server.ranks(serving, chosen, np.zeros(3, dtype=np.uint8))
    assert (served == 2).all()


def test_without_replicas_all_choices_agree():
    placement = placement_of([range(8), range(8)], 8, 4)
    rng = np.random.default_rng(0)
    experts = tuple(
        np.stack([rng.permutation(8)[:2] for _ in range(60)]).astype(np.uint8)
        for _ in range(2)
    )
    ids = np.sort(rng.integers(5, size=60)).astype(np.int32)
    tokens = Chunk(experts=experts, sequence_ids=ids, positions=np.zeros(60, np.int32))
    results = [
        simulate(placement, tokens, replica_choice=choice)
        for choice in ("local-first", "sglang-static", "hash", "cover")
    ]
    assert all(result == results[0] for result in results)


def test_static_loads_are_those_of_its_table():
    """All homes equally often: a rank's pairs are the homes that the table sends to it."""
    placement = placement_of(EIGHT_RANKS[:1], 12, 8)
    (chosen,) = sglang_static_ranks(placement)
    tokens = Chunk(
        experts=(np.full((8, 1), 5, dtype=np.uint8),),
        sequence_ids=np.arange(8, dtype=np.int32),
        positions=np.zeros(8, dtype=np.int32),
    )
    found = simulate(placement, tokens, replica_choice="sglang-static")["fixed"]
    busiest = max(Counter(chosen[:, 5].tolist()).values())
    assert found.load_imbalance_max == busiest
