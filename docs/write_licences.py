"""Write docs/licences.md: what placer depends on, and under which licences.

Run after a change of dependencies: ``.venv/bin/python docs/write_licences.py``. It reads
the installed packages, from placer's direct dependencies on to all that those need.
"""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
EXTRAS = ("record", "ray", "baselines")
HEAD = """# Licences of dependencies

placer is under the Apache License 2.0 and contains no code of others. What it needs is
installed with it, in the versions of `constraints.txt`. `docs/write_licences.py` writes
this page from what is installed on Linux.
"""


def main() -> None:
    """Write the page."""
    found: dict[str, tuple[Distribution, str]] = {}
    for extra in ("", *EXTRAS):
        for name in needed("placer", extra):
            collect(name, extra, found)
    rows = [
        f"| {one.metadata['Name']} | {licence(one)} | {one.version} | {extra or 'always'} |"
        for _, (one, extra) in sorted(found.items())
    ]
    table = ["", "| package | licence | version | needed |", "|---|---|---|---|", *rows]
    (HERE / "licences.md").write_text(HEAD + "\n".join(table) + "\n", encoding="utf-8")


def collect(name: str, extra: str, found: dict[str, tuple[Distribution, str]]) -> None:
    """Add a package and all that it needs."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    try:
        one = distribution(name)
    except PackageNotFoundError:  # for another platform
        return
    if key not in found:
        found[key] = (one, extra)
        for more in needed(name, ""):
            collect(more, extra, found)


def needed(name: str, extra: str) -> Iterator[str]:
    """Yield what a package needs here; with an extra, what the extra alone adds."""
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else not always and marker.evaluate({"extra": extra}):
            yield requirement.name


def licence(one: Distribution) -> str:
    """Return the licence that a package states, as short as it states it."""
    if expression := one.metadata.get("License-Expression"):
        return expression
    classes = [
        value.rpartition(" :: ")[2]
        for value in one.metadata.get_all("Classifier") or []
        if value.startswith("License ::") and value != "License :: OSI Approved"
    ]
    text = (one.metadata.get("License") or "").strip().partition("\n")[0][:60]
    return ", ".join(classes) or text or "see its files"


if __name__ == "__main__":
    main()
