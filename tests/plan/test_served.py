"""What an engine asks of a solve."""

import pytest

from placer.errors import UsageError
from placer.plan.served import solved_for


def test_without_an_engine_what_was_asked_counts() -> None:
    served = solved_for(None, "fixed")
    assert (served.objective, served.exchange) == ("traffic", "per-rank")
    assert solved_for(None, "fixed", exchange="per-node").exchange == "per-node"
    assert not served.notes


@pytest.mark.parametrize(
    ("engine", "policy", "objective", "exchange"),
    [
        ("sglang-deepep", "fixed", "traffic", "per-node"),
        ("trtllm-onesided", "fixed", "traffic", "per-rank"),
        ("sglang-none", "follow", "balance", "per-rank"),
        ("deepspeed", "follow", "balance", "per-rank"),
        ("transformers-a2a", "fixed", "balance", "per-rank"),
        ("transformers-a2a", "follow", "traffic", "per-rank"),
    ],
)
def test_an_engine_decides_exchange_and_objective(
    engine: str, policy: str, objective: str, exchange: str
) -> None:
    served = solved_for(engine, policy)
    assert (served.objective, served.exchange) == (objective, exchange)
    plain = engine in ("sglang-deepep", "trtllm-onesided")
    assert bool(served.notes) != plain, "what is not solved for as it is, is said"


@pytest.mark.parametrize(
    ("objective", "has_replicas", "choice", "note"),
    [
        ("traffic", False, "local-first", ""),
        ("traffic", True, "sglang-static", ""),
        ("balance", False, "local-first", ""),
        ("balance", True, "sglang-static", "balanced as if they shared their load evenly"),
    ],
)
def test_copies_are_chosen_as_the_engine_does(
    objective: str, has_replicas: bool, choice: str, note: str
) -> None:
    served = solved_for("sglang-deepep", "fixed", objective, has_replicas=has_replicas)
    assert served.replica_choice == choice
    assert served.exchange == ("per-node" if objective == "traffic" else "per-rank")
    assert bool(served.notes) == bool(note)
    assert note in "".join(served.notes)


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="--exchange per-rank contradicts"):
        solved_for("sglang-deepep", "fixed", exchange="per-rank")
    with pytest.raises(UsageError, match="--replica-choice hash contradicts"):
        solved_for("sglang-deepep", "fixed", replica_choice="hash")
    with pytest.raises(UsageError, match="is not known"):
        solved_for("nothing", "fixed")
