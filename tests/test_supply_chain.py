"""Packages are built to the same bytes, say their licences, and never use the network."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from placer.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def built(source: Path, out: Path) -> dict[str, str]:
    """Build both packages of a source tree; return their SHA-256."""
    hatchling = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    code = (
        "import sys; from hatchling.build import build_sdist, build_wheel; "
        "build_sdist(sys.argv[1]); build_wheel(sys.argv[1])"
    )
    assert hatchling
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True
    )
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
    }


def test_packages_of_two_copies_are_equal(tmp_path: Path) -> None:
    """Other directory, other times of files, other umask."""
    hashes = []
    for number, mask in enumerate((0o022, 0o077)):
        source = tmp_path / f"copy-{number}"
        before = os.umask(mask)
        try:
            source.mkdir()
            for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
                shutil.copyfile(ROOT / name, source / name)
            for name in ("placer", "traces/demo/model"):
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(
                    ROOT / name, source / name, ignore=skip, copy_function=shutil.copyfile
                )
            for path in source.rglob("*"):
                os.utime(path, (1_000_000_000 + number * 5000,) * 2)
            hashes.append(built(source, tmp_path / f"out-{number}"))
        finally:
            os.umask(before)
    assert len(hashes[0]) == 2
    assert hashes[0] == hashes[1]


def test_licences_of_all_direct_dependencies_are_listed() -> None:
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Za-z0-9_.-]+) \| (.+?) \|", text, flags=re.MULTILINE)
    listed = {name.lower(): licence for name, licence in rows}
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [
        one
        for name, more in extras.items()
        if name not in ("dev", "docs", "fuzz")  # for those who work on placer
        for one in more
    ]
    for requirement in map(Requirement, wanted):
        assert listed.get(requirement.name), requirement.name


class NetworkError(Exception):
    pass


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every connection and look-up of a name fail; return what was tried."""
    tried: list[str] = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(str(args))
        raise NetworkError

    for holder, name in (
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket.socket, "sendto"),
        (socket, "getaddrinfo"),
        (socket, "gethostbyname"),
        (socket, "create_connection"),
    ):
        monkeypatch.setattr(holder, name, refuse)
    return tried


def test_the_whole_road_uses_no_network(
    no_network: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    """From a model to a verified checkpoint and its report; a look-up itself is refused."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    trace, plan, out = tmp_path / "trace", tmp_path / "plan.json", tmp_path / "out"
    table = tmp_path / "table"
    for words in (
        ("record", tiny_model, "--corpus", text, "--sequence-length", 32, "--out", trace),
        ("affinity", trace, "--workers", 1, "--out", tmp_path / "counts"),
        ("solve", trace, "--gpus-per-node", 4, "--max-imbalance", 4, "--out", plan),
        ("tables", plan, trace, "--embeddings", tiny_model, "--out", table),
        ("simulate", plan, trace, "--table", table),
        ("export", "checkpoint", plan, tiny_model, "--out", out),
        ("export", "sglang", plan, tiny_model, "--out", tmp_path / "map.json"),
        ("verify", tiny_model, out, plan, "--corpus", text),
        ("inspect", plan, "--html", tmp_path / "report.html"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 0, words
    assert no_network == []
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    loaded = re.findall(
        r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](https?:[^\"']+)", report
    )
    assert loaded == []
    with pytest.raises(NetworkError):
        socket.create_connection(("localhost", 9))
