"""Profiles of a layer: which rows use an expert, and what merging keeps."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.solver.problem.layer_profile import LayerProfile

NUM_EXPERTS = 6
TOKENS = st.lists(
    st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=3, max_size=3, unique=True),
    min_size=1,
    max_size=40,
)


@given(tokens=TOKENS, merged=st.booleans())
def test_the_rows_of_an_expert_are_those_that_use_it(
    tokens: list[list[int]], merged: bool
) -> None:
    experts = np.array(tokens, dtype=np.int16)
    profile = LayerProfile.of(experts, NUM_EXPERTS, merged=merged)
    for expert in range(NUM_EXPERTS):
        first, last = profile.starts[expert : expert + 2]
        using = [n for n, row in enumerate(profile.experts) if expert in row]
        assert profile.users[first:last].tolist() == using


@given(tokens=TOKENS)
def test_merged_rows_are_the_sets_and_how_many_tokens_have_each(
    tokens: list[list[int]],
) -> None:
    experts = np.array(tokens, dtype=np.int16)
    profile = LayerProfile.of(experts, NUM_EXPERTS, merged=True)
    rows = [frozenset(row) for row in profile.experts.tolist()]
    assert dict(zip(rows, profile.weight.tolist(), strict=True)) == Counter(
        map(frozenset, tokens)
    )
    assert len(set(rows)) == len(rows)


def test_rows_that_are_not_merged_keep_the_routers_order() -> None:
    experts = np.array([[3, 1], [1, 3], [3, 1]], dtype=np.int16)
    profile = LayerProfile.of(experts, NUM_EXPERTS, merged=False)
    assert profile.experts.tolist() == experts.tolist()
    assert profile.weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("merged", [False, True])
def test_experts_that_nobody_uses_have_no_rows(merged: bool) -> None:
    profile = LayerProfile.of(np.array([[5]], dtype=np.int16), NUM_EXPERTS, merged=merged)
    assert np.diff(profile.starts).tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (60, 4), (128, 8), (256, 8), (257, 8), (8192, 5)]
)
def test_merged_rows_ascend_and_are_exact_up_to_any_number_of_experts(
    num_experts: int, top_k: int
) -> None:
    """8 of 256 experts fill the 64 bits of a number; what takes 65 is merged as rows."""
    rng = np.random.default_rng(0)
    few = np.sort(rng.permuted(np.tile(np.arange(num_experts), (40, 1)), axis=1)[:, :top_k])
    few[0] = np.arange(num_experts)[-top_k:]  # the largest row
    experts = few[rng.integers(len(few), size=300)].astype(np.int16)
    profile = LayerProfile.of(experts, num_experts, merged=True)
    rows, times = np.unique(experts, axis=0, return_counts=True)
    assert profile.experts.dtype == np.int16
    assert profile.experts.tolist() == rows.tolist()
    assert profile.weight.tolist() == times.tolist()
