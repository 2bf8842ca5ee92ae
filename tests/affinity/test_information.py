"""Probabilities and bits equal arithmetic by hand, closed forms and known truths."""

from collections.abc import Callable
from math import log, log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity.controls import shuffled_across_tokens
from placer.affinity.information import (
    conditional_probability,
    domain_distances,
    jensen_shannon,
    miller_madow,
    mutual_information,
    top1_tables,
)
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.trace import Chunk, Trace
from placer.trace.imported import import_file
from placer.trace.npz import read_npz

# trace: plug-in bits between top-1 experts of neighbouring layers, and links destroyed.
KNOWN = {
    "gpt-oss-20b": (1.48, 0.009, 0.01),
    "deepseek-v2-lite-intent": (2.79, 0.25, 0.04),
    "deepseek-v2-lite-summary": (1.98, 0.25, 0.04),
}


def test_conditional_probability_by_hand() -> None:
    pairs = np.asarray([[3, 1], [0, 0], [0, 5]])
    assert conditional_probability(pairs).tolist() == [[0.75, 0.25], [0, 0], [0, 1]]


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(st.integers(0, 20), min_size=12, max_size=12))
def test_information_is_what_the_margins_and_the_whole_differ_by(cells: list[int]) -> None:
    pairs = np.asarray(cells).reshape(3, 4)

    def entropy(counts: np.ndarray) -> float:
        shares = [count / counts.sum() for count in counts.ravel() if count]
        return -sum(share * log2(share) for share in shares)

    apart = entropy(pairs.sum(axis=0)) + entropy(pairs.sum(axis=1))
    assert mutual_information(pairs) == pytest.approx(apart - entropy(pairs), abs=1e-12)


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.eye(8, dtype=np.int64) * 5) == pytest.approx(3.0)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0)
    assert mutual_information(np.zeros((3, 3), dtype=np.int64)) == 0.0
    # [[3, 1], [1, 3]] / 8: each cell p log2(p / (1/4)).
    by_hand = 2 * 3 / 8 * log2(3 / 2) + 2 * 1 / 8 * log2(1 / 2)
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(by_hand)


def test_miller_madow_by_hand() -> None:
    pairs = np.asarray([[3, 1], [1, 3]])
    # 4 joint cells, 2 rows and 2 columns in use, 8 pairs: (3 - 1 - 1) / 16 nats.
    assert miller_madow(pairs) == pytest.approx(mutual_information(pairs) - 1 / 16 / log(2))
    assert miller_madow(np.zeros((2, 2), dtype=np.int64)) == 0.0


def test_miller_madow_removes_the_bias_of_independent_draws() -> None:
    """Without information the plug-in expects (N-1)(M-1)/(2 n ln 2); most of it goes."""
    rng = np.random.default_rng(0)
    plug_in, corrected = [], []
    for _ in range(60):
        keys = rng.integers(8, size=1000) * 8 + rng.integers(8, size=1000)
        pairs = np.bincount(keys, minlength=64).reshape(8, 8)
        plug_in.append(mutual_information(pairs))
        corrected.append(miller_madow(pairs))
    expected = 49 / (2000 * log(2))
    assert np.mean(plug_in) == pytest.approx(expected, rel=0.1)
    assert abs(np.mean(corrected)) < expected / 10


def test_miller_madow_finds_a_known_information() -> None:
    """A channel that keeps one of 4 symbols with 0.7 and else draws another evenly."""
    flip, symbols, draws = 0.3, 4, 300
    truth = 2 + 0.7 * log2(0.7) + flip * log2(flip / 3)
    rng = np.random.default_rng(1)
    plug_in, corrected = [], []
    for _ in range(300):
        sent = rng.integers(symbols, size=draws)
        noise = rng.integers(1, symbols, size=draws) * (rng.random(draws) < flip)
        keys = sent * symbols + (sent + noise) % symbols
        pairs = np.bincount(keys, minlength=16).reshape(4, 4)
        plug_in.append(mutual_information(pairs))
        corrected.append(miller_madow(pairs))
    assert abs(np.mean(corrected) - truth) < abs(np.mean(plug_in) - truth) / 3


def test_jensen_shannon_and_distances() -> None:
    one, two = np.asarray([[4, 0], [0, 4]]), np.asarray([[0, 1], [1, 0]])
    assert jensen_shannon(one, one * 7) == pytest.approx(0.0)
    assert jensen_shannon(one, two) == pytest.approx(1.0)
    # (1, 0) and (1/2, 1/2): H(3/4, 1/4) - 1/2.
    by_hand = -0.75 * log2(0.75) - 0.25 * log2(0.25) - 0.5
    assert jensen_shannon(np.asarray([[9, 0]]), np.asarray([[3, 3]])) == pytest.approx(
        by_hand
    )
    distances = domain_distances([[one, one], [one, two], [two, two]])
    assert distances.tolist() == [[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]]
    with pytest.raises(UsageError, match="no distribution") as caught:
        jensen_shannon(one, np.zeros((2, 2), dtype=np.int64))
    assert "leave out domains" in caught.value.hint


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_tables_equal_hand_written_loops(
    make_chunk: Callable[..., Chunk], distance: int
) -> None:
    sizes = (4, 6, 5, 7)
    model = ModelSpec(num_experts=sizes, top_k=3)
    chunk = make_chunk(num_tokens=50, num_experts=sizes, top_k=3)
    tops = top1_tables([chunk], model, distance)
    assert len(tops) == 4 - distance
    for layer in range(4 - distance):
        top = np.zeros((sizes[layer], sizes[layer + distance]), int)
        for t in range(50):
            first, second = chunk.experts[layer][t], chunk.experts[layer + distance][t]
            top[first[0], second[0]] += 1
        assert tops[layer].tolist() == top.tolist()


@pytest.mark.parametrize("distance", [0, 3])
def test_layers_too_far_apart_are_refused(
    make_chunk: Callable[..., Chunk], distance: int
) -> None:
    model = ModelSpec(num_experts=(8, 8, 8), top_k=2)
    with pytest.raises(UsageError, match=f"no MoE layers are {distance} apart") as caught:
        top1_tables([make_chunk()], model, distance)
    assert "from 1 to 2" in caught.value.hint


@pytest.mark.parametrize("name", KNOWN)
def test_known_truths_of_real_traces(
    archive: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """What the traces' own page states of neighbouring layers, with and without links."""
    linked, unlinked, tolerance = KNOWN[name]
    import_file(read_npz, "npz", archive(name), tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    chunk = trace.read()

    def bits(tokens: Chunk) -> float:
        tables = top1_tables([tokens], trace.model)
        return float(np.mean([mutual_information(pairs) for pairs in tables]))

    assert bits(chunk) == pytest.approx(linked, abs=0.01)
    destroyed = shuffled_across_tokens(chunk, 0)
    assert bits(destroyed) == pytest.approx(unlinked, abs=min(tolerance, unlinked / 2))
