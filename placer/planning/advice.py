"""Advice: whether placing experts is worth it for this traffic, engine and hardware."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.placement.reference import contiguous
from placer.planning.advised_plans import BALANCED, balanced_options, solve_command
from placer.planning.question import Question, loadable
from placer.serving.homes import Batching
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.cost import BreakEven
from placer.solver.balance.load_balance import predicted_imbalance
from placer.solver.options import SolveOptions
from placer.solver.solve import solve

Verdict = Literal["not worth it", "balance only", "worth it"]
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
    """What holds for one engine in one phase.

    Attributes
    ----------
    engine, phase
        Name and phase; ``None`` where loads alone are known.
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
    """

    answers: tuple[Answer, ...]
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    redundant_experts: int = 0

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


def advise_on_loads(affinity: Affinity, questions: Sequence[Question]) -> Advice:
    """Advise from counts: whether balancing pays, as far as loads tell.

    ``questions`` differ in the engine alone: it says which replica of an expert serves.

    Raises
    ------
    UsageError
        If tokens are to be selected, or no engine can load a plan of the model.
    """
    phase = questions[0].phase
    if phase is not None:
        raise UsageError(
            f"--phase {phase}: an affinity file holds counts, of which no tokens "
            "can be selected any more",
            f"select when counting: placer affinity TRACE --phase {phase} --out AFFINITY",
        )
    asked, left_out = loadable(questions, affinity.model)
    plans = [(one, balanced_options(one, affinity.model)) for one in asked]
    made = {options: solve(affinity, options)[0] for _, options in plans}
    first = asked[0]
    unknown = [
        unknown_dense_layers(made[options], one.replica_choice, one.layer_ids)
        for one, options in plans
    ]
    warnings = (
        *left_out,
        *unknown,
        "nothing was held out: these are the counts that the plan is made from, and "
        "tomorrow's load is less even",
    )
    return Advice(
        answers=tuple(
            _loads_answer(affinity, one, options, made[options]) for one, options in plans
        ),
        reasons=("counts without tokens do not tell what placement would save in traffic",),
        redundant_experts=first.redundant_experts,
        warnings=tuple(dict.fromkeys(text for text in warnings if text is not None)),
    )


def _loads_answer(
    affinity: Affinity, question: Question, options: SolveOptions, even: Placement
) -> Answer:
    topology = question.topology
    base = contiguous(
        affinity.model.num_experts,
        topology.num_ranks,
        topology.num_nodes,
        question.redundant_experts,
    )
    loads = [counts.astype(np.float64) for counts in affinity.load]
    choice, layer_ids = question.replica_choice or "hash", question.layer_ids
    before, after = (
        float(np.mean(predicted_imbalance(one, loads, choice, layer_ids)))
        for one in (base, even)
    )
    gain = 1 - after / before
    verdict: Verdict = "balance only" if gain >= question.least_gain else "not worth it"
    return Answer(
        engine=None if question.engine is None else question.engine.name,
        phase=None,
        best=BALANCED,
        question=question,
        options=options,
        verdict=verdict,
        sentence=f"{verdict}: busiest rank's load {100 * (after / before - 1):+.1f} % "
        f"({before:.3f} to {after:.3f} of the mean)",
        candidates={
            "contiguous": (Candidate(load_imbalance=before),),
            BALANCED: (Candidate(load_imbalance=after),),
        },
    )


def next_command(advice: Advice, source: Path) -> str | None:
    """Return the command that makes the best answer's plan, or ``None``: not worth it."""
    best = advice.best
    if best.verdict == "not worth it":
        return None
    return solve_command(best.question, best.options, source)
