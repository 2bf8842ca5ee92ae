"""What a pass takes on other links, by hand."""

import dataclasses

import numpy as np
import pytest

from placer.replay.predict import predict_seconds
from placer.replay.traffic import Collective, Operation
from placer.target.hardware import Curve, Hardware, Link

HERE = Hardware(
    name="here",
    bf16_flops=1,
    fp8_flops=1,
    memory_bandwidth=1,
    fast=Link(bandwidth=100, latency=0.5),
    slow=Link(bandwidth=10, latency=2.0),
)
THERE = dataclasses.replace(HERE, name="there", slow=Link(bandwidth=5, latency=3.0))


def collective(operation: Operation, rows: list[list[int]]) -> Collective:
    return Collective(operation=operation, num_bytes=np.array(rows))


#: Ranks 0, 1 and 2, 3 share a node. Over the slow link rank 0 sends 40 and rank 2 gets 60;
#: over the fast one rank 3 sends 200. What a rank keeps costs nothing.
UNEQUAL = collective(
    "all_to_all", [[999, 0, 40, 0], [0, 0, 20, 0], [0, 0, 0, 0], [0, 0, 200, 0]]
)


def predicted(
    *collectives: Collective,
    seconds: float = 20,
    here: Hardware = HERE,
    there: Hardware = THERE,
    passes: int = 1,
) -> float:
    return predict_seconds(
        seconds,
        collectives,
        num_passes=passes,
        ranks_per_node=2,
        here=here,
        elsewhere=there,
    )


def test_the_exchanges_here_come_off_and_those_there_are_added() -> None:
    """Here 2 + max(60 / 10, 200 / 100) = 8 seconds, there 3 + 60 / 5 = 15."""
    assert predicted(UNEQUAL) == pytest.approx(20 - 8 + 15)
    assert predicted(UNEQUAL, UNEQUAL) == pytest.approx(20 - 16 + 30)
    assert predicted(UNEQUAL, UNEQUAL, passes=2) == pytest.approx(20 - 8 + 15)


@pytest.mark.parametrize("share", [1, 0.9, 0.5, 0.1])
def test_nothing_changes_on_the_same_links(share: float) -> None:
    """Whatever ranks that share a processor win back, they have won it in the pass here."""
    here = dataclasses.replace(HERE, processor_share=share)
    assert predicted(UNEQUAL, here=here, there=here) == pytest.approx(20)


def test_exchanges_that_would_take_longer_than_the_pass_leave_no_computation() -> None:
    assert predicted(UNEQUAL, seconds=5) == pytest.approx(15)


def test_an_exchange_of_nothing_takes_the_latency() -> None:
    nothing = collective("all_to_all", np.zeros((4, 4), int).tolist())
    assert predicted(nothing) == pytest.approx(20 - 2 + 3)


def test_an_all_gather_takes_what_was_measured_of_one() -> None:
    """Every rank gives 30 bytes to 3 others: 90, at 1 second per 45 bytes there.

    Here none was measured: it is an all-to-all, of 60 bytes over the slow link.
    """
    gathered = collective("all_gather", [[30] * 4] * 4)
    there = dataclasses.replace(THERE, all_gather=Curve.of([[0, 0], [45, 1]]))
    assert predicted(gathered, there=there) == pytest.approx(20 - (2 + 6) + 2)
    assert predicted(gathered) == pytest.approx(20 - (2 + 6) + (3 + 12))


def test_ranks_that_share_a_processor_win_back_what_the_last_one_is_behind() -> None:
    """There 11, 7, 15 and 3 + 200 / 100 = 5 seconds: the last is 15 - 9.5 behind.

    Here 6, 4, 8 and 4 seconds: 8 - 5.5 behind. The 12 seconds that are left of the pass
    are 14.5 of computation of which half may be won back, but only 2.5 were; there all 5.5
    are. With a share of 0.9 they are 12 / 0.9 of which a tenth is won back.
    """
    half = dataclasses.replace(HERE, processor_share=0.5)
    assert predicted(UNEQUAL, here=half) == pytest.approx(14.5 + 15 - 5.5)
    most = dataclasses.replace(HERE, processor_share=0.9)
    assert predicted(UNEQUAL, here=most) == pytest.approx(12 + 15)


def test_ranks_that_are_even_here_have_won_nothing_back() -> None:
    """Rank i sends 10 i + 10 to the rank of the other node: behind on slow links only."""
    even = collective(
        "all_to_all", [[0, 0, 10, 0], [0, 0, 0, 20], [30, 0, 0, 0], [0, 40, 0, 0]]
    )
    free = Link(bandwidth=1e9, latency=2.0)
    here = dataclasses.replace(HERE, processor_share=0.5, slow=free)
    behind = 40 / 5 - (30 + 40 + 30 + 40) / 5 / 4
    found = predicted(even, here=here)
    assert found == pytest.approx(20 - 2 + 3 + 40 / 5 - behind)
