"""Building a table: arithmetic by hand, and against counting in plain loops."""

import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.serving.replica_choice import sglang_static_ranks
from placer.simulation import simulate
from placer.table import build_table
from placer.table.build import default_lookback
from placer.trace import Chunk


def chunk_of(experts, token_ids, sequence_ids=None):
    """A chunk from experts[layer][token][place]; one sequence unless told otherwise."""
    if sequence_ids is None:
        sequence_ids = [0] * len(token_ids)
    return Chunk(
        experts=tuple(np.asarray(layer, dtype=np.uint8) for layer in experts),
        sequence_ids=np.asarray(sequence_ids, dtype=np.int32),
        positions=np.zeros(len(token_ids), dtype=np.int32),
        token_ids=np.asarray(token_ids, dtype=np.int32),
    )


def test_token_rows_by_hand():
    """Experts 0, 1 on rank 0 and 2, 3 on rank 1; shrinkage of one token, top-2."""
    tokens = chunk_of([[[0, 1], [0, 2], [2, 3], [3, 2]]], token_ids=[0, 0, 1, -1])
    table = build_table(contiguous((4,), 2), tokens, vocab_size=3, shrinkage=1.0)
    # Pairs on rank 0 over all tokens: 2+1+0+0 of 8, so the prior is (3/8, 5/8).
    # Id 0: 3 of 4 pairs on rank 0: (3 + 2 x 3/8) / (4 + 2) = 0.625.
    # Id 1: 2 of 2 pairs on rank 1: (2 + 2 x 5/8) / (2 + 2) = 0.8125.
    # Id 2 was never seen: the prior, rank 1 at 0.625.
    assert table.token_rank.tolist() == [[0, 1, 1]]
    assert table.token_confidence.tolist() == [[0.625, 0.8125, 0.625]]
    assert table.request_score.tolist() == [[0, 0]] * 3  # one sequence is no choice
    assert table.expert_rank.tolist() == [[0, 0, 1, 1]]
    assert table.token_score is None


def test_a_replica_serves_at_both_homes():
    """Expert 0 on both ranks: either home serves it, so rates add up to more than 1."""
    placement = Placement(
        physical_to_logical_map=(np.array([0, 1, 0, 2]),),
        num_experts=(3,),
        num_ranks=2,
    )
    tokens = chunk_of([[[0, 1], [0, 2]]], token_ids=[0, 1])
    table = build_table(
        placement,
        tokens,
        vocab_size=2,
        shrinkage=2.0,
        with_token_score=True,
        replica_choice="local-first",
    )
    # Prior: 3 of 4 pairs each. Id 0: (2 + 4 x 3/4) / (2 + 4), (1 + 3) / 6.
    assert table.token_rank.tolist() == [[0, 1]]
    assert table.token_score[0, 0].tolist() == pytest.approx([5 / 6, 4 / 6], abs=1e-3)


def test_a_layer_without_history_has_the_prior_in_a():
    tokens = chunk_of([[[0], [0], [1], [1]], [[1], [1], [1], [0]]], token_ids=[0, 1, 2, 3])
    table = build_table(contiguous((2, 2), 2), tokens, vocab_size=4, lookback=1)
    # The prior, (1/2, 1/2), whose best is the lower rank.
    assert table.history_rank[0].tolist() == [0, 0]
    assert table.history_confidence[0].tolist() == [0.5, 0.5]


def test_rows_that_decide_are_counted_by_the_tokens_that_take_them():
    """One past layer, after which A is sure: T keeps its rates, A gains weight."""
    past, ids = [[0]] * 20 + [[1]] * 20, list(range(20)) * 2
    tokens = chunk_of([past, past], ids)
    table = build_table(
        contiguous((2, 2), 2), tokens, vocab_size=20, lookback=1, shrinkage=4.0
    )
    # Centred and penalised by 40, a rank's effect is 10/(20 + 40) / 2 for 20 tokens that
    # lead the mean of 1/2 by 1/2: ridge on two columns that are each other's mirror.
    effect = 10 / (20 + 40)
    counted = (20 + 20 * (0.5 + effect)) / (20 + 20)
    # Each id was met once on either rank: 1/2. A leads by that much, and is taken.
    taken = 20 / (1 + np.exp(-(counted - 0.5) / 0.03))
    expected = (taken + 8 * counted) / (taken + 8)
    assert table.history_rank[1].tolist() == [0, 1]
    assert table.history_confidence[1].tolist() == pytest.approx([expected] * 2, abs=1e-3)
    assert table.token_confidence[1].tolist() == pytest.approx([0.5] * 20, abs=1e-3)


def test_the_default_lookback_keeps_few_rows():
    found = {ranks: default_lookback(ranks) for ranks in (2, 4, 8, 16, 64, 128, 256)}
    assert found == {2: 4, 4: 4, 8: 4, 16: 3, 64: 2, 128: 2, 256: 1}


def test_histories_are_indexed_oldest_first_in_base_r():
    """Past ranks 2 then 1 of 3 ranks: index 2 x 3 + 1."""
    tokens = chunk_of([[[2]], [[1]], [[0]]], token_ids=[0])
    table = build_table(contiguous((3,) * 3, 3), tokens, vocab_size=1, lookback=2)
    assert table.history_rank.shape == (3, 9)
    assert table.history_confidence[2, 7] == 1
    assert table.history_rank[2, 7] == 0


@pytest.mark.parametrize("layer_ids", [(0, 1), (5, 6)])
def test_histories_are_those_of_the_copies_that_serve(layer_ids):
    """Expert 0 on ranks 0 and 1, asked for from rank 2: one of them, or both in turn.

    Where it served, the next layer is served on rank 2.
    """
    row = np.array([0, 1, 0, 2, 3, 4])
    placement = Placement(
        physical_to_logical_map=(row,) * 2, num_experts=(5, 5), num_ranks=3
    )
    first = [[4]] * 10 + [[4]] * 10 + [[0]] * 20
    second = [[1]] * 10 + [[2]] * 10 + [[3]] * 20
    tokens = chunk_of([first, second], [0] + [-1] * 39, [0] * 10 + [1] * 10 + [2] * 20)

    def surety(choice):
        table = build_table(
            placement,
            tokens,
            vocab_size=1,
            lookback=1,
            replica_choice=choice,
            layer_ids=layer_ids,
        )
        return table.history_confidence[1, :2]

    drawn = sglang_static_ranks(placement, layer_ids)[0][2, 0]
    surety_drawn = surety("sglang-static")
    assert surety_drawn[drawn] > 0.6
    assert surety_drawn[1 - drawn] == pytest.approx(0.5, abs=0.05), "nobody came from it"
    assert (surety("local-first") > 0.6).all()


def test_layers_of_unequal_size_fill_expert_rank_with_no_rank():
    tokens = chunk_of([[[0]], [[3]]], token_ids=[0])
    table = build_table(contiguous((2, 4), 2), tokens, vocab_size=1)
    assert table.expert_rank.tolist() == [[0, 1, 2, 2], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "padded_dtype"),
    [(255, np.uint8, np.uint8), (256, np.uint8, np.uint16), (257, np.uint16, np.uint16)],
)
def test_ranks_are_stored_in_the_smallest_dtype_that_holds_them(
    num_ranks, dtype, padded_dtype
):
    sizes = (num_ranks, 2 * num_ranks)
    tokens = chunk_of([[[0]], [[1]]], token_ids=[0])
    table = build_table(contiguous(sizes, num_ranks), tokens, vocab_size=1, lookback=1)
    assert table.token_rank.dtype == table.history_rank.dtype == dtype
    assert table.expert_rank.dtype == padded_dtype
    assert table.expert_rank[1, -1] == num_ranks - 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 2.0, 7.0]))
def test_token_rows_agree_with_counting_in_loops(seed, shrinkage):
    rng = np.random.default_rng(seed)
    num_ranks, top_k, vocab_size = 4, 3, 5
    own = rng.permutation(8).reshape(num_ranks, 2)
    extra = [rng.choice(np.setdiff1d(range(8), held), 1) for held in own]
    placement = Placement(
        physical_to_logical_map=(np.hstack([own, extra]).ravel(),),
        num_experts=(8,),
        num_ranks=num_ranks,
    )
    ids = rng.integers(-1, vocab_size - 1, 30)
    ids[0] = 0
    tokens = chunk_of([[rng.permutation(8)[:top_k] for _ in ids]], ids)
    table = build_table(
        placement,
        tokens,
        vocab_size=vocab_size,
        shrinkage=shrinkage,
        with_token_score=True,
        replica_choice="hash",
    )
    holders = defaultdict(set)
    for slot, expert in enumerate(placement.physical_to_logical_map[0]):
        holders[expert].add(slot // 3)
    every = [0] * num_ranks
    of_id = defaultdict(lambda: [0] * num_ranks)
    for token_id, experts in zip(ids.tolist(), tokens.experts[0].tolist(), strict=True):
        for expert in experts:
            for rank in holders[expert]:
                every[rank] += 1
                of_id[token_id][rank] += 1
    prior = [pairs / (top_k * len(ids)) for pairs in every]
    for token_id in range(vocab_size):
        times = ids.tolist().count(token_id)
        rates = [
            (of_id[token_id][r] + shrinkage * top_k * prior[r])
            / (top_k * (times + shrinkage))
            for r in range(num_ranks)
        ]
        stored = table.token_score[0, token_id].astype(float).tolist()
        assert stored == pytest.approx(rates, abs=1e-3)
        assert rates[table.token_rank[0, token_id]] == pytest.approx(max(rates))
        assert table.token_confidence[0, token_id] == np.float16(max(rates))


def test_a_table_beats_chance_on_tokens_that_it_has_not_seen(make_chunk):
    """Routing by token id is learnt: most of what an oracle would have is reached."""
    tokens = make_chunk(num_tokens=3_000, num_sequences=20)
    early = tokens.sequence_ids < 10
    placement = contiguous((8, 8, 8), 4)
    table = build_table(placement, tokens.select(early), vocab_size=50)
    metrics = simulate(placement, tokens.select(~early), table=table)
    assert metrics["fixed"].local_activation_rate == pytest.approx(0.25, abs=0.03)
    assert metrics["token"].local_activation_rate > 0.4
    assert metrics["oracle"].local_activation_rate > metrics["token"].local_activation_rate
    assert metrics["token_equal"].home_imbalance_max == pytest.approx(1, abs=0.01)


def test_a_trace_without_token_ids_is_refused(make_chunk):
    tokens = make_chunk()
    for ids in (None, np.full(tokens.num_tokens, -1, dtype=np.int32)):
        bare = Chunk(
            experts=tokens.experts,
            sequence_ids=tokens.sequence_ids,
            positions=tokens.positions,
            token_ids=ids,
        )
        with pytest.raises(PlacerError, match="no token ids") as error:
            build_table(contiguous((8,) * 3, 4), bare, vocab_size=50)
        assert "placer record MODEL" in error.value.hint


def test_ids_past_the_vocabulary_are_refused(make_chunk):
    with pytest.raises(PlacerError, match="token id 49, but the vocabulary has 49 ids"):
        build_table(contiguous((8,) * 3, 4), make_chunk(), vocab_size=49)


@pytest.mark.parametrize("options", [{"lookback": -1}, {"lookback": 12}])
def test_lookbacks_out_of_range_are_refused(make_chunk, options):
    with pytest.raises(UsageError, match="rows per layer") as error:
        build_table(contiguous((8,) * 3, 4), make_chunk(), vocab_size=50, **options)
    assert "--lookback 2" in error.value.hint


@pytest.mark.parametrize("shrinkage", [0.0, -1.0, float("nan"), float("inf")])
def test_shrinkage_out_of_range_is_refused(make_chunk, shrinkage):
    with pytest.raises(UsageError, match="--shrinkage must be positive"):
        build_table(
            contiguous((8,) * 3, 4), make_chunk(), vocab_size=50, shrinkage=shrinkage
        )


def test_prices_move_the_row_that_loses_least():
    """Ids 0 to 2 prefer rank 0; id 2, half of whose pairs are on rank 1, gives way."""
    chosen = [[0, 1]] * 4 + [[0, 1]] * 2 + [[0, 1], [2, 0]] + [[2, 3]] * 2
    ids = [0] * 4 + [1] * 2 + [2] * 2 + [3] * 2
    options = {"vocab_size": 4, "shrinkage": 0.5, "with_token_score": True}
    tokens = chunk_of([chosen], ids)
    plain = build_table(contiguous((4,), 2), tokens, **options)
    priced = build_table(contiguous((4,), 2), tokens, max_home_imbalance=1.3, **options)
    assert plain.token_rank.tolist() == [[0, 0, 0, 1]]
    assert priced.token_rank.tolist() == [[0, 0, 1, 1]]
    assert np.array_equal(plain.token_score, priced.token_score)
    assert priced.token_confidence[0, 2] == priced.token_score[0, 2, 1]


def test_a_cap_on_the_home_imbalance_holds_on_tokens_not_seen(make_chunk):
    tokens = make_chunk(num_tokens=6_000, num_sequences=20)
    early = tokens.sequence_ids < 10
    placement = contiguous((8, 8, 8), 4)
    plain, priced = (
        simulate(
            placement,
            tokens.select(~early),
            table=build_table(
                placement, tokens.select(early), vocab_size=50, max_home_imbalance=cap
            ),
        )
        for cap in (None, 1.05)
    )
    assert priced["token"].home_imbalance_max < 1.2 < plain["token"].home_imbalance_max
    assert priced["token"].local_activation_rate > 0.35
    assert priced["fixed"] == plain["fixed"]


def test_under_a_cap_ids_never_seen_take_turns(make_chunk):
    tokens = make_chunk()
    table = build_table(
        contiguous((8,) * 3, 4), tokens, vocab_size=58, max_home_imbalance=1.5
    )
    assert table.token_rank[:, 50:].tolist() == [[0, 1, 2, 3] * 2] * 3


def test_a_confidence_is_the_rate_that_tokens_not_seen_have(make_chunk):
    """Reliability: in each fifth of the rows by confidence, the held-out rate is near."""
    tokens = make_chunk(num_tokens=8_000, num_sequences=40)
    early = tokens.sequence_ids < 20
    profile, heldout = tokens.select(early), tokens.select(~early)
    table = build_table(
        contiguous((8,) * 3, 4), profile, vocab_size=50, max_home_imbalance=1.2
    )
    for layer, experts in enumerate(heldout.experts):
        home = table.token_rank[layer, heldout.token_ids]
        promised = table.token_confidence[layer, heldout.token_ids].astype(float)
        served = (experts // 2 == home[:, None]).mean(axis=1)
        for part in np.array_split(np.argsort(promised, kind="stable"), 5):
            assert served[part].mean() == pytest.approx(promised[part].mean(), abs=0.06)


@pytest.mark.parametrize("cap", [1.0, 0.0, float("nan"), float("inf")])
def test_caps_on_the_home_imbalance_out_of_range_are_refused(make_chunk, cap):
    with pytest.raises(UsageError, match="--max-home-imbalance must be above 1"):
        build_table(
            contiguous((8,) * 3, 4), make_chunk(), vocab_size=50, max_home_imbalance=cap
        )


@pytest.mark.parametrize(("combined", "most"), [(False, 2), (True, 4)])
def test_memory_is_a_few_numbers_per_token_and_rank(combined, most):
    """Millions of tokens on many ranks must fit: in units of [T, R] float64."""
    num_tokens, num_ranks = 50_000, 32
    rng = np.random.default_rng(0)
    first = rng.integers(32, size=(3, num_tokens, 1))
    tokens = chunk_of(
        (first + np.array([0, 5, 11])) % 32,
        rng.integers(50, size=num_tokens),
        np.arange(num_tokens) // 100,
    )
    placement = contiguous((32,) * 3, num_ranks)
    tracemalloc.start()
    try:
        build_table(placement, tokens, vocab_size=50, lookback=1, with_combined=combined)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most * 8 * num_tokens * num_ranks
