"""Advice: whether placing experts pays for this traffic, engine and hardware."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.placement.reference import contiguous
from placer.placement.solver_report import SolverReport
from placer.planning.advised_plans import (
    BALANCED,
    Relief,
    balanced_options,
    judging_command,
    solve_command,
    weighing_command,
    with_more_replicas,
)
from placer.planning.engine_options import split_groups_of, whole_groups
from placer.planning.question import Question, filling_reason, loadable
from placer.planning.verdict import grouped
from placer.run.progress import Progress
from placer.serving.homes import Batching
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.cost import BreakEven
from placer.solver.balance.load_balance import predicted_imbalance
from placer.solver.options import SolveOptions
from placer.solver.solve import solve

Verdict = Literal[
    "not worth it",
    "EPLB does as well",
    "less traffic, busier rank",
    "balance only",
    "worth it",
]
#: Verdicts by what there is to gain, ascending.
RANKED: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement on the held-out sequences, in batches of one size.

    Attributes
    ----------
    load_imbalance
        Max/mean rank load, mean over layers; ``None`` where there are batches.
    tokens_per_rank
        The batches, or ``None`` where there are no tokens to draw.
    sent_per_token
        What the engine dispatches per token and layer, or ``None`` where placements do not
        differ in it.
    straggler
        Max/mean rank load in each batch, mean over batches and layers.
    time_us, overlapped_us
        Predicted microseconds of a layer, and with two-batch overlap; ``None`` without
        hardware.
    """

    load_imbalance: float | None = None
    tokens_per_rank: int | None = None
    sent_per_token: float | None = None
    straggler: float | None = None
    time_us: float | None = None
    overlapped_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer for one engine in one phase.

    Attributes
    ----------
    engine, phase
        Name and phase; ``None`` where only loads are known.
    best
        Name of the candidate that gains most: what the verdict is about.
    question, options
        What was asked, and what the best candidate is solved for.
    verdict
        That of the size of batches, and of the way of overlapping, with the least to gain.
    sentence
        The phase, the verdict and its figures, in words.
    candidates
        By name: ``contiguous``, ``eplb`` and those of ``advised_plans``; one for each size
        of batches.
    break_even
        For which bandwidth the best candidate is faster than contiguous, for each size.
    """

    engine: str | None
    phase: Batching | None
    best: str
    question: Question
    options: SolveOptions
    verdict: Verdict
    sentence: str
    candidates: Mapping[str, tuple[Candidate, ...]]
    break_even: tuple[BreakEven, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "engine": self.engine,
            "phase": self.phase,
            "verdict": self.verdict,
            "best": self.best,
            "sentence": self.sentence,
            "candidates": {n: [asdict(c) for c in f] for n, f in self.candidates.items()},
            "break_even": [one.to_json() for one in self.break_even],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answers.

    Attributes
    ----------
    answers
        One for each engine and phase.
    reasons
        What holds for all, one sentence each.
    warnings
        What limits the figures.
    redundant_experts
        Slots per layer beyond one for each expert, where only they fill the ranks.
    relief
        What further redundant experts gain where nothing else does; else ``None``.
    """

    answers: tuple[Answer, ...]
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    redundant_experts: int = 0
    relief: Relief | None = None

    @property
    def best(self) -> Answer:
        """The first answer with the most to gain."""
        return max(self.answers, key=lambda one: RANKED.index(one.verdict))

    @property
    def verdict(self) -> Verdict:
        """The verdict of the best answer."""
        return self.best.verdict

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "verdict": self.verdict,
            "answers": [one.to_json() for one in self.answers],
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "redundant_experts": self.redundant_experts,
        }


def advise_on_loads(
    affinity: Affinity,
    questions: Sequence[Question],
    source: Path,
    progress: Progress | None = None,
) -> Advice:
    """Advise from counts: whether balancing pays, judged by loads only.

    ``questions`` differ only in the engine: it says which replica of an expert serves.
    ``source`` is the file of the counts, which commands name. ``progress`` gets each
    engine.

    Raises
    ------
    UsageError
        If tokens are to be selected, or no engine can load a plan of the model.
    """
    phase = questions[0].phase
    if phase is not None:
        raise UsageError(
            f"--phase {phase} needs a trace: an affinity file holds counts, and its tokens "
            "can no longer be selected",
            f"select when counting: placer affinity TRACE --phase {phase} --out AFFINITY",
        )
    asked, left_out = loadable(questions, affinity.model)
    balanced = _Balanced(affinity)
    found = []
    for number, one in enumerate(asked, 1):
        if progress is not None:
            progress(f"{number} of {len(asked)}: {one.served.name}")
        found.append(_loads_answer(balanced, one))
    answers = tuple(answer for answer, _ in found)
    relieved = [one for _, one in found if one is not None]
    unknown = [
        unknown_dense_layers(balanced.plan(one.options), choice, one.question.layer_ids)
        for one in answers
        if (choice := one.question.replica_choice)
    ]
    warnings = (
        *left_out,
        *(one.node_doubt for one in asked),
        *unknown,
        "no sequences were held out: the plan is made from the same counts, and future "
        "load will be less even",
    )
    filling = filling_reason(asked[0], affinity.model)
    advice = Advice(
        answers=answers,
        reasons=(
            *([] if filling is None else [filling]),
            "counts without tokens do not show how much traffic placement can save",
            *_group_reasons(balanced, answers),
            *_relief_reasons(relieved, source),
        ),
        redundant_experts=asked[0].redundant_experts,
        warnings=tuple(dict.fromkeys(text for text in warnings if text is not None)),
    )
    only = advice.verdict == "not worth it"
    return replace(advice, relief=relieved[0]) if relieved and only else advice


class _Balanced:
    """Placements that balance some loads, each made once."""

    def __init__(self, affinity: Affinity) -> None:
        self.affinity = affinity
        self._loads = [counts.astype(np.float64) for counts in affinity.load]
        self._made: dict[SolveOptions, tuple[Placement, SolverReport]] = {}

    def solved(self, options: SolveOptions) -> tuple[Placement, SolverReport]:
        """Return the placement for some options, and its report."""
        if options not in self._made:
            self._made[options] = solve(self.affinity, options)
        return self._made[options]

    def plan(self, options: SolveOptions) -> Placement:
        """Return the placement for some options."""
        return self.solved(options)[0]

    def imbalance(self, placement: Placement, question: Question) -> float:
        """Return the max/mean rank load to expect, mean over layers."""
        choice, layer_ids = question.replica_choice or "hash", question.layer_ids
        by_layer = predicted_imbalance(placement, self._loads, choice, layer_ids)
        return float(np.mean(by_layer))


def _group_reasons(balanced: _Balanced, answers: Sequence[Answer]) -> list[str]:
    """Return what router groups do to each plan, once for the engines that share it."""
    told = []
    for one in answers:
        placement, report = balanced.solved(one.options)
        engine, preserved = one.question.known_engine, one.options.start.preserve_groups
        said = whole_groups(report, preserved=preserved) or split_groups_of(
            balanced.affinity.model, placement, engine, one.question.policy
        )
        if said is not None:
            told.append((one.engine, said))
    return [
        f"{', '.join(names)}{': ' if names else ''}{said}" for names, said in grouped(told)
    ]


def _relief_reasons(relieved: Sequence[Relief], source: Path) -> list[str]:
    """Return each sentence once, with its engines and the command of the first."""
    commands: dict[str, str] = {}
    for one in relieved:
        commands.setdefault(one.sentence, one.command(source))
    told = grouped(
        (engine.name if (engine := one.question.engine) else None, one.sentence)
        for one in relieved
    )
    return [
        f"{', '.join(names)}{': ' if names else ''}{sentence}: {commands[sentence]}"
        for names, sentence in told
    ]


def _loads_answer(balanced: _Balanced, question: Question) -> tuple[Answer, Relief | None]:
    model, topology = balanced.affinity.model, question.topology
    options = balanced_options(question, model)
    base = contiguous(
        model.num_experts,
        topology.num_ranks,
        topology.num_nodes,
        question.redundant_experts,
    )
    before = balanced.imbalance(base, question)
    after = balanced.imbalance(balanced.plan(options), question)
    verdict: Verdict = "not worth it"
    if 1 - after / before >= question.least_gain:
        verdict = "balance only"
    relief = _relief(balanced, question, min(before, after))
    alone = verdict == "not worth it" and relief is not None
    answer = Answer(
        engine=None if question.engine is None else question.engine.name,
        phase=None,
        best=BALANCED,
        question=question,
        options=options,
        verdict=verdict,
        sentence=f"{verdict}{' without redundant experts' * alone}: busiest rank's load "
        f"{100 * (after / before - 1):+.1f} % ({before:.3f} to {after:.3f} of the mean)",
        candidates={
            "contiguous": (Candidate(load_imbalance=before),),
            BALANCED: (Candidate(load_imbalance=after),),
        },
    )
    return answer, relief


def _relief(balanced: _Balanced, question: Question, without: float) -> Relief | None:
    """Return what one further slot per rank gains, where that is enough."""
    model = balanced.affinity.model
    asked = with_more_replicas(question, model, without)
    if asked is None:
        return None
    options = balanced_options(asked, model)
    reached = balanced.imbalance(balanced.plan(options), asked)
    found = Relief(question=asked, options=options, imbalance=reached, without=without)
    return found if found.is_enough else None


def next_command(advice: Advice, source: Path, options: Sequence[str] = ()) -> str | None:
    """Return the command that makes the best answer's plan, or ``None``: none is needed.

    Where less traffic is bought with a busier rank, that which weighs both: advice with
    hardware. ``options`` are those of the batches and of the least gain, for the latter.
    """
    if advice.relief is not None:
        return advice.relief.command(source)
    best = advice.best
    if best.verdict in ("not worth it", "EPLB does as well"):
        return None  # the engine's own EPLB needs no plan
    if best.verdict == "less traffic, busier rank":
        return weighing_command(best.question, source, options)
    return solve_command(best.question, best.options, source)


def timing_command(advice: Advice, source: Path, options: Sequence[str]) -> str | None:
    """Return the command that predicts times of the plan of :func:`next_command`.

    ``options`` as :func:`judging_command` takes them. ``None`` where there is no such plan.
    """
    if next_command(advice, source) is None:
        return None
    return judging_command((advice.relief or advice.best).question, source, options)
