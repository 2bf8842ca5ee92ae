"""Advice: whether placing experts is worth it for this traffic, engine and hardware.

A quick plan and a load balancer are made from half of the sequences and judged on the other
half, beside the contiguous placement that engines start with.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.affinity import Affinity, count_affinity
from placer.engine import Engine, Phase, Transfer
from placer.errors import UsageError
from placer.hardware import Hardware
from placer.plan.deadline import Deadline
from placer.plan.load_balance import balance_loads
from placer.plan.options import SolveOptions
from placer.plan.placement import Placement
from placer.plan.plan import Policy
from placer.plan.problem import Topology
from placer.plan.refine import RefineLimits
from placer.plan.search import SearchLimits
from placer.plan.served import solved_for
from placer.plan.solve import solve, solve_to_choose
from placer.simulation.baselines import contiguous
from placer.simulation.batch_figures import BatchFigures, BatchOptions, batch_figures
from placer.simulation.cost import BreakEven, CostModel, ExpertShape, break_even
from placer.simulation.intervals import FEWEST_SEQUENCES
from placer.simulation.simulate import DEFAULT_BATCH_SIZE
from placer.trace import Chunk, Fold, Selection, Trace

Verdict = Literal["worth it", "balance only", "not worth it"]
PROFILE = Fold(0, 2)
# Enough to see what there is to gain; `placer solve` gets the rest.
QUICK = SolveOptions(
    topology=Topology(gpus_per_node=1),
    relax_cap=True,
    proof="none",
    limits=SearchLimits(num_rounds=3),
    refine=RefineLimits(num_sweeps=3, num_starts=1, num_tokens=16_384),
)
MOST_JUDGED_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be served, and when it is worth a change.

    Attributes
    ----------
    topology
        Ranks and nodes.
    policy
        Home policy.
    engine
        What sends, or ``None``: one copy per rank in bf16.
    hardware, expert
        What the cost model needs, or ``None``: then traffic and balance are the measure.
    least_gain
        Share of the measure that a change must save.
    phase
        Only tokens of this phase, or ``None`` for all.
    """

    topology: Topology
    policy: str = "fixed"
    engine: Engine | None = None
    hardware: Hardware | None = None
    expert: ExpertShape | None = None
    least_gain: float = 0.03
    phase: Phase | None = None

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise UsageError(
                f"batches of --policy {self.policy} cannot be predicted",
                "choose fixed or follow",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement on the held-out sequences.

    Attributes
    ----------
    copies_per_token
        Copies dispatched per token and layer, of the engine's exchange.
    load_imbalance
        Max/mean rank load, mean over layers.
    straggler
        The same in each batch, mean over batches and layers.
    time_us
        Predicted microseconds of a layer, or ``None`` without hardware.
    """

    copies_per_token: float | None
    load_imbalance: float
    straggler: float | None
    time_us: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answer.

    Attributes
    ----------
    verdict
        ``worth it`` (place by traffic), ``balance only`` or ``not worth it``.
    reasons
        One sentence each.
    candidates
        By name: ``contiguous``, ``balanced``, and ``placed`` where placement can change
        the traffic.
    break_even
        For which bandwidth the placed plan is faster than contiguous, or ``None``.
    warnings
        What limits the figures.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    candidates: Mapping[str, Candidate]
    break_even: BreakEven | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "candidates": {name: asdict(one) for name, one in self.candidates.items()},
            "break_even": None if self.break_even is None else self.break_even.to_json(),
            "warnings": list(self.warnings),
        }


def advise_on_trace(trace: Trace, question: Question) -> Advice:
    """Advise from recorded tokens.

    Raises
    ------
    PlacerError
        If half of the sequences are none, or the experts do not divide over the ranks.
    """
    selection = Selection(PROFILE, question.phase)
    profile, heldout = trace.read(selection), trace.read(selection.complement())
    heldout = heldout.first_sequences(MOST_JUDGED_TOKENS)
    affinity = count_affinity([profile], trace.model, {})
    options = batch_options(question)
    figures, judged = {}, {}
    for name, placement in _placements(affinity, profile, question).items():
        found = batch_figures(placement, heldout, DEFAULT_BATCH_SIZE, options)
        figures[name] = found
        judged[name] = _candidate(placement, heldout, found)
    number = len(np.unique(heldout.sequence_ids))
    few = f"{number} held-out sequences are too few to trust: {FEWEST_SEQUENCES} are needed"
    verdict, reasons = _verdict(judged, question)
    return Advice(
        verdict=verdict,
        reasons=reasons,
        candidates=judged,
        break_even=_break_even(figures, options.cost),
        warnings=(few,) if number < FEWEST_SEQUENCES else (),
    )


def advise_on_loads(affinity: Affinity, question: Question) -> Advice:
    """Advise from counts: whether balancing pays, as far as loads tell."""
    if question.phase is not None:
        raise UsageError(
            f"--phase {question.phase}: an affinity file holds counts, of which no tokens "
            "can be selected any more",
            f"select when counting: placer affinity TRACE --phase {question.phase} "
            "--out AFFINITY",
        )
    topology = question.topology
    base = contiguous(affinity.model.num_experts, topology.num_ranks, topology.num_nodes)
    loads = [counts.astype(np.float64) for counts in affinity.load]
    even = balance_loads(loads, topology.num_ranks, topology.num_nodes)

    def candidate(imbalance: float) -> Candidate:
        return Candidate(
            copies_per_token=None, load_imbalance=imbalance, straggler=None, time_us=None
        )

    before = _mean_imbalance(base, loads)
    after = float(np.mean(even.imbalance))
    gain = 1 - after / before
    pays = gain >= question.least_gain
    return Advice(
        verdict="balance only" if pays else "not worth it",
        reasons=(
            f"balancing lowers the busiest rank's load by {gain:.1%} "
            f"({before:.3f} to {after:.3f} of the mean), on the counted traffic itself",
            "counts without tokens do not tell what placement would save in traffic",
        ),
        candidates={"contiguous": candidate(before), "balanced": candidate(after)},
        warnings=("nothing was held out: tomorrow's load is less even",),
    )


def next_command(advice: Advice, source: Path, question: Question) -> str | None:
    """Return the command that does what is advised, or ``None``."""
    if advice.verdict == "not worth it":
        return None
    topology = question.topology
    parts = ["placer solve", shlex.quote(str(source))]
    parts += [f"--gpus-per-node {topology.gpus_per_node}"]
    if topology.num_nodes > 1:
        parts += [f"--nodes {topology.num_nodes}"]
    if advice.verdict == "balance only":
        parts += ["--objective balance"]
    else:
        parts += [f"--policy {question.policy}"]
        parts += [] if question.engine is None else [f"--engine {question.engine.name}"]
    if not source.is_file():
        parts += [Selection(PROFILE, question.phase).options]
    return " ".join([*parts, "--out plan.json"])


def _placements(
    affinity: Affinity, profile: Chunk, question: Question
) -> dict[str, Placement]:
    topology = question.topology
    sizes = affinity.model.num_experts
    placements = {"contiguous": contiguous(sizes, topology.num_ranks, topology.num_nodes)}
    engine = None if question.engine is None else question.engine.name
    served = solved_for(engine, question.policy)
    options = replace(QUICK, topology=topology)
    balance = replace(options, objective="balance")
    placements["balanced"] = solve(affinity, balance)[0]
    if served.objective == "traffic" and topology.num_ranks > 1:
        asked = replace(
            options,
            policy=question.policy,  # type: ignore[arg-type]  # SolveOptions refuses others
            exchange=served.exchange,  # type: ignore[arg-type]
        )
        placements["placed"] = solve_to_choose(affinity, asked, profile, Deadline())[0]
    return placements


def batch_options(question: Question) -> BatchOptions:
    """Return how batches are served, with a cost model where there is hardware.

    Raises
    ------
    UsageError
        If there is hardware, but no size of an expert.
    """
    plain = Transfer(exchange="per-rank", element="bf16")
    engine = question.engine
    dispatch, combine = (
        (plain, plain) if engine is None else (engine.dispatch, engine.combine)
    )
    cost = None
    if question.hardware is not None:
        if question.expert is None:
            raise UsageError(
                "--hardware predicts no time without the size of an expert",
                "give --model DIR (its config.json), or --hidden-size and --expert-size",
            )
        cost = CostModel(
            hardware=question.hardware,
            expert=question.expert,
            dispatch=dispatch,
            combine=combine,
            num_nodes=question.topology.num_nodes,
        )
    return BatchOptions(
        policy=question.policy,
        exchanges=(dispatch.exchange, combine.exchange),
        cost=cost,
    )


def _candidate(placement: Placement, tokens: Chunk, figures: BatchFigures) -> Candidate:
    metrics, time = figures.metrics, figures.time
    loads = [
        np.bincount(ids.ravel(), minlength=size).astype(np.float64)
        for ids, size in zip(tokens.experts, placement.num_experts, strict=True)
    ]
    return Candidate(
        copies_per_token=metrics.dispatch_fast_copies_per_token
        + metrics.dispatch_slow_copies_per_token,
        load_imbalance=_mean_imbalance(placement, loads),
        straggler=metrics.straggler_mean,
        time_us=None if time is None else time.total * 1e6,
    )


def _mean_imbalance(placement: Placement, loads: list[npt.NDArray[np.float64]]) -> float:
    found = []
    for layer, load in enumerate(loads):
        total = np.bincount(placement.expert_rank(layer), load, placement.num_ranks)
        found.append(total.max() / total.mean() if load.any() else 1.0)
    return float(np.mean(found))


def _break_even(
    figures: Mapping[str, BatchFigures], cost: CostModel | None
) -> BreakEven | None:
    if cost is None or "placed" not in figures:
        return None
    placed, base = figures["placed"].time, figures["contiguous"].time
    return None if placed is None or base is None else break_even(placed, base, cost)


def _verdict(
    judged: Mapping[str, Candidate], question: Question
) -> tuple[Verdict, tuple[str, ...]]:
    base, even, placed = (judged.get(n) for n in ("contiguous", "balanced", "placed"))
    if base is None or even is None:
        raise ValueError("contiguous and balanced are always judged")
    reasons = []
    if placed is None:
        engine = question.engine
        reasons.append(
            "one rank sends nothing"
            if engine is None
            else f"{engine.name}: "
            + engine.effect(question.policy, has_replicas=False).reason
        )
    elif base.copies_per_token and placed.copies_per_token is not None:
        reasons.append(
            f"placing lowers the copies sent by "
            f"{1 - placed.copies_per_token / base.copies_per_token:.1%} "
            f"({base.copies_per_token:.3f} to {placed.copies_per_token:.3f} per token and "
            "layer), held out"
        )
    reasons.append(
        f"the busiest rank of a batch has {base.straggler:.3f} of the mean load, "
        f"{even.straggler:.3f} when balanced"
        + ("" if placed is None else f", {placed.straggler:.3f} when placed")
    )
    gains = _gains(judged)
    if question.hardware is not None:
        told = ", ".join(f"{name} {gain:+.1%}" for name, gain in gains.items())
        reasons.append(f"predicted time of a layer saved, beside contiguous: {told}")
    else:
        reasons.append(
            "without --hardware the gains are of traffic (placed) and of the busiest "
            "rank's load (balanced), not of time"
        )
    return _choose(gains, question.least_gain, timed=question.hardware is not None), tuple(
        reasons
    )


def _gains(judged: Mapping[str, Candidate]) -> dict[str, float]:
    """Return what share of the measure each candidate saves, beside contiguous."""
    base = judged["contiguous"]
    gains = {}
    for name in ("balanced", "placed"):
        one = judged.get(name)
        if one is None:
            continue
        if base.time_us is not None and one.time_us is not None:
            now, then = one.time_us, base.time_us
        elif name == "placed":
            now, then = one.copies_per_token or 0.0, base.copies_per_token or 0.0
        else:
            now, then = one.straggler or 0.0, base.straggler or 0.0
        gains[name] = 1 - now / then if then else 0.0
    return gains


def _choose(gains: Mapping[str, float], least: float, *, timed: bool) -> Verdict:
    """Prefer what is simpler unless traffic is worth it: times compare, shares do not."""
    placed, balanced = gains.get("placed", 0.0), gains["balanced"]
    beats_balance = not timed or placed >= balanced + least / 3
    if placed >= least and beats_balance:
        return "worth it"
    return "balance only" if balanced >= least else "not worth it"
