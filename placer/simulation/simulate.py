"""Traffic and balance of a placement on recorded tokens, under every home policy."""

from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError
from placer.placement.placement import Placement
from placer.run.deadline import Deadline
from placer.serving.homes import Batches, fixed_homes
from placer.serving.layer_serving import LayerServing, RankArray, majority_rank
from placer.serving.replica_choice import Server
from placer.simulation.metrics import PolicyMetrics, PolicyTally
from placer.table.homes import TableHomes
from placer.table.lookup import request_homes
from placer.table.table import Table
from placer.target.engine import ReplicaChoice
from placer.trace import Routing

#: Tokens of the batches that the metrics of home policies are defined by.
DEFAULT_BATCH_SIZE = 4096


class ServingOptions(TypedDict, total=False):
    """How recorded tokens are served.

    Attributes
    ----------
    batch_size
        Tokens of one forward pass of all ranks; 4,096, by which ``straggler_mean`` and
        ``bottleneck_rank_copies_per_token`` are defined.
    table
        The placement's token-shuffle table, for the policies ``token``, ``token_equal``
        and ``request``; ``None``.
    replica_choice
        Which replica of an expert serves (:mod:`placer.serving.replica_choice`);
        ``None``, which will do where each expert has one replica.
    layer_ids
        The model's own layer number of each MoE layer, which ``sglang-static`` depends
        on; ``None``: no layer is dense.
    deadline
        When all must be counted, or ``OutOfTimeError`` is raised; ``None``.
    """

    batch_size: int
    table: Table | None
    replica_choice: ReplicaChoice | None
    layer_ids: tuple[int, ...] | None
    deadline: Deadline | None


def simulate(
    placement: Placement, tokens: Routing, **options: Unpack[ServingOptions]
) -> dict[str, PolicyMetrics]:
    """Serve recorded tokens from a placement and count what crosses the wire.

    Parameters
    ----------
    placement
        Experts in slots.
    tokens
        Whole sequences. Homes of ``fixed`` follow their order in these tokens.
    **options
        See :class:`ServingOptions`.

    Returns
    -------
    dict
        Metrics by home policy: ``fixed``, ``follow`` and ``oracle`` (the home that serves
        most of the token's experts in that very layer: the highest local activation rate
        that any policy can reach), with a table also ``token``, ``token_equal`` and
        ``request``, with a combined rule in it ``token_combined`` and
        ``token_equal_combined``.

    Raises
    ------
    PlacerError
        If the tokens or the table do not fit the placement, or there is no token.
    UsageError
        If ``batch_size`` is not positive.
    """
    tallies = count(placement, tokens, **options)
    return {policy: tally.metrics() for policy, tally in tallies.items()}


def count(
    placement: Placement, tokens: Routing, **options: Unpack[ServingOptions]
) -> dict[str, PolicyTally]:
    """Return the counts of :func:`simulate`, which documents parameters and errors."""
    table = options.get("table")
    _require_fitting(placement, tokens, table)
    batches = Batches.of(tokens.sequence_ids, options.get("batch_size", DEFAULT_BATCH_SIZE))
    fixed = fixed_homes(tokens.sequence_ids, placement.num_ranks)
    server = Server(
        placement,
        options.get("replica_choice"),
        batches,
        options.get("layer_ids"),
    )
    content = _ContentPolicies(server, fixed)
    shuffled = None if table is None else _TablePolicies(content, tokens, table)
    paced = (options.get("deadline") or Deadline()).paced(
        server.layers(), placement.num_layers
    )
    for layer, serving in enumerate(paced):
        ids = tokens.experts[layer]
        _require_known(ids, layer, placement.num_experts[layer])
        experts = np.ascontiguousarray(ids.T)
        del ids
        content.add(serving, experts)
        if shuffled is not None:
            shuffled.add(layer, serving, experts)
    return content.tallies | ({} if shuffled is None else shuffled.tallies)


class _ContentPolicies:
    """``fixed``, ``follow`` and ``oracle``: homes that need no table."""

    def __init__(self, server: Server, fixed: RankArray) -> None:
        self.server = server
        self.fixed = fixed
        self.tallies = {name: self.new_tally() for name in ("fixed", "follow", "oracle")}
        self._follow = fixed

    def new_tally(self) -> PolicyTally:
        """Return an empty tally of this placement."""
        return PolicyTally(
            num_ranks=self.server.placement.num_ranks,
            ranks_per_node=self.server.placement.ranks_per_node,
            batches=self.server.batches,
        )

    def add(self, serving: LayerServing, experts: npt.NDArray[np.generic]) -> None:
        """Count one layer; ``experts`` is ``[k, T]``."""
        serve = self.server.ranks
        self.tallies["fixed"].add(serve(serving, experts, self.fixed), self.fixed)
        ranks = serve(serving, experts, self._follow)
        following = majority_rank(ranks)
        self.tallies["follow"].add(ranks, self._follow, combine_home=following)
        best = serving.most_held_rank(experts, following)
        self.tallies["oracle"].add(serve(serving, experts, best), best)
        self._follow = following


class _TablePolicies:
    """``token``, ``token_equal``, ``request`` and the combined rule: homes of a table."""

    def __init__(self, content: _ContentPolicies, tokens: Routing, table: Table) -> None:
        num_ranks = content.server.placement.num_ranks
        self._server = content.server
        self._homes = TableHomes(table, tokens.token_ids, content.fixed)
        self._request = request_homes(
            table.request_score, tokens.sequence_ids, self._homes.ids, num_ranks
        ).astype(content.fixed.dtype)
        names = ["token", "token_equal", "request"]
        if table.combined is not None:
            names += ["token_combined", "token_equal_combined"]
        self.tallies = {name: content.new_tally() for name in names}

    def add(
        self, layer: int, serving: LayerServing, experts: npt.NDArray[np.generic]
    ) -> None:
        """Count one layer; ``experts`` is ``[k, T]``."""
        serve = self._server.ranks
        batches = self._server.batches
        plain = self._homes.plain(layer)
        others = {"token_equal": plain.equal(batches), "request": self._request}
        if "token_combined" in self.tallies:
            combined = self._homes.best(layer)
            others["token_combined"] = combined.home
            others["token_equal_combined"] = combined.equal(batches)
        ranks = serve(serving, experts, plain.home)
        self._homes.served(ranks, experts)
        self.tallies["token"].add(ranks, plain.home)
        for name, home in others.items():
            self.tallies[name].add(serve(serving, experts, home), home)


def _require_fitting(placement: Placement, tokens: Routing, table: Table | None) -> None:
    if len(tokens.experts) != placement.num_layers:
        raise PlacerError(
            f"{len(tokens.experts)} MoE layers were recorded, but the plan places "
            f"{placement.num_layers}",
            "simulate a trace of the plan's model: placer inspect PLAN",
        )
    if tokens.num_tokens == 0:
        raise PlacerError(
            "no token is left to simulate",
            "choose another --fold or --phase, or record more text",
        )
    if table is None:
        return
    for name, theirs, ours in (
        ("ranks", table.num_ranks, placement.num_ranks),
        ("MoE layers", table.model.num_layers, placement.num_layers),
    ):
        if theirs != ours:
            raise PlacerError(
                f"the table is for {theirs} {name}, the plan has {ours}",
                "write the plan's own table: placer tables PLAN TRACE --out TABLE",
            )


def _require_known(ids: npt.NDArray[np.generic], layer: int, num_experts: int) -> None:
    if ids.min() < 0 or ids.max() >= num_experts:
        raise PlacerError(
            f"MoE layer {layer}: expert id {ids.max()} is outside 0..{num_experts - 1}",
            "simulate a trace of the plan's model: placer inspect PLAN",
        )
