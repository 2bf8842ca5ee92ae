"""Pins, router groups and a plan to start from, against every placement there is."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.migration import num_moved
from placer.placement.pins import Pin, with_pins
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.planner import plan_from_trace
from placer.simulation.simulate import simulate
from placer.solver.balance.router_groups import are_whole, group_kinds
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.solve import solve
from placer.trace import Chunk, Fold, Selection, Trace
from tests.plans import changed

TWO = Topology(gpus_per_node=2)
FOUR = Topology(gpus_per_node=4)
PLAIN = SolveOptions(topology=TWO, goal=Goal(caps=Caps(max_imbalance=2.0)), proof="none")


def solved(chunk: Chunk, options: SolveOptions, n_group: int = 1) -> Placement:
    sizes = tuple(int(ids.max()) + 1 for ids in chunk.experts)
    model = ModelSpec(num_experts=sizes, top_k=chunk.experts[0].shape[1], n_group=n_group)
    affinity = count_affinity([chunk], model, {})
    return solve(affinity, options, None, chunk)[0]


def distinct_ranks(chunk: Chunk, expert_rank: list[np.ndarray]) -> int:
    """Copies under ``fixed``, up to a constant: distinct ranks, token by token."""
    return sum(
        len({int(ranks[e]) for e in row})
        for ids, ranks in zip(chunk.experts, expert_rank, strict=True)
        for row in ids
    )


def ranks_of(placement: Placement) -> list[np.ndarray]:
    return [placement.expert_rank(layer) for layer in range(placement.num_layers)]


def halves(size: int = 6) -> list[np.ndarray]:
    """Every way to put an even number of experts on two ranks."""
    found = []
    for chosen in itertools.combinations(range(size), size // 2):
        ranks = np.ones(size, dtype=int)
        ranks[list(chosen)] = 0
        found.append(ranks)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_pins_hold_and_the_rest_is_the_best_beside_them(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    chunk = make_chunk(num_tokens=60, num_experts=(6, 6), seed=seed)
    pins = (Pin.parse("0:0=1"), Pin.parse("0:5=1"), Pin.parse("1:2=0"))
    found = ranks_of(solved(chunk, changed(PLAIN, pins=pins)))
    assert (found[0][0], found[0][5], found[1][2]) == (1, 1, 0)
    allowed = [
        [one for one in halves() if one[0] == 1 and one[5] == 1],
        [one for one in halves() if one[2] == 0],
    ]
    best = min(distinct_ranks(chunk, list(c)) for c in itertools.product(*allowed))
    assert distinct_ranks(chunk, found) == best


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["x"], "is not LAYER:EXPERT=RANK"),
        (["7:0=0"], "MoE layers are 0 to 1"),
        (["0:9=0"], "experts 0 to 5"),
        (["0:0=2"], "ranks are 0 to 1"),
        (["0:0=0", "0:0=1"], "is pinned to 2 ranks, but its number of slots is 1"),
        (["0:0=0", "0:1=0", "0:2=0", "0:3=0"], "which has 3 slots"),
    ],
)
def test_pins_that_cannot_hold_are_told(texts: list[str], match: str) -> None:
    placement = Placement.from_expert_rank([np.repeat([0, 1], 3)] * 2, 2)
    with pytest.raises(UsageError, match=match):
        with_pins(placement, [Pin.parse(text) for text in texts])


def test_pins_of_copies_exchange_what_no_rank_holds_twice() -> None:
    placement = Placement(
        physical_to_logical_map=(np.asarray([0, 1, 2, 0, 2, 3]),),
        num_experts=(4,),
        num_ranks=2,
    )
    row = with_pins(placement, [Pin.parse("0:3=0")]).physical_to_logical_map[0]
    assert row.tolist() == [0, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole_and_their_experts_sit_best(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    """Two groups of four experts on four ranks: each group fills two ranks."""
    chunk = make_chunk(num_tokens=60, num_experts=(8, 8), top_k=3, seed=seed)
    options = changed(PLAIN, topology=FOUR, max_imbalance=4.0, preserve_groups=True)
    placement = solved(chunk, options, n_group=2)
    for row in placement.physical_to_logical_map:
        blocks = (row // 4).reshape(2, 4)
        assert (blocks == blocks[:, :1]).all(), "a block of slots is one group"
    best = 0
    for ids in chunk.experts:
        inside = halves(4)
        best += min(
            distinct_ranks(replace(chunk, experts=(ids,)), [np.concatenate([one, 2 + two])])
            for one, two in itertools.product(inside, inside)
        )
    assert distinct_ranks(chunk, ranks_of(placement)) == best


def test_several_groups_on_a_rank_follow_their_pairs(
    make_chunk: Callable[..., Chunk],
) -> None:
    """Four groups of two on two ranks: groups 0 and 2 are used together, 1 and 3 too."""
    rng = np.random.default_rng(0)
    first = rng.integers(4, size=200)
    chunk = make_chunk(num_tokens=200, num_experts=(8,))
    experts = np.stack([2 * first + 1, 2 * ((first + 2) % 4)], axis=1).astype(np.uint8)
    chunk = replace(chunk, experts=(experts,))
    placement = solved(chunk, changed(PLAIN, preserve_groups=True), n_group=4)
    rows = placement.physical_to_logical_map[0].reshape(2, 4).tolist()
    assert sorted(rows) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_group_kinds_are_blocks_of_consecutive_experts() -> None:
    assert group_kinds((8, 4), 2)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert group_kinds((8, 4), 4)[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "n_group", "match"),
    [
        ({}, 1, "the model's router has no groups"),
        ({"topology": Topology(gpus_per_node=4)}, 6, "do not divide each other"),
        ({"pins": (Pin.parse("0:0=0"),)}, 2, "may split the groups"),
    ],
)
def test_groups_that_cannot_be_kept_are_told(
    make_chunk: Callable[..., Chunk], changes: dict[str, object], n_group: int, match: str
) -> None:
    chunk = make_chunk(num_tokens=200, num_experts=(12,))
    with pytest.raises(UsageError, match=match):
        solved(chunk, changed(PLAIN, preserve_groups=True, **changes), n_group)


@pytest.mark.parametrize("seed", range(4))
def test_a_start_is_left_only_for_what_pays(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    """Against every placement: copies saved, less the moves at their price."""
    chunk = make_chunk(num_tokens=60, num_experts=(6,), seed=seed)
    start = Placement.from_expert_rank([np.repeat([0, 1], 3)], 2)
    before = distinct_ranks(chunk, ranks_of(start))
    for cost in (0.0, 1.5, 4.0, 1000.0):
        options = changed(PLAIN, placement=start, migration_cost=cost)
        found = solved(chunk, options)

        def price(ranks: np.ndarray, cost: float = cost) -> float:
            # A token's home is any of two ranks: a rank visited costs half a copy.
            moved = int((ranks != np.repeat([0, 1], 3)).sum())
            return distinct_ranks(chunk, [ranks]) / 2 + cost * moved

        best = min(price(ranks) for ranks in halves())
        assert price(ranks_of(found)[0]) == pytest.approx(best)
        assert distinct_ranks(chunk, ranks_of(found)) <= before
        if cost == 1000.0:
            assert num_moved(start, found) == 0


def test_a_start_of_another_shape_is_refused(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk(num_tokens=60, num_experts=(6,))
    start = Placement.from_expert_rank([np.repeat([0, 1, 2], 2)], 3)
    with pytest.raises(UsageError, match="has 3 ranks, the options ask for 2"):
        solved(chunk, changed(PLAIN, placement=start))
    start = Placement.from_expert_rank([np.repeat([0, 1], 3)], 2)
    with pytest.raises(UsageError, match="slots per layer"):
        more = {"redundant_experts": 2, "replica_choice": "hash"}
        solved(chunk, changed(PLAIN, placement=start, **more))
    with pytest.raises(UsageError, match="is the cost of leaving a plan"):
        changed(PLAIN, migration_cost=1.0)
    with pytest.raises(UsageError, match="needs the tokens of a trace"):
        model = ModelSpec(num_experts=(6,), top_k=2)
        solve(count_affinity([chunk], model, {}), changed(PLAIN, placement=start))


def crowded_chunk(make_chunk: Callable[..., Chunk]) -> Chunk:
    """Tokens that mostly use two of experts 0, 1 and 2: cheapest where all load is."""
    rng = np.random.default_rng(3)
    chunk = make_chunk(num_tokens=400, num_experts=(6, 6), num_sequences=10)
    pairs = np.array([[0, 1], [1, 2], [2, 0], [3, 4], [4, 5], [5, 3]])
    kinds = rng.choice(6, size=400, p=[0.28, 0.28, 0.28, 0.06, 0.05, 0.05])
    experts = pairs[kinds].astype(np.uint8)
    return replace(chunk, experts=(experts, experts))


CROWDED = Placement.from_expert_rank([np.repeat([0, 1], 3)] * 2, 2)


def max_imbalance(chunk: Chunk, expert_rank: list[np.ndarray]) -> float:
    """Max/mean rank load of the worst layer, pair by pair."""
    worst = 0.0
    for ids, ranks in zip(chunk.experts, expert_rank, strict=True):
        load = np.bincount(ranks[ids].ravel(), minlength=2)
        worst = max(worst, load.max() / load.mean())
    return worst


@pytest.mark.parametrize("policy", ["fixed", "follow", "token", "request"])
def test_a_start_above_the_cap_is_brought_under_it_whatever_it_costs(
    make_chunk: Callable[..., Chunk], policy: str
) -> None:
    chunk = crowded_chunk(make_chunk)
    assert max_imbalance(chunk, ranks_of(CROWDED)) > 1.6
    options = changed(PLAIN, policy=policy, placement=CROWDED, max_imbalance=1.25)
    found = ranks_of(solved(chunk, options))
    assert max_imbalance(chunk, found) <= 1.25
    if policy == "fixed":
        allowed = [one for one in halves() if max_imbalance(chunk, [one] * 2) <= 1.25]
        best = min(distinct_ranks(chunk, [one] * 2) for one in allowed)
        assert distinct_ranks(chunk, found) == best
        assert best > distinct_ranks(chunk, ranks_of(CROWDED)), "the start was cheaper"


def test_a_table_s_placement_pays_for_its_moves(make_chunk: Callable[..., Chunk]) -> None:
    """Moves that cost more than all copies are not made, however few copies are left."""
    chunk = make_chunk(num_tokens=200, num_experts=(6, 6), num_sequences=10)
    options = changed(PLAIN, policy="token", placement=CROWDED)
    assert num_moved(CROWDED, solved(chunk, options)) > 0
    dear = changed(options, migration_cost=1000.0)
    assert num_moved(CROWDED, solved(chunk, dear)) == 0


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("proof", ["quick", "full"])
def test_a_bound_holds_for_what_pins_keep_above_the_cap(
    make_chunk: Callable[..., Chunk], policy: str, proof: str
) -> None:
    """Only one placement has these pins, so it is the optimum: no bound may be above."""
    chunk = crowded_chunk(make_chunk)
    pins = tuple(Pin(layer=n, expert=e, rank=0) for n in range(2) for e in range(3))
    options = changed(
        PLAIN, policy=policy, pins=pins, max_imbalance=1.25, relax=True, proof=proof
    )
    model = ModelSpec(num_experts=(6, 6), top_k=2)
    placement, report = solve(count_affinity([chunk], model, {}), options, None, chunk)
    assert (ranks_of(placement)[0] == np.repeat([0, 1], 3)).all()
    assert set(report.relaxed_layers) == {"0", "1"}
    assert report.bound is not None
    assert report.pairs is not None
    assert report.bound <= report.objective + 1e-6
    assert report.pairs.bound <= report.pairs.objective


@pytest.mark.parametrize("rule", ["hash", "sglang-static"])
def test_groups_with_copies_stay_whole_and_no_rank_gets_busier(
    make_chunk: Callable[..., Chunk], rule: str
) -> None:
    """The first of four groups is hot: its two ranks are above the cap whatever is done."""
    rng = np.random.default_rng(0)
    taste = np.where(np.arange(16) < 4, 2.0, 0.0)
    ids = [np.argsort(-(taste + rng.gumbel(size=(600, 16))), axis=1) for _ in range(2)]
    chunk = replace(
        make_chunk(num_tokens=600, num_experts=(16, 16)),
        experts=tuple(one[:, :2].astype(np.uint8) for one in ids),
    )
    options = changed(
        PLAIN,
        topology=Topology(gpus_per_node=8),
        preserve_groups=True,
        redundant_experts=8,
        replica_choice=rule,
        max_imbalance=1.1,
        relax=True,
    )
    model = ModelSpec(num_experts=(16, 16), top_k=2, n_group=4)
    affinity = count_affinity([chunk], model, {})
    placement, report = solve(affinity, options, None, chunk)
    even, balance = solve(affinity, changed(options, objective="balance"))
    assert are_whole(placement, 4, 4) and are_whole(even, 4, 4)
    assert set(report.relaxed_layers) == {"0", "1"}
    if rule == "hash":  # the load does not depend on the homes
        for layer, imbalance in report.relaxed_layers.items():
            assert imbalance <= balance.relaxed_layers[layer] + 1e-6
    else:  # what balancing reaches for homes drawn at random, counted for even ones
        reached = simulate(even, chunk, replica_choice=rule)["fixed"]
        worst = max(report.relaxed_layers.values())
        assert worst <= reached.load_imbalance_max + 0.02


@pytest.mark.parametrize(("n_group", "num_ranks"), [(2, 4), (8, 2), (8, 4)])
def test_whole_groups_reach_the_evenest_load_there_is(
    make_chunk: Callable[..., Chunk], n_group: int, num_ranks: int
) -> None:
    """A cap that nothing meets is relaxed to the best of all placements of whole groups."""
    rng = np.random.default_rng(8)
    score = rng.gumbel(size=16) + rng.gumbel(size=(400, 16))
    ids = np.argsort(-score, axis=1)[:, :2].astype(np.uint8)
    chunk = replace(make_chunk(num_experts=(16,)), experts=(ids,))
    load = np.bincount(ids.ravel(), minlength=16)
    if n_group < num_ranks:  # each group has two ranks to itself
        best = max(least_busiest(one, 2) for one in load.reshape(n_group, -1))
    else:
        best = least_busiest(load.reshape(n_group, -1).sum(axis=1), num_ranks)
    options = changed(
        PLAIN,
        topology=Topology(gpus_per_node=num_ranks),
        preserve_groups=True,
        max_imbalance=1.0,
        relax=True,
    )
    placement = solved(chunk, options, n_group)
    assert np.bincount(placement.expert_rank(0), load).max() == best


def least_busiest(load: np.ndarray, num_ranks: int) -> float:
    """Return the least load of the busiest rank, of all assignments with equal counts."""
    ranks = np.repeat(np.arange(num_ranks), len(load) // num_ranks).tolist()
    return min(
        float(np.bincount(one, load).max()) for one in set(itertools.permutations(ranks))
    )


def test_experts_that_only_copies_fill_the_ranks_with_are_placed(
    make_trace: Callable[..., Trace],
) -> None:
    """Ten experts on four ranks with two copies; contiguous is 0 to 9 and 0 and 1 again."""
    trace = make_trace(num_experts=(10, 10), num_sequences=40, num_tokens=800)
    options = changed(
        PLAIN, topology=FOUR, redundant_experts=2, replica_choice="hash", max_imbalance=2.0
    )
    for policy in ("fixed", "follow"):
        plan = plan_from_trace(
            trace, changed(options, policy=policy), Selection(Fold(0, 2))
        )
        assert [len(row) for row in plan.placement.physical_to_logical_map] == [12, 12]
        assert set(plan.metrics["baselines"]) == {"contiguous", "eplb"}
        assert plan.metrics["profile"][policy]["load_imbalance_max"] <= 2.0
    assert contiguous((10,), 4, 1, 2).to_json() == [[*range(10), 0, 1]]
