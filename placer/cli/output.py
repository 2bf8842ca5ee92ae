"""What commands print: data on stdout, progress, warnings and hints on stderr."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FoldOption = Annotated[
    str | None,
    typer.Option("--fold", metavar="K/N", help="Only sequences whose id mod N is K."),
]
NotFoldOption = Annotated[
    str | None,
    typer.Option(
        "--not-fold", metavar="K/N", help="Only sequences whose id mod N is not K."
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="Where to write the result.")]


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None
) -> None:
    """Print a table for people; numbers are right-aligned."""
    table = Table(
        box=None, pad_edge=False, header_style="", title_justify="left", title=title
    )
    table.title_style = ""
    for position, column in enumerate(columns):
        numeric = all(not isinstance(row[position], str) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(highlight=False, width=120, markup=False).print(table)


def print_line(text: str) -> None:
    """Print one line of data on stdout."""
    sys.stdout.write(text + "\n")


def warn(text: str) -> None:
    """Print a warning on stderr."""
    sys.stderr.write(f"warning: {text}\n")


def note(text: str) -> None:
    """Print a hint on stderr."""
    sys.stderr.write(f"{text}\n")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
