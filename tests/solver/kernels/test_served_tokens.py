"""What moves say they change is what the placement costs afterwards, to the last copy."""

from collections.abc import Callable

import numpy as np
import pytest

from placer.placement.reference import random
from placer.placement.topology import Topology
from placer.solver.balance.replicas import with_replicas
from placer.solver.caps import Caps
from placer.solver.kernels.moves import anneal, descend
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluator import Evaluator
from placer.solver.search.layer_state import RULES
from placer.trace import Chunk

SIZES = (8, 8, 8)
NODES = Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2)


@pytest.mark.parametrize("rule", [None, "local-first", "hash", "sglang-static"])
@pytest.mark.parametrize("exchange", ["per-rank", "per-node"])
@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_changes_add_up_to_the_price_and_to_what_is_received(
    make_chunk: Callable[..., Chunk], rule: str | None, exchange: str, policy: str
) -> None:
    """The oracle prices every token of the moved placement from nothing."""
    chunk = make_chunk(num_tokens=60, top_k=3)
    load = load_scenarios(chunk, SIZES, "none", 0)
    placement = random(SIZES, 4, 2, seed=3)
    if rule:
        placement = with_replicas(placement, [one[0] for one in load], 4)
    problem = TrafficProblem(
        experts=layer_tokens(chunk),
        topology=NODES,
        policy=policy,
        exchange=exchange,
        load=load,
        max_load=tuple(np.array([1e9]) for _ in load),
        replica_choice=rule,
        # Low enough to be counted, high enough to forbid no move.
        caps=Caps(max_received_copies=100.0),
    )
    for layer in range(3):
        at = Evaluator(problem, placement)
        tokens = at.tokens(layer)
        state, prices = at.states[layer], at.prices[layer]
        before = at.price_layer(tokens, layer)
        slots = state.slots.copy()
        kind = np.zeros(SIZES[layer], dtype=np.int64)
        seed = np.uint64(2 * layer + 1)
        moved = anneal(tokens, prices, state, kind, RULES[rule], 200.0, 300, seed)
        moved += descend(tokens, prices, state, kind, RULES[rule])
        received = state.received.copy()
        assert (state.slots != slots).any()
        assert at.price_layer(tokens, layer) == before + moved
        assert received == pytest.approx(state.received)
