"""Working as several processes under torchrun."""

import datetime
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Self

from placer.errors import UsageError

# A worker waits for the slowest, whose last piece of work may take long.
_TIMEOUT = datetime.timedelta(days=7)
_POLL_SECONDS = 0.05


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
        """Read the variables that torchrun sets; without them there is one worker."""
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
    finally:
        dist.destroy_process_group()


def start_workers(number: int, arguments: Sequence[str]) -> int:
    """Run a placer command as ``number`` workers on this machine; return its exit code.

    The first worker's output is this process's own; of the others, only what one says that
    fails alone. One that fails ends all.
    """
    with ExitStack() as stack:
        said = [stack.enter_context(TemporaryFile()) for _ in range(number)]
        shared = os.environ | {
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "placer.cli.main", *arguments],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else said[rank],
            )
            for rank in range(number)
        ]
        failed = _wait_for(workers)
        if failed and 0 not in failed:
            said[failed[0]].seek(0)
            sys.stderr.write(said[failed[0]].read().decode(errors="replace"))
        return workers[failed[0]].returncode if failed else 0


def _wait_for(workers: Sequence["subprocess.Popen[bytes]"]) -> list[int]:
    """Wait for all, and end all if one fails; return those that failed by themselves."""
    try:
        while True:
            running = any(worker.poll() is None for worker in workers)
            failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
            if failed or not running:
                return failed
            time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
