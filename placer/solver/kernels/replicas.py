"""Which replicas of an expert serve, and the share of its load for each.

Legend of the shapes: see :mod:`placer.solver.kernels.layer`.
"""

import numpy as np

from placer.solver.kernels.compiled import compiled

LOCAL_FIRST, ANY_REPLICA, SGLANG_STATIC = 0, 1, 2


@compiled
def choose(expert, holds, ranks_per_node, rule, choices, num_choices):
    """Fill ``[H, C]`` and ``[H]`` with the ranks that serve an expert, held by ``[R]``.

    ``LOCAL_FIRST``: the replica at home, else those on the home's node, else all;
    ``ANY_REPLICA``: all, wherever the home is; ``SGLANG_STATIC``: one for each home.
    """
    num_ranks = holds.shape[0]
    if rule == SGLANG_STATIC:
        _choose_static(expert, holds, ranks_per_node, choices, num_choices)
        return
    for home in range(num_choices.shape[0]):
        first, last = 0, num_ranks
        if num_choices.shape[0] > 1 and rule == LOCAL_FIRST:
            node = home // ranks_per_node * ranks_per_node
            if holds[home]:
                first, last = home, home + 1
            elif holds[node : node + ranks_per_node].any():
                first, last = node, node + ranks_per_node
        number = 0
        for rank in range(first, last):
            if holds[rank]:
                choices[home, number] = rank
                number += 1
        num_choices[home] = number


@compiled
def _choose_static(expert, holds, ranks_per_node, choices, num_choices):
    """Fill the same with one replica per home: the near one, or any at random.

    SGLang's own draws depend on those for all experts before; these on expert and home
    (SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
    """
    replicas = np.flatnonzero(holds)
    for home in range(num_choices.shape[0]):
        near = _near_replica(holds, home, ranks_per_node)
        if near < 0:
            mixed = np.uint64(expert * num_choices.shape[0] + home + 1)
            mixed *= np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
            near = replicas[np.int64(mixed % np.uint64(len(replicas)))]
        choices[home, 0] = near
        num_choices[home] = 1


@compiled
def _near_replica(holds, home, ranks_per_node):
    """Rank of the replica that SGLang prefers from a home, or -1 where it draws."""
    if holds[home]:
        return home
    node = home // ranks_per_node * ranks_per_node
    near = np.flatnonzero(holds[node : node + ranks_per_node])
    return node + near[0] if 0 < len(near) < holds.sum() else -1


@compiled
def serving_rank(choices, num_choices, row, expert, token):
    """Rank that serves a token: equal choices take turns."""
    # A division costs as much as all the rest, and most experts have one replica.
    number = num_choices[row, expert]
    turn = 0 if number == 1 else token % number
    return choices[row, expert, turn]


@compiled
def counted_share_of(tokens, prices, expert, held, choices, num_choices, index, share):
    """Fill ``[R]`` with the share of an expert's load that each rank counts.

    Its replicas ``held`` ``[R]`` are ``choices[:, index]``; each counts ``caution`` of what
    it might serve beyond its share.
    """
    if prices.has_unknown_draws:
        _drawn_share_of(tokens, prices, expert, held, share)
        return
    _share_of(tokens, expert, choices, num_choices, index, share)
    for rank in range(share.shape[0]):
        if held[rank]:
            share[rank] += prices.caution * (1.0 - share[rank])


@compiled
def _drawn_share_of(tokens, prices, expert, held, share):
    """Fill the same for draws: the mean over them, and ``caution`` of what is above it."""
    num_ranks = held.shape[0]
    count = np.ones(num_ranks)
    first, last = tokens.starts[expert], tokens.starts[expert + 1]
    if not tokens.has_even_homes and first < last:
        count[:] = 0.0
        for place in range(first, last):
            count[tokens.home[tokens.users[place]]] += 1.0
    count /= count.sum()
    share[:] = 0.0
    drawn = 0.0
    for home in range(num_ranks):
        near = _near_replica(held, home, prices.ranks_per_node)
        if near < 0:
            drawn += count[home]
        else:
            share[near] += count[home]
    mean = drawn / held.sum()
    for rank in range(num_ranks):
        if held[rank]:
            share[rank] += mean + prices.caution * (drawn - mean)


@compiled
def _share_of(tokens, expert, choices, num_choices, index, share):
    """Fill ``[R]`` with the share of an expert's load on each rank.

    Homes that are not even are counted with the turns: a turn in one layer, which decides
    the home, is the token's in the next too.
    """
    share[:] = 0.0
    num_homes = num_choices.shape[0]
    for home in range(num_homes):
        number = num_choices[home, index]
        for turn in range(number):
            share[choices[home, index, turn]] += 1.0 / (number * num_homes)
    first, last = tokens.starts[expert], tokens.starts[expert + 1]
    has_one_replica = share.max() > 1.0 - 1e-9
    if tokens.has_even_homes or has_one_replica or first == last:
        return
    share[:] = 0.0
    homes, users = tokens.home, tokens.users
    for place in range(first, last):
        token = users[place]
        row = homes[token] if num_homes > 1 else 0
        share[serving_rank(choices, num_choices, row, index, token)] += 1.0
    share /= last - first


@compiled
def rank_shares(tokens, prices, state):
    """Fill ``share`` from the placement."""
    choices, num_choices = state.choices, state.num_choices
    for expert in range(state.share.shape[0]):
        held, share = state.holds[expert], state.share[expert]
        counted_share_of(tokens, prices, expert, held, choices, num_choices, expert, share)
