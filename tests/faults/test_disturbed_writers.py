"""Every command that writes, killed and let fail at every kind of call that it makes."""

import pytest

from tests.faults.checks import (
    Bench,
    failing,
    kills,
    read_only,
    refused_beside_another,
    signalled,
    unreadable,
    vanishing,
)
from tests.faults.commands import ALL, COMMANDS
from tests.faults.conftest import MakeBench


@pytest.fixture(scope="module", params=COMMANDS)
def one(request: pytest.FixtureRequest, bench: MakeBench) -> Bench:
    """The bench of a command: all tests of one come before those of the next."""
    return bench(request.param)


def few(number: int) -> int | None:
    """Return how many of all moments are taken; all of them in `make faults`."""
    return None if ALL else number


def test_what_is_written_is_on_the_disk(one: Bench) -> None:
    """Every file is flushed before it gets its name, and its directory after."""
    one.clear()
    assert one.lost() == []


def test_killed_and_run_again_it_writes_the_same_bytes(one: Bench) -> None:
    assert list(kills(one, few(2))) == []


def test_a_call_that_fails_is_told_and_leaves_nothing(one: Bench) -> None:
    assert list(failing(one, few(3))) == []


def test_a_signal_is_told_in_a_word_and_leaves_nothing(one: Bench) -> None:
    assert list(signalled(one, few(1))) == []


def test_an_input_that_vanishes_or_cannot_be_read_is_told(one: Bench) -> None:
    assert list(unreadable(one, few(2))) == []


def test_a_directory_that_is_read_only_is_told(one: Bench) -> None:
    assert list(read_only(one)) == []


def test_a_directory_that_vanishes_is_told(one: Bench) -> None:
    assert list(vanishing(one)) == []


def test_a_second_writer_is_refused(one: Bench) -> None:
    assert refused_beside_another(one) == []
