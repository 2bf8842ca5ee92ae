"""Improving homes and placement in turn, for policies with homes from a table.

The homes that suit tokens (``token``) or whole requests (``request``) depend on where the
experts are, and the other way round: so one is improved for the other, in turn, as in the
co-clustering of Sem-MoE (arXiv 2503.04398v5, algorithm 1). A table is sure of what it was
built from, so every sequence is judged by the table of other sequences (cross-fitting).

Legend of the shapes: L MoE layers, T tokens, E logical experts, R ranks.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from placer.arrays import BoolArray, FloatArray, Int16Array, IntArray
from placer.errors import PlacerError
from placer.placement.placement import Placement
from placer.placement.policy import ContentPolicy
from placer.run.deadline import Deadline
from placer.serving.homes import fixed_homes
from placer.serving.replica_choice import serving_layers
from placer.solver.balance.requests import place_requests
from placer.solver.caps import Caps
from placer.solver.params import SolverParams
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.caution import Caution, kept_under_cap
from placer.solver.search.evaluation import Evaluation, Rated
from placer.solver.search.evaluator import evaluate
from placer.solver.search.refine import refined, repaired
from placer.table.build import build_table
from placer.table.homes import TableHomes
from placer.table.lookup import known_ids, request_homes
from placer.table.requests import request_scores
from placer.table.table import Table
from placer.target.engine import SolvableReplicaChoice
from placer.trace import Chunk

Homes = tuple[IntArray, ...]


def vocabulary_of(tokens: Chunk, policy: str) -> int:
    """Return how many token ids a table of these tokens needs rows for.

    Raises
    ------
    PlacerError
        If no token has an id.
    """
    if tokens.token_ids is None or tokens.token_ids.max(initial=-1) < 0:
        raise PlacerError(
            f"the profile has no token ids: the homes of --policy {policy} come from a "
            "table of token ids",
            "use a trace with token ids, as placer record writes, or solve for --policy "
            "follow",
        )
    return int(tokens.token_ids.max()) + 1


def table_for(
    placement: Placement,
    tokens: Chunk,
    vocab_size: int,
    caps: Caps,
    *,
    replica_choice: SolvableReplicaChoice | None,
    layer_ids: tuple[int, ...] | None,
    deadline: Deadline | None = None,
) -> Table:
    """Build the table of a placement's homes, which keeps the cap on homes.

    Parameters and errors are those of :func:`placer.table.build.build_table`.
    """
    return build_table(
        placement,
        tokens,
        vocab_size=vocab_size,
        max_home_imbalance=caps.max_home_imbalance,
        replica_choice=replica_choice,
        layer_ids=layer_ids,
        deadline=deadline,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Alternation:
    """Improves a placement for the homes that its table gives.

    Attributes
    ----------
    traffic
        What is minimised, for whatever homes.
    tokens
        The tokens of ``traffic``, with ids.
    policy
        ``token`` or ``request``.
    vocab_size
        Above every token id.
    params
        How long to refine, all rounds together.
    seed
        Seed of the parts and of the refinements.
    caps
        That on homes holds for a ``token`` table.
    caution
        ``[L]``: of the first round, where there are replicas; ``None``: none.
    """

    traffic: TrafficProblem
    tokens: Chunk
    policy: ContentPolicy
    vocab_size: int
    params: SolverParams
    seed: int = 0
    caps: Caps = field(default_factory=Caps)
    caution: FloatArray | None = None

    def run(
        self,
        placement: Placement,
        progress: Callable[[int, float], None] | None = None,
        deadline: Deadline | None = None,
    ) -> Rated:
        """Return the best placement of all rounds, the given one included.

        The best by all that ``traffic`` prices less what pairs served at home are worth,
        under the load cap where one is. ``progress`` gets the round and the price of its
        copies (see :meth:`price`).
        """
        deadline = deadline or Deadline()
        began = time.monotonic()
        given = self.rated(placement)
        deadline.needs(2 * (time.monotonic() - began))
        rounds = self._careful_rounds if placement.has_replicas else self._rounds
        best = given
        share = self.params.share_of_repair if placement.has_replicas else 0.0
        with deadline.interruptible(), deadline.keeping(share):
            for number, best in enumerate(rounds(given, deadline)):
                if progress is not None:
                    progress(number, best.cost.copies)
        return self._kept_under_cap(best, deadline)

    def _rounds(self, given: Rated, deadline: Deadline) -> Iterator[Rated]:
        """Yield the best so far after each round."""
        best = found = given
        for number in range(self.params.num_alternations):
            if deadline.passed():
                return
            found = self.rated(self._refined(found, None, number, deadline))
            if found.cost.is_better(best.cost):
                best = found
            yield best

    def _careful_rounds(self, given: Rated, deadline: Deadline) -> Iterator[Rated]:
        """Yield the same with replicas, under a cap on load that depends on the homes.

        Each layer keeps its best round, and gets as little caution as it needs.
        """
        none = np.zeros(given.placement.num_layers)
        caution = Caution.of_share(none if self.caution is None else self.caution)
        best = given
        for number in range(self.params.num_alternations):
            if deadline.passed():
                return
            found = self.rated(self._refined(best, caution.share, number, deadline))
            caution = caution.adapted(found.cost, self.params.least_caution)
            mixed = self._mixed(best, found)
            if mixed.cost.is_better(best.cost):
                best = mixed
            yield best

    def mixture(self, one: Rated, other: Rated, deadline: Deadline) -> Rated:
        """Take each layer from the placement where it costs less; return the cost.

        A table's homes follow the experts of past layers whatever their ranks are called,
        so layers hardly depend on each other.
        """
        return self._kept_under_cap(self._mixed(one, other), deadline)

    def _mixed(self, one: Rated, other: Rated) -> Rated:
        maps = zip(
            other.cost.better_layers(one.cost),
            one.placement.physical_to_logical_map,
            other.placement.physical_to_logical_map,
            strict=True,
        )
        chosen = tuple(theirs if better else ours for better, ours, theirs in maps)
        return self.rated(replace(one.placement, physical_to_logical_map=chosen))

    def _kept_under_cap(self, found: Rated, deadline: Deadline) -> Rated:
        """Repair a placement with replicas until its own homes keep it under the cap."""
        if not found.placement.has_replicas:
            return found

        def nearer(found: Rated, layers: BoolArray, share: float, number: int) -> Rated:
            problem = self._given(found.homes)
            problem = replace(problem, caution=np.full(len(layers), share))
            placement, params = found.placement, self.params
            after = self.rated(
                repaired(placement, problem, params, layers, seed=number, deadline=deadline)
            )
            is_mixed = (found.cost.better_layers(after.cost) & layers).any()
            return self._mixed(found, after) if is_mixed else after

        return kept_under_cap(found, nearer, self.params, deadline)

    def rated(self, placement: Placement) -> Rated:
        """Return the cost of a placement with homes from its own tables."""
        homes = self.table_homes(placement)
        return Rated(
            placement=placement, homes=homes, cost=self._evaluate(placement, homes)
        )

    def price(self, placement: Placement) -> float:
        """Return the price of the copies per token and layer, from the homes of tables."""
        return self.rated(placement).cost.copies

    def _evaluate(self, placement: Placement, homes: Homes) -> Evaluation:
        """Return what a placement costs from these homes."""
        given = self._with_served_pairs(self._given(homes), homes)
        return evaluate(given, placement)

    def table_homes(self, placement: Placement) -> Homes:
        """Return L arrays ``[T]``: homes by the tables of other sequences."""
        part_of_token = sequence_parts(self.tokens, self.params.num_parts, self.seed)
        num_parts = int(part_of_token.max()) + 1
        homes = np.zeros((placement.num_layers, self.tokens.num_tokens), dtype=np.int64)
        for part in range(num_parts):
            inside = part_of_token == part
            others = self.tokens.select(~inside if num_parts > 1 else inside)
            judged = self.tokens.select(inside)
            if self.policy == "request":
                homes[:, inside] = self._sent(placement, others, judged)
            else:
                homes[:, inside] = self._looked_up(placement, others, judged)
        return tuple(homes)

    def _sent(self, placement: Placement, others: Chunk, judged: Chunk) -> IntArray:
        """Return ``[T]``: the homes of whole requests by the scores of other ones."""
        known, ids = (
            known_ids(one.token_ids, one.num_tokens, self.vocab_size)
            for one in (others, judged)
        )
        scores = request_scores(placement, others, known, self.vocab_size)
        once: IntArray = request_homes(
            scores.astype(np.float16), judged.sequence_ids, ids, placement.num_ranks
        )
        return once

    def _looked_up(self, placement: Placement, others: Chunk, judged: Chunk) -> IntArray:
        """Return ``[L, T]``: the homes of tokens by the table of other ones."""
        table = table_for(
            placement,
            others,
            self.vocab_size,
            self.caps,
            replica_choice=self.traffic.replica_choice,
            layer_ids=self.traffic.layer_ids,
        )
        fixed = fixed_homes(judged.sequence_ids, placement.num_ranks)
        homes = TableHomes(table, judged.token_ids, fixed)
        found = np.empty((placement.num_layers, judged.num_tokens), dtype=np.int64)
        layers = serving_layers(
            placement, self.traffic.replica_choice, self.traffic.layer_ids
        )
        for layer, serving in enumerate(layers):
            home = homes.plain(layer).home
            experts = np.ascontiguousarray(judged.experts[layer].T)
            homes.served(serving.ranks(experts, home), experts)
            found[layer] = home
        return found

    def _refined(
        self, found: Rated, caution: FloatArray | None, number: int, deadline: Deadline
    ) -> Placement:
        """Improve a placement for its homes."""
        homes = found.homes
        if self.policy == "request":
            homes = request_clusters(
                found.placement, self.tokens, self.params.request_imbalance
            )
        sweeps = -(-self.params.num_sweeps // self.params.num_alternations)
        return refined(
            found.placement,
            replace(self._given(homes), caution=caution),
            replace(
                self.params,
                num_sweeps=sweeps,
                num_visited_tokens=self.params.num_visited_tokens
                // self.params.num_alternations,
            ),
            seed=self.seed + number,
            deadline=deadline,
        )

    def _given(self, homes: Homes) -> TrafficProblem:
        return replace(self.traffic, policy="given", homes=homes)

    def _with_served_pairs(self, given: TrafficProblem, homes: Homes) -> TrafficProblem:
        """Return the problem in which an expert is worth more where it serves at home."""
        num_ranks = given.topology.num_ranks
        served = tuple(
            -self.params.served_price * pairs_of_homes(ids, home, load.shape[1], num_ranks)
            for ids, home, load in zip(given.experts, homes, given.load, strict=True)
        )
        if given.move_price is not None:
            both = zip(given.move_price, served, strict=True)
            served = tuple(one + two for one, two in both)
        return replace(given, move_price=served)


def pairs_of_homes(
    experts: Int16Array, home: IntArray, num_experts: int, num_ranks: int
) -> FloatArray:
    """Return ``[E, R]``: how often tokens ``[T]`` of each home use each expert.

    ``experts`` is ``[T, k]``.
    """
    pair = experts.astype(np.int64) * num_ranks + home[:, None]
    counts = np.bincount(pair.ravel(), minlength=num_experts * num_ranks)
    return counts.reshape(num_experts, num_ranks).astype(np.float64)


def sequence_parts(tokens: Chunk, num_parts: int, seed: int) -> IntArray:
    """Return ``[T]`` int64: the part of each token's sequence, drawn at random."""
    ids, sequence = np.unique(tokens.sequence_ids, return_inverse=True)
    part: IntArray = np.random.default_rng(seed).permutation(len(ids)) % num_parts
    return part[sequence]


def request_clusters(placement: Placement, tokens: Chunk, max_imbalance: float) -> Homes:
    """Return L equal arrays ``[T]``: for each sequence the rank that serves most of it.

    What serving cannot know: it says which requests the placement should serve where.
    """
    _, request = np.unique(tokens.sequence_ids, return_inverse=True)
    num_requests = int(request.max()) + 1
    counts, served = [], np.zeros((num_requests, placement.num_ranks))
    for layer, ids in enumerate(tokens.experts):
        used = np.zeros((num_requests, placement.num_experts[layer]))
        np.add.at(used, (request[:, None], ids.astype(np.int64)), 1.0)
        served += used @ placement.holds(layer)
        counts.append(used)
    # All requests are much alike, far more than their shares differ between ranks.
    rank = place_requests(np.hstack(counts), served, max_imbalance, likeness=0.0)
    return (rank[request],) * placement.num_layers
