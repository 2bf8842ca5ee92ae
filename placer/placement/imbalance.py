"""How uneven loads are."""

from typing import Any

import numpy.typing as npt


def imbalance(load: npt.NDArray[Any]) -> float:
    """Return the busiest of ``[R]`` loads over their mean; 1 where nothing is loaded."""
    return float(load.max() / load.mean()) if load.any() else 1.0
