"""Rates predicted from embeddings, against explicit least squares and planted truths."""

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.simulation import simulate
from placer.table import build_table
from placer.table.regression import _PENALTIES, EmbeddingRegression
from placer.trace import Chunk


class Rows:
    """An embedding in memory."""

    def __init__(self, rows):
        self.values = np.asarray(rows, dtype=np.float32)
        self.num_rows = len(rows)

    def rows(self, start, stop):
        return self.values[start:stop]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ridge(rows, rates, weight, penalty):
    """Weighted ridge with a free intercept, by one dense solve; returns its predictor."""
    design = np.hstack([rows, np.ones((len(rows), 1))])
    cost = penalty * np.eye(design.shape[1])
    cost[-1, -1] = 0
    solved = np.linalg.solve(
        design.T @ (weight[:, None] * design) + cost, design.T @ (weight[:, None] * rates)
    )
    return lambda x: np.hstack([x, np.ones((len(x), 1))]) @ solved


def test_agrees_with_refitting_without_each_id_in_turn():
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(40, 5)))
    seen = np.sort(rng.permutation(40)[:25])
    weight = rng.uniform(0.2, 1, 25)
    # Noise, so that neither no penalty nor the largest one is best.
    rates = (0.5 + 0.1 * rows[seen] @ rng.normal(size=(5, 3))).clip(0, 1)
    rates = (rates + 0.1 * rng.normal(size=rates.shape)).clip(0, 1)
    centred = rows[seen] - np.average(rows[seen], axis=0, weights=weight)
    scatter = centred.T @ (weight[:, None] * centred)
    losses = []
    for penalty in _PENALTIES * np.trace(scatter) / 5:
        loss = 0.0
        for left in range(25):
            keep = np.arange(25) != left
            guess = ridge(rows[seen][keep], rates[keep], weight[keep], penalty)
            error = rates[left] - guess(rows[seen][left : left + 1])[0]
            loss += weight[left] * (error**2).sum()
        losses.append(loss)
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1
    penalty = _PENALTIES[best] * np.trace(scatter) / 5
    expected = ridge(rows[seen], rates, weight, penalty)(rows).clip(0, 1)
    found = EmbeddingRegression.of(Rows(3 * rows), 40, seen, weight).rates(rates)
    assert np.allclose(found, expected, atol=1e-4)


def test_wide_embeddings_keep_what_their_main_directions_say():
    """800 dimensions that hold eight: the same answer as from the eight."""
    rng = np.random.default_rng(1)
    narrow = unit(rng.normal(size=(300, 8)))
    turn = np.linalg.qr(rng.normal(size=(800, 8)))[0]
    seen = np.arange(0, 300, 2)
    weight = np.ones(len(seen))
    rates = rng.random((len(seen), 4))
    few, many = (
        EmbeddingRegression.of(Rows(rows), 300, seen, weight)
        for rows in (narrow, narrow @ turn.T)
    )
    assert many.features.shape == (300, 512)
    # Penalties are in units of the mean variance, which 504 empty dimensions lower.
    assert np.allclose(few.rates(rates), many.rates(rates), atol=0.03)
    assert np.std(few.rates(rates)) > 0.01


def test_embeddings_that_say_nothing_give_the_mean():
    rates = np.random.default_rng(2).random((5, 3))
    alike = EmbeddingRegression.of(Rows(np.ones((9, 4))), 9, np.arange(5), np.ones(5))
    assert np.allclose(alike.rates(rates), rates.mean(axis=0), atol=1e-5)


def test_an_embedding_that_is_too_short_is_refused():
    with pytest.raises(PlacerError, match="has 9 rows, but the vocabulary has token id 9"):
        EmbeddingRegression.of(Rows(np.ones((9, 4))), 10, np.arange(5), np.ones(5))


def planted(num_tokens, seed, low=0):
    """Tokens whose experts follow from their embedding: ids below ``low`` never occur."""
    truth = np.random.default_rng(7)
    rows = unit(truth.normal(size=(400, 12)))
    taste = [6 * rows @ truth.normal(size=(12, 8)) for _ in range(3)]
    rng = np.random.default_rng(seed)
    ids = rng.integers(low, 400, size=num_tokens)
    experts = [
        np.argsort(-(t[ids] + rng.gumbel(size=(num_tokens, 8))), axis=1)[:, :2]
        for t in taste
    ]
    tokens = Chunk(
        experts=tuple(e.astype(np.uint8) for e in experts),
        sequence_ids=(np.arange(num_tokens) // 50).astype(np.int32),
        positions=(np.arange(num_tokens) % 50).astype(np.int32),
        token_ids=ids.astype(np.int32),
    )
    return rows, tokens


@pytest.mark.parametrize("max_home_imbalance", [None, 1.3])
def test_ids_never_seen_are_served_better_than_by_the_prior(
    max_home_imbalance,
):
    """A quarter of the vocabulary does not occur in the profile."""
    rows, profile = planted(4_000, seed=0, low=100)
    _, heldout = planted(4_000, seed=1)
    placement = contiguous((8,) * 3, 4)
    embeddings = Rows(rows)
    found = {}
    for name, options in {
        "prior": {},
        "regression": {"embeddings": embeddings},
    }.items():
        table = build_table(
            placement,
            profile,
            vocab_size=400,
            max_home_imbalance=max_home_imbalance,
            **options,
        )
        metrics = simulate(placement, heldout, table=table)
        found[name] = metrics["token"].local_activation_rate
    assert found["regression"] > found["prior"] + 0.02


def test_seen_often_an_id_keeps_its_own_rate(make_chunk):
    """The embedding is a prior: 4,000 tokens of 50 ids outweigh random rows."""
    tokens = make_chunk(num_tokens=4_000)
    rows = np.random.default_rng(3).normal(size=(50, 16))
    placement = contiguous((8,) * 3, 4)
    options = {"vocab_size": 50, "with_token_score": True}
    plain = build_table(placement, tokens, **options)
    fitted = build_table(placement, tokens, embeddings=Rows(rows), **options)
    change = np.abs(plain.token_score.astype(float) - fitted.token_score.astype(float))
    assert 0 < change.max() < 0.02
