"""What a move changes where homes follow the experts: every expert of a token matters.

The rank that serves most of them is the token's home in the next layer. Legend of the
shapes: see :mod:`placer.solver.kernels.layer`.
"""

import numpy as np

from placer.solver.kernels.compiled import compiled
from placer.solver.kernels.price import (
    majority_rank,
    receive_copies,
    receive_next,
    serve,
    token_price,
)
from placer.solver.kernels.replicas import serving_rank


@compiled
def followed_change(
    tokens,
    prices,
    state,
    cost,
    changed,
    choices,
    num_choices,
    received,
    next_received,
    next_homes,
):
    """Change of the tokens' price when two experts are served by other replicas.

    ``changed`` ``[2]`` are the experts, ``choices`` ``[H, 2, C]`` and ``num_choices``
    ``[H, 2]`` their new replicas; ``received``, ``next_received`` and ``next_homes``
    ``[R]`` take the change of the copies and of the homes.
    """
    # Fields are read once: each access to a tuple's array counts references.
    experts, homes = tokens.experts, tokens.home
    weights, next_price = tokens.weight, tokens.next_price
    starts, users = tokens.starts, tokens.users
    old_choices, old_num_choices = state.choices, state.num_choices
    to_rank, to_node = prices.to_rank, prices.to_node
    count_received = prices.receive > 0 or prices.max_receive > 0
    count_next, count_homes = tokens.next_experts.shape[0] > 0, prices.crowd > 0
    one, two = changed[0], changed[1]
    top_k = experts.shape[1]
    before, after = np.empty(top_k, dtype=np.int64), np.empty(top_k, dtype=np.int64)
    several = old_num_choices.shape[0] > 1
    total = 0
    for side in range(2):
        expert = changed[side]
        for place in range(starts[expert], starts[expert + 1]):
            token = users[place]
            home = homes[token]
            row = home if several else 0
            counted = False
            for i in range(top_k):
                used = experts[token, i]
                if used == one:
                    counted = side == 1
                    after[i] = serving_rank(choices, num_choices, row, 0, token)
                elif used == two:
                    after[i] = serving_rank(choices, num_choices, row, 1, token)
                else:
                    after[i] = serving_rank(old_choices, old_num_choices, row, used, token)
            if counted:
                continue
            weight = weights[token]
            price = token_price(after, home, token, True, to_rank, to_node, next_price)
            total += weight * (price - cost[token])
            if count_received or count_next or count_homes:
                serve(experts, row, token, old_choices, old_num_choices, before)
            if count_received:
                receive_copies(before, home, -1.0 * weight, received)
                receive_copies(after, home, 1.0 * weight, received)
            if count_next or count_homes:
                old, new = majority_rank(before), majority_rank(after)
                if count_homes:
                    next_homes[old] -= weight
                    next_homes[new] += weight
                if count_next and old != new:
                    receive_next(tokens, token, old, -1.0 * weight, next_received)
                    receive_next(tokens, token, new, 1.0 * weight, next_received)
    return total


@compiled
def follow(tokens, prices, state, cost, changed):
    """Write the new price of all tokens that use one of two changed experts."""
    experts, homes = tokens.experts, tokens.home
    starts, users, next_price = tokens.starts, tokens.users, tokens.next_price
    choices, num_choices = state.choices, state.num_choices
    to_rank, to_node = prices.to_rank, prices.to_node
    several = num_choices.shape[0] > 1
    served = np.empty(experts.shape[1], dtype=np.int64)
    for side in range(2):
        expert = changed[side]
        for place in range(starts[expert], starts[expert + 1]):
            token = users[place]
            home = homes[token]
            serve(experts, home if several else 0, token, choices, num_choices, served)
            cost[token] = token_price(
                served, home, token, True, to_rank, to_node, next_price
            )
