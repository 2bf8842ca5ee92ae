"""The tables of what happens in each batch, of simulated placements."""

from collections.abc import Iterable, Sequence
from decimal import Decimal

from placer.planning.advice import Advice, Candidate
from placer.planning.judge import PLAN, Judgement
from placer.planning.verdict import grouped, references
from placer.simulation.batch_figures import BatchFigures

Table = tuple[str, tuple[str, ...], list[list[object]]]

_BALANCE = (
    "placement",
    "phase",
    "tokens/rank",
    "straggler",
    "straggler 95%",
    "bottleneck",
    "activated",
    "activated 95%",
)
_TIME = (
    "placement",
    "phase",
    "tokens/rank",
    "compute",
    "dispatch",
    "combine",
    "layer",
    "layer 95%",
    "overlapped",
)
_BREAK_EVEN = ("baseline", "phase", "tokens/rank", "the plan")


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
                "break-even bandwidth (per GPU and direction, without overlap)",
                _BREAK_EVEN,
                _break_even_rows(judgement),
            )
        )
    return tables


def summary_table(judgements: Sequence[Judgement]) -> tuple[Table, list[str]]:
    """Return one table of all engines: what is sent, the busiest rank, and the time.

    Of the baselines, those that verdicts name. The lines say which engines a row is
    for.
    """
    timed = judgements[0].serving.hardware is not None
    columns = ("engine", "placement", "tokens/rank", "sent/token", "straggler")
    rows: list[tuple[str | None, tuple[object, ...]]] = []
    for one in judgements:
        engine = None if one.serving.engine is None else one.serving.engine.name
        figures = {**one.baselines, PLAN: one.policies}
        for name in (*references(one.baselines), PLAN):
            sent = None
            if one.sent is not None:
                policy = one.sent_policy if name == PLAN else one.policy
                sent = getattr(figures[name][policy], one.sent.metric)
            for batch in one.batches[name]:
                row: list[object] = [name, batch.shape.tokens_per_rank, sent]
                row.append(batch.metrics.straggler_mean)
                if batch.time is not None:
                    row += [_rounded(batch.time.total * 1e6)]
                    row += [_rounded(batch.time.overlapped * 1e6)]
                rows.append((engine, tuple(row)))
    more = ("layer us", "overlapped") if timed else ()
    title = "traffic and busiest rank, by engine"
    return (title, (*columns, *more), _by_engine(rows)), _alike_lines(rows)


def _by_engine(
    rows: Iterable[tuple[str | None, tuple[object, ...]]],
) -> list[list[object]]:
    """Return each row once, after the first engine that has it and how many more."""
    return [[_first_of(names), *row] for names, row in grouped(rows)]


def _first_of(names: Sequence[str]) -> str:
    more = len(names) - 1
    return f"{names[0]} and {more} more" if more else names[0]


def _alike_lines(rows: Iterable[tuple[str | None, tuple[object, ...]]]) -> list[str]:
    """Return a line for each label of a table that covers several engines."""
    every = dict.fromkeys(names for names, _ in grouped(rows) if len(names) > 1)
    return [f"{_first_of(names)}: {', '.join(names)}" for names in every]


def advice_table(
    advice: Advice,
) -> tuple[tuple[str, ...], list[list[object]], list[str]]:
    """Return columns, rows and lines: the candidates of every answer, by size of batches.

    The lines say which engines a row is for.
    """
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
    rows = [
        (answer.engine, (name, *(_cell(one, field) for field in known)))
        for answer in advice.answers
        for name, found in answer.candidates.items()
        for one in found
    ]
    columns = [*(["engine"] if named else []), "placement", *(fields[f] for f in known)]
    if not named:
        return tuple(columns), [list(row) for _, row in rows], []
    return tuple(columns), _by_engine(rows), _alike_lines(rows)


def _cell(one: Candidate, field: str) -> object:
    value = getattr(one, field)
    return _rounded(value) if field.endswith("_us") and value is not None else value


def _shape(one: BatchFigures) -> tuple[str, int]:
    return one.shape.batching, one.shape.tokens_per_rank


def _bytes_table(sent: dict[str, dict[str, float]], *, between_nodes: bool) -> Table:
    links = {"slow": ", between", "fast": ", inside"} if between_nodes else {"fast": ""}
    ways = [(way, link) for way in ("dispatch", "combine") for link in links]
    rows: list[list[object]] = [
        [name, *(round(of[f"{way}_{link}"]) for way, link in ways)]
        for name, of in sent.items()
    ]
    title = "bytes sent per token and layer" + (
        ", between nodes and inside them" if between_nodes else ""
    )
    return title, ("placement", *(way + links[link] for way, link in ways)), rows


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
    shown = [value for key, value in time.items() if key != "latency_us"]
    return [name, *_shape(one), *map(_rounded, shown)]


def _rounded(microseconds: float) -> Decimal:
    """Return microseconds with one decimal: no model of a layer is as exact as more."""
    return Decimal(f"{microseconds:.1f}")
