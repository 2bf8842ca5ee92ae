"""What commands that take long tell a log file."""

import time

import pytest

from placer.cli import output


def test_a_log_gets_the_step_at_hand_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each step, and nothing where all is done soon."""
    with output.progress_line("solve") as tell:
        tell("first")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(output, "_QUIET_S", 0.01)
    said = ""
    with output.progress_line("solve") as tell:
        for step in ("first", "second"):
            tell(step)
        while not said:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said.startswith("solve, after 0 s: second\n")


def test_recorded_tokens_are_told_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_QUIET_S", 0.01)
    said = ""
    with output.token_progress() as tell:
        tell(0)
        tell(1500)
        while "1,500 tokens" not in said:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said.startswith("record, after 0 s: 1,500 tokens, ")
