"""``placer check``: whether a plan still holds."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    print_json,
    print_tables,
    print_verdict,
)


def check(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan that is served.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE|AFFINITY",
            help="Today's traffic: a trace, or an affinity file (then only balance is "
            "judged). Give sequences that the plan was not solved on."
            "",
        ),
    ],
    tolerance: Annotated[
        float,
        typer.Option(
            help="Drift is a rise of more than this. 0.02: a figure of 1.10 has drifted "
            "above 1.12, if chance does not explain it."
        ),
    ] = 0.02,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Check whether traffic has drifted from a plan. Exit 6 if so.

    Compares the plan's traffic and balance on the trace with what the plan records. An
    imported plan records neither: the two halves of the trace are compared. On a trace,
    only differences that chance does not explain count as drift.
    """
    from placer.api.opening import read_source

    found = placer.Plan.read(plan).check(
        read_source(source), tolerance=tolerance, fold=fold, not_fold=not_fold, phase=phase
    )
    if as_json:
        print_json(found.to_json())
    else:
        print_verdict(found.verdict, always=True)
        print_tables(found.tables())
    found.require_held()
