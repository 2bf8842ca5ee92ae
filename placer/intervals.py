"""How sure it is that a plan sends less than a baseline: intervals, and the worst domain.

Tokens of a sequence are alike, so whole sequences are drawn: a paired bootstrap,
in which plan and baseline are always summed over the same sequences (``docs/concepts.md``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.arrays import AnyArray, FloatArray, IntArray

#: Fewer sequences than this support no interval and no verdict (docs/concepts.md).
FEWEST_SEQUENCES = 30
_NUM_DRAWS = 2000
# More sequences than this are drawn in blocks, so that memory stays bounded.
_MOST_BLOCKS = 2000
_SEED = 0
_DECIMALS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesRatio:
    """What a plan sends over what a baseline sends.

    Attributes
    ----------
    ratio
        On all sequences.
    low, high
        95 % interval; ``None`` with fewer than :data:`FEWEST_SEQUENCES` sequences.
    worst_domain, worst_ratio
        The domain with the highest ratio; ``None`` without domains.
    """

    ratio: float
    low: float | None
    high: float | None
    worst_domain: str | None
    worst_ratio: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, rounded to five decimals."""
        return {
            "ratio": round(self.ratio, _DECIMALS),
            "low": None if self.low is None else round(self.low, _DECIMALS),
            "high": None if self.high is None else round(self.high, _DECIMALS),
            "worst_domain": self.worst_domain,
            "worst_ratio": None
            if self.worst_ratio is None
            else round(self.worst_ratio, _DECIMALS),
        }

    def words(self, baseline: str) -> str:
        """Return the end of a sentence that says what is sent."""
        parts = [f"{self.ratio:.3f} of {baseline}'s"]
        if self.low is not None and self.high is not None:
            parts.append(f"95 % interval {self.low:.3f} to {self.high:.3f}")
        if self.worst_ratio is not None:
            parts.append(f"worst domain {self.worst_domain} {self.worst_ratio:.3f}")
        return ", ".join(parts)


def copies_ratio(
    plan: IntArray,
    baseline: IntArray,
    sequence_ids: AnyArray,
    domain_ids: AnyArray | None,
    domains: Sequence[str],
) -> CopiesRatio | None:
    """Compare what two placements send for the same tokens.

    Parameters
    ----------
    plan, baseline
        ``[T]`` int64: what each token sends, over all layers.
    sequence_ids
        ``[T]``.
    domain_ids, domains
        ``[T]`` index into the names of domains, or ``None``.

    Returns
    -------
    CopiesRatio or None
        ``None`` if the baseline sends nothing.
    """
    if not baseline.sum():
        return None
    _, sequence = np.unique(sequence_ids, return_inverse=True)
    number = int(sequence.max()) + 1
    low = high = None
    if number >= FEWEST_SEQUENCES:
        block = sequence % _MOST_BLOCKS
        low, high = _interval(_sums(plan, block), _sums(baseline, block))
    worst = None if domain_ids is None else _worst(plan, baseline, domain_ids)
    return CopiesRatio(
        ratio=float(plan.sum() / baseline.sum()),
        low=low,
        high=high,
        worst_domain=None if worst is None else domains[worst[0]],
        worst_ratio=None if worst is None else worst[1],
    )


def _sums(copies: IntArray, group: IntArray) -> FloatArray:
    sums: FloatArray = np.bincount(group, weights=copies).astype(np.float64)
    return sums


def _interval(plan: FloatArray, baseline: FloatArray) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the ratio of sums over drawn groups."""
    number = len(plan)
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=_NUM_DRAWS)
    below = drawn @ baseline
    ratios = (drawn @ plan)[below > 0] / below[below > 0]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def _worst(
    plan: IntArray, baseline: IntArray, domain_ids: AnyArray
) -> tuple[int, float] | None:
    """Return the domain with the highest ratio, among two or more that send anything."""
    own, other = (_sums(copies, domain_ids.astype(np.int64)) for copies in (plan, baseline))
    present = np.flatnonzero(other > 0)
    if len(present) < 2:
        return None
    ratios = own[present] / other[present]
    return int(present[ratios.argmax()]), float(ratios.max())
