"""What a runtime looks up in a table, layer by layer, and what it remembers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from placer.placement.reference import contiguous
from placer.serving.homes import Batches
from placer.table import Table, build_table
from placer.table.homes import TableHomes
from placer.trace import Chunk

NUM_RANKS = 4


@pytest.fixture
def chunk(make_chunk: Callable[..., Chunk]) -> Chunk:
    return make_chunk(num_tokens=60, num_experts=(16,) * 4, vocab_size=20)


@pytest.fixture
def table(chunk: Chunk) -> Table:
    """Of scores and the combined rule, with a look back of two layers."""
    placement = contiguous((16,) * 4, NUM_RANKS)
    return build_table(placement, chunk, vocab_size=20, with_combined=True, lookback=2)


def ids_of(chunk: Chunk) -> np.ndarray:
    """Token ids, of which two have no row."""
    assert chunk.token_ids is not None
    ids = chunk.token_ids.astype(np.int64)
    ids[:2] = (-1, 20)
    return ids


def follow(homes: TableHomes, chunk: Chunk, layers: int) -> list[np.ndarray]:
    """Serve some layers, each expert by the rank that has it; return majority ranks."""
    past = []
    for layer in range(layers):
        experts = np.ascontiguousarray(chunk.experts[layer].T).astype(np.int64)
        ranks = experts // 4
        homes.served(ranks, experts)
        # Of two experts, the first's rank: it serves as many as the other.
        past.append(ranks[0])
    return past


def fallback() -> np.ndarray:
    return np.full(60, 3, dtype=np.uint8)


def test_the_plain_rule_takes_the_more_certain_of_token_and_history(
    table: Table, chunk: Chunk
) -> None:
    ids = ids_of(chunk)
    for layer in range(4):
        homes = TableHomes(table, ids, fallback())
        past = follow(homes, chunk, layer)
        choice = homes.plain(layer)
        assert choice.num_ranks == NUM_RANKS
        for token, one in enumerate(ids.tolist()):
            home, sure = 3, -1.0
            if 0 <= one < 20:
                home = int(table.token_rank[layer, one])
                sure = float(table.token_confidence[layer, one])
            if layer >= 2:
                index = int(past[layer - 2][token] * NUM_RANKS + past[layer - 1][token])
                if float(table.history_confidence[layer, index]) > sure:
                    home = int(table.history_rank[layer, index])
                    sure = float(table.history_confidence[layer, index])
            assert (choice.home[token], choice.confidence[token]) == (home, sure)
        assert choice.scores is not None
        assert table.token_score is not None
        # A token without a row has the scores of the first: its confidence is below all.
        rows = table.token_score[layer][[one if 0 <= one < 20 else 0 for one in ids]]
        assert choice.scores.tolist() == rows.astype(np.float32).tolist()


def test_without_scores_there_is_only_the_plain_rule(table: Table, chunk: Chunk) -> None:
    bare = TableHomes(replace(table, token_score=None, combined=None), None, fallback())
    follow(bare, chunk, 2)
    assert bare.plain(2).scores is None
    found = bare.best(2)
    assert found.scores is None
    assert found.home.tolist() == bare.plain(2).home.tolist()
    scored = TableHomes(replace(table, combined=None), ids_of(chunk), fallback())
    follow(scored, chunk, 2)
    assert scored.best(2).home.tolist() == scored.plain(2).home.tolist()
    assert scored.best(2).confidence.tolist() == scored.plain(2).confidence.tolist()


def test_the_combined_rule_starts_after_the_first_layer(table: Table, chunk: Chunk) -> None:
    assert table.combined is not None
    assert table.token_score is not None
    ids = ids_of(chunk)
    homes = TableHomes(table, ids, fallback())
    first = homes.best(0)
    assert first.home.tolist() == homes.plain(0).home.tolist()
    assert first.confidence.tolist() == homes.plain(0).confidence.tolist()
    known = np.where((ids >= 0) & (ids < 20), ids, -1)
    for layer in range(1, 4):
        follow_one = np.ascontiguousarray(chunk.experts[layer - 1].T).astype(np.int64)
        homes.served(follow_one // 4, follow_one)
        past = [
            np.ascontiguousarray(one.T).astype(np.int64) for one in chunk.experts[:layer]
        ]
        scores = table.combined.scores(layer, table.token_score[layer], known, past)
        home, sure = table.combined.homes(layer, scores)
        choice = homes.best(layer)
        assert choice.home.tolist() == home.tolist()
        assert choice.confidence.tolist() == sure.tolist()
        assert choice.scores is not None
        assert choice.scores.tolist() == scores.tolist()
        assert (home != homes.plain(layer).home).any()


def test_no_more_layers_are_remembered_than_are_read(table: Table, chunk: Chunk) -> None:
    homes = TableHomes(table, ids_of(chunk), fallback())
    past = follow(homes, chunk, 4)
    assert [one.tolist() for one in homes._history] == [one.tolist() for one in past[2:]]
    assert table.combined is not None
    depth = table.combined.expert_score.shape[1]
    assert len(homes._past_experts) == min(4, depth)
    for _ in range(3):
        follow(homes, chunk, 4)
    assert len(homes._past_experts) == depth
    plain = TableHomes(replace(table, combined=None), None, fallback())
    follow(plain, chunk, 4)
    assert plain._past_experts == []


def test_equal_homes_hold_as_many_tokens_of_a_batch(table: Table, chunk: Chunk) -> None:
    homes = TableHomes(table, ids_of(chunk), fallback())
    even = homes.plain(0).equal(Batches.of(np.arange(60), 20))
    for batch in even.reshape(3, 20):
        assert np.bincount(batch, minlength=NUM_RANKS).tolist() == [5] * NUM_RANKS
