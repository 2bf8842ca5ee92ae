"""The tables of what happens in each batch, of a simulated plan and its baselines."""

from placer.simulation.batch_figures import BatchFigures
from placer.simulation.judge import Judgement

Table = tuple[str, tuple[str, ...], list[list[object]]]

_BALANCE = (
    "placement",
    "batch",
    "straggler",
    "95%",
    "bottleneck",
    "activated",
    "95% of it",
)
_BYTES = (
    "placement",
    "dispatch, inside nodes",
    "between",
    "combine, inside",
    "between nodes",
)
_TIME = (
    "placement",
    "batch",
    "experts",
    "dispatch",
    "combine",
    "layer",
    "95%",
    "overlapped",
)


def batch_tables(judgement: Judgement) -> list[Table]:
    """Return title, columns and rows of each table.

    Balance per batch; bytes per token, where the hidden size is known; time, where
    hardware was named.
    """
    each = [(name, one) for name, figures in judgement.batches.items() for one in figures]
    tables: list[Table] = [
        (
            f"per batch ({judgement.serving.phase}, {judgement.policy})",
            _BALANCE,
            [_balance_row(name, one) for name, one in each],
        )
    ]
    sent = judgement.bytes_per_token()
    if sent is not None:
        rows: list[list[object]] = [
            [name, *(round(sent_by) for sent_by in ways.values())]
            for name, ways in sent.items()
        ]
        tables.append(("bytes sent per token and layer", _BYTES, rows))
    if judgement.serving.hardware is not None:
        name = judgement.serving.hardware.name
        rows = [_time_row(placement, one) for placement, one in each]
        tables.append((f"predicted microseconds of a layer on {name}", _TIME, rows))
    return tables


def _balance_row(name: str, one: BatchFigures) -> list[object]:
    of = one.metrics
    return [
        name,
        of.batch_size,
        of.straggler_mean,
        of.straggler_p95,
        of.bottleneck_copies_per_token,
        of.activated_experts_mean,
        of.activated_experts_p95,
    ]


def _time_row(name: str, one: BatchFigures) -> list[object]:
    time = {} if one.time is None else one.time.to_json()
    return [name, one.metrics.batch_size, *time.values()]
