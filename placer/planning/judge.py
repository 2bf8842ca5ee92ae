"""Simulating a plan file and baselines on a trace."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.intervals import FEWEST_SEQUENCES, CopiesRatio, copies_ratio
from placer.model import require_same_model
from placer.placement import Placement, Plan
from placer.planning.baseline_placements import baseline_placements
from placer.planning.phases import answered, no_batch_for, phase_warning, sizes_warning
from placer.planning.profile import (
    is_of_unknown_tokens,
    layer_ids_of,
    num_seen_sequences,
    other_phase,
    profile_of,
)
from placer.planning.tables import read_table_of
from placer.run.progress import Progress, Steps
from placer.serving.homes import BatchShape, batch_shapes
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.batch_figures import (
    BatchFigures,
    BatchOptions,
    ServedBatches,
    break_evens,
    filled_warning,
)
from placer.simulation.cost import BreakEven, ExpertShape, cost_model, slowest_link
from placer.simulation.metrics import PolicyMetrics, PolicyTally
from placer.simulation.sent import NODE_COPIES, PAIRS, RANK_COPIES, Sent, Wire
from placer.simulation.simulate import count
from placer.table.table import Table
from placer.target.engine import Engine, ReplicaChoice
from placer.target.hardware import Hardware
from placer.trace import EVERYTHING, Selection, StoredTokens, Trace
from placer.trace.doubts import doubtful_follow

PLAN = "plan"
Figures = Mapping[str, PolicyMetrics]
Tallies = Mapping[str, PolicyTally]
BatchTable = Mapping[str, tuple[BatchFigures, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How the tokens are served.

    Attributes
    ----------
    engine
        What is sent, and in which element; without one, what the plan was solved for, in
        bf16.
    replica_choice
        Which replica of an expert serves; ``None`` where each has one.
    hardware, expert
        What the cost model needs; without hardware no time is predicted.
    hidden_size
        Width of the hidden state, where neither trace, plan nor ``expert`` says it.
    """

    engine: Engine | None = None
    replica_choice: ReplicaChoice | None = None
    hardware: Hardware | None = None
    expert: ExpertShape | None = None
    hidden_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A plan and its baselines on the same tokens, served in one way.

    Attributes
    ----------
    policies
        The plan's metrics by home policy.
    baselines
        Metrics by name of the baseline and home policy.
    num_tokens, num_sequences, num_layers, top_k
        What was simulated.
    num_ranks
        Ranks of the plan.
    hidden_size
        Width of the hidden state, or ``None`` where the trace does not know.
    policy
        The home policy under which batches are served: what the plan was solved for, or
        ``fixed`` where that needs a table.
    sent_policy
        The home policy of the plan's own side of ``ratios``: with a table, what the plan
        was solved for; else ``policy``.
    batches
        By name of the placement, ``plan`` last: figures in batches of each shape.
    sent
        What the engine sends, and placements change under ``sent_policy``; ``None`` where
        they change nothing.
    ratios
        By baseline: what the plan sends under ``sent_policy`` over what the baseline sends
        under ``policy``.
    break_even
        By baseline, for each of ``batches``: for which bandwidth the plan is faster.
    serving, wire
        How the tokens are served, and what crosses the wire.
    warnings
        What limits the figures.
    """

    policies: Figures
    baselines: Mapping[str, Figures]
    num_tokens: int
    num_sequences: int
    num_layers: int
    top_k: int
    num_ranks: int
    hidden_size: int | None
    policy: str
    sent_policy: str
    batches: BatchTable
    sent: Sent | None
    ratios: Mapping[str, CopiesRatio]
    break_even: Mapping[str, tuple[BreakEven, ...]]
    serving: Serving
    wire: Wire
    warnings: tuple[str, ...]

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """The batches that were served."""
        return tuple(one.shape for one in self.batches[PLAN])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer simulate --json``."""
        return {
            "policies": _figures_json(self.policies),
            "baselines": {name: _figures_json(f) for name, f in self.baselines.items()},
            "tokens": self.num_tokens,
            "layers": self.num_layers,
            "top_k": self.top_k,
            "sequences": self.num_sequences,
            "replica_choice": self.serving.replica_choice,
            "engine": None if self.serving.engine is None else self.serving.engine.name,
            "policy": self.policy,
            "sent_policy": self.sent_policy,
            "bandwidth_gb_per_s": self._bandwidth(),
            "batches": {
                name: [one.to_json() for one in figures]
                for name, figures in self.batches.items()
            },
            "bytes_per_token": self.bytes_per_token(),
            "sent": None if self.sent is None else self.sent.metric,
            "sent_ratio": {name: one.to_json() for name, one in self.ratios.items()},
            "break_even": {
                name: [
                    dataclasses.asdict(shape) | one.to_json()
                    for shape, one in zip(self.shapes, found, strict=True)
                ]
                for name, found in self.break_even.items()
            },
            "warnings": list(self.warnings),
        }

    def _bandwidth(self) -> float | None:
        """Return GB/s of the link that break-evens are of, where hardware is named."""
        hardware = self.serving.hardware
        if hardware is None:
            return None
        return round(slowest_link(hardware, self.wire.num_nodes).bandwidth / 1e9, 3)

    def bytes_per_token(self) -> dict[str, dict[str, float]] | None:
        """Return bytes per token and layer: by placement, then way and link class.

        Of the largest batches; ``None`` where the hidden size is not known.
        """
        if self.hidden_size is None:
            return None
        ways = (self.wire.dispatch, self.wire.combine)
        sizes = [way.copy_bytes(self.hidden_size) for way in ways]
        return {
            name: {
                f"{way}_{link}": round(
                    size * getattr(figures[-1].metrics, f"{way}_{link}_copies_per_token"),
                    1,
                )
                for way, size in zip(("dispatch", "combine"), sizes, strict=True)
                for link in ("fast", "slow")
            }
            for name, figures in self.batches.items()
        }


def judge_plan(
    plan_path: Path,
    trace: Trace,
    *,
    selection: Selection = EVERYTHING,
    table_path: Path | None = None,
    shapes: Sequence[BatchShape] | None = None,
    baselines: Sequence[str] | None = None,
    servings: Sequence[Serving] = (Serving(),),
    progress: Progress | None = None,
) -> tuple[Judgement, ...]:
    """Simulate a plan and baselines on the tokens selected, served in each way.

    ``progress`` gets a line for each step.

    Baselines see the plan's own profile where it is of this trace, else all tokens of
    the phase that is judged. An engine that is run for none of the batches gets no
    judgement.

    Raises
    ------
    PlacerError
        If plan and trace are of different models, or the table is of another plan.
    UsageError
        If a baseline is unknown, no engine is run for any of the batches, the size of
        an expert is needed and not known, or the table is of another tokenizer.
    """
    plan = Plan.read(plan_path)
    shapes = batch_shapes() if shapes is None else shapes
    asked = [one for one in servings if answered(one.engine, shapes)]
    if not asked:
        engines = [one.engine for one in servings if one.engine is not None]
        raise no_batch_for(engines, shapes)
    matched = require_same_model(
        plan.model, str(plan_path), trace.model, str(trace.directory)
    )
    table, assumed = read_table_of(table_path, plan_path, trace)
    if progress is not None:
        progress("read the tokens and place the baselines")
    tokens = StoredTokens.of(trace, selection)
    compared, missing = baseline_placements(plan, trace, selection, baselines)
    placements = {**compared, PLAN: plan.placement}
    passes = sum(1 + len(answered(one.engine, shapes)) for one in asked)
    steps = Steps(tell=progress, total=passes * len(placements))
    judge = _Judge(plan, trace, tokens, placements, table, steps, keep=len(asked) > 1)
    served = {shape for one in asked for shape in answered(one.engine, shapes)}
    warnings = (
        matched,
        assumed,
        *missing,
        other_phase(plan, selection),
        phase_warning(trace, selection, [shape.batching for shape in served]),
        sizes_warning([one.engine for one in asked], shapes),
        *doubtful_follow(trace, plan.policy),
        *_warnings(plan, trace, tokens, table),
    )
    return tuple(
        judge.judgement(
            one,
            answered(one.engine, shapes),
            tuple(text for text in warnings if text is not None),
        )
        for one in asked
    )


def _warnings(
    plan: Plan, trace: Trace, tokens: StoredTokens, table: Table | None
) -> tuple[str | None, ...]:
    """Return what limits the figures, whatever serves."""
    num_sequences = len(np.unique(tokens.sequence_ids))
    seen = num_seen_sequences(plan, trace, tokens.sequence_ids)
    return (
        _seen_by_plan(plan, trace, seen, num_sequences),
        _seen_by_table(table, trace, tokens, at_least=seen + 1),
        f"{num_sequences} sequences are too few for an interval or a verdict: "
        f"{FEWEST_SEQUENCES} are needed"
        if num_sequences < FEWEST_SEQUENCES
        else None,
        f"the plan was solved for {plan.policy}, which needs the plan's table: --table "
        "TABLE (placer tables --help)"
        if table is None and plan.policy != plan.policy_without_table
        else None,
        "the trace has no token ids, so the table cannot be used"
        if table is not None and tokens.token_ids is None
        else None,
    )


def _seen_by_plan(plan: Plan, trace: Trace, seen: int, num_sequences: int) -> str | None:
    """Say how many of the sequences a plan was solved on, as far as it is known."""
    if seen == 0:
        return None
    if is_of_unknown_tokens(plan):
        return (
            "the plan does not record which tokens it was made from. If these sequences "
            "are among them, the figures are too good"
        )
    return (
        f"{seen} of the {num_sequences} sequences are in the plan's profile, so the "
        f"figures are too good: {_remedy(profile_of(plan, trace))}"
    )


class _Judge:
    """Placements on the same tokens; nothing is counted twice for several engines."""

    def __init__(
        self,
        plan: Plan,
        trace: Trace,
        tokens: StoredTokens,
        placements: Mapping[str, Placement],
        table: Table | None,
        steps: Steps,
        *,
        keep: bool,
    ) -> None:
        self.plan = plan
        self.trace = trace
        self.tokens = tokens
        self.placements = placements
        self.table = table
        self.steps = steps
        self.layer_ids = layer_ids_of(plan, trace.model)
        self._run_starts = _run_starts(tokens)
        self._tallies: dict[tuple[str, ReplicaChoice | None], _Counted] = {}
        self._batches = ServedBatches(tokens, keep=keep)

    def judgement(
        self, serving: Serving, shapes: Sequence[BatchShape], warnings: Sequence[str]
    ) -> Judgement:
        """Serve all placements in one way."""
        plan, tokens = self.plan, self.tokens
        wire = Wire.of(plan, serving.engine, serving.replica_choice)
        cost = cost_model(
            serving.hardware, serving.expert, wire.dispatch, wire.combine, wire.num_nodes
        )
        policy = plan.policy_without_table
        options = BatchOptions(
            policy=policy,
            exchanges=(wire.dispatch.exchange, wire.combine.exchange),
            replica_choice=serving.replica_choice,
            layer_ids=self.layer_ids,
        )
        batches = {
            name: tuple(
                self._batches.figures(name, placement, shape, options, cost)
                for shape in self.steps.each(shapes, _in_batches(name))
            )
            for name, placement in self.placements.items()
        }
        tallies = {
            name: self._counted(name, serving.replica_choice)
            for name in self.steps.each(self.placements, str)
        }
        placed = plan.placement
        shape = placed.num_nodes, placed.ranks_per_node
        own_warnings = (
            None if serving.engine is None else serving.engine.doubt(*shape),
            unknown_dense_layers(plan.placement, serving.replica_choice, self.layer_ids),
            filled_warning(shapes, tokens.num_tokens, plan.placement.num_ranks),
            None if cost is None else cost.expert.assumption,
        )
        sent_policy = policy if self.table is None else plan.policy
        sent = wire.compared(sent_policy)
        return Judgement(
            policies=tallies[PLAN].figures,
            baselines={name: one.figures for name, one in tallies.items() if name != PLAN},
            num_tokens=tokens.num_tokens,
            num_sequences=len(np.unique(tokens.sequence_ids)),
            num_layers=plan.model.num_layers,
            top_k=self.trace.model.top_k,
            num_ranks=plan.placement.num_ranks,
            hidden_size=self.trace.model.hidden_size
            or plan.model.hidden_size
            or (None if serving.expert is None else serving.expert.hidden_size)
            or serving.hidden_size,
            policy=policy,
            sent_policy=sent_policy,
            batches=batches,
            sent=sent,
            ratios=self._ratios(tallies, sent, sent_policy),
            break_even={
                name: break_evens(batches[PLAN], figures, cost)
                for name, figures in batches.items()
                if name != PLAN and cost is not None
            },
            serving=serving,
            wire=wire,
            warnings=(
                *warnings,
                *(text for text in own_warnings if text is not None),
            ),
        )

    def _counted(self, name: str, choice: ReplicaChoice | None) -> "_Counted":
        if (name, choice) not in self._tallies:
            tallies = count(
                self.placements[name],
                self.tokens,
                table=self.table if name == PLAN else None,
                replica_choice=choice,
                layer_ids=self.layer_ids,
            )
            self._tallies[name, choice] = _Counted.of(tallies, self._run_starts)
        return self._tallies[name, choice]

    def _ratios(
        self, tallies: Mapping[str, "_Counted"], sent: Sent | None, sent_policy: str
    ) -> dict[str, CopiesRatio]:
        """Relate what the plan sends to every baseline's; baselines have no table."""
        own, policy = tallies[PLAN], self.plan.policy_without_table
        if sent is None:
            return {}
        starts, domain_ids = self._run_starts, self.tokens.domain_ids
        found = {
            name: copies_ratio(
                own.sent[sent_policy, sent],
                others.sent[policy, sent],
                self.tokens.sequence_ids[starts],
                None if domain_ids is None else domain_ids[starts],
                self.trace.header.domains,
            )
            for name, others in tallies.items()
            if name != PLAN
        }
        return {name: one for name, one in found.items() if one is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """The metrics of a placement, and by home policy what each run of tokens sent.

    A run is of one sequence and one domain. ``sent`` holds ``[runs]`` int64.
    """

    figures: Figures
    sent: Mapping[tuple[str, Sent], IntArray]

    @classmethod
    def of(cls, tallies: Tallies, run_starts: IntArray) -> "_Counted":
        return cls(
            figures={policy: tally.metrics() for policy, tally in tallies.items()},
            sent={
                (policy, sent): np.add.reduceat(
                    sent.of_token(tally), run_starts, dtype=np.int64
                )
                for policy, tally in tallies.items()
                for sent in (PAIRS, RANK_COPIES, NODE_COPIES)
            },
        )


def _in_batches(name: str) -> Callable[[BatchShape], str]:
    return lambda shape: f"{name}, {shape.tokens_per_rank:,} tokens per rank"


def _run_starts(tokens: StoredTokens) -> IntArray:
    """Return the first token of every run of one sequence and one domain."""
    changes = np.ones(tokens.num_tokens, dtype=np.bool_)
    changes[1:] = tokens.sequence_ids[1:] != tokens.sequence_ids[:-1]
    if tokens.domain_ids is not None:
        changes[1:] |= tokens.domain_ids[1:] != tokens.domain_ids[:-1]
    return np.flatnonzero(changes)


def _seen_by_table(
    table: Table | None, trace: Trace, tokens: StoredTokens, *, at_least: int
) -> str | None:
    """Say how many of the sequences a table was built from, if so many."""
    if table is None:
        return None
    seen = num_seen_sequences(table, trace, tokens.sequence_ids)
    if seen < at_least:
        return None
    remedy = _remedy(profile_of(table, trace), "build the table")
    return (
        f"{seen} of the {len(np.unique(tokens.sequence_ids))} sequences are in the "
        f"table's profile, so the figures with the table are too good: {remedy}"
    )


def _remedy(profile: Selection | None, make: str = "solve") -> str:
    """Say how to simulate what the plan, or what else is made, has not seen."""
    if profile is None or profile.fold is None:
        return f"{make} with --fold 0/2, then simulate with --not-fold 0/2"
    return f"simulate with {profile.complement().options}"


def _figures_json(figures: Figures) -> dict[str, dict[str, float]]:
    return {policy: metrics.to_json() for policy, metrics in figures.items()}
