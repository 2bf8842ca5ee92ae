"""The answer of each command, from the figures that it made."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from placer.affinity import Affinity
from placer.model.kv_cache import kv_cache_bytes
from placer.placement import Plan
from placer.planning.advice import Advice
from placer.planning.drift import DriftReport, improving_command
from placer.planning.engine_options import loads_map
from placer.planning.judge import PLAN, Judgement
from placer.planning.tables import TableResult
from placer.planning.verdict import grouped, references, verdict_lines
from placer.replay.outcome import ReplayOutcome, link_bytes
from placer.report.beside import Beside, beside_recorded
from placer.report.chart import CONTIGUOUS, EPLB, PLACER
from placer.report.headline import (
    busiest_rank,
    change,
    enumerated,
    headline_of_plan,
    over_mean,
)
from placer.report.results import Frontier
from placer.run.verdict import Verdict
from placer.simulation.cost import ExpertShape
from placer.simulation.sent import RANK_COPIES
from placer.target.calibrate import Calibration
from placer.target.engine import Engine
from placer.target.map_formats import COUNTS, MAPS
from placer.trace import EVERYTHING, Selection

# Differences below this are none.
_SAME = 0.005


def verdict_of_solve(
    plan: Plan,
    out: Path,
    source: Path,
    *,
    expert: ExpertShape | None = None,
    model: Path | None = None,
) -> Verdict:
    """Return what a new plan changes against contiguous and EPLB, and what it costs.

    Parameters
    ----------
    plan, out
        The plan, and where it is written.
    source
        What it was solved on.
    expert
        The size of an expert, or ``None`` where it is not known.
    model
        Checkpoint whose config says what a token takes of the KV cache, or ``None``.
    """
    beside = beside_recorded(plan, {})
    profile = plan.metrics["profile"]
    judged = profile is not None
    answer = headline_of_plan(beside).verdict if judged else _unmeasured(plan)
    engine = plan.engine
    if engine is not None:
        phases = " and ".join(engine.phases)
        answer = f"{engine.name}, {phases}: {answer[0].lower()}{answer[1:]}"
    return Verdict(
        answer=(answer,),
        sure=_how_sure(plan),
        cost=_memory(plan, expert, model),
        next=_after_solve(plan, out, source),
        is_better=_is_better(beside) if judged else None,
    )


def _unmeasured(plan: Plan) -> str:
    placed, report = plan.placement, plan.solver
    begin = (
        f"The plan places the experts of {placed.num_layers} MoE layers on "
        f"{placed.num_ranks} ranks."
    )
    if not report.objective_name.startswith("imbalance"):
        return begin
    return (
        f"{begin} On the counts its busiest rank has {over_mean(report.objective)} more "
        "load than the mean, on average over the layers."
    )


def _how_sure(plan: Plan) -> str | None:
    """Say that what was judged was held out; where it was not, a warning does."""
    if plan.metrics["heldout"] is None:
        return None
    number = plan.provenance.get("profile_sequences")
    begin = "Held out" if number is None else f"Held out: solved on {number} sequences"
    return f"{begin}, judged on others. placer simulate adds a 95 % interval."


def _memory(plan: Plan, expert: ExpertShape | None, model: Path | None) -> str | None:
    """Say what redundant experts take of each rank's memory."""
    placed = plan.placement
    extra = sum(
        len(row) - size
        for row, size in zip(
            placed.physical_to_logical_map, placed.num_experts, strict=True
        )
    )
    if not extra:
        return None
    slots, rest = divmod(extra, placed.num_ranks * placed.num_layers)
    where = "on each rank in every layer"
    if rest:  # they fill the ranks
        slots, rest = divmod(extra, placed.num_layers)
        where = f"in every layer, on {placed.num_ranks} ranks together"
    if rest:
        slots, where = extra, f"in all layers, on {placed.num_ranks} ranks together"
    told = f"Cost: {slots} redundant expert{'' if slots == 1 else 's'} {where}"
    if expert is None:
        return f"{told}. With --model DIR: how much memory that is."
    taken = expert.num_bytes * extra / placed.num_ranks
    told += f", {taken / 2**30:.3g} GiB of each rank's memory"
    token = None if model is None else kv_cache_bytes(model)
    if token is None:
        return f"{told}."
    return f"{told}: room for {taken / token:,.0f} tokens of KV cache in bf16."


def _after_solve(plan: Plan, out: Path, source: Path) -> str:
    if plan.metrics["heldout"] is not None:
        rest = Selection.from_json(plan.provenance).complement().options
        return shlex.join(["placer", "simulate", str(out), str(source), *rest.split()])
    return _export_command(plan, out, plan.engine)


def _export_command(plan: Plan, path: Path, engine: Engine | None) -> str:
    file = quote(str(path))
    if engine is None:
        return f"placer export json {file} --out map.json"
    if engine.map_format in MAPS and loads_map(engine, plan.model):
        suffix = MAPS[engine.map_format].suffixes[0]
        return f"placer export {engine.map_format} {file} MODEL --out map{suffix}"
    return f"placer export checkpoint {file} MODEL --out permuted"


def _is_better(beside: Beside) -> bool | None:
    """Return whether a plan is no worse than contiguous and EPLB in all, and better."""
    own = beside.judged.get(PLACER)
    if own is None:
        return None
    changes = []
    for name in (CONTIGUOUS, EPLB):
        base = beside.judged.get(name)
        if base is None:
            continue
        if own.sent is not None and base.sent:
            changes.append(own.sent / base.sent - 1)
        changes.append(own.imbalance / base.imbalance - 1)
    return _agreed(changes)


def _agreed(changes: list[float]) -> bool | None:
    better = any(one < -_SAME for one in changes)
    worse = any(one > _SAME for one in changes)
    return None if better == worse else better


def verdict_of_simulation(
    judgements: tuple[Judgement, ...], plan: Plan, path: Path, command: str
) -> Verdict:
    """Return what a plan saves each engine in each phase.

    ``path`` is the plan's, ``command`` the one that runs, without an engine.
    """
    lines = tuple(
        ", ".join([*names, text]) for names, text in grouped(verdict_lines(judgements))
    )
    first = judgements[0]
    changes = [one.ratio - 1 for one in first.ratios.values()]
    own = first.batches[PLAN][-1].metrics.straggler_mean
    changes += [
        own / first.batches[name][-1].metrics.straggler_mean - 1
        for name in (CONTIGUOUS, EPLB)
        if name in first.batches
    ]
    is_better = _agreed(changes) if len(judgements) == 1 else None
    engine = first.serving.engine
    following = None if is_better is False else _export_command(plan, path, engine)
    if len(judgements) > 1:
        changed = [one for one in judgements if one.sent is not None] or [*judgements]
        engine = changed[0].serving.engine
        following = f"{command} --engine {'' if engine is None else engine.name}"
    return Verdict(
        answer=lines,
        sure=_interval(first) if len(judgements) == 1 else None,
        next=following,
        is_better=is_better,
    )


def _interval(judgement: Judgement) -> str | None:
    if judgement.sent is None:
        return None
    found = [
        f"{one.low:.3f} to {one.high:.3f} of {name}'s"
        for name in references(judgement.ratios)
        if (one := judgement.ratios.get(name)) is not None
        and one.low is not None
        and one.high is not None
    ]
    if not found:
        return None
    return (
        f"95 % interval of {judgement.sent.words} over {judgement.num_sequences:,} "
        f"sequences: {', '.join(found)}."
    )


def verdict_of_check(
    report: DriftReport,
    plan: Plan,
    path: Path,
    source: Path,
    judged: str,
    selection: Selection = EVERYTHING,
) -> Verdict:
    """Return whether a plan holds on today's traffic, of which ``selection`` was judged."""
    worse = [one for one in report.figures if one.drifted]
    if not worse:
        return Verdict(answer=(f"{path} holds on {judged}.",), is_better=True)
    told = ", ".join(
        f"{one.name} was {one.then:.3f} and is {one.now:.3f}, at most "
        f"{one.then + one.allowed:.3f} is allowed"
        for one in worse
    )
    return Verdict(
        answer=(f"Traffic has drifted from {path}: {told}.",),
        next=improving_command(plan, path, source, selection),
        is_better=False,
    )


def verdict_of_advice(advice: Advice, command: str | None) -> Verdict:
    """Return the answer for each engine and phase, and the command that makes the plan."""
    every = grouped((one.engine, one.sentence) for one in advice.answers)
    return Verdict(
        answer=tuple(", ".join([*names, sentence]) for names, sentence in every),
        next=command,
        is_better={"worth it": True, "not worth it": False}.get(advice.verdict),
    )


def verdict_of_replay(outcome: ReplayOutcome) -> Verdict:
    """Return what the plan really sent, over what the contiguous placement sent."""
    sent = {
        (run.placement, run.exchange): sum(
            sum(link_bytes(matrix, run.ranks_per_node))
            for matrix in (run.dispatch, run.combine)
        )
        for run in outcome.runs
    }
    told, changes = [], []
    for (placement, exchange), total in sent.items():
        base = sent.get((CONTIGUOUS, exchange))
        if placement != CONTIGUOUS and base:
            changes.append(total / base - 1)
            told.append(f"{change(total, base)} contiguous experts with {exchange}")
    exact = all(run.as_predicted for run in outcome.runs)
    proof = "Every byte" if exact else "Not every byte"
    begin = f"The plan sends {', '.join(told)}. " if told else ""
    return Verdict(
        answer=(f"{begin}{proof} that left a rank is as the simulation predicts.",),
        is_better=_agreed(changes) if exact else False,
    )


def verdict_of_calibration(found: Calibration, out: Path) -> Verdict:
    """Return how fast the links and processors of this cluster are."""
    where = {"fast": "to ranks of its node", "slow": "to ranks of other nodes"}
    links = " and ".join(
        f"{fit.link.bandwidth / 1e9:.3g} GB/s {where[name]} (latency "
        f"{fit.link.latency * 1e6:.3g} us)"
        for name, fit in found.links.items()
    )
    return Verdict(
        answer=(
            f"Each rank sends {links}, and computes {found.bf16_flops / 1e12:.3g} TFLOP/s "
            "in bf16.",
        ),
        next=f"placer advise TRACE --gpus-per-node {found.options.ranks_per_node} "
        f"--hardware {quote(str(out))} --model MODEL",
    )


def verdict_of_frontier(frontier: Frontier, out: Path) -> Verdict:
    """Return which plan of a frontier sends less than EPLB and is as even, if one is."""
    following = f"placer inspect {quote(str(out))} --html frontier.html"
    eplb = frontier.baselines.get(EPLB)
    if eplb is None or not frontier.plans:
        return Verdict(
            answer=("Nothing was measured with EPLB: the time limit left no time.",),
            next=following,
        )
    tokens = "held-out sequences" if frontier.is_heldout else "the profile"
    begin = f"On {tokens}, "
    even = [one for one in frontier.plans if one.imbalance <= eplb.imbalance * (1 + _SAME)]
    best = min(even, key=lambda one: one.sent, default=None)
    if best is not None and best.sent < eplb.sent * (1 - _SAME):
        answer = (
            f"{begin}{best.name} beats EPLB: it sends {change(best.sent, eplb.sent)} EPLB "
            f"and is as even. Its busiest rank has {best.imbalance:.3f} times the mean "
            f"load (EPLB {eplb.imbalance:.3f})."
        )
        return Verdict(answer=(answer,), next=following, is_better=True)
    near = min(frontier.plans, key=lambda one: one.imbalance)
    answer = (
        f"{begin}no plan sends less than EPLB and is as even. The most even one, "
        f"{near.name}, sends {change(near.sent, eplb.sent)} EPLB. Its busiest rank has "
        f"{near.imbalance:.3f} times the mean load (EPLB {eplb.imbalance:.3f})."
    )
    return Verdict(answer=(answer,), next=following)


def verdict_of_demo(
    figures: Mapping[str, Mapping[str, Any]], num_ranks: int, following: str
) -> Verdict:
    """Return what the plan of the demo changes on held-out text.

    Parameters
    ----------
    figures
        Metrics by placement, the plan's as ``placer``.
    num_ranks
        Of the plan.
    following
        The command to run next.
    """
    own = figures[PLACER]
    others = {name: one for name, one in figures.items() if name != PLACER}
    sent, load = RANK_COPIES.metric, "load_imbalance_mean"
    less = enumerated(
        [f"{change(own[sent], one[sent])} the {name} one" for name, one in others.items()]
    )
    changes = [
        own[metric] / one[metric] - 1
        for one in others.values()
        for metric in (sent, load)
        if one[metric]
    ]
    busiest = busiest_rank(own[load], {name: one[load] for name, one in others.items()})
    return Verdict(
        answer=(
            f"On held-out text, the plan of the demo model for {num_ranks} ranks sends "
            f"{less} ({RANK_COPIES.words}). {busiest} The exported checkpoint computes "
            "what the original computes.",
        ),
        sure="Held out: solved on other text than it is judged on.",
        next=following,
        is_better=_agreed(changes),
    )


def verdict_of_affinity(counts: Affinity, out: Path) -> Verdict:
    """Return what was counted, and the question that it can answer."""
    tokens = counts.known_tokens
    begin = "Counted" if tokens is None else f"Counted {tokens:,} tokens in"
    return Verdict(
        answer=(f"{begin} {counts.model.num_layers} MoE layers.",),
        next=f"placer advise {quote(str(out))} --gpus-per-node 8",
    )


def verdict_of_import(what: str, facts: Mapping[str, Any], out: Path) -> Verdict:
    """Return what was imported: ``what`` is trace, affinity or plan."""
    layers = f"{facts['num_layers']} MoE layers"
    file = quote(str(out))
    if what == "plan":
        ranks, nodes = facts["num_ranks"], facts["num_nodes"]
        where = f"{ranks} ranks, {nodes} node{'s' * (nodes > 1)}"
        return Verdict(
            answer=(f"Imported a map of {layers} on {where}.",),
            next=f"placer inspect {file}",
        )
    tokens = facts["num_tokens"]
    amount = "loads" if tokens is None else f"{tokens:,} tokens"
    if what == "affinity" and tokens is not None:
        amount = f"loads of {amount}"
    return Verdict(
        answer=(f"Imported {amount} in {layers}.",),
        next=f"placer advise {file} --gpus-per-node 8",
    )


def verdict_of_export(
    target: str,
    plan: Path,
    model: Path | None,
    out: Path,
    *,
    inverse: bool,
    ignored: str | None = None,
) -> Verdict:
    """Return what was written, and the command that proves it.

    ``ignored`` says why the engine does not read a map of this model, and what to serve.
    """
    if inverse:
        return Verdict(answer=(f"Restored the original of {plan} in {out}.",))
    following = None
    if ignored is not None:
        answer = f"The engine will not use {out}. {ignored}."
        return Verdict(answer=(answer,), is_better=False)
    if model is not None and target != COUNTS:
        following = shlex.join(map(str, ["placer", "verify", model, out, plan]))
    return Verdict(answer=(f"Wrote {plan} as {target} to {out}.",), next=following)


def verdict_of_table(result: TableResult, plan: Path, trace: Path, out: Path) -> Verdict:
    """Return what the table saves on held-out sequences."""
    table = result.table
    if result.heldout is None:
        answer = f"The table gives a home to each of {table.vocab_size:,} token ids."
        return Verdict(answer=(answer,))
    best = max(result.heldout.items(), key=lambda one: one[1].local_activation_rate)
    name, metrics = best
    rest = result.profile.complement().options
    files = [str(plan), str(trace), "--table", str(out)]
    return Verdict(
        answer=(
            f"Homes of the table find {metrics.local_activation_rate:.1%} of a token's "
            f"experts on its own rank ({name}); a random home finds "
            f"{1 / table.num_ranks:.1%}.",
        ),
        sure="Held out: measured on sequences that the table was not built from.",
        next=shlex.join(["placer", "simulate", *files, *rest.split()]),
        is_better=metrics.local_activation_rate > 1 / table.num_ranks,
    )
