"""Workers started on this machine: their exit code and their words are the command's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from placer.errors import PlacerError, UsageError
from placer.run.worker import Worker, start_workers


def test_every_worker_runs_the_command() -> None:
    assert start_workers(2, ["--version"]) == 0


def test_a_failure_is_told_once_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert start_workers(3, ["inspect", "nowhere"]) == 1
    assert capfd.readouterr().err.count("placer: ") == 1


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


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let workers run a shell script, which knows its ``$RANK``, instead of Python."""
    program = tmp_path / "worker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_worker_that_the_kernel_ends_is_named_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch, "[ $RANK = 2 ] && kill -9 $$; exec sleep 60")
    with pytest.raises(PlacerError, match="worker 2 of 3 was ended by SIGKILL"):
        start_workers(3, [])


def test_the_failure_of_another_worker_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(
        tmp_path, monkeypatch, "[ $RANK = 1 ] && { echo why >&2; exit 4; }; exec sleep 60"
    )
    assert start_workers(2, []) == 4
    assert capfd.readouterr().err == "why\n"


def test_the_first_failure_is_told_where_others_end_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = (
        '[ $RANK = 1 ] && { ln -s 1 "$PLACER_FIRST_FAILURE"; sleep 0.3; '
        "echo why >&2; exit 4; }; "
        'until [ -L "$PLACER_FIRST_FAILURE" ]; do sleep 0.01; done; exit 1'
    )
    pretend(tmp_path, monkeypatch, script)
    assert start_workers(2, []) == 4
    assert capfd.readouterr().err == "why\n"


def test_a_connection_that_a_failure_breaks_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 fails while rank 0 waits for it, whose collective then fails too."""
    code = tmp_path / "command.py"
    code.write_text(
        "import torch.distributed as dist\n"
        "from placer.cli import main\n"
        "from placer.errors import PlacerError\n"
        "from placer.run.worker import Worker, together\n"
        "def app(**_):\n"
        "    worker = Worker.of_environment()\n"
        "    with together(worker):\n"
        "        dist.barrier()\n"
        "        if worker.index:\n"
        "            raise PlacerError('why', 'how')\n"
        "        dist.barrier()\n"
        "main.app = app\n"
        "main.main()\n"
    )
    pretend(tmp_path, monkeypatch, f"exec {sys.executable} {code}")
    assert start_workers(2, []) == 1
    assert capfd.readouterr().err == "placer: why\nhint: how\n"


def test_workers_share_the_cores_unless_the_user_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(tmp_path, monkeypatch, "echo $OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for number in (2, 9):
        start_workers(number, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    start_workers(2, [])
    assert capfd.readouterr().out.split() == ["3", "1", "5"]


def test_no_worker_outlives_a_command_that_is_ended(tmp_path: Path) -> None:
    """As by ``timeout`` or a batch system: SIGTERM goes to the first process only."""
    program = tmp_path / "worker"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/$RANK.pid\nexec sleep 60\n")
    program.chmod(0o755)
    code = (
        f"import sys; sys.executable = {str(program)!r}\n"
        "from placer.run.worker import start_workers\nstart_workers(2, [])"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as command:
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        while not all(file.exists() and file.read_text().strip() for file in files):
            assert command.poll() is None
            time.sleep(0.02)
        command.terminate()
        assert command.wait(timeout=20) == 128 + signal.SIGTERM
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
