"""What plans and tables were made from, to tell held-out sequences from those seen."""

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.plan import Plan
from placer.table.table import Table
from placer.trace import Fold, Trace


def made_from(made: Plan | Table, trace: Trace) -> bool:
    """Return whether this trace was the profile, or part of it, or none is recorded."""
    if isinstance(made, Table):
        recorded: Any = made.trace_sha256
    else:
        # Of counts there may be several.
        given = made.provenance
        recorded = given.get("trace_sha256") or given.get("traces_sha256")
    if isinstance(recorded, list):
        return trace.sha256 in recorded
    return recorded is None or recorded == trace.sha256


def profile_fold(made: Plan | Table, trace: Trace) -> Fold | None:
    """Return the fold of ``trace`` that a plan or table is made from, if it records one."""
    text = made.provenance.get("fold")
    if isinstance(text, str) and made_from(made, trace):
        return Fold.from_text(text)
    return None


def num_seen_sequences(
    made: Plan | Table, trace: Trace, sequence_ids: npt.NDArray[np.int32]
) -> int:
    """Return how many of these sequences of ``trace`` a plan or table is made from."""
    if not made_from(made, trace):
        return 0
    present = np.unique(sequence_ids)
    fold = profile_fold(made, trace)
    return len(present) if fold is None else int(fold.keep(present).sum())


def expert_load(trace: Trace, fold: Fold | None) -> list[npt.NDArray[Any]]:
    """Return L arrays ``[E]`` int64: pairs per expert in the sequences of ``fold``."""
    load = [np.zeros(size, dtype=np.int64) for size in trace.model.num_experts]
    for chunk in trace.chunks(fold):
        for counts, ids in zip(load, chunk.experts, strict=True):
            counts += np.bincount(ids.ravel(), minlength=len(counts))
    return load
