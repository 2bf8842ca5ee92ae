"""Every command that writes, killed and let fail at every kind of call that it makes."""

import pytest

from tests.faults.checks import failing, kills, signalled
from tests.faults.commands import ALL, DISTURBED
from tests.faults.conftest import MakeBench

pytestmark = pytest.mark.parametrize("name", DISTURBED)


def test_what_is_written_is_on_the_disk(name: str, bench: MakeBench) -> None:
    """Every file is flushed before it gets its name, and its directory after."""
    one = bench(name)
    assert one.undisturbed.calls
    assert one.lost() == []


def test_killed_and_run_again_it_writes_the_same_bytes(name: str, bench: MakeBench) -> None:
    assert list(kills(bench(name), 8 if ALL else 1, seed=len(name))) == []


def test_a_call_that_fails_is_told_and_leaves_nothing(name: str, bench: MakeBench) -> None:
    assert list(failing(bench(name), None if ALL else 2, seed=len(name))) == []


def test_a_signal_is_told_in_a_word_and_leaves_nothing(name: str, bench: MakeBench) -> None:
    assert list(signalled(bench(name), 8 if ALL else 1, seed=len(name))) == []
