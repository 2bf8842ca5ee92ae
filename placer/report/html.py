"""The report: one HTML file with everything in it, which needs no network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from placer import __version__
from placer.arrays import IntArray
from placer.report.artifact import Artifact
from placer.report.figures import Drawing, draw, require_plotly
from placer.report.inspect import Section, Summary, summarize
from placer.run.writing import atomic_file

_CONFIG = {"displaylogo": False, "responsive": True}
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: #222; background: #fff; max-width: 1080px; margin: 0 auto;
  padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; max-width: 72ch; color: #444; }
nav { margin: 12px 0 24px; }
nav a { margin-right: 16px; color: #0072b2; text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e6e6e6; }
thead th { border-bottom: 2px solid #999; font-weight: 600; }
td.number, th.number { text-align: right; }
.facts th { font-weight: 500; color: #555; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
footer { margin-top: 48px; color: #777; font-size: 13px; }
"""


def write_html(
    path: Path, name: str, artifact: Artifact, load: Sequence[IntArray] | None = None
) -> None:
    """Draw an artifact to one HTML file: the same artifact gives the same bytes.

    Parameters
    ----------
    path
        Where to write.
    name
        What the page calls the artifact, such as its file name.
    artifact
        What to draw.
    load
        L arrays ``[E]``: for a plan, the pairs per expert whose rank loads are drawn.

    Raises
    ------
    PlacerError
        If plotly is not installed.
    """
    require_plotly()
    text = page(name, summarize(artifact, load), draw(artifact, load))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(name: str, summary: Summary, drawings: Sequence[Drawing]) -> str:
    """Return the whole page, with plotly's script in it once."""
    from plotly.offline import get_plotlyjs

    links = "".join(
        f'<a href="#{drawing.name}">{escape(drawing.title)}</a>' for drawing in drawings
    )
    title = f"{summary.kind} {name}"
    sections = "".join(_section(section) for section in summary.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>{escape(title)}</h1>
<nav>{links}</nav>
{_facts(summary)}
{"".join(_figure(drawing) for drawing in drawings)}
{sections}
<footer>placer {__version__}. This page holds all of its data and needs no network.</footer>
</body>
</html>
"""


def _facts(summary: Summary) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>\n"
        for name, value in summary.flat_facts().items()
        if value is not None
    )
    return f'<table class="facts"><tbody>\n{rows}</tbody></table>\n'


def _section(section: Section) -> str:
    head = "".join(
        f"<th{_alignment(section, column)}>{escape(name)}</th>"
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
        f"<h2>{escape(section.title[:1].upper() + section.title[1:])}</h2>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _alignment(section: Section, column: int) -> str:
    textual = any(isinstance(row[column], str) for row in section.rows)
    return "" if textual else ' class="number"'


def _figure(drawing: Drawing) -> str:
    from plotly.io import to_html

    figure = to_html(
        drawing.figure,
        config=_CONFIG,
        include_plotlyjs=False,
        full_html=False,
        div_id=f"figure-{drawing.name}",
        default_height=f"{drawing.figure.layout.height}px",
    )
    return (
        f'<h2 id="{drawing.name}">{escape(drawing.title)}</h2>\n'
        f"<p>{escape(drawing.caption)}</p>\n{figure}\n"
    )


def _cell(value: Any) -> str:
    """Write a value of a table, whose decimals are aligned."""
    return f"{value:.3f}" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
