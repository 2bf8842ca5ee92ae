"""The page on the API names what there is, and its examples run."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import placer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/api.md"
FLAGS = doctest.ELLIPSIS
MODULES = ["placer", *sorted({f"placer.{one}" for one in placer._MODULES.values()})]

pytestmark = pytest.mark.filterwarnings("ignore::placer.PlacerWarning")


def test_the_page_has_a_row_for_each_public_name() -> None:
    rows = re.findall(r"^\| `placer\.(\w+)", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(placer.__all__)


def test_every_name_has_a_module() -> None:
    assert list(placer._MODULES) == placer.__all__


def test_the_page_names_members_that_there_are() -> None:
    objects = (
        PAGE.read_text(encoding="utf-8").partition("## Objects")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `placer\.(\w+)` \| (.*) \|$", objects, re.M)
    assert rows
    for name, members in rows:
        of = getattr(placer, name)
        known = {*dir(of), *of.__annotations__}
        assert set(re.findall(r"`(\w+)(?:\(\))?`", members)) <= known, name


def test_the_examples_of_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.testfile(str(PAGE), module_relative=False, optionflags=FLAGS)
    assert found.attempted > 5 and not found.failed


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert not doctest.testmod(import_module(name), optionflags=FLAGS).failed
