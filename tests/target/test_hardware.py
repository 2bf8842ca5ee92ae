"""Links as two numbers and as measured curves: times by hand, and files read back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.errors import PlacerError
from placer.target.hardware import Curve, Hardware, Link, LinkCurves, write_hardware

#: Half duplex: 1 s of start, then 1 s per byte one way and 2 s per byte both ways.
HALF_DUPLEX = Link(
    bandwidth=1,
    latency=3,
    curves=LinkCurves(
        both_ways=Curve.of([[0, 1], [10, 21]]), one_way=Curve.of([[0, 1], [10, 11]])
    ),
)
times = st.lists(st.floats(0, 100), min_size=2, max_size=12)


def growth(link: Link, sent: float, received: float) -> float:
    return float(link.growth(np.array([sent]), np.array([received]))[0])


def test_two_numbers_cost_the_more_of_sent_and_received() -> None:
    link = Link(bandwidth=4, latency=0.5)
    assert link.start == 0.5
    assert growth(link, 12, 8) == growth(link, 8, 12) == growth(link, 12, 12) == 3


@pytest.mark.parametrize(
    ("sent", "received", "seconds"),
    [
        (0, 0, 0),
        (5, 5, 10),  # as measured both ways
        (5, 0, 5),  # as measured one way, and half of it both ways: 5 too
        (8, 2, 10),  # as 5 both ways, longer than the 8 of one way
        (20, 20, 40),  # beyond the last size at its slope
    ],
)
def test_a_link_whose_directions_disturb_each_other_by_hand(
    sent: float, received: float, seconds: float
) -> None:
    assert HALF_DUPLEX.start == 1
    assert growth(HALF_DUPLEX, sent, received) == pytest.approx(seconds)


def test_one_way_is_the_least_that_an_exchange_takes() -> None:
    """Both ways are free here: what counts is the 9 that one rank gets, not the mean."""
    curves = LinkCurves(
        both_ways=Curve.of([[0, 1], [10, 11]]), one_way=Curve.of([[0, 1], [10, 11]])
    )
    link = Link(bandwidth=1, latency=1, curves=curves)
    assert growth(link, 9, 1) == pytest.approx(9)


@given(measured=times)
def test_a_rising_curve_is_among_what_was_measured_and_keeps_what_rises(
    measured: list[float],
) -> None:
    sizes = list(range(len(measured)))
    curve = Curve.rising(sizes, measured)
    assert min(measured) <= curve.seconds[0] <= curve.seconds[-1] <= max(measured)
    assert Curve.rising(sizes, sorted(measured)).seconds == tuple(sorted(measured))
    between = np.linspace(0, 2 * len(measured), 50)
    assert (np.diff(curve.at(between)) >= -1e-9).all(), "more bytes never take less"


def test_a_file_with_curves_is_read_back(tmp_path: Path) -> None:
    hardware = Hardware(
        name="mine",
        bf16_flops=1e12,
        fp8_flops=1e12,
        memory_bandwidth=1e10,
        fast=Link(bandwidth=1e9, latency=1e-5),
        slow=HALF_DUPLEX,
        all_gather=Curve.of([[0, 0.001], [1000, 0.0025], [2000, 0.0025]]),
        source="by hand",
        notes=('a "note"', "another"),
    )
    path = tmp_path / "mine.toml"
    write_hardware(hardware, path)
    assert Hardware.named(str(path)) == hardware


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("both_ways = [[0, 1], [1, 2]]", "KeyError.*one_way"),
        ("both_ways = [[0, 1]]\none_way = [[0, 1]]", "at least two pairs"),
        ("both_ways = [[0, 2], [1, 1]]\none_way = [[0, 1], [1, 2]]", "not descending"),
        ("both_ways = [[1, 1], [1, 2]]\none_way = [[0, 1], [1, 2]]", "ascending"),
        ("both_ways = [[0, 1], [1, nan]]\none_way = [[0, 1], [1, 2]]", "holds nan"),
        ("both_ways = [[0, 1], [1]]\none_way = [[0, 1], [1, 2]]", "list of length 2"),
        ("both_ways = [1, 2]\none_way = [[0, 1], [1, 2]]", "expected a list"),
        (
            'both_ways = [[0, "1"], [1, 2]]\none_way = [[0, 1], [1, 2]]',
            'is "1", expected a number',
        ),
        ("both_ways = []\none_way = [[0, 1], [1, 2]]", "at least two pairs"),
        (
            "both_ways = [[[0], [1]], [[1], [2]]]\none_way = [[0, 1], [1, 2]]",
            "expected a number",
        ),
        (
            "both_ways = [[false, 1], [true, 2]]\none_way = [[0, 1], [1, 2]]",
            "is false, expected",
        ),
        ("curves = 3", "slow has the unknown field curves"),
    ],
)
def test_curves_that_cannot_be_meant_are_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "h.toml"
    path.write_text(
        "bf16_flops = 1e12\nfp8_flops = 1e12\nmemory_bandwidth = 1e12\n"
        "fast = { bandwidth = 1e9, latency = 1e-6 }\n"
        f"[slow]\nbandwidth = 1e9\nlatency = 1e-6\n{line}\n"
    )
    with pytest.raises(PlacerError, match=f"(?s)hardware file .*h.toml.*{message}"):
        Hardware.named(str(path))


@pytest.mark.parametrize("link", ["3", "[]", '"1e9"', "[1e9, 1e-6]"])
def test_a_link_that_is_no_table_is_refused(tmp_path: Path, link: str) -> None:
    path = tmp_path / "h.toml"
    path.write_text(
        "bf16_flops = 1e12\nfp8_flops = 1e12\nmemory_bandwidth = 1e12\n"
        f"fast = {{ bandwidth = 1e9, latency = 1e-6 }}\nslow = {link}\n"
    )
    with pytest.raises(PlacerError, match=r"h\.toml: slow is .*, expected an object"):
        Hardware.named(str(path))
