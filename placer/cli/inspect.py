"""``placer inspect``: what is in a file or directory."""

from pathlib import Path
from typing import Annotated, Any

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


def inspect(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A trace, affinity file, plan, table or checkpoint."
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write a report with charts: one HTML file that works offline.",
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE|AFFINITY",
            help="With a plan: show the load of its ranks on this trace or affinity file.",
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a trace, affinity file, plan, table or checkpoint."""
    from placer.report.artifact import open_artifact
    from placer.report.html import write_html
    from placer.report.inspect import summarize
    from placer.report.load import load_for

    if html is not None:
        claim(context, html, [path, load], force=force, kinds=[])
    artifact = open_artifact(path)
    counted = None if load is None else load_for(artifact, path, load)
    if html is not None:
        write_html(html, path.name, artifact, counted)
        note(f"report written to {html}")
    summary = summarize(artifact, counted)
    if as_json:
        print_json(summary.to_json())
        return
    print_line(f"{summary.kind} {path.name}")
    facts = summary.flat_facts()
    width = max(map(len, facts))
    for name, value in facts.items():
        print_line(f"  {name:<{width}}  {_plain(value)}")
    for section in summary.sections:
        print_line("")
        print_table(section.columns, section.rows, title=section.title)


def _plain(value: Any) -> str:
    """Write a fact in one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
    return str(value)
