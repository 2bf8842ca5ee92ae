"""Certificates of distinct ranks against all placements, counted token by token."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from placer.placement.topology import Topology
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


def test_a_bound_that_is_known_is_kept_and_counted() -> None:
    """Three ranks: the cheapest to reach costs 1 + 0 + 2, and no link less than 1."""
    sets = random_sets(6, 2, 40, np.random.default_rng(0))
    load = load_of(sets, 6)
    certificate = CopiesCertificate([sets] * 2, [load] * 2, [1e9] * 2, 3, [60.0, 70.0])
    assert certificate.improve(3) == 130
    assert certificate.bounds == [60, 70]
    topology = Topology(gpus_per_node=3, cost=((0, 1, 4), (1, 0, 2), (4, 2, 0)))
    assert certificate.cost_bound("fixed", topology) == 3 * 130
    # From any home to layer 0; then 20 and 30 more ranks than tokens: two combines and
    # the dispatch to layer 1, each scaled by three ranks.
    assert certificate.cost_bound("follow", topology) == 3 * 60 + 3 * (20 + 30 + 30)
    assert certificate.cost_bound("follow", Topology()) == 0


def test_it_stops_after_the_layer_that_it_is_told(
    make_chunk: Callable[..., Chunk],
) -> None:
    sets = token_sets([make_chunk(num_tokens=200)])
    load = [load_of(one, 8) for one in sets]
    certificate = CopiesCertificate(sets, load, [1e9] * 3, 4)
    before, asked = certificate.bounds, []

    def goes_on(done: int) -> bool:
        asked.append(done)
        return done < 2

    certificate.improve(20, goes_on=goes_on)
    assert asked == [1, 2]
    better = [one > two for one, two in zip(certificate.bounds, before, strict=True)]
    assert better == [True, True, False]


@pytest.mark.parametrize(
    ("size", "num_ranks", "least"), [(1, 3, 1), (2, 3, 1), (3, 3, 2), (4, 3, 2), (5, 1, 1)]
)
def test_before_any_step_slots_alone_bound_the_ranks(
    size: int, num_ranks: int, least: int
) -> None:
    sets = random_sets(6, size, 40, np.random.default_rng(0))
    load = load_of(sets, 6)
    certificate = CopiesCertificate([sets], [load], [1e9], num_ranks)
    assert certificate.bounds == [40 * least]


def test_splits_are_those_of_a_set_each_once() -> None:
    """Bell numbers."""
    for size, number in enumerate((1, 2, 5, 15, 52, 203), start=1):
        splits = copies._splits(size)
        parts = {
            frozenset(frozenset(np.flatnonzero(row == one)) for one in row)
            for row in splits
        }
        assert len(splits) == len(parts) == number


def pair_totals(sets: TokenSets, price: np.ndarray, num_experts: int) -> np.ndarray:
    """Return ``[E, E]``: prices ``[N, pairs]`` of pairs i < j, times tokens, negative."""
    total = np.zeros((num_experts, num_experts))
    for row, number, own in zip(sets.experts, sets.num_tokens, price, strict=True):
        for (e, other), one in zip(itertools.combinations(row, 2), own, strict=True):
            total[e, other] -= one * number
            total[other, e] -= one * number
    return total


@pytest.mark.parametrize(("num_ranks", "size"), [(2, 3), (3, 3), (2, 4), (6, 4)], ids=str)
def test_splits_prove_exactly_their_minimum(num_ranks: int, size: int) -> None:
    """Against all ranks of each set that leave no rank with more than its slots."""
    rng = np.random.default_rng(num_ranks)
    sets, slots = random_sets(6, size, 40, rng), 6 // num_ranks
    envelope = copies._SplitEnvelope(sets, 6, num_ranks, slots)
    units = rng.integers(-9000, 9000, envelope._price.shape)
    envelope._price[...] = (units + rng.uniform(-0.4, 0.4, units.shape)) / 4096
    pairs = list(itertools.combinations(range(size), 2))
    constant, weight = envelope.linear()
    expected = 0.0
    for price, number in zip(units / 4096, sets.num_tokens, strict=True):
        expected += number * min(
            len(set(ranks))
            - sum(
                one
                for one, (i, j) in zip(price, pairs, strict=True)
                if ranks[i] == ranks[j]
            )
            for ranks in itertools.product(range(num_ranks), repeat=size)
            if max(map(ranks.count, ranks)) <= slots
        )
    assert constant == expected
    assert (weight == pair_totals(sets, units / 4096, 6)).all()


def test_prices_of_splits_reach_the_convex_envelope() -> None:
    """Mixtures of splits of three experts with pairs y, t of them all together.

    Each pair alone is y - t of them, so t + 2 (sum y - 3 t) + 3 (1 - sum y + 2 t) ranks
    are used, t + 3 - sum y. The least t is (sum y - 1) / 2, or 0.
    """
    sets = TokenSets(experts=np.array([[0, 2, 3], [1, 4, 5]]), num_tokens=np.array([3, 5]))
    envelope = copies._SplitEnvelope(sets, 9, 3, 3)
    shared = np.full((9, 9), 0.3)
    for e, other, value in ((1, 4, 0.7), (1, 5, 0.6), (4, 5, 0.5)):
        shared[e, other] = shared[other, e] = value
    np.fill_diagonal(shared, 1.0)
    expected = 3 * (3 - 0.9) + 5 * (3 - 1.8 + 0.4)
    envelope.start(shared)
    reached = []
    for move in range(80):
        envelope.move(shared, move)
        constant, weight = envelope.linear()
        reached.append(constant - (weight * shared)[np.triu_indices(9, 1)].sum())
    assert max(reached) <= expected + 1e-6
    assert reached[0] < reached[-1]
    assert reached[-1] == pytest.approx(expected, rel=0.01)


def test_chords_prove_exactly_their_minimum() -> None:
    rng = np.random.default_rng(0)
    sets = random_sets(8, 7, 20, rng)
    envelope = copies._ChordEnvelope(sets, 8)
    units = -rng.integers(2**19, size=sets.experts.shape)
    envelope._slope = (units + rng.uniform(-0.4, 0.4, units.shape)) * 2.0**-20
    value = [math.floor(2**20 / (1 + c)) for c in range(7)]
    constant, weight = envelope.linear()
    expected = sum(
        int(number) * sum(min(value[c] - int(one) * c for c in range(7)) for one in row)
        for row, number in zip(units, sets.num_tokens, strict=True)
    )
    assert constant == expected * 2.0**-20
    one, two = np.triu_indices(7, 1)
    price = (units[:, one] + units[:, two]) * 2.0**-20
    assert (weight == pair_totals(sets, price, 8)).all()


@pytest.mark.parametrize(
    ("companions", "slope"),
    [(0, -1 / 2), (0.5, -1 / 2), (1, -1 / 3), (1.25, -1 / 4), (1.5, -1 / 6), (2, -1 / 6)],
)
def test_chords_take_the_slopes_between_whole_companions(
    companions: float, slope: float
) -> None:
    """Of 1, 1/2 and 1/3, at the middle of a chord its own, else between the nearest two."""
    sets = TokenSets(experts=np.array([[0, 2, 3]]), num_tokens=np.array([1]))
    envelope = copies._ChordEnvelope(sets, 4)
    even = envelope.pair_slopes()
    assert even[0].tolist() == pytest.approx([2 * -1 / 3] * 3, abs=1e-5)
    of_two = TokenSets(experts=sets.experts[:, :2], num_tokens=sets.num_tokens)
    assert copies._ChordEnvelope(of_two, 4).pair_slopes().tolist() == [[2 * -1 / 2]]
    shared = np.full((4, 4), companions / 2)
    np.fill_diagonal(shared, 1.0)
    shared[1, 0] = shared[0, 1] = 0.9  # expert 1 is none of the set
    envelope.move(shared, 0)
    first = envelope.pair_slopes()[0]
    assert first == pytest.approx(even[0] + 0.1 * (2 * slope - even[0]), abs=1e-5)
    envelope.start(shared)
    assert envelope.pair_slopes()[0].tolist() == pytest.approx([2 * slope] * 3, abs=1e-5)


def test_chords_of_four_experts_blend_all_three_slopes() -> None:
    """1, 1/2, 1/3, 1/4: two companions are between slopes of -1/6 and -1/12."""
    sets = TokenSets(experts=np.array([[0, 1, 2, 3]]), num_tokens=np.array([1]))
    envelope = copies._ChordEnvelope(sets, 4)
    for companions, slope in ((1, -1 / 3), (1.5, -1 / 6), (2, -1 / 8), (2.5, -1 / 12)):
        shared = np.full((4, 4), companions / 3)
        np.fill_diagonal(shared, 1.0)
        envelope.start(shared)
        assert envelope.pair_slopes()[0] == pytest.approx([2 * slope] * 6, abs=1e-5)


def test_without_rounds_prices_are_those_of_chords() -> None:
    sets = random_sets(6, 3, 40, np.random.default_rng(0))
    certificate = CopiesCertificate([sets], [load_of(sets, 6)], [1e9], 2)
    certificate.improve(0)
    layer = certificate._layers[0]
    assert isinstance(layer, copies._Layer)
    chords = copies._ChordEnvelope(sets, 6)
    chords.start(layer._relaxed.shared((0, 0)))
    assert isinstance(layer._envelope, copies._SplitEnvelope)
    assert (layer._envelope._price == chords.pair_slopes().astype(np.float32)).all()


@pytest.mark.parametrize("size", [6, 7])
def test_sets_of_more_than_six_experts_have_too_many_splits(size: int) -> None:
    sets = random_sets(8, size, 20, np.random.default_rng(0))
    certificate = CopiesCertificate([sets], [load_of(sets, 8)], [1e9], 2)
    layer = certificate._layers[0]
    assert isinstance(layer, copies._Layer)
    assert isinstance(layer._envelope, copies._SplitEnvelope) == (size == 6)


def test_blocks_of_sets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five, the last of them shorter."""
    sets = random_sets(8, 3, 60, np.random.default_rng(0))
    shared = np.full((8, 8), 0.25)
    found = []
    for size in (copies._BLOCK_SETS, 5):
        monkeypatch.setattr(copies, "_BLOCK_SETS", size)
        envelope = copies._SplitEnvelope(sets, 8, 4, 2)
        envelope.start(shared)
        for move in range(3):
            envelope.move(shared, move)
        found.append((envelope._price, envelope.linear()[0]))
    assert len(sets.experts) % 5
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


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
