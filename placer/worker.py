"""Working as several processes under torchrun."""

import datetime
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from placer.errors import UsageError

# A worker waits for the slowest, whose last piece of work may take long.
_TIMEOUT = datetime.timedelta(days=7)


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
    """Join the workers of torchrun for the length of the block."""
    if worker.alone:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def start_workers(number: int, arguments: Sequence[str]) -> int:
    """Run a placer command as ``number`` workers on this machine; return its exit code.

    Standard output and error are this process's own.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}")
    command = [sys.executable, *torchrun, "-m", "placer.cli.main", *arguments]
    return subprocess.run(command, check=False).returncode
