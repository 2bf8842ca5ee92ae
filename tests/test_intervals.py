"""Intervals of a plan's copies over a baseline's, against a bootstrap written out."""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.intervals import copies_ratio

NOBODY = None, ()


def tokens(number: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copies of two placements, and sequences of 3 to 8 tokens that differ."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, number)
    sequences = np.repeat(np.arange(number) * 7, lengths)
    share = np.repeat(rng.uniform(0.4, 1, number), lengths)
    baseline = rng.integers(5, 20, lengths.sum())
    return np.rint(baseline * share).astype(np.int64), baseline, sequences


def test_the_interval_is_that_of_sequences_drawn_one_by_one() -> None:
    plan, baseline, sequences = tokens(60, seed=1)
    found = copies_ratio(plan, baseline, sequences, *NOBODY)
    ids = sorted(set(sequences.tolist()))
    own = {s: int(plan[sequences == s].sum()) for s in ids}
    other = {s: int(baseline[sequences == s].sum()) for s in ids}
    draw = random.Random(5)
    ratios = []
    for _ in range(4000):
        some = draw.choices(ids, k=len(ids))
        ratios.append(sum(own[s] for s in some) / sum(other[s] for s in some))
    cuts = statistics.quantiles(ratios, n=40)
    assert found is not None
    assert found.ratio == plan.sum() / baseline.sum()
    assert found.low == pytest.approx(cuts[0], abs=0.004)
    assert found.high == pytest.approx(cuts[-1], abs=0.004)
    assert found.low < found.ratio < found.high


def test_tokens_of_a_sequence_are_no_evidence_of_their_own() -> None:
    """The same tokens as sequences of one give a narrower interval."""
    plan, baseline, sequences = tokens(60, seed=2)
    paired = copies_ratio(plan, baseline, sequences, *NOBODY)
    alone = copies_ratio(plan, baseline, np.arange(len(plan)), *NOBODY)
    assert paired is not None
    assert alone is not None
    assert paired.high - paired.low > 1.5 * (alone.high - alone.low)  # type: ignore[operator]


@given(st.integers(30, 80), st.integers(0, 99))
def test_a_placement_beside_itself_is_one_for_sure(number: int, seed: int) -> None:
    plan, _, sequences = tokens(number, seed)
    found = copies_ratio(plan, plan, sequences, *NOBODY)
    assert found is not None
    assert (found.ratio, found.low, found.high) == (1, 1, 1)


def test_few_sequences_have_a_ratio_and_no_interval() -> None:
    plan, baseline, sequences = tokens(29, seed=3)
    found = copies_ratio(plan, baseline, sequences, *NOBODY)
    assert found is not None
    assert (found.low, found.high) == (None, None)
    assert "interval" not in found.words("contiguous")
    assert copies_ratio(plan, baseline * 0, sequences, *NOBODY) is None


def test_the_worst_domain_is_named() -> None:
    plan = np.array([1, 1, 3, 3, 0])
    baseline = np.array([4, 4, 4, 4, 0])
    sequences = np.arange(5)
    domains = np.array([0, 0, 2, 2, 1], dtype=np.uint8)
    found = copies_ratio(plan, baseline, sequences, domains, ("code", "silent", "chat"))
    assert found is not None
    assert (found.ratio, found.worst_domain, found.worst_ratio) == (0.5, "chat", 0.75)
    assert found.words("balanced").endswith("worst domain chat 0.750")
    alone = copies_ratio(plan, baseline, sequences, domains * 0, ("code",))
    assert alone is not None
    assert alone.worst_domain is None


def test_many_sequences_are_drawn_in_blocks() -> None:
    plan, baseline, sequences = tokens(5000, seed=4)
    found = copies_ratio(plan, baseline, sequences, *NOBODY)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    # 5,000 sequences of a share between 0.4 and 1: a standard error near 0.0026.
    assert 0.007 < found.high - found.low < 0.015
