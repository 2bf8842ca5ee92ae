"""``placer demo``: all of it, on what ships."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    ForceOption,
    JsonOption,
    print_json,
    print_line,
    print_table,
)


def demo(
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
    found = placer.run_demo(out, model=model, force=force)
    if as_json:
        print_json(found.to_json())
        return
    for title, columns, rows in found.tables():
        print_line(str(title))
        print_table(columns, rows)
    print_line(f"\n{found.proof}\n")
    for name, path in found.files.items():
        print_line(f"{name}: {path}")
