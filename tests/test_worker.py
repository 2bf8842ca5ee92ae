"""Workers started on this machine: their exit code and their words are the command's."""

import pytest

from placer.errors import UsageError
from placer.worker import Worker, start_workers


def test_every_worker_runs_the_command() -> None:
    assert start_workers(2, ["--version"]) == 0


def test_a_failure_is_told_once_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert start_workers(3, ["inspect", "nowhere"]) == 1
    assert capfd.readouterr().err.count("nowhere") <= 2


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "3"), ("WORLD_SIZE", "0"), ("RANK", "first")]
)
def test_a_wrong_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK"):
        Worker.of_environment()


def test_a_worker_of_several_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Worker.of_environment().alone
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    worker = Worker.of_environment()
    assert (worker.index, worker.alone) == (5, False)
    assert (worker.device("cuda"), worker.device("cpu")) == ("cuda:1", "cpu")
