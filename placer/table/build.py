"""Building a table from recorded tokens.

A home is judged by its expected local activation rate: the share of a token's
(token, expert) pairs that the home could serve itself. It is estimated from the tokens of
the profile with the same id (T) or the same past majority ranks (A), shrunk towards the
rate over all tokens of the layer::

    rate[x, r] = (pairs[x, r] + s k prior[r]) / (k tokens[x] + s k)

where s, the ``shrinkage``, is a number of tokens: a row seen s times trusts its own counts
and the prior equally, and a row never seen has the prior itself. With embeddings, the prior
of a token id is predicted from its embedding by a regression. The prior of a history is
predicted from its ranks and pairs of ranks (:mod:`placer.table.histories`).

A token takes the more confident of T and A. So T serves the tokens whose history shows
little, and A those whose id shows little. Both are therefore counted a second time: every
token counts with the probability that it takes the row, and rows are shrunk towards their
first values.

Under a cap on the home imbalance each rank has a price per layer
(:mod:`placer.table.prices`), and a row takes the home of the highest rate minus price; its
confidence stays the rate.

Where only the token id decides the experts (hash-routed layers), the rate is not an
estimate: it is the share of the id's experts that the home has, and A is not used.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from placer.arrays import AnyArray, FloatArray, IntArray
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.run.deadline import Deadline
from placer.serving.homes import fixed_homes
from placer.serving.layer_serving import LayerServing, RankArray, majority_rank, rank_dtype
from placer.serving.replica_choice import serving_layers
from placer.table.combined import CombinedBuilder
from placer.table.embeddings import Embeddings
from placer.table.hash_routing import TokenExperts, require_same_routing
from placer.table.histories import HistoryRates, sums
from placer.table.lookup import LayerTable, require_ids
from placer.table.prices import EvenHomes
from placer.table.regression import EmbeddingRegression
from placer.table.requests import request_scores
from placer.table.table import Table, expert_rank_rows
from placer.target.engine import ReplicaChoice
from placer.trace import Chunk

# Longer histories than four layers do not predict more, but cost more.
_MOST_DEFAULT_LOOKBACK = 4
_MOST_DEFAULT_HISTORIES = 1 << 14
DEFAULT_SHRINKAGE = 4.0
# A lead in rate that leaves a doubt, of 1 in 1 + e, about which of T and A will be taken;
# and the tokens that rates count for when they are counted by the tokens that take them.
_DOUBT = 0.03
_USE_SHRINKAGE = 8.0
# R^lookback rows per layer: above this, a table is no longer something to ship.
_MOST_HISTORIES = 1 << 22


def build_table(
    placement: Placement,
    tokens: Chunk,
    *,
    vocab_size: int,
    lookback: int | None = None,
    shrinkage: float = DEFAULT_SHRINKAGE,
    with_token_score: bool = False,
    with_combined: bool = False,
    embeddings: Embeddings | None = None,
    max_home_imbalance: float | None = None,
    token_experts: TokenExperts | None = None,
    replica_choice: ReplicaChoice | None = None,
    layer_ids: tuple[int, ...] | None = None,
    deadline: Deadline | None = None,
) -> Table:
    """Build the token-shuffle table of a placement.

    Parameters
    ----------
    placement
        Experts in slots.
    tokens
        The profile, whole sequences with token ids.
    vocab_size
        V. Without ``embeddings``, ids never seen get the row of the layer's prior.
    lookback
        Number of past majority ranks that index A; ``None`` for
        :func:`default_lookback`.
    shrinkage
        s, in tokens; see the module's formula.
    with_token_score
        Also hold the rate of every home, ``[L, V, R]``: the second choices of equal
        slices.
    with_combined
        Also hold the combined rule (:mod:`placer.table.combined`), and the scores that it
        needs.
    embeddings
        Embedding rows of at least ``vocab_size`` ids, which give every id a prior (see
        :mod:`placer.table.regression`), or ``None``.
    max_home_imbalance
        Cap, above 1, on the profile's tokens of the fullest home over the mean, in every
        layer; where prices do not reach it, the most even homes found. Ids without an
        own row take turns over the ranks. ``None``: the best home of each row.
    token_experts
        By hash-routed layer, ``[V, k]``: the experts of every token id (see
        :func:`placer.table.hash_routing.read_token_experts`). Their rows are exact; of
        equally good homes, the one that the checkpoint lists first is taken.
    replica_choice, layer_ids
        Who serves in the layers before, whose majority ranks index A: as
        :func:`placer.serving.replica_choice.serving_layers` takes them. Under ``hash``
        all replicas take turns.
    deadline
        When the table must be built; none by default.

    Raises
    ------
    OutOfTimeError
        If there is no time for all layers.
    PlacerError
        If the tokens have no ids, or an id at or past ``vocab_size``, or were routed
        in another way than ``token_experts`` says.
    UsageError
        If ``lookback``, ``shrinkage`` or ``max_home_imbalance`` is out of range, or
        nothing says which replica of an expert serves.
    """
    if lookback is None:
        lookback = default_lookback(placement.num_ranks)
    even = EvenHomes(num_ranks=placement.num_ranks, max_home_imbalance=max_home_imbalance)
    _require_options(lookback, shrinkage, placement.num_ranks)
    ids = require_ids(tokens, vocab_size)
    token_experts = token_experts or {}
    _require_vocabulary(token_experts, vocab_size)
    require_same_routing(token_experts, tokens)
    seen, token_row, vocab_row = _rows_of_ids(ids, vocab_size)
    regression = None
    if embeddings is not None:
        times = np.bincount(token_row[token_row >= 0])
        weight = times / (times + shrinkage)
        regression = EmbeddingRegression.of(embeddings, vocab_size, seen, weight)
    builder = _Builder(
        placement=placement,
        vocab_row=vocab_row,
        regression=regression,
        token_row=token_row,
        token_ids=ids,
        fixed=fixed_homes(tokens.sequence_ids, placement.num_ranks),
        lookback=lookback,
        shrinkage=shrinkage,
        even=even,
    )
    combined = CombinedBuilder(
        placement=placement,
        tokens=tokens,
        token_ids=ids,
        shrinkage=shrinkage,
        even=even,
    )
    with_token_score |= with_combined
    layers = []
    history: list[RankArray] = []
    served = serving_layers(placement, replica_choice, layer_ids)
    each = zip(tokens.experts, served, strict=True)
    paced = (deadline or Deadline()).paced(each, placement.num_layers)
    for layer, (chosen, serving) in enumerate(paced):
        experts = np.ascontiguousarray(chosen.T)
        if layer in token_experts:
            rates, rows = builder.exact_layer(layer, token_experts[layer])
        else:
            rates, rows = builder.layer(layer, experts, history)
        home, _ = rows.homes(ids, history, builder.fixed)
        majority = majority_rank(serving.ranks(experts, home))
        if with_combined:
            combined.add(rates, exact=layer in token_experts)
        history = [*history, majority][-lookback:] if lookback else []
        layers.append((rows, rates.astype(np.float16) if with_token_score else None))
    request = request_scores(placement, tokens, token_row, len(seen) + 1)[vocab_row]
    if regression is not None:
        # Shares are rates; their regression wants numbers in 0..1.
        never = vocab_row == len(seen)
        level = 1 / placement.num_ranks
        request[never] = regression.rates(request[seen] + level)[never] - level
    return Table(
        model=ModelSpec(
            num_experts=placement.num_experts, top_k=tokens.experts[0].shape[1]
        ),
        num_ranks=placement.num_ranks,
        num_nodes=placement.num_nodes,
        lookback=lookback,
        token_rank=np.stack([rows.token_rank for rows, _ in layers]),
        token_confidence=np.stack([rows.token_confidence for rows, _ in layers]),
        history_rank=np.stack([rows.history_rank for rows, _ in layers]),
        history_confidence=np.stack([rows.history_confidence for rows, _ in layers]),
        request_score=request.astype(np.float16),
        expert_rank=expert_rank_rows(
            [placement.expert_rank(n) for n in range(placement.num_layers)],
            placement.num_ranks,
        ),
        token_score=np.stack([s for _, s in layers if s is not None])
        if with_token_score
        else None,
        combined=combined.rule() if with_combined else None,
    )


def _require_vocabulary(token_experts: TokenExperts, vocab_size: int) -> None:
    for table in token_experts.values():
        if len(table) != vocab_size:
            raise PlacerError(
                f"the checkpoint has experts for {len(table)} token ids, but the "
                f"vocabulary has {vocab_size}",
                "give the checkpoint that the trace was recorded from: --embeddings MODEL",
            )


def _rows_of_ids(ids: IntArray, vocab_size: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return the ids seen, and the row of each token and of each id of the vocabulary.

    A token of unknown id has row -1, an id never seen the row after the last.
    """
    seen, row = np.unique(ids[ids >= 0], return_inverse=True)
    token_row = np.full(len(ids), -1, dtype=np.int64)
    token_row[ids >= 0] = row
    vocab_row = np.full(vocab_size, len(seen), dtype=np.int64)
    vocab_row[seen] = np.arange(len(seen))
    return seen, token_row, vocab_row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Builder:
    """What is the same for all layers.

    ``vocab_row`` [V] and ``token_row`` [T] index the rows of the ids seen in the profile;
    the row after the last is the prior, and -1 is a token of unknown id.
    """

    placement: Placement
    vocab_row: IntArray
    regression: EmbeddingRegression | None
    token_row: IntArray
    token_ids: IntArray
    fixed: RankArray
    lookback: int
    shrinkage: float
    even: EvenHomes

    def layer(
        self, layer: int, experts: AnyArray, history: list[RankArray]
    ) -> tuple[FloatArray, LayerTable]:
        """Return the rates ``[V, R]`` and the rows of a layer."""
        serving = LayerServing.of(self.placement, layer)
        everyone = np.zeros(experts.shape[1], dtype=np.int64)
        prior = serving.count_held(experts, everyone, 1)[0] / experts.size
        num_seen = int(self.token_row.max()) + 1
        seen = self._rates(serving, experts, self.token_row, num_seen, prior)
        vocabulary = None
        if self.regression is not None:
            counted = self._rates(serving, experts, self.token_row, num_seen, prior, 0)
            vocabulary = self.regression.rates(counted)
            known = np.flatnonzero(self.vocab_row < num_seen)
            own = vocabulary[known]
            seen = self._rates(serving, experts, self.token_row, num_seen, own)
            vocabulary[known] = seen
        rates = np.vstack([seen, prior])
        chosen, histories = rates, None
        if 0 < self.lookback <= len(history):
            served = serving.share_held(experts)
            histories = HistoryRates.of(
                history[-self.lookback :], served, self.placement.num_ranks
            )
            chosen, histories = self._as_used(rates, histories, served)

        def homes(price: FloatArray) -> RankArray:
            return self._homes(chosen, histories, price)

        price = self.even.prices(homes)
        rows = self._rows(chosen, histories, price)
        if vocabulary is None:
            return rates[self.vocab_row], self._in_vocabulary(rows, prior)
        used = vocabulary.copy()
        used[known] = chosen[self.vocab_row[known]]
        token_rank, token_confidence = _best(used, price)
        return vocabulary, dataclasses.replace(
            rows, token_rank=token_rank, token_confidence=token_confidence
        )

    def exact_layer(
        self, layer: int, token_experts: AnyArray
    ) -> tuple[FloatArray, LayerTable]:
        """Return the rates ``[V, R]`` and the rows of a layer, its experts known by id."""
        serving = LayerServing.of(self.placement, layer)
        experts = np.ascontiguousarray(token_experts.T)
        rates = serving.share_held(experts)
        # Below the step between two rates, so that it only decides between equals.
        bonus = 0.5 / len(experts) * self._tie_breaks(serving, experts)
        known = self.token_ids >= 0

        def homes(price: FloatArray) -> RankArray:
            chosen = self.fixed.astype(np.int64)
            chosen[known] = _best(rates, price, bonus)[0][self.token_ids[known]]
            return chosen

        price = self.even.prices(homes)
        token_rank, token_confidence = _best(rates, price, bonus)
        num_histories = self.placement.num_ranks**self.lookback
        return rates, LayerTable(
            token_rank=token_rank,
            token_confidence=token_confidence,
            history_rank=np.zeros(num_histories, dtype=token_rank.dtype),
            history_confidence=np.zeros(num_histories, dtype=token_confidence.dtype),
            num_ranks=self.placement.num_ranks,
            lookback=self.lookback,
        )

    def _tie_breaks(self, serving: LayerServing, experts: AnyArray) -> FloatArray:
        """Return ``[V, R]`` in 0..1, the more the better: which of equal homes to take.

        That of the expert listed first; under a cap drawn, so that prices can part equals.
        """
        shape = (experts.shape[1], self.placement.num_ranks)
        if self.even.has_cap:
            return np.random.default_rng(0).random(shape)
        order = np.zeros(shape)
        for place in reversed(range(len(experts))):
            listed = np.take(serving.replica_rank[:, 0], experts[place])
            order[np.arange(len(listed)), listed] = 1 - place / len(experts)
        return order

    def _as_used(
        self, rates: FloatArray, histories: HistoryRates, served: FloatArray
    ) -> tuple[FloatArray, HistoryRates]:
        """Count T and A again, each by the tokens that will take it, shrunk towards itself.

        ``served`` ``[T, R]``: the share of a token's pairs that each home could serve.
        """
        known = self.token_row >= 0
        sure = np.where(known, rates.max(axis=1)[self.token_row], -1.0)
        lead = histories.rates.max(axis=1)[histories.group] - sure
        takes_history = 1 / (1 + np.exp(-lead / _DOUBT))

        def anew(before: FloatArray, group: IntArray, weight: FloatArray) -> FloatArray:
            total = sums(group, served, weight, len(before))
            tokens = np.bincount(group[group >= 0], weight[group >= 0], len(before))
            found: FloatArray = (total + _USE_SHRINKAGE * before) / (
                tokens + _USE_SHRINKAGE
            )[:, None]
            return found

        return anew(rates, self.token_row, 1 - takes_history), dataclasses.replace(
            histories, rates=anew(histories.rates, histories.group, takes_history)
        )

    def _homes(
        self, rates: FloatArray, histories: HistoryRates | None, price: FloatArray
    ) -> RankArray:
        """Return ``[T]``: the profile's homes at a price per rank."""
        token_rank, token_confidence = _best(rates, price)
        past = rates[-1:] if histories is None else histories.rates
        history_rank, history_confidence = _best(past, price)
        # The histories that were met, numbered, are all that the profile looks up.
        rows = LayerTable(
            token_rank=token_rank,
            token_confidence=token_confidence,
            history_rank=history_rank,
            history_confidence=history_confidence,
            num_ranks=self.placement.num_ranks,
            lookback=1,
        )
        met = [] if histories is None else [histories.group]
        return rows.homes(self.token_row, met, self.fixed)[0]

    def _rows(
        self, rates: FloatArray, histories: HistoryRates | None, price: FloatArray
    ) -> LayerTable:
        """Return the rows of the ids seen and, last, of the prior, at a price per rank."""
        token_rank, token_confidence = _best(rates, price)
        if histories is None:
            num_histories = self.placement.num_ranks**self.lookback
            history_rank = np.tile(token_rank[-1:], num_histories)
            history_confidence = np.tile(token_confidence[-1:], num_histories)
        else:
            blocks = [_best(block, price) for block in histories.blocks()]
            history_rank = np.concatenate([rank for rank, _ in blocks])
            history_confidence = np.concatenate([sure for _, sure in blocks])
        return LayerTable(
            token_rank=token_rank,
            token_confidence=token_confidence,
            history_rank=history_rank,
            history_confidence=history_confidence,
            num_ranks=self.placement.num_ranks,
            lookback=self.lookback,
        )

    def _in_vocabulary(self, rows: LayerTable, prior: FloatArray) -> LayerTable:
        """Give every id of the vocabulary its row."""
        token_rank = rows.token_rank[self.vocab_row]
        token_confidence = rows.token_confidence[self.vocab_row]
        if self.even.has_cap:
            without = np.flatnonzero(self.vocab_row == len(rows.token_rank) - 1)
            turn = np.arange(len(without)) % self.placement.num_ranks
            token_rank[without] = turn
            token_confidence[without] = prior[turn]
        return dataclasses.replace(
            rows, token_rank=token_rank, token_confidence=token_confidence
        )

    def _rates(
        self,
        serving: LayerServing,
        experts: AnyArray,
        group: IntArray,
        num_groups: int,
        prior: FloatArray,
        shrinkage: float | None = None,
    ) -> FloatArray:
        """Return ``[groups, R]``: expected local activation rate of every home."""
        top_k = len(experts)
        pairs = serving.count_held(experts, group, num_groups)
        tokens = np.bincount(group[group >= 0], minlength=num_groups)[:, None]
        weight = (self.shrinkage if shrinkage is None else shrinkage) * top_k
        rates: FloatArray = (pairs + weight * prior) / (top_k * tokens + weight)
        return rates


def _best(
    rates: FloatArray, price: FloatArray, bonus: FloatArray | float = 0.0
) -> tuple[RankArray, AnyArray]:
    """Return each row's best home at the prices (the lowest of equals) and its rate."""
    rank = (rates + bonus - price).argmax(axis=1)
    rate = np.take_along_axis(rates, rank[:, None], axis=1)[:, 0]
    return rank.astype(rank_dtype(rates.shape[1] - 1)), rate.astype(np.float16)


def default_lookback(num_ranks: int) -> int:
    """Return the number of past layers that index A: at most 4, with a limit on rows."""
    lookback = 1
    while (
        lookback < _MOST_DEFAULT_LOOKBACK
        and num_ranks ** (lookback + 1) <= _MOST_DEFAULT_HISTORIES
    ):
        lookback += 1
    return lookback


def _require_options(lookback: int, shrinkage: float, num_ranks: int) -> None:
    if lookback < 0 or num_ranks**lookback > _MOST_HISTORIES:
        raise UsageError(
            f"--lookback {lookback} needs {num_ranks}^{lookback} rows per layer, and the "
            f"limit is {_MOST_HISTORIES}",
            "choose a smaller number, for example --lookback 2",
        )
    if not 0 < shrinkage < np.inf:
        raise UsageError(
            f"--shrinkage must be positive, got {shrinkage}",
            f"the default is --shrinkage {DEFAULT_SHRINKAGE:g}",
        )
