"""Commands in an ASCII locale, with names and texts beyond ASCII, and with a closed stdout.

The code runs in a process of its own: only there are the streams what a shell makes them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.placement import Plan
from placer.placement.reference import contiguous
from placer.trace import Trace

COMMANDS = {
    "help": "--help",
    "trace validate": "trace validate TRACE",
    "trace sample": "trace sample TRACE --sequences 2 --out OUT",
    "affinity": "affinity TRACE --workers 1 --out OUT",
    "solve": "solve TRACE --gpus-per-node 4 --num-sweeps 2 --num-rounds 1 --out OUT",
    "import": "import npz ARRAYS --model MODEL --out OUT",
    "export json": "export json PLAN MODEL --out MAP",
    "export checkpoint": "export checkpoint PLAN MODEL --out OUT",
    "tables": "tables SOLVED TRACE --out OUT",
    "simulate": "simulate SOLVED TRACE",
    "simulate --json": "simulate SOLVED TRACE --json",
    "inspect": "inspect PLAN",
    "inspect --html": "inspect PLAN --html HTML",
    "a file that is missing": "inspect MISSING",
    "wrong usage": "solve TRACE --gpus-per-node 0 --out OUT",
}
#: A shell in this locale decodes file names and output as ASCII.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture
def world(
    tmp_path: Path,
    tiny_model: Path,
    make_plan: Callable[..., Path],
    make_trace: Callable[..., Trace],
    write_plan: Callable[..., Path],
) -> Path:
    """A directory whose name and whose files are not ASCII."""
    folder = tmp_path / "donn\u00e9es \u4e2d"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    trace = make_trace()
    placement = contiguous(trace.model.num_experts, 4)
    write_plan(trace.model, placement, f"{folder.name}/solved.json")
    trace.directory.rename(folder / "trace")
    value = json.loads(make_plan(tiny_model).read_text()) | {"sha256": None}
    value["model"]["id"] = "mod\u00e8le \u4e2d"
    text = json.dumps(value, ensure_ascii=False)
    (folder / "plan.json").write_text(text, encoding="utf-8")
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permuted(np.arange(8))[:2] for _ in range(200)])
    arrays = {
        "experts": experts.reshape(100, 2, 2),
        "sequence_ids": np.repeat(np.arange(10), 10),
    }
    np.savez(folder / "tr\u00e4ce.npz", **arrays)
    assert Plan.read(folder / "plan.json").model.id == "mod\u00e8le \u4e2d"
    return folder


def line(name: str, folder: Path, out: Path) -> list[str]:
    out.mkdir()
    paths = {
        "TRACE": folder / "trace",
        "SOLVED": folder / "solved.json",
        "PLAN": folder / "plan.json",
        "MODEL": folder / "model",
        "ARRAYS": folder / "tr\u00e4ce.npz",
        "MISSING": folder / "nichts \u4e2d",
        "OUT": out / "out",
        "MAP": out / "map.json",
        "HTML": out / "seite.html",
    }
    words = [str(paths.get(word, word)) for word in COMMANDS[name].split()]
    return [sys.executable, "-m", "placer.cli.main", *words]


def surroundings(**more: str) -> dict[str, str]:
    left_out = ("PYTHONIOENCODING", "LANG", "PLACER_DEBUG")
    return {n: v for n, v in os.environ.items() if n not in left_out} | more


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def expected_code(name: str) -> int:
    return {"a file that is missing": 1, "wrong usage": 2}.get(name, 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_ascii_locale_changes_neither_code_nor_output(name: str, world: Path) -> None:
    outcomes = []
    for number, more in enumerate(({"LC_ALL": "C.UTF-8"}, ASCII)):
        out = world / f"sortie \u00e9 {number}"
        done = subprocess.run(
            line(name, world, out),
            env=surroundings(**more),
            capture_output=True,
            check=False,
            timeout=300,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        assert b"placer failed" not in done.stderr, done.stderr.decode()
        assert done.returncode == expected_code(name), done.stderr.decode()
        outcomes.append(files(out))
    usual, ascii_only = outcomes
    assert ascii_only.keys() == usual.keys()
    assert [n for n in usual if ascii_only[n] != usual[n]] == []


@pytest.mark.parametrize("how", ["closed", "broken pipe"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_stdout_is_no_traceback(name: str, how: str, world: Path) -> None:
    """``>&-`` and ``| head -0``: what a command wrote is as whole as with a reader."""
    out = world / "out"
    words = line(name, world, out)
    reading, writing = os.pipe()
    os.close(reading)
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *words] if how == "closed" else words
    try:
        done = subprocess.run(
            command,
            env=surroundings(),
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            timeout=300,
        )
    finally:
        os.close(writing)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"BrokenPipe" not in done.stderr, done.stderr.decode()
    # Whoever reads no more may be told so; a finished command has its output all the same.
    allowed = {expected_code(name)} | ({1} if how == "broken pipe" else set())
    assert done.returncode in allowed, done.stderr.decode()
    if expected_code(name) == 0 and any(
        w in COMMANDS[name] for w in ("OUT", "MAP", "HTML")
    ):
        assert files(out)
    assert not [n for n in files(out) if n.startswith(".")]
