"""The tables of what happens in each batch, of simulated placements."""

from collections.abc import Sequence

from placer.report.advice import Advice
from placer.simulation.batch_figures import BatchFigures
from placer.simulation.judge import PLAN, Judgement

Table = tuple[str, tuple[str, ...], list[list[object]]]

_BALANCE = (
    "placement",
    "phase",
    "tokens/rank",
    "straggler",
    "95%",
    "bottleneck",
    "activated",
    "95% of it",
)
_TIME = (
    "placement",
    "phase",
    "tokens/rank",
    "experts",
    "dispatch",
    "combine",
    "layer",
    "95%",
    "overlapped",
)
_BREAK_EVEN = ("beside", "phase", "tokens/rank", "the plan")


def batch_tables(judgement: Judgement) -> list[Table]:
    """Return title, columns and rows of each table.

    Balance per batch; bytes per token, where the hidden size is known; where hardware was
    named also time, and the bandwidth at which times are equal.
    """
    each = [(name, one) for name, figures in judgement.batches.items() for one in figures]
    tables: list[Table] = [
        (
            f"per batch, under {judgement.policy}",
            _BALANCE,
            [_balance_row(name, one) for name, one in each],
        )
    ]
    sent = judgement.bytes_per_token()
    if sent is not None:
        tables.append(_bytes_table(sent, between_nodes=judgement.wire.num_nodes > 1))
    if judgement.serving.hardware is not None:
        name = judgement.serving.hardware.name
        rows = [_time_row(placement, one) for placement, one in each]
        tables.append((f"predicted microseconds of a layer on {name}", _TIME, rows))
        tables.append(
            (
                "where the plan is faster (per GPU and direction, without overlap)",
                _BREAK_EVEN,
                _break_even_rows(judgement),
            )
        )
    return tables


def summary_table(judgements: Sequence[Judgement]) -> Table:
    """Return one table of all engines: what is sent, the busiest rank, and the time."""
    timed = judgements[0].serving.hardware is not None
    columns = ("engine", "placement", "phase", "tokens/rank", "sent/token", "straggler")
    rows = []
    for one in judgements:
        engine = "-" if one.serving.engine is None else one.serving.engine.name
        figures = {**one.baselines, PLAN: one.policies}
        for name, every in one.batches.items():
            sent = None
            if one.sent is not None:
                sent = getattr(figures[name][one.policy], one.sent.metric)
            for batch in every:
                row: list[object] = [engine, name, *_shape(batch), sent]
                row.append(batch.metrics.straggler_mean)
                if batch.time is not None:
                    row += [batch.time.total * 1e6, batch.time.overlapped * 1e6]
                rows.append(row)
    more = ("layer us", "overlapped") if timed else ()
    return "what each engine sends, and its busiest rank", (*columns, *more), rows


def advice_table(advice: Advice) -> tuple[tuple[str, ...], list[list[object]]]:
    """Return columns and rows: the candidates of every answer, by size of batches."""
    every = [c for a in advice.answers for found in a.candidates.values() for c in found]
    fields = {
        "tokens_per_rank": "tokens/rank",
        "sent_per_token": "sent/token",
        "load_imbalance": "imbalance",
        "straggler": "straggler",
        "time_us": "layer us",
        "overlapped_us": "overlapped",
    }
    known = [f for f in fields if any(getattr(one, f) is not None for one in every)]
    named = any(answer.engine is not None for answer in advice.answers)
    rows: list[list[object]] = [
        [*([answer.engine] if named else []), name, *(getattr(one, f) for f in known)]
        for answer in advice.answers
        for name, found in answer.candidates.items()
        for one in found
    ]
    columns = [*(["engine"] if named else []), "placement", *(fields[f] for f in known)]
    return tuple(columns), rows


def _shape(one: BatchFigures) -> tuple[str, int]:
    return one.shape.batching, one.shape.tokens_per_rank


def _bytes_table(sent: dict[str, dict[str, float]], *, between_nodes: bool) -> Table:
    ways = [("between nodes", "slow")] if between_nodes else []
    ways.append(("inside nodes" if between_nodes else "", "fast"))
    keys = [
        (f"{way}_{link}", f"{way} {words}".strip())
        for way in ("dispatch", "combine")
        for words, link in ways
    ]
    rows: list[list[object]] = [
        [name, *(of[key] for key, _ in keys)] for name, of in sent.items()
    ]
    columns = ("placement", *(heading for _, heading in keys))
    return "bytes sent per token and layer", columns, rows


def _break_even_rows(judgement: Judgement) -> list[list[object]]:
    return [
        [name, shape.batching, shape.tokens_per_rank, one.words]
        for name, found in judgement.break_even.items()
        for shape, one in zip(judgement.shapes, found, strict=True)
    ]


def _balance_row(name: str, one: BatchFigures) -> list[object]:
    of = one.metrics
    return [
        name,
        *_shape(one),
        of.straggler_mean,
        of.straggler_p95,
        of.bottleneck_copies_per_token,
        of.activated_experts_mean,
        of.activated_experts_p95,
    ]


def _time_row(name: str, one: BatchFigures) -> list[object]:
    time = {} if one.time is None else one.time.to_json()
    return [name, *_shape(one), *time.values()]
