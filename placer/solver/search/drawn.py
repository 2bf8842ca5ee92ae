"""Combining layers of several placements by SGLang's draws.

Legend of the shapes: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placer.arrays import FloatArray, Int16Array
from placer.placement.placement import Placement
from placer.serving.replica_choice import SglangDraws
from placer.solver.kernels.layer import LayerState
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluation import is_better
from placer.solver.search.evaluator import Evaluator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawn:
    """A layer as it is served, the draws after it, its price and what is above caps."""

    state: LayerState
    draws: SglangDraws
    price: float
    overflow: FloatArray


def best_as_drawn(problem: TrafficProblem, placements: Sequence[Placement]) -> Placement:
    """Take each layer, in order, from the placement that is best under SGLang's draws.

    Those for a layer depend on what all layers before it drew, and on nothing after.
    """
    first = placements[0]
    evaluator = Evaluator(problem, first)
    draws = SglangDraws(first, problem.layer_ids)
    homes = [evaluator.first_homes()]
    rows = []
    for layer in range(problem.num_layers):
        tried = [_drawn(evaluator, layer, one, draws.fork(), homes) for one in placements]
        best = tried[0]
        for one in tried[1:]:
            if is_better(one.overflow, one.price, best.overflow, best.price):
                best = one
        evaluator.states[layer], draws = best.state, best.draws
        rows.append(best.state.slots.ravel().astype(np.int64))
        if problem.policy == "follow":
            homes.append(evaluator.next_homes(layer, homes[-1]))
    return replace(first, physical_to_logical_map=tuple(rows))


def _drawn(
    evaluator: Evaluator,
    layer: int,
    placement: Placement,
    draws: SglangDraws,
    homes: list[Int16Array],
) -> _Drawn:
    """Price a layer of a placement as SGLang serves it after its draws so far."""
    state = evaluator.state(placement, layer, draws.ranks(placement.holds(layer)))
    evaluator.states[layer] = state
    tokens = evaluator.tokens(layer, with_next=False, homes=homes)
    price = evaluator.price_layer(tokens, layer) + evaluator.penalties(layer)
    overflow = evaluator.overflow(layer)
    return _Drawn(state=state, draws=draws, price=price, overflow=overflow)
