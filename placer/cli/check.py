"""``placer check``: whether a plan still holds."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    parse_selection,
    print_json,
    print_table,
    print_verdict,
    warn,
)


def check(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan that is served.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE|AFFINITY",
            help="Today's traffic: a trace, or an affinity file (then only balance is "
            "judged). Not the trace that the plan was solved on.",
        ),
    ],
    tolerance: Annotated[
        float,
        typer.Option(
            help="How far a figure may rise: 0.02 allows 1.12 where the plan records 1.10."
        ),
    ] = 0.02,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Check whether traffic has drifted from a plan. Exit 6 if so.

    Compares the plan's traffic and balance on the trace with what the plan records. Only
    differences that chance does not explain count as drift.
    """
    from placer.affinity import Affinity
    from placer.errors import DriftError, require_left_out
    from placer.placement import Plan
    from placer.planning.drift import check_on_loads, check_plan
    from placer.planning.profile import layer_ids_of, other_phase, profile_itself
    from placer.report.verdicts import verdict_of_check
    from placer.serving.replica_choice import unknown_dense_layers
    from placer.trace import Trace

    read, chosen = Plan.read(plan), parse_selection(fold, not_fold, phase)
    if source.is_file():
        folds = {"--fold": fold, "--not-fold": not_fold}
        phases = {"--phase": phase if phase != "all" else None}
        require_left_out(folds | phases, "a trace: counts have no tokens to select")
        counts = Affinity.read(source)
        pairs = int(max(load.sum() for load in counts.load))
        judged = f"{pairs:,} pairs of a token and an expert per layer"
        report = check_on_loads(read, counts, str(source), tolerance, str(plan))
        model = counts.model
        limit: str | None = "counts do not show traffic: only balance is judged"
    else:
        trace = Trace(source)
        model, report = trace.model, check_plan(read, trace, chosen, tolerance, str(plan))
        judged = f"{report.num_tokens:,} tokens"
        limit = other_phase(read, chosen)
        if read.solver.status == "imported":
            limit = (
                f"{plan} was imported, so it records no figures: the later half of the "
                "sequences is compared with the earlier half"
            )
    dense = unknown_dense_layers(
        read.placement, read.recorded_choice, layer_ids_of(read, model)
    )
    for warning in (dense, limit, profile_itself(read, source, chosen)):
        if warning is not None:
            warn(warning)
    verdict = verdict_of_check(report, read, plan, source, judged)
    if as_json:
        print_json(
            {
                "verdict": verdict.to_json(),
                "drifted": report.drifted,
                "figures": [one.to_json() for one in report.figures],
                "num_tokens": report.num_tokens,
                "num_sequences": report.num_sequences,
            }
        )
    else:
        print_verdict(verdict, always=True)
        print_table(
            ("figure", "then", "now", "standard error", "allowed", ""),
            [
                (
                    one.name,
                    one.then,
                    one.now,
                    one.error,
                    one.then + one.allowed,
                    "drifted" if one.drifted else "holds",
                )
                for one in report.figures
            ],
        )
    if report.drifted:
        raise DriftError(
            f"traffic has drifted from {plan}",
            f"improve it with few moves: {verdict.next}",
        )
