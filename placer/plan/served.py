"""What to solve for, so that it serves an engine."""

from dataclasses import dataclass

from placer.engine import Engine
from placer.errors import UsageError

_SOLVED_EXCHANGES = ("per-rank", "per-node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The options of a solve that an engine decides.

    Attributes
    ----------
    objective, exchange, replica_choice
        As in ``SolveOptions``.
    notes
        What the user should know, one sentence each.
    """

    objective: str
    exchange: str
    replica_choice: str
    notes: tuple[str, ...] = ()


def solved_for(
    engine: str | None,
    policy: str,
    objective: str = "traffic",
    exchange: str | None = None,
    replica_choice: str | None = None,
    *,
    has_replicas: bool = False,
) -> Served:
    """Return what to solve for; without an engine, what was asked or the defaults.

    Parameters
    ----------
    engine
        Name of an engine, or ``None``.
    policy
        Home policy.
    objective
        What was asked.
    exchange, replica_choice
        What was asked, or ``None``.
    has_replicas
        Whether there are redundant experts.

    Raises
    ------
    UsageError
        If the engine is not known, or what was asked contradicts it.
    """
    if engine is None:
        return Served(
            objective=objective,
            exchange=exchange or "per-rank",
            replica_choice=replica_choice or "local-first",
        )
    found = Engine.named(engine)
    notes = []
    effect = found.effect(policy, has_replicas=has_replicas)
    if objective == "traffic" and not effect.changes_traffic:
        objective = "balance"
        notes.append(f"{engine}: {effect.reason}; so the load is balanced")
    sent = found.dispatch.exchange
    nearest = sent if sent in _SOLVED_EXCHANGES else "per-rank"
    if objective == "traffic" and nearest != sent:
        notes.append(
            f"{engine} sends {sent}; solved for {nearest}, which lowers that too, and "
            "simulated as it is by: placer simulate --engine"
        )
    _require_agreement("--exchange", exchange, nearest, engine)
    choice = found.replica_choice if has_replicas else "local-first"
    if objective == "balance" and choice == "sglang-static":
        notes.append(
            f"{engine} draws among copies; balanced as if they shared their load evenly, "
            "and simulated as it is by: placer simulate --engine"
        )
    _require_agreement("--replica-choice", replica_choice, choice, engine)
    return Served(
        objective=objective,
        # Of what is sent, balancing asks nothing.
        exchange="per-rank" if objective == "balance" else nearest,
        replica_choice=choice,
        notes=tuple(notes),
    )


def without_copies(engine: str | None) -> str:
    """Return the command that solves again without redundant experts."""
    served_by = "" if engine is None else f"--engine {engine} "
    return (
        f"placer solve TRACE {served_by}--redundant-experts 0 --nodes N "
        "--gpus-per-node M --out PLAN"
    )


def _require_agreement(option: str, asked: str | None, needed: str, engine: str) -> None:
    if asked is not None and asked != needed:
        raise UsageError(
            f"{option} {asked} contradicts --engine {engine}, which needs {needed}",
            f"drop {option} or --engine",
        )
