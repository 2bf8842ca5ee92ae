"""How uneven loads are."""

from placer.arrays import AnyArray


def imbalance(load: AnyArray) -> float:
    """Return the busiest of ``[R]`` loads over their mean; 1 where nothing is loaded."""
    return float(load.max() / load.mean()) if load.any() else 1.0
