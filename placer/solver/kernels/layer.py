"""What the compiled loops read and change: the arrays of one layer.

Legend of the shapes: T tokens, E logical experts, R ranks, N nodes, k experts per token,
C most replicas of an expert, H distinct homes (1 where the home does not decide which
replica serves; else R), S load scenarios.
"""

from typing import NamedTuple

from placer.arrays import AnyArray


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

    experts: AnyArray
    weight: AnyArray
    home: AnyArray
    has_even_homes: bool
    next_price: AnyArray
    starts: AnyArray
    users: AnyArray
    next_experts: AnyArray
    next_choices: AnyArray
    next_num_choices: AnyArray


class Prices(NamedTuple):
    """The prices of one layer.

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
        ``[E, R]`` int64: an expert's replica on a rank.
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
        Ranks that are near to each other where replicas of an expert are chosen among.
    caution
        Of what a replica might serve beyond its share, the part that is counted as if it
        did; 0 where who serves is known.
    has_unknown_draws
        Whether draws choose among replicas, and it is not known yet how they fall.
    """

    to_rank: AnyArray
    to_node: AnyArray
    follow: bool
    linear: AnyArray
    load: AnyArray
    max_load: AnyArray
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
    rank_load
        ``[S, R]`` float64.
    received
        ``[R]`` float64: copies that each rank receives.
    next_received
        ``[R]`` float64: the same in the next layer, where ``next_experts`` are known.
    homes
        ``[R]`` int64: tokens whose next home each rank is, where ``crowd`` counts them.
    """

    slots: AnyArray
    holds: AnyArray
    choices: AnyArray
    num_choices: AnyArray
    share: AnyArray
    rank_load: AnyArray
    received: AnyArray
    next_received: AnyArray
    homes: AnyArray
