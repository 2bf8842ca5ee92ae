"""Read-only and vanishing directories, a second writer, and too little memory."""

import errno
from pathlib import Path

import pytest

from placer.run.writing import claimed
from tests.faults.checks import Bench, state_of
from tests.faults.commands import DISTURBED
from tests.faults.conftest import MakeBench
from tests.faults.lab import CREATE, FAIL_ON, MKDIR, Fault, Ran

SOME = ["solve counts", "trace sample", "export checkpoint", "export csv", "inspect"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def told(ran: Ran) -> str:
    """Return the one sentence of a run that failed."""
    assert ran.code == 1, (ran.code, ran.said)
    lines = [line for line in ran.said.splitlines() if line.startswith("placer: ")]
    assert len(lines) == 1, ran.said
    assert "Traceback" not in ran.said
    return lines[0]


@pytest.mark.parametrize("name", SOME)
def test_a_directory_that_is_read_only_is_told(name: str, bench: MakeBench) -> None:
    one = bench(name)
    fault = Fault(mode=FAIL_ON, at=1, error=errno.EROFS, kinds=CREATE | MKDIR)
    assert "Read-only file system" in told(one.run(fault))
    assert names(one.folder) == []


@pytest.mark.parametrize("name", SOME)
def test_a_directory_that_vanishes_is_told(name: str, bench: MakeBench) -> None:
    one = bench(name, planted="directory_vanishes")
    assert "No such file or directory" in told(one.run(Fault()))
    assert not one.folder.exists() or one.out.name not in names(one.folder)


def refused_beside_another(one: Bench) -> bool:
    """Run a command whose target another process is writing."""
    with claimed(one.out, directory=one.command.directory):
        ran = one.run(Fault(), "--force")
    return ran.code == 1 and "another process is writing" in told(ran)


@pytest.mark.parametrize("name", DISTURBED)
def test_a_second_writer_is_refused(name: str, bench: MakeBench) -> None:
    one = bench(name)
    assert refused_beside_another(one)
    assert names(one.folder) == []


def test_a_second_writer_without_locks_is_found(bench: MakeBench) -> None:
    assert not refused_beside_another(bench("solve counts", planted="no_lock"))


@pytest.mark.parametrize("name", ["affinity", "tables", "trace sample"])
def test_too_little_memory_is_told_or_enough(name: str, bench: MakeBench) -> None:
    one = bench(name)
    codes = []
    for mebibytes in (1, 4, 16, 64, 1024):
        words = one.command.line(one.inputs, one.out)
        ran = one.lab.run(words, one.folder, memory=mebibytes << 20)
        codes.append(ran.code)
        if ran.code:
            told(ran)
            assert names(one.folder) == []
        else:
            assert state_of(one.out) == one.expected
        one.clear()
    assert codes[-1] == 0
