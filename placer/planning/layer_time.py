"""Choosing what to solve for by predicted time.

Quick plans under several load caps and prices on the busiest receiver, and a load balancer
with the same slots, are made from half of the profile's sequences. The other half says
which takes the least time, in batches of all sizes that the engine is run for; the whole
profile is then solved that way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from placer.affinity import Affinity, count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.planning.advised_plans import QUICK
from placer.planning.inner_cap import expert_loads, inner_halves
from placer.planning.question import Question
from placer.planning.redundant import Worth, excess
from placer.planning.trace_advice import MOST_JUDGED_TOKENS
from placer.run.session import Session
from placer.serving.homes import BatchShape
from placer.simulation.batch_figures import BatchFigures, batch_steps, break_evens, times
from placer.simulation.cost import BreakEven, PredictedTime
from placer.solver.balance.load_caps import load_caps
from placer.solver.options import SolveOptions
from placer.solver.solve import solve_to_choose
from placer.trace import Chunk

BALANCED = "balanced"
_OBJECTIVE = "predicted seconds of a layer, summed over sizes of batches"
# Shares of the imbalance that is allowed, and prices on the busiest receiver.
_CAPS = (1.0, 0.5, 0.25)
_RECEIVE_PRICES = (0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeChoice:
    """What to solve for, and why.

    Attributes
    ----------
    name
        The candidate that was chosen.
    options
        Its options, for the whole profile.
    figures
        All candidates on the inner held-out sequences, by name, in batches of each size;
        ``balanced`` is the load balancer.
    break_even
        For which bandwidth the quickest of the plans for traffic beats the load balancer,
        in batches of each size.
    """

    name: str
    options: SolveOptions
    figures: Mapping[str, Sequence[BatchFigures]]
    break_even: Sequence[BreakEven]

    @property
    def break_even_by_size(self) -> list[tuple[BatchShape, BreakEven]]:
        """The batches, each with its break-even bandwidth."""
        shapes = [one.shape for one in self.figures[BALANCED]]
        return list(zip(shapes, self.break_even, strict=True))

    @property
    def told(self) -> str | None:
        """A sentence on what is busier than the load balancer: taken, or left out."""
        taken = _relative_times(self.figures, "total")
        quickest = min(taken, key=lambda name: taken[name])
        name = quickest if taken[quickest] < taken[self.name] else self.name
        even, other = (_straggler_words(self.figures[n]) for n in (BALANCED, name))
        if name != self.name:
            return (
                f"{name} takes {1 - taken[name] / taken[self.name]:.1%} less predicted "
                f"time, but is not used. Its straggler is {other}, the load balancer's "
                f"is {even}. With two-batch overlap it is not faster at some batch "
                "sizes. To use it, solve with --objective traffic and its "
                "--max-imbalance and --receive-price"
            )
        if _is_as_even(self.figures[name], self.figures[BALANCED]):
            return None
        overlapped = _relative_times(self.figures, "overlapped")[name]
        return (
            f"{name} is used, although its straggler is {other} and the load balancer's "
            f"is {even}: it also takes {1 - overlapped:.1%} less predicted time with "
            "two-batch overlap"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "chosen": self.name,
            "break_even": [
                asdict(shape) | one.to_json() for shape, one in self.break_even_by_size
            ],
            "candidates": {
                name: [one.to_json() for one in every]
                for name, every in self.figures.items()
            },
        }


def choose_by_time(
    model: ModelSpec,
    profile: Chunk,
    options: SolveOptions,
    question: Question,
    session: Session | None = None,
) -> TimeChoice:
    """Return the options whose quick plan takes the least predicted time.

    :func:`choose` says which may be chosen; the load balancer itself always may. What is
    held out is part of the profile.

    Parameters
    ----------
    model
        The trace's model.
    profile
        The tokens to solve on.
    options
        What to solve for; its load cap is never exceeded.
    question
        Engine, hardware and size of an expert.
    session
        Reports each candidate; after its deadline no further one is tried.

    Raises
    ------
    UsageError
        If the hardware is not given, the profile is one sequence, or a plan to keep to is.
    NoSolutionError
        If the load cap is out of reach on the whole profile, and may not be relaxed.
    """
    _require_comparable(options, question)
    session = session or Session()
    load_caps(expert_loads(model, profile), options, session.deadline)
    inner, heldout = judged_halves(profile)
    affinity = count_affinity([inner], model, {})
    balanced = _balanced(affinity, options, session)
    asked = _candidates(options)
    figures = {BALANCED: _figures(model, balanced, heldout, options, question)}
    for name, one in asked.items():
        if len(figures) > 1 and session.deadline.passed():
            break
        session.tell(f"quick plan, {name}")
        quick = replace(one, goal=one.goal.relaxed, proof="none", params=QUICK.params)
        placement, _ = solve_to_choose(affinity, quick, inner, session)
        figures[name] = _figures(model, placement, heldout, options, question)
    name = choose(figures)
    relative = _relative_times(figures, "total")
    fastest = min((one for one in asked if one in figures), key=lambda one: relative[one])
    return TimeChoice(
        name=name,
        options=asked.get(name) or replace(options, goal=options.goal.balanced),
        figures=figures,
        break_even=break_evens(figures[fastest], figures[BALANCED], question.cost_model()),
    )


def worth_by_time(model: ModelSpec, profile: Chunk, question: Question) -> Worth:
    """Return what judges numbers of redundant experts by predicted time of a layer.

    The better of a quick plan for traffic and a load balancer, made from half of the
    profile's sequences and judged on the other half.
    """
    inner, heldout = judged_halves(profile)
    affinity = count_affinity([inner], model, {})

    def worth(options: SolveOptions, session: Session) -> tuple[float, str, float]:
        _require_comparable(options, question)
        quick = replace(options.quick(), goal=options.goal.relaxed)
        placement, report = solve_to_choose(affinity, quick, inner, session)
        made = (placement, _balanced(affinity, options, session))
        figures = [_figures(model, one, heldout, options, question) for one in made]
        seconds = min(sum(one.total for one in times(every)) for every in figures)
        return seconds, _OBJECTIVE, excess(report, options)

    return worth


def choose(figures: Mapping[str, Sequence[BatchFigures]]) -> str:
    """Return the fastest candidate that may be used.

    Its stragglers are no worse than the load balancer's, or it is faster with two-batch
    overlap too, where transfers hide behind the busiest rank; in batches of every size.
    """
    relative, base = _relative_times(figures, "total"), figures[BALANCED]
    allowed = [
        name
        for name, every in figures.items()
        if _is_as_even(every, base)
        or all(
            one.overlapped < other.overlapped
            for one, other in zip(times(every), times(base), strict=True)
        )
    ]
    return min(allowed, key=lambda name: relative[name])


def _is_as_even(figures: Sequence[BatchFigures], base: Sequence[BatchFigures]) -> bool:
    return all(
        one.metrics.straggler_mean <= limit.metrics.straggler_mean
        for one, limit in zip(figures, base, strict=True)
    )


def _relative_times(
    figures: Mapping[str, Sequence[BatchFigures]], way: str
) -> dict[str, float]:
    """Return times over the load balancer's: their mean over the sizes of batches."""

    def mean(every: Sequence[BatchFigures]) -> float:
        both = zip(times(every), times(figures[BALANCED]), strict=True)
        return float(
            np.mean([getattr(one, way) / getattr(base, way) for one, base in both])
        )

    return {name: mean(every) for name, every in figures.items()}


def _straggler_words(figures: Sequence[BatchFigures]) -> str:
    return " / ".join(f"{one.metrics.straggler_mean:.4f}" for one in figures)


def _candidates(options: SolveOptions) -> dict[str, SolveOptions]:
    found, caps = {}, options.goal.caps
    for share in _CAPS:
        cap = caps.tightened(share)
        # A tighter cap than was asked for may be relaxed, to no more than was asked.
        under = options.goal.under(cap, relax=caps.relaxes_load_cap or share < 1)
        for more in _RECEIVE_PRICES:
            price = under.receive_price + more
            goal = replace(under, receive_price=price)
            found[f"cap {cap:g}, receive price {price:g}"] = replace(options, goal=goal)
    return found


def _require_comparable(options: SolveOptions, question: Question) -> None:
    if question.hardware is None:
        raise UsageError("--objective time needs the hardware", "give --hardware h100")
    if options.start.constrains:
        raise UsageError(
            "--objective time compares new plans, and cannot keep --start, --pin or "
            "--preserve-groups",
            "solve with --objective traffic",
        )
    options.goal.caps.require_no_receive_cap(
        "--objective time, which may choose the load balancer: it has no such cap. "
        "Predicted time already counts the busiest receiver"
    )


def judged_halves(profile: Chunk, option: str = "--objective time") -> tuple[Chunk, Chunk]:
    """Return half of the sequences to place by, and of the others what judges."""
    inner, heldout = inner_halves(profile, option)
    return inner, heldout.first_sequences(MOST_JUDGED_TOKENS)


def _balanced(affinity: Affinity, options: SolveOptions, session: Session) -> Placement:
    """Return the load balancer's plan, made as the whole profile's would be."""
    asked = replace(options, goal=options.goal.balanced.relaxed)
    placement, _ = solve_to_choose(affinity, asked, None, session)
    return placement


def batch_times(
    model: ModelSpec,
    placement: Placement,
    tokens: Chunk,
    options: SolveOptions,
    question: Question,
) -> list[PredictedTime]:
    """Return the predicted time of a layer in batches of each size."""
    return times(_figures(model, placement, tokens, options, question))


def _figures(
    model: ModelSpec,
    placement: Placement,
    tokens: Chunk,
    options: SolveOptions,
    question: Question,
) -> tuple[BatchFigures, ...]:
    """Serve tokens in batches of each size that the engine is run for."""
    cost = question.cost_model()
    served = replace(
        question.batch_options(),
        replica_choice=options.goal.replica_choice,
        layer_ids=model.layer_ids,
    )
    return tuple(
        batch_steps(placement, tokens, shape, served).figures(cost)
        for shape in question.answered
    )
