"""Choosing what to solve for by predicted time.

Quick plans under several load caps and prices on the busiest receiver, and a load balancer
with the same slots, are made from half of the profile's sequences. The other half says
which takes the least time; the whole profile is then solved that way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from placer.affinity import count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.plan.balance import load_caps
from placer.plan.deadline import Deadline
from placer.plan.inner_cap import expert_loads, inner_halves
from placer.plan.load_balance import balance_loads
from placer.plan.options import SolveOptions
from placer.plan.placement import Placement
from placer.plan.progress import Progress
from placer.plan.redundant import Worth
from placer.plan.solve import solve_to_choose
from placer.report.advice import (
    MOST_JUDGED_TOKENS,
    QUICK,
    Question,
    batch_options,
)
from placer.simulation.batch_figures import BatchFigures, BatchOptions, batch_figures
from placer.simulation.cost import BreakEven, break_even
from placer.simulation.simulate import DEFAULT_BATCH_SIZE
from placer.trace import Chunk

BALANCED = "balanced"
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
        All candidates on the inner held-out sequences, by name; ``balanced`` is the load
        balancer.
    break_even
        For which bandwidth the quickest of the plans for traffic beats the load balancer.
    """

    name: str
    options: SolveOptions
    figures: Mapping[str, BatchFigures]
    break_even: BreakEven

    @property
    def left_out(self) -> str | None:
        """A sentence on the quickest candidate, where its straggler forbids it."""
        seconds = {n: f.time.total for n, f in self.figures.items() if f.time is not None}
        quickest = min(seconds, key=lambda name: seconds[name])
        if seconds[quickest] >= seconds[self.name]:
            return None
        even, other = (
            self.figures[name].metrics.straggler_mean for name in (BALANCED, quickest)
        )
        return (
            f"{quickest} takes {1 - seconds[quickest] / seconds[self.name]:.1%} less "
            f"predicted time, but its straggler is {other:.4f}, the load balancer's "
            f"{even:.4f}; to take it all the same, solve with --objective traffic and its "
            "--max-imbalance and --receive-price"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "chosen": self.name,
            "break_even": self.break_even.to_json(),
            "candidates": {name: one.to_json() for name, one in self.figures.items()},
        }


def choose_by_time(
    model: ModelSpec,
    profile: Chunk,
    options: SolveOptions,
    question: Question,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> TimeChoice:
    """Return the options whose quick plan takes the least predicted time.

    Only plans whose straggler is no worse than the load balancer's may be chosen; the load
    balancer itself always may. What is held out is part of the profile.

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
    progress
        Told each candidate.
    deadline
        No further candidate is tried after it; one of ``options.time_limit`` by default.

    Raises
    ------
    UsageError
        If the hardware is not given, the profile is one sequence, or a plan to keep to is.
    NoSolutionError
        If the load cap is out of reach on the whole profile, and may not be relaxed.
    """
    _require_comparable(options, question)
    topology = options.topology
    deadline = deadline or Deadline(seconds=options.time_limit)
    load_caps(
        expert_loads(model, profile),
        topology.num_ranks,
        options.load_cap,
        relax_cap=options.relaxes_load_cap or options.redundant_experts > 0,
        deadline=deadline,
    )
    inner, heldout = _judged_halves(profile)
    affinity = count_affinity([inner], model, {})
    balanced = _balanced(model, inner, options)
    asked = _candidates(options)
    served = _served(model, options, question)
    figures = {BALANCED: batch_figures(balanced, heldout, DEFAULT_BATCH_SIZE, served)}
    for name, one in asked.items():
        if len(figures) > 1 and deadline.passed():
            break
        if progress is not None:
            progress(f"quick plan, {name}")
        quick = replace(
            one, relax_cap=True, proof="none", limits=QUICK.limits, refine=QUICK.refine
        )
        placement, _ = solve_to_choose(affinity, quick, inner, deadline)
        figures[name] = batch_figures(placement, heldout, DEFAULT_BATCH_SIZE, served)
    name = choose(figures)
    times = {key: value.time for key, value in figures.items() if value.time is not None}
    tried = [one for one in asked if one in times]
    fastest = min(tried, key=lambda one: times[one].total)
    if served.cost is None:
        raise ValueError("a cost model comes with the hardware")
    return TimeChoice(
        name=name,
        options=asked.get(name) or _balance(options),
        figures=figures,
        break_even=break_even(times[fastest], times[BALANCED], served.cost),
    )


def worth_by_time(model: ModelSpec, profile: Chunk, question: Question) -> Worth:
    """Return what judges numbers of redundant experts by predicted time of a layer.

    The better of a quick plan for traffic and a load balancer, made from half of the
    profile's sequences and judged on the other half.
    """
    inner, heldout = _judged_halves(profile)
    affinity = count_affinity([inner], model, {})

    def worth(options: SolveOptions, deadline: Deadline) -> tuple[float, str, bool]:
        _require_comparable(options, question)
        quick = replace(options.quick(), relax_cap=True)
        placement, report = solve_to_choose(affinity, quick, inner, deadline)
        served = _served(model, options, question)
        figures = [
            batch_figures(one, heldout, DEFAULT_BATCH_SIZE, served)
            for one in (placement, _balanced(model, inner, options))
        ]
        seconds = min(one.time.total for one in figures if one.time is not None)
        return seconds, "predicted seconds of a layer", report.meets_caps

    return worth


def choose(figures: Mapping[str, BatchFigures]) -> str:
    """Return the quickest candidate with a straggler no worse than the load balancer's."""
    limit = figures[BALANCED].metrics.straggler_mean
    allowed = {
        name: one.time.total
        for name, one in figures.items()
        if one.time is not None and one.metrics.straggler_mean <= limit
    }
    return min(allowed, key=lambda name: allowed[name])


def _candidates(options: SolveOptions) -> dict[str, SolveOptions]:
    found = {}
    for share in _CAPS:
        cap = round(1 + share * (options.load_cap - 1), 6)
        for more in _RECEIVE_PRICES:
            price = options.receive_price + more
            # A tighter cap than was asked for may be relaxed, to no more than was asked.
            found[f"cap {cap:g}, receive price {price:g}"] = replace(
                options,
                max_imbalance=cap,
                receive_price=price,
                relax_cap=options.relaxes_load_cap or share < 1,
            )
    return found


def _balance(options: SolveOptions) -> SolveOptions:
    """Return options for balance alone, which knows neither homes nor copies sent."""
    return replace(
        options,
        objective="balance",
        policy="fixed",
        max_home_imbalance=None,
        exchange="per-rank",
        receive_price=0.0,
        robust="none",
    )


def _require_comparable(options: SolveOptions, question: Question) -> None:
    if question.hardware is None:
        raise UsageError("--objective time needs the hardware", "give --hardware h100")
    if options.constrained:
        raise UsageError(
            "--objective time compares plans made anew, which --start, --pin and "
            "--preserve-groups are not",
            "solve with --objective traffic",
        )
    if options.max_received_copies is not None:
        raise UsageError(
            f"--max-received-copies {options.max_received_copies:g} is no cap of "
            "--objective time: it may choose the load balancer, which keeps to none, and "
            "its predictions wait for the busiest receiver already",
            "drop it, or solve with --objective traffic",
        )


def _judged_halves(profile: Chunk) -> tuple[Chunk, Chunk]:
    inner, heldout = inner_halves(profile, "--objective time")
    return inner, heldout.first_sequences(MOST_JUDGED_TOKENS)


def _balanced(model: ModelSpec, tokens: Chunk, options: SolveOptions) -> Placement:
    topology = options.topology
    return balance_loads(
        expert_loads(model, tokens),
        topology.num_ranks,
        topology.num_nodes,
        options.redundant_experts,
    ).placement


def _served(model: ModelSpec, options: SolveOptions, question: Question) -> BatchOptions:
    return replace(
        batch_options(question),
        replica_choice=options.replica_choice,
        layer_ids=model.layer_ids,
    )
