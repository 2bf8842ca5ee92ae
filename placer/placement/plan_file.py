"""What ``plan.json`` holds, field by field."""

from typing import Annotated, Any, Literal

import msgspec

from placer.model import ModelSpec
from placer.placement.policy import HomePolicy
from placer.placement.solver_report import SolverReport
from placer.run.documents import Count, Document, ExpertId, NumRanks, Sha256
from placer.run.seals import unsealed
from placer.target.engine import Exchange, ReplicaChoice

_Figure = Annotated[float, msgspec.Meta(ge=0)]


class Figures(Document, frozen=True, kw_only=True):
    """What ``placer simulate`` measures of a placement under one policy."""

    local_activation_rate: _Figure
    remote_pairs_per_token: _Figure
    remote_rank_copies_per_token: _Figure
    combine_rank_copies_per_token: _Figure
    crossing_rank_copies_per_token: _Figure
    remote_node_copies_per_token: _Figure
    load_imbalance_mean: _Figure
    load_imbalance_max: _Figure
    straggler_mean: _Figure
    bottleneck_rank_copies_per_token: _Figure
    home_imbalance_max: _Figure


_ByPolicy = dict[str, Figures]


class Metrics(Document, frozen=True, kw_only=True):
    """Figures on the profile, on held-out sequences, and of other placements."""

    profile: _ByPolicy | None
    heldout: _ByPolicy | None
    baselines: dict[str, _ByPolicy]
    prices: dict[str, _Figure] | msgspec.UnsetType = msgspec.UNSET


class LinkCosts(Document, frozen=True, kw_only=True):
    """The matrix of ``--topology``, between the ranks of the plan, and its file's hash."""

    sha256: Sha256
    cost: list[list[Count]]


class Groups(Document, frozen=True, kw_only=True):
    """Where the expert-parallel groups are in the world (``--ep-size``)."""

    world_size: NumRanks
    tensor_parallel_size: NumRanks
    ep_size: NumRanks
    ep_groups: str
    groups: list[list[Count]]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a plan comes from: the facts that commands act on."""

    placer: str | None = None
    engine: str | None = None
    replica_choice: ReplicaChoice | None = None
    objective: Literal["balance", "traffic", "time"] | None = None
    robust: Literal["none", "bootstrap", "domains"] | None = None
    relax_cap: bool = False
    max_imbalance_given: bool = True
    max_home_imbalance: _Figure | None = None
    max_received_copies: _Figure | None = None
    inter_cost: Count | None = None
    intra_cost: Count | None = None
    topology: LinkCosts | None = None
    layout: Groups | None = None
    pins: list[Annotated[str, msgspec.Meta(pattern="^[0-9]+:[0-9]+=[0-9]+$")]] = (
        msgspec.field(default_factory=list)
    )
    trace_sha256: Sha256 | None = None
    affinity_sha256: Sha256 | None = None
    traces_sha256: list[Sha256] | None = None
    fold: str | None = None
    phase: Literal["prefill", "decode"] | None = None
    profile_sequences: Count | None = None
    moved_experts: Count | None = None


class PlanFile(Document, frozen=True, kw_only=True):
    """The JSON object of ``plan.json``; see ``docs/formats.md``."""

    schema_version: Literal[2]
    model: ModelSpec
    num_ranks: NumRanks
    num_nodes: NumRanks
    policy: HomePolicy
    exchange: Exchange
    max_imbalance: Annotated[float, msgspec.Meta(ge=1)]
    physical_to_logical_map: list[list[ExpertId]]
    solver: SolverReport
    metrics: Metrics
    provenance: Provenance
    sha256: Sha256 | None


# Fields that the report of the solver gained while the schema was version 1.
_LATER_FIELDS: dict[str, Any] = {
    "eplb_caps": None,
    "above_eplb_layers": {},
    "predicted_imbalance": None,
    "imbalance_without_groups": None,
}


def upgraded_plan(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of schema version 2 from the fields of version 1.

    Version 1 does not say whether the clock or Ctrl-C stopped a search. Its first plans
    lack what reports gained later.
    """
    solver = _LATER_FIELDS | value["solver"]
    ended = "step_limit" if solver["reproducible"] else "time_limit"
    if solver["status"] == "optimal":
        ended = "proved"
    return unsealed(value) | {"solver": solver | {"termination": ended}}
