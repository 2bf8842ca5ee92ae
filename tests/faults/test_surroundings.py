"""A second writer that a lock does not stop, and too little memory."""

import pytest

from tests.faults.checks import refused_beside_another, said_badly, state_of
from tests.faults.commands import ALL, COMMANDS
from tests.faults.conftest import MakeBench

#: One of each kind of writer; `make faults` takes all.
SOME = ["affinity", "tables", "trace sample"]


def test_a_second_writer_without_locks_is_found(bench: MakeBench) -> None:
    one = bench("solve counts").with_planted("no_lock")
    assert refused_beside_another(one) == ["it ends with 0"]


@pytest.mark.parametrize("name", COMMANDS if ALL else SOME)
def test_too_little_memory_is_told_or_enough(name: str, bench: MakeBench) -> None:
    one = bench(name)
    words = one.command.line(one.inputs, one.out)
    for mebibytes in (1, 4, 16, 64, 1024):
        one.clear()
        ran = one.lab.run(words, one.folder, memory=mebibytes << 20)
        if ran.code:
            assert ran.code == 1, ran.said
            assert list(said_badly(ran)) == []
            assert list(one.folder.iterdir()) == []
        else:
            assert state_of(one.out) == one.expected
    assert ran.code == 0
