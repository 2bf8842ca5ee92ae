"""A layer of a placement and its tokens, as the compiled loops take them.

Legend of the shapes: T tokens, E logical experts, R ranks, k experts per token.
"""

import numpy as np

from placer.arrays import Int16Array, IntArray
from placer.placement.placement import Placement
from placer.solver.kernels import replicas
from placer.solver.kernels.layer import LayerState, LayerTokens
from placer.solver.problem.layer_profile import LayerProfile
from placer.solver.problem.traffic import TrafficProblem

#: Which rule of the compiled loops each replica choice is.
RULES = {
    None: replicas.LOCAL_FIRST,  # each expert has one replica: any rule does
    "local-first": replicas.LOCAL_FIRST,
    "hash": replicas.ANY_REPLICA,
    "sglang-static": replicas.SGLANG_STATIC,
}
#: The layer after the last, or one that is not asked about: no tokens.
NO_LAYER = (
    np.zeros((0, 1), dtype=np.int16),
    np.zeros((1, 0, 1), dtype=np.int16),
    np.zeros((1, 0), dtype=np.int16),
)


def layer_state(
    problem: TrafficProblem,
    placement: Placement,
    layer: int,
    drawn: IntArray | None = None,
) -> LayerState:
    """Return a layer as it is placed, not priced yet.

    Parameters
    ----------
    problem
        What is minimised.
    placement
        Experts in slots.
    layer
        Which layer.
    drawn
        ``[R, E]``: the ranks that SGLang chose for each home, or ``None``.
    """
    num_ranks = placement.num_ranks
    slots = placement.physical_to_logical_map[layer].reshape(num_ranks, -1)
    holds = placement.holds(layer)
    has_replicas = slots.size > len(holds)
    by_home = has_replicas and problem.replica_choice != "hash"
    num_homes = num_ranks if by_home else 1
    most = min(num_ranks, slots.size - len(holds) + 1)
    state = LayerState(
        slots=slots.astype(np.int16),
        holds=holds.copy(),
        choices=np.zeros((num_homes, len(holds), most), dtype=np.int16),
        num_choices=np.zeros((num_homes, len(holds)), dtype=np.int16),
        share=np.zeros((len(holds), num_ranks)),
        rank_load=np.zeros((len(problem.load[layer]), num_ranks)),
        received=np.zeros(num_ranks),
        next_received=np.zeros(num_ranks),
        homes=np.zeros(num_ranks, dtype=np.int64),
    )
    if drawn is not None and has_replicas:
        state.choices[:, :, 0], state.num_choices[:] = drawn, 1
        return state
    rule, width = RULES[problem.replica_choice], placement.ranks_per_node
    for expert, held in enumerate(holds):
        chosen, number = (
            state.choices[:, expert].copy(),
            state.num_choices[:, expert].copy(),
        )
        replicas.choose(expert, held, width, rule, chosen, number)
        state.choices[:, expert], state.num_choices[:, expert] = chosen, number
    return state


def layer_tokens(
    profile: LayerProfile,
    home: Int16Array,
    next_price: IntArray | None = None,
    following: tuple[Int16Array, Int16Array, Int16Array] = NO_LAYER,
    *,
    has_even_homes: bool = True,
) -> LayerTokens:
    """Return a layer's tokens; ``following`` are those of the next and their ranks."""
    return LayerTokens(
        profile.experts,
        profile.weight,
        home,
        has_even_homes,
        np.zeros((1, 1), dtype=np.int64) if next_price is None else next_price,
        profile.starts,
        profile.users,
        *following,
    )


def even_homes(num_tokens: int, num_ranks: int) -> Int16Array:
    """Return a home for each token, every rank as often: one stands for all of them.

    Shuffled: replicas take turns by the token's place, and a home must not go with a turn.
    """
    homes = np.arange(num_tokens) % num_ranks
    return np.random.default_rng(num_ranks).permutation(homes).astype(np.int16)
