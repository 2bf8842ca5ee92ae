"""The cost of the copies that tokens cause, for a placement of a layer.

Costs are int64 and exact. Legend of the shapes: see :mod:`placer.solver.kernels.layer`.
"""

import numpy as np

from placer.solver.kernels.compiled import compiled
from placer.solver.kernels.replicas import serving_rank


@compiled
def token_price(served, home, token, follow, to_rank, to_node, next_price):
    """Price of one token whose experts are served by ``served`` ``[k]``."""
    price = _rank_price(served, home, to_rank)
    if to_node.shape[1]:
        price += _node_price(served, home, to_node, to_rank.shape[1])
    if follow:
        busiest = majority_rank(served)
        price += next_price[token, busiest] + _rank_price(served, busiest, to_rank)
        if to_node.shape[1]:
            price += _node_price(served, busiest, to_node, to_rank.shape[1])
    return price


@compiled
def _rank_price(served, home, to_rank):
    """Price of a copy to each distinct rank."""
    price = 0
    if to_rank.shape[1] <= 64:
        seen = np.uint64(0)
        for i in range(served.shape[0]):
            bit = np.uint64(1) << np.uint64(served[i])
            if not seen & bit:
                price += to_rank[home, served[i]]
                seen |= bit
    else:
        for i in range(served.shape[0]):
            if _is_first(served, i):
                price += to_rank[home, served[i]]
    return price


@compiled
def majority_rank(served):
    """Rank that serves most experts of a token; of equals the first one listed."""
    busiest, most = served[0], 0
    for i in range(served.shape[0]):
        count = 0
        for j in range(i, served.shape[0]):
            count += served[j] == served[i]
        if count > most:
            busiest, most = served[i], count
    return busiest


@compiled
def _is_first(served, place):
    for earlier in range(place):  # noqa: SIM110  # numba compiles no generator in all()
        if served[earlier] == served[place]:
            return False
    return True


@compiled
def _node_price(served, home, to_node, num_ranks):
    ranks_per_node = num_ranks // to_node.shape[1]
    price = 0
    for i in range(served.shape[0]):
        node, first = served[i] // ranks_per_node, True
        for j in range(i):
            if served[j] // ranks_per_node == node:
                first = False
                break
        if first:
            price += to_node[home, node]
    return price


@compiled
def serve(experts, row, token, choices, num_choices, served):
    """Fill ``[k]`` with the ranks that serve a token, ``row`` gives its home."""
    for i in range(served.shape[0]):
        served[i] = serving_rank(choices, num_choices, row, experts[token, i], token)


@compiled
def receive_copies(served, home, amount, received):
    """Add ``amount`` per rank that a token's copies reach; any home counts its share."""
    num_ranks = received.shape[0]
    for i in range(served.shape[0]):
        if _is_first(served, i) and served[i] != home:
            received[served[i]] += (
                amount * (num_ranks - 1) / num_ranks if home == num_ranks else amount
            )


@compiled
def receive_next(tokens, token, home, amount, received):
    """Add ``amount`` per rank that a token's copies reach in the next layer from a home."""
    row = home if tokens.next_num_choices.shape[0] > 1 else 0
    served = np.empty(tokens.next_experts.shape[1], dtype=np.int64)
    choices, num_choices = tokens.next_choices, tokens.next_num_choices
    serve(tokens.next_experts, row, token, choices, num_choices, served)
    receive_copies(served, home, amount, received)


@compiled
def price_layer(tokens, prices, state):
    """Fill ``received`` from the placement; return the cost of all tokens."""
    experts, homes = tokens.experts, tokens.home
    weights = tokens.weight
    choices, num_choices = state.choices, state.num_choices
    several = num_choices.shape[0] > 1
    served = np.empty(experts.shape[1], dtype=np.int64)
    follows = tokens.next_experts.shape[0] > 0
    state.received[:] = 0.0
    state.next_received[:] = 0.0
    state.homes[:] = 0
    total = 0
    for token in range(experts.shape[0]):
        home = homes[token]
        serve(experts, home if several else 0, token, choices, num_choices, served)
        cost = token_price(
            served,
            home,
            token,
            prices.follow,
            prices.to_rank,
            prices.to_node,
            tokens.next_price,
        )
        weight = weights[token]
        total += weight * cost
        receive_copies(served, home, 1.0 * weight, state.received)
        if prices.crowd > 0:
            state.homes[majority_rank(served)] += weight
        if follows:
            amount = 1.0 * weight
            receive_next(tokens, token, majority_rank(served), amount, state.next_received)
    return total


@compiled
def dispatch_prices(tokens, state, to_rank, to_node, price):
    """Fill ``[T, R]``: what dispatch would cost from each home."""
    experts, num_ranks = tokens.experts, to_rank.shape[1]
    choices, num_choices = state.choices, state.num_choices
    several = num_choices.shape[0] > 1
    served = np.empty(experts.shape[1], dtype=np.int64)
    nothing = np.zeros((1, 1), dtype=np.int64)
    for token in range(experts.shape[0]):
        for home in range(num_ranks):
            if several or home == 0:
                row = home if several else 0
                serve(experts, row, token, choices, num_choices, served)
            price[token, home] = token_price(
                served, home, 0, False, to_rank, to_node, nothing
            )


@compiled
def majority_ranks(tokens, state, busiest):
    """Fill ``[T]`` with the rank that serves most of each token's experts."""
    experts, homes = tokens.experts, tokens.home
    choices, num_choices = state.choices, state.num_choices
    several = num_choices.shape[0] > 1
    served = np.empty(experts.shape[1], dtype=np.int64)
    for token in range(experts.shape[0]):
        row = homes[token] if several else 0
        serve(experts, row, token, choices, num_choices, served)
        busiest[token] = majority_rank(served)
