"""Affinity of several traces, or of several machines."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from placer import __version__
from placer.affinity.affinity import Affinity
from placer.affinity.count import count_affinity
from placer.errors import UsageError
from placer.files import sha256_file
from placer.trace import Fold, Trace


def affinity_of_traces(traces: Sequence[Trace], fold: Fold | None) -> Affinity:
    """Count the sequences of ``fold`` in traces of one model.

    Sequence ids of several traces name different sequences, so rows per sequence are
    kept for a single trace only.

    Raises
    ------
    PlacerError
        If the traces are of different models, or the fold is empty.
    UsageError
        If one trace is given twice.
    """
    hashes = [trace.sha256 for trace in traces]
    if len(set(hashes)) < len(hashes):
        raise UsageError(
            "one trace is given twice, so its tokens would count twice",
            "give each trace once",
        )
    provenance = {
        "placer": __version__,
        "traces_sha256": hashes,
        "fold": None if fold is None else str(fold),
    }
    parts = [
        count_affinity(trace.chunks(fold), trace.model, provenance) for trace in traces
    ]
    total = reduce(Affinity.add, parts)
    return total if len(parts) == 1 else total.without_sequences()


def merged_affinity(paths: Sequence[Path]) -> Affinity:
    """Add affinity files of one model, counted on several machines.

    Addition is exact and associative, so the counts do not depend on the order. Rows per
    sequence are left out: ids of several machines name different sequences.

    Raises
    ------
    PlacerError
        If a file cannot be read, or the files are of different models.
    UsageError
        If one file is given twice.
    """
    hashes = [sha256_file(path) for path in paths if path.is_file()]
    if len(set(hashes)) < len(hashes):
        raise UsageError(
            "one affinity file is given twice, so its tokens would count twice",
            "give each file once",
        )
    total = reduce(Affinity.add, [Affinity.read(path) for path in paths])
    provenance = {"placer": __version__, "affinity_sha256": sorted(hashes)}
    return replace(total.without_sequences(), provenance=provenance)
