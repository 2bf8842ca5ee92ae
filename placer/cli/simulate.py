"""``placer simulate``: what a plan costs on a trace."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli import choices
from placer.cli.output import (
    BatchingOption,
    DetailsOption,
    ExpertSizeOption,
    FoldOption,
    HiddenSizeOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    SizedByOption,
    TokensPerRankOption,
    WeightBytesOption,
    print_json,
    print_line,
    print_next,
    print_tables,
    print_verdict,
    progress_line,
)
from placer.cli.terminal import wrapped


def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.")],
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="The trace to judge the plan on.")
    ],
    table: Annotated[
        Path | None,
        typer.Option("--table", help="The plan's token-shuffle table (placer tables)."),
    ] = None,
    tokens_per_rank: TokensPerRankOption = None,
    batching: BatchingOption = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=choices.names("baselines"),
            metavar="NAME",
            help="Placement to compare with (docs/baselines.md): contiguous, balanced, "
            "random, eplb, exflow, moetuner, grace, occult, sem-moe, kernighan-lin, "
            "metis or mt-kahypar. Repeatable. Default: contiguous, balanced, eplb.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("engine_families", "engines"),
            metavar="NAME",
            help="The engine that serves (docs/engines.md), or a family of "
            "engines, such as vllm. Default: the engine that the plan was solved for.",
        ),
    ] = None,
    replica_choice: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("replica_choices"),
            metavar="NAME",
            help="Which replica of a redundant expert serves a token: local-first, "
            "sglang-static, hash or cover. Default: the engine's, else the plan's.",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("hardware"),
            metavar="NAME|FILE",
            help="Predict the time of a layer on h100, h200, b200, a100, or on the "
            "hardware of a .toml file (placer calibrate).",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    details: DetailsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a plan on a trace, in decode and prefill batches.

    Judge a plan on sequences that it was not solved on: use --fold or --not-fold. A row's
    policy says how the home rank of a token is chosen. Shown are fixed, the policy of the
    plan, and those of --table. --json has all:

      fixed           the data-parallel rank of the sequence
      follow          the rank that served most of its experts in the layer before
      oracle          the best home in every layer: an upper limit, not a policy
      token           with --table: by token id and history
      token_equal     with --table: like token, with as many tokens on every rank
      token_combined, token_equal_combined
                      with --table: by the table's combined rule
      request         with --table: one home for each sequence
    """
    with progress_line("simulate") as progress:
        found = placer.Plan.read(plan).simulate(
            placer.Trace.read(trace),
            table=table,
            tokens_per_rank=tokens_per_rank,
            batching=batching,
            baseline=baseline,
            engine=engine,
            replica_choice=replica_choice,
            hardware=hardware,
            model=model,
            hidden_size=hidden_size,
            expert_size=expert_size,
            weight_bytes=weight_bytes,
            fold=fold,
            not_fold=not_fold,
            phase=phase,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict, always=True)
    print_line("")
    tables, lines = found.tables(details=details)
    print_tables(tables)
    for line in lines:
        print_line(wrapped(line))
    print_next(found.verdict)
