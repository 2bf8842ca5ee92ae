"""The runtime's rule: T or A, equal slices, and homes of whole requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.serving.homes import Batches
from placer.table.lookup import LayerTable, equal_homes, known_ids, request_homes


def layer_table(token, history, lookback=1, num_ranks=3):
    """T and A as lists of (rank, confidence)."""
    return LayerTable(
        token_rank=np.array([rank for rank, _ in token], dtype=np.uint8),
        token_confidence=np.array([sure for _, sure in token], dtype=np.float16),
        history_rank=np.array([rank for rank, _ in history], dtype=np.uint8),
        history_confidence=np.array([sure for _, sure in history], dtype=np.float16),
        num_ranks=num_ranks,
        lookback=lookback,
    )


def test_the_more_confident_table_names_the_home_and_a_tie_goes_to_t():
    rows = layer_table([(0, 0.5), (1, 0.75)], [(2, 0.5), (2, 0.625), (2, 0.875)])
    ids = np.array([0, 0, 1, 1, -1])
    past = [np.array([0, 1, 1, 2, 0], dtype=np.uint8)]
    fixed = np.array([1, 1, 1, 1, 1], dtype=np.uint8)
    home, confidence = rows.homes(ids, past, fixed)
    assert home.tolist() == [0, 2, 1, 2, 2]
    assert confidence.tolist() == [0.5, 0.625, 0.75, 0.875, 0.5]


def test_without_history_an_unknown_token_stays_at_its_fixed_home():
    rows = layer_table([(0, 0.5)], [(2, 0.9)] * 3)
    home, confidence = rows.homes(np.array([0, -1]), [], np.array([1, 1], dtype=np.uint8))
    assert home.tolist() == [0, 1]
    assert confidence.tolist() == [0.5, -1]


def test_lookback_zero_never_asks_the_history():
    rows = layer_table([(0, 0.5)], [(2, 1.0)], lookback=0)
    past = [np.array([1], dtype=np.uint8)]
    home, _ = rows.homes(np.array([0]), past, np.array([1], dtype=np.uint8))
    assert home.tolist() == [0]


def test_ids_without_a_row_are_unknown():
    ids = np.array([-1, 0, 4, 5], dtype=np.int32)
    assert known_ids(ids, 4, 5).tolist() == [-1, 0, 4, -1]
    assert known_ids(None, 2, 5).tolist() == [-1, -1]


def one_batch(num_tokens):
    return Batches.of(np.arange(num_tokens), num_tokens)


def test_the_surest_tokens_keep_their_home_and_the_rest_fill_up_in_order():
    """Five tokens on two ranks: rank 0 has three slots, rank 1 two."""
    home = np.array([1, 1, 1, 1, 1], dtype=np.uint8)
    sure = np.array([0.2, 0.9, 0.5, 0.5, 0.1], dtype=np.float32)
    assert equal_homes(home, sure, 2, one_batch(5)).tolist() == [0, 1, 1, 0, 0]


def test_second_choices_go_to_the_best_score_first():
    """Tokens 1, 2 and 3 must leave rank 0; rank 1 has two slots, rank 2 one."""
    home = np.zeros(6, dtype=np.uint8)
    home[4:] = [2, 0]
    sure = np.array([0.9, 0.3, 0.3, 0.3, 0.3, 0.8], dtype=np.float32)
    score = np.zeros((6, 3), dtype=np.float32)
    score[1] = [0.3, 0.1, 0.2]
    score[2] = [0.5, 0.1, 0.4]
    score[3] = [0.4, 0.0, 0.2]
    found = equal_homes(home, sure, 3, one_batch(6), score)
    assert found.tolist() == [0, 1, 2, 1, 2, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 9),
    st.booleans(),
)
def test_every_rank_gets_equally_many_tokens_of_each_batch(
    seed, num_ranks, batch_size, scored
):
    rng = np.random.default_rng(seed)
    num_tokens = int(rng.integers(1, 30))
    batches = Batches.of(np.sort(rng.integers(0, 5, num_tokens)), batch_size)
    found = equal_homes(
        rng.integers(num_ranks, size=num_tokens).astype(np.uint8),
        rng.random(num_tokens).astype(np.float32).round(1),
        num_ranks,
        batches,
        rng.random((num_tokens, num_ranks)).astype(np.float32) if scored else None,
    )
    for batch in range(batches.num_batches):
        counts = np.bincount(found[batches.batch_of_token == batch], minlength=num_ranks)
        assert counts.max() - counts.min() <= 1


def test_requests_take_their_best_rank_until_a_turn_is_full():
    """All three prefer rank 0; the second and third take what the turn has left."""
    score = np.array([[3, 2, 1], [0, 0, 9]], dtype=np.float16)
    sequence_ids = np.array([2, 2, 5, 7, 8])
    token_ids = np.array([0, 0, 0, 0, 1])
    assert request_homes(score, sequence_ids, token_ids, 3).tolist() == [0, 0, 1, 2, 2]


def test_a_request_is_judged_by_its_first_64_tokens():
    score = np.array([[1, 0], [0, 9]], dtype=np.float16)
    token_ids = np.array([0] * 64 + [1] * 64)
    homes = request_homes(score, np.zeros(128, dtype=np.int64), token_ids, 2)
    assert homes.tolist() == [0] * 128


def test_a_request_of_unknown_tokens_takes_the_first_free_rank():
    score = np.array([[0, 1]], dtype=np.float16)
    homes = request_homes(score, np.array([0, 1]), np.array([-1, 0]), 2)
    assert homes.tolist() == [0, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_cover_every_token_once(batch_size):
    batches = Batches.of(np.array([0, 0, 0, 3, 3, 4, 9]), batch_size)
    assert sorted(batches.order) == list(range(7))
    assert batches.batch_of_token[batches.order].tolist() == [
        n // min(batch_size, 7) for n in range(7)
    ]
