"""``placer inspect``: what is in a file or directory."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    DetailsOption,
    ForceOption,
    JsonOption,
    claim,
    note,
    plain,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    warn,
)


def inspect(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A trace, affinity file, plan, folder of plans, table, checkpoint, export "
            "record, engine's map, or what simulate or trace learning prints with --json.",
        ),
    ],
    others: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[TRACE|AFFINITY|PLAN]...",
            help="With a plan: a trace or affinity file to show it on, and plans to "
            "compare it with. Sequences that the plan was solved on are left out.",
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            "--load",
            metavar="TRACE|AFFINITY",
            help="With a plan: show its load on this trace or affinity file. A table names "
            "the busiest rank of each layer, its experts, and which have most load.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write a report with charts: one HTML file that works offline.",
        ),
    ] = None,
    force: ForceOption = False,
    details: DetailsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a file or folder holds. With --details: all tables."""
    beside = [*(others or []), *([] if load is None else [load])]
    if html is not None:
        claim(context, html, [path, *beside], force=force, kinds=["report"])
    found = placer.inspect(path, *(others or []), load=load)
    if html is not None:
        found.write_html(html, force=force)
        note(f"report written to {html}")
    if as_json:
        print_json(found.to_json())
        return
    print_line(f"{found.kind} {path.name}")
    print_verdict(found.verdict, always=True)
    for text in found.warnings:
        warn(text)
    if found.figures:
        print_line("")
        print_table(("figure", "before", "after", "unit"), found.figures)
    if details:
        facts = found.flat_facts
        print_line("")
        print_table(("fact", ""), [(name, plain(value)) for name, value in facts.items()])
    for title, columns, rows in found.tables(details=details):
        print_line("")
        print_table(columns, rows, title)
    print_next(found.verdict)
    if not details:
        print_line("All facts and tables: --details; with charts: --html REPORT")
