"""Serving engines: the exchange of an MoE layer, and the replica choice.

Engines are data: ``engines.toml`` next to this file, each with its source. Words and
arithmetic are as in ``docs/concepts.md``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Literal, get_args

from placer.errors import UsageError, one_of
from placer.run.documents import Document, read_data

Exchange = Literal["per-expert", "per-rank", "per-node", "padded", "all-gather"]
ReplicaChoice = Literal["local-first", "sglang-static", "hash", "cover"]
# What the solver can minimise: the copies that it sends, and the choices that it follows.
SolvableExchange = Literal["per-rank", "per-node"]
SolvableReplicaChoice = Literal["local-first", "sglang-static", "hash"]
Element = Literal["bf16", "fp8", "nvfp4"]
GroupRule = Literal["any", "router-groups"]
Phase = Literal["prefill", "decode"]

PHASES: tuple[Phase, ...] = get_args(Phase)
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
REPLICA_CHOICES: tuple[ReplicaChoice, ...] = get_args(ReplicaChoice)
SOLVABLE_EXCHANGES: tuple[SolvableExchange, ...] = get_args(SolvableExchange)
SOLVABLE_REPLICA_CHOICES: tuple[SolvableReplicaChoice, ...] = get_args(
    SolvableReplicaChoice
)

# Elements that share one scale, and the bytes of that scale: DeepEP's fp8 dispatch has a
# float32 per 128 elements; NVFP4 has a float8 per 16 elements of half a byte.
_FP8_BLOCK, _FP8_SCALE_BYTES = 128, 4
_NVFP4_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementEffect:
    """Whether a placement can change what is sent, and the reason."""

    changes_traffic: bool
    reason: str


class Transfer(Document, frozen=True, kw_only=True):
    """One direction of a layer's communication.

    Attributes
    ----------
    exchange
        What is sent for a token.
    element
        What a hidden state travels in.
    """

    exchange: Exchange
    element: Element

    def copy_bytes(self, hidden_size: int) -> int:
        """Return the bytes of one copy of a hidden state, scales included."""
        if self.element == "bf16":
            return 2 * hidden_size
        if self.element == "fp8":
            return hidden_size + _FP8_SCALE_BYTES * -(-hidden_size // _FP8_BLOCK)
        return -(-hidden_size // 2) + -(-hidden_size // _NVFP4_BLOCK)


class Engine(Document, frozen=True, kw_only=True):
    """How an engine serves a MoE layer.

    Attributes
    ----------
    name
        The name that ``--engine`` takes.
    family
        The engine, of which this is one configuration: ``sglang``, ``vllm``, ...
    phases
        What this configuration is run for.
    dispatch, combine
        To the experts, and back.
    replica_choice
        Which replica serves a (token, expert) pair; ``None`` where an engine serves no
        redundant experts.
    map_format
        What ``placer export`` writes for it; ``checkpoint`` where it reads no map.
    group_rule
        ``any``, or ``router-groups`` where a permuted checkpoint must keep the router's
        groups together.
    selected_by
        What leads there, in words.
    flags, environment
        The engine's own options and variables that do, as typed; each may be empty.
    within
        What all ranks must be inside of: a ``node``, or an ``NVLink domain``; empty where
        any ranks will do.
    topologies
        The pairs of nodes and ranks per node that it runs on; empty where all are taken.
    ranks_of_node
        Ranks in a row that its kernels take for one node, even if nodes have more or fewer;
        0 where they take those of a node.
    source
        Public documentation.
    read_in
        Where the facts were read.
    notes
        Conditions, one sentence each.
    """

    name: str
    family: str
    phases: tuple[Phase, ...]
    dispatch: Transfer
    combine: Transfer
    map_format: str
    group_rule: GroupRule
    selected_by: str
    source: str
    read_in: str
    replica_choice: ReplicaChoice | None = None
    flags: str = ""
    environment: str = ""
    within: Literal["", "node", "NVLink domain"] = ""
    topologies: tuple[tuple[int, int], ...] = ()
    ranks_of_node: int = 0
    notes: tuple[str, ...] = ()

    def misfit(self, num_nodes: int, ranks_per_node: int) -> str | None:
        """Return why it cannot run on these ranks, ``None`` if it can."""
        if num_nodes > 1 and self.within == "node":
            return f"runs on one node, --nodes is {num_nodes}"
        if num_nodes > 1 and self.within:
            return (
                f"runs inside one {self.within}, --nodes is {num_nodes} (all hosts of a "
                "domain are one node: an NVL72 rack is --nodes 1 --gpus-per-node 72)"
            )
        if self.topologies and (num_nodes, ranks_per_node) not in self.topologies:
            known = ", ".join(f"{nodes} x {ranks}" for nodes, ranks in self.topologies)
            return (
                f"runs on {known} (nodes x GPUs of each), not on "
                f"{num_nodes} x {ranks_per_node}"
            )
        return None

    def doubt(self, num_nodes: int, ranks_per_node: int) -> str | None:
        """Return a warning if its kernels see other nodes than these, else ``None``."""
        taken = min(self.ranks_of_node, num_nodes * ranks_per_node)
        if taken in (0, ranks_per_node):
            return None
        return (
            f"{self.name} treats every {taken} ranks in a row as one NVLink node, but the "
            f"nodes have {ranks_per_node} ranks: it may fail, or send other copies than "
            f"placer counts. Use nodes of {self.ranks_of_node} ranks, or one node with "
            f"fewer ({self.read_in.split('; ')[-1]})"
        )

    def effect(self, policy: str, *, has_replicas: bool) -> PlacementEffect:
        """Return whether a placement can change what this engine sends."""
        effects = [
            placement_effect(
                policy, way.exchange, self.replica_choice, has_replicas=has_replicas
            )
            for way in (self.dispatch, self.combine)
        ]
        return next((one for one in effects if one.changes_traffic), effects[0])

    @classmethod
    def named(cls, name: str) -> "Engine":
        """Return the engine of an exact name.

        Raises
        ------
        UsageError
            If no engine has this name, or it is the name of a family.
        """
        found = engines_named(name)
        if found[0].name == name:
            return found[0]
        raise UsageError(
            f"--engine {name} names a family of engines, which differ in what they send "
            "by phase and options",
            "give an exact name\n" + "\n".join(_lines_by_phase(found)),
        )


def engine_families() -> tuple[str, ...]:
    """Return the families of the engines, each once."""
    return tuple(dict.fromkeys(one.family for one in known_engines().values()))


def engines_named(name: str) -> tuple[Engine, ...]:
    """Return the engine of an exact name, or all engines of a family.

    Raises
    ------
    UsageError
        If neither has this name.
    """
    engines = known_engines()
    if name in engines:
        return (engines[name],)
    found = tuple(one for one in engines.values() if one.family == name)
    if found:
        return found
    families = engine_families()
    sought = name.strip().lower()
    named = (sought,) if sought in families else engines
    holding = [one for one in named if sought and sought in one]
    nearest = holding or get_close_matches(sought, (*engines, *families), n=1)
    members = [one for one in families if one not in engines]
    raise UsageError(
        f"--engine {name} is not known"
        if name.strip()
        else "--engine is not the name of an engine",
        (f"did you mean {' or '.join(nearest)}? " if nearest else "")
        + f"known engines: {', '.join(engines)}; families (only advise and simulate): "
        f"{', '.join(members)}",
    )


def _lines_by_phase(engines: Sequence[Engine]) -> Iterator[str]:
    """Yield the names of each phase, each with what selects it."""
    width = max(len(one.name) for one in engines)
    for phase in PHASES:
        yield f"  {phase}:"
        for one in engines:
            if phase in one.phases:
                yield f"    {one.name:{width}}  {one.selected_by}"


@cache
def known_engines() -> Mapping[str, Engine]:
    """Return all engines by name, in the order of the data file."""
    return read_data("placer.target", "engines.toml", Engine)


def placement_effect(
    policy: str,
    exchange: Exchange,
    replica_choice: ReplicaChoice | None,
    *,
    has_replicas: bool,
) -> PlacementEffect:
    """Return whether a placement can change the expected traffic.

    Parameters
    ----------
    policy
        Home policy. Under ``fixed``, homes ignore content: each is as probable.
    exchange
        What is sent for a token.
    replica_choice
        Which replica serves, where there are several.
    has_replicas
        Whether experts may have more than one replica.
    """
    if exchange == "all-gather":
        return PlacementEffect(
            changes_traffic=False,
            reason="every token goes to every rank: placement can change only the "
            "balance, not the traffic",
        )
    if exchange == "padded":
        return PlacementEffect(
            changes_traffic=False,
            reason="the all-to-all always has the size of the experts' capacity: "
            "placement can change only the balance, not the traffic",
        )
    if exchange == "per-expert" and policy == "fixed":
        return _per_expert_effect(replica_choice, has_replicas=has_replicas)
    counted = {
        "per-expert": "pairs served away from home",
        "per-rank": "distinct ranks per token",
        "per-node": "distinct nodes and ranks per token",
    }[exchange]
    linked = "co-activation within a layer decides"
    if policy != "fixed":
        linked = "co-activation and links between layers decide"
    return PlacementEffect(
        changes_traffic=True,
        reason=f"{linked} the {counted}: placement changes the traffic",
    )


def solvable_choice(replica_choice: str | None) -> SolvableReplicaChoice | None:
    """Return a replica choice that the solver can follow; ``None`` stays.

    Raises
    ------
    UsageError
        If it cannot.
    """
    if replica_choice is None:
        return None
    known, problem = SOLVABLE_REPLICA_CHOICES, "is not possible here"
    return one_of("--replica-choice", replica_choice, known, problem)


def choose_replicas(
    engine: Engine | None, wanted: str | None, *, has_replicas: bool, command: str
) -> ReplicaChoice | None:
    """Return the replica choice that the user names, else the engine's.

    Parameters
    ----------
    engine
        What serves, or ``None`` where nobody says.
    wanted
        The requested choice, or ``None``.
    has_replicas
        Whether there are redundant experts. Without them ``None`` will do.
    command
        A command that lacks nothing but the choice, for the hint.

    Raises
    ------
    UsageError
        If ``wanted`` is not known, or there are redundant experts and nothing says which
        copy serves.
    """
    if wanted is not None:
        return one_of("--replica-choice", wanted, REPLICA_CHOICES)
    if engine is not None and engine.replica_choice is not None:
        return engine.replica_choice
    if not has_replicas:
        return None
    raise UsageError(
        "experts have several replicas, and engines differ in the replica choice"
        if engine is None
        else f"{engine.name} serves no redundant experts",
        "give --engine, or its replica choice:\n" + "\n".join(_lines_by_choice(command)),
    )


def _lines_by_choice(command: str) -> Iterator[str]:
    """Yield a command for each choice that engines have, and which engines those are."""
    engines = known_engines().values()
    for choice in REPLICA_CHOICES:
        names = []
        for family in dict.fromkeys(one.family for one in engines):
            members = [one for one in engines if one.family == family]
            alike = [one.name for one in members if one.replica_choice == choice]
            names += [family] if len(alike) == len(members) else alike
        if names:
            yield f"  {command} --replica-choice {choice}  # {', '.join(names)}"


def _per_expert_effect(
    replica_choice: ReplicaChoice | None, *, has_replicas: bool
) -> PlacementEffect:
    """Return the effect under ``fixed`` and ``per-expert``.

    A home is on each of the R ranks with the same probability, so a pair is remote with
    probability 1 - 1/R for every placement of its expert. With c replicas and a choice that
    prefers the home it is 1 - c/R; a choice that ignores the home leaves 1 - 1/R.
    """
    if not has_replicas:
        return PlacementEffect(
            changes_traffic=False,
            reason="one copy is sent for each (token, expert) pair: k (1 - 1/R) copies "
            "per token for every placement. Placement can only balance",
        )
    if replica_choice == "hash":
        return PlacementEffect(
            changes_traffic=False,
            reason="one copy is sent for each (token, expert) pair, and replica choice "
            "does not depend on the home: k (1 - 1/R) copies per token for every "
            "placement. Placement can only balance",
        )
    return PlacementEffect(
        changes_traffic=True,
        reason="an expert with c replicas is remote for 1 - c/R of its pairs: only the "
        "number of replicas matters, not their ranks",
    )
