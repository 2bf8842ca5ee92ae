"""What the Tab key completes: values of options and arguments that are known names.

Each function is given what was typed so far. What it returns is read when it is asked for,
so that help stays instant.
"""

from collections.abc import Callable, Iterable

Completion = Callable[[str], list[str]]


def among(*known: str) -> Completion:
    """Return a function that completes one of these names."""

    def complete(incomplete: str) -> list[str]:
        return _starting(known, incomplete)

    return complete


def engines(incomplete: str) -> list[str]:
    """Complete the name of an engine."""
    from placer.target.engine import known_engines

    return _starting(known_engines(), incomplete)


def engines_and_families(incomplete: str) -> list[str]:
    """Complete the name of an engine, or of a family of engines."""
    from placer.target.engine import known_engines

    every = known_engines()
    families = (one.family for one in every.values())
    return _starting(dict.fromkeys([*families, *every]), incomplete)


def policies(incomplete: str) -> list[str]:
    """Complete a home policy that a plan is solved for."""
    from placer.placement.policy import POLICIES

    return _starting(POLICIES, incomplete)


def exchanges(incomplete: str) -> list[str]:
    """Complete what is sent for a token, as far as it can be solved for."""
    from placer.target.engine import SOLVABLE_EXCHANGES

    return _starting(SOLVABLE_EXCHANGES, incomplete)


def replica_choices(incomplete: str) -> list[str]:
    """Complete which replica serves a token."""
    from placer.target.engine import REPLICA_CHOICES

    return _starting(REPLICA_CHOICES, incomplete)


def solvable_replica_choices(incomplete: str) -> list[str]:
    """Complete which replica serves a token, as far as it can be solved for."""
    from placer.target.engine import SOLVABLE_REPLICA_CHOICES

    return _starting(SOLVABLE_REPLICA_CHOICES, incomplete)


def replayed_exchanges(incomplete: str) -> list[str]:
    """Complete an exchange that ``placer replay`` runs."""
    from placer.replay.kinds import EXCHANGE_KINDS

    return _starting(EXCHANGE_KINDS, incomplete)


def baselines(incomplete: str) -> list[str]:
    """Complete a placement to compare with."""
    from placer.baseline import BASELINES

    return _starting(BASELINES, incomplete)


def hardware(incomplete: str) -> list[str]:
    """Complete the name of a kind of GPU."""
    from placer.target.hardware import known_hardware

    return _starting(known_hardware(), incomplete)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
