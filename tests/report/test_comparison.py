"""What is told of a plan beside its figures."""

from collections import defaultdict
from dataclasses import replace
from typing import Literal

import msgspec
import pytest

from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.reference import contiguous
from placer.placement.solver_report import InnerCap
from placer.report.comparison import (
    certificate_lines,
    closing_lines,
    plan_notes,
    plan_table,
    plan_table_title,
    plan_warnings,
    price_line,
)
from placer.solver.balance.load_balance import OBJECTIVE_OF_REPLICAS
from tests.plans import unsolved_plan

SENT = {"remote_rank_copies_per_token": 1.0}


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


def test_of_an_engines_map_nothing_is_warned() -> None:
    plan = replace(plan_with(), provenance={})
    solver = msgspec.structs.replace(plan.solver, status="imported")
    plan = replace(plan, solver=solver)
    assert list(plan_warnings(plan)) == []


def test_baselines_are_shown_where_there_was_no_time_to_measure_the_plan() -> None:
    """They are measured first, on the sequences that are held out."""
    whole = plan_with()
    measured = defaultdict(lambda: 1.0)
    baselines = {"eplb": {"fixed": measured}}
    metrics = {"profile": None, "heldout": None, "baselines": baselines}
    plan = replace(whole, metrics=whole.metrics | metrics)
    _, rows = plan_table(plan)
    assert [row[1] for row in rows] == ["eplb"]
    for fold, title in ((None, "on the profile:"), ("0/2", "on held-out sequences:")):
        plan = replace(plan, provenance={**plan.provenance, "fold": fold})
        assert plan_table_title(plan) == title


def test_load_above_its_cap_is_told_of_sequences_not_seen() -> None:
    """The cap of two layers is 1.1; one was relaxed to 1.3: 1.2 on average."""
    asked = {"objective": "traffic", "robust": "none", "max_home_imbalance": None}
    model = ModelSpec(num_experts=(4, 4), top_k=1)
    plan = unsolved_plan(model, contiguous((4, 4), 2), **asked)
    plan = replace(
        plan, solver=msgspec.structs.replace(plan.solver, relaxed_layers={"1": 1.3})
    )

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
    assert said.startswith(
        "on held-out sequences the busiest rank has 1.305 times the mean load, "
        "--max-imbalance is 1.1, relaxed to 1.200 on average. On the profile it has "
        "1.000. May help: --robust bootstrap, or --redundant-experts 2"
    )
    (said,) = warned(1.305, engine="transformers-a2a")
    assert said.endswith("May help: --robust bootstrap"), "it loads no map"
    (said,) = warned(1.305, robust="bootstrap")
    assert "--robust" not in said
    (relaxed,) = warned(1.305, max_imbalance_given=False)
    assert "load cap 1.1 is out of reach in 1 of 2 MoE layers and was relaxed" in relaxed
    assert "1.3000 (layer 1)" in relaxed


def test_a_cap_that_the_clock_left_no_time_for_is_not_called_out_of_reach() -> None:
    """Without redundant experts it is known before the search what can be reached."""
    model = ModelSpec(num_experts=(4, 4), top_k=1)

    def said(more: int, ended: str, reached: float = 1.3) -> str:
        copied = Placement.from_json([[0, 1, 2, 0, 3, 1]] * 2, (4, 4), 2, 1)
        placement = copied if more else contiguous((4, 4), 2)
        plan = unsolved_plan(
            model,
            placement,
            max_imbalance_given=False,
            max_home_imbalance=None,
            objective="traffic",
        )
        solver = msgspec.structs.replace(
            plan.solver, relaxed_layers={"1": reached}, termination=ended
        )
        return next(iter(plan_warnings(replace(plan, solver=solver))))

    assert said(2, "time_limit") == (
        "the time limit ended the search before the default load cap 1.1 was met in 1 of "
        "2 MoE layers: it was relaxed there, to at most 1.3000 (layer 1). More time may "
        "meet it: give a higher --time-limit, or none"
    )
    assert said(2, "interrupted").startswith("Ctrl-C ended the search before")
    for more, ended in ((2, "step_limit"), (0, "time_limit")):
        assert "is out of reach in 1 of 2 MoE layers" in said(more, ended)
    assert "to at most 1.10003 (layer 1)" in said(2, "step_limit", 1.10003)


def test_without_a_cap_that_is_given_sequences_not_seen_are_compared_with_eplb() -> None:
    """EPLB has 1.10 on them: 1.12 is as even, whatever the profile's figure is."""
    model = ModelSpec(num_experts=(4, 4), top_k=1)
    asked = {"objective": "traffic", "robust": "none", "max_home_imbalance": None}
    plan = unsolved_plan(model, contiguous((4, 4), 2), max_imbalance_given=False, **asked)

    def warned(imbalance: float) -> list[str]:
        metrics = {
            "profile": {"fixed": {"load_imbalance_mean": 1.009}},
            "heldout": {"fixed": {"load_imbalance_mean": imbalance}},
            "baselines": {"eplb": {"fixed": {"load_imbalance_mean": 1.1}}},
        }
        return list(plan_warnings(replace(plan, metrics=metrics)))

    assert warned(1.05) == []
    assert warned(1.12) == []
    (said,) = warned(1.13)
    assert "1.130 times the mean load, EPLB's busiest rank has 1.100. On the prof" in said


def test_a_cap_that_holds_for_even_homes_alone_is_told_with_both_figures() -> None:
    """Experts 0 and 1 of three have two replicas: homes decide which serves."""
    placed = Placement.from_json([[0, 1, 0, 2, 1, 2]], (3,), 3, 1)
    asked = {"objective": "balance", "robust": "none", "max_home_imbalance": None}
    plan = unsolved_plan(ModelSpec(num_experts=(3,), top_k=1), placed, **asked)
    solver = msgspec.structs.replace(
        plan.solver, objective_name=OBJECTIVE_OF_REPLICAS, objective=1.04
    )

    def warned(imbalance: float, **provenance: object) -> list[str]:
        figures = {"fixed": {"load_imbalance_mean": imbalance}}
        metrics = {"profile": figures, "heldout": None, "baselines": {}}
        given = {**plan.provenance, **provenance}
        told = replace(plan, solver=solver, metrics=metrics, provenance=given)
        if imbalance > 1.1:
            assert certificate_lines(told)[-1].endswith(f"tokens: {imbalance:.4f}")
        return list(plan_warnings(told))

    before = warned(1.1)
    both = "1.1 holds with even homes (1.040 on average). With the homes of the profile's "
    both += "tokens the busiest rank has 1.152 times the mean load"
    assert [one for one in warned(1.152) if one not in before] == [
        f"--max-imbalance {both}"
    ]
    assert f"the default load cap {both}" in warned(1.152, max_imbalance_given=False)


def test_a_plan_for_balance_that_eplb_beats_held_out_says_so_last() -> None:
    asked = {"objective": "balance", "max_imbalance_given": False, "profile_sequences": 17}
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2), **asked)

    def told(imbalance: float, **provenance: object) -> list[str]:
        metrics = {
            "profile": {"fixed": {"load_imbalance_mean": 1.009}},
            "heldout": {"fixed": {"load_imbalance_mean": imbalance}},
            "baselines": {"eplb": {"fixed": {"load_imbalance_mean": 1.2}}},
        }
        given = {**plan.provenance, **provenance}
        return list(closing_lines(replace(plan, metrics=metrics, provenance=given)))

    assert told(1.21) == told(1.25, objective="traffic") == []
    (line,) = told(1.25)
    assert "EPLB's placement is more even than this plan: 1.200 against 1.250" in line
    assert "17 profile sequences, too few to show" in line
    assert "too few" not in told(1.25, profile_sequences=400)[0]


def test_a_cap_that_nobody_gave_is_not_said_to_be_asked_for() -> None:
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2))
    cap = InnerCap(
        max_imbalance=1.02,
        overflow_price=10.0,
        predicted_imbalance=1.3,
        holds=False,
        trials=(),
    )
    solver = msgspec.structs.replace(plan.solver, inner_cap=cap)
    for is_given, words in ((True, "--max-imbalance 1.1"), (False, "the default load cap")):
        given = {"max_imbalance_given": is_given, "max_received_copies": None}
        told = list(plan_notes(replace(plan, solver=solver, provenance=given)))
        assert f"above {words}" in told[-1]


def test_time_that_decided_is_not_advised() -> None:
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2))

    def told(**fields: object) -> str:
        found = replace(
            plan,
            solver=msgspec.structs.replace(plan.solver, eplb_caps=(1.02,)),
            metrics=plan.metrics | {"profile": {"token": SENT, "fixed": SENT}},
            provenance={"max_received_copies": None, "objective": "traffic"},
        )
        return next(iter(plan_notes(replace(found, **fields))))

    assert told().endswith("--max-imbalance; to choose by predicted time: --hardware")
    for fields in (
        {"provenance": {"max_received_copies": None, "objective": "traffic",
                        "cap_by_time": {}}},
        {"metrics": plan.metrics},
        {"policy": "token"},
    ):  # fmt: skip
        assert told(**fields).endswith("To set the cap yourself: --max-imbalance")


def test_homes_above_their_cap_are_told() -> None:
    for reached, number in ((1.2, 0), (1.25, 1)):
        profile = {"fixed": {"home_imbalance_max": reached, "load_imbalance_mean": 1.0}}
        warned = list(plan_warnings(plan_with(profile=profile, heldout=profile)))
        assert len(warned) == number
    assert warned == [
        "--max-home-imbalance 1.2 was not reached in every layer of the profile: 1.250"
    ]


@pytest.mark.parametrize(
    ("asked", "num_nodes", "exchange", "metric", "words"),
    [
        ({}, 1, "per-rank", "remote_rank_copies", "copies sent"),
        ({}, 1, "per-node", "remote_rank_copies", "copies sent"),
        ({}, 2, "per-node", "remote_node_copies", "copies sent between nodes"),
        ({"engine": "sglang-deepep"}, 2, "per-rank", "remote_node_copies", "copies sent b"),
        ({"engine": "sglang-none"}, 2, "per-rank", None, "placement changes nothing"),
        ({"engine": "sglang-deepep-ll"}, 2, "per-rank", None, "always k(1 - 1/R) pairs"),
    ],
)
def test_more_of_what_the_engine_sends_is_told(
    asked: dict[str, str],
    num_nodes: int,
    exchange: Literal["per-rank", "per-node"],
    metric: str | None,
    words: str,
) -> None:
    """3.3 are a tenth more than 3.0; EPLB's 3.4 are more. Of all else more is sent, too."""
    every = ("remote_rank_copies", "remote_node_copies", "remote_pairs")
    figures = {
        name: {"fixed": {f"{one}_per_token": 1.0 + (name == "own") for one in every}}
        for name in ("own", "contiguous", "eplb")
    }
    for name, number in {"own": 3.3, "contiguous": 3.0, "eplb": 3.4}.items():
        figures[name]["fixed"][f"{metric}_per_token"] = number
    plan = unsolved_plan(
        ModelSpec(num_experts=(4,), top_k=1),
        contiguous((4,), 2, num_nodes),
        max_received_copies=None,
        objective="traffic",
        **asked,
    )
    own = figures.pop("own")
    metrics = {"profile": own, "heldout": None, "baselines": figures}
    told = list(plan_notes(replace(plan, metrics=metrics, exchange=exchange)))
    assert len(told) == (metric is not None)
    for line in told:
        assert line.startswith(words)
        assert (
            " per token and layer: 3.300. This is 10.0% more than contiguous (3.000), b"
            in line
        )


def test_more_copies_than_a_baseline_are_told_with_the_reason() -> None:
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2))

    def told(contiguous: float, objective: str = "traffic", **solver: object) -> list[str]:
        figures = {
            name: {"fixed": {"remote_rank_copies_per_token": copies}}
            for name, copies in {"own": 3.3, "contiguous": contiguous, "eplb": 3.4}.items()
        }
        own = figures.pop("own")
        metrics = {"profile": own, "heldout": None, "baselines": figures}
        asked = {"max_received_copies": None, "objective": objective}
        found = replace(plan, metrics=metrics, provenance=asked)
        return list(
            plan_notes(
                replace(found, solver=msgspec.structs.replace(plan.solver, **solver))
            )
        )

    (said,) = told(3.0)
    assert said == (
        "copies sent per token and layer: 3.300. This is 10.0% more than contiguous "
        "(3.000), because the load cap is 1.1"
    )
    assert told(3.3) == told(3.2999) == []
    (said,) = told(3.0, "balance")
    assert said.endswith("because the solver only balanced the load")
    _, said = told(3.0, eplb_caps=(1.02,))
    assert said.endswith("because the busiest rank is kept at or below EPLB's load")
    (said,) = told(3.0, termination="time_limit")
    assert said.endswith("because the load cap is 1.1, and solving was stopped early")


def test_a_plan_that_was_stopped_before_it_saved_any_traffic_says_so() -> None:
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=1), contiguous((4,), 2))

    def told(copies: float, termination: str, objective: str = "traffic") -> list[str]:
        one, other = (
            {"fixed": {"remote_rank_copies_per_token": c, "load_imbalance_mean": 1.0}}
            for c in (copies, 3.0)
        )
        metrics = {"profile": one, "heldout": None, "baselines": {"contiguous": other}}
        asked = plan.provenance | {"objective": objective, "max_home_imbalance": None}
        solver = msgspec.structs.replace(plan.solver, termination=termination)
        found = replace(plan, metrics=metrics, provenance=asked, solver=solver)
        return [line for line in plan_warnings(found) if "little more than" in line]

    (said,) = told(2.985, "time_limit")
    assert "copies sent 0.995 of contiguous's. More time may save more" in said
    assert len(told(2.985, "interrupted")) == 1
    assert told(2.9, "time_limit") == told(2.985, "step_limit") == []
    assert told(2.985, "time_limit", "balance") == []
