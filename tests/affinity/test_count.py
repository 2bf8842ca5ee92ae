"""Counts equal loops written out by hand, whatever the chunking."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity import count_affinity
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.trace import Chunk


def test_counts_equal_hand_written_loops(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk(num_tokens=60, num_experts=(4, 6, 5), top_k=3)
    model = ModelSpec(num_experts=(4, 6, 5), top_k=3)
    found = count_affinity([chunk], model, {}, rows="sequences")

    load = [np.zeros(size, int) for size in model.num_experts]
    transition = [np.zeros((4, 6), int), np.zeros((6, 5), int)]
    coactivation = [np.zeros((size, size), int) for size in model.num_experts]
    token_expert = np.zeros((50, 6), int)
    sequence_expert = np.zeros((8, 6), int)
    for t in range(60):
        for layer in range(3):
            chosen = chunk.experts[layer][t].tolist()
            for i in chosen:
                load[layer][i] += 1
                for j in chosen:
                    coactivation[layer][i, j] += i != j
                if layer < 2:
                    for j in chunk.experts[layer + 1][t].tolist():
                        transition[layer][i, j] += 1
        for i in chunk.experts[1][t].tolist():
            token_expert[chunk.token_ids[t], i] += 1
            sequence_expert[chunk.sequence_ids[t], i] += 1

    for layer in range(3):
        assert found.load[layer].tolist() == load[layer].tolist()
        assert found.coactivation[layer].tolist() == coactivation[layer].tolist()
    for layer in range(2):
        assert found.transition[layer].tolist() == transition[layer].tolist()
    dense = found.token_expert[1].dense()
    assert dense.tolist() == token_expert[: len(dense)].tolist()
    assert not token_expert[len(dense) :].any()
    rows = found.sequence_expert[1].dense()
    assert rows.tolist() == sequence_expert[: len(rows)].tolist()


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 119), max_size=5), seed=st.integers(0, 3))
def test_counts_do_not_depend_on_the_chunking(cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = tuple(
        rng.permuted(np.tile(np.arange(6), (120, 1)), axis=1)[:, :2] for _ in "ab"
    )
    whole = Chunk(
        experts=tuple(ids.astype(np.uint8) for ids in experts),
        token_ids=rng.integers(-1, 9, 120).astype(np.int32),
        sequence_ids=np.repeat(np.arange(12), 10).astype(np.int32),
        positions=np.tile(np.arange(10), 12).astype(np.int32),
    )
    model = ModelSpec(num_experts=(6, 6), top_k=2)
    edges = [0, *sorted(set(cuts)), 120]
    parts = [whole.select(np.arange(a, b)) for a, b in itertools.pairwise(edges)]
    one, many = count_affinity([whole], model, {}), count_affinity(parts, model, {})
    for name, counts in one.tensors().items():
        assert np.array_equal(counts, many.tensors()[name]), name


def test_unknown_token_ids_are_left_out() -> None:
    chunk = Chunk(
        experts=(np.asarray([[0], [1]], np.uint8),),
        token_ids=np.asarray([-1, 3], np.int32),
        sequence_ids=np.zeros(2, np.int32),
        positions=np.arange(2, dtype=np.int32),
    )
    model = ModelSpec(num_experts=(2,), top_k=1)
    found = count_affinity([chunk], model, {}, rows="tokens")
    assert found.token_expert[0].dense().tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]


def test_no_token_is_refused() -> None:
    with pytest.raises(PlacerError, match="no token is left"):
        count_affinity([], ModelSpec(num_experts=(2,), top_k=1), {})
