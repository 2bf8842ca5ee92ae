"""Heatmaps of one matrix at a time, and the look that all figures have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.arrays import Float32Array

_HEIGHT = 460
_SQUARE_HEIGHT = 640
_SLIDER_HEIGHT = 90
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """One choice of a heatmap that shows one matrix at a time."""

    label: str
    values: Float32Array


def heatmap(
    matrices: Sequence[Matrix],
    *,
    x_title: str,
    y_title: str,
    z_title: str,
    square: bool = False,
    around_one: bool = False,
) -> Any:
    """Show one matrix at a time, the choice by a slider where there are several.

    All share one colour scale, so that they can be compared; ``around_one`` shows what
    is below 1 from what is above.
    """
    import plotly.graph_objects as go

    place = f"{y_title} %{{y}}, {x_title} %{{x}}"
    colours = _colour_range(matrices, around_one)
    figure = go.Figure(
        [
            go.Heatmap(
                z=matrix.values,
                visible=number == 0,
                **colours,
                colorbar={"title": z_title},
                hovertemplate=place + ": %{z:.3f}<extra></extra>",
            )
            for number, matrix in enumerate(matrices)
        ]
    )
    figure.update_xaxes(title=x_title, constrain="domain")
    figure.update_yaxes(title=y_title, autorange="reversed")
    if square:
        figure.update_yaxes(scaleanchor="x", constrain="domain")
    if len(matrices) > 1:
        figure.update_layout(sliders=[_slider([matrix.label for matrix in matrices])])
    height = _SQUARE_HEIGHT if square else _HEIGHT
    return styled(figure, height + (_SLIDER_HEIGHT if len(matrices) > 1 else 0))


def _colour_range(matrices: Sequence[Matrix], around_one: bool) -> dict[str, Any]:
    values = np.concatenate([matrix.values.ravel() for matrix in matrices])
    if around_one:
        reach = float(np.nanmax(np.abs(values - 1), initial=0.01))
        return {"colorscale": "RdBu_r", "zmin": 1 - reach, "zmax": 1 + reach}
    highest = float(np.nanmax(values, initial=0))
    return {"colorscale": "Viridis", "zmin": 0, "zmax": highest or 1.0}


def _slider(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "currentvalue": {"prefix": "", "font": {"size": 14}},
        "pad": {"t": 55},
        "steps": [
            {
                "label": label,
                "method": "update",
                "args": [{"visible": [n == number for n in range(len(labels))]}],
            }
            for number, label in enumerate(labels)
        ],
    }


def styled(figure: Any, height: int = _HEIGHT) -> Any:
    """Give all figures one look."""
    figure.update_layout(
        template="plotly_white",
        font={"family": _FONT, "size": 13, "color": "#222"},
        height=height,
        margin={"l": 70, "r": 30, "t": 40, "b": 60},
    )
    return figure
