"""Advice from recorded tokens.

A quick plan and EPLB's placement are made from half of the sequences and judged on the
other half, compared with the contiguous placement that engines start with: per engine, in
batches of each size that it is run for.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from placer.affinity import count_affinity
from placer.baseline import BaselineProblem
from placer.baseline.eplb import eplb
from placer.intervals import FEWEST_SEQUENCES
from placer.placement.placement import Placement
from placer.placement.reference import contiguous
from placer.planning.advice import RANKED, Advice, Answer, Candidate, Verdict
from placer.planning.advised_plans import (
    BALANCED,
    PROFILE,
    Relief,
    advised_plans,
    balanced_options,
    with_more_replicas,
)
from placer.planning.phases import no_batch_for, phase_warning, sizes_warning
from placer.planning.question import Question, filling_reason, loadable
from placer.planning.verdict import grouped
from placer.run.progress import Progress
from placer.run.session import Session
from placer.serving.homes import Batching, BatchShape
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.batch_figures import (
    BatchFigures,
    ServedBatches,
    break_evens,
    filled_warning,
    full_batches_note,
)
from placer.simulation.sent import NODE_COPIES
from placer.solver.options import SolveOptions
from placer.solver.solve import solve_to_choose
from placer.target.engine import PHASES
from placer.trace import Chunk, Selection, Trace
from placer.trace.doubts import doubtful_follow, doubts

MOST_JUDGED_TOKENS = 65_536
_TIMES = ("time_us", "overlapped_us")


def advise_on_trace(
    trace: Trace, questions: Sequence[Question], progress: Progress | None = None
) -> Advice:
    """Advise from recorded tokens.

    ``questions`` differ only in the engine and the size of an expert. ``progress`` gets
    each engine and phase.

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
    num_ranks = first.topology.num_ranks
    selection = Selection(PROFILE, first.phase)
    profile, heldout = trace.read(selection), trace.read(selection.complement())
    heldout = heldout.first_sequences(MOST_JUDGED_TOKENS)
    placements = _Placements(trace, profile, first)
    served = _Served(heldout)
    answers = []
    parts = [
        (question, phase)
        for question, phase in product(asked, PHASES)
        if any(shape.batching == phase for shape in question.answered)
    ]
    for number, (question, phase) in enumerate(parts, 1):
        if progress is not None:
            progress(f"{number} of {len(parts)}: {question.served.name}, {phase}")
        answers.append(_answer(question, phase, placements, served))
    advice = Advice(answers=tuple(answers), redundant_experts=first.redundant_experts)
    number = len(np.unique(heldout.sequence_ids))
    few = f"{number} held-out sequences are too few to trust: {FEWEST_SEQUENCES} are needed"
    shapes = dict.fromkeys(shape for one in asked for shape in one.answered)
    batchings = [shape.batching for shape in shapes]
    assumed = [one.expert.assumption for one in asked if one.expert and one.hardware]
    even = placements.references["eplb"]
    unknown = (
        unknown_dense_layers(even, one.replica_choice, one.layer_ids) for one in asked
    )
    warnings = (
        *left_out,
        *(one.node_doubt for one in asked),
        *unknown,
        phase_warning(trace, Selection(phase=first.phase), batchings),
        sizes_warning([one.engine for one in asked], first.shapes),
        *doubts(trace, Selection(phase=first.phase)),
        *doubtful_follow(trace, first.policy),
        few if number < FEWEST_SEQUENCES else None,
        filled_warning(tuple(shapes), heldout.num_tokens, num_ranks),
        *assumed,
    )
    reasons = _reasons(asked, placements)
    judged = full_batches_note(tuple(shapes), heldout.num_tokens, num_ranks)
    if judged is not None:
        reasons.append(judged)
    relief = _relief(advice.best, placements, served)
    if relief is not None:
        reasons.append(f"{relief.sentence}: {relief.command(trace.directory)}")
    only = advice.verdict == "not worth it"
    return replace(
        advice,
        reasons=tuple(reasons),
        relief=relief if only else None,
        warnings=tuple(dict.fromkeys(text for text in warnings if text is not None)),
    )


class _Placements:
    """Contiguous, EPLB's, and quick plans for what engines send, made when asked for."""

    def __init__(self, trace: Trace, profile: Chunk, question: Question) -> None:
        self.model = trace.model
        self._affinity = count_affinity([profile], trace.model, {})
        self._profile = profile
        topology, more = question.topology, question.redundant_experts
        problem = BaselineProblem(
            trace=trace,
            selection=Selection(PROFILE, question.phase),
            topology=topology,
            redundant_experts=more,
        )
        self.references = {
            "contiguous": contiguous(
                trace.model.num_experts, topology.num_ranks, topology.num_nodes, more
            ),
            "eplb": eplb(problem),
        }
        self._made: dict[SolveOptions, Placement] = {}

    def plan(self, options: SolveOptions) -> Placement:
        """Return the quick plan for some options."""
        if options not in self._made:
            found = solve_to_choose(self._affinity, options, self._profile, Session())[0]
            self._made[options] = found
        return self._made[options]


class _Served:
    """Held-out tokens served from placements; nothing is counted twice."""

    def __init__(self, tokens: Chunk) -> None:
        self.tokens = tokens
        self._batches = ServedBatches(tokens)

    def figures(
        self, key: Hashable, placement: Placement, shape: BatchShape, question: Question
    ) -> BatchFigures:
        """Return what a placement does in batches of one shape."""
        options, cost = question.batch_options(), question.cost_model()
        return self._batches.figures(key, placement, shape, options, cost)


def _answer(
    question: Question, phase: Batching, placements: _Placements, served: _Served
) -> Answer:
    shapes = [one for one in question.answered if one.batching == phase]
    plans = advised_plans(question, placements.model)
    made: dict[str, tuple[Hashable, Placement]] = {
        name: (name, placement) for name, placement in placements.references.items()
    }
    made |= {name: (options, placements.plan(options)) for name, options in plans.items()}
    figures = {
        name: [served.figures(key, placement, shape, question) for shape in shapes]
        for name, (key, placement) in made.items()
    }
    candidates = {
        name: tuple(_candidate(one, question) for one in every)
        for name, every in figures.items()
    }
    gains = _Gains(question=question, candidates=candidates)
    best = gains.best(list(plans))
    by_size = [gains.verdicts(best, n) for n in range(len(shapes))]
    verdict = min((one for found in by_size for one in found), key=RANKED.index)
    return Answer(
        engine=question.served.name,
        phase=phase,
        best=best,
        question=question,
        options=plans[best],
        verdict=verdict,
        sentence=f"{phase}: {_verdict_words(by_size, shapes)}. Plan "
        f'"{best}" {gains.words(best)}',
        candidates=candidates,
        break_even=break_evens(figures[best], figures["contiguous"], question.cost_model()),
    )


def _candidate(found: BatchFigures, question: Question) -> Candidate:
    metrics, time, sent = found.metrics, found.time, question.sent
    fast = 0 if sent == NODE_COPIES else metrics.dispatch_fast_copies_per_token
    return Candidate(
        tokens_per_rank=found.shape.tokens_per_rank,
        sent_per_token=None
        if sent is None
        else fast + metrics.dispatch_slow_copies_per_token,
        straggler=metrics.straggler_mean,
        time_us=None if time is None else time.total * 1e6,
        overlapped_us=None if time is None else time.overlapped * 1e6,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gains:
    """What candidates save of contiguous: shares, negative where they cost more."""

    question: Question
    candidates: Mapping[str, tuple[Candidate, ...]]

    def of(self, name: str, field: str, beside: str = "contiguous") -> list[float]:
        """Return what a candidate saves of a field, for each size of batches."""
        both = zip(self.candidates[name], self.candidates[beside], strict=True)
        values = ((getattr(one, field), getattr(base, field)) for one, base in both)
        return [1 - now / then if then else 0.0 for now, then in values]

    def best(self, plans: Sequence[str]) -> str:
        """Return the plan that saves most; a later one only where it saves enough more.

        Of predicted time, else of what is sent, else of the busiest rank's load.
        """
        least = self.question.least_gain
        if self.question.hardware is not None:
            times = {name: self._mean(name, *_TIMES) for name in plans}
            return _first_of_most(times, least / 3)
        placed = [name for name in plans if name != BALANCED]
        sent = {name: self._mean(name, "sent_per_token") for name in placed}
        less = {name: saved for name, saved in sent.items() if saved >= least}
        beside = {name: self.of(name, "straggler", "eplb") for name in less}
        calm = [name for name in less if not self._is_busier(*beside[name])]
        # Of plans that are all busier, the first is the least so.
        if chosen := calm or list(less)[:1]:
            return _first_of_most({name: less[name] for name in chosen}, least)
        return _first_of_most({n: self._mean(n, "straggler") for n in plans}, least)

    def verdicts(self, name: str, place: int) -> tuple[Verdict, ...]:
        """Return the verdict on a plan in batches of one size: one for each way in time."""
        found: Verdict = "balance only" if name == BALANCED else "worth it"
        if self.question.hardware is not None:
            return tuple(self._saves(name, way, place, found) for way in _TIMES)
        if name != BALANCED:
            is_busier = self._is_busier(self.of(name, "straggler", "eplb")[place])
            less: Verdict = "less traffic, busier rank" if is_busier else "worth it"
            found = self._saves(name, "sent_per_token", place, less)
            if found != "not worth it":
                return (found,)
        return (self._saves(name, "straggler", place, "balance only"),)

    def _saves(self, name: str, field: str, place: int, gained: Verdict) -> Verdict:
        """Return the verdict of a field: ``gained`` only where EPLB saves less of it."""
        if self.of(name, field)[place] < self.question.least_gain:
            return "not worth it"
        return gained if self.of(name, field, "eplb")[place] > 0 else "EPLB does as well"

    def _is_busier(self, *saved: float) -> bool:
        """Return whether the busiest rank has clearly more load than EPLB's.

        Clearly is by the smallest saving that counts: less of it would save nothing either.
        """
        return -float(np.mean(saved)) > self.question.least_gain

    def words(self, name: str) -> str:
        """Say what changes from contiguous to a plan, and from EPLB's placement."""
        fields = {"straggler": "load of a batch's busiest rank"}
        if self.question.hardware is not None:
            fields = {"time_us": "layer", "overlapped_us": "overlapped"}
        elif self.question.sent is not None:
            fields = {"sent_per_token": self.question.sent.words, **fields}
        return "; ".join(
            f"compared with {beside}: "
            + ", ".join(
                f"{what} {percents(self.of(name, field, beside))}"
                for field, what in fields.items()
            )
            for beside in ("contiguous", "eplb")
            if beside in self.candidates
        )

    def _mean(self, name: str, *fields: str) -> float:
        return float(np.mean([self.of(name, field) for field in fields]))


def _first_of_most(gains: Mapping[str, float], step: float) -> str:
    """Return the name with the most to gain; a later one must gain a ``step`` more."""
    names = iter(gains)
    best = next(names)
    for name in names:
        if gains[name] >= gains[best] + step:
            best = name
    return best


def percents(gains: Sequence[float]) -> str:
    """Return what is saved as changes, once where all are alike.

    >>> percents([0.2, 0.1])
    '-20.0 / -10.0 %'
    """
    told = dict.fromkeys(f"{-100 * gain:+.1f}" for gain in gains)
    return (
        f"{' / '.join(told if len(told) == 1 else [f'{-100 * g:+.1f}' for g in gains])} %"
    )


def _verdict_words(
    by_size: Sequence[tuple[Verdict, ...]], shapes: Sequence[BatchShape]
) -> str:
    """Return one verdict where all agree, else which holds where."""
    told = []
    for found in by_size:
        alike = len(set(found)) == 1
        told.append(found[0] if alike else f"{found[0]}, {found[1]} with two-batch overlap")
    if len(set(told)) == 1:
        return told[0]
    return "; ".join(
        f"at {shape.tokens_per_rank:,} {words}"
        for shape, words in zip(shapes, told, strict=True)
    )


def _reasons(asked: Sequence[Question], placements: _Placements) -> list[str]:
    reasons = [
        f"{', '.join(names)}: {reason}"
        for names, reason in grouped(
            (one.served.name, one.effect.reason)
            for one in asked
            if list(advised_plans(one, placements.model)) == [BALANCED]
        )
    ]
    if asked[0].topology.num_ranks == 1:
        reasons = ["with one rank nothing is sent"]
    if (filling := filling_reason(asked[0], placements.model)) is not None:
        reasons.append(filling)
    least = f"{100 * asked[0].least_gain:g} %"
    if asked[0].hardware is None:
        reasons.append(
            f"worth it: sends at least {least} less than contiguous, and less than EPLB; "
            f"the busiest rank has at most {least} more load than EPLB's. If it has "
            "more: give --hardware to decide by predicted time. balance only: the busiest "
            f"rank's load is at least {least} below contiguous's, and below EPLB's"
        )
    else:
        reasons.append(
            f"worth it, balance only: at least {least} less predicted time than "
            "contiguous, and less than EPLB"
        )
    return reasons


def _relief(advised: Answer, placements: _Placements, served: _Served) -> Relief | None:
    """Return what one further slot per rank gains, where that is worth a word."""
    question, model = advised.question, placements.model
    least = min(_mean_straggler(found) for found in advised.candidates.values())
    asked = with_more_replicas(question, model, least)
    if asked is None:
        return None
    options = balanced_options(asked, model)
    placement = placements.plan(options)
    shapes = [one for one in question.answered if one.batching == advised.phase]
    figures = [served.figures(options, placement, shape, asked) for shape in shapes]
    reached = _mean_straggler([_candidate(one, asked) for one in figures])
    found = Relief(question=asked, options=options, imbalance=reached, without=least)
    return found if found.is_enough else None


def _mean_straggler(found: Sequence[Candidate]) -> float:
    return float(np.mean([one.straggler or 0.0 for one in found]))
