"""Caps that a placement misses."""

from collections.abc import Callable
from dataclasses import replace

import pytest

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
