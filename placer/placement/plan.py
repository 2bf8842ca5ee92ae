"""The plan file: a placement, what it was solved for, and how good it is."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.run.documents import read_json
from placer.run.files import (
    atomic_file,
    sha256_file,
)
from placer.target.engine import (
    Engine,
    ReplicaChoice,
    choose_replicas,
    known_engines,
)

SCHEMA_VERSION = 1
_FIELDS = {
    "schema_version",
    "model",
    "num_ranks",
    "num_nodes",
    "policy",
    "exchange",
    "max_imbalance",
    "physical_to_logical_map",
    "solver",
    "metrics",
    "provenance",
}

Policy = Literal["fixed", "follow"]
#: Policies whose homes a token-shuffle table gives.
ContentPolicy = Literal["token", "request"]
HomePolicy = Policy | ContentPolicy
Exchange = Literal["per-rank", "per-node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A proved bound of one objective, beside the value that the placement reaches.

    Attributes
    ----------
    objective_name
        What ``objective`` counts.
    objective
        The value reached, to be minimised.
    bound
        No placement under the load cap has less.
    gap
        ``(objective - bound) / objective``.
    bound_method
        How the bound was proved.
    """

    objective_name: str
    objective: float
    bound: float
    gap: float
    bound_method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapTrial:
    """What a load cap is worth: quick plans of each half of the profile, their mean.

    Attributes
    ----------
    max_imbalance
        The cap.
    overflow_price
        Copies that a pair above it is worth in other loads.
    objective
        The solver's objective on the half solved on.
    profile_imbalance, heldout_imbalance
        Max/mean rank load, mean over the layers, on that half and on the other.
    predicted_imbalance
        The same on other sequences, of a plan that is solved on the whole profile.
    """

    max_imbalance: float
    overflow_price: float
    objective: float
    profile_imbalance: float
    heldout_imbalance: float
    predicted_imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerCap:
    """The load cap that a robust plan was solved under, and why.

    Attributes
    ----------
    max_imbalance
        The cap on the profile; the plan's own ``max_imbalance`` is what was asked for.
    overflow_price
        Copies that a pair above it is worth in other loads.
    predicted_imbalance
        What other sequences should see of it.
    holds
        Whether that is no more than what was asked for.
    trials
        The caps, and prices under the tightest, that it was chosen from.
    """

    max_imbalance: float
    overflow_price: float
    predicted_imbalance: float
    holds: bool
    trials: tuple[CapTrial, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` wrote."""
        trials = tuple(CapTrial(**one) for one in value["trials"])
        return cls(**dict(value) | {"trials": trials})


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverReport:
    """How good a placement is, and what proves it.

    Attributes
    ----------
    status
        ``optimal`` (the bound is reached), ``feasible``, or ``imported``: not solved.
    objective_name
        What ``objective`` counts.
    objective
        The value reached, to be minimised.
    bound
        A proved lower bound of the objective, or ``None``.
    gap
        ``(objective - bound) / objective``, or ``None``.
    bound_method
        How the bound was proved, or the reason why there is none.
    seconds
        Wall-clock seconds; not written to the plan file, whose bytes depend on the
        input and the seed alone.
    seed
        Seed of the search.
    reproducible
        Whether the same input and seed give the same plan.
    relaxed_layers
        MoE layers whose load cap was out of reach and relaxed, with the value reached.
    relaxed_receive_layers
        The same of the cap on received copies.
    eplb_caps
        ``[L]``: caps on max/mean rank load, where they are those of EPLB with as many slots
        on the profile, or the load cap where that is lower; else ``None``.
    above_eplb_layers
        MoE layers that were not brought under such a cap, with the value reached.
    most_received_copies
        R x the copies that the busiest rank receives per token of the profile (or of its
        sample, ``RefineLimits.num_tokens``), in the worst layer, homes of ``fixed`` being
        even; ``None`` where copies are not what was minimised.
    pairs
        Certificate of the pair objective, which stands in for traffic; ``None`` where it
        is the objective itself, or replicas void it.
    inner_cap
        With ``--robust`` the load cap that was chosen to solve under, which the bound is
        of; else ``None``.
    predicted_imbalance
        The imbalance to expect of the profile where copies serve tokens whose homes are
        drawn, mean over MoE layers; only where balance is the objective, from loads alone.
    imbalance_without_groups
        What the objective would be if router groups were split, where balancing keeps them
        whole; else ``None``.
    """

    status: Literal["optimal", "feasible", "imported"]
    objective_name: str
    objective: float
    bound: float | None
    gap: float | None
    bound_method: str
    seconds: float | None
    seed: int
    reproducible: bool = True
    relaxed_layers: Mapping[str, float] = field(default_factory=dict)
    relaxed_receive_layers: Mapping[str, float] = field(default_factory=dict)
    eplb_caps: tuple[float, ...] | None = None
    above_eplb_layers: Mapping[str, float] = field(default_factory=dict)
    most_received_copies: float | None = None
    pairs: Certificate | None = None
    inner_cap: InnerCap | None = None
    predicted_imbalance: float | None = None
    imbalance_without_groups: float | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` wrote."""
        pairs, inner_cap = value["pairs"], value.get("inner_cap")
        eplb_caps = value.get("eplb_caps")
        read = {
            "eplb_caps": eplb_caps and tuple(eplb_caps),
            "pairs": pairs and Certificate(**pairs),
            "inner_cap": inner_cap and InnerCap.from_json(inner_cap),
        }
        return cls(**dict(value) | read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A solved placement, as ``plan.json`` holds it.

    Attributes
    ----------
    model
        The model that it is for.
    placement
        Experts in slots.
    policy, exchange
        The home policy and the exchange that it was solved for.
    max_imbalance
        The cap on max/mean rank load that was asked for.
    solver
        Objective, bound and gap.
    metrics
        ``profile``, ``heldout`` and ``baselines``, with the keys of ``placer simulate``.
    provenance
        Tool version, hashes of the inputs, options that shaped the result.
    """

    model: ModelSpec
    placement: Placement
    policy: str
    exchange: str
    max_imbalance: float
    solver: SolverReport
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.placement.num_experts != self.model.num_experts:
            raise PlacerError(
                f"the placement has {self.placement.num_experts} experts per layer, "
                f"the model {self.model.num_experts}"
            )

    @property
    def policy_without_table(self) -> str:
        """The policy, or ``fixed`` where its homes come from a table of their own file."""
        return "fixed" if self.policy in get_args(ContentPolicy) else self.policy

    @property
    def recorded_choice(self) -> ReplicaChoice | None:
        """The replica choice that the plan was solved for, if it says so."""
        recorded: ReplicaChoice | None = self.provenance.get("replica_choice")
        return recorded

    @property
    def replica_choice(self) -> ReplicaChoice | None:
        """Which copy serves, as the plan was solved for; ``None`` where experts have one.

        Raises
        ------
        UsageError
            If the plan has redundant experts and does not say.
        """
        placed = self.placement
        return self.choose_replicas(
            None,
            None,
            f"placer solve TRACE --start PLAN --nodes {placed.num_nodes} --gpus-per-node "
            f"{placed.ranks_per_node} --redundant-experts {placed.redundant_experts} "
            "--out NEW",
        )

    def choose_replicas(
        self, engine: Engine | None, wanted: str | None, command: str
    ) -> ReplicaChoice | None:
        """Return the choice that a user names, else the engine's, else the plan's own.

        Parameters
        ----------
        engine, wanted, command
            As :func:`placer.target.engine.choose_replicas` takes them.

        Raises
        ------
        UsageError
            As that function does.
        """
        own = None if engine is not None else self.recorded_choice
        return choose_replicas(
            engine,
            wanted or own,
            has_replicas=self.placement.has_replicas,
            command=command,
        )

    @property
    def engine(self) -> Engine | None:
        """The engine that it was solved for; ``None`` without one that is still listed."""
        return known_engines().get(self.provenance.get("engine") or "")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``plan.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "num_ranks": self.placement.num_ranks,
            "num_nodes": self.placement.num_nodes,
            "policy": self.policy,
            "exchange": self.exchange,
            "max_imbalance": self.max_imbalance,
            "physical_to_logical_map": self.placement.to_json(),
            "solver": asdict(self.solver) | {"seconds": None},
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }

    def write(self, path: Path) -> None:
        """Write ``plan.json``: the same plan gives the same bytes."""
        with atomic_file(path) as temporary:
            temporary.write_text(_layered_json(self.to_json()), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``plan.json``.

        Raises
        ------
        PlacerError
            If it is no plan, of another schema version, or its map is invalid.
        """
        value = read_json(path, "plan")
        if "physical_to_logical_map" not in value:
            raise PlacerError(
                f"{path} is no plan: it has no physical_to_logical_map",
                "write one: placer solve TRACE --gpus-per-node M --out PLAN",
            )
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlacerError(
                f"{path} has schema_version {version}, this placer reads {SCHEMA_VERSION}",
                "install the placer that wrote it, or solve again",
            )
        again = f"write it anew: placer solve TRACE --gpus-per-node M --out {path}"
        if set(value) != _FIELDS:
            odd = ", ".join(sorted(set(value) ^ _FIELDS))
            raise PlacerError(f"{path} has missing or unknown fields: {odd}", again)
        try:
            model = ModelSpec.from_json(value["model"])
            return cls(
                model=model,
                placement=Placement.from_json(
                    value["physical_to_logical_map"],
                    model.num_experts,
                    value["num_ranks"],
                    value["num_nodes"],
                ),
                policy=value["policy"],
                exchange=value["exchange"],
                max_imbalance=value["max_imbalance"],
                solver=SolverReport.from_json(value["solver"]),
                metrics=value["metrics"],
                provenance=value["provenance"],
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise PlacerError(f"{path} is damaged: {error}", again) from error
        except PlacerError as error:
            raise PlacerError(f"{path}: {error}", error.hint or again) from error


def plan_sha256(path: Path) -> str:
    """Return the SHA-256 of a plan file, which binds tables and checkpoints to it."""
    return sha256_file(path)


def _layered_json(value: Mapping[str, Any]) -> str:
    """Format with one line per layer of the map, so that plans can be read and diffed."""
    rows = value["physical_to_logical_map"]
    text = json.dumps(dict(value) | {"physical_to_logical_map": None}, indent=1)
    lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
    # A line that begins so is at the top level: inside a text a line break is escaped.
    key = '\n "physical_to_logical_map": '
    return text.replace(f"{key}null", f"{key}[\n{lines}\n ]") + "\n"
