"""Affinity of one or several trace directories."""

from collections.abc import Sequence
from functools import reduce

from placer import __version__
from placer.affinity.affinity import Affinity
from placer.affinity.count import count_affinity
from placer.errors import UsageError
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
