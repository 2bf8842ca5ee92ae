"""Plans of the integer program: optimal under caps, pins, groups and a start."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.pins import Pin
from placer.placement.reference import random
from placer.placement.solver_report import SolverReport
from placer.placement.topology import Topology
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import Proof, SolveOptions
from placer.solver.params import SolverParams
from placer.solver.partition import improved
from placer.solver.search import dynamic
from placer.solver.solve import solve
from placer.solver.start import Start
from placer.trace import Chunk
from tests.solver.enumeration import every_layer

PARAMS = SolverParams(num_sweeps=1, num_starts=1)
RANKS = Topology(gpus_per_node=4)


@pytest.fixture(autouse=True)
def no_search_over_all_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few assignments are solved exactly, which leaves the integer program nothing."""
    monkeypatch.setattr(dynamic, "MAX_ASSIGNMENTS", 0)


def copies(chunk: Chunk, layer: int, ranks: np.ndarray) -> int:
    """Count the distinct ranks of every token."""
    return sum(len(set(ranks[row].tolist())) for row in chunk.experts[layer])


def solved(
    chunk: Chunk,
    sizes: tuple[int, ...],
    goal: Goal,
    start: Start | None = None,
    proof: Proof = "quick",
    n_group: int = 1,
    session: Session | None = None,
) -> tuple[Placement, SolverReport]:
    top_k = chunk.experts[0].shape[1]
    model = ModelSpec(num_experts=sizes, top_k=top_k, n_group=n_group, topk_group=n_group)
    options = SolveOptions(
        topology=RANKS, goal=goal, start=start or Start(), proof=proof, params=PARAMS
    )
    return solve(count_affinity([chunk], model, {}), options, session, chunk)


def test_one_node_is_solved_as_ranks_are(make_chunk: Callable[..., Chunk]) -> None:
    """Engines that send one copy per node send one per rank there."""
    chunk = make_chunk(num_tokens=60, num_experts=(8, 8), top_k=3, seed=1)
    caps = Caps(max_imbalance=1.4, relax=True)
    ends = [
        solved(chunk, (8, 8), Goal(caps=caps, exchange=one))
        for one in ("per-rank", "per-node")
    ]
    assert [report.status for _, report in ends] == ["optimal", "optimal"]
    assert ends[0][1].objective == ends[1][1].objective
    assert ends[0][1].layer_gaps == ends[1][1].layer_gaps == (0.0, 0.0)


def under_cap(chunk: Chunk, layer: int, size: int, cap: float) -> Iterator[np.ndarray]:
    load = np.bincount(chunk.experts[layer].ravel(), minlength=size)
    for ranks in every_layer(size, 4):
        if np.bincount(ranks, load).max() <= cap * load.sum() / 4 + 1e-9:
            yield ranks


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["plain", "pins", "received"])
def test_no_placement_under_what_is_asked_is_better(
    make_chunk: Callable[..., Chunk], kind: str, seed: int
) -> None:
    sizes = (8, 8)
    chunk = make_chunk(num_tokens=60, num_experts=sizes, top_k=3, seed=seed)
    given = ("0:1=2", "0:6=2", "1:3=0") if kind == "pins" else ()
    pins = tuple(map(Pin.parse, given))
    most = None
    allowed = [list(under_cap(chunk, n, 8, 1.4)) for n in range(2)]
    if kind == "received":
        busiest = [
            min(_busiest(chunk, n, ranks) for ranks in every)
            for n, every in enumerate(allowed)
        ]
        most = max(busiest) * 3 / 60 * 1.02
        allowed = [
            [one for one in every if _busiest(chunk, n, one) * 3 / 60 <= most]
            for n, every in enumerate(allowed)
        ]
    for pin in pins:
        allowed[pin.layer] = [
            one for one in allowed[pin.layer] if one[pin.expert] == pin.rank
        ]
    least = sum(
        min(copies(chunk, n, ranks) for ranks in every) for n, every in enumerate(allowed)
    )
    caps = Caps(max_imbalance=1.4, max_received_copies=most, relax=True)
    placement, report = solved(chunk, sizes, Goal(caps=caps), Start(pins=pins))
    assert report.status == "optimal"
    assert report.bound == pytest.approx(report.objective, abs=1e-6)
    assert not report.relaxed_receive_layers
    assert report.objective == pytest.approx(least * 3 / (4 * 60 * 2), abs=1e-6)
    for pin in pins:
        assert placement.expert_rank(pin.layer)[pin.expert] == pin.rank


def _busiest(chunk: Chunk, layer: int, ranks: np.ndarray) -> int:
    used = [set(ranks[row].tolist()) for row in chunk.experts[layer]]
    return max(sum(rank in one for one in used) for rank in range(4))


@pytest.mark.parametrize("n_group", [2, 8])
def test_groups_stay_whole_in_the_optimum(
    make_chunk: Callable[..., Chunk], n_group: int
) -> None:
    """Groups of eight on two ranks each, and groups of two on ranks of four."""
    chunk = make_chunk(num_tokens=80, num_experts=(16,), top_k=3, seed=3)
    start = Start(preserve_groups=True)
    goal = Goal(caps=Caps(max_imbalance=2.0))
    placement, report = solved(chunk, (16,), goal, start, n_group=n_group)
    assert report.status == "optimal"
    ranks = placement.expert_rank(0)
    block = ranks // max(1, 4 // n_group)
    for group in np.arange(16).reshape(n_group, -1):
        assert len(set(block[group].tolist())) == 1


def test_a_stopped_proof_keeps_plan_and_bound(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk(num_tokens=60, num_experts=(8, 8), top_k=3, seed=1)
    session = Session(deadline=Deadline(seconds=0.0))
    placement, report = solved(chunk, (8, 8), Goal(), session=session)
    assert placement.num_layers == 2
    assert report.bound is None or report.bound <= report.objective


def test_bounds_of_follow_know_the_set_partition(make_chunk: Callable[..., Chunk]) -> None:
    """They hold for all placements of two layers."""
    chunk = make_chunk(num_tokens=40, num_experts=(4, 4), top_k=2, seed=2)
    goal = Goal(policy="follow", caps=Caps(max_imbalance=9.0))
    options = SolveOptions(topology=Topology(gpus_per_node=2), goal=goal, params=PARAMS)
    model = ModelSpec(num_experts=(4, 4), top_k=2)
    _, report = solve(count_affinity([chunk], model, {}), options, None, chunk)
    assert "set partition" in report.bound_method
    least = min(
        _follow_cost(chunk, pair) for pair in itertools.product(every_layer(4, 2), repeat=2)
    )
    assert report.bound is not None
    assert report.bound <= least / (40 * 2) + 1e-9


def _follow_cost(chunk: Chunk, placed: tuple[np.ndarray, ...]) -> float:
    """Copies sent and returned; the first home is any rank."""
    total = 0.0
    for token in range(chunk.num_tokens):
        home = None
        for ranks, experts in zip(placed, chunk.experts, strict=True):
            served = ranks[experts[token]].tolist()
            used = set(served)
            total += len(used) / 2 if home is None else len(used - {home})
            home = max(served, key=served.count)
            total += len(used - {home})
    return total


def test_a_start_that_moves_little_is_kept(make_chunk: Callable[..., Chunk]) -> None:
    """What moves cost is part of the price: the optimum of copies alone is not taken."""
    chunk = make_chunk(num_tokens=60, num_experts=(8,), top_k=3, seed=5)
    served = random((8,), 4, seed=0)
    free = Start(placement=served)
    dear = Start(placement=served, migration_cost=1e6)
    goal = Goal(caps=Caps(max_imbalance=9.0))
    stays, _ = solved(chunk, (8,), goal, dear)
    moves, report = solved(chunk, (8,), goal, free)
    assert (stays.expert_rank(0) == served.expert_rank(0)).all()
    assert report.status == "optimal"
    assert copies(chunk, 0, moves.expert_rank(0)) < copies(chunk, 0, stays.expert_rank(0))


@pytest.mark.parametrize("columns", [0, 10_000])
def test_the_gap_of_a_layer_is_that_of_its_own_bound(
    make_chunk: Callable[..., Chunk], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Without the integer program, too, no gap is below what is really to be gained."""
    monkeypatch.setattr(improved, "FULL_COLUMNS", columns)
    sizes, cap = (8, 8), 1.4
    chunk = make_chunk(num_tokens=60, num_experts=sizes, top_k=3, seed=1)
    goal = Goal(caps=Caps(max_imbalance=cap, relax=True))
    placement, report = solved(chunk, sizes, goal, proof="full")
    reached = [copies(chunk, n, placement.expert_rank(n)) for n in range(2)]
    bounds = []
    for layer, (gap, most) in enumerate(zip(report.layer_gaps, reached, strict=True)):
        every = under_cap(chunk, layer, 8, cap)
        best = min(copies(chunk, layer, ranks) for ranks in every)
        assert 1 - best / most <= gap < 0.5
        assert gap == 0 or not columns
        bounds.append((1 - gap) * most)
    assert 1 - sum(bounds) / sum(reached) == pytest.approx(report.gap, abs=2e-6)


@pytest.mark.parametrize(
    ("goal", "proof"),
    [
        (Goal(policy="follow", caps=Caps(max_imbalance=2.0)), "full"),
        (Goal(caps=Caps(max_imbalance=2.0)), "none"),
    ],
)
def test_a_plan_without_bounds_of_layers_has_no_gap_of_them(
    make_chunk: Callable[..., Chunk], goal: Goal, proof: Proof
) -> None:
    chunk = make_chunk(num_tokens=60, num_experts=(8, 8), top_k=3, seed=1)
    _, report = solved(chunk, (8, 8), goal, proof=proof)
    assert "layer_gaps" not in report.to_json()
