"""The figure of the README shows the numbers of the README's own table."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figure", ROOT / "docs" / "figure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figure_is_the_table_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    solved = text.partition("$ placer solve traces/gpt-oss-20b")[2].partition("```")[0]
    rows = re.findall(r"^(\w+) +([\d.]+) +[\d.]+ +([\d.]+)", solved, re.MULTILINE)
    found = {name: (float(sent), float(load)) for name, sent, load in rows}
    names = ("contiguous", "eplb", "placer")
    sent, busiest = ({name: found[name][n] for name in names} for n in (0, 1))
    drawn = (ROOT / "docs" / "figure.svg").read_text(encoding="utf-8")
    assert drawn == figure().draw(sent, busiest)


def test_bars_are_in_proportion() -> None:
    names = ("contiguous", "eplb", "placer")
    drawn = figure().draw(dict(zip(names, (4, 3, 1), strict=True)), dict.fromkeys(names, 1))
    widths = [float(one) for one in re.findall(r'<rect[^>]* width="([\d.]+)"', drawn)]
    assert widths == [230, 172.5, 57.5, 230, 230, 230]
