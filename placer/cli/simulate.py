"""``placer simulate``: what a plan costs on a trace."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    ExpertSizeOption,
    FoldOption,
    HiddenSizeOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    SizedByOption,
    WeightBytesOption,
    parse_selection,
    print_json,
    print_line,
    print_table,
    warn,
)


def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.")],
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="The tokens to serve from it.")
    ],
    table: Annotated[
        Path | None,
        typer.Option("--table", help="The plan's token-shuffle table (placer tables)."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Tokens of one forward pass, from all sequences in turn.")
    ] = 4096,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Placement to compare with (docs/baselines.md); repeatable: contiguous, "
            "balanced, random, eplb, exflow, moetuner, grace, occult, sem-moe, "
            "kernighan-lin, metis or mt-kahypar. Default: contiguous and balanced.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Serve as this engine does (docs/engines.md)."),
    ] = None,
    replica_choice: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which copy of a redundant expert serves: local-first, sglang-static, "
            "hash or cover. Default: the engine's, else what the plan was solved for.",
        ),
    ] = None,
    batching: Annotated[
        str,
        typer.Option(
            help="How batches are drawn: decode (one token of each sequence in turn) or "
            "prefill (each rank its sequences one after another)."
        ),
    ] = "decode",
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Predict the time of a layer: h100, h200, b200, a100, or a .toml file.",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Count the traffic and balance of a plan on a trace, under every home policy.

    Policies: fixed (the sequence's data-parallel rank), follow (the rank that served most
    of the previous layer), oracle (the best home of every layer), and with --table token,
    token_equal (equal slices of every batch) and request (one home per sequence), and by
    its combined rule token_combined and token_equal_combined. Judge on sequences that the
    plan was not solved on: --fold or --not-fold.
    """
    from placer.engine import Engine
    from placer.hardware import Hardware
    from placer.plan import Plan
    from placer.report.batches import batch_tables
    from placer.report.comparison import COLUMNS, comparison_rows
    from placer.simulation.cost import find_expert_shape, require_no_sizes
    from placer.simulation.judge import DEFAULT_BASELINES, Serving, judge_plan
    from placer.trace import Trace

    read = Trace(trace)
    if hardware is None:
        # The bytes that are sent take the width of the hidden state, which not all know.
        width_is_known = read.model.hidden_size is not None
        require_no_sizes(
            model if width_is_known else None,
            hidden_size if width_is_known else None,
            expert_size,
            weight_bytes,
            "--hardware",
        )
    served_by = None if engine is None else Engine.named(engine)
    paths = (str(plan), str(trace))
    judgement = judge_plan(
        plan,
        read,
        selection=parse_selection(fold, not_fold, phase),
        table_path=table,
        batch_size=batch_size,
        baselines=baseline or DEFAULT_BASELINES,
        serving=Serving(
            engine=served_by,
            replica_choice=Plan.read(plan).choose_replicas(
                served_by, replica_choice, shlex.join(["placer", "simulate", *paths])
            ),
            phase=batching,  # type: ignore[arg-type]  # Batches refuses other names
            hardware=None if hardware is None else Hardware.named(hardware),
            expert=find_expert_shape(
                model, hidden_size or read.model.hidden_size, expert_size, weight_bytes
            ),
            hidden_size=hidden_size,
        ),
    )
    for warning in judgement.warnings:
        warn(warning)
    if as_json:
        print_json(judgement.to_json())
        return
    figures = judgement.to_json()
    placements = {**figures["baselines"], "plan": figures["policies"]}
    print_table(COLUMNS, comparison_rows(placements, tuple(judgement.policies)))
    for title, columns, rows in batch_tables(judgement):
        print_table(columns, rows, title)
    for fact in judgement.facts():
        print_line(fact)
