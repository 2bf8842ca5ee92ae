"""Reports of a frontier, a simulation, a learning curve, an engine's map and a record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from placer.checkpoint.record import ExportRecord
from placer.report.chart import (
    CONTIGUOUS,
    EPLB,
    OTHER,
    PLACER,
    Bar,
    Bars,
    Chart,
    Line,
    Lines,
    Matrix,
    Section,
    kind_of_placement,
)
from placer.report.headline import Headline, Tile, change, over_mean
from placer.report.plan_charts import title_of
from placer.report.results import EngineMap, Frontier, Learning, Result, Simulation
from placer.report.summary import Summary

_PLAN = "plan"
# Plans that differ by less are as good on a learning curve.
_NEAR = 0.01
_IMBALANCE = "load_imbalance_mean"
# Bandwidths of the curve, as multiples of the hardware's.
_SPEEDS = tuple(2.0**n for n in range(-4, 4))


def summarize_result(result: Result) -> Summary:
    """Return what a result holds, and its report."""
    match result:
        case Frontier():
            return _frontier(result)
        case Simulation():
            return _simulation(result)
        case Learning():
            return _learning(result)
        case EngineMap():
            return _engine_map(result)
        case ExportRecord():
            return _record(result)


def _frontier(frontier: Frontier) -> Summary:
    points = [*frontier.baselines.values(), *frontier.plans]
    section = Section(
        title="plans and baselines",
        columns=("placement", "load cap", "sent/token", "imbalance"),
        rows=tuple((p.name, p.max_imbalance, p.sent, p.imbalance) for p in points),
    )
    misleading = []
    if frontier.unmeasured:
        misleading.append(
            f"Not measured for lack of time: {', '.join(frontier.unmeasured)}."
        )
    if not frontier.is_heldout:
        misleading.append("Not held out: the plans were solved on these tokens.")
    return Summary(
        kind="frontier",
        headline=_frontier_headline(frontier, tuple(misleading)),
        facts={
            "num_plans": len(frontier.plans) + len(frontier.unmeasured),
            "sent": frontier.words,
            "heldout": frontier.is_heldout,
            "unmeasured": list(frontier.unmeasured),
        },
        sections=(section,),
        charts=(_frontier_chart(frontier),) if frontier.plans else (),
    )


def _frontier_headline(frontier: Frontier, misleading: tuple[str, ...]) -> Headline:
    if not frontier.plans:
        return Headline(
            verdict="No plan of this folder was measured.", tiles=(), misleading=misleading
        )
    least = min(frontier.plans, key=lambda plan: plan.sent)
    most_even = min(frontier.plans, key=lambda plan: plan.imbalance)
    base = frontier.baselines.get(CONTIGUOUS)
    words = [
        f"{change(least.sent, other.sent)} {title_of(other.name)}"
        for other in frontier.baselines.values()
    ]
    told = " and ".join(words) or f"{least.sent:.3f} per token and layer"
    return Headline(
        verdict=f"{least.name} sends least: {told} ({frontier.words}). Its busiest rank "
        f"has {over_mean(least.imbalance)} more load than the mean; the most even plan, "
        f"{most_even.name}, has {over_mean(most_even.imbalance)}.",
        tiles=(
            Tile(
                title="Least sent",
                unit="per token and layer",
                before=None if base is None else base.sent,
                after=least.sent,
            ),
            Tile(
                title="Most even: busiest rank",
                unit="times the mean load, mean over layers",
                before=None if base is None else base.imbalance,
                after=most_even.imbalance,
            ),
        ),
        misleading=misleading,
    )


def _frontier_chart(frontier: Frontier) -> Chart:
    ordered = sorted(frontier.plans, key=lambda plan: plan.imbalance)
    lines = [
        Line(
            label="plans",
            kind=PLACER,
            x=tuple(p.imbalance for p in ordered),
            y=tuple(p.sent for p in ordered),
        ),
        *(
            Line(
                label=title_of(name),
                kind=kind_of_placement(name),
                x=(p.imbalance,),
                y=(p.sent,),
                joined=False,
            )
            for name, p in frontier.baselines.items()
        ),
    ]
    return Chart(
        name="frontier",
        title="Traffic and balance",
        reading="Points further left are more even, lower points send less: what is left "
        "of and below another point is better in both.",
        unit=f"{frontier.words} per token and layer; load of the busiest rank over mean",
        baseline="the contiguous placement, and EPLB with as many slots",
        panels=(
            (
                "",
                Lines(
                    x_title="busiest rank, times the mean load",
                    y_title="sent per token",
                    lines=tuple(lines),
                ),
            ),
        ),
    )


def _simulation(simulation: Simulation) -> Summary:
    names = [*_references(simulation.baselines), _PLAN]
    figures = {**simulation.baselines, _PLAN: simulation.policies}
    policy = simulation.policy
    rows = tuple(
        (
            _shown(name),
            None if simulation.sent is None else figures[name][policy][simulation.sent],
            figures[name][policy][_IMBALANCE],
        )
        for name in names
    )
    placements = Section(
        title=f"placements under {policy}",
        columns=("placement", "sent/token", "imbalance"),
        rows=rows,
    )
    return Summary(
        kind="simulation",
        headline=_simulation_headline(simulation, rows),
        facts={
            "engine": simulation.engine,
            "policy": policy,
            "sent": simulation.sent,
            "num_tokens": simulation.tokens,
            "num_sequences": simulation.sequences,
            "num_layers": simulation.layers,
        },
        sections=(placements, *_batch_sections(simulation, names)),
        charts=(_simulation_bars(rows), *_time_charts(simulation, names)),
    )


def _references(names: Mapping[str, Any]) -> list[str]:
    first = [name for name in (CONTIGUOUS, EPLB) if name in names]
    return [*first, *(name for name in names if name not in first)]


def _shown(name: str) -> str:
    return PLACER if name == _PLAN else name


def _simulation_headline(
    simulation: Simulation, rows: Sequence[tuple[str, float | None, float]]
) -> Headline:
    by_name = {name: (sent, load) for name, sent, load in rows}
    sent, load = by_name[PLACER]
    base_sent, base_load = by_name.get(CONTIGUOUS, (None, None))
    parts = [
        f"{change(sent, theirs)} {title_of(name)}"
        for name, (theirs, _) in by_name.items()
        if name in (CONTIGUOUS, EPLB) and sent is not None and theirs is not None
    ]
    told = (
        f"this plan sends {' and '.join(parts)}"
        if parts
        else "every placement sends the same"
    )
    tiles = []
    if sent is not None:
        tiles.append(
            Tile(
                title="What is sent",
                unit="per token and layer",
                before=base_sent,
                after=sent,
            )
        )
    tiles.append(
        Tile(
            title="Busiest rank",
            unit="times the mean load, mean over layers",
            before=base_load,
            after=load,
        )
    )
    plan, base = simulation.batches[_PLAN], simulation.batches.get(CONTIGUOUS)
    if plan and plan[-1].time is not None:
        before = None if base is None else base[-1].time
        tiles.append(
            Tile(
                title=f"Predicted time, {plan[-1].batching} of "
                f"{plan[-1].tokens_per_rank:,} tokens per rank",
                unit="microseconds per layer, without overlap",
                before=None if before is None else before.total_us,
                after=plan[-1].time.total_us,
            )
        )
    return Headline(
        verdict=f"On {simulation.sequences:,} sequences, {told}. Its busiest rank "
        f"has {over_mean(load)} more load than the mean.",
        tiles=tuple(tiles),
        misleading=tuple(simulation.warnings),
    )


def _batch_sections(simulation: Simulation, names: Sequence[str]) -> Iterator[Section]:
    yield Section(
        title="per batch",
        columns=(
            "placement",
            "phase",
            "tokens/rank",
            "straggler",
            "layer us",
            "overlapped us",
        ),
        rows=tuple(
            (
                _shown(name),
                one.batching,
                one.tokens_per_rank,
                one.straggler_mean,
                None if one.time is None else one.time.total_us,
                None if one.time is None else one.time.overlapped_us,
            )
            for name in names
            for one in simulation.batches[name]
        ),
    )
    rows = tuple(
        (name, one.batching, one.tokens_per_rank, one.pays, one.bandwidth_gb_per_s)
        for name, found in simulation.break_even.items()
        for one in found
    )
    if rows:
        yield Section(
            title="break-even: for which bandwidth the plan is faster",
            columns=("baseline", "phase", "tokens/rank", "faster", "GB/s per GPU"),
            rows=rows,
        )


def _simulation_bars(rows: Sequence[tuple[str, float | None, float]]) -> Chart:
    panels = []
    for title, column in (
        ("sent per token and layer", 1),
        ("busiest rank: load over the mean", 2),
    ):
        values = [(row[0], row[column]) for row in rows]
        bars = tuple(
            Bar(
                label=title_of(name),
                value=float(value),
                text=f"{value:.3f}",
                kind=kind_of_placement(name),
            )
            for name, value in values
            if isinstance(value, float | int)
        )
        if bars:
            panels.append((title, Bars(bars=bars)))
    return Chart(
        name="comparison",
        title="Before and after",
        reading="Shorter is better in both.",
        unit="per token and layer; times the mean load",
        baseline="the contiguous placement, and EPLB with as many slots",
        panels=tuple(panels),
    )


def _time_charts(simulation: Simulation, names: Sequence[str]) -> Iterator[Chart]:
    shown = [name for name in names if name in (CONTIGUOUS, EPLB, _PLAN)]
    phases = dict.fromkeys(one.batching for one in simulation.batches[_PLAN])
    if any(one.time is None for name in shown for one in simulation.batches[name]):
        return
    yield Chart(
        name="time-by-batch",
        title="Predicted time by size of the batch",
        reading="Where the line of the plan is lower, its layers are faster at that size.",
        unit="microseconds per layer, without overlap",
        baseline="the contiguous placement",
        panels=tuple(
            (
                phase,
                _phase_panel([_by_batch(simulation, name, phase) for name in shown]),
            )
            for phase in phases
        ),
    )
    if simulation.bandwidth_gb_per_s is not None:
        yield _by_bandwidth(simulation, shown, simulation.bandwidth_gb_per_s)


def _phase_panel(lines: Sequence[Line]) -> Bars | Lines:
    """Draw times over sizes; bars where there is one size only."""
    if len(lines[0].x) > 1:
        return Lines(
            x_title="tokens per rank",
            y_title="microseconds",
            log_x=True,
            from_zero=True,
            lines=tuple(lines),
        )
    (size,) = lines[0].x
    return Bars(
        bars=tuple(
            Bar(
                label=f"{line.label}, {size:,.0f} tokens",
                value=line.y[0],
                text=f"{line.y[0]:,.1f} us",
                kind=line.kind,
            )
            for line in lines
        )
    )


def _by_batch(simulation: Simulation, name: str, phase: str) -> Line:
    ones = [one for one in simulation.batches[name] if one.batching == phase]
    return Line(
        label=title_of(_shown(name)),
        kind=kind_of_placement(_shown(name)),
        x=tuple(float(one.tokens_per_rank) for one in ones),
        y=tuple(one.time.total_us for one in ones if one.time is not None),
    )


def _by_bandwidth(simulation: Simulation, names: Sequence[str], bandwidth: float) -> Chart:
    """Draw time over bandwidth: transfers scale with it, computation and latency do not."""
    panels = []
    for number, shape in enumerate(simulation.batches[_PLAN]):
        lines = []
        for name in names:
            time = simulation.batches[name][number].time
            if time is None or time.latency_us is None:
                continue
            moved = time.dispatch_us + time.combine_us - time.latency_us
            kept = time.compute_us + time.latency_us
            lines.append(
                Line(
                    label=title_of(_shown(name)),
                    kind=kind_of_placement(_shown(name)),
                    x=tuple(bandwidth * speed for speed in _SPEEDS),
                    y=tuple(kept + moved / speed for speed in _SPEEDS),
                )
            )
        title = f"{shape.batching}, {shape.tokens_per_rank:,} tokens per rank"
        words = [
            f"{one.pays} {one.bandwidth_gb_per_s:,.3g} GB/s"
            if one.bandwidth_gb_per_s is not None
            else one.pays
            for one in simulation.break_even.get(CONTIGUOUS, [])[number : number + 1]
        ]
        pays = f": faster than contiguous {words[0]}" if words else ""
        axes = Lines(
            x_title="GB/s per GPU and direction",
            y_title="microseconds",
            log_x=True,
            from_zero=True,
            lines=tuple(lines),
        )
        panels.append((title + pays, axes))
    return Chart(
        name="time-by-bandwidth",
        title="Predicted time by bandwidth of the links",
        reading="Where two lines cross is the break-even bandwidth: what sends less gains "
        "most on slow links.",
        unit="microseconds per layer, without overlap",
        baseline=f"{bandwidth:,.3g} GB/s, the hardware that was named",
        panels=tuple(panels),
    )


def _learning(learning: Learning) -> Summary:
    points = learning.points
    last = points[-1]
    near = next(
        p
        for p in points
        if p.ratio <= last.ratio + _NEAR
        and p.load_imbalance_mean <= last.load_imbalance_mean + _NEAR
    )
    section = Section(
        title="plans from growing parts of the profile",
        columns=(
            "tokens",
            "sequences",
            "copies/token",
            "of contiguous",
            "imbalance",
            "moved",
        ),
        rows=tuple(
            (
                p.num_tokens,
                p.num_sequences,
                p.remote_rank_copies_per_token,
                p.ratio,
                p.load_imbalance_mean,
                p.moved,
            )
            for p in points
        ),
    )
    panels = tuple(
        (
            title,
            Lines(
                x_title="tokens solved on",
                y_title="",
                log_x=True,
                rule=rule,
                lines=(
                    Line(
                        label="plan",
                        kind=PLACER,
                        x=tuple(float(p.num_tokens) for p in points),
                        y=tuple(float(getattr(p, field)) for p in points),
                    ),
                ),
            ),
        )
        for title, field, rule in (
            ("copies sent, of contiguous", "ratio", (1.0, "contiguous")),
            ("busiest rank, times the mean load", _IMBALANCE, (1.0, "even")),
            ("experts on another rank than in the last plan", "moved", None),
        )
    )
    return Summary(
        kind="learning curve",
        headline=Headline(
            verdict=f"{near.num_tokens:,} tokens give a plan that sends as little as "
            f"one from {last.num_tokens:,} tokens ({last.ratio:.3f} of contiguous), and is "
            f"as even ({last.load_imbalance_mean:.3f}), within {_NEAR:g}, on held-out "
            "sequences.",
            tiles=(
                Tile(title="Tokens that suffice", unit="tokens", after=near.num_tokens),
                Tile(
                    title="Copies sent",
                    unit="of contiguous, held out",
                    before=1.0,
                    after=last.ratio,
                ),
                Tile(
                    title="Busiest rank",
                    unit="times the mean load, held out",
                    after=last.load_imbalance_mean,
                ),
            ),
        ),
        facts={"num_points": len(points)},
        sections=(section,),
        charts=(
            Chart(
                name="learning",
                title="Learning curve",
                reading="Where a curve is flat, more tokens do not change the plan.",
                unit="judged on held-out sequences",
                baseline="the contiguous placement",
                panels=panels,
            ),
        ),
    )


def _engine_map(found: EngineMap) -> Summary:
    rows = found.map.rows
    counts = [np.bincount(np.asarray(row, dtype=np.int64).clip(0)) for row in rows]
    slots = [len(row) for row in rows]
    experts = [int(np.count_nonzero(one)) for one in counts]
    extra = [slot - size for slot, size in zip(slots, experts, strict=True)]
    width = max(map(len, counts))
    values = np.full((len(counts), width), np.nan)
    for layer, one in enumerate(counts):
        values[layer, : len(one)] = one
    return Summary(
        kind=f"{found.format} map",
        headline=Headline(
            verdict=f"A map of {len(rows)} layers with {max(slots)} slots for "
            f"{max(experts)} experts each, {max(extra)} of them redundant. To judge it, "
            f"make a plan of it: placer import {found.format}-map FILE --gpus-per-node M "
            "--out PLAN.",
            tiles=(
                Tile(
                    title="Slots of a layer",
                    unit="slots, most of any layer",
                    before=max(experts),
                    after=max(slots),
                ),
            ),
        ),
        facts={
            "num_layers": len(rows),
            "num_slots": sum(slots),
            "redundant_experts": sum(extra),
        },
        sections=(
            Section(
                title="slots per layer",
                columns=("layer", "slots", "experts", "redundant", "most of one expert"),
                rows=tuple(
                    (layer, slots[layer], experts[layer], extra[layer], int(one.max()))
                    for layer, one in enumerate(counts)
                ),
            ),
        ),
        charts=(
            Chart(
                name="replicas",
                title="Slots of every expert",
                reading="Orange experts have two or more slots, grey ones have one.",
                unit="slots of the expert",
                baseline="1: no replica",
                panels=(
                    (
                        "",
                        Matrix(
                            x_title="logical expert",
                            y_title="layer of the map",
                            values=values,
                        ),
                    ),
                ),
            ),
        ),
    )


def _record(record: ExportRecord) -> Summary:
    moved = [float((row != np.arange(len(row))).mean()) for row in record.permutation]
    mean = float(np.mean(moved)) if moved else 0.0
    return Summary(
        kind="export record",
        headline=Headline(
            verdict=f"placer renumbered the experts of {len(moved)} MoE layers: {mean:.0%} "
            "of them have another number than in the original.".replace("%", " %"),
            tiles=(
                Tile(title="Renumbered", unit="share of the experts", after=mean),
                Tile(
                    title="Shards rewritten",
                    unit="files",
                    after=len(record.shard_bytes),
                ),
            ),
        ),
        facts={
            "plan_sha256": record.plan_sha256,
            "source_fingerprint": record.source_fingerprint,
            "num_layers": len(moved),
            "num_shards": len(record.shard_bytes),
            "bytes_of_shards": sum(record.shard_bytes.values()),
        },
        sections=(
            Section(
                title="renumbered experts per MoE layer",
                columns=("layer", "model layer", "experts", "share renumbered"),
                rows=tuple(
                    (n, record.layer_ids[n], len(record.permutation[n]), share)
                    for n, share in enumerate(moved)
                ),
            ),
        ),
        charts=(
            Chart(
                name="renumbered",
                title="Renumbered experts by layer",
                reading="A layer at zero is as it was.",
                unit="share of the experts",
                baseline="0: the original",
                panels=(
                    (
                        "",
                        Lines(
                            x_title="MoE layer",
                            y_title="share",
                            from_zero=True,
                            lines=(
                                Line(
                                    label="renumbered",
                                    kind=OTHER,
                                    x=tuple(map(float, range(len(moved)))),
                                    y=tuple(moved),
                                ),
                            ),
                        ),
                    ),
                ),
            ),
        )
        if moved
        else (),
    )
