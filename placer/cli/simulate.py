"""``placer simulate``: what a plan costs on a trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    given_command,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    warn,
)
from placer.cli.terminal import wrapped

if TYPE_CHECKING:
    from placer.planning.judge import Judgement


def simulate(
    context: typer.Context,
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
            autocompletion=choices.baselines,
            metavar="NAME",
            help="Placement to compare with (docs/baselines.md): contiguous, balanced, "
            "random, eplb, exflow, moetuner, grace, occult, sem-moe, kernighan-lin, "
            "metis or mt-kahypar. Repeatable. Default: contiguous, balanced, eplb.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.engines_and_families,
            metavar="NAME",
            help="The engine that serves (docs/engines.md), or a family of "
            "engines, such as vllm. Default: the engine that the plan was solved for.",
        ),
    ] = None,
    replica_choice: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.replica_choices,
            metavar="NAME",
            help="Which replica of a redundant expert serves a token: local-first, "
            "sglang-static, hash or cover. Default: the engine's, else the plan's.",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.hardware,
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

    Judge a plan on sequences that it was not solved on: use --fold or --not-fold. Each row
    of the table has a policy, which says how the home rank of a token is chosen:

      fixed           the data-parallel rank of the sequence
      follow          the rank that served most of its experts in the layer before
      oracle          the best home in every layer: an upper limit, not a policy
      token           with --table: by token id and history
      token_equal     with --table: as token, equally many tokens on every rank
      token_combined, token_equal_combined
                      with --table: by the table's combined rule
      request         with --table: one home for each sequence
    """
    from placer.api.simulation import Simulation, judged
    from placer.placement import Plan
    from placer.report.batches import summary_table
    from placer.report.verdicts import verdict_of_simulation
    from placer.trace import Trace

    command = given_command(context, "engine", "as_json")
    judgements = judged(
        plan,
        Trace(trace),
        warn,
        command,
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
    )
    found = Simulation(judgements)
    for warning in found.warnings:
        warn(warning)
    solved = Plan.read(plan)
    verdict = verdict_of_simulation(judgements, solved, plan, command)
    if as_json:
        print_json({"verdict": verdict.to_json()} | found.to_json())
        return
    print_verdict(verdict, always=True)
    print_line("")
    if len(judgements) == 1:
        _show(judgements[0], details=details)
    else:
        (title, columns, rows), alike = summary_table(judgements)
        print_table(columns, rows, title)
        for line in alike:
            print_line(wrapped(line))
    print_next(verdict)


def _show(judgement: "Judgement", *, details: bool) -> None:
    """Print what is sent and the balance, and in detail all tables and facts."""
    from placer.planning.verdict import fact_lines
    from placer.report.batches import batch_tables
    from placer.report.comparison import comparison_table
    from placer.simulation.sent import deployable

    figures = judgement.to_json()
    policies = deployable(judgement.policies, judgement.policy)
    placements = {**figures["baselines"], "plan": figures["policies"]}
    print_table(*comparison_table(placements, policies, judgement.wire, per_batch=False))
    if not details:
        return
    for title, columns, rows in batch_tables(judgement):
        print_line("")
        print_table(columns, rows, title)
    for line in fact_lines(judgement, policies):
        print_line(wrapped(line))
