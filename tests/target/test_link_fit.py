"""Links fitted to timings that are known."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.errors import PlacerError
from placer.target.hardware import Link
from placer.target.link_fit import fit_link

sizes = st.lists(st.integers(1, 10**9), min_size=2, max_size=20, unique=True)


@given(num_bytes=sizes, microseconds=st.integers(1, 10**5), rate=st.integers(10**6, 10**12))
def test_a_fit_gives_back_the_link_of_exact_timings(
    num_bytes: list[int], microseconds: int, rate: int
) -> None:
    """Times are exact fractions; what the fit says at each size is exact to rounding."""
    times = [Fraction(microseconds, 10**6) + Fraction(one, rate) for one in num_bytes]
    fit = fit_link(num_bytes, [float(one) for one in times])
    assert fit.worst < 1e-9
    # Where bytes or the latency hardly count in any time, no fit can tell them.
    if max(num_bytes) / rate > microseconds / 10**6 > min(num_bytes) / rate:
        spread = max(num_bytes) / (max(num_bytes) - min(num_bytes))
        assert fit.link.latency == pytest.approx(microseconds / 10**6, rel=1e-6 * spread)
        assert fit.link.bandwidth == pytest.approx(rate, rel=1e-6 * spread)


@given(
    num_bytes=sizes,
    noise=st.lists(st.floats(0.5, 2), min_size=20, max_size=20),
    latency=st.floats(0.9, 1.1),
    bandwidth=st.floats(0.9, 1.1),
)
def test_no_link_nearby_fits_better(
    num_bytes: list[int], noise: list[float], latency: float, bandwidth: float
) -> None:
    times = [(1e-4 + one / 1e9) * noise[n] for n, one in enumerate(num_bytes)]
    try:
        fit = fit_link(num_bytes, times)
    except PlacerError:
        return  # the noise makes more bytes take less time
    other = Link(
        latency=fit.link.latency * latency, bandwidth=fit.link.bandwidth * bandwidth
    )

    def error(link: Link) -> float:
        return sum(
            ((link.latency + one / link.bandwidth) / seconds - 1) ** 2
            for one, seconds in zip(num_bytes, times, strict=True)
        )

    assert error(fit.link) <= error(other) * (1 + 1e-9) + 1e-12
    assert fit.residual == pytest.approx((error(fit.link) / len(times)) ** 0.5)


def test_a_latency_below_zero_is_none_by_hand() -> None:
    """Times 1 and 3 of 1 and 2 bytes: the line through both starts at -1.

    Through the origin, the slope s that makes (s - 1)^2 + (2 s / 3 - 1)^2 least is
    (1 + 2 / 3) / (1 + 4 / 9) = 15 / 13.
    """
    fit = fit_link([1, 2], [1.0, 3.0])
    assert fit.link.latency == 0
    assert fit.link.bandwidth == pytest.approx(13 / 15)
    assert fit.errors == pytest.approx([2 / 13, 10 / 13 - 1])
    assert fit.worst == pytest.approx(3 / 13)


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "message"),
    [
        ([1, 1000], [2.0, 1.0], "take no longer"),
        ([8, 8], [1.0, 2.0], "at least two sizes"),
        ([1, 8], [0.0, 2.0], "positive times"),
        ([1, 8], [float("nan"), 2.0], "positive times"),
        ([1, 8], [1.0, float("inf")], "positive times"),
    ],
)
def test_what_is_no_link_is_refused(
    num_bytes: list[int], seconds: list[float], message: str
) -> None:
    with pytest.raises(PlacerError, match=message):
        fit_link(num_bytes, seconds)
