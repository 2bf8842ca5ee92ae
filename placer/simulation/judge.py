"""Simulating a plan file on a trace, beside the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.engine import Engine, ReplicaChoice
from placer.errors import PlacerError, UsageError
from placer.model import require_same_model
from placer.plan import Plan
from placer.plan.plan import plan_sha256
from placer.simulation.baselines import BASELINES, Load
from placer.simulation.metrics import PolicyMetrics
from placer.simulation.profile import expert_load, num_seen_sequences, profile_fold
from placer.simulation.simulate import DEFAULT_BATCH_SIZE, simulate
from placer.table.table import Table
from placer.trace import Fold, Trace

DEFAULT_BASELINES = ("contiguous", "balanced")
# Fewer sequences than this support no verdict (problem.md, section 5).
FEWEST_SEQUENCES = 30
_BYTES_PER_ELEMENT = 2

Figures = Mapping[str, PolicyMetrics]


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
    replica_choice
        Which copy of an expert serves.
    engine
        The engine that the figures are for, if one was named.
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
    replica_choice: ReplicaChoice = "local-first"
    engine: Engine | None = None
    has_replicas: bool = False
    warnings: tuple[str, ...] = ()

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
            "replica_choice": self.replica_choice,
            "engine": None if self.engine is None else self.engine.name,
            "warnings": list(self.warnings),
        }

    def facts(self) -> list[str]:
        """Return one line each on what the figures mean, and what they leave out."""
        lines = [
            f"{self.num_tokens:,} tokens of {self.num_sequences:,} sequences, "
            f"{self.num_layers} MoE layers, top-{self.top_k}, {self.num_ranks} ranks, "
            f"batches of {self.batch_size:,} tokens"
        ]
        if self.engine is not None:
            lines += self._engine_facts(self.engine)
        if self.has_replicas:
            lines.append(f"replica choice: {self.replica_choice}")
        if self.hidden_size is not None:
            lines.append(self._bytes_fact(self.hidden_size))
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

    def _bytes_fact(self, hidden_size: int) -> str:
        state = hidden_size * _BYTES_PER_ELEMENT
        sent = {
            name: figures["fixed"].remote_rank_copies_per_token * state
            for name, figures in {"plan": self.policies, **self.baselines}.items()
        }
        listed = ", ".join(f"{name} {value:,.0f}" for name, value in sent.items())
        return (
            f"a hidden state is {state:,} bytes in bf16; bytes sent per token and layer "
            f"under fixed, and as many back: {listed}"
        )


def judge_plan(
    plan_path: Path,
    trace: Trace,
    *,
    fold: Fold | None = None,
    table_path: Path | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    engine: Engine | None = None,
    replica_choice: ReplicaChoice = "local-first",
) -> Judgement:
    """Simulate a plan and baselines on the sequences of ``fold``.

    The baseline ``balanced`` balances the load of the plan's own profile fold where the
    plan records one, else of all sequences.

    Raises
    ------
    PlacerError
        If plan and trace are of different models, or the table is of another plan.
    UsageError
        If a baseline is unknown or ``batch_size`` not positive.
    """
    plan = Plan.read(plan_path)
    matched = require_same_model(
        plan.model, str(plan_path), trace.model, str(trace.directory)
    )
    table = None if table_path is None else read_table_of(table_path, plan_path)
    tokens = trace.read(fold)
    num_sequences = len(np.unique(tokens.sequence_ids))
    load, load_warning = _baseline_load(plan, trace, baselines)
    compared, missing = _baseline_placements(plan, load, baselines)
    seen = num_seen_sequences(plan, trace, tokens.sequence_ids)
    warnings = [
        matched,
        load_warning,
        *missing,
        f"{seen} of the {num_sequences} sequences are those the plan was solved on, so "
        f"the figures flatter it: {_remedy(profile_fold(plan, trace))}"
        if seen
        else None,
        f"{num_sequences} sequences are too few for an interval or a verdict: "
        f"{FEWEST_SEQUENCES} are needed"
        if num_sequences < FEWEST_SEQUENCES
        else None,
        "the trace has no token ids: the table knows no token of it"
        if table is not None and tokens.token_ids is None
        else None,
    ]
    return Judgement(
        policies=simulate(
            plan.placement,
            tokens,
            batch_size=batch_size,
            table=table,
            replica_choice=replica_choice,
        ),
        baselines={
            name: simulate(
                placement, tokens, batch_size=batch_size, replica_choice=replica_choice
            )
            for name, placement in compared.items()
        },
        num_tokens=tokens.num_tokens,
        num_sequences=num_sequences,
        num_layers=plan.model.num_layers,
        top_k=plan.model.top_k,
        num_ranks=plan.placement.num_ranks,
        batch_size=min(batch_size, tokens.num_tokens),
        hidden_size=trace.model.hidden_size or plan.model.hidden_size,
        replica_choice=replica_choice,
        engine=engine,
        has_replicas=plan.placement.has_replicas,
        warnings=tuple(warning for warning in warnings if warning is not None),
    )


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


def _remedy(profile: Fold | None) -> str:
    """Say how to simulate what the plan has not seen."""
    if profile is None:
        return "solve with --fold 0/2, then simulate with --not-fold 0/2"
    unseen = profile.complement()
    option = "--not-fold" if unseen.inverted else "--fold"
    return f"simulate with {option} {unseen.part}/{unseen.parts}"


def _baseline_load(
    plan: Plan, trace: Trace, names: Sequence[str]
) -> tuple[Load, str | None]:
    """Return the load that ``balanced`` may see, and a warning where it is all of it."""
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise UsageError(
            f"--baseline {unknown[0]} is not known", f"choose among {', '.join(BASELINES)}"
        )
    fold = profile_fold(plan, trace)
    load = expert_load(trace, fold)
    if fold is not None and load[0].any():
        return load, None
    warning = (
        "the plan records no profile fold: balanced is given the load of all sequences"
    )
    return expert_load(trace, None), warning if "balanced" in names else None


def _baseline_placements(
    plan: Plan, load: Load, names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Build the baselines, or say why there are none."""
    ranks, nodes = plan.placement.num_ranks, plan.placement.num_nodes
    if any(len(counts) % ranks for counts in load):
        return {}, [
            f"no baseline without redundant experts: {len(load[0])} experts do not "
            f"divide over {ranks} ranks"
        ]
    return {name: BASELINES[name](load, ranks, nodes) for name in names}, []


def _figures_json(figures: Figures) -> dict[str, dict[str, float]]:
    return {policy: metrics.to_json() for policy, metrics in figures.items()}
