"""The words of a verdict, for times whose relation is known."""

from dataclasses import replace

import pytest

from placer.planning.verdict import grouped, references, speed_words
from placer.simulation.cost import PredictedTime

BASE = PredictedTime(
    compute=0.0,
    dispatch=0.0,
    combine=0.0,
    latency=0.0,
    total=100.0,
    total_p95=0.0,
    overlapped=50.0,
)


@pytest.mark.parametrize(
    ("totals", "overlapped", "told"),
    [
        ([80], [40], "faster than it (layer -20.0 %, overlapped -20.0 %)"),
        (
            [80, 90],
            [40, 49],
            "faster than it (layer -20.0 / -10.0 %, overlapped -20.0 / -2.0 %)",
        ),
        (
            [110],
            [40],
            "slower than it (layer +10.0 %), with two-batch overlap faster than it "
            "(-20.0 %)",
        ),
        (
            [95],
            [50.1],
            "faster than it (layer -5.0 %), with two-batch overlap as fast as it (+0.2 %)",
        ),
        (
            [110, 90],
            [55, 45],
            "faster than it at some batch sizes, slower at others (layer +10.0 / -10.0 %, "
            "overlapped +10.0 / -10.0 %)",
        ),
        (
            [100, 90],
            [50, 45],
            "no slower than it (layer +0.0 / -10.0 %, overlapped +0.0 / -10.0 %)",
        ),
    ],
)
def test_faster_is_said_only_where_it_holds(
    totals: list[float], overlapped: list[float], told: str
) -> None:
    plan = [
        replace(BASE, total=total, overlapped=longer)
        for total, longer in zip(totals, overlapped, strict=True)
    ]
    assert speed_words("it", plan, [BASE] * len(plan)) == told


def test_engines_with_the_same_figures_share_a_line() -> None:
    named = [("a", "x"), ("b", "y"), ("c", "x"), (None, "z")]
    assert grouped(named) == [(("a", "c"), "x"), (("b",), "y"), ((), "z")]


def test_a_verdict_is_beside_contiguous_and_eplb_where_they_were_simulated() -> None:
    assert references(["contiguous", "balanced", "eplb"]) == ["contiguous", "eplb"]
    assert references(["random", "grace"]) == ["random", "grace"]
