"""``placer advise``: whether placing experts is worth it."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli import choices
from placer.cli.output import (
    BatchingOption,
    DetailsOption,
    ExpertSizeOption,
    GpusPerNodeOption,
    HiddenSizeOption,
    JsonOption,
    NodesOption,
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


def advise(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE|AFFINITY", help="A trace directory or an affinity file."
        ),
    ],
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    policy: Annotated[
        str,
        typer.Option(
            autocompletion=choices.among("fixed", "follow"),
            help="How the home of a token, the rank that has its hidden state, is chosen: "
            "fixed or follow (docs/concepts.md).",
        ),
    ] = "fixed",
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("engine_families", "engines"),
            metavar="NAME",
            help="An engine (docs/engines.md), or a family of engines, such as "
            "vllm. Default: two answers, one for all-gather (the engines' default), "
            "one for a token all-to-all.",
        ),
    ] = None,
    tokens_per_rank: TokensPerRankOption = None,
    batching: BatchingOption = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("hardware"),
            metavar="NAME|FILE",
            help="Judge by predicted time on h100, h200, b200, a100, or on the hardware "
            "of a .toml file (placer calibrate).",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    least_gain: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Smallest saving that is worth a change: 0.03 is 3 %."
        ),
    ] = 0.03,
    phase: PhaseOption = "all",
    details: DetailsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether to place by traffic, only balance, or do nothing.

    A quick plan is made on half of the sequences and judged on the other half. An affinity
    file, such as the loads that an engine counted, can only judge balance. Nothing is
    written. A line that begins with next: is the command to run next.
    """
    from placer.api.opening import read_source

    with progress_line("advise") as progress:
        found = placer.advise(
            read_source(source),
            gpus_per_node=gpus_per_node,
            nodes=nodes,
            engine=engine,
            policy=policy,
            tokens_per_rank=tokens_per_rank,
            batching=batching,
            hardware=hardware,
            least_gain=least_gain,
            phase=phase,
            model=model,
            hidden_size=hidden_size,
            expert_size=expert_size,
            weight_bytes=weight_bytes,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict, always=True)
    if details:
        print_line("")
        table, alike = found.table()
        print_tables([table])
        for line in alike:
            print_line(wrapped(line))
    for reason in found.reasons:
        print_line(wrapped(f"- {reason}"))
    print_next(found.verdict)
    if found.then is not None:
        print_line(f"then, for its predicted time: {found.then}")
