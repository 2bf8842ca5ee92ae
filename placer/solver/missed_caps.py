"""Caps that a placement misses: told as an error, or kept in the report if they may be."""

from collections.abc import Collection, Mapping
from typing import TypeVar

import numpy as np

from placer.errors import NoSolutionError
from placer.solver.options import SolveOptions

Layer = TypeVar("Layer", int, str)

_TOLERANCE = 1e-9


def above_load_cap(
    imbalance: Mapping[Layer, float], options: SolveOptions
) -> dict[Layer, float]:
    """Return the layers above ``options.load_cap``, with what they reached."""
    return {
        layer: float(value)
        for layer, value in imbalance.items()
        if value > options.load_cap + _TOLERANCE
    }


def require_load_cap(
    reached: Collection[float],
    options: SolveOptions,
    num_layers: int,
    *,
    stopped: bool = False,
    without_groups: float | None = None,
) -> None:
    """Refuse layers above the load cap, unless caps may be relaxed.

    Parameters
    ----------
    reached, options, num_layers, stopped
        As in :func:`require_receive_cap`.
    without_groups
        What the worst layer reaches with split router groups, where they were kept whole.

    Raises
    ------
    NoSolutionError
        If there are such layers.
    """
    if not reached or options.relaxes_load_cap:
        return
    worst = max(reached)
    when = ", when the search was stopped" if stopped else ""
    groups, other = "", "ask for more --redundant-experts"
    if options.preserve_groups or without_groups is not None:
        groups, other = " and whole router groups", "split the groups where the engine may"
    if without_groups is not None:
        way = "without --preserve-groups" if options.preserve_groups else "--ignore-groups"
        other = f"split the groups, which reaches {without_groups:.4f} ({way})"
    raise NoSolutionError(
        f"--max-imbalance {options.load_cap} was not reached in {len(reached)} of "
        f"{num_layers} MoE layers with {options.redundant_experts} redundant "
        f"experts{groups}{when}; worst {worst:.4f}",
        f"take the best reached with --relax-cap, {other}, or ask for "
        f"--max-imbalance {np.ceil(worst * 1000) / 1000:g}",
    )


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
