"""``placer inspect``: what is in a file or directory."""

from pathlib import Path
from typing import Annotated

import typer

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
from placer.run.verdict import Verdict


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
            "compare it with. Sequences of the trace that it was solved on are left out.",
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            "--load",
            metavar="TRACE|AFFINITY",
            help="With a plan: show its load on this trace or affinity file. A table names "
            "the busiest rank of each layer, its experts, and those with most load.",
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
    """Show what a file or folder holds, the answer first."""
    from placer.report.artifact import open_beside
    from placer.report.html import write_page
    from placer.report.inspect import summarize
    from placer.report.plan_summary import RANK_LOAD

    beside = [*(others or []), *([] if load is None else [load])]
    if html is not None:
        claim(context, html, [path, *beside], force=force, kinds=[])
    summary = summarize(open_beside(path, beside))
    headline = summary.headline
    if html is not None:
        write_page(html, path.name, summary)
        note(f"report written to {html}")
    verdict = Verdict(answer=(headline.verdict,), next=headline.next)
    if as_json:
        print_json({"verdict": verdict.to_json()} | summary.to_json())
        return
    print_line(f"{summary.kind} {path.name}")
    print_verdict(verdict, always=True)
    for text in headline.misleading:
        warn(text)
    if headline.tiles:
        print_line("")
        print_table(
            ("figure", "before", "after", "unit"),
            [(one.title, one.before, one.after, one.unit) for one in headline.tiles],
        )
    if details:
        facts = summary.flat_facts()
        print_line("")
        print_table(("fact", ""), [(name, plain(value)) for name, value in facts.items()])
    for section in summary.tables:
        if details or (load is not None and section.title == RANK_LOAD):
            print_line("")
            print_table(section.columns, section.rows, title=section.title)
    print_next(verdict)
    if not details:
        print_line("All facts and tables: --details; with charts: --html REPORT")
