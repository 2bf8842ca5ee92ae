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
    print_next,
    print_tables,
    print_verdict,
    progress_line,
)
from placer.cli.terminal import wrapped


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
    verifies it. In a source tree, it ends with a plan for the real trace of gpt-oss-20b,
    judged on sequences that it was not solved on.
    """
    with progress_line("demo") as progress:
        found = placer.run_demo(out, model=model, force=force, progress=progress)
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict)
    print_line("")
    print_tables(found.tables())
    print_line("")
    print_line(wrapped(found.proof))
    for name, path in found.files.items():
        print_line(f"{name}: {path}")
    print_line("")
    print_tables(found.last_tables())
    for line in found.last_lines():
        print_line(wrapped(line))
    print_next(found.verdict)
