"""Working as several processes under torchrun."""

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Self

from placer.errors import PlacerError, UsageError

# A worker waits for the slowest, whose last piece of work may take long.
_TIMEOUT = datetime.timedelta(days=7)
_POLL_SECONDS = 0.05
# Where the first worker that fails says so, and how long it may take to end after that.
_FIRST_FAILURE = "PLACER_FIRST_FAILURE"
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of the processes that torchrun started.

    Attributes
    ----------
    index
        Its number, from 0.
    number
        How many there are.
    local_index
        Its number on this machine.
    """

    index: int = 0
    number: int = 1
    local_index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.number:
            raise UsageError(
                f"RANK is {self.index}, WORLD_SIZE {self.number}",
                "start it with: torchrun --nproc-per-node N --no-python placer COMMAND ...",
            )

    @classmethod
    def of_environment(cls) -> Self:
        """Read the variables that torchrun sets; without them there is one worker.

        Raises
        ------
        UsageError
            If only some of the variables are set, or they are not numbers.
        """
        try:
            return cls(
                index=int(os.environ.get("RANK", 0)),
                number=int(os.environ.get("WORLD_SIZE", 1)),
                local_index=int(os.environ.get("LOCAL_RANK", 0)),
            )
        except ValueError as error:
            raise UsageError(f"RANK, WORLD_SIZE or LOCAL_RANK: {error}") from error

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.number == 1

    def takes(self, chunk: int) -> bool:
        """Return whether chunk number ``chunk`` of the whole trace is this worker's."""
        return chunk % self.number == self.index

    def device(self, name: str) -> str:
        """Return the device of this worker: ``cuda`` means its own one."""
        return f"cuda:{self.local_index}" if name == "cuda" and self.number > 1 else name

    def use_own_gpu(self) -> None:
        """Make this worker's GPU the current one.

        NCCL and pinned memory take that where no tensor names a device; all workers would
        hold a context on the first GPU.

        Raises
        ------
        PlacerError
            If the machine has fewer GPUs than workers.
        """
        import torch

        number = torch.cuda.device_count()
        if self.local_index >= number:
            raise PlacerError(
                f"worker {self.local_index} of this machine has no GPU: the machine has "
                f"{number}",
                "run on CPUs: --device cpu, or on more machines with torchrun",
            )
        torch.cuda.set_device(self.local_index)


ALONE = Worker()


@contextmanager
def together(worker: Worker, backend: str = "gloo") -> Iterator[None]:
    """Join the workers of torchrun for the length of the block, if they are not joined."""
    import torch.distributed as dist

    if worker.alone or dist.is_initialized():
        yield
        return

    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    except BaseException:
        fails_first()  # leaving the group fails the others too
        raise
    finally:
        dist.destroy_process_group()


def fails_first() -> bool:
    """Note that this worker fails; return whether it is the first, or has no others.

    When one worker fails the connections of the others break, which is not worth a message.
    """
    path, rank = os.environ.get(_FIRST_FAILURE), os.environ.get("RANK")
    if path is None or rank is None:
        return True
    with suppress(FileExistsError):
        os.symlink(rank, path)  # unlike a file it is there with what it says, or not
    return os.readlink(path) == rank


def start_workers(number: int, arguments: Sequence[str]) -> int:
    """Run a placer command as ``number`` workers on this machine; return its exit code.

    The first worker's output is this process's own; of the others, only what the one says
    that fails first. One that fails ends all, and none outlives this process, unless that
    is killed outright.

    Raises
    ------
    PlacerError
        If a worker was ended by a signal, as the kernel does when memory runs out.
    """
    workers: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        said = [stack.enter_context(TemporaryFile()) for _ in range(number)]
        ended = stack.enter_context(_noted_sigterm())
        first = Path(stack.enter_context(TemporaryDirectory()), "rank")
        stack.callback(_end, workers)
        shared = _shared_environment(number) | {_FIRST_FAILURE: str(first)}
        for rank in range(number):
            worker = subprocess.Popen(
                [sys.executable, "-m", "placer.cli.main", *arguments],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else said[rank],
            )
            workers.append(worker)
        codes = _wait_for(workers, ended)
        if not codes:
            return 0
        failed = int(os.readlink(first)) if first.is_symlink() else None
        if failed is not None:
            with suppress(subprocess.TimeoutExpired):
                codes[failed] = workers[failed].wait(_END_SECONDS)
        # When one is killed the others fail too, since it does not answer.
        cause = min(
            codes,
            key=lambda rank: (codes[rank] != -signal.SIGKILL, rank != failed, rank),
        )
        if cause:
            said[cause].seek(0)
            sys.stderr.write(said[cause].read().decode(errors="replace"))
    if codes[cause] < 0:
        raise PlacerError(
            f"worker {cause} of {number} was ended by {signal.Signals(-codes[cause]).name}",
            "if memory ran out, start fewer workers here, and others on more machines "
            "with torchrun",
        )
    return codes[cause]


def _shared_environment(number: int) -> dict[str, str]:
    """Return what torchrun sets, and each worker's share of the cores if nobody says."""
    threads = str(max(1, (os.cpu_count() or 1) // number))
    return (
        {"OMP_NUM_THREADS": threads}
        | os.environ
        | {
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    )


@contextmanager
def _noted_sigterm() -> Iterator[list[int]]:
    """Let a polite end of this process run what it has to clean up: only note it.

    An exception could come while a worker starts, who would then outlive this process.
    """
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for(
    workers: Sequence["subprocess.Popen[bytes]"], ended: Sequence[int]
) -> dict[int, int]:
    """Wait until all are done or one fails; return the exit codes of those that failed.

    Exits with 128 and the signal if this process was ``ended`` by one.
    """
    while True:
        if ended:
            raise SystemExit(128 + ended[0])
        codes = {rank: worker.poll() for rank, worker in enumerate(workers)}
        failed = {rank: code for rank, code in codes.items() if code}
        if failed or None not in codes.values():
            return failed
        time.sleep(_POLL_SECONDS)


def _end(workers: Sequence["subprocess.Popen[bytes]"]) -> None:
    for worker in workers:
        worker.kill()
        worker.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
