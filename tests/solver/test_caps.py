"""Caps that a placement misses, caps in pairs and tokens, and who reads them."""

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import placer
from placer.errors import NoSolutionError
from placer.placement.topology import Topology
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions

CAPS = Caps(max_received_copies=2.0, max_imbalance=1.1)


def require_load(caps: Caps, reached: list[float], *, stopped: bool) -> None:
    options = SolveOptions(topology=Topology(gpus_per_node=2), goal=Goal(caps=caps))
    options.require_load(reached, 3, stopped=stopped)


def require_received(caps: Caps, reached: list[float], *, stopped: bool) -> None:
    caps.require_received(reached, 3, stopped=stopped)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("require", [require_load, require_received])
def test_a_missed_cap_tells_whether_the_search_was_stopped(
    require: Callable[..., None], stopped: bool
) -> None:
    with pytest.raises(NoSolutionError, match=r"2 of 3 MoE layers.*worst 2\.5") as caught:
        require(CAPS, [2.1, 2.5], stopped=stopped)
    assert ("the search was stopped" in str(caught.value)) == stopped
    require(CAPS, [], stopped=stopped)
    require(replace(CAPS, relax=True), [2.5], stopped=stopped)


def test_a_load_cap_that_nobody_gave_is_relaxed() -> None:
    implicit = replace(CAPS, max_imbalance=None)
    require_load(implicit, [2.5], stopped=False)
    with pytest.raises(NoSolutionError, match="--max-received-copies 2"):
        require_received(implicit, [2.5], stopped=False)


def test_caps_of_a_layer_in_pairs_and_tokens() -> None:
    caps = Caps(max_imbalance=1.25, max_home_imbalance=1.5)
    assert caps.most_load(160, 8) == 25  # 20 on average
    assert caps.most_homes(80, 8) == 15  # 10 on average
    assert Caps().most_homes(80, 8) is None
    assert Caps().most_load(160, 8) == pytest.approx(22)  # the default of 1.1


def test_a_share_of_the_imbalance_that_a_cap_allows() -> None:
    caps = Caps(max_imbalance=1.12345678)
    assert caps.tightened(1.0) == 1.12345678  # all of it is the cap, to the last digit
    assert Caps(max_imbalance=1.3).tightened(0.5) == 1.15
    assert Caps(max_imbalance=1.0).tightened(0.2) == 1.0


def modules_that_name(value: str) -> set[str]:
    """Return the modules with an attribute, an argument or a parameter of this name."""
    root = Path(placer.__file__).parent
    named = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            one = getattr(node, "attr", None) or getattr(node, "arg", None)
            if one == value:
                named.add(path.relative_to(root).with_suffix("").as_posix())
    return named


def test_few_modules_read_a_cap() -> None:
    """From the command line to where it acts, at most five for each cap."""
    # placer tables has an option of its own, and the API is another way in.
    apart = {"cli/tables", "planning/tables"}
    assert modules_that_name("load_cap") == {
        "solver/goal",  # sets another one
        "solver/caps",
        "solver/balance/load_caps",  # acts
        "solver/balance/layer_balance",  # acts
        "planning/planner",  # records it
        # placer prove, whose certificate says it
        "planning/proving",
        "planning/certificate_file",
        "report/proof",
    }
    named = {one for one in modules_that_name("max_home_imbalance") if "api/" not in one}
    assert named - apart == {
        "cli/solve",
        "solver/caps",
        "solver/search/alternation",
        "table/build",
        "table/prices",
    }
