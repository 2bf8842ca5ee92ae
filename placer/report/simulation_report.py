"""The report of a simulation, as ``placer simulate --json`` prints it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from placer.report.chart import (
    CONTIGUOUS,
    EPLB,
    PLACER,
    Bar,
    Bars,
    Chart,
    Line,
    Lines,
    Section,
    kind_of_placement,
)
from placer.report.headline import REFERENCES, Headline, Tile, busiest_rank, change
from placer.report.plan_charts import title_of
from placer.report.results import PLAN, SimulatedBatch, Simulation
from placer.report.summary import Summary

_IMBALANCE = "load_imbalance_mean"
_BANDWIDTHS = {"always": "at every bandwidth", "never": "at none"}
# Bandwidths of the curve, as multiples of the hardware's.
_SPEEDS = tuple(2.0**n for n in range(-4, 4))


def summarize_simulation(simulation: Simulation) -> Summary:
    """Return what a simulation holds: before and after, and predicted times."""
    names = [*_references(simulation.baselines), PLAN]
    placed = {**simulation.baselines, PLAN: simulation.policies}
    shown = {name: placed[name][simulation.policy_of(name)] for name in names}
    policy, own = simulation.policy, simulation.policy_of(PLAN)
    rows = tuple(
        (
            _shown(name),
            None if simulation.sent is None else figures[simulation.sent],
            figures[_IMBALANCE],
        )
        for name, figures in shown.items()
    )
    placements = Section(
        title=f"placements under {policy}" + f", the plan under {own}" * (own != policy),
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
        charts=(before_after(rows, "sent"), *_time_charts(simulation, names)),
    )


def _references(names: Mapping[str, Any]) -> list[str]:
    first = [name for name in (CONTIGUOUS, EPLB) if name in names]
    return [*first, *(name for name in names if name not in first)]


def _shown(name: str) -> str:
    return PLACER if name == PLAN else name


def _simulation_headline(
    simulation: Simulation, rows: Sequence[tuple[str, float | None, float]]
) -> Headline:
    by_name = {name: (sent, load) for name, sent, load in rows}
    sent, load = by_name[PLACER]
    base_sent, base_load = by_name.get(CONTIGUOUS, (None, None))
    parts = [
        f"{change(sent, theirs)} {REFERENCES[name]}"
        for name, (theirs, _) in by_name.items()
        if name in REFERENCES and sent is not None and theirs is not None
    ]
    told = (
        f"this plan sends {' and '.join(parts)}"
        if parts
        else "every placement sends the same"
    )
    others = {name: load for name, (_, load) in by_name.items() if name in REFERENCES}
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
    plan, base = simulation.batches[PLAN], simulation.batches.get(CONTIGUOUS)
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
        verdict=f"On {simulation.sequences:,} sequences, {told}. "
        + busiest_rank(load, others),
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
            title="break-even: at which bandwidth the plan is faster",
            columns=("baseline", "phase", "tokens/rank", "faster", "GB/s per GPU"),
            rows=rows,
        )


def before_after(
    rows: Sequence[tuple[str, float | None, float]], words: str, plans: Sequence[str] = ()
) -> Chart:
    """Draw what placements send, if anything, and their busiest rank, side by side.

    ``plans`` names those that have the colour of a plan besides the only one.
    """
    panels = []
    for title, column in (
        (f"{words} per token and layer", 1),
        ("busiest rank: load over the mean", 2),
    ):
        values = [(row[0], row[column]) for row in rows]
        bars = tuple(
            Bar(
                label=title_of(name),
                value=float(value),
                text=f"{value:.3f}",
                kind=PLACER if name in plans else kind_of_placement(name),
            )
            for name, value in values
            if isinstance(value, float | int)
        )
        if bars:
            panels.append((title, Bars(bars=bars)))
    return Chart(
        name="comparison",
        title="Before and after",
        reading="Shorter is better.",
        unit="per token and layer; times the mean load",
        baseline="the contiguous placement, and EPLB with as many slots",
        panels=tuple(panels),
    )


def _time_charts(simulation: Simulation, names: Sequence[str]) -> Iterator[Chart]:
    shown = [name for name in names if name in (CONTIGUOUS, EPLB, PLAN)]
    phases = dict.fromkeys(one.batching for one in simulation.batches[PLAN])
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
    timed = all(_times(one) for name in shown for one in simulation.batches[name])
    if timed and len(shown) > 1 and simulation.bandwidth_gb_per_s is not None:
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
                text=f"{line.y[0]:,.1f} µs",
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
    """Draw time over bandwidth, as a share of the first placement's."""
    base, *others = names
    first = title_of(_shown(base))
    panels = []
    for number, shape in enumerate(simulation.batches[PLAN]):
        times = {name: _times(simulation.batches[name][number]) for name in names}
        axes = Lines(
            x_title="GB/s per GPU and direction",
            y_title=f"times {first}",
            log_x=True,
            rule=(1.0, first),
            lines=tuple(
                Line(
                    label=title_of(_shown(name)),
                    kind=kind_of_placement(_shown(name)),
                    x=tuple(bandwidth * speed for speed in _SPEEDS),
                    y=tuple(
                        own / theirs
                        for own, theirs in zip(times[name], times[base], strict=True)
                    ),
                )
                for name in others
            ),
        )
        title = f"{shape.batching}, {shape.tokens_per_rank:,} tokens per rank"
        panels.append((title + _break_even(simulation, number), axes))
    return Chart(
        name="time-by-bandwidth",
        title="Predicted time by bandwidth of the links",
        reading=f"Below 1 a layer is faster than with {first}; where two lines cross is "
        "their break-even bandwidth.",
        unit=f"predicted time of a layer, without overlap, over that with {first}",
        baseline=f"1: {first}; the hardware that was named has {bandwidth:,.3g} GB/s",
        panels=tuple(panels),
    )


def _times(batch: SimulatedBatch) -> list[float]:
    """Return microseconds at each speed: only transfers change with it."""
    time = batch.time
    if time is None or time.latency_us is None:
        return []
    moved = time.dispatch_us + time.combine_us - time.latency_us
    return [time.compute_us + time.latency_us + moved / speed for speed in _SPEEDS]


def _break_even(simulation: Simulation, number: int) -> str:
    """Return in words at which bandwidth the plan is faster than each baseline."""
    told = []
    for name in (CONTIGUOUS, EPLB):
        for one in simulation.break_even.get(name, [])[number : number + 1]:
            at = one.bandwidth_gb_per_s
            where = _BANDWIDTHS[one.pays] if at is None else f"{one.pays} {at:,.0f} GB/s"
            told.append(f"than {'EPLB' if name == EPLB else name} {where}")
    return f": faster {', '.join(told)}" if told else ""
