"""The traffic that the search minimises: copies, caps and prices.

Legend of the shapes: L MoE layers, T tokens, E logical experts, R ranks, k experts per
token, S load scenarios.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from placer.arrays import FloatArray, Int16Array, IntArray
from placer.errors import UsageError
from placer.placement.topology import Topology
from placer.solver.caps import Caps
from placer.solver.kernels.layer import Prices
from placer.solver.params import SolverParams
from placer.target.engine import SolvableExchange, SolvableReplicaChoice
from placer.trace import Chunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrafficProblem:
    """Minimise the price of the copies that tokens cause.

    Attributes
    ----------
    experts
        L arrays ``[T, k]`` of expert ids, in the router's order.
    topology
        Ranks, nodes and costs.
    policy
        ``fixed`` (homes are any rank with the same probability), ``follow``, or
        ``given``.
    exchange
        ``per-rank`` or ``per-node``.
    homes
        L arrays ``[T]``, for ``given``; else ``None``.
    load
        L arrays ``[S, E]`` float64: pairs per expert in each scenario; the first is the
        profile itself.
    max_load
        L arrays ``[S]``: most load of a rank. That of the profile is a limit that no move
        may break, the others are priced. Under ``follow`` with replicas a move changes
        homes of layers further on too, and may break it there.
    overflow_price
        Copies that a pair of load above the cap is worth, mean over the scenarios.
    receive_price
        Copies that a copy to the busiest receiver is worth, beyond itself.
    home_price
        As in ``SolverParams``.
    move_price
        L arrays ``[E, R]``: copies that an expert on a rank is worth, or ``None``.
    kind
        L arrays ``[E]`` int64: experts of one kind may change places, those of a negative
        one stay; ``None``: all may.
    replica_choice
        Which replica serves: ``local-first``, ``sglang-static`` or ``hash`` (any in turn);
        ``None`` where each expert has one.
    layer_ids
        ``[L]``: the model's own layer number of each MoE layer, for ``sglang-static``;
        ``None``: no layer is dense.
    caps
        Those on homes, where every token above costs ``home_price`` copies, and on received
        copies, a limit that no move may break, as that of the load is. That on load is in
        ``max_load``.
    caution
        ``[L]``: what each copy counts beyond what it serves, from 0 to 1, all that it
        might: its expert's load where homes are given, the most that a draw can give it
        under ``sglang-static``; ``None``: nothing.
    """

    experts: tuple[Int16Array, ...]
    topology: Topology
    policy: Literal["fixed", "follow", "given"]
    exchange: SolvableExchange = "per-rank"
    homes: tuple[IntArray, ...] | None = None
    load: tuple[FloatArray, ...]
    max_load: tuple[FloatArray, ...]
    overflow_price: float = 0.0
    receive_price: float = 0.0
    home_price: float = SolverParams().home_price
    move_price: tuple[FloatArray, ...] | None = None
    kind: tuple[IntArray, ...] | None = None
    replica_choice: SolvableReplicaChoice | None = None
    layer_ids: tuple[int, ...] | None = None
    caps: Caps = field(default_factory=Caps)
    caution: FloatArray | None = None

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.experts)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.experts[0])

    @property
    def has_unknown_draws(self) -> bool:
        """Whether copies depend on draws that are known only after placing all experts."""
        return self.replica_choice == "sglang-static" and self.caution is not None

    @property
    def limits_received(self) -> bool:
        """Whether received copies have a cap."""
        return self.caps.max_received_copies is not None

    def layer_prices(self, layer: int) -> Prices:
        """Return what things cost in one layer, scaled by R."""
        num_ranks = self.topology.num_ranks
        to_rank, to_node = copy_prices(self.topology, self.exchange)
        linear = np.zeros((self.load[layer].shape[1], num_ranks), dtype=np.int64)
        if self.move_price is not None:
            linear = np.rint(self.move_price[layer] * num_ranks).astype(np.int64)
        max_homes, crowd, received = None, 0.0, self.caps.max_received_copies or 0.0
        # After the last layer a token is nowhere at home.
        follows = self.policy == "follow" and layer + 1 < self.num_layers
        if follows:
            max_homes = self.caps.most_homes(self.num_tokens, num_ranks)
            crowd = 0.0 if max_homes is None else self.home_price * num_ranks
        return Prices(
            to_rank=to_rank,
            to_node=to_node,
            follow=self.policy == "follow",
            linear=linear,
            load=np.ascontiguousarray(self.load[layer]),
            max_load=np.asarray(self.max_load[layer], dtype=np.float64),
            overflow=self.overflow_price * num_ranks,
            receive=self.receive_price * num_ranks,
            max_receive=received * self.num_tokens / num_ranks,
            max_homes=max_homes or 0.0,
            crowd=crowd,
            ranks_per_node=self.topology.gpus_per_node,
            caution=0.0 if self.caution is None else float(self.caution[layer]),
            has_unknown_draws=self.has_unknown_draws and self.policy != "given",
        )


def copy_prices(topology: Topology, exchange: str) -> tuple[IntArray, IntArray]:
    """Return the cost of a copy: ``[R + 1, R]`` to a rank and ``[R + 1, N]`` to a node.

    The last row is that of a home that is any rank with the same probability. All prices
    are multiplied by R, so that this row is whole. ``per-node`` sends one copy to each
    node, to the rank there with the home's local index, and from it one to every other
    rank (``docs/concepts.md``).

    Raises
    ------
    UsageError
        If the traffic of the exchange does not depend on the placement.
    """
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    cost = topology.rank_cost().astype(np.int64)
    if exchange == "per-rank":
        nodes = np.zeros((num_ranks, 0), dtype=np.int64)
    elif exchange == "per-node":
        node, local = np.divmod(np.arange(num_ranks), topology.gpus_per_node)
        # [R, N]: where a home's copy lands in a node, the rank with the home's index.
        landing = np.arange(num_nodes) * topology.gpus_per_node + local[:, None]
        nodes = np.take_along_axis(cost, landing, axis=1)
        cost = cost[landing[:, node], np.arange(num_ranks)]
    else:
        raise UsageError(
            f"the traffic of exchange {exchange} does not depend on the placement",
            "solve for --exchange per-rank or per-node, or balance: --objective balance",
        )

    def with_any(price: IntArray) -> IntArray:
        return np.vstack([num_ranks * price, price.sum(axis=0)]).astype(np.int64)

    return with_any(cost), with_any(nodes.astype(np.int64))


def sample_sequences(tokens: Chunk, num_tokens: int, seed: int) -> Chunk:
    """Return whole sequences of about ``num_tokens`` tokens, drawn at random."""
    if tokens.num_tokens <= num_tokens:
        return tokens
    ids, lengths = np.unique(tokens.sequence_ids, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(ids))
    number = int(np.searchsorted(np.cumsum(lengths[order]), num_tokens)) + 1
    return tokens.select(np.isin(tokens.sequence_ids, ids[order[:number]]))
