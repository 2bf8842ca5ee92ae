"""Scores of requests, by hand and by loops, and what they are worth."""

import numpy as np
import pytest

from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.simulation import simulate
from placer.table import build_table
from placer.table.requests import request_scores
from placer.trace import Chunk


def chunk_of(experts, token_ids, sequence_ids):
    return Chunk(
        experts=tuple(np.asarray(layer, dtype=np.uint8) for layer in experts),
        sequence_ids=np.asarray(sequence_ids, dtype=np.int32),
        positions=np.zeros(len(token_ids), dtype=np.int32),
        token_ids=np.asarray(token_ids, dtype=np.int32),
    )


def test_an_id_scores_by_the_sequences_that_hold_it():
    """Two ranks, top-1. Sequence 0 has 3 of 4 tokens on rank 0, sequence 1 none of 2."""
    tokens = chunk_of(
        [[[0], [0], [0], [1], [1], [1]]], [5, 5, 6, 7, 7, -1], [0, 0, 0, 0, 1, 1]
    )
    row = np.array([0, 0, 1, 2, 2, -1])
    found = request_scores(contiguous((2,), 2), tokens, row, 4)
    # Of all tokens rank 0 has 1/2: sequence 0 is 1/4 above, sequence 1 is 1/2 below.
    # Each id is counted once per sequence and shrunk by one sequence at 0.
    above = [0.25 / 2, 0.25 / 2, (0.25 - 0.5) / 3, 0.0]
    assert found.tolist() == pytest.approx(np.array([above, np.negative(above)]).T)


@pytest.mark.parametrize("seed", range(3))
def test_scores_agree_with_loops_with_replicas_too(make_chunk, seed):
    tokens = make_chunk(
        num_tokens=60, num_experts=(4, 4), vocab_size=9, num_sequences=7, seed=seed
    )
    placement = Placement(
        physical_to_logical_map=(np.array([0, 1, 2, 3, 0, 2]), np.arange(6) % 4),
        num_experts=(4, 4),
        num_ranks=2,
    )
    found = request_scores(placement, tokens, tokens.token_ids.astype(np.int64), 9)
    holders = [
        {e: {s // 3 for s in range(6) if row[s] == e} for e in range(4)}
        for row in placement.physical_to_logical_map
    ]
    served = np.zeros((60, 2))
    for token in range(60):
        for layer in range(2):
            for expert in tokens.experts[layer][token].tolist():
                for rank in holders[layer][expert]:
                    served[token, rank] += 1 / 4  # two layers of top-2
    for token_id in range(9):
        total, times = np.zeros(2), 0
        for sequence in range(7):
            inside = tokens.sequence_ids == sequence
            if token_id in tokens.token_ids[inside]:
                total += served[inside].mean(axis=0) - served.mean(axis=0)
                times += 1
        assert found[token_id] == pytest.approx(total / (times + 1))


def test_ids_that_were_never_seen_say_nothing(make_chunk):
    table = build_table(contiguous((8,) * 3, 4), make_chunk(), vocab_size=60)
    assert np.abs(table.request_score[:50]).max() > 0
    assert not table.request_score[50:].any()


def test_a_topic_is_told_by_an_id_whose_own_tokens_go_elsewhere():
    """Each prompt starts with its topic's name, which expert 0 serves, whatever it is."""
    rng = np.random.default_rng(0)
    num_sequences, length = 64, 16
    topic = np.repeat(rng.permuted(np.tile(np.arange(4), (16, 1)), axis=1).ravel(), length)
    place = np.tile(np.arange(length), num_sequences)
    tokens = chunk_of(
        [np.where(place == 0, 0, 2 * topic + rng.integers(2, size=len(topic)))[:, None]],
        np.where(place == 0, topic, 4 + rng.integers(3, size=len(topic))),
        np.repeat(np.arange(num_sequences), length),
    )
    early = tokens.sequence_ids < num_sequences // 2
    placement = contiguous((8,), 4)
    table = build_table(placement, tokens.select(early), vocab_size=7)
    metrics = simulate(placement, tokens.select(~early), table=table)
    # All but the name: 15 of 16 tokens, and of topic 0 that one too.
    assert metrics["request"].local_activation_rate > 0.9
