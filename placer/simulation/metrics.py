"""The metrics of a home policy, and how they add up over the layers."""

from dataclasses import dataclass, field, fields

import numpy as np

from placer.arrays import BoolArray, Int32Array, IntArray
from placer.placement.imbalance import imbalance, imbalances
from placer.serving.homes import Batches
from placer.serving.layer_serving import RankArray, blocks, first_occurrence

_DECIMALS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMetrics:
    """Traffic and balance of one placement under one home policy.

    Copies are hidden states sent, per token and MoE layer (``docs/concepts.md``).

    Attributes
    ----------
    local_activation_rate
        Share of the (token, expert) pairs that are served at home; 1/R for chance.
    remote_pairs_per_token
        Dispatch with exchange ``per-expert``: pairs served elsewhere.
    remote_rank_copies_per_token
        Dispatch with exchange ``per-rank``: distinct ranks other than the home.
    combine_rank_copies_per_token
        Copies back, to the home; for ``follow`` to the next home.
    crossing_rank_copies_per_token
        Of the rank copies, those that leave the home's node.
    remote_node_copies_per_token
        Dispatch with exchange ``per-node``: distinct nodes other than the home's.
    load_imbalance_mean, load_imbalance_max
        Max/mean pairs per rank of a layer; its mean and maximum over the layers.
    straggler_mean
        Max/mean pairs per rank of a batch; mean over full batches and layers.
    bottleneck_rank_copies_per_token
        R x the copies that the busiest rank of a batch receives / the tokens of the
        batch; equals the remote rank copies per token where receivers are even.
    home_imbalance_max
        Max/mean tokens per home rank; the maximum over the layers.
    """

    local_activation_rate: float
    remote_pairs_per_token: float
    remote_rank_copies_per_token: float
    combine_rank_copies_per_token: float
    crossing_rank_copies_per_token: float
    remote_node_copies_per_token: float
    load_imbalance_mean: float
    load_imbalance_max: float
    straggler_mean: float
    bottleneck_rank_copies_per_token: float
    home_imbalance_max: float

    def to_json(self) -> dict[str, float]:
        """Return the metrics by name, rounded to five decimals."""
        return {f.name: round(getattr(self, f.name), _DECIMALS) for f in fields(self)}


@dataclass(slots=True, kw_only=True)
class PolicyTally:
    """Counts of one home policy, added up layer by layer.

    Attributes
    ----------
    num_ranks, ranks_per_node
        The topology.
    batches
        Which tokens share a batch.
    pairs_of_token
        ``[T]`` int32: pairs of a token that were served elsewhere, in all layers counted.
    copies_of_token, node_copies_of_token
        ``[T]`` int32: rank copies and node copies that it sent.
    """

    num_ranks: int
    ranks_per_node: int
    batches: Batches
    pairs_of_token: Int32Array = field(init=False)
    copies_of_token: Int32Array = field(init=False)
    node_copies_of_token: Int32Array = field(init=False)
    _num_pairs: int = 0
    _num_tokens: int = 0
    _rank_copies: int = 0
    _combine: int = 0
    _crossing: int = 0
    _load_imbalance: list[float] = field(default_factory=list)
    _home_imbalance: list[float] = field(default_factory=list)
    _straggler: list[float] = field(default_factory=list)
    _bottleneck: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.copies_of_token = np.zeros(len(self.batches.order), dtype=np.int32)
        self.pairs_of_token = np.zeros_like(self.copies_of_token)
        self.node_copies_of_token = np.zeros_like(self.copies_of_token)

    def add(
        self, ranks: RankArray, home: RankArray, combine_home: RankArray | None = None
    ) -> None:
        """Count one layer.

        Parameters
        ----------
        ranks
            ``[k, T]``: the rank that serves each pair.
        home
            ``[T]``: the rank that dispatches each token.
        combine_home
            ``[T]``: where the outputs go; ``None`` for the home.
        """
        self._num_pairs += ranks.size
        self._num_tokens += len(home)
        load = np.zeros((2, self.batches.num_batches, self.num_ranks), dtype=np.int64)
        for part in blocks(len(home)):
            back = None if combine_home is None else combine_home[part]
            load += self._add_block(part, ranks[:, part], home[part], back)
        self._add_balance(load.sum(axis=0), load[1], home)

    def _add_block(
        self, part: slice, ranks: RankArray, home: RankArray, back: RankArray | None
    ) -> IntArray:
        """Count some tokens; return ``[2, batches, R]``: pairs, then copies, received."""
        first = first_occurrence(ranks)
        away = ranks != home
        remote = first & away
        copies = np.count_nonzero(remote, axis=0)
        self.pairs_of_token[part] += np.count_nonzero(away, axis=0)
        self.copies_of_token[part] += copies
        rank_copies = int(copies.sum())
        self._rank_copies += rank_copies
        self._combine += (
            rank_copies if back is None else int(np.count_nonzero(first & (ranks != back)))
        )
        if self.ranks_per_node < self.num_ranks:
            self._add_nodes(part, ranks, home, first)
        shape = (2, self.batches.num_batches, self.num_ranks)
        cell = self.batches.batch_of_token[part] * self.num_ranks + ranks
        cell += remote * (shape[1] * shape[2])
        return np.bincount(cell.ravel(), minlength=2 * shape[1] * shape[2]).reshape(shape)

    def _add_nodes(
        self, part: slice, ranks: RankArray, home: RankArray, first: BoolArray
    ) -> None:
        node = ranks // self.ranks_per_node
        away = node != home // self.ranks_per_node
        self._crossing += int(np.count_nonzero(first & away))
        self.node_copies_of_token[part] += np.count_nonzero(
            first_occurrence(node) & away, axis=0
        )

    def _add_balance(self, load: IntArray, received: IntArray, home: RankArray) -> None:
        """Add a layer's ``[batches, R]`` pairs and copies received."""
        self._load_imbalance.append(imbalance(load.sum(axis=0)))
        homes = np.bincount(home, minlength=self.num_ranks).astype(np.float64)
        self._home_imbalance.append(imbalance(homes))
        full = load[: self.batches.num_full]
        self._straggler.append(float(imbalances(full).mean()))
        busiest = received[: self.batches.num_full].max(axis=1)
        self._bottleneck.append(float(busiest.mean()) * self.num_ranks / self.batches.size)

    def metrics(self) -> PolicyMetrics:
        """Return the metrics over all layers counted."""
        remote = int(self.pairs_of_token.sum())
        return PolicyMetrics(
            local_activation_rate=(self._num_pairs - remote) / self._num_pairs,
            remote_pairs_per_token=remote / self._num_tokens,
            remote_rank_copies_per_token=self._rank_copies / self._num_tokens,
            combine_rank_copies_per_token=self._combine / self._num_tokens,
            crossing_rank_copies_per_token=self._crossing / self._num_tokens,
            remote_node_copies_per_token=int(self.node_copies_of_token.sum())
            / self._num_tokens,
            load_imbalance_mean=float(np.mean(self._load_imbalance)),
            load_imbalance_max=max(self._load_imbalance),
            straggler_mean=float(np.mean(self._straggler)),
            bottleneck_rank_copies_per_token=float(np.mean(self._bottleneck)),
            home_imbalance_max=max(self._home_imbalance),
        )
