"""``placer demo``: all of it, on what ships."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    ForceOption,
    JsonOption,
    claim,
    note,
    print_json,
    print_line,
    print_table,
)


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")] = Path(
        "placer-demo"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Model to use instead of the demo model.",
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every step on the small model that comes with placer.

    Records its routing on text that comes with Python, and makes a plan for 4 ranks on half
    of the text. Judges the plan on the other half. Exports a permuted checkpoint and
    verifies it.
    """
    from placer.demo.road import NUM_RANKS, POLICIES, run_demo, shipped_model
    from placer.report.comparison import comparison_table
    from placer.simulation.sent import Wire

    model = model or shipped_model()
    claim(context, out, [model], force=force, kinds=[], directory=True)
    report = run_demo(model, out, note)
    verification = report.verification
    if as_json:
        print_json(
            {
                "figures": report.figures,
                "verification": verification.to_json(),
                "files": {name: str(out / path) for name, path in report.files.items()},
            }
        )
        return
    print_line(f"\nHeld-out text, {NUM_RANKS} ranks:\n")
    print_table(*comparison_table(report.figures, POLICIES, Wire()))
    print_line(
        f"\nVerified: {verification.num_tensors} tensors equal bit for bit, "
        f"{verification.num_routed_pairs} routed pairs exactly permuted "
        f"({verification.num_ties} tokens not compared because they follow a tie), "
        f"largest difference of a logit {verification.max_logit_difference:.1g} (allowed "
        f"{verification.tolerance:.1g}).\n"
    )
    for name, path in report.files.items():
        print_line(f"{name}: {out / path}")
