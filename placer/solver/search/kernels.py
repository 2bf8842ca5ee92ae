"""Compiled loops of the refinement: what a change of one layer's copies costs.

Written for numba, since each proposal touches every token that uses one of two experts:
NumPy needs a pass over all tokens for the same answer. Costs are int64 and exact. All
are in one file: what numba has cached of a function is not compiled anew when a function
that it calls changes in another file.

Legend of the shapes: T tokens, E logical experts, R ranks, k experts per token, C most
copies of an expert, H homes told apart (1 without replicas, where the home does not decide
which copy serves; else R), S load scenarios.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

LOCAL_FIRST, ANY_COPY, SGLANG_STATIC = 0, 1, 2


class LayerTokens(NamedTuple):
    """The tokens of one layer.

    Attributes
    ----------
    experts
        ``[T, k]`` int16, in the router's order.
    weight
        ``[T]`` int64: tokens that a row stands for.
    home
        ``[T]`` int16: the rank that dispatches a token, R for a home that is any rank
        with the same probability.
    has_even_homes
        Whether an expert's load is taken as if it came from all homes alike; else it is
        counted, and every weight is 1.
    next_price
        ``[T, R]`` int64: what the next layer's dispatch costs from each home, where homes
        follow the experts; ``[1, 1]`` where they do not.
    starts, users
        ``[E + 1]`` and ``[T x k]`` int64: users[starts[e]:starts[e + 1]] are the tokens
        that use expert e.
    next_experts, next_choices, next_num_choices
        The next layer's ``experts``, ``choices`` and ``num_choices``, where what it
        receives is limited and its homes follow from this layer; else empty.
    """

    experts: Array
    weight: Array
    home: Array
    has_even_homes: bool
    next_price: Array
    starts: Array
    users: Array
    next_experts: Array
    next_choices: Array
    next_num_choices: Array


class Prices(NamedTuple):
    """What things cost in one layer.

    Attributes
    ----------
    to_rank
        ``[R + 1, R]`` int64: a copy from a home (R: any) to a rank.
    to_node
        ``[R + 1, N]`` int64: a copy from a home to a node; N is 0 where nodes cost nothing
        of their own.
    follow
        Whether a token's home in the next layer is the rank that serves most of its
        experts; then outputs go there.
    linear
        ``[E, R]`` int64: an expert's copy on a rank.
    load
        ``[S, E]`` float64: pairs of each expert in each scenario; the first is the
        profile itself.
    max_load
        ``[S]`` float64: load that a rank may carry in each scenario.
    overflow
        Price of a pair of load above ``max_load``, mean over the scenarios but the first,
        whose overflow may never grow.
    receive
        Price of a copy that the busiest rank receives.
    max_receive
        Copies that a rank may receive, in this layer and in the next; 0: no limit.
    max_homes
        Tokens that a rank may be the next home of, where homes follow the experts.
    crowd
        Price of a token above ``max_homes``; 0: not counted.
    ranks_per_node
        Ranks that are near to each other where copies of an expert are chosen among.
    caution
        Of what a copy might serve beyond its share, the part that is counted as if it did;
        0 where who serves is known.
    has_unknown_draws
        Whether draws choose among copies, and it is not known yet how they fall.
    """

    to_rank: Array
    to_node: Array
    follow: bool
    linear: Array
    load: Array
    max_load: Array
    overflow: float
    receive: float
    max_receive: float
    max_homes: float
    crowd: float
    ranks_per_node: int
    caution: float
    has_unknown_draws: bool


class LayerState(NamedTuple):
    """A layer's placement, and what follows from it; changed in place.

    Attributes
    ----------
    slots
        ``[R, slots per rank]`` int16: the expert in each slot.
    holds
        ``[E, R]`` bool.
    choices, num_choices
        ``[H, E, C]`` and ``[H, E]`` int16: the ranks among which (home, expert) takes
        turns by token index.
    share
        ``[E, R]`` float64: share of an expert's load that a rank counts as its own.
    cost
        ``[T]`` int64: the price of one token of each row.
    rank_load
        ``[S, R]`` float64.
    received
        ``[R]`` float64: copies that each rank receives.
    next_received
        ``[R]`` float64: the same in the next layer, where ``next_experts`` are known.
    homes
        ``[R]`` int64: tokens whose next home each rank is, where ``crowd`` counts them.
    """

    slots: Array
    holds: Array
    choices: Array
    num_choices: Array
    share: Array
    cost: Array
    rank_load: Array
    received: Array
    next_received: Array
    homes: Array


@njit(cache=True, nogil=True)
def choose(expert, holds, ranks_per_node, rule, choices, num_choices):  # type: ignore[no-untyped-def]
    """Fill ``[H, C]`` and ``[H]`` with the ranks that serve an expert, held by ``[R]``.

    ``LOCAL_FIRST``: the copy at home, else those on the home's node, else all;
    ``ANY_COPY``: all, wherever the home is; ``SGLANG_STATIC``: one for each home.
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


@njit(cache=True, nogil=True)
def _choose_static(expert, holds, ranks_per_node, choices, num_choices):  # type: ignore[no-untyped-def]
    """Fill the same with one copy per home: the near one, or any at random.

    SGLang's own draws depend on those for all experts before; these on expert and home
    (SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
    """
    copies = np.flatnonzero(holds)
    for home in range(num_choices.shape[0]):
        near = _near_copy(holds, home, ranks_per_node)
        if near < 0:
            mixed = np.uint64(expert * num_choices.shape[0] + home + 1)
            mixed *= np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
            near = copies[np.int64(mixed % np.uint64(len(copies)))]
        choices[home, 0] = near
        num_choices[home] = 1


@njit(cache=True, nogil=True)
def _near_copy(holds, home, ranks_per_node):  # type: ignore[no-untyped-def]
    """Rank of the copy that SGLang prefers from a home, or -1 where it draws."""
    if holds[home]:
        return home
    node = home // ranks_per_node * ranks_per_node
    near = np.flatnonzero(holds[node : node + ranks_per_node])
    return node + near[0] if 0 < len(near) < holds.sum() else -1


@njit(cache=True, nogil=True)
def _copy(choices, num_choices, row, expert, token):  # type: ignore[no-untyped-def]
    """Rank that serves a token: equal choices take turns."""
    # A division costs as much as all the rest, and most experts have one copy.
    number = num_choices[row, expert]
    turn = 0 if number == 1 else token % number
    return choices[row, expert, turn]


@njit(cache=True, nogil=True)
def _counted_share_of(tokens, prices, expert, held, choices, num_choices, index, share):  # type: ignore[no-untyped-def]
    """Fill ``[R]`` with the share of an expert's load that each rank counts.

    Its copies ``held`` ``[R]`` are ``choices[:, index]``; each counts ``caution`` of what
    it might serve beyond its share.
    """
    if prices.has_unknown_draws:
        _drawn_share_of(tokens, prices, expert, held, share)
        return
    _share_of(tokens, expert, choices, num_choices, index, share)
    for rank in range(share.shape[0]):
        if held[rank]:
            share[rank] += prices.caution * (1.0 - share[rank])


@njit(cache=True, nogil=True)
def _drawn_share_of(tokens, prices, expert, held, share):  # type: ignore[no-untyped-def]
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
        near = _near_copy(held, home, prices.ranks_per_node)
        if near < 0:
            drawn += count[home]
        else:
            share[near] += count[home]
    mean = drawn / held.sum()
    for rank in range(num_ranks):
        if held[rank]:
            share[rank] += mean + prices.caution * (drawn - mean)


@njit(cache=True, nogil=True)
def _share_of(tokens, expert, choices, num_choices, index, share):  # type: ignore[no-untyped-def]
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
    has_one_copy = share.max() > 1.0 - 1e-9
    if tokens.has_even_homes or has_one_copy or first == last:
        return
    share[:] = 0.0
    homes, users = tokens.home, tokens.users
    for place in range(first, last):
        token = users[place]
        row = homes[token] if num_homes > 1 else 0
        share[_copy(choices, num_choices, row, index, token)] += 1.0
    share /= last - first


@njit(cache=True, nogil=True)
def rank_shares(tokens, prices, state):  # type: ignore[no-untyped-def]
    """Fill ``share`` from the placement."""
    choices, num_choices = state.choices, state.num_choices
    for expert in range(state.share.shape[0]):
        held, share = state.holds[expert], state.share[expert]
        _counted_share_of(tokens, prices, expert, held, choices, num_choices, expert, share)


@njit(cache=True, nogil=True)
def _price(served, home, token, follow, to_rank, to_node, next_price):  # type: ignore[no-untyped-def]
    """Price of one token whose experts are served by ``served`` ``[k]``."""
    price = _rank_price(served, home, to_rank)
    if to_node.shape[1]:
        price += _node_price(served, home, to_node, to_rank.shape[1])
    if follow:
        busiest = _busiest(served)
        price += next_price[token, busiest] + _rank_price(served, busiest, to_rank)
        if to_node.shape[1]:
            price += _node_price(served, busiest, to_node, to_rank.shape[1])
    return price


@njit(cache=True, nogil=True)
def _rank_price(served, home, to_rank):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True)
def _busiest(served):  # type: ignore[no-untyped-def]
    """Rank that serves most experts of a token; of equals the first one listed."""
    busiest, most = served[0], 0
    for i in range(served.shape[0]):
        count = 0
        for j in range(i, served.shape[0]):
            count += served[j] == served[i]
        if count > most:
            busiest, most = served[i], count
    return busiest


@njit(cache=True, nogil=True)
def _is_first(served, place):  # type: ignore[no-untyped-def]
    for earlier in range(place):  # noqa: SIM110  # numba compiles no generator in all()
        if served[earlier] == served[place]:
            return False
    return True


@njit(cache=True, nogil=True)
def _node_price(served, home, to_node, num_ranks):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True)
def _serve(experts, row, token, choices, num_choices, served):  # type: ignore[no-untyped-def]
    """Fill ``[k]`` with the ranks that serve a token, its home told apart as ``row``."""
    for i in range(served.shape[0]):
        served[i] = _copy(choices, num_choices, row, experts[token, i], token)


@njit(cache=True, nogil=True)
def _receive(served, home, amount, received):  # type: ignore[no-untyped-def]
    """Add ``amount`` per rank that a token's copies reach; any home counts its share."""
    num_ranks = received.shape[0]
    for i in range(served.shape[0]):
        if _is_first(served, i) and served[i] != home:
            received[served[i]] += (
                amount * (num_ranks - 1) / num_ranks if home == num_ranks else amount
            )


@njit(cache=True, nogil=True)
def _receive_next(tokens, token, home, amount, received):  # type: ignore[no-untyped-def]
    """Add ``amount`` per rank that a token's copies reach in the next layer from a home."""
    row = home if tokens.next_num_choices.shape[0] > 1 else 0
    served = np.empty(tokens.next_experts.shape[1], dtype=np.int64)
    choices, num_choices = tokens.next_choices, tokens.next_num_choices
    _serve(tokens.next_experts, row, token, choices, num_choices, served)
    _receive(served, home, amount, received)


@njit(cache=True, nogil=True)
def price_layer(tokens, prices, state):  # type: ignore[no-untyped-def]
    """Fill ``cost`` and ``received`` from the placement; return the cost of all tokens."""
    experts, homes, cost = tokens.experts, tokens.home, state.cost
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
        _serve(experts, home if several else 0, token, choices, num_choices, served)
        cost[token] = _price(
            served,
            home,
            token,
            prices.follow,
            prices.to_rank,
            prices.to_node,
            tokens.next_price,
        )
        weight = weights[token]
        total += weight * cost[token]
        _receive(served, home, 1.0 * weight, state.received)
        if prices.crowd > 0:
            state.homes[_busiest(served)] += weight
        if follows:
            amount = 1.0 * weight
            _receive_next(tokens, token, _busiest(served), amount, state.next_received)
    return total


@njit(cache=True, nogil=True)
def dispatch_prices(tokens, state, to_rank, to_node, price):  # type: ignore[no-untyped-def]
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
                _serve(experts, row, token, choices, num_choices, served)
            price[token, home] = _price(served, home, 0, False, to_rank, to_node, nothing)


@njit(cache=True, nogil=True)
def busiest_ranks(tokens, state, busiest):  # type: ignore[no-untyped-def]
    """Fill ``[T]`` with the rank that serves most of each token's experts."""
    experts, homes = tokens.experts, tokens.home
    choices, num_choices = state.choices, state.num_choices
    several = num_choices.shape[0] > 1
    served = np.empty(experts.shape[1], dtype=np.int64)
    for token in range(experts.shape[0]):
        row = homes[token] if several else 0
        _serve(experts, row, token, choices, num_choices, served)
        busiest[token] = _busiest(served)


@njit(cache=True, nogil=True)
def _change(  # type: ignore[no-untyped-def]
    tokens,
    prices,
    state,
    changed,
    choices,
    num_choices,
    received,
    next_received,
    next_homes,
):
    """Change of the tokens' price when two experts are served by other copies.

    ``changed`` ``[2]`` are the experts, ``choices`` ``[H, 2, C]`` and ``num_choices``
    ``[H, 2]`` their new copies; ``received``, ``next_received`` and ``next_homes`` ``[R]``
    take the change of the copies and of the homes.
    """
    # Fields are read once: each access to a tuple's array counts references.
    experts, homes, cost = tokens.experts, tokens.home, state.cost
    weights, next_price = tokens.weight, tokens.next_price
    starts, users = tokens.starts, tokens.users
    old_choices, old_num_choices = state.choices, state.num_choices
    follow, to_rank, to_node = prices.follow, prices.to_rank, prices.to_node
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
                    after[i] = _copy(choices, num_choices, row, 0, token)
                elif used == two:
                    after[i] = _copy(choices, num_choices, row, 1, token)
                else:
                    after[i] = _copy(old_choices, old_num_choices, row, used, token)
            if counted:
                continue
            weight = weights[token]
            price = _price(after, home, token, follow, to_rank, to_node, next_price)
            total += weight * (price - cost[token])
            if count_received or count_next or count_homes:
                _serve(experts, row, token, old_choices, old_num_choices, before)
            if count_received:
                _receive(before, home, -1.0 * weight, received)
                _receive(after, home, 1.0 * weight, received)
            if count_next or count_homes:
                old, new = _busiest(before), _busiest(after)
                if count_homes:
                    next_homes[old] -= weight
                    next_homes[new] += weight
                if count_next and old != new:
                    _receive_next(tokens, token, old, -1.0 * weight, next_received)
                    _receive_next(tokens, token, new, 1.0 * weight, next_received)
    return total


@njit(cache=True, nogil=True)
def _apply(tokens, prices, state, changed):  # type: ignore[no-untyped-def]
    """Write the new price of all tokens that use one of two changed experts."""
    experts, homes, cost = tokens.experts, tokens.home, state.cost
    starts, users, next_price = tokens.starts, tokens.users, tokens.next_price
    choices, num_choices = state.choices, state.num_choices
    follow, to_rank, to_node = prices.follow, prices.to_rank, prices.to_node
    several = num_choices.shape[0] > 1
    served = np.empty(experts.shape[1], dtype=np.int64)
    for side in range(2):
        expert = changed[side]
        for place in range(starts[expert], starts[expert + 1]):
            token = users[place]
            home = homes[token]
            _serve(experts, home if several else 0, token, choices, num_choices, served)
            cost[token] = _price(served, home, token, follow, to_rank, to_node, next_price)


@njit(cache=True, nogil=True)
def _overflow(rank_load, max_load):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True)
def above(counts, limit):  # type: ignore[no-untyped-def]
    """Return how much of the counts ``[R]`` of all ranks is above a limit."""
    over = 0.0
    for rank in range(counts.shape[0]):
        over += max(0.0, counts[rank] - limit)
    return over


@njit(cache=True, nogil=True)
def busy(received, limit):  # type: ignore[no-untyped-def]
    """Return the squares of what the ranks ``[R]`` receive above a limit, added up.

    Where all are above it their sum does not tell who is the busiest.
    """
    over = 0.0
    for rank in range(received.shape[0]):
        over += max(0.0, received[rank] - limit) ** 2
    return over


@njit(cache=True, nogil=True)
def _random(state):  # type: ignore[no-untyped-def]
    """Return the next of a stream of uint64 (xorshift64*, Vigna, arXiv 1402.6246)."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(0x2545F4914F6CDD1D)


@njit(cache=True, nogil=True)
def _below(state, limit):  # type: ignore[no-untyped-def]
    return np.int64((_random(state) >> np.uint64(11)) % np.uint64(limit))


@njit(cache=True, nogil=True)
def _uniform(state):  # type: ignore[no-untyped-def]
    """Return a float64 in (0, 1]."""
    return ((_random(state) >> np.uint64(11)) + np.uint64(1)) * (1.0 / 9007199254740992.0)


@njit(cache=True, nogil=True)
def _try(tokens, prices, state, rank, slot, other, place, rule, limit):  # type: ignore[no-untyped-def]
    """Try one move; make it if it costs no more than ``limit``. Return the change made.

    With ``other`` a rank, the experts in (rank, slot) and (other, place) swap; with
    ``other`` -1, expert ``place`` takes the slot of an expert that has another copy.
    """
    one = state.slots[rank, slot]
    two = state.slots[other, place] if other >= 0 else place
    if one == two or state.holds[two, rank]:
        return 0.0, False
    if other >= 0 and state.holds[one, other]:
        return 0.0, False
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
    change = 0.0
    for side in range(2):
        mine, my_number = choices[:, side], num_choices[:, side]
        width = prices.ranks_per_node
        choose(experts[side], held[side], width, rule, mine, my_number)
        _counted_share_of(
            tokens,
            prices,
            experts[side],
            held[side],
            choices,
            num_choices,
            side,
            share[side],
        )
    change += prices.linear[two, rank] - prices.linear[one, rank]
    if other >= 0:
        change += prices.linear[one, other] - prices.linear[two, other]
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
        return 0.0, False
    change += prices.overflow * (others - others_before)
    received, next_received = state.received.copy(), state.next_received.copy()
    next_homes = state.homes.copy()
    change += _change(
        tokens,
        prices,
        state,
        experts,
        choices,
        num_choices,
        received,
        next_received,
        next_homes,
    )
    nearer = own < own_before - 1e-6
    if prices.max_receive > 0 and not nearer:
        most = prices.max_receive
        over = busy(received, most) + busy(next_received, most)
        over -= busy(state.received, most) + busy(state.next_received, most)
        if over > 1e-6:
            return 0.0, False
        nearer = over < -1e-6
    if prices.receive > 0:
        change += prices.receive * (received.max() - state.received.max())
    if prices.crowd > 0:
        over = above(next_homes, prices.max_homes)
        change += prices.crowd * (over - above(state.homes, prices.max_homes))
    # Nearer to a cap is always worth a move: only caps make a plan valid.
    if (change > limit or change == 0.0) and not nearer:
        return 0.0, False
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
    _apply(tokens, prices, state, experts)
    return change, True


@njit(cache=True, nogil=True)
def anneal(tokens, prices, state, kind, rule, temperature, num_moves, seed):  # type: ignore[no-untyped-def]
    """Try random moves at one temperature (Kirkpatrick et al., Science 220, 1983).

    ``kind`` ``[E]`` int64: experts of one kind may change places, those of a negative one
    stay. Returns the change of the price.
    """
    num_ranks, num_slots = state.slots.shape
    num_experts = state.holds.shape[0]
    replicas = num_ranks * num_slots > num_experts
    stream = np.array([seed], dtype=np.uint64)
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
            total += _try(tokens, prices, state, rank, slot, other, place, rule, limit)[0]
    return total


@njit(cache=True, nogil=True)
def descend(tokens, prices, state, kind, rule):  # type: ignore[no-untyped-def]
    """Try every move once and make those that pay. Return the change of the price."""
    num_ranks, num_slots = state.slots.shape
    num_experts = state.holds.shape[0]
    replicas = num_ranks * num_slots > num_experts
    total = 0.0
    for rank in range(num_ranks):
        for slot in range(num_slots):
            for other in range(rank + 1, num_ranks):
                for place in range(num_slots):
                    one, two = state.slots[rank, slot], state.slots[other, place]
                    if kind[one] >= 0 and kind[one] == kind[two]:
                        total += _try(
                            tokens, prices, state, rank, slot, other, place, rule, 0.0
                        )[0]
            if replicas:
                for expert in range(num_experts):
                    one = state.slots[rank, slot]
                    if (
                        kind[one] >= 0
                        and kind[one] == kind[expert]
                        and state.holds[one].sum() > 1
                    ):
                        total += _try(
                            tokens, prices, state, rank, slot, -1, expert, rule, 0.0
                        )[0]
    return total
