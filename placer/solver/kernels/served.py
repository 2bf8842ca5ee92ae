"""How many of its experts each rank serves a token: what a move changes is seen from it.

A move touches two experts. A token's copies change only where an expert was the last that
its old rank served, or is the first that its new rank serves, so two counts are read and
not all of a token's experts. Legend of the shapes: see
:mod:`placer.solver.kernels.layer`.
"""

from typing import NamedTuple

import numpy as np

from placer.arrays import AnyArray
from placer.solver.kernels.compiled import compiled
from placer.solver.kernels.price import serve, token_price
from placer.solver.kernels.replicas import serving_rank


class Served(NamedTuple):
    """The tokens of a layer by what serves them; changed in place.

    Attributes
    ----------
    ranks
        ``[R, T]`` uint8: experts of a token that a rank serves.
    nodes
        ``[N, T]`` uint8: the same of nodes; N is 0 where nodes cost nothing of their own.
    cost
        ``[T]`` int64: the price of a token. Where homes follow the experts only this is
        known, else only the counts are; what is not known is empty.
    """

    ranks: AnyArray
    nodes: AnyArray
    cost: AnyArray


@compiled
def served_by(tokens, prices, state):
    """Return what is known of the tokens from the placement."""
    experts = tokens.experts
    num_tokens, top_k = experts.shape
    num_ranks, num_nodes = prices.to_rank.shape[1], prices.to_node.shape[1]
    ranks_per_node = num_ranks // max(1, num_nodes)
    num_counted = 0 if prices.follow else num_tokens
    ranks = np.zeros((num_ranks, num_counted), dtype=np.uint8)
    nodes = np.zeros((num_nodes, num_counted), dtype=np.uint8)
    cost = np.zeros(num_tokens - num_counted, dtype=np.int64)
    several = state.num_choices.shape[0] > 1
    served = np.empty(top_k, dtype=np.int64)
    for token in range(num_tokens):
        home = tokens.home[token]
        row = home if several else 0
        serve(experts, row, token, state.choices, state.num_choices, served)
        if prices.follow:
            cost[token] = token_price(
                served, home, token, True, prices.to_rank, prices.to_node, tokens.next_price
            )
            continue
        for i in range(top_k):
            ranks[served[i], token] += 1
            if num_nodes:
                nodes[served[i] // ranks_per_node, token] += 1
    return Served(ranks, nodes, cost)


@compiled
def _shift(ranks, nodes, token, old, new):
    """Serve one expert of a token from rank ``new`` instead of ``old``."""
    if old == new:
        return
    ranks[old, token] -= 1
    ranks[new, token] += 1
    if nodes.shape[0]:
        ranks_per_node = ranks.shape[0] // nodes.shape[0]
        nodes[old // ranks_per_node, token] -= 1
        nodes[new // ranks_per_node, token] += 1


@compiled
def _shift_price(ranks, nodes, token, old, new, home, to_rank, to_node):
    """Price of a shift: copies from a home."""
    price = 0
    if old == new:
        return price
    if ranks[old, token] == 1:
        price -= to_rank[home, old]
    if ranks[new, token] == 0:
        price += to_rank[home, new]
    if nodes.shape[0]:
        ranks_per_node = ranks.shape[0] // nodes.shape[0]
        before, after = old // ranks_per_node, new // ranks_per_node
        if before != after:
            if nodes[before, token] == 1:
                price -= to_node[home, before]
            if nodes[after, token] == 0:
                price += to_node[home, after]
    return price


@compiled
def _receive_shift(ranks, token, old, new, home, amount, received):
    """Add to ``received`` ``[R]`` what a shift changes."""
    if old == new:
        return
    num_ranks = ranks.shape[0]
    # Of homes that are any rank with the same probability, one in R is spared.
    share = amount * (num_ranks - 1) / num_ranks if home == num_ranks else amount
    if ranks[old, token] == 1 and old != home:
        received[old] -= share
    if ranks[new, token] == 0 and new != home:
        received[new] += share


@compiled
def change(tokens, prices, state, served, changed, choices, num_choices, received):
    """Change of the tokens' price when two experts are served by other replicas.

    ``changed`` ``[2]`` are the experts, ``choices`` ``[H, 2, C]`` and ``num_choices``
    ``[H, 2]`` their new replicas; ``received`` ``[R]`` takes the change of the copies.
    """
    # Fields are read once: each access to a tuple's array counts references.
    homes, weights, users, starts = tokens.home, tokens.weight, tokens.users, tokens.starts
    ranks, nodes = served.ranks, served.nodes
    to_rank, to_node = prices.to_rank, prices.to_node
    old_choices, old_num_choices = state.choices, state.num_choices
    counts_received = prices.receive > 0 or prices.max_receive > 0
    several = old_num_choices.shape[0] > 1
    at_one, end_one = starts[changed[0]], starts[changed[0] + 1]
    at_two, end_two = starts[changed[1]], starts[changed[1] + 1]
    total = 0
    while at_one < end_one or at_two < end_two:
        # Users are in ascending order: a token of both experts is met once.
        one = users[at_one] if at_one < end_one else homes.shape[0]
        two = users[at_two] if at_two < end_two else homes.shape[0]
        token = min(one, two)
        home, weight = homes[token], weights[token]
        row = home if several else 0
        old, new, other_old, other_new = 0, 0, 0, 0
        if one == token:
            at_one += 1
            old = serving_rank(old_choices, old_num_choices, row, changed[0], token)
            new = serving_rank(choices, num_choices, row, 0, token)
        if two == token:
            at_two += 1
            other_old = serving_rank(old_choices, old_num_choices, row, changed[1], token)
            other_new = serving_rank(choices, num_choices, row, 1, token)
        total += weight * _shift_price(
            ranks, nodes, token, old, new, home, to_rank, to_node
        )
        if counts_received:
            _receive_shift(ranks, token, old, new, home, 1.0 * weight, received)
        if other_old == other_new:
            continue
        # The second shift is priced after the first.
        _shift(ranks, nodes, token, old, new)
        total += weight * _shift_price(
            ranks, nodes, token, other_old, other_new, home, to_rank, to_node
        )
        if counts_received:
            amount = 1.0 * weight
            _receive_shift(ranks, token, other_old, other_new, home, amount, received)
        _shift(ranks, nodes, token, new, old)
    return total


@compiled
def shift(tokens, state, served, changed, choices, num_choices):
    """Count the tokens of two experts for new replicas, before ``state`` knows them."""
    homes, users, starts = tokens.home, tokens.users, tokens.starts
    old_choices, old_num_choices = state.choices, state.num_choices
    for side in range(2):
        expert = changed[side]
        for place in range(starts[expert], starts[expert + 1]):
            token = users[place]
            row = homes[token] if num_choices.shape[0] > 1 else 0
            old = serving_rank(old_choices, old_num_choices, row, expert, token)
            new = serving_rank(choices, num_choices, row, side, token)
            _shift(served.ranks, served.nodes, token, old, new)
