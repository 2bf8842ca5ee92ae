"""The cap on received copies, where a placement misses it."""

from collections.abc import Collection

import numpy as np

from placer.errors import NoSolutionError
from placer.solver.options import SolveOptions


def require_receive_cap(
    reached: Collection[float], options: SolveOptions, num_layers: int, *, stopped: bool
) -> None:
    """Refuse layers above the cap on received copies, unless caps may be relaxed.

    Parameters
    ----------
    reached
        What the layers above the cap reached.
    options
        What was asked for; a plan may be solved with caps relaxed that nobody asked for.
    num_layers
        Of the plan.
    stopped
        Whether the search was.

    Raises
    ------
    NoSolutionError
        If there are such layers.
    """
    if not reached or options.relax_cap:
        return
    worst = max(reached)
    when = ", when the search was stopped" if stopped else ""
    raise NoSolutionError(
        f"--max-received-copies {options.max_received_copies:g} was not reached in "
        f"{len(reached)} of {num_layers} MoE layers under --max-imbalance "
        f"{options.load_cap:g}{when}; worst {worst:.4f}",
        "take the best reached with --relax-cap, ask for --max-received-copies "
        f"{np.ceil(worst * 1000) / 1000:g}, or allow a higher --max-imbalance",
    )
