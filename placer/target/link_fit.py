"""Latency and bandwidth of a link, fitted to timings of exchanges over it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placer.errors import PlacerError
from placer.target.hardware import Curve, Link, LinkCurves


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """A link, and the timings that it was fitted to.

    Attributes
    ----------
    link
        What was fitted.
    num_bytes
        Bytes that one rank sent in an exchange, ascending.
    seconds
        How long the exchange took on the slowest rank.
    one_way
        Times of exchanges in which each rank only sends or only receives, by the bytes of
        the busiest.
    """

    link: Link
    num_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    one_way: Curve | None = None

    def __post_init__(self) -> None:
        if len(self.num_bytes) != len(self.seconds) or not self.num_bytes:
            raise ValueError("a fit has one time per message size, and at least one")

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error of the fit at each size: 0.1 where it says 10 % too much."""
        return tuple(
            (self.link.latency + size / self.link.bandwidth) / seconds - 1
            for size, seconds in zip(self.num_bytes, self.seconds, strict=True)
        )

    @property
    def residual(self) -> float:
        """Root mean square of the relative errors."""
        return float(np.sqrt(np.mean(np.square(self.errors))))

    @property
    def worst(self) -> float:
        """The largest relative error, by magnitude."""
        return max(abs(error) for error in self.errors)

    @property
    def measured(self) -> Link:
        """The link with its measured curves."""
        if self.one_way is None:
            return self.link
        both = Curve.rising(self.num_bytes, self.seconds)
        return replace(self.link, curves=LinkCurves(both_ways=both, one_way=self.one_way))

    def to_json(self) -> dict[str, object]:
        """Return the link, how well it fits, and the timings."""
        return {
            "bandwidth_bytes_per_s": self.link.bandwidth,
            "latency_s": self.link.latency,
            "residual_rms": round(self.residual, 4),
            "residual_worst": round(self.worst, 4),
            "num_bytes": list(self.num_bytes),
            "seconds": list(self.seconds),
            "one_way": None if self.one_way is None else self.one_way.to_json(),
        }


def fit_link(num_bytes: Sequence[int], seconds: Sequence[float]) -> LinkFit:
    """Fit ``latency + bytes / bandwidth`` to timings, least squares on relative errors.

    A latency below 0 cannot be: the fit with latency 0 is the best one then.

    Raises
    ------
    PlacerError
        If there are fewer than two sizes, or the time does not grow with them.
    """
    sizes, times = np.asarray(num_bytes, float), np.asarray(seconds, float)
    positive = np.isfinite(times).all() and (times > 0).all()
    if len(np.unique(sizes)) < 2 or not positive:
        raise PlacerError(
            f"a link is fitted to positive times of at least two sizes, got {times.size}",
            "measure again: placer calibrate --ranks R --out FILE",
        )
    # Scaled, so that both columns are of the same order.
    per_byte = times.max() / sizes.max()
    columns = np.stack([1 / times, sizes * per_byte / times], axis=1)
    latency, slope = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
    if latency < 0:
        latency, slope = 0.0, columns[:, 1].sum() / np.square(columns[:, 1]).sum()
    if slope <= 0:
        raise PlacerError(
            "larger exchanges take no longer, so no bandwidth can be fitted",
            "measure again on a quiet machine: placer calibrate --ranks R --out FILE",
        )
    return LinkFit(
        link=Link(bandwidth=float(1 / (slope * per_byte)), latency=float(latency)),
        num_bytes=tuple(num_bytes),
        seconds=tuple(seconds),
    )
