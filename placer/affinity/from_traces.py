"""Affinity of several traces, or of several machines."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

from placer.affinity.affinity import Affinity
from placer.affinity.count import ChunkSource, count_sources
from placer.affinity.sums import ROWS, Rows
from placer.errors import UsageError, one_of
from placer.model import Combination, recorded_tokenizer
from placer.run.devices import CPU
from placer.run.files import sha256_file
from placer.run.parallel import PROCESSES, Backend
from placer.run.progress import Progress, Steps
from placer.trace import Chunk, Selection, Trace
from placer.version import __version__

# Starting a process costs about as much as counting this many tokens.
_WORTH_A_WORKER = 250_000
# Enough to see progress, few enough for sums to cost little beside counting.
_PARTS_OF_A_WORKER = 8


def affinity_of_traces(
    traces: Sequence[Trace],
    selection: Selection,
    num_workers: int = 1,
    backend: Backend = PROCESSES,
    *,
    rows: Rows = "none",
    device: str = CPU,
    warn: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Affinity:
    """Count the tokens selected in traces of one model.

    At most ``num_workers`` processes share the chunks of a trace; small traces are not
    shared. The counts are the same, on a GPU (``device`` ``cuda``) too, which one process
    feeds.

    ``rows`` is as for :func:`count_affinity`. Sequence ids of several traces name different
    sequences, so rows per sequence are for one trace only. ``warn`` takes a warning where
    a trace does not say which model or tokenizer it is of. ``progress`` gets a line for
    each part that is counted.

    Raises
    ------
    PlacerError
        If no token is selected, or there is no such device.
    UsageError
        If the traces are of different models or tokenizers, one is given twice, several
        with rows per sequence, ``rows`` or ``device`` is not known, or several processes
        should share a GPU.
    """
    one_of("--rows", rows, ROWS)
    if device != CPU and (num_workers > 1 or backend != PROCESSES):
        raise UsageError(
            f"--device {device} counts in one process on this machine, not with --workers "
            f"{num_workers} and --backend {backend.name}",
            f"leave --workers and --backend out, or count on CPUs: --device {CPU}",
        )
    if rows == "sequences" and len(traces) > 1:
        raise UsageError(
            f"--rows sequences takes one trace, got {len(traces)}: the same id names "
            "different sequences in each",
            "merge them first: placer trace merge TRACE... --out TRACE",
        )
    hashes = [trace.sha256 for trace in traces]
    if len(set(hashes)) < len(hashes):
        raise UsageError(
            "one trace is given twice, so its tokens would count twice",
            "give each trace once",
        )
    both = Combination(warn)
    for trace in traces:
        both.add(str(trace.directory), trace.model, trace.tokenizer_sha256)
    provenance = {
        "placer": __version__,
        "traces_sha256": sorted(hashes),
        "tokenizer_sha256": both.tokenizer_sha256,
        **selection.to_json(),
    }
    processes = [_num_processes(trace, num_workers) for trace in traces]
    sources = [
        _sources(trace, selection, number * _PARTS_OF_A_WORKER if device == CPU else 1)
        for trace, number in zip(traces, processes, strict=True)
    ]
    steps = Steps(tell=progress, total=sum(map(len, sources)), unit="part")
    parts = (
        count_sources(
            of_trace,
            both.model,
            provenance,
            rows=rows,
            backend=backend,
            device=device,
            num_workers=number,
            steps=steps,
        )
        for of_trace, number in zip(sources, processes, strict=True)
    )
    return reduce(Affinity.add, parts)


def _num_processes(trace: Trace, num_workers: int) -> int:
    """Return how many processes are worth starting."""
    worth = trace.header.num_tokens // _WORTH_A_WORKER
    return max(1, min(num_workers, len(trace.header.chunks), worth))


def _sources(trace: Trace, selection: Selection, number: int) -> list[ChunkSource]:
    """Cut the list of chunks into ``number`` runs, or as many as there are chunks."""
    chunks = trace.header.chunks
    number = max(1, min(number, len(chunks)))
    cuts = [len(chunks) * n // number for n in range(number + 1)]
    return [
        # A task of Ray may run in another directory.
        partial(_read_chunks, trace.directory.absolute(), selection, start, stop)
        for start, stop in itertools.pairwise(cuts)
    ]


def _read_chunks(
    directory: Path, selection: Selection, start: int, stop: int
) -> Iterator[Chunk]:
    return Trace(directory).chunks(selection, start, stop)


def merged_affinity(
    paths: Sequence[Path], warn: Callable[[str], None] = lambda _: None
) -> Affinity:
    """Add affinity files of one model, counted on several machines.

    Addition is exact and associative, so the counts do not depend on the order. Rows per
    sequence are left out: ids of several machines name different sequences. ``warn``
    takes a warning where a file does not say which model or tokenizer it is of.

    Raises
    ------
    PlacerError
        If a file cannot be read, or only some count pairs of experts.
    UsageError
        If the files are of different models or tokenizers, or one is given twice.
    """
    hashes = [sha256_file(path) for path in paths if path.is_file()]
    if len(set(hashes)) < len(hashes):
        raise UsageError(
            "one affinity file is given twice, so its tokens would count twice",
            "give each file once",
        )
    both = Combination(warn)

    def read(path: Path) -> Affinity:
        one = Affinity.read(path)
        both.add(str(path), one.model, recorded_tokenizer(one.provenance))
        return one

    # One after another, so that memory holds two of them at a time.
    total = reduce(Affinity.add, map(read, paths))
    provenance = {
        "placer": __version__,
        "affinity_sha256": sorted(hashes),
        "tokenizer_sha256": both.tokenizer_sha256,
    }
    return replace(total.without_sequences(), model=both.model, provenance=provenance)
