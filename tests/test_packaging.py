"""What an installation promises: extras stay optional, stages stay apart, pins fit."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

import placer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "placer"
SOURCES = sorted(PACKAGE.rglob("*.py"))

IMPORT_WITHOUT_EXTRAS = """
import importlib, sys
for name in ("plotly", "transformers", "tokenizers", "pytest", "hypothesis"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


# Classes of transformers' own kinds, which nothing imports before transformers is there.
EXTENDS_TRANSFORMERS = {
    "placer.replay.exchanges",
    "placer.replay.follow",
    "placer.replay.session",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_imports_without_the_extras() -> None:
    names = sorted({*map(module_name, SOURCES)} - EXTENDS_TRANSFORMERS)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_EXTRAS, *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    importers = []
    for path in SOURCES:
        if PACKAGE / "cli" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if any(one.startswith("placer.cli") for one in names):
                importers.append(path.relative_to(ROOT).as_posix())
    assert importers == []


def test_installed_version_is_the_one_in_the_source() -> None:
    assert version("placer") == placer.__version__


def test_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert placer.__version__ in text


def test_constraints_pin_every_direct_dependency_inside_its_range() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", text, flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "placer":
            continue
        assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name]), str(requirement)
