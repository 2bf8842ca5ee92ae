"""The plan file: a placement, what it was solved for, and how good it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement.engine_map import require_no_map
from placer.placement.placement import Placement
from placer.placement.plan_file import PlanFile, upgraded_plan
from placer.placement.policy import ContentPolicy
from placer.placement.solver_report import SolverReport
from placer.run.documents import SCHEMA_VERSION, of_this_version, read_json, validated
from placer.run.files import sha256_file
from placer.run.kinds import require_kind
from placer.run.seals import require_seal, sealed
from placer.run.writing import atomic_file
from placer.target.engine import Engine, ReplicaChoice, choose_replicas, known_engines


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
        The requested cap on max/mean rank load.
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
        """The policy, or ``fixed`` if its homes come from a table file."""
        return "fixed" if self.policy in get_args(ContentPolicy) else self.policy

    @property
    def recorded_choice(self) -> ReplicaChoice | None:
        """The replica choice that the plan was solved for, if it says so."""
        recorded: ReplicaChoice | None = self.provenance.get("replica_choice")
        return recorded

    @property
    def replica_choice(self) -> ReplicaChoice | None:
        """The plan's replica choice; ``None`` without replicas.

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
        return sealed(
            {
                "schema_version": SCHEMA_VERSION,
                "model": self.model.to_json(),
                "num_ranks": self.placement.num_ranks,
                "num_nodes": self.placement.num_nodes,
                "policy": self.policy,
                "exchange": self.exchange,
                "max_imbalance": self.max_imbalance,
                "physical_to_logical_map": self.placement.to_json(),
                "solver": self.solver.to_json() | {"seconds": None},
                "metrics": dict(self.metrics),
                "provenance": dict(self.provenance),
            }
        )

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
            If it is not a plan, of another schema version, or its map is invalid.
        """
        require_no_map(path)
        write = "write one: placer solve TRACE --gpus-per-node M --out PLAN"
        require_kind(path, ["plan"], write)
        value = read_json(path, "plan")
        if "physical_to_logical_map" not in value:
            raise PlacerError(
                f"{path} is not a plan: it has no physical_to_logical_map",
                write,
            )
        where = f"plan {path}"
        again = f"write it again: placer solve TRACE --gpus-per-node M --out {path} --force"
        value = of_this_version(value, where, again, upgraded_plan)
        read = validated(value, PlanFile, where, again)
        try:
            plan = cls(
                model=read.model,
                placement=Placement.from_json(
                    read.physical_to_logical_map,
                    read.model.num_experts,
                    read.num_ranks,
                    read.num_nodes,
                ),
                policy=read.policy,
                exchange=read.exchange,
                max_imbalance=read.max_imbalance,
                solver=read.solver,
                metrics=value["metrics"],
                provenance=value["provenance"],
            )
            plan._require_consistent(read)
        except PlacerError as error:
            raise PlacerError(f"{where}: {error}", error.hint or again) from error
        require_seal(value, where, again)
        return plan

    def _require_consistent(self, read: PlanFile) -> None:
        """Refuse fields that contradict each other."""
        for name, figures in (
            ("profile", read.metrics.profile),
            ("heldout", read.metrics.heldout),
        ):
            if figures is not None and self.policy not in figures:
                raise PlacerError(
                    f"policy is {self.policy}, but metrics.{name} has figures of "
                    f"{', '.join(figures) or 'none'}"
                )
        if read.metrics.heldout is not None and read.metrics.profile is None:
            raise PlacerError("metrics has figures in heldout, but none in profile")
        layers = self.placement.num_layers
        for name in ("relaxed_layers", "relaxed_receive_layers", "above_eplb_layers"):
            for layer in getattr(read.solver, name):
                if int(layer) >= layers:
                    raise PlacerError(
                        f"solver.{name} has MoE layer {layer}, the plan has {layers}"
                    )
        layout = read.provenance.layout
        for group in () if layout is None else layout.groups:
            if len(group) != self.placement.num_ranks:
                raise PlacerError(
                    f"provenance.layout has a group of {len(group)} ranks, the plan has "
                    f"{self.placement.num_ranks}"
                )


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
