"""Drawings of what placer reads and writes, as plotly figures.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks, D domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.affinity import Affinity, count_affinity
from placer.arrays import AnyArray, Float32Array, IntArray
from placer.errors import PlacerError
from placer.placement import Plan
from placer.placement.placement import rank_load
from placer.report.artifact import Artifact
from placer.report.checkpoint import Checkpoint
from placer.report.heatmap import Matrix, heatmap, styled
from placer.report.statistics import (
    TraceStatistics,
    distinct_rows,
    mutual_information,
    skew,
)
from placer.simulation.sent import Wire, deployable
from placer.table import Table

# Okabe and Ito's colours, which people who see fewer colours can distinguish.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
_NUM_BINS = 50
_CHANCE = "chance, 1/R"
_LEGEND = {"orientation": "h", "y": 1.12}

# Per kind of row: the first layer that uses it, and the confidences of its layers.
_Confidences = dict[str, tuple[int, AnyArray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure with its place on the page.

    Attributes
    ----------
    name
        Identifies the figure on the page: letters and hyphens.
    title
        What it shows.
    caption
        How to read it.
    figure
        A ``plotly.graph_objects.Figure``.
    """

    name: str
    title: str
    caption: str
    figure: Any


def draw(artifact: Artifact, load: Sequence[IntArray] | None = None) -> list[Drawing]:
    """Draw an artifact.

    Parameters
    ----------
    artifact
        What to draw.
    load
        L arrays ``[E]``: for a plan, the pairs per expert whose rank loads are drawn.

    Raises
    ------
    PlacerError
        If plotly is not installed.
    """
    require_plotly()
    match artifact:
        case TraceStatistics():
            return _draw_trace(artifact)
        case Affinity():
            return [_draw_load([("all tokens", artifact.load)]), *_draw_pairs(artifact)]
        case Plan():
            return _draw_plan(artifact, load)
        case Table():
            return _draw_table(artifact)
        case Checkpoint():
            return [_draw_bytes(artifact)]


def require_plotly() -> None:
    """Raise a :class:`PlacerError` that says how to install what draws."""
    try:
        import plotly.graph_objects  # noqa: F401
    except ImportError as error:
        raise PlacerError(
            "the HTML report needs plotly, which is not installed",
            "pip install 'placer[html]'",
        ) from error


def _draw_trace(statistics: TraceStatistics) -> list[Drawing]:
    trace = statistics.trace
    choices = [("all tokens", tuple(load.sum(axis=0) for load in statistics.load))]
    if len(statistics.domains) > 1:
        choices += [
            (f"domain {name}", tuple(load[number] for load in statistics.load))
            for number, name in enumerate(statistics.domains)
        ]
    counted = count_affinity(trace.chunks(), trace.model, {})
    return [_draw_load(choices), *_draw_pairs(counted)]


def _draw_load(choices: Sequence[tuple[str, Sequence[IntArray]]]) -> Drawing:
    return Drawing(
        name="load",
        title="Load of every expert",
        caption="Pairs of a token and an expert, over the mean of the layer: 1 is an even "
        "share. White: the layer has no such expert.",
        figure=heatmap(
            [Matrix(label=label, values=_padded(loads)) for label, loads in choices],
            x_title="logical expert",
            y_title="MoE layer",
            z_title="load / mean",
        ),
    )


def _padded(loads: Sequence[IntArray]) -> Float32Array:
    """Stack the load over the mean of layers ([E_l] each) to ``[L, E]``, NaN past E_l."""
    values = np.full((len(loads), max(map(len, loads))), np.nan, dtype=np.float32)
    for layer, load in enumerate(loads):
        values[layer, : len(load)] = skew(load)
    return values


def _draw_pairs(affinity: Affinity) -> list[Drawing]:
    if not affinity.has_links:
        return []
    drawings = []
    if affinity.transition:
        drawings += [_draw_transition(affinity), _draw_information(affinity)]
    shares = [
        Matrix(label=f"layer {layer}", values=_rows_over(pairs, affinity.load[layer]))
        for layer, pairs in enumerate(affinity.coactivation)
    ]
    coactivation = Drawing(
        name="coactivation",
        title="Co-activation: experts that tokens use together",
        caption="Share of an expert's tokens that also use another expert of the same "
        "layer. Experts of one rank share one copy of the token.",
        figure=heatmap(
            shares,
            x_title="other logical expert",
            y_title="logical expert",
            z_title="share of tokens",
            square=True,
        ),
    )
    return [*drawings, coactivation]


def _draw_transition(affinity: Affinity) -> Drawing:
    return Drawing(
        name="transition",
        title="Transitions: from one layer to the next",
        caption="P(next | current): of the pairs that leave an expert, the share that goes "
        "to each expert of the next MoE layer. Rows sum to 1.",
        figure=heatmap(
            [
                Matrix(
                    label=f"layer {n} to {n + 1}",
                    values=_rows_over(pairs, pairs.sum(axis=1)),
                )
                for n, pairs in enumerate(affinity.transition)
            ],
            x_title="logical expert, next layer",
            y_title="logical expert, current layer",
            z_title="P(next | current)",
            square=True,
        ),
    )


def _draw_information(affinity: Affinity) -> Drawing:
    import plotly.graph_objects as go

    values = [mutual_information(pairs) for pairs in affinity.transition]
    figure = go.Figure(
        go.Bar(
            x=[f"{n} to {n + 1}" for n in range(len(values))],
            y=values,
            marker_color=_COLOURS[0],
            hovertemplate="layer %{x}: %{y:.3f} bits<extra></extra>",
        )
    )
    figure.update_xaxes(title="MoE layers", type="category")
    figure.update_yaxes(title="mutual information (bits)", rangemode="tozero")
    return Drawing(
        name="information",
        title="How well an expert predicts the next layer",
        caption="Mutual information of one expert of a token, drawn at random, and one "
        "of its experts in the next MoE layer: a plug-in estimate, too high on few tokens.",
        figure=styled(figure),
    )


def _rows_over(pairs: IntArray, whole: IntArray) -> Float32Array:
    """Return ``[N, M]`` float32: each row over its whole, zero where that is zero."""
    return (pairs / np.maximum(whole, 1)[:, None]).astype(np.float32)


def _draw_plan(plan: Plan, load: Sequence[IntArray] | None) -> list[Drawing]:
    drawings = [_draw_placement(plan)]
    if load is not None:
        drawings.append(_draw_rank_load(plan, load))
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    if own is not None:
        drawings.append(
            _draw_comparison(plan, {**plan.metrics["baselines"], "placer": own})
        )
    return drawings


def _draw_placement(plan: Plan) -> Drawing:
    import plotly.graph_objects as go

    placement = plan.placement
    width = max(placement.num_experts)
    first = np.full((placement.num_layers, width), np.nan, dtype=np.float32)
    text = np.full(first.shape, "", dtype=object)
    for layer, size in enumerate(placement.num_experts):
        held = placement.holds(layer)
        first[layer, :size] = placement.expert_rank(layer)
        text[layer, :size] = [", ".join(map(str, np.flatnonzero(row))) for row in held]
    figure = go.Figure(
        go.Heatmap(
            z=first,
            text=text.tolist(),
            colorscale=_rank_colours(placement.num_ranks),
            zmin=-0.5,
            zmax=placement.num_ranks - 0.5,
            xgap=1,
            ygap=1,
            colorbar={"title": "rank", "dtick": max(1, placement.num_ranks // 16)},
            hovertemplate="layer %{y}, expert %{x}: rank %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(title="logical expert")
    figure.update_yaxes(title="MoE layer", autorange="reversed")
    return Drawing(
        name="placement",
        title="The rank of every expert",
        caption="Colour: the rank of an expert's first replica; hover for all of them.",
        figure=styled(figure),
    )


def _rank_colours(num_ranks: int) -> list[tuple[float, str]]:
    """Return a stepped colour scale, one step per rank."""
    from plotly.colors import sample_colorscale

    colours = sample_colorscale("Turbo", [(r + 0.5) / num_ranks for r in range(num_ranks)])
    return [
        (edge / num_ranks, colours[rank])
        for rank in range(num_ranks)
        for edge in (rank, rank + 1)
    ]


def _draw_rank_load(plan: Plan, load: Sequence[IntArray]) -> Drawing:
    values = np.stack(
        [skew(rank_load(plan.placement, n, counts)) for n, counts in enumerate(load)]
    )
    return Drawing(
        name="rank-load",
        title="Load of every rank",
        caption="Pairs served by a rank, over the mean of the layer. The plan's load cap "
        f"on its profile: {plan.max_imbalance:g}.",
        figure=heatmap(
            [Matrix(label="all tokens", values=values.astype(np.float32))],
            x_title="rank",
            y_title="MoE layer",
            z_title="load / mean",
            around_one=True,
        ),
    )


def _draw_comparison(plan: Plan, placements: dict[str, Any]) -> Drawing:
    """Draw what the plan's engine sends, or the balance where placement leaves that."""
    import plotly.graph_objects as go

    sent = Wire.of(plan, plan.engine).compared(plan.policy)
    metric = "load_imbalance_mean" if sent is None else sent.metric
    words = "busiest rank's load / mean" if sent is None else f"{sent.words} per token"
    figure = go.Figure()
    for (name, figures), colour in zip(
        placements.items(), _cycled(placements), strict=True
    ):
        policies = deployable(figures, plan.policy)
        values = [figures[policy][metric] for policy in policies]
        figure.add_bar(
            name=name,
            x=policies,
            y=values,
            text=[f"{value:.2f}" for value in values],
            marker_color=colour,
            hovertemplate=f"{name}, %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title="home policy")
    figure.update_yaxes(title=f"{words}, mean over layers", rangemode="tozero")
    figure.update_layout(barmode="group", legend=_LEGEND)
    return Drawing(
        name="comparison",
        title="Comparison with the baselines",
        caption=f"{words.capitalize()}; less is better. On the sequences of the table.",
        figure=styled(figure),
    )


def _cycled(names: Sequence[Any] | dict[str, Any]) -> list[str]:
    return [_COLOURS[n % len(_COLOURS)] for n in range(len(names))]


def _draw_table(table: Table) -> list[Drawing]:
    # The first layers have no history, and use only T.
    kinds = {
        "token (T)": (0, table.token_confidence[:, distinct_rows(table)]),
        "history (A)": (table.lookback, table.history_confidence[table.lookback :]),
    }
    return [_draw_confidence(table, kinds), _draw_confidence_by_layer(table, kinds)]


def _draw_confidence(table: Table, kinds: _Confidences) -> Drawing:
    import plotly.graph_objects as go

    edges = np.linspace(0, 1, _NUM_BINS + 1)
    figure = go.Figure()
    for (name, (_, values)), colour in zip(kinds.items(), _COLOURS, strict=False):
        counts, _ = np.histogram(values.astype(np.float32), bins=edges)
        figure.add_bar(
            name=name,
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts / max(values.size, 1),
            marker_color=colour,
            opacity=0.75,
            hovertemplate="confidence %{x:.2f}: %{y:.1%} of entries<extra></extra>",
        )
    figure.add_vline(x=1 / table.num_ranks, line_dash="dot", annotation_text=_CHANCE)
    figure.update_xaxes(title="expected local activation rate", range=[0, 1])
    figure.update_yaxes(title="share of entries", tickformat=".0%")
    figure.update_layout(barmode="overlay", bargap=0, legend=_LEGEND)
    return Drawing(
        name="confidence",
        title="Confidence of the table",
        caption="Each distinct token row and each history counts once per layer, even if "
        "it is frequent in text.",
        figure=styled(figure),
    )


def _draw_confidence_by_layer(table: Table, kinds: _Confidences) -> Drawing:
    import plotly.graph_objects as go

    num_layers = table.model.num_layers
    figure = go.Figure()
    for (name, (first, values)), colour in zip(kinds.items(), _COLOURS, strict=False):
        figure.add_scatter(
            name=name,
            x=list(range(first, num_layers)),
            y=np.median(values.astype(np.float32), axis=1),
            mode="lines+markers",
            line_color=colour,
            hovertemplate="layer %{x}: %{y:.3f}<extra></extra>",
        )
    figure.add_hline(y=1 / table.num_ranks, line_dash="dot", annotation_text=_CHANCE)
    figure.update_xaxes(
        title="MoE layer", dtick=max(1, num_layers // 16), range=[-0.5, num_layers - 0.5]
    )
    figure.update_yaxes(title="median expected local activation rate", range=[0, 1])
    figure.update_layout(legend=_LEGEND)
    return Drawing(
        name="confidence-by-layer",
        title="Confidence of the table by layer",
        caption="Medians over distinct token rows and over histories.",
        figure=styled(figure),
    )


def _draw_bytes(checkpoint: Checkpoint) -> Drawing:
    import plotly.graph_objects as go

    groups = checkpoint.groups
    figure = go.Figure(
        go.Bar(
            x=[group.num_bytes / 1e6 for group in groups.values()],
            y=list(groups),
            orientation="h",
            text=[f"{group.num_bytes / 1e6:,.1f} MB" for group in groups.values()],
            marker_color=_COLOURS[0],
            hovertemplate="%{y}: %{x:,.3f} MB<extra></extra>",
        )
    )
    figure.update_xaxes(title="size (MB = 1,000,000 bytes)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return Drawing(
        name="bytes",
        title="Bytes by kind of tensor",
        caption="A placement reorders experts and routers, and changes no other tensor.",
        figure=styled(figure),
    )
