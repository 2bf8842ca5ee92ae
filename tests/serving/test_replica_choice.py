"""Which replica serves under the replica choices of engines."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.model import ModelSpec
from placer.placement import Placement
from placer.runtime_map.maps import export_map
from placer.serving.homes import Batches
from placer.serving.replica_choice import Server, hashed_row, sglang_static_ranks
from placer.simulation import simulate
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
    """Three nodes of two ranks: node 0 has replicas on both ranks, node 1 and 2 on one."""
    (chosen,) = sglang_static_ranks(placement_of(SIX_RANKS, 9, 6, 3))
    assert chosen[:, 0].tolist() == [0, 1, 3, 3, 5, 5]
    assert chosen[:, 4].tolist() == [2] * 6


def test_static_shares_the_homes_evenly_where_a_node_holds_every_copy():
    """On one node the node narrows nothing: ranks 2 and 4 draw, two of four copies."""
    (chosen,) = sglang_static_ranks(placement_of(SIX_RANKS, 9, 6))
    assert chosen[[0, 1, 3, 5], 0].tolist() == [0, 1, 3, 5]
    assert set(chosen[[2, 4], 0]) <= {0, 1, 3, 5}
    assert len(set(chosen[[2, 4], 0])) == 2, "a replica serves one more home at most"


#: Eight ranks of three slots, two layers of twelve experts, each expert on two ranks. In
#: the first, every expert has a copy on either of two nodes; in the third, on one alone.
EIGHT_RANKS = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 2, 1, 4, 3, 6, 5, 8, 7, 9, 11, 10],
    [11, 9, 3, 8, 0, 10, 5, 1, 7, 4, 2, 6, 9, 11, 3, 8, 0, 1, 5, 10, 7, 4, 2, 6],
    [0, 1, 2, 3, 4, 5, 0, 2, 4, 1, 3, 5, 6, 7, 8, 9, 10, 11, 6, 8, 10, 7, 9, 11],
]
#: By (first layer, second layer, nodes, the model's numbers of these layers): per layer and
#: home, a digit per expert, the rank that serves it. SGLang 0.5.23 answered so: its own
#: ``ExpertLocationMetadata.init_by_mapping`` (``srt/eplb/expert_location.py``) for the map
#: of ``placer export sglang``, whose rows of dense layers hold experts 0 to 11 twice.
SGLANG_ANSWERS = {
    (0, 1, 1, (0, 1)): """000556562733 444111266777 404156222733 000511522333
                          444111226377 000556562377 040556266333 444116222777
                          527076321010 157476721010 527032325064 153432321410
                          553436765464 553432365464 127036365460 127476721014""",
    (0, 1, 4, (0, 1)): """000111266777 000111526337 044556222333 404116222333
                          444556522373 444551562733 400156266777 040516266777
                          127032361010 157036721010 123432321014 523432321460
                          553436365464 557436725414 127476761464 527476765060""",
    (0, 1, 1, (2, 5)): """000511222737 400111566333 044556222777 040116566333
                          444551562333 440551526777 404116566373 004551262777
                          553036721010 123032321010 127432321010 553432325464
                          123476725464 557076325014 523476365060 157076761464""",
    (0, 1, 4, (2, 5)): """000111522777 000111566377 400556222333 444156222333
                          444551566333 444551522733 044116266777 000516266777
                          123036761010 127076321010 123032321464 123432325410
                          557432325464 557476365414 527076761064 557476761460""",
    (0, 2, 2, (1, 4)): """000111222333 000111222333 000111222333 000111222333
                          444556566777 444556566777 444556566777 444556566777
                          000323674755 232111476767 232123644755 230323446567
                          000311444567 000113476555 030321646565 232113474757""",
    (2, 0, 1, (3, 4)): """000113476765 002111674555 232323446555 232323644767
                          230113444567 032311476555 000111676567 200323674767
                          000111566333 000111526373 444516222737 004151526333
                          444551526773 440551562737 004156266377 440111266777""",
}


@pytest.mark.parametrize("case", SGLANG_ANSWERS)
def test_static_is_what_sglang_answers(case):
    first, second, num_nodes, layer_ids = case
    rows = [EIGHT_RANKS[first], EIGHT_RANKS[second]]
    chosen = sglang_static_ranks(placement_of(rows, 12, 8, num_nodes), layer_ids)
    digits = ["".join(map(str, home)) for layer in chosen for home in layer.tolist()]
    assert digits == SGLANG_ANSWERS[case].split()


def served_by_sglang(rows, num_experts, num_ranks, num_nodes, home):
    """[H][E]: who serves one home, row by row of a whole map, dense layers included.

    As SGLang describes its static choice: the only copy, else that on the same GPU, else
    the first on the same node where other nodes have replicas too. For any other expert the
    ranks without a near copy share the copies fairly: each copy as often as the next, what
    is left over by lot, in random order. One generator with seed 42 serves all rows.
    """
    lot, per_node = random.Random(42), num_ranks // num_nodes

    def near(copies, rank):
        node = [one for one in copies if one // per_node == rank // per_node]
        if len(copies) == 1 or rank in copies:
            return rank if rank in copies else copies[0]
        return node[0] if 0 < len(node) < len(copies) else None

    table = []
    for row in rows:
        served, per_rank = [], len(row) // num_ranks
        for expert in range(num_experts):
            copies = [slot // per_rank for slot, held in enumerate(row) if held == expert]
            if near(copies, home) is not None:
                served.append(near(copies, home))
                continue
            waiting = [one for one in range(num_ranks) if near(copies, one) is None]
            times, left = divmod(len(waiting), len(copies))
            shares = copies * times + lot.sample(copies, k=left)
            lot.shuffle(shares)
            served.append(shares[waiting.index(home)])
        table.append(served)
    return table


@st.composite
def placements_of_some_layers(draw):
    """A placement with redundant experts, and the numbers of its layers in the model."""
    num_nodes = draw(st.sampled_from([1, 1, 2, 3]))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    per_rank = draw(st.integers(2, 4))
    num_experts = num_ranks * per_rank - draw(st.integers(0, (num_ranks - 1) * per_rank))
    num_experts = max(num_experts, per_rank)
    layer_ids = draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def row():
        """Deal experts around, over and over, then rename experts and ranks."""
        dealt = np.arange(num_ranks * per_rank) % num_experts
        ranks = rng.permutation(dealt.reshape(num_ranks, per_rank))
        return rng.permutation(num_experts)[ranks].ravel()

    rows = [row() for _ in layer_ids]
    return placement_of(rows, num_experts, num_ranks, num_nodes), sorted(layer_ids)


@settings(deadline=None)
@given(placements_of_some_layers())
def test_static_draws_for_rows_of_dense_layers_too(case):
    placement, layer_ids = case
    num_experts, num_ranks = placement.num_experts[0], placement.num_ranks
    placed = dict(zip(layer_ids, placement.to_json(), strict=True))
    num_slots = len(placement.physical_to_logical_map[0])
    dense = [slot % num_experts for slot in range(num_slots)]
    rows = [placed.get(layer, dense) for layer in range(9)]
    chosen = sglang_static_ranks(placement, layer_ids)
    for home in range(num_ranks):
        table = served_by_sglang(rows, num_experts, num_ranks, placement.num_nodes, home)
        assert [layer[home].tolist() for layer in chosen] == [table[n] for n in layer_ids]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_static_serves_as_sglang_does_with_the_exported_map(
    tiny_model, write_plan, tmp_path, num_nodes
):
    """Of a model with dense layers 0 and 2: the file itself, all four rows of it."""
    model = ModelSpec.from_checkpoint(tiny_model)
    assert model.layer_ids == (1, 3)
    first, second = (
        [3, 1, 0, 5, 4, 3, 2, 6, 0, 7, 2, 3],
        [0, 1, 2, 0, 3, 4, 0, 5, 6, 0, 7, 1],
    )
    placement = placement_of([first, second], 8, 4, num_nodes)
    export_map("sglang", write_plan(model, placement), tiny_model, tmp_path / "map.json")
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    chosen = sglang_static_ranks(placement, model.layer_ids)
    for home in range(4):
        table = served_by_sglang(rows, 8, 4, num_nodes, home)
        assert [layer[home].tolist() for layer in chosen] == [table[1], table[3]]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_simulate_serves_layers_by_their_numbers_in_the_model(num_nodes):
    """One token at home on each rank asks for all experts of layers 2 and 4."""
    placement = placement_of([EIGHT_RANKS[2], EIGHT_RANKS[0]], 12, 8, num_nodes)
    tokens = Chunk(
        experts=(np.tile(np.arange(12, dtype=np.uint8), (8, 1)),) * 2,
        sequence_ids=np.arange(8, dtype=np.int32),
        positions=np.zeros(8, dtype=np.int32),
    )
    dense = [slot % 12 for slot in range(24)]
    rows = [dense, dense, EIGHT_RANKS[2], dense, EIGHT_RANKS[0]]
    tables = [served_by_sglang(rows, 12, 8, num_nodes, home) for home in range(8)]
    found = simulate(placement, tokens, replica_choice="sglang-static", layer_ids=(2, 4))[
        "fixed"
    ]
    loads = [Counter(rank for table in tables for rank in table[n]) for n in (2, 4)]
    busiest = [max(load.values()) / 12 for load in loads]
    assert found.load_imbalance_mean == pytest.approx(np.mean(busiest))
    visited = [
        len(set(table[n]) - {home}) for home, table in enumerate(tables) for n in (2, 4)
    ]
    assert found.remote_rank_copies_per_token == pytest.approx(np.mean(visited))


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
    """Experts 0 and 1 share rank 2, and have another replica each on ranks 1 and 3."""
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
