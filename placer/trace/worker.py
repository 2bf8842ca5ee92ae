"""Recording by several processes under torchrun, each with a share of the chunks.

Chunk n is worker ``n mod W``'s, who writes a trace of its own beside the place of the whole
one. Put together in order they are what one process would have written, byte for byte.
"""

import datetime
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from placer.errors import PlacerError, UsageError
from placer.trace.header import TraceHeader
from placer.trace.writer import TraceWriter

# A worker waits for the slowest, whose last chunk may take long.
_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of the processes that record a trace.

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
                "start it with: torchrun --nproc-per-node N --no-python placer record ...",
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

    def takes(self, chunk: int) -> bool:
        """Return whether chunk number ``chunk`` of the whole trace is this worker's."""
        return chunk % self.number == self.index

    def device(self, name: str) -> str:
        """Return the device of this worker: ``cuda`` means its own one."""
        return f"cuda:{self.local_index}" if name == "cuda" and self.number > 1 else name

    def part(self, out: Path) -> Path:
        """Return where this worker writes; ``out`` itself if it is alone."""
        return out if self.number == 1 else _part(out, self.index, self.number)


ALONE = Worker()


@contextmanager
def together(worker: Worker) -> Iterator[None]:
    """Join the workers of torchrun for the length of the block."""
    if worker.number == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def assemble(out: Path, worker: Worker, num_chunks: int) -> None:
    """Wait for all workers, then let the first put their parts together.

    Parameters
    ----------
    out
        The trace directory to write.
    worker
        This process, inside :func:`together`.
    num_chunks
        How many chunks its part has; 0 if it wrote none.

    Raises
    ------
    PlacerError
        If a part is not to be seen from here, or is not what its worker wrote.
    """
    import torch.distributed as dist

    counts: list[int] = [0] * worker.number
    dist.all_gather_object(counts, num_chunks)
    if worker.index == 0:
        put_together(out, counts)
    dist.barrier()


def put_together(out: Path, num_chunks: list[int]) -> None:
    """Write the parts that W workers left as one trace, and remove them.

    Parameters
    ----------
    out
        The trace directory to write.
    num_chunks
        ``[W]``: chunks of every worker's part.

    Raises
    ------
    PlacerError
        If a part is missing, or has another number of chunks.
    """
    number = len(num_chunks)
    parts = [_part(out, index, number) for index in range(number)]
    headers: dict[int, TraceHeader] = {}
    for index, count in enumerate(num_chunks):
        if not count:
            continue
        if not parts[index].is_dir():
            raise PlacerError(
                f"the part {parts[index]} that worker {index} wrote is not to be seen from "
                "here",
                "write to a directory that all machines share: --out DIR",
            )
        headers[index] = TraceHeader.read(parts[index])
    first = headers[0]
    with TraceWriter(
        directory=out,
        model=first.model,
        domains=first.domains,
        provenance=first.provenance,
    ) as writer:
        for chunk in range(sum(num_chunks)):
            turn, index = divmod(chunk, number)
            info = headers[index].chunks[turn]
            writer.append_file(parts[index] / info.file, info)
        writer.finish()
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)


def _part(out: Path, index: int, number: int) -> Path:
    return out.with_name(f"{out.name}.part-{index}-of-{number}")
