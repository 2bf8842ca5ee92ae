"""Charts of counts: the load of experts, and their links as lift over chance.

Legend of the shapes: L MoE layers, E logical experts of a layer.
"""

from collections.abc import Sequence

import numpy as np

from placer.affinity import Affinity
from placer.affinity.information import information_by_chance
from placer.arrays import FloatArray, IntArray
from placer.report.chart import CONTIGUOUS, PLACER, Chart, Line, Lines, Matrix, Section
from placer.report.headline import information
from placer.report.statistics import skew

# Cells of the matrices of one chart: what keeps a page small, and the matrices large.
_MOST_CELLS = 150_000
_MOST_PANELS = 3
_LIFT_OCTAVES = 3
_LOAD_OCTAVES = 2


def charts_of_counts(
    choices: Sequence[tuple[str, Sequence[IntArray]]], affinity: Affinity
) -> tuple[Chart, ...]:
    """Draw counts.

    Parameters
    ----------
    choices
        Which tokens, and their L arrays ``[E]`` of pairs per expert.
    affinity
        The counts of all tokens.
    """
    charts = [_load(choices)]
    if affinity.transition:
        charts += [_information(affinity), _flow(affinity)]
    if affinity.has_links:
        charts.append(_together(affinity))
    return tuple(charts)


def layer_load(loads: Sequence[IntArray]) -> FloatArray:
    """Stack the load over the mean of layers ([E_l] each) to ``[L, E]``, NaN past E_l."""
    values = np.full((len(loads), max(map(len, loads))), np.nan)
    for layer, load in enumerate(loads):
        values[layer, : len(load)] = skew(load)
    return values


def lift(pairs: IntArray) -> FloatArray:
    """Return ``[N, M]``: pairs over what their row and column would have by chance.

    NaN where the row or the column has none.
    """
    rows, columns = pairs.sum(axis=1), pairs.sum(axis=0)
    chance = rows[:, None] * columns / max(int(pairs.sum()), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance > 0, pairs / chance, np.nan)


def lift_within(pairs: IntArray, load: IntArray) -> FloatArray:
    """Return ``[E, E]``: tokens of two experts of a layer over those by chance.

    By chance the other experts of a token are drawn by their load. NaN on the diagonal.
    """
    others = load.sum() - load
    chance = pairs.sum(axis=1)[:, None] * load / np.maximum(others, 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(chance > 0, pairs / chance, np.nan)
    np.fill_diagonal(found, np.nan)
    return found


def _load(choices: Sequence[tuple[str, Sequence[IntArray]]]) -> Chart:
    return Chart(
        name="load",
        title="Load of every expert",
        reading="A strong orange cell is an expert that many tokens use; a row of grey is "
        "a layer whose experts are used equally.",
        unit="pairs of a token and an expert, over the mean of the layer",
        baseline="1, an even share",
        panels=tuple(
            (
                label if len(choices) > 1 else "",
                Matrix(
                    x_title="logical expert",
                    y_title="MoE layer",
                    values=layer_load(loads),
                    octaves=_LOAD_OCTAVES,
                ),
            )
            for label, loads in choices
        ),
    )


def _information(affinity: Affinity) -> Chart:
    bits = information(affinity)
    by_chance = [information_by_chance(pairs) for pairs in affinity.transition]
    return Chart(
        name="information",
        title="How well an expert predicts the next layer",
        reading="The further the line is above chance, the more an expert of a token says "
        "about its experts in the next layer.",
        unit="bits of mutual information between a token's experts of two layers",
        baseline="chance: what layers without a link show with as many tokens",
        panels=(
            (
                "",
                Lines(
                    x_title="MoE layer",
                    y_title="bits",
                    from_zero=True,
                    lines=(
                        Line(
                            label="to the next layer",
                            kind=PLACER,
                            x=tuple(map(float, range(len(bits)))),
                            y=tuple(bits),
                        ),
                        Line(
                            label="chance",
                            kind=CONTIGUOUS,
                            x=tuple(map(float, range(len(bits)))),
                            y=tuple(by_chance),
                        ),
                    ),
                ),
            ),
        ),
        table=Section(
            title="mutual information by layer",
            columns=("layer", "next layer", "bits", "by chance"),
            rows=tuple(
                (n, n + 1, *both)
                for n, both in enumerate(zip(bits, by_chance, strict=True))
            ),
        ),
    )


def _flow(affinity: Affinity) -> Chart:
    bits = np.array(information(affinity))
    return Chart(
        name="flow",
        title="Flow to the next layer, as lift over chance",
        reading="A strong orange cell is a pair of experts of neighbouring layers that "
        "follow each other more often than their loads would make them.",
        unit="pairs, divided by what chance gives experts of this load",
        baseline="1, chance",
        panels=tuple(
            (
                f"layer {n} to {n + 1} ({bits[n]:.3f} bits)",
                Matrix(
                    x_title="expert of the next layer",
                    y_title="expert",
                    values=lift(affinity.transition[n]),
                    octaves=_LIFT_OCTAVES,
                ),
            )
            for n in _most(bits, affinity.transition)
        ),
    )


def _together(affinity: Affinity) -> Chart:
    lifts = [
        lift_within(pairs, load)
        for pairs, load in zip(affinity.coactivation, affinity.load, strict=True)
    ]
    spread = np.array([_spread(one) for one in lifts])
    shown = _most(spread, affinity.coactivation)
    return Chart(
        name="together",
        title="Experts that tokens use together, as lift over chance",
        reading="A strong orange cell is a pair of experts of one layer that tokens use "
        "together: on one rank they share one copy of the token.",
        unit="tokens of both experts, divided by what chance gives experts of this load",
        baseline="1, chance",
        panels=tuple(
            (
                f"layer {n}",
                Matrix(
                    x_title="other expert",
                    y_title="expert",
                    values=lifts[n],
                    octaves=_LIFT_OCTAVES,
                ),
            )
            for n in shown
        ),
    )


def _spread(values: FloatArray) -> float:
    """Return how far lifts are from chance, in octaves."""
    known = values[np.isfinite(values) & (values > 0)]
    return float(np.abs(np.log2(known)).mean()) if known.size else 0.0


def _most(score: FloatArray, matrices: Sequence[IntArray]) -> list[int]:
    """Return the layers of the highest score, in order: as many as a page can hold."""
    side = max(map(len, matrices))
    number = max(1, min(_MOST_PANELS, _MOST_CELLS // (side * side)))
    return sorted(np.argsort(-score, kind="stable")[:number].tolist())
