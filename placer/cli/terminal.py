"""Text for a terminal: tables and verdicts that fit the screen, and their emphasis."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

#: What every table fits, and more where the terminal is wider.
WIDTH = 80
_GAP = "  "
# A text in the last column has so many columns at least.
_LEAST_TEXT = 20
_NO_BREAK = "\N{NO-BREAK SPACE}%"
# Names of rows that take more columns are not repeated, except the first.
_MOST_NAMES = 64
_BOLD, _GOOD, _BAD, _PLAIN = "\033[1m", "\033[1;32m", "\033[1;33m", "\033[0m"


def screen_width() -> int:
    """Return the columns of the terminal, at least 80; 80 where stdout is none."""
    if not sys.stdout.isatty():
        return WIDTH
    return max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def emphasised(text: str, *, is_better: bool | None) -> str:
    """Return a text in bold, green if better and yellow if worse; plain off a terminal.

    ``NO_COLOR`` (https://no-color.org) makes it plain too.
    """
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    style = _BOLD if is_better is None else _GOOD if is_better else _BAD
    return f"{style}{text}{_PLAIN}"


def wrapped(text: str) -> str:
    """Return a text in lines that fit the screen; a command at its end has its own line."""
    text, before, command = text.partition(": placer ")
    if before:
        return f"{wrapped(f'{text}:')}\n  placer {command}"
    filled = textwrap.fill(
        text.replace(" %", _NO_BREAK),
        screen_width(),
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return filled.replace(_NO_BREAK, " %")


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table; numbers are right-aligned.

    Columns that do not fit the screen follow in further tables, which repeat the names of
    the rows. A long text in the last column goes on in the next line; a word is never cut.
    """
    numeric = [
        all(not isinstance(row[n], str) for row in rows) for n in range(len(columns))
    ]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    names = _num_names(rows, widths)
    needed = [*widths[:-1], widths[-1] if numeric[-1] else min(widths[-1], _LEAST_TEXT)]
    for number, chosen in enumerate(_parts(needed, names)):
        if number:
            yield ""
        last = chosen[-1]
        room = screen_width() - sum(widths[n] + len(_GAP) for n in chosen[:-1])
        for row in [list(columns), *cells]:
            texts = [row[last]]
            if not numeric[last] and len(row[last]) > room:
                texts = textwrap.wrap(
                    *(row[last], max(room, _LEAST_TEXT)),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            for place, text in enumerate(texts):
                parts = [("" if place else row[n], n) for n in chosen[:-1]]
                line = _GAP.join(
                    one.rjust(widths[n]) if numeric[n] else one.ljust(widths[n])
                    for one, n in [*parts, (text, last)]
                )
                yield line.rstrip()


def _num_names(rows: Sequence[Sequence[object]], widths: Sequence[int]) -> int:
    """Return how many columns name the rows: the first, and those beside it that count.

    A measured figure is a float; texts and whole numbers, such as a batch size, are names.
    """
    found = 0
    while found < len(widths) - 1 and all(
        isinstance(row[found], str | int) for row in rows
    ):
        found += 1
    wide = sum(widths[:found]) + len(_GAP) * found > _MOST_NAMES
    return 1 if wide else max(1, found)


def _parts(widths: Sequence[int], num_names: int) -> Iterator[list[int]]:
    """Yield the columns of each table: the names, and others as far as they fit."""
    names, width = [*range(num_names)], screen_width()
    begin = sum(widths[n] + len(_GAP) for n in names)
    part, used = [*names], begin
    for n in range(num_names, len(widths)):
        if len(part) > num_names and used + widths[n] > width:
            yield part
            part, used = [*names], begin
        part.append(n)
        used += widths[n] + len(_GAP)
    yield part


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
