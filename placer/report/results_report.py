"""Reports of a frontier, a simulation, a learning curve, an engine's map and a record."""

from collections.abc import Sequence

import numpy as np

from placer.checkpoint.record import ExportRecord
from placer.report.chart import (
    CONTIGUOUS,
    EPLB,
    PLACER,
    Chart,
    Line,
    Lines,
    Matrix,
    Section,
    kind_of_placement,
)
from placer.report.headline import REFERENCES, Headline, Tile, change, over_mean
from placer.report.plan_charts import REPLICA_OCTAVES, title_of
from placer.report.results import (
    EngineMap,
    Frontier,
    Learning,
    LearningPoint,
    Result,
    Simulation,
)
from placer.report.simulation_report import before_after, summarize_simulation
from placer.report.summary import Summary
from placer.target.map_formats import format_of_json

# Plans that differ by less are as good on a learning curve.
_NEAR = 0.01
_IMBALANCE = "load_imbalance_mean"
# Nothing in a bare list of rows says what its numbers are.
_COUNTS_TOO = (
    "A bare list of rows may also be counts of tokens per expert. If it is, import it: "
    "placer import load-matrix FILE --out AFFINITY.",
)


def summarize_result(result: Result) -> Summary:
    """Return what a result holds, and its report."""
    match result:
        case Frontier():
            return _frontier(result)
        case Simulation():
            return summarize_simulation(result)
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
        charts=(
            before_after(
                [(p.name, p.sent, p.imbalance) for p in points],
                frontier.words,
                [p.name for p in frontier.plans],
            ),
            _frontier_chart(frontier),
        )
        if frontier.plans
        else (),
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
        f"{change(least.sent, other.sent)} {REFERENCES[other.name]}"
        for other in frontier.baselines.values()
    ]
    told = " and ".join(words) or f"{least.sent:.3f} per token and layer"
    eplb = frontier.baselines.get(EPLB)
    better = [
        plan
        for plan in frontier.plans
        if eplb and plan.sent < eplb.sent and plan.imbalance < eplb.imbalance
    ]
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
            *(
                Tile(
                    title="Better than EPLB in both",
                    unit=f"of {len(frontier.plans)} plans",
                    after=len(better),
                )
                for _ in range(eplb is not None)
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
            names=tuple(
                "" if p.max_imbalance is None else f"cap {p.max_imbalance:g}"
                for p in ordered
            ),
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


def _learning(learning: Learning) -> Summary:
    points = learning.points
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
    return Summary(
        kind="learning curve",
        headline=_learning_headline(points),
        facts={"num_points": len(points)},
        sections=(section,),
        charts=(_learning_chart(points),),
    )


def _learning_headline(points: Sequence[LearningPoint]) -> Headline:
    last = points[-1]
    near = next(
        p
        for p in points
        if p.ratio <= last.ratio + _NEAR
        and p.load_imbalance_mean <= last.load_imbalance_mean + _NEAR
    )
    return Headline(
        verdict=_learning_verdict(near, last),
        tiles=(
            Tile(
                title="Tokens solved on" if near is last else "Tokens that suffice",
                unit="tokens",
                after=near.num_tokens,
            ),
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
    )


def _learning_chart(points: Sequence[LearningPoint]) -> Chart:
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
            ("experts that the last plan puts elsewhere", "moved", None),
        )
    )
    return Chart(
        name="learning",
        title="Learning curve",
        reading="Where a curve is flat, more tokens do not change the plan.",
        unit="copies, times the contiguous placement's; load, times the mean; share of the "
        "experts",
        baseline="the contiguous placement on the same held-out sequences; the plan from "
        "most tokens",
        panels=panels,
    )


def _learning_verdict(near: LearningPoint, last: LearningPoint) -> str:
    reached = (
        f"{last.ratio:.3f} of contiguous, busiest rank {last.load_imbalance_mean:.3f} "
        "times the mean, on held-out sequences"
    )
    if near is last:
        return (
            f"No smaller part gives a plan as good as all {last.num_tokens:,} tokens "
            f"({reached}): more tokens may still help."
        )
    return (
        f"{near.num_tokens:,} tokens give a plan that is as good, within {_NEAR:g}, as one "
        f"from {last.num_tokens:,} tokens ({reached})."
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
            f"{max(experts)} experts each, {max(extra)} of them redundant. A plan made of "
            "it can be judged on a trace.",
            tiles=(
                Tile(
                    title="Slots of a layer",
                    unit="slots, most of any layer",
                    before=max(experts),
                    after=max(slots),
                ),
            ),
            misleading=_COUNTS_TOO if found.format == format_of_json([[0]]) else (),
            next=f"placer import {found.format}-map FILE --gpus-per-node M --out PLAN",
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
                            octaves=REPLICA_OCTAVES,
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
                                    kind=PLACER,
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
