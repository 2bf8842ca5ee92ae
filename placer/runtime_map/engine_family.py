"""Families of engines: the start command for a plan, and options that make it stale.

Families are data: ``placer/runtime_map/engine_families.toml``, each with where it was read.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from placer.run.documents import Document, read_data
from placer.target.engine import (
    Engine,
    Exchange,
    ReplicaChoice,
    engines_named,
    known_engines,
)
from placer.trace.selection import Selection

if TYPE_CHECKING:
    from placer.placement.plan import Plan

_Text = TypeVar("_Text", "Conditional", "StaleFlag")

_GPUS_OF_A_HOST = 8
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is served, and on which ranks.

    Attributes
    ----------
    model
        The checkpoint's directory.
    map
        The runtime map, or ``None`` where the checkpoint itself is permuted.
    num_ranks, num_nodes
        Of the plan.
    redundant_experts
        Redundant experts per layer.
    exchange
        What the plan lowers, or ``None`` where it lowers nothing that is sent.
    replica_choice
        Which replica serves, by the plan; ``None`` where it does not say.
    """

    model: str
    map: str | None = None
    num_ranks: int
    num_nodes: int
    redundant_experts: int = 0
    exchange: Exchange | None = None
    replica_choice: ReplicaChoice | None = None

    @classmethod
    def of(cls, plan: "Plan", model: str, map_path: str | None) -> Self:
        """Return what is served of a plan."""
        placement = plan.placement
        exchange: Any = None
        if plan.engine is not None:
            exchange = plan.engine.dispatch.exchange
        elif plan.solver.most_received_copies is not None:
            exchange = plan.exchange
        return cls(
            model=model,
            map=map_path,
            num_ranks=placement.num_ranks,
            num_nodes=placement.num_nodes,
            redundant_experts=placement.redundant_experts,
            exchange=exchange,
            replica_choice=plan.recorded_choice if placement.has_replicas else None,
        )

    def runs(self, engine: Engine) -> bool:
        """Return whether the engine runs on these ranks."""
        return engine.misfit(self.num_nodes, self.num_ranks // self.num_nodes) is None

    def fits(self, engine: Engine) -> bool:
        """Return whether the engine runs on these ranks and sends what the plan reduces."""
        if not self.runs(engine):
            return False
        sent = {self.exchange, engine.dispatch.exchange}
        one_node = self.num_nodes == 1 and sent == {"per-rank", "per-node"}
        return self.exchange is None or len(sent) == 1 or one_node

    def meets(self, need: str, engine: Engine | None) -> bool:
        """Return whether one of the needs of the data file holds."""
        holds = {
            "map": self.map is not None,
            "checkpoint": self.map is None,
            "redundant": self.redundant_experts > 0,
            "nodes": self.num_nodes > 1,
            "rack": self.num_ranks // self.num_nodes > _GPUS_OF_A_HOST,
        }
        if need in holds:
            return holds[need]
        if engine is None:
            return False
        drawn = self.replica_choice if self.drawn_by(engine) else engine.replica_choice
        return need in (engine.name, drawn)

    def drawn_by(self, engine: Engine) -> bool:
        """Return whether an option of the engine sets the plan's replica choice."""
        family = engines_named(engine.family)
        return self.replica_choice in {one.replica_choice for one in family}

    def fill(self, text: str) -> str:
        """Return a text of the data file with the figures of this deployment."""
        values = {
            "model": self.model,
            "map": self.map or "",
            "map_json": json.dumps(self.map, ensure_ascii=False),
            "ranks": self.num_ranks,
            "nodes": self.num_nodes,
            "ranks_per_node": self.num_ranks // self.num_nodes,
            "redundant_experts": self.redundant_experts,
        }
        return _PLACE.sub(lambda found: str(values[found[1]]), text)


class Conditional(Document, frozen=True, kw_only=True):
    """A text that is used if all its needs are met."""

    text: str
    needs: tuple[str, ...] = ()


class StaleFlag(Document, frozen=True, kw_only=True):
    """An option with which the engine leaves the plan, and why, if all needs are met."""

    flag: str
    why: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How an engine is started.

    Attributes
    ----------
    engine
        The family's title.
    command
        A shell command; words in capitals are for the user to fill in.
    conditions
        Other conditions, one sentence each.
    stale
        Options that make the plan stale, each with the reason.
    """

    engine: str
    command: str
    conditions: tuple[str, ...]
    stale: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "engine": self.engine,
            "command": self.command,
            "conditions": list(self.conditions),
            "stale": dict(self.stale),
        }

    def lines(self) -> Iterator[str]:
        """Yield what a person reads, one line each."""
        yield f"start {self.engine}: {self.command}"
        yield from (f"  note: {text}" for text in self.conditions)
        yield from (f"  do not use {flag}: {why}" for flag, why in self.stale.items())


class EngineFamily(Document, frozen=True, kw_only=True):
    """A family of engines; the fields are those of the data file."""

    name: str
    title: str
    targets: tuple[str, ...]
    read_in: str
    command: str
    default: str | None = None
    launcher: str = ""
    tail: str = ""
    flags: tuple[Conditional, ...] = ()
    options: tuple[Conditional, ...] = ()
    conditions: tuple[Conditional, ...] = ()
    stale: tuple[StaleFlag, ...] = ()
    reads_map: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    unsafe_map: dict[str, str] = msgspec.field(default_factory=dict)

    def no_map_reason(
        self, model_type: str | None, architectures: Sequence[str] = ()
    ) -> str | None:
        """Return why a map does not serve this model, ``None`` where it does.

        Engines choose by the architectures of ``config.json``; where those are not known,
        the model type is used instead. For an unknown model the result is ``None``.
        """
        if not self.reads_map or model_type is None:
            return None
        if model_type in self.unsafe_map:
            return self.unsafe_map[model_type]
        if architectures:
            reads = not self.reads_map.keys().isdisjoint(architectures)
            name = f"{model_type} ({', '.join(architectures)})"
        else:
            reads = any(model_type in types for types in self.reads_map.values())
            name = model_type
        return None if reads else f"{self.title} ignores a map for {name}"

    def configuration(self, served: Deployment, engine: Engine | None) -> Engine | None:
        """Return the configuration to start; ``None`` of an engine that is not known.

        That is ``engine``, if it is of this family; else the first, beginning with the
        default, that fits what is served; else the first that runs on its ranks.
        """
        if engine is not None and engine.family == self.name:
            return engine
        if self.default is None:
            return None
        every = known_engines()[self.default], *engines_named(self.name)
        running = [one for one in every if served.runs(one)] or every
        return next((one for one in running if served.fits(one)), running[0])

    def start(self, served: Deployment, engine: Engine | None = None) -> Start:
        """Return how the engine is started.

        Parameters
        ----------
        served
            What it serves.
        engine
            What the plan was solved for, or ``None``.
        """
        engine = self.configuration(served, engine)

        def holding(texts: Sequence[_Text]) -> list[_Text]:
            return [
                one
                for one in texts
                if all(served.meets(need, engine) for need in one.needs)
            ]

        flags, before = (engine.flags, engine.environment) if engine else ("", "")
        if served.num_nodes > 1 and self.launcher:
            before = self.launcher.replace("ENVIRONMENT", before)
        texts = [before, self.command, flags]
        texts += [*(one.text for one in holding(self.flags)), self.tail]
        words = [served.fill(word) for text in texts for word in shlex.split(text)]
        command = shlex.join(words)
        stale = {
            one.flag: served.fill(one.why)
            for one in holding(self.stale)
            if one.flag not in command
        }
        if self.options:
            lines = "".join(served.fill(one.text) + "\n" for one in holding(self.options))
            command = f"printf %s {shlex.quote(lines)} > options.yaml && {command}"
        return Start(
            engine=self.title,
            command=command,
            conditions=(
                *_other_exchange(served, engine, self.title),
                *_other_nodes(served, engine),
                *(served.fill(one.text) for one in holding(self.conditions)),
            ),
            stale=stale,
        )


@cache
def known_families() -> Mapping[str, EngineFamily]:
    """Return all families by name, in the order of the data file."""
    return read_data("placer.runtime_map", "engine_families.toml", EngineFamily)


def start_lines(
    target: str, plan: "Plan", model: str, map_path: str | None = None
) -> list[Start]:
    """Return how each engine that serves an export is started.

    Parameters
    ----------
    target
        The target of ``placer export``.
    plan
        What was exported; the family of the engine that it was solved for comes first.
    model, map_path
        The checkpoint to serve, and the map where there is one.
    """
    engine, served = plan.engine, Deployment.of(plan, model, map_path)
    fitting = [one for one in known_families().values() if target in one.targets]
    fitting.sort(key=lambda one: engine is None or one.name != engine.family)
    return [one.start(served, engine) for one in fitting]


def _other_exchange(served: Deployment, engine: Engine | None, title: str) -> Iterator[str]:
    """Say if the engine sends something else than the plan reduces."""
    if served.exchange is None or (engine is not None and served.fits(engine)):
        return
    sends = f"placer does not know what {title} sends"
    if engine is not None:
        ranks = served.num_nodes, served.num_ranks // served.num_nodes
        sends = engine.misfit(*ranks) or f"this engine sends {engine.dispatch.exchange}"
    yield f"the plan is for an engine that sends {served.exchange}, and {sends}"


def _other_nodes(served: Deployment, engine: Engine | None) -> Iterator[str]:
    """Say if the engine's kernels see other nodes than the plan has."""
    ranks_per_node = served.num_ranks // served.num_nodes
    doubt = None if engine is None else engine.doubt(served.num_nodes, ranks_per_node)
    if doubt is not None:
        yield doubt


def other_choice(plan: "Plan", name: str) -> str | None:
    """Return a warning if a family has another replica choice than the plan."""
    served = Deployment.of(plan, "", "")
    engine, asked = (
        known_families()[name].configuration(served, plan.engine),
        served.replica_choice,
    )
    if engine is None or asked in (None, engine.replica_choice):
        return None
    then = "the loads of ranks will differ from the plan's"
    if served.drawn_by(engine):
        then = "start it with exactly this command, which chooses replicas as in the plan"
    return (
        f"the plan was solved for replica choice {asked}, but {engine.name} uses "
        f"{engine.replica_choice}: {then}. To use the engine's replica choice, solve "
        f"again: {solve_again(plan, engine.name)}"
    )


def other_choices(plan: "Plan", engines: Sequence[Engine | None]) -> Iterator[str]:
    """Say which engines are judged by other replicas than a plan counts on."""
    served = Deployment.of(plan, "", "")
    asked, found = served.replica_choice, dict[tuple[str, bool], list[str]]()
    for engine in engines:
        own = None if engine is None else engine.replica_choice
        if engine is not None and None not in (asked, own) and own != asked:
            found.setdefault((str(own), served.drawn_by(engine)), []).append(engine.name)
    for (drawn, is_startable), names in found.items():
        yield (
            f"the plan was solved for --replica-choice {asked}, and the figures of "
            f"{', '.join(names)} are for the engine's own, {drawn}; "
            + (
                f"placer export starts it with {asked}: add --replica-choice {asked}"
                if is_startable
                else f"to use it, solve again: {solve_again(plan, names[0])}"
            )
        )


def solve_again(
    plan: "Plan", engine: str | None = None, *, redundant_experts: int | None = None
) -> str:
    """Return the command that solves a plan again, on its ranks and tokens.

    Parameters
    ----------
    plan
        The plan.
    engine
        Name of another engine; ``None`` for the plan's own.
    redundant_experts
        Redundant experts per layer; ``None`` for as many as the plan has.
    """
    placed, told = plan.placement, plan.provenance
    from_counts = told.get("affinity_sha256") is not None
    name = engine or (None if plan.engine is None else plan.engine.name)
    served_by = "" if name is None else f" --engine {name}"
    tokens = "" if from_counts else Selection.from_json(told).options
    if redundant_experts is None:
        redundant_experts = placed.redundant_experts
    return (
        f"placer solve {'AFFINITY' if from_counts else 'TRACE'}{served_by} --nodes "
        f"{placed.num_nodes} --gpus-per-node {placed.ranks_per_node} "
        f"--redundant-experts {redundant_experts}{tokens and ' '}{tokens} --out NEW"
    )


def without_replicas(engine: str, num_nodes: int, ranks_per_node: int) -> str:
    """Return the command that solves without redundant experts, on these ranks."""
    return (
        f"placer solve TRACE --engine {engine} --redundant-experts 0 --nodes {num_nodes} "
        f"--gpus-per-node {ranks_per_node} --out PLAN"
    )
