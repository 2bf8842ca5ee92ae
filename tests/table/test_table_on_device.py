"""Homes found with torch are those of NumPy, bit for bit, on every device."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.placement.reference import contiguous
from placer.serving.homes import Batches
from placer.serving.layer_serving import majority_rank as numpy_majority_rank
from placer.table import Table, build_table
from placer.table.homes import HomeChoice, TableHomes
from placer.table.on_device import DeviceChoice, DeviceHomes, DeviceTable, majority_rank
from placer.trace import Chunk

PLACEMENT = contiguous((8,) * 3, 4)
CPU = torch.device("cpu")
WITH_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no GPU on this machine"
)


def built(tokens: Chunk, *, combined: bool, scores: bool) -> Table:
    return build_table(
        PLACEMENT,
        tokens,
        vocab_size=55,
        lookback=1,
        with_combined=combined,
        with_token_score=scores,
        max_home_imbalance=1.3,
    )


def whole(size: int) -> Batches:
    return Batches.of(np.arange(size), size)


def require_same(table: Table, tokens: Chunk, device: torch.device) -> None:
    """Look tokens up layer by layer, with both, and compare every number."""
    size = tokens.num_tokens
    fallback = np.arange(size) % 4
    assert tokens.token_ids is not None
    expected = TableHomes(table, tokens.token_ids, fallback)
    found = DeviceHomes(
        DeviceTable.of(table, device),
        torch.from_numpy(tokens.token_ids).to(device),
        torch.from_numpy(fallback).to(device),
    )
    for layer, chosen in enumerate(tokens.experts):
        for name in ("plain", "best"):
            theirs: HomeChoice = getattr(expected, name)(layer)
            ours: DeviceChoice = getattr(found, name)(layer)
            assert ours.home.tolist() == theirs.home.tolist()
            assert ours.confidence.cpu().numpy().tobytes() == theirs.confidence.tobytes()
            assert (ours.scores is None) == (theirs.scores is None)
            if ours.scores is not None and theirs.scores is not None:
                assert ours.scores.cpu().numpy().tobytes() == theirs.scores.tobytes()
            assert ours.equal().tolist() == theirs.equal(whole(size)).tolist()
        experts = torch.from_numpy(chosen.astype(np.int64)).to(device)
        expected.served(chosen.T // 2, chosen.T)
        found.served(experts // 2, experts)


def odd_tokens(make_chunk: Callable[..., Chunk], top_k: int = 2) -> Chunk:
    """Tokens of which some have ids unknown to the table, and a number no rank divides."""
    fresh = make_chunk(seed=5, vocab_size=58, top_k=top_k).select(np.arange(399))
    assert fresh.token_ids is not None
    fresh.token_ids[:9] = -1
    return fresh


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize(
    ("combined", "scores"), [(True, True), (False, True), (False, False)]
)
def test_every_number_is_that_of_numpy(
    make_chunk: Callable[..., Chunk], combined: bool, scores: bool, top_k: int
) -> None:
    table = built(make_chunk(top_k=top_k), combined=combined, scores=scores)
    require_same(table, odd_tokens(make_chunk, top_k), CPU)


@WITH_GPU
@pytest.mark.parametrize("combined", [True, False])
def test_every_number_is_that_of_numpy_on_a_gpu(
    make_chunk: Callable[..., Chunk], combined: bool
) -> None:
    table = built(make_chunk(), combined=combined, scores=combined)
    require_same(table, odd_tokens(make_chunk), torch.device("cuda"))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 70),
    num_ranks=st.integers(1, 7),
    seed=st.integers(0, 999),
    levels=st.sampled_from([1, 3, 1000]),
    with_scores=st.booleans(),
)
def test_equal_slices_of_any_choice(
    size: int, num_ranks: int, seed: int, levels: int, with_scores: bool
) -> None:
    """Few levels of confidence and score make many ties; scores may be negative."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels + 1, size=(size, num_ranks)) / levels
    choice = HomeChoice(
        home=rng.integers(num_ranks, size=size) ** 2 % num_ranks,
        confidence=(rng.integers(levels, size=size) / levels).astype(np.float32),
        scores=scores.astype(np.float32) if with_scores else None,
        num_ranks=num_ranks,
    )
    found = DeviceChoice(
        home=torch.from_numpy(choice.home),
        confidence=torch.from_numpy(choice.confidence),
        scores=None if choice.scores is None else torch.from_numpy(choice.scores),
        num_ranks=num_ranks,
    )
    assert found.equal().tolist() == choice.equal(whole(size)).tolist()


@given(top_k=st.integers(1, 6), seed=st.integers(0, 99))
def test_majority_of_ranks(top_k: int, seed: int) -> None:
    ranks = np.random.default_rng(seed).integers(3, size=(40, top_k))
    found = majority_rank(torch.from_numpy(ranks))
    assert found.tolist() == numpy_majority_rank(ranks.T).tolist()


@pytest.mark.parametrize("scores", [True, False])
def test_looking_up_waits_for_no_device(
    make_chunk: Callable[..., Chunk], scores: bool
) -> None:
    """A meta tensor has no values: whatever asked for one would fail."""
    table = built(make_chunk(), combined=scores, scores=scores)
    meta = torch.device("meta")
    nothing = torch.empty(50, dtype=torch.int64, device=meta)
    homes = DeviceHomes(DeviceTable.of(table, meta), nothing, nothing)
    experts = torch.empty((50, 2), dtype=torch.int64, device=meta)
    for layer in range(3):
        homes.plain(layer)
        assert homes.best(layer).equal().is_meta
        homes.served(experts, experts)


def test_tables_of_many_ranks_are_read(make_chunk: Callable[..., Chunk]) -> None:
    """Above 256 ranks a table holds uint16."""
    placement = contiguous((300,) * 2, 300)
    rng = np.random.default_rng(0)
    tokens = dataclasses.replace(
        make_chunk(),
        experts=tuple(
            rng.permuted(np.tile(np.arange(300, dtype=np.uint16), (400, 1)), axis=1)[:, :2]
            for _ in range(2)
        ),
    )
    table = build_table(placement, tokens, vocab_size=55, lookback=1)
    assert table.token_rank.dtype == np.uint16
    require_same(table, tokens, CPU)
