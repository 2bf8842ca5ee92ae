"""Sphinx: the pages as a site, which needs no network to build or to read.

The source is the root of the repository, so a link between files holds in both places.
``make docs`` builds ``build/site``; its first page is ``docs/index.html``. Notebooks become
pages of ``build/pages``: with their output where ``make notebooks`` has run.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

project = "placer"
author = "the authors of placer"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "build/pages/*.md",
    "traces/README.md",
    "traces/demo/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = ["**/.*", "build/[!p]*", "placer", "tests"]
myst_heading_anchors = 4  # links to headings are checked too
html_theme = "furo"
html_title = "placer"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def setup(app: Any) -> None:
    """Write the pages of notebooks before Sphinx looks for pages."""
    app.connect("config-inited", lambda *_: write_notebook_pages())


def write_notebook_pages() -> None:
    """Write each notebook as Markdown, executed if it has been."""
    pages = ROOT / "build" / "pages"
    shutil.rmtree(pages, ignore_errors=True)  # of notebooks that are no more
    pages.mkdir(parents=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        executed = ROOT / "build" / "notebooks" / path.name
        if executed.is_file() and executed.stat().st_mtime > path.stat().st_mtime:
            path = executed
        notebook = json.loads(path.read_text(encoding="utf-8"))
        page = "\n\n".join(markdown(notebook)) + "\n"
        (pages / f"{path.stem}.md").write_text(page, encoding="utf-8")


def markdown(notebook: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of a notebook and what they printed."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            yield source.replace(".ipynb)", ".md)")  # another notebook's page
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                continue
            data = output.get("data", {})
            if "text/html" in data:
                html = "".join(data["text/html"])
                yield f"```{{raw}} html\n{html}\n```"
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                yield f"```text\n{text.rstrip()}\n```"
