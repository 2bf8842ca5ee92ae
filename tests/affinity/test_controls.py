"""Each control keeps what it says it keeps and destroys the rest."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity import count_affinity
from placer.affinity.controls import CONTROLS, blocks
from placer.affinity.information import mutual_information
from placer.model import ModelSpec
from placer.trace import Chunk

MODEL = ModelSpec(num_experts=(8, 8, 8), top_k=2)


def information(chunk: Chunk) -> float:
    tables = count_affinity([chunk], MODEL, {}).transition
    return float(np.mean([mutual_information(table) for table in tables]))


@pytest.mark.parametrize("name", CONTROLS)
def test_load_and_ids_stay_valid_and_follow_the_seed(
    make_chunk: Callable[..., Chunk], name: str
) -> None:
    chunk = make_chunk(num_tokens=401)
    changed = CONTROLS[name](chunk, 3)
    changed.require_within(MODEL)
    for one, other in zip(chunk.experts, changed.experts, strict=True):
        assert (np.bincount(one.ravel()) == np.bincount(other.ravel())).all()
        assert (one != other).any()
        assert one.dtype == other.dtype
    assert changed.token_ids is chunk.token_ids
    again, another = CONTROLS[name](chunk, 3), CONTROLS[name](chunk, 4)
    assert (again.experts[0] == changed.experts[0]).all()
    assert (another.experts[0] != changed.experts[0]).any()


@pytest.mark.parametrize("name", ["within-sequence", "across-tokens"])
def test_shuffles_keep_coactivation_and_destroy_links(
    make_chunk: Callable[..., Chunk], name: str
) -> None:
    chunk = make_chunk(num_tokens=4000)
    changed = CONTROLS[name](chunk, 0)
    before, after = (count_affinity([c], MODEL, {}) for c in (chunk, changed))
    for one, other in zip(before.coactivation, after.coactivation, strict=True):
        assert one.tolist() == other.tolist()
    assert information(changed) < information(chunk) / 5


def test_shuffle_within_sequences_keeps_the_experts_of_each_sequence(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk()
    changed = CONTROLS["within-sequence"](chunk, 0)
    for sequence in np.unique(chunk.sequence_ids):
        rows = chunk.sequence_ids == sequence
        for one, other in zip(chunk.experts, changed.experts, strict=True):
            before, after = (Counter(map(tuple, x[rows].tolist())) for x in (one, other))
            assert before == after


def test_weights_travel_with_their_experts(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk()
    labelled = replace(chunk, weights=tuple(x.astype(np.float16) for x in chunk.experts))
    for name in ("within-sequence", "across-tokens"):
        changed = CONTROLS[name](labelled, 0)
        for ids, weights in zip(changed.experts, changed.weights, strict=True):
            assert (ids == weights).all()
    assert CONTROLS["skew-only"](labelled, 0).weights is None


def test_trades_leave_the_coactivation_of_skew_alone() -> None:
    """Experts that come only as twins (0 1, 2 3, 4 5, 6 7) end up in every combination."""
    twins = np.random.default_rng(0).integers(4, size=8000)[:, None] * 2 + np.arange(2)
    chunk = Chunk(
        experts=(twins.astype(np.uint8),),
        sequence_ids=np.zeros(8000, np.int32),
        positions=np.arange(8000, dtype=np.int32),
    )
    changed = CONTROLS["skew-only"](chunk, 0)
    pairs = count_affinity(
        [changed], ModelSpec(num_experts=(8,), top_k=2), {}
    ).coactivation[0]
    apart = pairs[~np.eye(8, dtype=bool)]
    # Two of 8 experts without replacement: each of the 28 pairs at 1/28 of the tokens.
    assert apart.min() > 8000 / 28 * 0.7
    assert apart.max() < 8000 / 28 * 1.3


@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(0, 30), top_k=st.integers(1, 5), seed=st.integers(0, 99))
def test_trades_keep_rows_distinct_for_any_shape(
    num_tokens: int, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_tokens, 5)), axis=1)[:, :top_k].astype(np.uint8)
    chunk = Chunk(
        experts=(ids,),
        sequence_ids=np.zeros(num_tokens, np.int32),
        positions=np.arange(num_tokens, dtype=np.int32),
    )
    changed = CONTROLS["skew-only"](chunk, seed)
    changed.require_within(ModelSpec(num_experts=(5,), top_k=top_k))
    assert (np.bincount(ids.ravel()) == np.bincount(changed.experts[0].ravel())).all()


def test_blocks_join_chunks_up_to_a_size(make_chunk: Callable[..., Chunk]) -> None:
    parts = [make_chunk(num_tokens=n, num_sequences=1) for n in (30, 30, 30, 30, 10)]
    assert [block.num_tokens for block in blocks(parts, 50)] == [60, 60, 10]
