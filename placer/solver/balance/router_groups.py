"""Router groups: placements that a permuted checkpoint with router groups can hold.

Such a router picks ``topk_group`` of ``n_group`` groups of consecutive experts first
(DeepSeek-V3, arXiv 2412.19437, section 2.1.2), so renumbering experts keeps what the model
computes only if whole groups take the place of whole groups. Where groups are fewer than
ranks, a group has some consecutive ranks to itself; where they are more, a rank holds whole
groups.
"""

from collections.abc import Sequence

import numpy as np

from placer.affinity import Affinity
from placer.arrays import FloatArray, IntArray
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.solver.balance.load_caps import balance_layer
from placer.solver.options import SolveOptions
from placer.solver.problem.pairs import PlacementProblem, placement_problem
from placer.solver.search.pair_search import Search


def group_kinds(num_experts: Sequence[int], n_group: int) -> tuple[IntArray, ...]:
    """Return L arrays ``[E]``: the router group of every expert."""
    return tuple(np.arange(size) * n_group // size for size in num_experts)


def limits_nodes(model: ModelSpec) -> bool:
    """Whether the router uses few of its groups, so that whole groups mean few nodes."""
    return model.n_group > 1 and model.topk_group < model.n_group


def are_whole(placement: Placement, n_group: int, num_blocks: int) -> bool:
    """Return whether all replicas of a group's experts are in one block of ranks."""
    kinds = group_kinds(placement.num_experts, n_group)
    for kind, row in zip(kinds, placement.physical_to_logical_map, strict=True):
        block = np.arange(len(row)) * num_blocks // len(row)
        if len({*zip(kind[row].tolist(), block.tolist(), strict=True)}) > n_group:
            return False
    return True


def most_nodes(placement: Placement, model: ModelSpec) -> int:
    """Return on how many nodes, at most, the experts of one token can be.

    A token has ``top_k`` experts of ``topk_group`` groups. 1 where there is one node.
    """
    num_nodes = placement.num_nodes
    kinds = group_kinds(placement.num_experts, model.n_group)
    most = 1
    for kind, row in zip(kinds, placement.physical_to_logical_map, strict=True):
        node = np.arange(len(row)) * num_nodes // len(row)
        pairs = np.unique(np.stack([kind[row], node]), axis=1)
        spread = np.sort(np.unique(pairs[0], return_counts=True)[1])[::-1]
        most = max(most, int(spread[: model.topk_group].sum()))
    return min(most, num_nodes, model.top_k)


def blocks_of_groups(model: ModelSpec, options: SolveOptions) -> int:
    """Return in how many blocks of ranks balancing keeps router groups; 1 to split them.

    Blocks are nodes, where nodes share the groups out evenly: a router that uses few groups
    then sends a token to few nodes. So does EPLB (``hierarchical``).

    Raises
    ------
    UsageError
        If ``preserve_groups`` asks for what the ranks do not allow.
    """
    num_ranks, num_nodes = options.topology.num_ranks, options.topology.num_nodes
    start = options.start
    if start.preserve_groups:
        _require_groups(model.n_group, num_ranks)
        return min(model.n_group, num_ranks)
    fits = model.n_group % num_nodes == 0 and not any(
        size % model.n_group
        or (size + options.goal.redundant_experts) // num_ranks > size // num_nodes
        for size in model.num_experts
    )
    if start.ignore_groups or not limits_nodes(model) or not fits:
        return 1
    placed = start.placement
    if placed is not None and not are_whole(placed, model.n_group, num_nodes):
        return 1
    return num_nodes


def place_groups(affinity: Affinity, options: SolveOptions, session: Session) -> Placement:
    """Place whole router groups by the pairs between them, under the load cap.

    Where the cap is out of reach, no rank is busier than whole groups must make one. Inside
    the ranks of a group its experts are balanced; who sits where is left to the refinement,
    among experts of a group. The search stops at the session's deadline.

    Raises
    ------
    UsageError
        If the model has no groups, or groups and ranks do not divide each other.
    """
    n_group, topology = affinity.model.n_group, options.topology
    num_ranks = topology.num_ranks
    _require_groups(n_group, num_ranks)
    blocks = min(n_group, num_ranks)
    deadline = session.deadline
    caps, start = [], []
    for counts in affinity.load:
        load = counts.reshape(n_group, -1).sum(axis=1).astype(np.float64)
        cap = options.goal.caps.most_load(float(load.sum()), blocks)
        found = balance_layer(load, blocks, cap, deadline)
        caps.append(max(cap, found.max_load))
        start.append(found.expert_rank)
    policy = options.start_policies(affinity.model.top_k)[0]
    search = Search(
        problem=_between_groups(affinity, policy, topology, caps),
        expert_rank=start,
        rng=np.random.default_rng(session.seed),
        params=options.params,
    )
    search.run(deadline=deadline)
    width = num_ranks // blocks
    ranks = [
        _inside(block, counts.astype(np.float64), n_group, width, deadline)
        for block, counts in zip(search.expert_rank, affinity.load, strict=True)
    ]
    return Placement.from_expert_rank(ranks, num_ranks, topology.num_nodes)


def _require_groups(n_group: int, num_ranks: int) -> None:
    if n_group == 1:
        raise UsageError(
            "--preserve-groups: the model's router has no groups, so every plan can be "
            "exported",
            "leave out --preserve-groups",
        )
    if max(n_group, num_ranks) % min(n_group, num_ranks):
        raise UsageError(
            f"--preserve-groups: {n_group} router groups and {num_ranks} ranks do not "
            "divide each other, so a rank would hold parts of groups",
            f"choose a number of ranks that {n_group} divides, or that divides {n_group}; "
            "or leave out the option and use an engine that reads a map",
        )


def _between_groups(
    affinity: Affinity, policy: Policy, topology: Topology, caps: list[float]
) -> PlacementProblem:
    """Return the problem of groups in blocks of ranks, as if groups were experts."""
    n_group = affinity.model.n_group
    blocks = min(n_group, topology.num_ranks)
    # Blocks are ranks of their own; a node that holds less than one is not distinguished.
    num_nodes = topology.num_nodes if blocks % topology.num_nodes == 0 else 1
    between_blocks = Topology(
        num_nodes=num_nodes,
        gpus_per_node=blocks // num_nodes,
        inter_cost=topology.inter_cost,
        intra_cost=topology.intra_cost,
        cost=_between_blocks(topology, blocks),
    )
    within = []
    for counts in affinity.coactivation:
        grouped = _by_group(counts, n_group)
        np.fill_diagonal(grouped, 0)
        within.append(grouped)
    grouped_affinity = Affinity(
        model=ModelSpec(num_experts=(n_group,) * len(affinity.load), top_k=1),
        num_tokens=affinity.num_tokens,
        load=tuple(counts.reshape(n_group, -1).sum(axis=1) for counts in affinity.load),
        transition=tuple(_by_group(counts, n_group) for counts in affinity.transition),
        coactivation=tuple(within),
        provenance={},
    )
    return placement_problem(grouped_affinity, policy, between_blocks, caps)


def _between_blocks(topology: Topology, blocks: int) -> tuple[tuple[int, ...], ...] | None:
    """Return a matrix of costs summed over the ranks of blocks, if there is one."""
    if topology.cost is None:
        return None
    summed = _by_group(np.array(topology.cost, dtype=np.int64), blocks)
    np.fill_diagonal(summed, 0)
    return tuple(map(tuple, summed.tolist()))


def _by_group(counts: IntArray, n_group: int) -> IntArray:
    rows, columns = (size // n_group for size in counts.shape)
    summed: IntArray = counts.reshape(n_group, rows, n_group, columns).sum(axis=(1, 3))
    return summed


def _inside(
    block: IntArray, load: FloatArray, n_group: int, width: int, deadline: Deadline
) -> IntArray:
    """Return ``[E]``: the rank of every expert, from the block of its group."""
    by_group = load.reshape(n_group, -1)
    places = [balance_layer(one, width, 0.0, deadline).expert_rank for one in by_group]
    return np.concatenate(
        [first * width + place for first, place in zip(block, places, strict=True)]
    )
