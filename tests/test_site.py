"""The site: dead links stop it, notebooks become pages, no page loads from elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed: placer[docs]")

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
INDEX = """# Pages

```{toctree}
:glob:

../build/pages/*
```
"""
CELLS = [
    {"cell_type": "markdown", "source": ["# A title\n", "\n", "Words."]},
    {
        "cell_type": "code",
        "source": ["print('seen')"],
        "outputs": [
            {"output_type": "stream", "text": ["seen\n"]},
            {"output_type": "display_data", "data": {"text/html": ["<b>a table</b>"]}},
        ],
    },
]


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    (line,) = (one for one in MAKEFILE.splitlines() if one.startswith("SITE := "))
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *line.split()[3:]],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one page and one notebook."""
    (tmp_path / "docs").mkdir()
    shutil.copyfile(ROOT / "docs" / "conf.py", tmp_path / "docs" / "conf.py")
    (tmp_path / "docs" / "index.md").write_text(INDEX, encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "one.ipynb").write_text(json.dumps({"cells": CELLS}))
    return tmp_path


def test_a_page_needs_no_network(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stderr
    site = tree / "build" / "site"
    loaded = re.compile(
        r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["'](?:\w+:)?//"""
    )
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(\w+:)?//", sheet.read_text(encoding="utf-8"))


def test_a_notebook_is_a_page_with_its_output(tree: Path) -> None:
    assert build(tree).returncode == 0
    page = (tree / "build/site/build/pages/one.html").read_text(encoding="utf-8")
    for text in ("A title", "Words.", "seen", "<b>a table</b>"):
        assert text in page


@pytest.mark.parametrize("link", ["[x](gone.md)", "[x](#gone)", "[x](index.md#gone)"])
def test_a_dead_link_stops_the_site(tree: Path, link: str) -> None:
    index = tree / "docs" / "index.md"
    index.write_text(f"{INDEX}\n{link}\n", encoding="utf-8")
    done = build(tree)
    assert done.returncode != 0
    assert "gone" in done.stderr


def test_a_page_that_no_other_lists_stops_the_site(tree: Path) -> None:
    (tree / "docs" / "lost.md").write_text("# Lost\n", encoding="utf-8")
    assert "lost.md" in build(tree).stderr
