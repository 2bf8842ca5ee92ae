"""Simulating a plan file on a trace, beside the baselines."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.baseline import BASELINES, BaselineProblem
from placer.engine import Engine, Exchange, ReplicaChoice, Transfer
from placer.errors import PlacerError, UsageError
from placer.hardware import Hardware
from placer.model import require_same_model
from placer.plan import Placement, Plan
from placer.plan.plan import plan_sha256
from placer.plan.problem import Topology
from placer.simulation.batch_figures import (
    BatchFigures,
    BatchOptions,
    batch_figures,
    batch_sizes,
)
from placer.simulation.cost import BreakEven, CostModel, ExpertShape, break_even
from placer.simulation.homes import Phase
from placer.simulation.intervals import FEWEST_SEQUENCES, CopiesRatio, copies_ratio
from placer.simulation.metrics import PolicyMetrics, PolicyTally
from placer.simulation.profile import num_seen_sequences, other_phase, profile_of
from placer.simulation.replica_choice import unknown_dense_layers
from placer.simulation.simulate import DEFAULT_BATCH_SIZE, count
from placer.table.table import Table
from placer.trace import EVERYTHING, Chunk, Selection, Trace

DEFAULT_BASELINES = ("contiguous", "balanced")
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
        Which copy of an expert serves; ``None`` where each has one.
    phase
        How batches are drawn.
    hardware, expert
        What the cost model needs; without hardware no time is predicted.
    hidden_size
        Width of the hidden state, where neither trace, plan nor ``expert`` says it.
    """

    engine: Engine | None = None
    replica_choice: ReplicaChoice | None = None
    phase: Phase = "decode"
    hardware: Hardware | None = None
    expert: ExpertShape | None = None
    hidden_size: int | None = None

    def transfers(self, plan: Plan) -> tuple[Transfer, Transfer]:
        """Return what a dispatch and a combine of this plan send."""
        if self.engine is not None:
            return self.engine.dispatch, self.engine.combine
        exchange: Exchange = "per-node" if plan.exchange == "per-node" else "per-rank"
        way = Transfer(exchange=exchange, element="bf16")
        return way, way

    def cost_model(self, plan: Plan) -> CostModel | None:
        """Return the cost model, or ``None`` without hardware.

        Raises
        ------
        UsageError
            If there is hardware, but the size of an expert is not known.
        """
        if self.hardware is None:
            return None
        if self.expert is None:
            raise UsageError(
                "--hardware predicts no time without the size of an expert",
                "give --model DIR (its config.json), or --hidden-size and --expert-size",
            )
        dispatch, combine = self.transfers(plan)
        return CostModel(
            hardware=self.hardware,
            expert=self.expert,
            dispatch=dispatch,
            combine=combine,
            num_nodes=plan.placement.num_nodes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A plan and its baselines on the same tokens.

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
    batch_size
        Tokens of one forward pass.
    hidden_size
        Width of the hidden state, or ``None`` where the trace does not know.
    policy
        The home policy under which batches are served: what the plan was solved for, or
        ``fixed`` where that needs a table.
    batches
        Figures by name of the placement, ``plan`` last, and batch size.
    ratios
        By baseline: copies of the plan over its copies, under ``policy``.
    break_even
        By baseline: for which bandwidth the plan is faster, in the largest batches.
    serving, transfers
        How the tokens are served, and what is sent.
    has_replicas
        Whether the plan has redundant experts.
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
    batch_size: int
    hidden_size: int | None
    policy: str
    batches: BatchTable
    break_even: Mapping[str, BreakEven]
    ratios: Mapping[str, CopiesRatio]
    serving: Serving
    transfers: tuple[Transfer, Transfer]
    has_replicas: bool
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer simulate --json``."""
        return {
            "policies": _figures_json(self.policies),
            "baselines": {name: _figures_json(f) for name, f in self.baselines.items()},
            "tokens": self.num_tokens,
            "layers": self.num_layers,
            "top_k": self.top_k,
            "sequences": self.num_sequences,
            "batch_size": self.batch_size,
            "replica_choice": self.serving.replica_choice,
            "engine": None if self.serving.engine is None else self.serving.engine.name,
            "phase": self.serving.phase,
            "batches": {
                name: [one.to_json() for one in figures]
                for name, figures in self.batches.items()
            },
            "bytes_per_token": self.bytes_per_token(),
            "copies_ratio": {name: one.to_json() for name, one in self.ratios.items()},
            "break_even": {name: one.to_json() for name, one in self.break_even.items()},
            "warnings": list(self.warnings),
        }

    def facts(self) -> list[str]:
        """Return one line each on what the figures mean, and what they leave out."""
        lines = [
            f"{self.num_tokens:,} tokens of {self.num_sequences:,} sequences, "
            f"{self.num_layers} MoE layers, top-{self.top_k}, {self.num_ranks} ranks, "
            f"batches of {self.batch_size:,} tokens"
        ]
        if self.serving.engine is not None:
            lines += self._engine_facts(self.serving.engine)
        if self.has_replicas:
            lines.append(f"replica choice: {self.serving.replica_choice}")
        lines += [
            f"under {self.policy}, the plan {one.words(name)}"
            for name, one in self.ratios.items()
        ]
        lines += [self._break_even_fact(name) for name in self.break_even]
        lines.append(
            "follow also sends the keys and values of every layer to all other "
            f"{self.num_ranks - 1} ranks: not counted"
        )
        if "token" in self.policies:
            moved = 2 * (self.num_ranks - 1) / self.num_ranks
            lines.append(
                f"token also moves {moved:.2f} hidden states per token and layer in the "
                "reduce-scatter and all-gather of attention-TP: not counted"
            )
        return lines

    def _engine_facts(self, engine: Engine) -> list[str]:
        ways = (engine.dispatch, engine.combine)
        dispatch, combine = (f"{way.exchange} in {way.element}" for way in ways)
        effect = engine.effect("fixed", has_replicas=self.has_replicas)
        return [
            f"{engine.name}: dispatch {dispatch}, combine {combine}",
            f"under fixed, {effect.reason}",
        ]

    def bytes_per_token(self) -> dict[str, dict[str, float]] | None:
        """Return bytes per token and layer: by placement, then way and link class.

        Of the largest batches; ``None`` where the hidden size is not known.
        """
        if self.hidden_size is None:
            return None
        sizes = [way.copy_bytes(self.hidden_size) for way in self.transfers]
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

    def _break_even_fact(self, name: str) -> str:
        found = self.break_even[name]
        size = self.batches["plan"][-1].metrics.batch_size
        return f"beside {name}, in batches of {size:,}, the plan {found.words}"


def judge_plan(
    plan_path: Path,
    trace: Trace,
    *,
    selection: Selection = EVERYTHING,
    table_path: Path | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    serving: Serving | None = None,
) -> Judgement:
    """Simulate a plan and baselines on the tokens selected.

    Baselines see the plan's own profile where it is of this trace, else all tokens of
    the phase that is judged.

    Raises
    ------
    PlacerError
        If plan and trace are of different models, or the table is of another plan.
    UsageError
        If a baseline is unknown, ``batch_size`` not positive, or the size of an expert
        is needed and not known.
    """
    plan, serving = Plan.read(plan_path), serving or Serving()
    cost = serving.cost_model(plan)
    matched = require_same_model(
        plan.model, str(plan_path), trace.model, str(trace.directory)
    )
    table = None if table_path is None else read_table_of(table_path, plan_path)
    tokens = trace.read(selection)
    num_sequences = len(np.unique(tokens.sequence_ids))
    compared, missing = _baseline_placements(plan, trace, baselines, selection)
    seen = num_seen_sequences(plan, trace, tokens.sequence_ids)
    layer_ids = plan.model.layer_ids or trace.model.layer_ids
    warnings = [
        matched,
        unknown_dense_layers(plan.placement, serving.replica_choice, layer_ids),
        *missing,
        other_phase(plan, selection),
        f"{seen} of the {num_sequences} sequences are those the plan was solved on, so "
        f"the figures flatter it: {_remedy(profile_of(plan, trace))}"
        if seen
        else None,
        _seen_by_table(table, trace, tokens, at_least=seen + 1),
        f"{num_sequences} sequences are too few for an interval or a verdict: "
        f"{FEWEST_SEQUENCES} are needed"
        if num_sequences < FEWEST_SEQUENCES
        else None,
        f"the plan was solved for {plan.policy}, whose homes need its table; give it by "
        "--table TABLE: placer tables --help"
        if table is None and plan.policy != plan.policy_without_table
        else None,
        "the trace has no token ids: the table knows no token of it"
        if table is not None and tokens.token_ids is None
        else None,
    ]

    def simulated(placement: Placement, of: Table | None) -> Tallies:
        return count(
            placement,
            tokens,
            batch_size=batch_size,
            phase=serving.phase,
            table=of,
            replica_choice=serving.replica_choice,
            layer_ids=layer_ids,
        )

    own = simulated(plan.placement, table)
    others = {name: simulated(placed, None) for name, placed in compared.items()}
    transfers = serving.transfers(plan)
    options = BatchOptions(
        policy=plan.policy_without_table,
        phase=serving.phase,
        exchanges=(transfers[0].exchange, transfers[1].exchange),
        replica_choice=serving.replica_choice,
        layer_ids=layer_ids,
        cost=cost,
    )
    sizes = batch_sizes(serving.phase, batch_size, tokens.num_tokens)
    batches = {
        name: tuple(batch_figures(placement, tokens, size, options) for size in sizes)
        for name, placement in {**compared, "plan": plan.placement}.items()
    }
    return Judgement(
        policies=_metrics(own),
        baselines={name: _metrics(one) for name, one in others.items()},
        ratios=_ratios(plan.policy, own, others, tokens, trace),
        num_tokens=tokens.num_tokens,
        num_sequences=num_sequences,
        num_layers=plan.model.num_layers,
        top_k=plan.model.top_k,
        num_ranks=plan.placement.num_ranks,
        batch_size=min(batch_size, tokens.num_tokens),
        hidden_size=trace.model.hidden_size
        or plan.model.hidden_size
        or (None if serving.expert is None else serving.expert.hidden_size)
        or serving.hidden_size,
        policy=plan.policy_without_table,
        batches=batches,
        break_even=_break_evens(batches, cost),
        serving=serving,
        transfers=transfers,
        has_replicas=plan.placement.has_replicas,
        warnings=tuple(warning for warning in warnings if warning is not None),
    )


def _metrics(tallies: Tallies) -> Figures:
    return {policy: tally.metrics() for policy, tally in tallies.items()}


def _ratios(
    policy: str,
    own: Tallies,
    others: Mapping[str, Tallies],
    tokens: Chunk,
    trace: Trace,
) -> dict[str, CopiesRatio]:
    """Compare the plan's copies with every baseline's, under the plan's policy."""
    found = {
        name: copies_ratio(
            own[policy].copies_of_token,
            tallies[policy].copies_of_token,
            tokens.sequence_ids,
            tokens.domain_ids,
            trace.header.domains,
        )
        for name, tallies in others.items()
        if policy in own and policy in tallies
    }
    return {name: one for name, one in found.items() if one is not None}


def _break_evens(batches: BatchTable, cost: CostModel | None) -> dict[str, BreakEven]:
    """Compare the plan's predicted time with every baseline's, in the largest batches."""
    if cost is None:
        return {}
    last = {name: figures[-1].time for name, figures in batches.items()}
    plan = last.pop("plan")
    return {
        name: break_even(plan, other, cost)
        for name, other in last.items()
        if plan is not None and other is not None
    }


def read_table_of(table_path: Path, plan_path: Path) -> Table:
    """Read a table and make sure that it is the plan's own.

    Raises
    ------
    PlacerError
        If the table was written for another plan file.
    """
    table = Table.read(table_path)
    expected = plan_sha256(plan_path)
    if table.plan_sha256 != expected:
        raise PlacerError(
            f"table {table_path} was written for the plan with SHA-256 "
            f"{str(table.plan_sha256)[:12]}, but {plan_path} has {expected[:12]}",
            f"write the plan's own table: placer tables {plan_path} TRACE "
            f"--out {table_path}",
        )
    return table


def _seen_by_table(
    table: Table | None, trace: Trace, tokens: Chunk, *, at_least: int
) -> str | None:
    """Say how many of the sequences a table was built from, if so many."""
    if table is None:
        return None
    seen = num_seen_sequences(table, trace, tokens.sequence_ids)
    if seen < at_least:
        return None
    remedy = _remedy(profile_of(table, trace), "build the table")
    return (
        f"{seen} of the {len(np.unique(tokens.sequence_ids))} sequences are those the "
        f"table was built from, so the figures with it flatter it: {remedy}"
    )


def _remedy(profile: Selection | None, make: str = "solve") -> str:
    """Say how to simulate what the plan, or what else is made, has not seen."""
    if profile is None or profile.fold is None:
        return f"{make} with --fold 0/2, then simulate with --not-fold 0/2"
    return f"simulate with {profile.complement().options}"


def _baseline_placements(
    plan: Plan, trace: Trace, names: Sequence[str], judged: Selection
) -> tuple[dict[str, Placement], list[str]]:
    """Build the baselines from the plan's profile; say what limits them."""
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise UsageError(
            f"--baseline {unknown[0]} is not known", f"choose among {', '.join(BASELINES)}"
        )
    ranks, nodes = plan.placement.num_ranks, plan.placement.num_nodes
    sizes = plan.placement.num_experts
    warnings = []
    if any(size % ranks for size in sizes):
        names = [name for name in names if name == "eplb"]
        warnings.append(
            f"no baseline without redundant experts: {sizes[0]} experts do not "
            f"divide over {ranks} ranks"
        )
    problem = BaselineProblem(
        trace=trace,
        selection=profile_of(plan, trace) or Selection(phase=judged.phase),
        topology=Topology(num_nodes=nodes, gpus_per_node=ranks // nodes),
        redundant_experts=plan.placement.redundant_experts,
    )
    if not problem.load[0].any():  # no sequence of the fold is in this trace
        problem = dataclasses.replace(problem, selection=Selection(phase=judged.phase))
    informed = [name for name in names if name not in ("contiguous", "random")]
    if problem.selection.fold is None and informed:
        warnings.append(
            "the plan records no profile fold: given all sequences as their profile: "
            f"{', '.join(informed)}"
        )
    return {name: BASELINES[name](problem) for name in names}, warnings


def _figures_json(figures: Figures) -> dict[str, dict[str, float]]:
    return {policy: metrics.to_json() for policy, metrics in figures.items()}
