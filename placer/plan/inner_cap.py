"""The load cap to solve under, so that sequences not seen keep to the one asked for.

Ranks that are just under a cap on the profile are above it on other sequences, whose load
is another. How much lower the cap of the solver must be is measured on the profile alone:
quick plans of each half of its sequences, judged on the other half.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from placer.affinity import count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.plan.balance import load_caps
from placer.plan.deadline import Deadline
from placer.plan.options import SolveOptions
from placer.plan.placement import Placement
from placer.plan.plan import CapTrial, InnerCap
from placer.plan.problem import FloatArray
from placer.plan.solve import Progress, solve_to_choose
from placer.simulation.simulate import simulate
from placer.trace import Chunk

# Shares of the imbalance asked for that quick plans may use.
_SHARES = (1.0, 0.6, 0.2)
_CAP_STEPS = 1000  # caps are rounded down to thousandths


def choose_inner_cap(
    model: ModelSpec,
    profile: Chunk,
    options: SolveOptions,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> InnerCap:
    """Return the loosest cap under which other sequences keep to ``max_imbalance``.

    Where none does, the one that comes closest.

    Parameters
    ----------
    model
        The trace's model.
    profile
        The tokens to solve on; no others are looked at.
    options
        What to solve for, ``max_imbalance`` being the mean imbalance to keep to.
    progress
        Told each cap.
    deadline
        No further cap is tried after it; one of ``options.time_limit`` by default.

    Raises
    ------
    UsageError
        If the profile is one sequence.
    NoSolutionError
        If ``max_imbalance`` is out of reach on the whole profile, and may not be relaxed.
    """
    load_caps(
        expert_loads(model, profile),
        options.topology.num_ranks,
        options.max_imbalance,
        relax_cap=options.relax_cap or options.redundant_experts > 0,
    )
    halves = inner_halves(profile, f"--robust {options.robust}")
    quick = replace(options.quick(), relax_cap=True)
    deadline = deadline or Deadline(seconds=options.time_limit)
    trials: list[CapTrial] = []
    for share in _SHARES:
        if trials and deadline.passed():
            break
        cap = round(1 + share * (options.max_imbalance - 1), 6)
        if progress is not None:
            progress(f"cap {cap:g} on halves of the profile")
        asked = replace(quick, max_imbalance=cap)
        trials.append(_trial(model, halves, asked, deadline))
    return loosest_that_holds(options.max_imbalance, trials)


def loosest_that_holds(max_imbalance: float, trials: Sequence[CapTrial]) -> InnerCap:
    """Choose between the caps tried, by a straight line through what they are worth.

    Two halves of one profile say little of a single cap; of several, the line's noise is
    less. The cap chosen is where it crosses ``max_imbalance``.

    Parameters
    ----------
    max_imbalance
        What other sequences should keep to.
    trials
        The caps tried; the line is of ``predicted_imbalance``.
    """
    caps = np.array([one.max_imbalance for one in trials])
    values = np.array([one.predicted_imbalance for one in trials])
    mean_cap, mean_value = caps.mean(), values.mean()
    spread = float(((caps - mean_cap) ** 2).sum())
    rise = float(((caps - mean_cap) * (values - mean_value)).sum())
    slope = rise / spread if spread else 0.0

    def line(cap: float) -> float:
        return float(mean_value + slope * (cap - mean_cap))

    loosest, tightest = float(caps.max()), float(caps.min())
    chosen = loosest
    if line(loosest) > max_imbalance:
        chosen = tightest
        if slope > 0:
            crossing = loosest - (line(loosest) - max_imbalance) / slope
            chosen = max(tightest, math.floor(crossing * _CAP_STEPS) / _CAP_STEPS)
    return InnerCap(
        max_imbalance=chosen,
        predicted_imbalance=round(line(chosen), 6),
        holds=line(chosen) <= max_imbalance,
        trials=tuple(trials),
    )


def predicted_imbalance(profile: float, heldout: float) -> float:
    """Predict the imbalance on other sequences of a plan solved on all of the profile.

    Half of n sequences err by about sqrt(2/n), and so do the others that judge them; all
    n err by sqrt(1/n), and so do as many to come. Thus what half of the profile shows
    above the other is sqrt(2) times what is to come.

    Parameters
    ----------
    profile, heldout
        Imbalance of a plan on the half that it was solved on, and on the other.
    """
    return profile + (heldout - profile) / math.sqrt(2)


def inner_halves(profile: Chunk, option: str) -> tuple[Chunk, Chunk]:
    """Return every second sequence, and the others, whatever fold they are of.

    Raises
    ------
    UsageError
        If there is one sequence alone; ``option`` is what needs two.
    """
    present, number = np.unique(profile.sequence_ids, return_inverse=True)
    if len(present) < 2:
        raise UsageError(
            f"{option} holds sequences out of the profile, which has only one",
            "record more sequences, or choose another --fold",
        )
    even = number % 2 == 0
    return profile.select(even), profile.select(~even)


def _trial(
    model: ModelSpec,
    halves: tuple[Chunk, Chunk],
    options: SolveOptions,
    deadline: Deadline,
) -> CapTrial:
    """Solve on each half and judge on both."""
    own, other, prices = [], [], []
    for solved, heldout in (halves, halves[::-1]):
        affinity = count_affinity([solved], model, {})
        placement, report = solve_to_choose(affinity, options, solved, deadline)
        own.append(_imbalance(placement, solved, options))
        other.append(_imbalance(placement, heldout, options))
        prices.append(report.objective)
    profile, judged = float(np.mean(own)), float(np.mean(other))
    return CapTrial(
        max_imbalance=options.max_imbalance,
        objective=round(float(np.mean(prices)), 6),
        profile_imbalance=round(profile, 6),
        heldout_imbalance=round(judged, 6),
        predicted_imbalance=round(predicted_imbalance(profile, judged), 6),
    )


def _imbalance(placement: Placement, tokens: Chunk, options: SolveOptions) -> float:
    """Return max/mean rank load, mean over the layers, as plans report it."""
    found = simulate(placement, tokens)
    return found.get(options.policy, found["fixed"]).load_imbalance_mean


def expert_loads(model: ModelSpec, tokens: Chunk) -> list[FloatArray]:
    """Return L arrays ``[E]``: pairs per expert."""
    return [
        np.bincount(ids.ravel(), minlength=size).astype(np.float64)
        for ids, size in zip(tokens.experts, model.num_experts, strict=True)
    ]
