"""Runs in forked children make the calls of processes that the user starts."""

import pytest

from tests.faults.checks import normal, state_of
from tests.faults.commands import ALL, COMMANDS
from tests.faults.conftest import MakeBench

#: One of each way to write; `make faults` takes all.
SOME = ["import npz", "export checkpoint --link"]


@pytest.mark.parametrize("name", COMMANDS if ALL else SOME)
def test_a_forked_run_makes_the_calls_of_a_fresh_process(
    name: str, bench: MakeBench
) -> None:
    """The same calls, but for random names and the order of threads; the same bytes."""
    one = bench(name)
    one.clear()
    fresh = one.lab.run_fresh(one.command.line(one.inputs, one.out), one.folder)
    assert fresh.code == 0, fresh.said
    assert state_of(one.out) == one.expected
    assert normal(fresh.calls, one.folder) == normal(one.calls[False], one.folder)
