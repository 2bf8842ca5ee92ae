"""What is told of a plan beside its figures."""

from dataclasses import replace

from placer.model import ModelSpec
from placer.plan import Plan
from placer.report.comparison import plan_warnings, price_line
from placer.simulation.baselines import contiguous
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


def test_homes_above_their_cap_are_told() -> None:
    for reached, number in ((1.2, 0), (1.25, 1)):
        profile = {"fixed": {"home_imbalance_max": reached}}
        warned = list(plan_warnings(plan_with(profile=profile, heldout=profile)))
        assert len(warned) == number
    assert warned == [
        "--max-home-imbalance 1.2 was not reached in every layer of the profile: 1.250"
    ]
