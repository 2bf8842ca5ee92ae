"""What every baseline promises: legal placements, equal slots, planted groups found.

The planted optimum of a tiny instance is told from outside, by trying every placement.
"""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.baseline import BASELINES, BaselineProblem
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.topology import Topology
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter

INSTALLED = {"metis": "pymetis", "mt-kahypar": "mtkahypar"}
# Those that group experts which one token uses in one layer, and those that link layers.
BY_COACTIVATION = ["grace", "occult", "sem-moe", "kernighan-lin", "metis", "mt-kahypar"]


def build(name, problem):
    if name in INSTALLED:
        pytest.importorskip(INSTALLED[name])
    return BASELINES[name](problem)


def write_trace(folder, experts, token_ids, num_experts, n_group=1):
    chunk = Chunk(
        experts=tuple(np.asarray(ids, dtype=np.uint8) for ids in experts),
        token_ids=np.asarray(token_ids, dtype=np.int32),
        sequence_ids=(np.arange(len(token_ids)) // 30).astype(np.int32),
        positions=(np.arange(len(token_ids)) % 30).astype(np.int32),
    )
    model = ModelSpec(
        num_experts=num_experts, top_k=chunk.experts[0].shape[1], n_group=n_group
    )
    with TraceWriter(directory=folder, model=model) as writer:
        writer.append(chunk)
        writer.finish()
    return Trace(folder)


@pytest.fixture
def planted(tmp_path):
    """Tokens that stay in one of two hidden groups of four experts, layer by layer.

    Experts are shuffled in every layer, token ids tell the group, and one token in ten
    strays.
    """
    rng = np.random.default_rng(5)
    num_tokens, layers = 600, 3
    home = rng.integers(2, size=num_tokens)
    experts, hidden = [], []
    for _ in range(layers):
        groups = rng.permutation(8).reshape(2, 4)
        stray = rng.random(num_tokens) < 0.1
        rows = [
            rng.permutation(groups[h ^ s])[:2] for h, s in zip(home, stray, strict=True)
        ]
        experts.append(rows)
        hidden.append({frozenset(group.tolist()) for group in groups})
    token_ids = 2 * rng.integers(10, size=num_tokens) + home
    trace = write_trace(tmp_path / "planted", experts, token_ids, (8,) * layers)
    return trace, hidden


def groups_of(placement):
    return [
        {
            frozenset(np.flatnonzero(placement.expert_rank(layer) == r).tolist())
            for r in range(placement.num_ranks)
        }
        for layer in range(placement.num_layers)
    ]


def fewest_split_pairs(ids, num_experts, num_ranks):
    """Try every placement of a layer: the least number of pairs on two ranks."""
    slots, least = num_experts // num_ranks, None
    for ranks in itertools.product(range(num_ranks), repeat=num_experts):
        if any(ranks.count(r) != slots for r in range(num_ranks)):
            continue
        split = sum(ranks[i] != ranks[j] for i, j in ids.tolist())
        least = split if least is None else min(least, split)
    return least


@pytest.mark.parametrize("name", BY_COACTIVATION)
def test_planted_groups_are_found_and_are_the_best(planted, name):
    trace, hidden = planted
    problem = BaselineProblem(trace=trace, topology=Topology(gpus_per_node=2))
    placement = build(name, problem)
    assert groups_of(placement) == hidden
    first = trace.read().experts[0]
    ranks = placement.expert_rank(0)
    split = int((ranks[first[:, 0]] != ranks[first[:, 1]]).sum())
    assert split == fewest_split_pairs(first, 8, 2)


def test_exflow_links_the_planted_groups_of_all_layers(planted):
    """Its own objective, pairs that change rank between layers, by trying every one."""
    trace, hidden = planted
    problem = BaselineProblem(
        trace=trace, topology=Topology(gpus_per_node=2), solver_seconds=2
    )
    placement = build("exflow", problem)
    assert groups_of(placement) == hidden
    experts = trace.read().experts

    def moved(layer, one, two):
        first, second = experts[layer], experts[layer + 1]
        return int((one[first][:, :, None] != two[second][:, None, :]).sum())

    every = [
        np.isin(np.arange(8), chosen).astype(int)
        for chosen in itertools.combinations(range(8), 4)
    ]
    first, second = (
        np.array([[moved(layer, one, two) for two in every] for one in every])
        for layer in (0, 1)
    )
    least = (first[:, :, None] + second).min()
    ranks = [placement.expert_rank(layer) for layer in range(3)]
    assert moved(0, *ranks[:2]) + moved(1, *ranks[1:]) == least


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.sampled_from([(1, 2), (1, 3), (1, 6), (2, 2), (3, 2), (1, 12), (1, 1)]),
    num_experts=st.sampled_from([(12, 12), (12, 24, 36), (24,)]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", BASELINES)
def test_slots_are_equal_and_the_seed_decides(
    make_trace, tmp_path, name, shape, num_experts, seed
):
    """``Placement`` refuses what is illegal; here: no more slots on a rank than another.

    Odd and single ranks, nodes, one expert per rank, experts that nobody uses, layers of
    different size, a single layer.
    """
    trace = make_trace(
        f"trace-{len(list(tmp_path.iterdir()))}",
        num_experts=num_experts,
        num_tokens=40,
        seed=seed,
    )
    num_nodes, gpus_per_node = shape
    topology = Topology(num_nodes=num_nodes, gpus_per_node=gpus_per_node)
    problem = BaselineProblem(trace=trace, topology=topology, seed=seed, solver_seconds=0.1)
    one, two = build(name, problem), build(name, problem)
    assert one.to_json() == two.to_json()
    assert (one.num_ranks, one.num_nodes) == (topology.num_ranks, num_nodes)
    for layer, size in enumerate(num_experts):
        held = np.bincount(one.expert_rank(layer), minlength=topology.num_ranks)
        assert set(held) == {size // topology.num_ranks}


@pytest.mark.parametrize("name", BASELINES)
def test_only_the_profile_fold_is_seen(make_trace, name):
    """Tokens outside the fold do not change a placement."""
    trace = make_trace(num_sequences=20)
    tokens = trace.read(Selection(Fold(0, 2)))
    with TraceWriter(
        directory=trace.directory.parent / "half", model=trace.model
    ) as writer:
        writer.append(tokens)
        writer.finish()
    topology = Topology(gpus_per_node=4)
    seen = BaselineProblem(
        trace=trace, selection=Selection(Fold(0, 2)), topology=topology, solver_seconds=0.1
    )
    half = BaselineProblem(
        trace=Trace(trace.directory.parent / "half"), topology=topology, solver_seconds=0.1
    )
    assert build(name, seen).to_json() == build(name, half).to_json()


@pytest.mark.parametrize(
    "name", [name for name in BASELINES if name not in ("eplb", "contiguous")]
)
def test_experts_that_fit_only_with_replicas_are_refused(make_trace, name):
    trace = make_trace(num_experts=(6, 6))
    topology = Topology(gpus_per_node=4)
    problem = BaselineProblem(trace=trace, topology=topology, redundant_experts=2)
    with pytest.raises(UsageError, match="6 slots do not divide over 4 ranks") as error:
        build(name, problem)
    assert "1, 2, 3, 6" in error.value.hint


def test_slots_that_do_not_divide_are_refused(make_trace):
    with pytest.raises(UsageError, match="9 slots do not divide over 4 ranks"):
        BaselineProblem(
            trace=make_trace(), topology=Topology(gpus_per_node=4), redundant_experts=1
        )


@pytest.mark.parametrize("option", ["redundant_experts", "seed", "solver_seconds"])
def test_negative_numbers_are_refused(make_trace, option):
    with pytest.raises(UsageError, match=f"{option} must not be negative, got -1"):
        BaselineProblem(
            trace=make_trace(), topology=Topology(gpus_per_node=4), **{option: -1}
        )


@pytest.mark.parametrize("name", INSTALLED)
def test_a_partitioner_that_is_not_installed_is_named(make_trace, monkeypatch, name):
    from placer.baseline.mtkahypar import _partitioner

    _partitioner.cache_clear()
    monkeypatch.setitem(sys.modules, INSTALLED[name], None)
    problem = BaselineProblem(trace=make_trace(), topology=Topology(gpus_per_node=4))
    with pytest.raises(UsageError, match=f"{name} needs the package") as error:
        BASELINES[name](problem)
    assert "placer[baselines]" in error.value.hint
