"""The suites find what they are for: faults that are planted into placer."""

import pytest

from tests.faults.checks import failing, kills
from tests.faults.conftest import MakeBench


@pytest.mark.parametrize("planted", ["no_fsync", "no_flush_of_directories"])
@pytest.mark.parametrize("name", ["solve counts", "trace sample", "export checkpoint"])
def test_what_is_not_flushed_is_found(name: str, planted: str, bench: MakeBench) -> None:
    assert bench(name).with_planted(planted).lost()


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("solve counts", "named_before_it_is_written"),
        ("export csv", "named_before_it_is_written"),
        ("trace sample", "old_removed_first"),
        ("record", "half_written_files_stay"),
    ],
)
def test_a_kill_finds_the_wrong_order(name: str, planted: str, bench: MakeBench) -> None:
    assert next(kills(bench(name).with_planted(planted), 40), "")


@pytest.mark.parametrize("planted", ["temporaries_stay", "errors_are_swallowed"])
def test_a_failing_call_finds_careless_cleaning(planted: str, bench: MakeBench) -> None:
    assert next(failing(bench("solve counts").with_planted(planted), None), "")
