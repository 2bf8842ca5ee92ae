"""Charts of a plan beside its baselines.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from msgspec import UNSET

from placer.arrays import FloatArray, IntArray
from placer.errors import UsageError
from placer.placement import Placement
from placer.placement.placement import rank_load
from placer.placement.reference import contiguous
from placer.report.beside import Beside
from placer.report.chart import (
    CONTIGUOUS,
    EPLB,
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
from placer.report.statistics import skew
from placer.report.token_counts import TokenCounts

# More ranks than this are shown by node: what keeps a page small.
_MOST_RANKS = 512
# So that one, two and four ranks have colours of their own.
REPLICA_OCTAVES = 3
_TITLES = {
    PLACER: "this plan",
    EPLB: "EPLB, equal slots",
    CONTIGUOUS: "contiguous",
    "balanced": "balanced (greedy)",
}


def title_of(name: str) -> str:
    """Return what charts call a placement."""
    return _TITLES.get(name, name)


def charts_of_plan(beside: Beside) -> tuple[Chart, ...]:
    """Draw a plan: what was measured, what a trace shows, and its replicas."""
    charts = [*_before_after(beside)]
    if beside.served is not None:
        charts += _of_trace(beside, beside.served)
    elif beside.load is not None:
        placed = beside.plan.placement
        shown = {PLACER: placed}
        if (base := _contiguous(placed)) is not None:
            shown = {CONTIGUOUS: base, PLACER: placed}
        charts += _load_charts(
            {name: _load_of(one, beside.load) for name, one in shown.items()}
        )
    if beside.plan.placement.has_replicas:
        charts.append(_replicas(beside.plan.placement))
    if beside.plan.solver.layer_gaps is not UNSET:
        charts.append(_proof(beside.plan.solver.layer_gaps))
    return tuple(charts)


def _proof(gaps: Sequence[float]) -> Chart:
    """Draw the gap of every layer to what is proved."""
    proved = sum(one == 0 for one in gaps)
    layers = range(len(gaps))
    return Chart(
        name="proof",
        title="Proof by layer",
        reading=f"No placement under the same limits saves more than this. {proved} of "
        f"{len(gaps)} layers are proved optimal.",
        unit="% of the ranks that serve a layer's tokens, on the profile",
        baseline="the proved bound of each layer",
        panels=(
            (
                "",
                Lines(
                    x_title="MoE layer",
                    y_title="",
                    from_zero=True,
                    lines=(
                        Line(
                            label=title_of(PLACER),
                            kind=PLACER,
                            x=tuple(map(float, layers)),
                            y=tuple(100 * one for one in gaps),
                        ),
                    ),
                ),
            ),
        ),
        table=Section(
            title="gap to the proved bound, by layer",
            columns=("layer", "gap, %"),
            rows=tuple((layer, 100 * one) for layer, one in enumerate(gaps)),
        ),
    )


def _contiguous(placed: Placement) -> Placement | None:
    """Return the default placement for the same ranks, if experts divide over them."""
    extra = placed.redundant_experts
    try:
        return contiguous(placed.num_experts, placed.num_ranks, placed.num_nodes, extra)
    except UsageError:
        return None


def _load_of(placement: Placement, load: Sequence[IntArray]) -> FloatArray:
    """Return ``[L, R]``: the load of ranks over the mean, replicas sharing evenly."""
    ranks = [skew(rank_load(placement, n, counts)) for n, counts in enumerate(load)]
    return np.stack(ranks)


def _before_after(beside: Beside) -> Iterator[Chart]:
    """Yield bars of all placements: what is sent, and the busiest rank."""
    ordered = [n for n in (CONTIGUOUS, EPLB) if n in beside.judged]
    ordered += [n for n in beside.judged if n not in (CONTIGUOUS, EPLB, PLACER)]
    names = [*ordered, *(n for n in (PLACER,) if n in beside.judged)]
    if len(names) == 0:
        return
    panels: list[tuple[str, Bars]] = []
    sent = {n: beside.judged[n].sent for n in names}
    if beside.sent is not None:
        panels.append((f"{beside.sent.words} per token and layer", _bars(sent)))
    panels.append(
        (
            "busiest rank: load over the mean",
            _bars({n: beside.judged[n].imbalance for n in names}),
        )
    )
    yield Chart(
        name="comparison",
        title="Before and after",
        reading="Shorter is better.",
        unit="per token and layer; times the mean load",
        baseline="the contiguous placement, and EPLB with as many slots",
        panels=tuple(panels),
    )


def _bars(values: Mapping[str, float | None]) -> Bars:
    return Bars(
        bars=tuple(
            Bar(
                label=title_of(name),
                value=value,
                text=f"{value:.3f}",
                kind=kind_of_placement(name),
            )
            for name, value in values.items()
            if value is not None
        )
    )


def _of_trace(beside: Beside, served: Mapping[str, TokenCounts]) -> Iterator[Chart]:
    names = (CONTIGUOUS, EPLB, *beside.other_plans, PLACER)
    shown = {name: served[name] for name in names if name in served}
    yield from _load_charts(
        {
            name: one.rank_load
            / np.maximum(one.rank_load.mean(axis=1, keepdims=True), 1e-9)
            for name, one in shown.items()
        }
    )
    if beside.sent is not None:
        metric = beside.sent.metric
        yield _by_layer(
            "sent",
            "What is sent, by layer",
            "Where the line of the plan is below the others, the layer sends less.",
            f"{beside.sent.words} per token",
            {name: one.sent[metric] for name, one in shown.items()},
        )
    yield _by_layer(
        "locality",
        "Locality by layer",
        "The share of a token's experts that are on its home rank; higher is more local.",
        "share of (token, expert) pairs",
        {name: one.local for name, one in shown.items()},
        rule=(1 / beside.plan.placement.num_ranks, "chance, 1/R"),
    )
    yield from _traffic_charts(beside, shown)


def _load_charts(loads: Mapping[str, FloatArray]) -> Iterator[Chart]:
    yield Chart(
        name="rank-load",
        title="Load of every rank, before and after",
        reading="Orange ranks have more than the mean and make the others wait; grey is "
        "even.",
        unit="pairs served by a rank, over the mean of the layer",
        baseline="1, an even share",
        panels=tuple(
            (title_of(name), Matrix(x_title="rank", y_title="MoE layer", values=values))
            for name, values in loads.items()
        ),
    )
    yield _by_layer(
        "busiest-rank",
        "The busiest rank, by layer",
        "Every layer waits for its busiest rank: lower is faster.",
        "load of the busiest rank, over the mean",
        {name: values.max(axis=1) for name, values in loads.items()},
        rule=(1.0, "even"),
    )


def _by_layer(
    name: str,
    title: str,
    reading: str,
    unit: str,
    values: Mapping[str, FloatArray],
    rule: tuple[float, str] | None = None,
) -> Chart:
    layers = tuple(map(float, range(len(next(iter(values.values()))))))
    rows = zip(*(one.tolist() for one in values.values()), strict=True)
    return Chart(
        name=name,
        title=title,
        reading=reading,
        unit=unit,
        baseline="the contiguous placement",
        panels=(
            (
                "",
                Lines(
                    x_title="MoE layer",
                    y_title="",
                    rule=rule,
                    lines=tuple(
                        Line(
                            label=title_of(one),
                            kind=kind_of_placement(one),
                            x=layers,
                            y=tuple(of.tolist()),
                        )
                        for one, of in values.items()
                    ),
                ),
            ),
        ),
        table=Section(
            title=f"{title.lower()}, by placement",
            columns=("layer", *values),
            rows=tuple((layer, *row) for layer, row in enumerate(rows)),
        ),
    )


def _traffic_charts(beside: Beside, served: Mapping[str, TokenCounts]) -> Iterator[Chart]:
    placed = beside.plan.placement
    if placed.num_ranks <= _MOST_RANKS:
        yield _traffic(
            "traffic",
            "Traffic between ranks",
            "rank",
            {name: one.traffic for name, one in served.items()},
            {
                name: one.sent["remote_rank_copies_per_token"]
                for name, one in served.items()
            },
        )
    if placed.num_nodes > 1:
        yield _traffic(
            "node-traffic",
            "Traffic between nodes",
            "node",
            {name: one.node_traffic for name, one in served.items()},
            {
                name: one.sent["remote_node_copies_per_token"]
                for name, one in served.items()
            },
        )


def _traffic(
    name: str,
    title: str,
    place: str,
    values: Mapping[str, FloatArray],
    sent: Mapping[str, FloatArray],
) -> Chart:
    base = values.get(CONTIGUOUS, next(iter(values.values())))
    away = ~np.eye(len(base), dtype=np.bool_)
    known = base[away & ~np.isnan(base)]
    mean = float(known.mean()) if known.any() else 1.0
    homeless = " No token has its home in a row without colour." * bool(
        np.isnan(base).any()
    )
    return Chart(
        name=name,
        title=title,
        reading="Blue pairs send less than before, orange pairs more; an orange column is "
        f"a {place} that receives much.{homeless}",
        unit=f"copies from a {place} to another, per layer and token that has its home "
        "there, divided by the mean over pairs of the contiguous placement",
        baseline=f"1: {mean:.4f} copies",
        panels=tuple(
            (
                f"{title_of(one)}: {sent[one].mean():.3f} copies",
                Matrix(
                    x_title=f"to {place}",
                    y_title=f"from {place}",
                    values=np.where(away, of / mean, np.nan),
                ),
            )
            for one, of in values.items()
        ),
    )


def _replicas(placement: Placement) -> Chart:
    sizes = placement.num_experts
    values = np.full((len(sizes), max(sizes)), np.nan)
    for layer, size in enumerate(sizes):
        values[layer, :size] = placement.holds(layer).sum(axis=1)
    most = np.nanargmax(values, axis=1)
    return Chart(
        name="replicas",
        title="Replicas of every expert",
        reading="Orange experts have a slot on two or more ranks, grey ones on one.",
        unit="ranks that hold the expert",
        baseline="1: no replica",
        panels=(
            (
                "",
                Matrix(
                    x_title="logical expert",
                    y_title="MoE layer",
                    values=values,
                    octaves=REPLICA_OCTAVES,
                ),
            ),
        ),
        table=Section(
            title="experts with replicas",
            columns=("layer", "experts with replicas", "most replicated", "its ranks"),
            rows=tuple(
                (
                    layer,
                    int(np.count_nonzero(row > 1)),
                    int(most[layer]),
                    " ".join(map(str, np.flatnonzero(placement.holds(layer)[most[layer]]))),
                )
                for layer, row in enumerate(values)
            ),
        ),
    )
