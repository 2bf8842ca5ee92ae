"""Moves of experts in one layer: what a move changes, annealing and descent.

Each proposal touches every token that uses one of two experts; NumPy needs a pass over all
tokens for the same answer. Legend of the shapes: see :mod:`placer.solver.kernels.layer`.
"""

import numpy as np

from placer.solver.kernels.compiled import compiled
from placer.solver.kernels.followed import follow, followed_change
from placer.solver.kernels.replicas import choose, counted_share_of
from placer.solver.kernels.served import change, served_by, shift


@compiled
def _overflow(rank_load, max_load):
    """Return the overflow of the profile, and the mean over the other scenarios."""
    own, others = 0.0, 0.0
    for scenario in range(rank_load.shape[0]):
        over = 0.0
        for rank in range(rank_load.shape[1]):
            over += max(0.0, rank_load[scenario, rank] - max_load[scenario])
        if scenario == 0:
            own = over
        else:
            others += over
    return own, others / max(1, rank_load.shape[0] - 1)


@compiled
def above(counts, limit):
    """Return how much of the counts ``[R]`` of all ranks is above a limit."""
    over = 0.0
    for rank in range(counts.shape[0]):
        over += max(0.0, counts[rank] - limit)
    return over


@compiled
def busy(received, limit):
    """Return the squares of what the ranks ``[R]`` receive above a limit, added up.

    Where all are above it their sum does not tell who is the busiest.
    """
    over = 0.0
    for rank in range(received.shape[0]):
        over += max(0.0, received[rank] - limit) ** 2
    return over


@compiled
def _random(state):
    """Return the next of a stream of uint64 (xorshift64*, Vigna, arXiv 1402.6246)."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(0x2545F4914F6CDD1D)


@compiled
def _below(state, limit):
    return np.int64((_random(state) >> np.uint64(11)) % np.uint64(limit))


@compiled
def _uniform(state):
    """Return a float64 in (0, 1]."""
    return ((_random(state) >> np.uint64(11)) + np.uint64(1)) * (1.0 / 9007199254740992.0)


@compiled
def _try(tokens, prices, state, served, rank, slot, other, place, rule, limit):
    """Try one move; make it if it costs no more than ``limit``. Return what it changes.

    With ``other`` a rank, the experts in (rank, slot) and (other, place) swap; with
    ``other`` -1, expert ``place`` takes the slot of an expert that has another replica.
    """
    one = state.slots[rank, slot]
    two = state.slots[other, place] if other >= 0 else place
    if one == two or state.holds[two, rank]:
        return 0.0
    if other >= 0 and state.holds[one, other]:
        return 0.0
    num_ranks, num_homes = state.holds.shape[1], state.num_choices.shape[0]
    experts = np.array([one, two], dtype=np.int64)
    held = np.empty((2, num_ranks), dtype=np.bool_)
    held[0], held[1] = state.holds[one], state.holds[two]
    held[0, rank], held[1, rank] = False, True
    if other >= 0:
        held[0, other], held[1, other] = True, False
    choices = np.zeros((num_homes, 2, state.choices.shape[2]), dtype=np.int16)
    num_choices = np.zeros((num_homes, 2), dtype=np.int16)
    share = np.empty((2, num_ranks))
    price = 0.0
    for side in range(2):
        mine, my_number = choices[:, side], num_choices[:, side]
        width = prices.ranks_per_node
        choose(experts[side], held[side], width, rule, mine, my_number)
        counted_share_of(
            tokens,
            prices,
            experts[side],
            held[side],
            choices,
            num_choices,
            side,
            share[side],
        )
    price += prices.linear[two, rank] - prices.linear[one, rank]
    if other >= 0:
        price += prices.linear[one, other] - prices.linear[two, other]
    rank_load = state.rank_load.copy()
    for scenario in range(rank_load.shape[0]):
        for side in range(2):
            load = prices.load[scenario, experts[side]]
            for r in range(num_ranks):
                rank_load[scenario, r] += load * (
                    share[side, r] - state.share[experts[side], r]
                )
    own, others = _overflow(rank_load, prices.max_load)
    own_before, others_before = _overflow(state.rank_load, prices.max_load)
    if own > own_before + 1e-6:
        return 0.0
    price += prices.overflow * (others - others_before)
    received, next_received = state.received.copy(), state.next_received.copy()
    next_homes = state.homes.copy()
    if prices.follow:
        price += followed_change(
            tokens,
            prices,
            state,
            served.cost,
            experts,
            choices,
            num_choices,
            received,
            next_received,
            next_homes,
        )
    else:
        price += change(
            tokens, prices, state, served, experts, choices, num_choices, received
        )
    nearer = own < own_before - 1e-6
    if prices.max_receive > 0 and not nearer:
        most = prices.max_receive
        over = busy(received, most) + busy(next_received, most)
        over -= busy(state.received, most) + busy(state.next_received, most)
        if over > 1e-6:
            return 0.0
        nearer = over < -1e-6
    if prices.receive > 0:
        price += prices.receive * (received.max() - state.received.max())
    if prices.crowd > 0:
        over = above(next_homes, prices.max_homes)
        price += prices.crowd * (over - above(state.homes, prices.max_homes))
    # Always accept a move that reduces a violation: only caps make a plan valid.
    if (price > limit or price == 0.0) and not nearer:
        return 0.0
    if not prices.follow:
        shift(tokens, state, served, experts, choices, num_choices)
    state.slots[rank, slot] = two
    if other >= 0:
        state.slots[other, place] = one
    for side in range(2):
        expert = experts[side]
        state.holds[expert] = held[side]
        state.choices[:, expert] = choices[:, side]
        state.num_choices[:, expert] = num_choices[:, side]
        state.share[expert] = share[side]
    state.rank_load[:] = rank_load
    state.received[:] = received
    state.next_received[:] = next_received
    state.homes[:] = next_homes
    if prices.follow:
        follow(tokens, prices, state, served.cost, experts)
    return price


@compiled
def anneal(tokens, prices, state, kind, rule, temperature, num_moves, seed):
    """Try random moves at one temperature (Kirkpatrick et al., Science 220, 1983).

    ``kind`` ``[E]`` int64: experts of one kind may change places, those of a negative one
    stay. Returns the change of the price.
    """
    num_ranks, num_slots = state.slots.shape
    num_experts = state.holds.shape[0]
    replicas = num_ranks * num_slots > num_experts
    stream = np.array([seed], dtype=np.uint64)
    served = served_by(tokens, prices, state)
    total = 0.0
    for _ in range(num_moves):
        rank, slot = _below(stream, num_ranks), _below(stream, num_slots)
        one = state.slots[rank, slot]
        limit = -temperature * np.log(_uniform(stream))
        replace = replicas and state.holds[one].sum() > 1 and _below(stream, 2) == 0
        if replace:
            other, place = np.int64(-1), _below(stream, num_experts)
            two = place
        else:
            other, place = _below(stream, num_ranks), _below(stream, num_slots)
            two = state.slots[other, place]
        if kind[one] >= 0 and kind[one] == kind[two] and other != rank:
            total += _try(
                tokens, prices, state, served, rank, slot, other, place, rule, limit
            )
    return total


@compiled
def descend(tokens, prices, state, kind, rule):
    """Try every move once and make those that pay. Return the change of the price."""
    num_ranks, num_slots = state.slots.shape
    num_experts = state.holds.shape[0]
    replicas = num_ranks * num_slots > num_experts
    served = served_by(tokens, prices, state)
    total = 0.0
    for rank in range(num_ranks):
        for slot in range(num_slots):
            for other in range(rank + 1, num_ranks):
                for place in range(num_slots):
                    one, two = state.slots[rank, slot], state.slots[other, place]
                    if kind[one] >= 0 and kind[one] == kind[two]:
                        total += _try(
                            tokens,
                            prices,
                            state,
                            served,
                            rank,
                            slot,
                            other,
                            place,
                            rule,
                            0.0,
                        )
            if replicas:
                for expert in range(num_experts):
                    one = state.slots[rank, slot]
                    if (
                        kind[one] >= 0
                        and kind[one] == kind[expert]
                        and state.holds[one].sum() > 1
                    ):
                        total += _try(
                            tokens, prices, state, served, rank, slot, -1, expert, rule, 0.0
                        )
    return total
