"""Rates of histories, against least squares on written-out columns."""

import itertools

import numpy as np
import pytest

from placer.table.histories import HistoryRates, sums


def fitted(num_tokens, num_ranks, lookback, seed=0):
    rng = np.random.default_rng(seed)
    history = [rng.integers(num_ranks, size=num_tokens) for _ in range(lookback)]
    served = rng.dirichlet(np.ones(num_ranks), size=num_tokens)
    return history, served, HistoryRates.of(history, served, num_ranks)


def written_out(ranks, num_ranks, pairs):
    """The columns of one history, as a list of zeros and ones."""
    found = []
    for rank in ranks:
        found += [float(rank == r) for r in range(num_ranks)]
    for a, b in itertools.combinations(ranks, 2) if pairs else ():
        found += [
            float((a, b) == both) for both in itertools.product(range(num_ranks), repeat=2)
        ]
    return found


@pytest.mark.parametrize(
    ("num_ranks", "lookback", "pairs"),
    [(3, 1, False), (4, 2, False), (3, 3, True), (2, 4, True), (20, 3, False)],
)
def test_rates_are_those_of_ridge_regression_and_counts(num_ranks, lookback, pairs):
    history, served, found = fitted(300, num_ranks, lookback)
    rows = np.array(
        [written_out(ranks, num_ranks, pairs) for ranks in zip(*history, strict=True)]
    )
    mean, centre = served.mean(axis=0), rows.mean(axis=0)
    # Least squares with a penalty of 40: as many more rows of sqrt(40).
    penalty = np.sqrt(40) * np.eye(rows.shape[1])
    left = np.vstack([rows - centre, penalty])
    right = np.vstack([served - mean, np.zeros((len(penalty), num_ranks))])
    effects = np.linalg.lstsq(left, right, rcond=None)[0]
    every = np.vstack(list(found.blocks()))
    assert every.shape == (num_ranks**lookback, num_ranks)
    tokens_of = {}
    for token, ranks in enumerate(zip(*history, strict=True)):
        tokens_of.setdefault(ranks, []).append(token)
    some = range(0, len(every), max(1, len(every) // 200))
    for number in some:
        ranks = np.unravel_index(number, (num_ranks,) * lookback)
        columns = np.array(written_out(ranks, num_ranks, pairs))
        predicted = (mean + (columns - centre) @ effects).clip(0, 1)
        tokens = tokens_of.get(tuple(int(r) for r in ranks), [])
        expected = (served[tokens].sum(axis=0) + 20 * predicted) / (len(tokens) + 20)
        assert every[number] == pytest.approx(expected)


def test_blocks_put_histories_that_were_met_in_their_places():
    history, _, found = fitted(500, 30, 3)  # 27,000 histories: several blocks
    index = (history[0] * 30 + history[1]) * 30 + history[2]
    assert np.array_equal(found.met[found.group], index)
    every = np.vstack(list(found.blocks()))
    assert np.array_equal(every[found.met], found.rates)


def test_a_history_never_met_is_predicted_from_its_parts():
    """After rank 0 in either layer tokens go to rank 0; both at once was never seen."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(3, size=(2, 4_000))
    kept = ~((first == 0) & (second == 0))
    first, second = first[kept], second[kept]
    towards = (first == 0) | (second == 0)
    home = np.where(towards & (rng.random(len(first)) < 0.8), 0, rng.integers(1, 3))
    found = HistoryRates.of([first, second], np.eye(3)[home], 3)
    assert 0 not in found.met
    every = np.vstack(list(found.blocks()))
    assert every[0].argmax() == 0
    assert every[0, 0] > every[1:, 0].max()


def test_sums_leave_out_tokens_of_no_group():
    served = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    total = sums(np.array([1, -1, 1]), served, np.array([2.0, 5.0, 1.0]), 3)
    assert total.tolist() == [[0, 0], [1, 2], [0, 0]]
