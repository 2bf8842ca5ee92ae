"""Sizes of DeepSeek-V3 and Kimi-K2: how much of a planted structure is found, and the cost.

Synthetic tokens: every expert belongs to a node in secret, the same number on each; a
token prefers one node per layer, which it mostly keeps from layer to layer, and takes three
of four experts from it.
"""

import json
import os
import resource
import time

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.simulation.simulate import simulate
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.solve import solve
from placer.trace import Chunk

NODE_COPIES = "remote_node_copies_per_token"
LOYALTY, KEEP = 0.75, 0.9
SEQUENCE = 256


def planted(model: ModelSpec, num_ranks: int, num_nodes: int, seed: int) -> Placement:
    """Draw the secret placement."""
    rng = np.random.default_rng(seed)
    return Placement(
        physical_to_logical_map=tuple(rng.permutation(n) for n in model.num_experts),
        num_experts=model.num_experts,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


def draw(model: ModelSpec, secret: Placement, num_tokens: int, seed: int) -> Chunk:
    """Draw tokens that prefer the experts of one secret node."""
    rng = np.random.default_rng(seed)
    node = rng.integers(secret.num_nodes, size=num_tokens)
    experts = []
    for layer, size in enumerate(model.num_experts):
        moved = rng.random(num_tokens) > KEEP
        node = np.where(moved, rng.integers(secret.num_nodes, size=num_tokens), node)
        home = secret.expert_rank(layer) // secret.ranks_per_node
        # Gumbel keys draw top-k experts without replacement, in proportion to weights.
        share = size / secret.num_nodes
        inside, outside = LOYALTY / share, (1 - LOYALTY) / (size - share)
        weight = np.where(home == node[:, None], inside, outside)
        keys = np.log(weight) + rng.gumbel(size=(num_tokens, size))
        chosen = np.argpartition(-keys, model.top_k, axis=1)[:, : model.top_k]
        experts.append(chosen.astype(np.uint8 if size <= 256 else np.uint16))
    tokens = np.arange(num_tokens)
    return Chunk(
        experts=tuple(experts),
        sequence_ids=(tokens // SEQUENCE).astype(np.int32),
        positions=(tokens % SEQUENCE).astype(np.int32),
    )


def node_copies(placement: Placement, tokens: Chunk, policy: str) -> float:
    found = simulate(placement, tokens)[policy].to_json()[NODE_COPIES]
    return float(found)


def solved(
    profile: Chunk, model: ModelSpec, num_ranks: int, num_nodes: int, policy: str
) -> tuple[float, float, Placement]:
    """Solve in a child; return its seconds, its peak memory in GiB, and the placement."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        options = SolveOptions(
            topology=Topology(num_nodes=num_nodes, gpus_per_node=num_ranks // num_nodes),
            goal=Goal(
                exchange="per-node",
                policy=policy,
                caps=Caps(max_imbalance=1.10, relax=True),
            ),
            proof="none",
        )
        began = time.perf_counter()
        affinity = count_affinity([profile], model, {})
        placement, _ = solve(affinity, options, None, profile)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        told = {"seconds": seconds, "peak": peak, "slots": placement.to_json()}
        with os.fdopen(write, "w") as stream:
            json.dump(told, stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        found = json.load(stream)
    os.waitpid(child, 0)
    placement = Placement.from_json(
        found["slots"], model.num_experts, num_ranks=num_ranks, num_nodes=num_nodes
    )
    return found["seconds"], found["peak"], placement


#: Layers, experts, ranks and tokens of the smallest instance whose growth is measured.
SMALLEST = (4, 64, 8, 1024)


@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_growth(policy: str) -> None:
    """Double each of layers, experts, ranks and tokens twice, the others as they are."""
    print(f"\n{policy}: seconds and GiB of the smallest, then of twice and four times")
    for place, name in enumerate(("layers", "experts", "ranks", "tokens")):
        cells = []
        for factor in (1, 2, 4):
            sizes = list(SMALLEST)
            sizes[place] *= factor
            num_layers, num_experts, num_ranks, num_tokens = sizes
            model = ModelSpec(num_experts=(num_experts,) * num_layers, top_k=8)
            profile = draw(model, planted(model, num_ranks, 2, seed=0), num_tokens, seed=1)
            seconds, peak, _ = solved(profile, model, num_ranks, 2, policy)
            cells.append(f"{seconds:6.1f} s {peak:5.2f} GiB")
        print(f"{name:8s} {' | '.join(cells)}", flush=True)


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_ranks", "num_nodes", "num_tokens"),
    [
        (58, 256, 16, 2, 32_768),
        (29, 256, 64, 8, 32_768),
        (58, 256, 64, 8, 16_384),
        (58, 256, 64, 8, 32_768),
        (60, 384, 128, 16, 32_768),
    ],
)
def test_planted_structure(
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    num_nodes: int,
    num_tokens: int,
    policy: str,
) -> None:
    model = ModelSpec(num_experts=(num_experts,) * num_layers, top_k=8)
    secret = planted(model, num_ranks, num_nodes, seed=0)
    profile = draw(model, secret, num_tokens, seed=1)
    heldout = draw(model, secret, 16_384, seed=2)
    seconds, peak, placement = solved(profile, model, num_ranks, num_nodes, policy)
    reached = node_copies(placement, heldout, policy)
    base = node_copies(contiguous(model.num_experts, num_ranks, num_nodes), heldout, policy)
    best = node_copies(secret, heldout, policy)
    print(
        f"\n{num_layers} x {num_experts} experts, {num_ranks} ranks on {num_nodes} nodes, "
        f"{num_tokens:,} tokens, {policy}: {(base - reached) / (base - best):.1%} of the "
        f"planted plan's saving of node copies ({base:.3f} to {best:.3f}, reached "
        f"{reached:.3f}), {seconds:.0f} s, {peak:.1f} GiB"
    )
