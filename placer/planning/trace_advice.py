"""Advice from recorded tokens.

A quick plan and EPLB's placement are made from half of the sequences and judged on the
other half, beside the contiguous placement that engines start with: for each engine, in
batches of each size that it is run for.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.affinity import count_affinity
from placer.baseline import BaselineProblem
from placer.baseline.eplb import eplb
from placer.intervals import FEWEST_SEQUENCES
from placer.placement.placement import Placement, rank_load
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.advice import (
    PROFILE,
    RANKED,
    Advice,
    Answer,
    Candidate,
    Verdict,
)
from placer.planning.judge import no_batch_for
from placer.planning.question import (
    Question,
    loadable,
)
from placer.planning.verdict import (
    grouped,
    phase_words,
    speed_words,
)
from placer.run.deadline import Deadline
from placer.serving.homes import (
    Batching,
    BatchShape,
)
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.batch_figures import (
    BatchFigures,
    ServedBatches,
    break_evens,
    filled_warning,
    times,
)
from placer.simulation.sent import NODE_COPIES
from placer.solver.balance.layer_balance import Balancing
from placer.solver.balance.load_balance import balance_loads
from placer.solver.options import SolveOptions
from placer.solver.search.pair_search import SearchLimits
from placer.solver.search.refine import RefineLimits
from placer.solver.solve import solve_to_choose
from placer.target.engine import PHASES
from placer.trace import (
    Chunk,
    Selection,
    Trace,
)
from placer.trace.doubts import (
    doubtful_follow,
    doubts,
)

# Enough to see what there is to gain; `placer solve` gets the rest.
QUICK = SolveOptions(
    topology=Topology(gpus_per_node=1),
    relax_cap=True,
    proof="none",
    limits=SearchLimits(num_rounds=3),
    refine=RefineLimits(num_sweeps=3, num_starts=1, num_tokens=16_384),
)
#: The plan whose ranks may be busier than EPLB's busiest.
CAPPED = f"placed, cap {QUICK.load_cap:.2f}"
MOST_JUDGED_TOKENS = 65_536
# Balance further from even than this is worth a word on redundant experts.
_FAR_FROM_EVEN = 1.1
_TIMES = {"total": "time_us", "overlapped": "overlapped_us"}


def advise_on_trace(trace: Trace, questions: Sequence[Question]) -> Advice:
    """Advise from recorded tokens.

    ``questions`` differ in the engine, and the size of an expert, alone.

    Raises
    ------
    PlacerError
        If half of the sequences are none, or the experts do not divide over the ranks.
    UsageError
        If no engine is run for any of the batches, or can load a plan of the model.
    """
    asked, left_out = loadable(questions, trace.model)
    asked = [one for one in asked if one.answered]
    if not asked:
        engines = [one.engine for one in questions if one.engine is not None]
        raise no_batch_for(engines, questions[0].shapes)
    first = asked[0]
    selection = Selection(PROFILE, first.phase)
    profile, heldout = trace.read(selection), trace.read(selection.complement())
    heldout = heldout.first_sequences(MOST_JUDGED_TOKENS)
    placements = _Placements(trace, profile, first)
    served = _Served(heldout)
    answers = tuple(
        _answer(question, phase, placements, served)
        for question in asked
        for phase in PHASES
        if any(shape.batching == phase for shape in question.answered)
    )
    number = len(np.unique(heldout.sequence_ids))
    few = f"{number} held-out sequences are too few to trust: {FEWEST_SEQUENCES} are needed"
    shapes = dict.fromkeys(shape for one in asked for shape in one.answered)
    assumed = [one.expert.assumption for one in asked if one.expert and one.hardware]
    unknown = (
        unknown_dense_layers(placements.even, one.replica_choice, one.layer_ids)
        for one in asked
    )
    warnings = (
        *left_out,
        *unknown,
        *doubts(trace, Selection(phase=first.phase)),
        *doubtful_follow(trace, first.policy),
        few if number < FEWEST_SEQUENCES else None,
        filled_warning(tuple(shapes), heldout.num_tokens, first.topology.num_ranks),
        *assumed,
    )
    return Advice(
        answers=answers,
        reasons=tuple(_reasons(asked, placements, served)),
        redundant_experts=first.redundant_experts,
        warnings=tuple(dict.fromkeys(text for text in warnings if text is not None)),
    )


class _Placements:
    """Contiguous, EPLB's, and quick plans for each exchange, made when asked for."""

    def __init__(self, trace: Trace, profile: Chunk, question: Question) -> None:
        self.affinity = count_affinity([profile], trace.model, {})
        self._profile = profile
        topology, sizes = question.topology, trace.model.num_experts
        selection = Selection(PROFILE, question.phase)
        more = question.redundant_experts
        problem = BaselineProblem(
            trace=trace,
            selection=selection,
            topology=topology,
            redundant_experts=more,
        )
        self._made: dict[Hashable, Placement] = {
            "contiguous": contiguous(sizes, topology.num_ranks, topology.num_nodes, more),
            "eplb": eplb(problem),
        }

    @property
    def even(self) -> Placement:
        """EPLB's placement."""
        return self._made["eplb"]

    def of(self, question: Question) -> dict[str, tuple[Hashable, Placement]]:
        """Return the candidates of an engine by name, each with a key of its own."""
        keys: dict[str, Hashable] = {"contiguous": "contiguous", "eplb": "eplb"}
        sent = question.sent
        if sent is not None and question.topology.num_ranks > 1:
            asked = replace(
                QUICK,
                topology=question.topology,
                policy=question.policy,  # type: ignore[arg-type]  # Question refuses
                exchange="per-node" if sent == NODE_COPIES else "per-rank",
                redundant_experts=question.redundant_experts,
                # No engine has cover.
                replica_choice=question.replica_choice,  # type: ignore[arg-type]
            ).guarded()
            plans = {"placed": asked}
            if asked.below_eplb:
                plans[CAPPED] = replace(asked, below_eplb=False)
            for name, options in plans.items():
                keys[name] = name, options.exchange, options.replica_choice
                self._make(keys[name], options)
        return {name: (key, self._made[key]) for name, key in keys.items()}

    def _make(self, key: Hashable, options: SolveOptions) -> None:
        if key not in self._made:
            found = solve_to_choose(self.affinity, options, self._profile, Deadline())[0]
            self._made[key] = found


class _Served:
    """Held-out tokens served from placements; nothing is counted twice."""

    def __init__(self, tokens: Chunk) -> None:
        self.tokens = tokens
        self._batches = ServedBatches(tokens)

    def loads(self, num_experts: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Return L arrays ``[E]``: pairs per expert."""
        return [
            np.bincount(ids.ravel(), minlength=size)
            for ids, size in zip(self.tokens.experts, num_experts, strict=True)
        ]

    def figures(
        self, key: Hashable, placement: Placement, shape: BatchShape, question: Question
    ) -> BatchFigures:
        """Return what a placement does in batches of one shape."""
        options, cost = question.batch_options(), question.cost_model()
        return self._batches.figures(key, placement, shape, options, cost)

    def imbalance(self, placement: Placement) -> float:
        """Return max/mean rank load, mean over layers."""
        found = []
        for layer, load in enumerate(self.loads(placement.num_experts)):
            total = rank_load(placement, layer, load)
            found.append(total.max() / total.mean() if load.any() else 1.0)
        return float(np.mean(found))


def _answer(
    question: Question, phase: Batching, placements: _Placements, served: _Served
) -> Answer:
    shapes = [one for one in question.answered if one.batching == phase]
    figures, candidates = {}, {}
    for name, (key, placement) in placements.of(question).items():
        every = [served.figures(key, placement, shape, question) for shape in shapes]
        imbalance = served.imbalance(placement)
        figures[name] = every
        candidates[name] = tuple(_candidate(one, imbalance, question) for one in every)
    verdicts = [
        {way: _choose(candidates, n, way, question) for way in _TIMES}
        for n in range(len(shapes))
    ]
    every_verdict = [one for by_way in verdicts for one in by_way.values()]
    words = _verdict_words(verdicts, shapes)
    told = "; ".join(_figures_words(figures, candidates, question))
    return Answer(
        engine=question.served.name,
        phase=phase,
        verdict=min(every_verdict, key=RANKED.index),
        sentence=f"{phase_words(shapes)}: {words}. {told}",
        candidates=candidates,
        break_even=break_evens(
            figures["placed"], figures["contiguous"], question.cost_model()
        )
        if "placed" in figures
        else (),
    )


def _candidate(found: BatchFigures, imbalance: float, question: Question) -> Candidate:
    metrics, time, sent = found.metrics, found.time, question.sent
    fast = 0 if sent == NODE_COPIES else metrics.dispatch_fast_copies_per_token
    return Candidate(
        load_imbalance=imbalance,
        tokens_per_rank=found.shape.tokens_per_rank,
        sent_per_token=None
        if sent is None
        else fast + metrics.dispatch_slow_copies_per_token,
        straggler=metrics.straggler_mean,
        time_us=None if time is None else time.total * 1e6,
        overlapped_us=None if time is None else time.overlapped * 1e6,
    )


def _choose(
    candidates: Mapping[str, tuple[Candidate, ...]],
    place: int,
    way: str,
    question: Question,
) -> Verdict:
    """Prefer what is simpler unless traffic is worth it: times compare, shares do not."""
    timed, least = question.hardware is not None, question.least_gain

    def gain(name: str, otherwise: str) -> float:
        if name not in candidates:
            return 0.0
        one, base = candidates[name][place], candidates["contiguous"][place]
        field = _TIMES[way] if timed else otherwise
        then = getattr(base, field)
        return 1 - getattr(one, field) / then if then else 0.0

    placed, balanced = gain("placed", "sent_per_token"), gain("eplb", "straggler")
    if placed >= least and (not timed or placed >= balanced + least / 3):
        return "worth it"
    return "balance only" if balanced >= least else "not worth it"


def _verdict_words(
    verdicts: Sequence[Mapping[str, Verdict]], shapes: Sequence[BatchShape]
) -> str:
    """Return one verdict where all agree, else which holds where."""
    by_size = []
    for found in verdicts:
        total, overlapped = found["total"], found["overlapped"]
        by_size.append(
            total
            if total == overlapped
            else f"{total} without overlap, {overlapped} with two-batch overlap"
        )
    if len(set(by_size)) == 1:
        return by_size[0]
    return "; ".join(
        f"at {shape.tokens_per_rank:,} {words}"
        for shape, words in zip(shapes, by_size, strict=True)
    )


def _figures_words(
    figures: Mapping[str, Sequence[BatchFigures]],
    candidates: Mapping[str, tuple[Candidate, ...]],
    question: Question,
) -> list[str]:
    """Return the parts of the sentence that tells a verdict's figures."""
    sent, parts, told = question.sent, [], ["placed", "eplb"]
    if sent is not None and "placed" in candidates:
        copies = {
            name: float(np.mean([one.sent_per_token or 0.0 for one in every]))
            for name, every in candidates.items()
        }
        now, then = copies["placed"], copies["contiguous"]
        parts.append(f"placing {changed(sent.words, then, now)}")
        capped = copies.get(CAPPED, now)
        if now - capped >= question.least_gain * then:
            parts.append(
                f"with a load cap of {QUICK.load_cap:.2f} in place of EPLB's load it "
                f"{changed(sent.words, then, capped)} (--max-imbalance {QUICK.load_cap:g})"
            )
            told.insert(1, CAPPED)
    for name in told:
        if name in figures and times(figures[name]):
            base = times(figures["contiguous"])
            parts.append(f"{name} {speed_words('contiguous', times(figures[name]), base)}")
    if question.hardware is None:
        stragglers = {
            name: " / ".join(f"{one.straggler:.3f}" for one in every)
            for name, every in candidates.items()
        }
        words = ", ".join(f"{name} {value}" for name, value in stragglers.items())
        parts.append(f"busiest rank over the mean: {words}")
    return parts


def changed(what: str, then: float, now: float) -> str:
    """Say by how much a figure falls or rises.

    >>> changed("copies", 2.0, 1.5)
    'lowers copies by 25.0 % (2.000 to 1.500 per token and layer)'
    """
    if not then:
        return f"leaves {what} at {now:.3f} per token and layer"
    share = 1 - now / then
    verb = "lowers" if share >= 0 else "raises"
    figures = f"{then:.3f} to {now:.3f} per token and layer"
    return f"{verb} {what} by {100 * abs(share):.1f} % ({figures})"


def _reasons(
    questions: Sequence[Question], placements: _Placements, served: _Served
) -> list[str]:
    reasons = [
        f"{', '.join(names)}: {reason}"
        for names, reason in grouped(
            (one.served.name, one.effect.reason)
            for one in questions
            if not one.effect.changes_traffic
        )
    ]
    if questions[0].topology.num_ranks == 1:
        reasons = ["one rank sends nothing"]
    if questions[0].hardware is None:
        reasons.append(
            "without --hardware a verdict is about what is sent (placed) and the busiest "
            "rank's load (eplb), not about time"
        )
    if any(one.served.map_format != "checkpoint" for one in questions):
        reasons += _redundant_reason(placements, served, questions[0])
    return reasons


def _redundant_reason(
    placements: _Placements, served: _Served, question: Question
) -> list[str]:
    """Estimate what a further slot per rank is worth, where balance is far from even."""
    topology = question.topology
    number = topology.num_ranks
    before = served.imbalance(placements.even)
    if before <= _FAR_FROM_EVEN or number == 1:
        return []
    loads = [counts.astype(np.float64) for counts in placements.affinity.load]
    more = question.redundant_experts + number
    asked = Balancing(
        num_ranks=number, num_nodes=topology.num_nodes, redundant_experts=more
    )
    found = balance_loads(loads, asked)
    return [
        f"the busiest rank has {before:.3f} of the mean load under eplb, and with one more "
        f"slot per rank about {served.imbalance(found.placement):.3f}: "
        f"--redundant-experts {more}"
    ]
