"""The load cap to solve under, so that unseen sequences stay under the requested cap.

Ranks that are just under a cap on the profile are above it on other sequences, whose load
is another. How much lower the cap of the solver must be, and if that is not enough how dear
load above it in resampled profiles, is measured only on the profile: quick plans of each
half of its sequences, judged on the other half.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from placer.affinity import count_affinity
from placer.arrays import FloatArray
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.placement.solver_report import CapTrial, InnerCap
from placer.run.session import Session
from placer.simulation.simulate import simulate
from placer.solver.balance.load_caps import load_caps
from placer.solver.goal import OVERFLOW_PRICE
from placer.solver.options import SolveOptions
from placer.solver.solve import solve_to_choose
from placer.trace import Chunk

# Shares of the imbalance asked for that quick plans may use; the first is all of it.
_SHARES = (1.0, 0.6, 0.2)
_CAP_STEPS = 1000  # caps are rounded down to thousandths
# Prices of a pair above the tightest cap, over the first one, where no cap holds.
_TIMES = (1, 2, 4)


def choose_inner_cap(
    model: ModelSpec,
    profile: Chunk,
    options: SolveOptions,
    session: Session | None = None,
) -> InnerCap:
    """Return the highest cap under which other sequences stay under the cap on load.

    Where none does, the tightest, at the least price of load above it under which they do,
    if no price is asked for.

    Parameters
    ----------
    model
        The trace's model.
    profile
        The tokens to solve on; no others are looked at.
    options
        What to solve for; the mean imbalance must keep to its cap on load.
    session
        Reports each cap; after its deadline no further one is tried.

    Raises
    ------
    UsageError
        If the profile is one sequence.
    NoSolutionError
        If the cap on load is out of reach on the whole profile, and may not be relaxed.
    """
    session = session or Session()
    deadline = session.deadline
    load_caps(expert_loads(model, profile), options, deadline)
    goal = options.goal
    halves = inner_halves(profile, f"--robust {goal.robust}")
    price = OVERFLOW_PRICE if goal.overflow_price is None else goal.overflow_price

    def try_all(trials: Sequence[tuple[float, float]]) -> Iterator[CapTrial]:
        for cap, price in trials:
            session.tell(f"cap {cap:g}, overflow price {price:g} on halves of the profile")
            tried = replace(goal.under(cap), overflow_price=price)
            quick = replace(options.quick(), goal=tried)
            yield _trial(model, halves, quick, (cap, price), session)
            if deadline.passed():
                return

    caps = [goal.caps.tightened(share) for share in _SHARES]
    asked = caps[0]
    trials = list(try_all([(cap, price) for cap in caps]))
    found = loosest_that_holds(asked, trials)
    if found.holds or goal.overflow_price is not None or deadline.passed():
        return found
    costlier = list(try_all([(min(caps), times * price) for times in _TIMES[1:]]))
    return cheapest_that_holds(asked, trials, costlier)


def loosest_that_holds(max_imbalance: float, trials: Sequence[CapTrial]) -> InnerCap:
    """Choose between the caps tried, by a straight line through their results.

    Two halves of one profile say little of a single cap; of several, the line's noise is
    less. The cap chosen is where it crosses ``max_imbalance``.

    Parameters
    ----------
    max_imbalance
        What other sequences should keep to.
    trials
        The caps tried; the line is of ``predicted_imbalance``.
    """
    line = _Line.through([(one.max_imbalance, one.predicted_imbalance) for one in trials])
    loosest = max(one.max_imbalance for one in trials)
    tightest = min(one.max_imbalance for one in trials)
    chosen = loosest
    if line.at(loosest) > max_imbalance:
        chosen = tightest
        if line.slope > 0:
            crossing = math.floor(line.reaches(max_imbalance) * _CAP_STEPS) / _CAP_STEPS
            chosen = max(tightest, crossing)
    return InnerCap(
        max_imbalance=chosen,
        overflow_price=trials[0].overflow_price,
        predicted_imbalance=round(line.at(chosen), 6),
        holds=line.at(chosen) <= max_imbalance,
        trials=tuple(trials),
    )


def cheapest_that_holds(
    max_imbalance: float, trials: Sequence[CapTrial], costlier: Sequence[CapTrial]
) -> InnerCap:
    """Choose between prices under the tightest cap, by a line over their logarithms.

    Parameters
    ----------
    max_imbalance
        What other sequences should keep to.
    trials
        The caps tried; the last is the tightest.
    costlier
        Trials of that cap at ascending prices.
    """
    tightest = trials[-1]
    line = _Line.through(
        [
            (math.log2(one.overflow_price), one.predicted_imbalance)
            for one in (tightest, *costlier)
        ]
    )
    chosen = costlier[-1].overflow_price if line.slope < 0 else tightest.overflow_price
    if line.at(math.log2(chosen)) < max_imbalance and line.slope < 0:
        crossing = math.ceil(round(2 ** line.reaches(max_imbalance), 6))
        chosen = max(tightest.overflow_price, float(crossing))
    predicted = line.at(math.log2(chosen))
    return InnerCap(
        max_imbalance=tightest.max_imbalance,
        overflow_price=chosen,
        predicted_imbalance=round(predicted, 6),
        holds=predicted <= max_imbalance,
        trials=(*trials, *costlier),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A straight line by least squares."""

    x: float
    y: float
    slope: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Self:
        """Fit a line to points (x, y); level where all have one x."""
        x, y = np.array(points).T
        spread = float(((x - x.mean()) ** 2).sum())
        rise = float(((x - x.mean()) * (y - y.mean())).sum())
        slope = rise / spread if spread else 0.0
        return cls(x=float(x.mean()), y=float(y.mean()), slope=slope)

    def at(self, x: float) -> float:
        return self.y + self.slope * (x - self.x)

    def reaches(self, y: float) -> float:
        """Return the x of a value; the line must not be level."""
        return self.x + (y - self.y) / self.slope


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
        If there is only one sequence; ``option`` is what needs two.
    """
    present, number = np.unique(profile.sequence_ids, return_inverse=True)
    if len(present) < 2:
        raise UsageError(
            f"{option} holds out sequences of the profile, but the profile has only one",
            "record more sequences, or choose another --fold",
        )
    even = number % 2 == 0
    return profile.select(even), profile.select(~even)


def _trial(
    model: ModelSpec,
    halves: tuple[Chunk, Chunk],
    options: SolveOptions,
    tried: tuple[float, float],
    session: Session,
) -> CapTrial:
    """Solve on each half under a cap, at a price above it, and judge on both."""
    own, other, prices = [], [], []
    for share, (solved, heldout) in zip((0.5, 1.0), (halves, halves[::-1]), strict=True):
        affinity = count_affinity([solved], model, {})
        with session.choosing(share) as part:
            placement, report = solve_to_choose(affinity, options, solved, part)
        own.append(_imbalance(model, placement, solved, options))
        other.append(_imbalance(model, placement, heldout, options))
        prices.append(report.objective)
    profile, judged = float(np.mean(own)), float(np.mean(other))
    cap, price = tried
    return CapTrial(
        max_imbalance=cap,
        overflow_price=price,
        objective=round(float(np.mean(prices)), 6),
        profile_imbalance=round(profile, 6),
        heldout_imbalance=round(judged, 6),
        predicted_imbalance=round(predicted_imbalance(profile, judged), 6),
    )


def _imbalance(
    model: ModelSpec, placement: Placement, tokens: Chunk, options: SolveOptions
) -> float:
    """Return max/mean rank load, mean over the layers, as plans report it."""
    found = simulate(
        placement,
        tokens,
        replica_choice=options.goal.replica_choice,
        layer_ids=model.layer_ids,
    )
    return found.get(options.goal.policy, found["fixed"]).load_imbalance_mean


def expert_loads(model: ModelSpec, tokens: Chunk) -> list[FloatArray]:
    """Return L arrays ``[E]``: pairs per expert."""
    return [
        np.bincount(ids.ravel(), minlength=size).astype(np.float64)
        for ids, size in zip(tokens.experts, model.num_experts, strict=True)
    ]
