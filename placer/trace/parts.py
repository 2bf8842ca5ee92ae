"""Recording by several processes under torchrun, each with a share of the chunks.

Chunk n is worker ``n mod W``'s, who writes its own trace next to the final one
one. Put together in order they are what one process would have written, byte for byte.
"""

import shutil
from pathlib import Path

from placer.errors import PlacerError
from placer.run.worker import Worker
from placer.trace.header import TraceHeader
from placer.trace.writer import TraceWriter


def part_of(worker: Worker, out: Path) -> Path:
    """Return where a worker writes: ``out`` itself if it is the only one."""
    return out if worker.alone else _part(out, worker.index, worker.number)


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
                f"the part {parts[index]} that worker {index} wrote is not visible from "
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
