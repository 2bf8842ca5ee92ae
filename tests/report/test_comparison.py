"""What is told of a plan beside its figures."""

from dataclasses import replace

from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.reference import contiguous
from placer.report.comparison import (
    plan_notes,
    plan_warnings,
    price_line,
)
from tests.plans import unsolved_plan


def plan_with(**metrics: object) -> Plan:
    plan = unsolved_plan(
        ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2), max_home_imbalance=1.2
    )
    return replace(plan, metrics=plan.metrics | metrics)


def test_prices_are_told_beside_those_of_baselines_that_cost_something() -> None:
    assert price_line(plan_with()) is None
    prices = {"contiguous": 2.0, "balanced": 0.0, "placer": 0.5}
    line = price_line(plan_with(prices=prices))
    assert line is not None
    assert line.endswith("per token and layer: 0.5, 0.250 of contiguous's 2")


def test_load_above_its_cap_is_told_of_sequences_not_seen() -> None:
    """The cap of two layers is 1.1; one was relaxed to 1.3: 1.2 on average."""
    asked = {"objective": "traffic", "robust": "none", "max_home_imbalance": None}
    model = ModelSpec(num_experts=(4, 4), top_k=1)
    plan = unsolved_plan(model, contiguous((4, 4), 2), **asked)
    plan = replace(plan, solver=replace(plan.solver, relaxed_layers={"1": 1.3}))

    def warned(imbalance: float, **provenance: object) -> list[str]:
        seen = {"fixed": {"load_imbalance_mean": 1.0}}
        metrics = {
            "profile": seen,
            "heldout": {"fixed": {"load_imbalance_mean": imbalance}},
        }
        given = {**plan.provenance, **provenance}
        found = replace(plan, metrics=plan.metrics | metrics, provenance=given)
        return list(plan_warnings(found))

    assert warned(1.2) == []
    (said,) = warned(1.305)
    assert "1.305 of the mean load, above the cap of 1.200" in said
    assert "--robust bootstrap" in said
    (said,) = warned(1.305, robust="bootstrap")
    assert "--robust" not in said
    relaxed, _ = warned(1.305, max_imbalance_given=False)
    assert "load cap 1.1 is out of reach and relaxed in 1 of 2 MoE layers" in relaxed
    assert "1.3000 (layer 1)" in relaxed


def test_homes_above_their_cap_are_told() -> None:
    for reached, number in ((1.2, 0), (1.25, 1)):
        profile = {"fixed": {"home_imbalance_max": reached, "load_imbalance_mean": 1.0}}
        warned = list(plan_warnings(plan_with(profile=profile, heldout=profile)))
        assert len(warned) == number
    assert warned == [
        "--max-home-imbalance 1.2 was not reached in every layer of the profile: 1.250"
    ]


def test_more_copies_than_a_baseline_are_told_with_the_reason() -> None:
    """3.3 copies are a tenth more than 3.0; EPLB's 3.4 are more."""
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2))

    def told(exchange: str, contiguous: float, objective: str = "traffic") -> list[str]:
        key = "node" if exchange == "per-node" else "rank"
        figures = {
            name: {"fixed": {f"remote_{key}_copies_per_token": copies}}
            for name, copies in {"own": 3.3, "contiguous": contiguous, "eplb": 3.4}.items()
        }
        own = figures.pop("own")
        metrics = {"profile": own, "heldout": None, "baselines": figures}
        asked = {"max_received_copies": None, "objective": objective}
        found = replace(plan, metrics=metrics, provenance=asked, exchange=exchange)
        return list(plan_notes(found))

    (said,) = told("per-rank", 3.0)
    assert said == (
        "copies sent per token and layer: 3.300, 10.0% more than contiguous (3.000); the "
        "load cap of 1.1 asks for it"
    )
    assert told("per-rank", 3.3) == told("per-rank", 3.2999) == []
    (said,) = told("per-node", 3.0, "balance")
    assert said.startswith("copies sent between nodes per token and layer: 3.300, 10.0%")
    assert said.endswith("balance alone is what was solved for")
