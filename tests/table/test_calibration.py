"""Calibration: the line by hand, choices that stay, promises that come true."""

import dataclasses

import numpy as np
import pytest

from placer.model import ModelSpec
from placer.placement.reference import contiguous
from placer.planning.tables import TableOptions, make_table
from placer.simulation import simulate
from placer.table import Table, build_table
from placer.table.calibration import Calibration, calibrated, fit_calibration
from placer.trace import Chunk, Fold, Selection

PLACEMENT = contiguous((8,) * 3, 4)


def build(tokens):
    return build_table(PLACEMENT, tokens, vocab_size=50, lookback=1)


def promised_and_served(table, tokens):
    """The rule of docs/formats.md, token by token, with four ranks of two experts."""
    pairs = []
    for token in range(tokens.num_tokens):
        token_id, past = tokens.token_ids[token], None
        for layer in range(3):
            home = table.token_rank[layer, token_id]
            sure = table.token_confidence[layer, token_id]
            if past is not None and table.history_confidence[layer, past] > sure:
                home = table.history_rank[layer, past]
                sure = table.history_confidence[layer, past]
            ranks = [int(e) // 2 for e in tokens.experts[layer][token]]
            pairs.append((float(sure), ranks.count(home) / 2))
            past = ranks[0]  # of two: both, or a tie that the first one wins
    return pairs


def test_the_line_is_the_least_squares_fit_over_both_halves(make_chunk):
    tokens = make_chunk(num_tokens=600, num_sequences=40)
    rank = np.unique(tokens.sequence_ids, return_inverse=True)[1]
    halves = tokens.select(rank % 2 == 0), tokens.select(rank % 2 == 1)
    pairs = []
    for own, other in (halves, halves[::-1]):
        pairs += promised_and_served(build(own), other)
    slope, offset = np.polyfit(*np.array(pairs).T, 1)
    found = fit_calibration(PLACEMENT, tokens, build)
    assert (found.slope, found.offset) == pytest.approx((slope, offset), abs=1e-9)
    assert slope < 0.9, "a small profile promises too much"


def test_promises_come_true_and_choices_stay(make_chunk):
    """With hardly any shrinkage a table of four tokens per id promises too much."""
    shape = {"num_sequences": 40, "vocab_size": 150}
    profile = make_chunk(num_tokens=600, **shape)
    fresh = make_chunk(num_tokens=4_000, seed=1, **shape)

    def bold(tokens):
        return build_table(PLACEMENT, tokens, vocab_size=150, lookback=1, shrinkage=0.01)

    plain = bold(profile)
    better = calibrated(plain, fit_calibration(PLACEMENT, profile, bold), ())
    mean = {}
    for name, table in (("plain", plain), ("better", better)):
        promised, served = np.mean(promised_and_served(table, fresh), axis=0)
        mean[name] = promised - served
    assert mean["plain"] > 0.04
    assert abs(mean["better"]) < mean["plain"] / 2
    assert np.array_equal(plain.token_rank, better.token_rank)
    before, after = (simulate(PLACEMENT, fresh, table=t)["token"] for t in (plain, better))
    rates = [m.local_activation_rate for m in (before, after)]
    assert rates[0] == pytest.approx(rates[1], abs=0.002)


def test_exact_layers_and_rates_beyond_one():
    table = build_table(
        PLACEMENT,
        Chunk(
            experts=(np.array([[0, 1], [2, 3]], dtype=np.uint8),) * 3,
            sequence_ids=np.zeros(2, dtype=np.int32),
            positions=np.arange(2, dtype=np.int32),
            token_ids=np.arange(2, dtype=np.int32),
        ),
        vocab_size=2,
        with_token_score=True,
    )
    found = calibrated(table, Calibration(slope=2.0, offset=0.1), (1,))
    assert np.array_equal(found.token_score[1], table.token_score[1])
    assert np.array_equal(found.token_confidence[1], table.token_confidence[1])
    expected = (2 * table.token_score[0].astype(float) + 0.1).clip(0, 1)
    assert found.token_score[0].astype(float) == pytest.approx(expected, abs=1e-3)
    assert found.token_confidence[0].tolist() == [1, 1]


def test_few_sequences_or_no_known_ids_leave_rates_alone(make_chunk):
    few = make_chunk(num_tokens=600, num_sequences=20)
    assert fit_calibration(PLACEMENT, few, build) is None
    tokens = make_chunk(num_tokens=600, num_sequences=40)
    ids = np.where(tokens.sequence_ids % 2 == 0, tokens.token_ids, -1)
    unknown = dataclasses.replace(tokens, token_ids=ids)
    assert len(np.unique(tokens.sequence_ids)) == 40
    assert fit_calibration(PLACEMENT, unknown, build) is None


@pytest.mark.parametrize("confidence", [[0.9, 0.1], [0.5, 0.5]])
def test_promises_that_mean_nothing_leave_rates_alone(confidence):
    """Ids 0 and 1 are served by rank 0 never and always, against the promise."""
    count = 80
    tokens = Chunk(
        experts=(np.tile(np.array([[1], [0]], dtype=np.uint8), (count // 2, 1)),),
        sequence_ids=(np.arange(count) // 2).astype(np.int32),
        positions=(np.arange(count) % 2).astype(np.int32),
        token_ids=(np.arange(count) % 2).astype(np.int32),
    )
    table = Table(
        model=ModelSpec(num_experts=(2,), top_k=1),
        num_ranks=2,
        num_nodes=1,
        lookback=0,
        token_rank=np.zeros((1, 2), dtype=np.uint8),
        token_confidence=np.array([confidence], dtype=np.float16),
        history_rank=np.zeros((1, 1), dtype=np.uint8),
        history_confidence=np.zeros((1, 1), dtype=np.float16),
        request_score=np.zeros((2, 2), dtype=np.float16),
        expert_rank=np.array([[0, 1]], dtype=np.uint8),
    )
    assert fit_calibration(contiguous((2,), 2), tokens, lambda _: table) is None


def test_the_command_calibrates_where_it_can(make_trace, write_plan):
    trace = make_trace(num_tokens=1_200, num_sequences=80)
    plan = write_plan(trace.model, PLACEMENT)
    table = make_table(plan, trace, fold=Fold(0, 2), options=TableOptions()).table
    profile = trace.read(Selection(Fold(0, 2)))
    vocab_size = table.vocab_size
    expected = fit_calibration(
        PLACEMENT, profile, lambda part: build_table(PLACEMENT, part, vocab_size=vocab_size)
    )
    assert table.provenance["calibration"] == dataclasses.asdict(expected)
    plain = build_table(PLACEMENT, profile, vocab_size=vocab_size)
    assert np.array_equal(table.token_confidence, expected.of(plain.token_confidence))
