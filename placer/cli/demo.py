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
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")] = Path(
        "placer-demo"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Model to use. Default: the demo model that comes with placer.",
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every step on the demo model, with text that comes with Python.

    Records the model's routing, solves on one half of the text, judges on the other half
    on 4 ranks, exports a permuted checkpoint and proves that it is the same function.
    """
    from placer.demo.road import NUM_RANKS, POLICIES, run_demo, shipped_model
    from placer.report.comparison import comparison_table
    from placer.simulation.sent import Wire

    model = model or shipped_model()
    claim(context, out, [model], force=force, directory=True)
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
