"""The table of a replay."""

from placer.replay.outcome import ReplayedRun, ReplayOutcome, link_bytes

_COLUMNS = (
    "placement",
    "exchange",
    "dispatch fast",
    "dispatch slow",
    "combine fast",
    "combine slow",
    "as predicted",
    "error",
    "ms/pass",
)


_WORDS = {
    "described": "ids, weights and counts",
    "gathered": "outputs to all ranks",
    "keys_and_values": "keys and values",
}


def columns(outcome: ReplayOutcome) -> tuple[str, ...]:
    """Return what the rows hold: the last ones are predictions for other links."""
    return (*_COLUMNS, *(f"on {name}" for name in outcome.runs[0].elsewhere))


def rows(outcome: ReplayOutcome) -> list[tuple[object, ...]]:
    """Return one row per run: bytes of hidden states per token and layer, measured."""
    return [_row(run) for run in outcome.runs]


def _row(run: ReplayedRun) -> tuple[object, ...]:
    per_token = run.num_tokens * len(run.dispatch)
    sent = (
        round(total / per_token, 1)
        for matrix in (run.dispatch, run.combine)
        for total in link_bytes(matrix, run.ranks_per_node)
    )
    return (
        run.placement,
        run.exchange,
        *sent,
        "yes" if run.as_predicted else "NO",
        f"{run.error:.0e}",
        "-" if run.seconds is None else f"{run.seconds * 1e3:.1f}",
        *(f"{seconds * 1e3:.1f}" for seconds in run.elsewhere.values()),
    )


def facts(outcome: ReplayOutcome) -> list[str]:
    """Return what the figures mean, and what they leave out."""
    tokens = outcome.num_passes * outcome.batch_size * outcome.sequence_length
    nodes = f"{outcome.num_nodes} node{'s' * (outcome.num_nodes > 1)}"
    lines = [
        "bytes of hidden states per token and MoE layer, between ranks: fast inside a "
        "node, slow between nodes",
        f"{tokens:,} tokens in {outcome.num_passes} forward passes of "
        f"{outcome.batch_size} sequences x {outcome.sequence_length}, "
        f"{outcome.num_ranks} ranks, {nodes}, {outcome.dtype} on {outcome.device}",
    ]
    for run in outcome.runs:
        per_token = run.num_tokens * len(run.dispatch)
        totals = {
            name: sum(link_bytes(matrix, run.ranks_per_node))
            for name, matrix in run.other_data.items()
        }
        told = [
            f"{total / per_token:,.1f} of {_WORDS[name]}"
            for name, total in totals.items()
            if total
        ]
        if told:
            lines.append(f"{run.placement}, {run.exchange}: also sent {', '.join(told)}")
    if outcome.runs[0].elsewhere:
        lines.append(
            "ms/pass on other links are predicted: the time measured here, with the "
            "collectives' time on those links"
        )
    if outcome.device == "cpu":
        lines.append("the timed processes share this machine's cores")
    return lines
