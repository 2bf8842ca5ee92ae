"""Caps that a placement misses."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from placer.errors import NoSolutionError
from placer.placement.topology import Topology
from placer.solver.balance.load_caps import require_load_cap
from placer.solver.missed_receive_cap import require_receive_cap
from placer.solver.options import SolveOptions

OPTIONS = SolveOptions(
    topology=Topology(gpus_per_node=2), max_received_copies=2.0, max_imbalance=1.1
)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("require", [require_load_cap, require_receive_cap])
def test_a_missed_cap_tells_whether_the_search_was_stopped(
    require: Callable[..., None], stopped: bool
) -> None:
    with pytest.raises(NoSolutionError, match=r"2 of 3 MoE layers.*worst 2\.5") as caught:
        require([2.1, 2.5], OPTIONS, 3, stopped=stopped)
    assert ("the search was stopped" in str(caught.value)) == stopped
    require([], OPTIONS, 3, stopped=stopped)
    require([2.5], replace(OPTIONS, relax_cap=True), 3, stopped=stopped)


def test_a_load_cap_that_nobody_gave_is_relaxed() -> None:
    implicit = replace(OPTIONS, max_imbalance=None)
    require_load_cap([2.5], implicit, 3)
    with pytest.raises(NoSolutionError, match="--max-received-copies 2"):
        require_receive_cap([2.5], implicit, 3, stopped=False)
