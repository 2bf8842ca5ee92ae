"""Traffic and balance: worked by hand, and against the definitions in plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_oracle import plain_simulate

from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.simulation import simulate
from placer.table import build_table
from placer.trace import Chunk
from tests.simulation.dyadic import dyadic


def chunk_of(experts, sequence_ids, token_ids=None):
    """A chunk from experts[layer][token][place]."""
    sequence_ids = np.asarray(sequence_ids, dtype=np.int32)
    return Chunk(
        experts=tuple(np.asarray(layer, dtype=np.uint8) for layer in experts),
        sequence_ids=sequence_ids,
        positions=np.zeros(len(sequence_ids), dtype=np.int32),
        token_ids=None if token_ids is None else np.asarray(token_ids, dtype=np.int32),
    )


def placement_of(rows, num_ranks, num_nodes=1):
    """A placement from physical_to_logical_map."""
    return Placement(
        physical_to_logical_map=tuple(np.asarray(row, dtype=np.int64) for row in rows),
        num_experts=tuple(max(row) + 1 for row in rows),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


def test_two_ranks_by_hand():
    """Two sequences at home on ranks 0 and 1; experts 0, 1 on rank 0 and 2, 3 on rank 1."""
    tokens = chunk_of(
        [[[0, 1], [0, 2], [3, 2]], [[2, 3], [1, 3], [0, 3]]], sequence_ids=[4, 4, 9]
    )
    metrics = simulate(contiguous((4, 4), 2), tokens)
    # fixed homes 0, 0, 1. Layer 0: ranks {0}, {0,1}, {1}: local pairs 2+1+2.
    # Layer 1: ranks {1}, {0,1}, {0,1}: local pairs 0+1+1. Copies: 0+1+0 and 1+1+1.
    fixed = metrics["fixed"]
    assert fixed.local_activation_rate == pytest.approx(7 / 12)
    assert fixed.remote_pairs_per_token == pytest.approx(5 / 6)
    assert fixed.remote_rank_copies_per_token == pytest.approx(4 / 6)
    assert fixed.combine_rank_copies_per_token == pytest.approx(4 / 6)
    assert fixed.crossing_rank_copies_per_token == 0
    assert fixed.remote_node_copies_per_token == 0
    # Pairs per rank: layer 0 (3, 3), layer 1 (2, 4). Homes: 2 tokens of 3 on rank 0.
    assert fixed.load_imbalance_mean == pytest.approx((1 + 4 / 3) / 2)
    assert fixed.load_imbalance_max == pytest.approx(4 / 3)
    assert fixed.straggler_mean == pytest.approx((1 + 4 / 3) / 2)
    assert fixed.home_imbalance_max == pytest.approx(2 / 1.5)
    # Received, layer 0: rank 1 once; layer 1: rank 1 twice (tokens 0, 1). x 2 ranks / 3.
    assert fixed.bottleneck_rank_copies_per_token == pytest.approx((2 / 3 + 4 / 3) / 2)
    # follow: homes 0, 0, 1, then the majority ranks of layer 0: 0, 0 (tie, expert 0 is
    # listed first), 1. Back to the majority ranks of layer 1: 1, 0, 0.
    follow = metrics["follow"]
    assert follow.local_activation_rate == pytest.approx(7 / 12)
    assert follow.combine_rank_copies_per_token == pytest.approx((1 + 2) / 6)
    # oracle: the majority rank itself: 2+1+2 and 2+1+1 pairs.
    assert metrics["oracle"].local_activation_rate == pytest.approx(9 / 12)


def test_two_nodes_count_what_crosses():
    """Four ranks on two nodes, one expert each; the only token is at home on rank 0."""
    metrics = simulate(contiguous((4,), 4, 2), chunk_of([[[0, 1, 2, 3]]], [0]))["fixed"]
    assert metrics.remote_rank_copies_per_token == 3
    assert metrics.crossing_rank_copies_per_token == 2
    assert metrics.remote_node_copies_per_token == 1


def test_local_first_takes_the_nearest_copy_and_turns_among_equals():
    """Expert 0 on ranks 1, 2, 3 of two nodes: home, then the home's node, then any."""
    placed = placement_of([[1, 2, 0, 3, 0, 4, 0, 5]], num_ranks=4, num_nodes=2)
    homes = [0, 1, 2, 3]
    tokens = chunk_of([[[0, 5]] * 4], sequence_ids=homes)
    fixed = simulate(placed, tokens, replica_choice="local-first")["fixed"]
    # Expert 0 is served on rank 1 for home 0, and at home elsewhere; 5 is on rank 3.
    assert fixed.local_activation_rate == pytest.approx((0 + 1 + 1 + 2) / 8)
    one_far = placement_of([[1, 2, 3, 4, 0, 5, 0, 6]], num_ranks=4, num_nodes=2)
    far = chunk_of([[[0]] * 4], [0, 0, 0, 0])
    both = simulate(one_far, far, replica_choice="local-first")["fixed"]
    # Copies on ranks 2 and 3, both far from rank 0: tokens 0, 2 and 1, 3 take turns.
    assert both.load_imbalance_max == pytest.approx(2 / 1)
    assert both.bottleneck_rank_copies_per_token == pytest.approx(2 * 4 / 4)


def test_batches_take_one_token_of_each_sequence_in_turn():
    """Sequences of one expert each: in turn, a batch of two is even; in order it is not."""
    tokens = chunk_of([[[0], [0], [1], [1]]], sequence_ids=[0, 0, 1, 1])
    placed = contiguous((2,), 2)
    assert simulate(placed, tokens, batch_size=2)["fixed"].straggler_mean == 1
    assert simulate(placed, tokens, batch_size=1)["fixed"].straggler_mean == 2


def test_a_last_batch_that_is_not_full_has_no_straggler():
    tokens = chunk_of([[[0], [1], [0]]], sequence_ids=[0, 1, 2])
    metrics = simulate(contiguous((2,), 2), tokens, batch_size=2)["fixed"]
    assert metrics.straggler_mean == 1
    assert metrics.load_imbalance_max == pytest.approx(2 / 1.5)


def test_rounding_happens_only_in_the_output():
    tokens = chunk_of([[[0], [1], [0]]], sequence_ids=[0, 0, 0])
    metrics = simulate(contiguous((2,), 2), tokens)["fixed"]
    assert metrics.local_activation_rate == 2 / 3
    assert metrics.to_json()["local_activation_rate"] == 0.66667


TOPOLOGIES = [(1, 1), (2, 1), (4, 1), (4, 2), (6, 3)]


@st.composite
def problems(draw, topologies=TOPOLOGIES, most_used=4, most_spare=2):
    """Small traces and placements with replicas, nodes and layers of unequal size.

    ``topologies`` are (ranks, nodes). In its slots each rank has experts of its own first,
    then up to ``most_spare`` copies of others.
    """
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    num_ranks, num_nodes = draw(st.sampled_from(topologies))
    top_k = draw(st.integers(1, most_used))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        size = num_ranks * (-(-top_k // num_ranks) + int(rng.integers(0, 3)))
        own = rng.permutation(size).reshape(num_ranks, -1)
        spare = min(int(rng.integers(0, most_spare + 1)), size - own.shape[1])
        more = [rng.choice(np.setdiff1d(range(size), r), spare, replace=False) for r in own]
        rows.append(np.hstack([own, np.array(more, dtype=np.int64)]).ravel().tolist())
    lengths = rng.integers(1, 6, draw(st.integers(1, 7)))
    num_tokens = int(lengths.sum())
    experts = [
        [rng.permutation(max(row) + 1)[:top_k] for _ in range(num_tokens)] for row in rows
    ]
    sequence_ids = np.repeat(np.sort(rng.permutation(20)[: len(lengths)]), lengths)
    token_ids = rng.integers(-1, 6, num_tokens)
    return (
        placement_of(rows, num_ranks, num_nodes),
        chunk_of(experts, sequence_ids, token_ids),
        draw(st.integers(1, 12)),
        rng,
    )


def assert_same(metrics, expected):
    assert set(metrics) == set(expected)
    for policy, values in expected.items():
        for name, value in values.items():
            found = getattr(metrics[policy], name)
            assert found == pytest.approx(value, abs=1e-9), (policy, name)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["local-first", "hash", "cover"]))
def test_agrees_with_the_definitions(problem, choice):
    placement, tokens, batch_size, _ = problem
    assert_same(
        simulate(placement, tokens, batch_size=batch_size, replica_choice=choice),
        plain_simulate(placement, tokens, batch_size, choice=choice),
    )


@settings(max_examples=30, deadline=None)
@given(problems(topologies=[(2, 1), (4, 1)], most_used=2))
def test_a_cover_of_two_experts_visits_no_more_ranks_than_the_nearest_copies(problem):
    """On one node: with at most two ranks beyond home, a greedy cover is the best one."""
    placement, tokens, batch_size, _ = problem
    nearest, cover = (
        simulate(placement, tokens, batch_size=batch_size, replica_choice=choice)["fixed"]
        for choice in ("local-first", "cover")
    )
    assert (
        cover.remote_rank_copies_per_token <= nearest.remote_rank_copies_per_token + 1e-12
    )


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
def test_agrees_with_the_definitions_under_a_table(
    problem, lookback, scores, combined, ids
):
    """The table is of other tokens, so that unknown and unseen ids occur."""
    placement, tokens, batch_size, rng = problem
    profile = tokens.select(rng.random(tokens.num_tokens) < 0.7)
    if profile.num_tokens == 0 or profile.token_ids.max() < 0:
        return
    table = build_table(
        placement,
        profile,
        vocab_size=int(profile.token_ids.max()) + 1,
        lookback=lookback,
        with_token_score=scores,
        with_combined=combined,
        replica_choice="local-first",
    )
    if combined:
        table = dyadic(table)
    judged = tokens if ids else chunk_of(tokens.experts, tokens.sequence_ids)
    assert_same(
        simulate(
            placement,
            judged,
            batch_size=batch_size,
            table=table,
            replica_choice="local-first",
        ),
        plain_simulate(placement, judged, batch_size, table),
    )


@settings(max_examples=100, deadline=None)
@given(problems())
def test_no_home_beats_the_oracle_and_replicas_never_hurt_it(problem):
    placement, tokens, batch_size, _ = problem
    num_ranks = placement.num_ranks
    own = [
        row.reshape(num_ranks, -1)[:, : (row.max() + 1) // num_ranks].ravel().tolist()
        for row in placement.physical_to_logical_map
    ]
    alone = simulate(placement_of(own, num_ranks), tokens)["oracle"].local_activation_rate
    metrics = simulate(
        placement, tokens, batch_size=batch_size, replica_choice="local-first"
    )
    best = metrics["oracle"].local_activation_rate
    assert best >= metrics["fixed"].local_activation_rate - 1e-12
    assert best >= metrics["follow"].local_activation_rate - 1e-12
    assert best >= alone - 1e-12


@settings(max_examples=30, deadline=None)
@given(problems(most_spare=0))
def test_without_replicas_fixed_pairs_depend_on_homes_only_in_the_mean(problem):
    """Over all rotations of the homes, k (1 - 1/R) pairs are remote, whatever the plan."""
    placement, tokens, _, _ = problem
    num_ranks, top_k = placement.num_ranks, tokens.experts[0].shape[1]
    total = 0.0
    for shift in range(num_ranks):
        rows = [
            np.roll(r, shift * (len(r) // num_ranks))
            for r in placement.physical_to_logical_map
        ]
        turned = placement_of([row.tolist() for row in rows], num_ranks)
        total += simulate(turned, tokens)["fixed"].remote_pairs_per_token
    assert total / num_ranks == pytest.approx(top_k * (1 - 1 / num_ranks))


def test_tokens_of_another_model_are_refused():
    tokens = chunk_of([[[0, 5]]], sequence_ids=[0])
    with pytest.raises(PlacerError, match=r"expert id 5 is outside 0\.\.3") as error:
        simulate(contiguous((4,), 2), tokens)
    assert "placer inspect PLAN" in error.value.hint
    with pytest.raises(
        PlacerError, match="1 MoE layers were recorded, but the plan places 2"
    ):
        simulate(contiguous((8, 8), 2), tokens)


def test_a_table_for_other_ranks_is_refused():
    tokens = chunk_of([[[0, 3]]], sequence_ids=[0], token_ids=[0])
    table = build_table(contiguous((4,), 2), tokens, vocab_size=1)
    with pytest.raises(PlacerError, match="table is for 2 ranks, the plan has 4") as error:
        simulate(contiguous((4,), 4), tokens, table=table)
    assert "placer tables PLAN TRACE --out TABLE" in error.value.hint


def test_copies_that_nothing_chooses_among_are_refused():
    placed = placement_of([[0, 1, 0, 2]], num_ranks=2)
    with pytest.raises(UsageError, match="the replica choice is unknown") as error:
        simulate(placed, chunk_of([[[0, 2]]], sequence_ids=[0]))
    assert "local-first, sglang-static, hash, cover" in error.value.hint


def test_no_token_and_no_batch_are_refused():
    tokens = chunk_of([[[0, 3]]], sequence_ids=[0])
    with pytest.raises(UsageError, match="at least one token, got batch_size 0"):
        simulate(contiguous((4,), 2), tokens, batch_size=0)
    with pytest.raises(PlacerError, match="no token is left"):
        simulate(contiguous((4,), 2), tokens.select(np.zeros(1, dtype=bool)))
