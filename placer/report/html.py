"""The report: one HTML file with everything in it, which needs no network and no script."""

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from placer.report.chart import Chart, Matrix, Section
from placer.report.headline import Tile
from placer.report.summary import Summary
from placer.report.svg import drawn, is_broad, key
from placer.run.writing import atomic_file
from placer.version import __version__

# The chart that belongs to the top screen.
_FIRST = "comparison"
# Drawn, as not every font has one.
_ARROW = (
    '<svg class="arrow" role="img" aria-label="to" viewBox="0 0 20 12">'
    '<path d="M1 6h16M12 1l5 5-5 5"/></svg>'
)
# Numbers from here on are written without decimals.
_NO_DECIMALS = 10_000
# Longer tables are folded.
_MOST_ROWS = 8


def write_page(path: Path, name: str, summary: Summary) -> None:
    """Write one HTML file: the same content gives the same bytes.

    Parameters
    ----------
    path
        Where to write.
    name
        What the page calls the artifact, such as its file name.
    summary
        What it shows.
    """
    text = page(name, summary)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(name: str, summary: Summary) -> str:
    """Return the whole page: what matters first, how it was made last."""
    title = escape(f"{summary.kind} {name}")
    style = files("placer.report").joinpath("page.css").read_text(encoding="utf-8")
    first = [chart for chart in summary.charts if chart.name == _FIRST]
    rest = [chart for chart in summary.charts if chart.name != _FIRST]
    links = "".join(f'<a href="#{one.name}">{escape(one.title)}</a>\n' for one in rest)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="verdict">{_sentence(summary.headline.verdict)}</p>
{"".join(_banner(text) for text in summary.headline.misleading)}
{_tiles(summary.headline.tiles)}
{_next(summary.headline.next)}
{"".join(map(_chart, first))}
</header>
<nav aria-label="Charts">
{links}<a href="#run-details">Run details</a>
</nav>
<main>
{"".join(map(_chart, rest))}
{"".join(map(_section, summary.sections))}
<section class="wide">
<h2 id="run-details">Run details</h2>
<details><summary>Where this comes from</summary>
{_facts(summary)}
</details>
</section>
</main>
<footer>placer {__version__}. This page holds all of its data and needs no network.</footer>
</body>
</html>
"""


def _banner(text: str) -> str:
    return f'<p class="banner"><strong>Careful:</strong> {_sentence(text)}</p>\n'


def _sentence(text: str) -> str:
    """Keep numbers and their unit on one line."""
    return escape(text).replace(" %", "&nbsp;%")


def _tiles(tiles: tuple[Tile, ...]) -> str:
    return f'<dl class="tiles">\n{"".join(map(_tile, tiles))}</dl>'


def _tile(tile: Tile) -> str:
    before = ""
    if tile.before is not None:
        before = f'<span class="before">{number(tile.before)}</span> {_ARROW} '
    return (
        f"<div><dt>{escape(tile.title)}</dt>"
        f'<dd class="value">{before}<b>{number(tile.after)}</b></dd>'
        f'<dd class="unit">{escape(tile.unit)}</dd></div>\n'
    )


def _next(command: str | None) -> str:
    return "" if command is None else f"<p>Next: <code>{escape(command)}</code></p>"


def _chart(chart: Chart) -> str:
    panels = [panel for _, panel in chart.panels]
    wide = ' class="wide"' if len(panels) > 1 or any(map(is_broad, panels)) else ""
    octaves = {panel.octaves for panel in panels if isinstance(panel, Matrix)}
    return (
        f'<section{wide}>\n<h2 id="{chart.name}">{escape(chart.title)}</h2>\n'
        f"<p>{escape(chart.reading)}</p>\n"
        f'<p class="unit">Unit: {escape(chart.unit)}. '
        f"Baseline: {escape(chart.baseline)}.</p>\n"
        f"{''.join(map(key, octaves))}"
        f'<div class="panels">\n{"".join(_panels(chart))}</div>\n'
        f"{'' if chart.table is None else _folded(chart.table)}</section>\n"
    )


def _panels(chart: Chart) -> Iterator[str]:
    for title, panel in chart.panels:
        heading = f"<h3>{escape(title)}</h3>" if title else ""
        kind = "panel broad" if is_broad(panel) else "panel"
        yield f'<div class="{kind}">{heading}{drawn(panel, title or chart.title)}</div>\n'


def _section(section: Section) -> str:
    """Long tables are folded, so that a page can be read through."""
    if len(section.rows) > _MOST_ROWS:
        return f'<section class="wide">\n{_folded(section)}</section>\n'
    title = escape(section.title[:1].upper() + section.title[1:])
    return f'<section class="wide">\n<h2>{title}</h2>\n{_table(section)}</section>\n'


def _folded(section: Section) -> str:
    title = escape(section.title)
    return (
        f"<details><summary>Table: {title} ({len(section.rows)} rows)</summary>\n"
        f"{_table(section)}</details>\n"
    )


def _table(section: Section) -> str:
    head = "".join(
        f'<th scope="col"{_alignment(section, column)}>{escape(name)}</th>'
        for column, name in enumerate(section.columns)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{_alignment(section, column)}>{escape(_cell(value))}</td>"
            for column, value in enumerate(row)
        )
        + "</tr>\n"
        for row in section.rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _alignment(section: Section, column: int) -> str:
    textual = any(isinstance(row[column], str) for row in section.rows)
    return "" if textual else ' class="number"'


def _facts(summary: Summary) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_text(value))}</td></tr>\n'
        for name, value in summary.flat_facts().items()
        if value is not None
    )
    return f'<table class="facts"><tbody>\n{rows}</tbody></table>\n'


def number(value: float) -> str:
    """Write a number of the top screen: counts in full, others with up to four digits."""
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:,.3f}"


def _cell(value: Any) -> str:
    """Write a value of a table, whose decimals are aligned."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= _NO_DECIMALS else f"{value:.3f}"
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < _NO_DECIMALS else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
