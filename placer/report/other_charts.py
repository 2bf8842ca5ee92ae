"""Charts of tables of homes and of checkpoints."""

import numpy as np

from placer.arrays import AnyArray
from placer.report.chart import EPLB, PLACER, Bar, Bars, Chart, Line, Lines
from placer.report.checkpoint import Checkpoint
from placer.report.statistics import distinct_rows
from placer.table import Table

_NUM_BINS = 20
_TOKEN, _HISTORY = "token (T)", "history (A)"


def charts_of_table(table: Table) -> tuple[Chart, ...]:
    """Draw how sure a table is of its homes."""
    # The first layers have no history, and use only T.
    kinds = {
        _TOKEN: (0, table.token_confidence[:, distinct_rows(table)].astype(np.float32)),
        _HISTORY: (
            table.lookback,
            table.history_confidence[table.lookback :].astype(np.float32),
        ),
    }
    chance = 1 / table.num_ranks
    return (
        Chart(
            name="confidence-by-layer",
            title="Confidence of the table by layer",
            reading="The further a line is above chance, the more often the table's home "
            "has the token's experts.",
            unit="expected share of a token's experts that are at home, median",
            baseline=f"chance: {chance:.3f}",
            panels=(
                (
                    "",
                    Lines(
                        x_title="MoE layer",
                        y_title="median",
                        rule=(chance, "chance, 1/R"),
                        from_zero=True,
                        lines=tuple(
                            _line(name, range(first, first + len(v)), np.median(v, axis=1))
                            for name, (first, v) in kinds.items()
                            if v.size
                        ),
                    ),
                ),
            ),
        ),
        Chart(
            name="confidence",
            title="Confidence of the table",
            reading="Each distinct token row and each history counts once per layer, even "
            "if it is frequent in text.",
            unit="share of the entries",
            baseline=f"chance: a confidence of {chance:.3f}",
            panels=(
                (
                    "",
                    Lines(
                        x_title="expected share of a token's experts that are at home",
                        y_title="share of entries",
                        from_zero=True,
                        lines=tuple(
                            _line(name, _middles(), _shares(v))
                            for name, (_, v) in kinds.items()
                        ),
                    ),
                ),
            ),
        ),
    )


def _line(name: str, x: AnyArray | range, y: AnyArray) -> Line:
    return Line(
        label=name,
        kind=PLACER if name == _TOKEN else EPLB,
        x=tuple(float(one) for one in x),
        y=tuple(float(one) for one in y),
    )


def _middles() -> AnyArray:
    return (np.arange(_NUM_BINS) + 0.5) / _NUM_BINS


def _shares(values: AnyArray) -> AnyArray:
    counts, _ = np.histogram(values, bins=_NUM_BINS, range=(0, 1))
    return counts / max(values.size, 1)


def chart_of_bytes(checkpoint: Checkpoint) -> Chart:
    """Draw the bytes of a checkpoint by kind of tensor."""
    return Chart(
        name="bytes",
        title="Bytes by kind of tensor",
        reading="A placement reorders experts and routers, and changes no other tensor.",
        unit="MB (1,000,000 bytes)",
        baseline="the largest kind",
        panels=(
            (
                "",
                Bars(
                    bars=tuple(
                        Bar(
                            label=name,
                            value=group.num_bytes / 1e6,
                            text=f"{group.num_bytes / 1e6:,.1f} MB",
                            kind=PLACER,
                        )
                        for name, group in checkpoint.groups.items()
                    )
                ),
            ),
        ),
    )
