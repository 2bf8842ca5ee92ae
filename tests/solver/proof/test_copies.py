"""Certificates of distinct ranks against all placements, counted token by token."""

from collections.abc import Callable

import numpy as np
import pytest

from placer.solver.proof import copies
from placer.solver.proof.copies import CopiesCertificate, TokenSets, token_sets
from placer.trace import Chunk
from tests.solver.enumeration import every_layer, least_max_load


def random_sets(
    num_experts: int, size: int, num_tokens: int, rng: np.random.Generator
) -> TokenSets:
    """Tokens of a few kinds, each with its favourite experts."""
    taste = rng.gumbel(size=(4, num_experts)) * 1.5
    score = taste[rng.integers(4, size=num_tokens)]
    score = score + rng.gumbel(size=score.shape)
    rows = np.sort(np.argsort(-score, axis=1)[:, :size], axis=1)
    experts, counts = np.unique(rows, axis=0, return_counts=True)
    return TokenSets(experts=experts, num_tokens=counts)


def load_of(sets: TokenSets, num_experts: int) -> np.ndarray:
    load = np.zeros(num_experts)
    for experts, count in zip(sets.experts.tolist(), sets.num_tokens.tolist(), strict=True):
        for expert in experts:
            load[expert] += count
    return load


def least_ranks(sets: TokenSets, load: np.ndarray, max_load: float, num_ranks: int) -> int:
    """Count the ranks that serve every token, for every placement under the cap."""
    totals = []
    for ranks in every_layer(len(load), num_ranks):
        if max(load[ranks == rank].sum() for rank in range(num_ranks)) > max_load:
            continue
        total = sum(
            count * len({ranks[expert] for expert in experts})
            for experts, count in zip(
                sets.experts.tolist(), sets.num_tokens.tolist(), strict=True
            )
        )
        totals.append(total)
    return min(totals)


SHAPES = [  # experts, ranks, top k
    (4, 2, 1),
    (4, 2, 2),
    (6, 2, 3),
    (6, 3, 2),
    (6, 3, 3),
    (8, 2, 4),
    (8, 4, 3),
    (6, 6, 2),
    (4, 4, 4),
]


@pytest.mark.parametrize(
    ("most_split", "num_experts", "num_ranks", "top_k"),
    [(6, 6, 2, 3), (6, 6, 3, 3), (6, 8, 4, 3), (1, 6, 3, 2)],
)
def test_bounds_are_near_the_fewest_ranks(
    most_split: int,
    num_experts: int,
    num_ranks: int,
    top_k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bound of nothing would be valid too."""
    monkeypatch.setattr(copies, "_MOST_SPLIT", most_split)
    proved = least = 0.0
    for seed in range(3):
        sets = random_sets(num_experts, top_k, 40, np.random.default_rng(seed))
        load = load_of(sets, num_experts)
        cap = np.floor(1.15 * load.sum() / num_ranks)
        cap = max(float(cap), least_max_load(load, num_ranks))
        certificate = CopiesCertificate([sets], [load], [cap], num_ranks)
        proved += certificate.improve(60)
        least += least_ranks(sets, load, cap, num_ranks)
    assert 0.98 * least <= proved <= least


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize(("num_experts", "num_ranks", "top_k"), SHAPES)
def test_no_placement_serves_tokens_from_fewer_ranks(
    num_experts: int, num_ranks: int, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(1000 * seed + 10 * num_experts + num_ranks)
    sets = random_sets(num_experts, top_k, 40, rng)
    load = load_of(sets, num_experts)
    max_load = float(np.floor(rng.choice([1.1, 1.3, 9.0]) * load.sum() / num_ranks))
    max_load = max(max_load, least_max_load(load, num_ranks))
    least = least_ranks(sets, load, max_load, num_ranks)
    certificate = CopiesCertificate([sets], [load], [max_load], num_ranks)
    bounds = [certificate.improve(rounds) for rounds in (0, 3, 30)]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= least
    if top_k == 1 or num_ranks == num_experts:
        assert bounds[-1] == least


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("top_k", [2, 3, 7])
def test_chords_are_valid_too(
    top_k: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_MOST_SPLIT", 1)
    rng = np.random.default_rng(seed)
    sets = random_sets(8, top_k, 30, rng)
    load = load_of(sets, 8)
    certificate = CopiesCertificate([sets], [load], [1e9], 2)
    least = least_ranks(sets, load, 1e9, 2)
    assert certificate.improve(5) <= certificate.improve(30) <= least


@pytest.mark.parametrize("seed", range(20))
def test_any_prices_certify(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = random_sets(6, 3, 40, rng)
    load = load_of(sets, 6)
    certificate = CopiesCertificate([sets], [load], [1e9], 2)
    certificate.improve(2)
    envelope = certificate._layers[0]._envelope
    assert isinstance(envelope, copies._SplitEnvelope)
    envelope._price[...] = rng.normal(size=envelope._price.shape)
    constant, weight = envelope.linear()
    for ranks in every_layer(6, 2):
        together = ranks[:, None] == ranks
        proved = constant - (weight * together).sum() / 2
        ranks_used = sum(
            count * len({ranks[expert] for expert in experts})
            for experts, count in zip(
                sets.experts.tolist(), sets.num_tokens.tolist(), strict=True
            )
        )
        assert proved <= ranks_used
    least = least_ranks(sets, load, 1e9, 2)
    assert certificate.improve(0) <= least


@pytest.mark.parametrize("most_split", [6, 1], ids=["splits", "chords"])
def test_planted_groups_are_proved(
    most_split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred tokens stay in two groups of three, ten must use both."""
    monkeypatch.setattr(copies, "_MOST_SPLIT", most_split)
    sets = TokenSets(
        experts=np.asarray([(0, 1, 2), (0, 1, 3), (3, 4, 5)]),
        num_tokens=np.asarray([50, 10, 50]),
    )
    load = load_of(sets, 6)
    assert least_ranks(sets, load, 1e9, 2) == 120
    certificate = CopiesCertificate([sets], [load], [1e9], 2)
    assert certificate.improve(200) == 120


def test_sets_of_a_trace_are_counted_in_every_layer(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunks = [make_chunk(num_tokens=30, top_k=3, seed=seed) for seed in range(2)]
    for layer, sets in enumerate(token_sets(chunks)):
        counted: dict[tuple[int, ...], int] = {}
        for chunk in chunks:
            for row in chunk.experts[layer].tolist():
                key = tuple(sorted(row))
                counted[key] = counted.get(key, 0) + 1
        found = zip(sets.experts.tolist(), sets.num_tokens.tolist(), strict=True)
        assert {tuple(row): count for row, count in found} == counted


def test_layers_add_up_and_the_same_rounds_give_the_same_bounds(
    make_chunk: Callable[..., Chunk],
) -> None:
    sets = token_sets([make_chunk(num_tokens=200)])
    load = [load_of(one, 8) for one in sets]

    def certificate() -> CopiesCertificate:
        return CopiesCertificate(sets, load, [1e9] * 3, 4)

    one, two = certificate(), certificate()
    assert one.improve(20) == two.improve(20) == sum(one.bounds)
    alone = CopiesCertificate(sets[:1], load[:1], [1e9], 4)
    assert alone.improve(20) == one.bounds[0]
