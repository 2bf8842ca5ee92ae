"""How uneven loads are."""

from placer.arrays import AnyArray, FloatArray


def imbalance(load: AnyArray) -> float:
    """Return the busiest of ``[R]`` loads over their mean; 1 where nothing is loaded."""
    return float(load.max() / load.mean()) if load.any() else 1.0


def imbalances(load: AnyArray) -> FloatArray:
    """Return ``[N]``: the busiest of each row of ``[N, R]`` loads over the row's mean.

    Every row has some load.
    """
    found: FloatArray = load.max(axis=1) / load.mean(axis=1)
    return found
