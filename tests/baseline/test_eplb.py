"""The load balancer with replicas, against the example that its authors publish."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.baseline import BaselineProblem
from placer.baseline.eplb import eplb
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.topology import Topology
from placer.solver.balance.packing import packed
from placer.trace import Chunk, Trace, TraceWriter

# README of github.com/deepseek-ai/EPLB: loads of 2 layers of 12 experts in 4 groups, and
# where 16 copies go on 2 nodes of 4 ranks.
LOAD = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
PLACED = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@pytest.fixture
def trace_of(tmp_path):
    """Return a writer of a top-1 trace with the given loads."""

    def write(load, n_group=1):
        total = max(map(sum, load))
        experts = []
        for counts in load:
            ids = np.repeat(np.arange(len(counts)), counts)
            # Layers have different totals: the first expert takes what is missing.
            experts.append(np.r_[ids, np.zeros(total - len(ids), dtype=int)][:, None])
        chunk = Chunk(
            experts=tuple(ids.astype(np.uint8) for ids in experts),
            sequence_ids=np.zeros(total, dtype=np.int32),
            positions=np.arange(total, dtype=np.int32),
        )
        model = ModelSpec(num_experts=tuple(map(len, load)), top_k=1, n_group=n_group)
        name = tmp_path / f"trace-{len(list(tmp_path.iterdir()))}"
        with TraceWriter(directory=name, model=model) as writer:
            writer.append(chunk)
            writer.finish()
        return Trace(name)

    return write


def nodes_of(row, num_nodes, num_ranks):
    """Per node, what its ranks hold, in any order of ranks and slots."""
    held = np.asarray(row).reshape(num_nodes, num_ranks // num_nodes, -1)
    return [sorted(sorted(rank.tolist()) for rank in node) for node in held]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_published_example(trace_of, layer):
    trace = trace_of(LOAD[layer : layer + 1], n_group=4)
    problem = BaselineProblem(
        trace=trace,
        topology=Topology(num_nodes=2, gpus_per_node=4),
        redundant_experts=4,
    )
    row = eplb(problem).physical_to_logical_map[0]
    assert nodes_of(row, 2, 8) == nodes_of(PLACED[layer], 2, 8)


@settings(max_examples=200, deadline=None)
@given(
    load=st.lists(st.integers(0, 50), min_size=4, max_size=9),
    num_ranks=st.integers(1, 6),
    more=st.integers(0, 4),
)
def test_no_rank_holds_two_copies(load, num_ranks, more):
    """Every expert has a slot, ranks are full, and copies lie on different ranks."""
    slots = -(-len(load) // num_ranks) + more
    if slots > len(load):
        return
    held = packed(np.asarray(load, dtype=float), num_ranks, num_ranks * slots)
    ranks = held.reshape(num_ranks, slots)
    assert set(held.tolist()) == set(range(len(load)))
    assert all(len(set(rank)) == slots for rank in ranks.tolist())


def test_without_nodes_that_divide_the_groups_it_packs_globally(trace_of):
    """By hand: 9 twice (4.5 each), 4 and 2: 9 and 4 on one rank, 9 and 2 on the other."""
    trace = trace_of([(9, 4, 2)])
    problem = BaselineProblem(
        trace=trace, topology=Topology(num_nodes=2, gpus_per_node=1), redundant_experts=1
    )
    row = eplb(problem).physical_to_logical_map[0]
    assert sorted(row.reshape(2, 2).tolist()) == [[0, 1], [0, 2]]


def test_a_rank_may_hold_every_expert(trace_of):
    problem = BaselineProblem(
        trace=trace_of([(9, 4)]), topology=Topology(gpus_per_node=2), redundant_experts=2
    )
    assert eplb(problem).physical_to_logical_map[0].tolist() == [0, 1, 0, 1]


def test_more_slots_than_experts_of_a_node_are_refused(trace_of):
    """Each node has a router group of two experts, and one rank of three slots."""
    problem = BaselineProblem(
        trace=trace_of([(9, 4, 2, 1)], n_group=2),
        topology=Topology(num_nodes=2, gpus_per_node=1),
        redundant_experts=2,
    )
    with pytest.raises(UsageError, match="3 slots per rank for 2 experts"):
        eplb(problem)


def test_more_slots_than_experts_are_refused(trace_of):
    problem = BaselineProblem(
        trace=trace_of([(9, 4)]), topology=Topology(gpus_per_node=2), redundant_experts=4
    )
    with pytest.raises(UsageError, match="3 slots per rank for 2 experts"):
        eplb(problem)
